"""What the controller believes of workers: lanes, pages, weights, actions in flight."""

from __future__ import annotations

# ruff: noqa: FURB136 - max() and min() cost 100 ns more than a condition
from heapq import heapify, heappush
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.codes import CodeOnDevice
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.delays import Delays
from clockwork_serve.controller.estimator import Samples
from clockwork_serve.controller.life import LOADING, NEVER, WEIGHTS_AFTER, WEIGHTS_STATES, WEIGHTS_STEPS
from clockwork_serve.controller.pages import Pages
from clockwork_serve.controller.plan import Plan
from clockwork_serve.controller.queues import Queue, ServedModel, Waiter
from clockwork_serve.controller.returns import Returns
from clockwork_serve.controller.timers import NEVER_NS, Timer
from clockwork_serve.messages import Action, Code, DeviceSpec, Extent, Running
from clockwork_serve.units import NS_PER_MS

if TYPE_CHECKING:
    from clockwork_serve.controller.watches import Watch

IDLE_MIN: Final = 64
"""A device's ``idle`` is made anew when it has so many more entries than twice its weights."""

LOOK_NS: Final = 25 * NS_PER_MS
"""A device that has work is looked at so often: do its lanes move?"""

PAUSE_NS: Final = NS_PER_MS
"""A lane that had no work for less than this made no pause."""


class LaneBelief:
    """When a lane will be free. Actions on it run one after another, in the order sent."""

    __slots__ = (
        "_outstanding", "behind_ns", "busy_since_ns", "free_ns", "head_end_ns", "moved", "network_ns",
        "stalled", "watch",
    )  # fmt: skip

    def __init__(self, network_ns: int) -> None:
        self.network_ns = network_ns
        """How long a message to the worker takes; a policy may correct it by what is measured."""
        self._outstanding: list[tuple[int, int]] = []
        """(action id, expected duration) of all actions sent and not ended."""
        self.head_end_ns = NEVER_NS
        """When the first of them is expected to end."""
        self.behind_ns = 0
        """The expected durations of those behind the first, together."""
        self.free_ns = 0
        """When all are expected to have ended; if there is none, when the last one ended."""
        self.busy_since_ns = 0
        """When it was last given work after a pause."""
        self.stalled = False
        """The first of them is so late that nobody knows when it ends; see ``stalls``."""
        self.moved = False
        """It was given work since the rejecting layer last looked; see ``Belief.moved``."""
        self.watch: Watch | None = None
        """The rejecting layer's; None where that is off."""

    def __len__(self) -> int:
        return len(self._outstanding)

    @property
    def head_id(self) -> int:
        """The first of them."""
        return self._outstanding[0][0]

    @property
    def head_lasts_ns(self) -> int:
        """How long the first of them was expected to take."""
        return self._outstanding[0][1]

    def available_ns(self, now_ns: int) -> int:
        """When an action sent now could start; while the running one is late, it is counted to end now."""
        free_ns = self.free_ns if now_ns <= self.head_end_ns else now_ns + self.behind_ns
        soonest_ns = now_ns + self.network_ns
        return free_ns if free_ns > soonest_ns else soonest_ns

    def busy(self, now_ns: int) -> bool:
        """Whether an action sent now would have to wait for others."""
        return self.available_ns(now_ns) > now_ns + self.network_ns

    def overdue_ns(self, now_ns: int) -> int:
        """By how much the running action is late against its estimate; below 0 if it is not, or none runs."""
        return now_ns - self.head_end_ns

    def send(self, action_id: int, expected_ns: int, now_ns: int) -> None:
        """An action goes out."""
        if self._outstanding:
            self.behind_ns += expected_ns
            self.free_ns += expected_ns
        else:
            if now_ns - self.free_ns >= PAUSE_NS:
                self.busy_since_ns = now_ns
            soonest_ns = now_ns + self.network_ns
            begin_ns = self.free_ns if self.free_ns > soonest_ns else soonest_ns
            self.free_ns = self.head_end_ns = begin_ns + expected_ns
        self._outstanding.append((action_id, expected_ns))

    def end(self, action_id: int, ended_ns: int) -> None:
        """An action ended, or was refused, at ``ended_ns``."""
        outstanding = self._outstanding
        if outstanding and outstanding[0][0] == action_id:
            ended = outstanding.pop(0)
            self.stalled = False
            if outstanding:
                head_ns = outstanding[0][1]
                self.head_end_ns = ended_ns + head_ns
                self.behind_ns -= head_ns
                self.free_ns = self.head_end_ns + self.behind_ns
            else:
                begin_ns = self.head_end_ns - ended[1]
                self.free_ns = ended_ns if ended_ns > begin_ns else begin_ns
                self.head_end_ns = NEVER_NS
            return
        for at, (other_id, expected_ns) in enumerate(outstanding):
            if other_id == action_id:
                del outstanding[at]
                self.behind_ns -= expected_ns
                self.free_ns -= expected_ns
                return
        raise AssertionError(f"action {action_id} is not on this lane")

    def check(self) -> None:
        """Assert the invariants."""
        expected = [expected_ns for _, expected_ns in self._outstanding]
        assert self.behind_ns == sum(expected[1:])
        assert (self.head_end_ns == NEVER_NS) == (not expected)
        assert not expected or self.free_ns == self.head_end_ns + self.behind_ns


class Residency:
    """One model's weights on one device."""

    __slots__ = (
        "code", "device", "extent", "in_flight", "model", "ready_ns", "share_ns", "slow", "state", "used",
        "version",
    )  # fmt: skip

    def __init__(
        self, model: ServedModel, device: DeviceBelief, code: CodeOnDevice, extent: Extent, version: int
    ) -> None:
        self.model = model
        self.device = device
        self.code = code
        self.extent = extent
        self.version = version
        self.state: int = LOADING
        self.ready_ns = 0
        """When the LOAD is expected to end."""
        self.in_flight = 0
        """INFERs sent and not ended that read these weights; such weights are never displaced."""
        self.used = 0
        """Rises with each use on this device: least recently used is least."""
        self.share_ns = 0
        """How much of the model's demand its device is counted for, unless it is the only one."""
        self.slow = False
        """Here alone it took longer than a request had, which hoped for a LOAD elsewhere; no INFER since."""

    @property
    def serves(self) -> bool:
        """Whether its device serves the model, as far as is known: it moves, and is quick enough."""
        return not (self.slow or self.device.exec.stalled)

    def step(self, step: int) -> None:
        """Move on by the table; a step that is not in it is a bug."""
        after = WEIGHTS_AFTER[self.state][step]
        assert after != NEVER, f"{self.model.key}: {WEIGHTS_STEPS[step]} while {WEIGHTS_STATES[self.state]}"
        self.state = after


class Strategy:
    """A queue on one device that has its weights READY: what a policy weighs against others there."""

    __slots__ = ("batches", "count", "device", "key_ns", "lane", "least", "plan", "queue", "residency")

    def __init__(self, queue: Queue, residency: Residency) -> None:
        self.queue = queue
        self.residency = residency
        self.device = residency.device
        self.lane = residency.device.exec
        self.plan = residency.device.plan
        self.batches = residency.code.batches(queue)
        """Ways to run it that the device allows, ascending; the first takes one request."""
        self.least = residency.code.timings.infer(queue.least, queue.signature)
        """How long the least batch takes that the policy will run."""
        self.key_ns = NEVER_NS
        """Its live key in its device's ``Plan``; NEVER_NS if it has none there."""
        self.count = 0
        """The batch (requests) that the key is for; a policy's to use."""

    def __lt__(self, other: Strategy) -> bool:
        return self.residency.version < other.residency.version


class Sent:
    """An action in flight."""

    __slots__ = ("action", "device", "idle_ns", "residency", "samples", "waiters")

    def __init__(
        self,
        action: Action,
        device: DeviceBelief,
        residency: Residency | None,
        samples: Samples | None,
        waiters: list[Waiter],
    ) -> None:
        self.action = action
        self.device = device
        self.residency = residency
        self.samples = samples
        """Where its duration is learned; None for an UNLOAD."""
        self.waiters = waiters
        """The requests of an INFER, in the order of its calls."""
        self.idle_ns = -1
        """When it was sent, if its lane was idle then."""


class Inherited:
    """An action of another controller, that runs; ``residency``: the weights it moves or reads, if kept.

    ``expected_ns`` is what that controller expected it to take, ``load_bytes`` what a LOAD moves.
    """

    __slots__ = ("device", "expected_ns", "lane", "load_bytes", "residency")

    def __init__(
        self, device: DeviceBelief, running: Running, residency: Residency | None, load_bytes: int
    ) -> None:
        self.device = device
        self.lane = running.lane
        self.expected_ns = running.expected_ns
        self.load_bytes = load_bytes
        self.residency = residency


class Guard(Timer):
    """When a device is to be looked at next: does it answer? It fires after work was sent, never before."""

    __slots__ = ("device", "sure")

    def __init__(self, device: DeviceBelief, *, off: bool) -> None:
        super().__init__(device.index)
        self.device = device
        self.sure = False
        """It fired a moment ago, and the device was late then."""
        if off:
            self.at_ns = 0  # it is in no heap, and looks as if it were set


class Look(Timer):
    """When to look again whether a device's exec lane moves (``stalls``). It fires while that has work."""

    __slots__ = ("device", "late_id", "silent", "still")

    def __init__(self, device: DeviceBelief, *, off: bool) -> None:
        super().__init__(device.index)
        self.device = device
        self.late_id = 0
        """The action that was too late when it was looked at last."""
        self.still = False
        """It has not moved for so long that the device serves nobody."""
        self.silent = False
        """Its worker returned no beats, and was at nothing that explains it."""
        if off:
            self.at_ns = 0  # as a guard

    @property
    def serves(self) -> bool:
        """Whether the device does what it is asked, as far as is known."""
        return not (self.still or self.silent)


class DeviceBelief:
    """One device."""

    __slots__ = (
        "codes", "delays", "exec", "failed_codes", "guard", "idle", "index", "load", "load_key_ns", "load_ns",
        "look", "name", "pages", "pending_codes", "plan", "returns", "room_bytes", "since_ns", "spec", "up",
        "used", "warm", "worker",
    )  # fmt: skip

    def __init__(self, spec: DeviceSpec, worker: str, index: int, config: ControllerConfig) -> None:
        self.spec = spec
        self.name = spec.device
        self.worker = worker
        self.room_bytes = spec.pages * spec.page_bytes
        """The largest weights that it can take."""
        self.index = index
        """Creation order: makes ties between devices definite."""
        self.up = True
        self.exec = LaneBelief(config.network_ns)
        self.load = LaneBelief(config.network_ns)
        self.delays = Delays(config.network_ns, config.slack_ns)
        """As measured, for a policy that plans with them."""
        self.pages: Pages[Residency] = Pages(spec.pages)
        self.codes: dict[str, CodeOnDevice] = {}
        """All and only codes that the worker prepared here."""
        self.failed_codes: dict[str, str] = {}
        """Codes that the worker could not prepare here, or that are not for this device; and why."""
        self.pending_codes: set[str] = set()
        """Codes that the worker has yet to prepare here."""
        self.warm = False
        """Whether every code known when it joined was prepared, once."""
        self.used = 0
        """A counter of uses, the clock of least-recently-used."""
        self.idle: list[tuple[int, int, Residency]] = []
        """Heap of (use, version, weights) of all that are here, each ``use`` corrected when it surfaces."""
        self.load_ns = 0
        """Demand counted for this device: the sum of its residencies' shares."""
        self.load_key_ns = NEVER_NS
        """Where it is among the rejecting layer's load lanes."""
        self.plan = Plan(self)
        """The policy's."""
        self.returns = Returns()
        """When those who were refused were told to come again."""
        self.guard = Guard(self, off=not config.hang_ns)
        self.look = Look(self, off=config.released)
        self.since_ns = 0
        """When it was last told of a code to prepare, or had prepared one."""

    def expect(self, code: Code) -> None:
        """The worker will prepare a code here, if the device can run it."""
        if self.spec.runs(code.backend):
            self.pending_codes.add(code.code_id)
        else:
            self.failed_codes[code.code_id] = self.spec.misfit(code.backend)

    def touch(self, residency: Residency) -> None:
        """These weights were just used."""
        self.used += 1
        residency.used = self.used

    def hold(self, residency: Residency) -> None:
        """Weights are coming: their pages are taken."""
        self.touch(residency)
        self.pages.hold(residency.extent, residency)
        heappush(self.idle, (residency.used, residency.version, residency))
        if len(self.idle) > 2 * len(self.pages) + IDLE_MIN:
            self.idle = [(one.used, one.version, one) for one in self.pages.holders()]
            heapify(self.idle)

    def check(self) -> None:
        """Assert the invariants."""
        self.pages.check()
        idle = {one.version for _, _, one in self.idle}
        assert idle >= {one.version for one in self.pages.holders()}
        self.exec.check()
        self.load.check()
        assert not (self.pending_codes & self.codes.keys())
