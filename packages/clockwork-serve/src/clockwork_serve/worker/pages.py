"""The worker's records of a device: which weights hold which pages, and the state of each code."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections import deque
from typing import Final

from clockwork_serve.messages import Code, CodeAdded, DeviceSpec, Extent, Infer, Load, Profile, Weights

# ------------------------------------------------------------
# Pages.
#
# *Weights* claim their extent when their LOAD starts, are ready when it succeeds, and leave when it fails or
# an UNLOAD ends (whether it succeeds or not).
#
#     LOADING --loaded--> READY --unload--> UNLOADING --forgotten--> EMPTY
#        +-----------------failed-----------------------------------> EMPTY


class WeightsState(enum.StrEnum):
    """The state of the weights in an extent."""

    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    EMPTY = "empty"


class WeightsStep(enum.StrEnum):
    """A change of weights' state."""

    LOADED = "loaded"
    FAILED = "failed"
    UNLOAD = "unload"
    FORGOTTEN = "forgotten"


WEIGHTS_LIFE: dict[WeightsState, dict[WeightsStep, WeightsState]] = {
    WeightsState.LOADING: {WeightsStep.LOADED: WeightsState.READY, WeightsStep.FAILED: WeightsState.EMPTY},
    WeightsState.READY: {WeightsStep.UNLOAD: WeightsState.UNLOADING},
    WeightsState.UNLOADING: {WeightsStep.FORGOTTEN: WeightsState.EMPTY},
    WeightsState.EMPTY: {},
}


# Module constants for what is compared often: an Enum's attribute takes 40 ns.
WEIGHTS_LOADING: Final = WeightsState.LOADING
WEIGHTS_READY: Final = WeightsState.READY
WEIGHTS_EMPTY: Final = WeightsState.EMPTY


class HeldExtent:
    """An extent that holds weights.

    ``stale`` weights were loaded for an earlier controller and are not retained by this one: they are
    unloaded once no INFER reads them. ``readers`` counts the INFERs, running or queued, whose job has these
    weights in its ``held``.
    """

    __slots__ = (
        "code_id", "count", "extent", "first", "model", "readers", "stale", "state", "version",
        "weights",
    )  # fmt: skip

    def __init__(
        self, extent: Extent, version: int, model: str, code_id: str, weights: Weights | None = None
    ) -> None:
        self.extent = extent
        self.first = extent.first
        self.count = extent.count
        self.version = version
        self.model = model
        self.code_id = code_id
        self.weights = weights
        self.state = WEIGHTS_LOADING
        self.stale = False
        self.readers = 0

    def step(self, step: WeightsStep) -> None:
        """Change state; asserts that the step is legal."""
        following = WEIGHTS_LIFE[self.state].get(step)
        assert following is not None, f"{self.model} in {self.extent}: {step.name} while {self.state.name}"
        self.state = following

    def serves(self, action: Infer, first: int, count: int) -> bool:
        """Whether these are the weights of an INFER (``first`` and ``count``: its extent)."""
        return (
            self.first == first
            and self.version == action.version
            and self.count == count
            and self.model == action.model
            and self.code_id == action.code_id
            and not self.stale
        )


class Pages:
    """The held extents of ``count`` pages. They never overlap and lie inside ``0 .. count``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.by_first: dict[int, HeldExtent] = {}  # all held extents by their first page
        self._firsts: list[int] = []  # the keys of by_first, ascending

    def at(self, extent: Extent, version: int) -> HeldExtent | None:
        """The weights of that version in exactly that extent."""
        held = self.by_first.get(extent.first)
        if held is None or held.count != extent.count or held.version != version:
            return None
        return held

    def overlapping(self, extent: Extent) -> list[HeldExtent]:
        """All weights that hold a page of ``extent``, by address."""
        first = extent.first
        end = first + extent.count
        firsts = self._firsts
        at = bisect_left(firsts, first)
        found: list[HeldExtent] = []
        if at > 0:
            before = self.by_first[firsts[at - 1]]
            if before.first + before.count > first:
                found.append(before)
        while at < len(firsts) and firsts[at] < end:
            found.append(self.by_first[firsts[at]])
            at += 1
        return found

    def claim(self, held: HeldExtent) -> None:
        """Assign free pages to weights."""
        self._firsts.insert(bisect_left(self._firsts, held.first), held.first)
        self.by_first[held.first] = held

    def release(self, held: HeldExtent) -> None:
        """Free the pages of weights that are EMPTY."""
        assert held.state is WEIGHTS_EMPTY, f"{held.model} leaves while {held.state.name}"
        assert self.by_first.get(held.first) is held, f"{held.model} does not hold {held.extent}"
        del self._firsts[bisect_left(self._firsts, held.first)]
        del self.by_first[held.first]

    def all(self) -> list[HeldExtent]:
        """All held extents, by address."""
        return [self.by_first[first] for first in self._firsts]

    def check(self) -> None:
        """Assert that extents are sorted, disjoint and inside the device."""
        assert sorted(self.by_first) == self._firsts
        end = 0
        for held in self.all():
            assert held.first >= end and held.count > 0, f"{held.extent} overlaps the one before it"
            assert held.state is not WeightsState.EMPTY, f"{held.extent} is empty, and held"
            end = held.first + held.count
        assert end <= self.count, f"the last extent ends at page {end} of {self.count}"


# ------------------------------------------------------------
# Codes.
#
# A *code* is prepared once it is added, and retired once it is removed and no action uses it; a failed one is
# prepared again when it is added again.
#
#     ABSENT --prepare--> PREPARING --ok------> READY --retire--> RETIRING --gone--> ABSENT
#                           +--failed--> FAILED --retire--> RETIRING
#                                        FAILED --prepare--> PREPARING


class CodeState(enum.StrEnum):
    """The state of a code on one device."""

    ABSENT = "absent"
    PREPARING = "preparing"
    READY = "ready"
    FAILED = "failed"
    RETIRING = "retiring"


class CodeStep(enum.StrEnum):
    """A change of a code's state."""

    PREPARE = "prepare"
    OK = "ok"
    FAILED = "failed"
    RETIRE = "retire"
    GONE = "gone"


CODE_LIFE: dict[CodeState, dict[CodeStep, CodeState]] = {
    CodeState.ABSENT: {CodeStep.PREPARE: CodeState.PREPARING},
    CodeState.PREPARING: {CodeStep.OK: CodeState.READY, CodeStep.FAILED: CodeState.FAILED},
    CodeState.READY: {CodeStep.RETIRE: CodeState.RETIRING},
    CodeState.FAILED: {CodeStep.PREPARE: CodeState.PREPARING, CodeStep.RETIRE: CodeState.RETIRING},
    CodeState.RETIRING: {CodeStep.GONE: CodeState.ABSENT},
}


LOADED: Final = 0  # the key of LOADs where INFERs have their batch size
RECENT: Final = 10  # how many durations are kept of each kind; estimates use as many
SIGNATURES_MAX: Final = 64  # how many kinds are kept; bounded, for clients choose the shapes

CODE_READY: Final = CodeState.READY  # a name of the module's own: an Enum's attribute takes 40 ns


class HeldCode:
    """A code on one device.

    ``wanted``: it is added and not removed. ``ready_due``: a CodeReady is owed to the controller; only then
    is the code prepared. ``chore``: a Prepare or Retire of it is queued on the load lane. ``users`` counts
    actions, queued or running, that use it, and weights in pages that are laid out by it: a code with users
    is not retired. ``fitting`` are its batch sizes that the device has room for.
    """

    __slots__ = (
        "chore", "code", "fitting", "profile", "ready_due", "recent", "state", "users", "wanted",
    )  # fmt: skip

    def __init__(self, code: Code) -> None:
        self.code = code
        self.profile: Profile | None = None
        self.state = CodeState.ABSENT
        self.wanted = True
        self.ready_due = True
        self.chore = False
        self.users = 0
        self.fitting: frozenset[int] = frozenset()
        self.recent: dict[tuple[int, str], deque[int]] = {}  # durations in ns by batch size and signature

    def learn_duration(self, work: object, lasted_ns: int) -> None:
        """Record the duration of a LOAD or INFER, for a successor of the controller."""
        if type(work) is Infer:
            key = work.batch, work.signature
        elif type(work) is Load:
            key = LOADED, ""
        else:
            return
        recent = self.recent.get(key)
        if recent is None:
            if key[1] and len(self.recent) >= SIGNATURES_MAX:
                del self.recent[next(iter(self.recent))]
            recent = self.recent[key] = deque(maxlen=RECENT)
        recent.append(lasted_ns)

    def add(self, event: CodeAdded, spec: DeviceSpec) -> None:
        """The controller added it (again): a CodeReady is owed."""
        self.code = event.code
        self.wanted = self.ready_due = True
        for profile in event.profiles:
            if profile.device_kind == spec.kind:
                self.profile = profile
        fitting = set()
        for batch in self.code.batch_sizes:
            if not spec.shortage(batch, *self.need_of(batch)):
                fitting.add(batch)
        self.fitting = frozenset(fitting)

    def step(self, step: CodeStep) -> None:
        """Change state; asserts that the step is legal."""
        following = CODE_LIFE[self.state].get(step)
        assert following is not None, f"code {self.code.code_id}: {step.name} while {self.state.name}"
        self.state = following

    @property
    def to_prepare(self) -> bool:
        """Whether a Prepare is the next thing it needs."""
        return self.ready_due and self.state in (CodeState.ABSENT, CodeState.FAILED)

    @property
    def to_retire(self) -> bool:
        """Whether a Retire is the next thing it needs."""
        return not self.wanted and not self.users and self.state in (CodeState.READY, CodeState.FAILED)

    def need_of(self, batch: int) -> tuple[int, int]:
        """Workspace and I/O bytes of an INFER of that batch size; 0 without a profile."""
        if self.profile is None:
            return 0, 0
        return self.profile.workspace_bytes.get(batch, 0), self.profile.io_bytes.get(batch, 0)
