"""What is really in a device's pages and on its lanes; no machine's book. It checks, and changes nothing."""

from __future__ import annotations

from clockwork_serve.messages import Action, DeviceSpec, Extent, Infer, Lane, Load, Unload


class Lying:
    """Weights in a device's pages, in truth."""

    __slots__ = ("extent", "model", "ready", "version")

    def __init__(self, action: Load) -> None:
        self.model = action.model
        self.extent = action.extent
        self.version = action.version
        self.ready = False


class Truth:
    """One device: what lies in its pages and what runs on its lanes."""

    __slots__ = ("lying", "running", "slowest", "spec", "stalled_ns", "waited_ns")

    def __init__(self, spec: DeviceSpec) -> None:
        self.spec = spec
        self.lying: dict[int, Lying] = {}
        """All weights that hold pages, by first page."""
        self.running: dict[Lane, Action] = {}
        self.slowest = 1.0
        """The most that it was slowed down, ever."""
        self.stalled_ns = 0
        """For how long its lanes were stopped, ever."""
        self.waited_ns = 0
        """The most that one lane waited for the other, where they share cores."""

    def start(self, action: Action, lane: Lane) -> None:
        """An action starts: it is alone on its lane, and the pages are as it needs them."""
        assert lane not in self.running, f"{action} starts while {self.running[lane]} runs"
        assert (lane is Lane.EXEC) == isinstance(action, Infer), f"{action} starts on lane {lane}"
        self.running[lane] = action
        if isinstance(action, Load):
            self._claim(action)
            return
        lying = self.lying.get(action.extent.first)
        assert (
            lying is not None
            and lying.ready
            and lying.version == action.version
            and lying.extent == action.extent
            and lying.model == action.model
        ), f"{action} starts, and its weights are not there"
        if isinstance(action, Unload):
            reader = self.running.get(Lane.EXEC)
            assert reader is None or reader.version != action.version, f"{action} starts while they are read"
            lying.ready = False

    def _claim(self, action: Load) -> None:
        extent = action.extent
        assert extent.first >= 0 and extent.first + extent.count <= self.spec.pages, f"{action} leaves memory"
        assert action.weights.size <= extent.count * self.spec.page_bytes, f"{action} does not fit its pages"
        for other in self.lying.values():
            assert not other.extent.overlaps(extent), f"{action} starts in pages that hold {other.model}"
        self.lying[extent.first] = Lying(action)

    def end(self, lane: Lane, action_id: int) -> None:
        """What runs on a lane ends."""
        action = self.running.pop(lane, None)
        assert action is not None and action.action_id == action_id, f"{action_id} ends, and {action} ran"
        if isinstance(action, Load):
            self.lying[action.extent.first].ready = True
        elif isinstance(action, Unload):
            del self.lying[action.extent.first]

    def versions(self) -> set[int]:
        """Of all weights that hold pages."""
        return {one.version for one in self.lying.values()}

    def has(self, extent: Extent, version: int) -> bool:
        """Whether that version is ready there."""
        lying = self.lying.get(extent.first)
        return lying is not None and lying.ready and lying.version == version and lying.extent == extent
