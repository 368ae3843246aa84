"""What the controller believes of workers: lanes, pages, weights, actions in flight."""

from __future__ import annotations

from collections import deque

from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.life import WEIGHTS_LIFE, WeightsState, WeightsStep
from clockwork_serve.controller.pages import Pages
from clockwork_serve.controller.queues import Queue, ServedModel, Waiter
from clockwork_serve.messages import Action, DeviceSpec, Extent, Profile


class Sent:
    """An action in flight."""

    __slots__ = ("action", "expected_ns", "queue", "residency", "sent_ns", "waiters")

    def __init__(self, action: Action, expected_ns: int, sent_ns: int, residency: Residency | None) -> None:
        self.action = action
        self.expected_ns = expected_ns
        self.sent_ns = sent_ns
        self.residency = residency
        self.queue: Queue | None = None
        self.waiters: list[Waiter] = []
        """The requests of an INFER, in the order of its calls."""


class LaneBelief:
    """When a lane will be free. Actions on it run one after another, in the order sent."""

    __slots__ = ("_begin_ns", "_network_ns", "_outstanding", "_total_ns")

    def __init__(self, network_ns: int) -> None:
        self._network_ns = network_ns
        self._begin_ns = 0
        """When the first outstanding action began, or the last one ended."""
        self._outstanding: deque[tuple[int, int]] = deque()
        """(action id, expected duration) of all actions sent and not ended."""
        self._total_ns = 0
        """Sum of the expected durations of ``_outstanding``."""

    def __len__(self) -> int:
        return len(self._outstanding)

    def available_ns(self, now_ns: int) -> int:
        """When an action sent now could start."""
        free_ns = self._begin_ns + self._total_ns
        if self._outstanding:
            head_ns = self._outstanding[0][1]
            if self._begin_ns + head_ns < now_ns:
                free_ns = now_ns + self._total_ns - head_ns
        return max(free_ns, now_ns + self._network_ns)

    def head_end_ns(self) -> int:
        """When the running action is expected to end; the last end, if none runs."""
        return self._begin_ns + self._outstanding[0][1] if self._outstanding else self._begin_ns

    def overdue_ns(self, now_ns: int) -> int:
        """By how much the running action is late against its estimate; at most 0 if it is not."""
        return now_ns - self._begin_ns - self._outstanding[0][1] if self._outstanding else 0

    def send(self, action_id: int, expected_ns: int, now_ns: int) -> None:
        """An action goes out."""
        if not self._outstanding:
            self._begin_ns = max(self._begin_ns, now_ns + self._network_ns)
        self._outstanding.append((action_id, expected_ns))
        self._total_ns += expected_ns

    def end(self, action_id: int, ended_ns: int) -> None:
        """An action ended, or was refused, at ``ended_ns``."""
        outstanding = self._outstanding
        if outstanding and outstanding[0][0] == action_id:
            self._total_ns -= outstanding.popleft()[1]
            self._begin_ns = max(self._begin_ns, ended_ns) if not outstanding else ended_ns
            return
        for at, (other_id, expected_ns) in enumerate(outstanding):
            if other_id == action_id:
                del outstanding[at]
                self._total_ns -= expected_ns
                return
        raise AssertionError(f"action {action_id} is not on this lane")

    def check(self) -> None:
        """Assert the invariants."""
        assert self._total_ns == sum(expected for _, expected in self._outstanding)


class Residency:
    """One model's weights on one device."""

    __slots__ = ("device", "extent", "in_flight", "model", "ready_ns", "state", "used", "version")

    def __init__(self, model: ServedModel, device: DeviceBelief, extent: Extent, version: int) -> None:
        self.model = model
        self.device = device
        self.extent = extent
        self.version = version
        self.state = WeightsState.LOADING
        self.ready_ns = 0
        """When the LOAD is expected to end."""
        self.in_flight = 0
        """INFERs sent and not ended that read these weights; such weights are never displaced."""
        self.used = 0
        """Rises with each use on this device: least recently used is least."""

    def step(self, step: WeightsStep) -> None:
        """Move on by the table; a step that is not in it is a bug."""
        after = WEIGHTS_LIFE[self.state].get(step)
        assert after is not None, f"{self.model.model.key}: {step.value} while {self.state.value}"
        self.state = after


class CodeOnDevice:
    """A code that a device is ready to run: its profile there and the batch sizes that fit and pay."""

    __slots__ = ("profile", "sizes")

    def __init__(self, profile: Profile, sizes: frozenset[int]) -> None:
        self.profile = profile
        self.sizes = sizes


class DeviceBelief:
    """One device."""

    __slots__ = (
        "codes", "exec", "failed_codes", "index", "load", "load_ns", "pages", "pending_codes", "spec", "used",
        "warm", "worker",
    )  # fmt: skip

    def __init__(self, spec: DeviceSpec, worker: str, index: int, config: ControllerConfig) -> None:
        self.spec = spec
        self.worker = worker
        self.index = index
        self.exec = LaneBelief(config.network_ns)
        self.load = LaneBelief(config.network_ns)
        self.pages: Pages[Residency] = Pages(spec.pages)
        self.codes: dict[str, CodeOnDevice] = {}
        """All and only codes that the worker prepared here."""
        self.failed_codes: dict[str, str] = {}
        """Codes that the worker could not prepare here, and why."""
        self.pending_codes: set[str] = set()
        """Codes that the worker has yet to prepare here."""
        self.warm = False
        """Whether every code known when it joined was prepared, once."""
        self.used = 0
        """A counter of uses, the clock of least-recently-used."""
        self.load_ns = 0
        """Demand counted for this device: the sum of all models' ``shares`` of it."""

    @property
    def name(self) -> str:
        """The device's name."""
        return self.spec.device

    def touch(self, residency: Residency) -> None:
        """These weights were just used."""
        self.used += 1
        residency.used = self.used

    def check(self) -> None:
        """Assert the invariants."""
        self.pages.check()
        self.exec.check()
        self.load.check()
        assert not (self.pending_codes & self.codes.keys())
