"""What the controller believes of workers: lanes, pages, weights, codes, actions in flight, plans."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.estimates import Delays, Samples, Timings
from clockwork_serve.controller.life import LOADING, NEVER, WEIGHTS_AFTER, WEIGHTS_STATES, WEIGHTS_STEPS
from clockwork_serve.controller.queues import Queue, ServedModel, Waiter
from clockwork_serve.controller.timers import NEVER_NS, Timer
from clockwork_serve.messages import Action, Code, DeviceSpec, Extent, Profile, Running
from clockwork_serve.units import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from clockwork_serve.controller.timers import Watch


# ------------------------------------------------------------
# Codes that a device is ready to run, and the ways to run a queue with them; it chooses none.


class BatchChoice:
    """A way to run a queue on a device: ``count`` requests at batch size ``size``."""

    __slots__ = ("count", "samples", "size")

    def __init__(self, count: int, size: int, samples: Samples) -> None:
        self.count = count
        self.size = size
        self.samples = samples
        """``samples.estimate_ns`` is how long it will take there."""


class CodeOnDevice:
    """A code that a device is ready to run: its profile there and the batch sizes that fit and pay."""

    __slots__ = ("_batches", "profile", "sizes", "timings")

    def __init__(self, profile: Profile, sizes: frozenset[int], timings: Timings) -> None:
        self.profile = profile
        self.sizes = sizes
        self.timings = timings
        self._batches: dict[tuple[tuple[int, int], ...], tuple[BatchChoice, ...]] = {}
        """By a queue's sizes, of queues without a signature."""

    def batches(self, queue: Queue) -> tuple[BatchChoice, ...]:
        """The ways to run a queue here: sizes that pay, and always one request alone."""
        if queue.signature:
            return self._ways(queue)  # not kept: clients choose how many there are
        batches = self._batches.get(queue.sizes)
        if batches is None:
            batches = self._batches[queue.sizes] = self._ways(queue)
        return batches

    def _ways(self, queue: Queue) -> tuple[BatchChoice, ...]:
        return tuple(
            [
                BatchChoice(count, size, self.timings.infer(size, queue.signature))
                for count, size in queue.sizes
                if count == 1 or size in self.sizes
            ]
        )


def useful_sizes(code: Code, profile: Profile, spec: DeviceSpec, config: ControllerConfig) -> frozenset[int]:
    """Batch sizes that fit the device and the limits, and that save time per request.

    Enough of it against sizes half as large or smaller; against those between, any.
    """
    least = code.batch_sizes[0]
    row_ns = {least: profile.infer_ns.get(least, 0) / least}
    for size in code.batch_sizes[1:]:
        infer_ns = profile.infer_ns.get(size)
        if infer_ns is None or size > config.max_batch or infer_ns > config.max_exec_ns:
            continue
        if profile.workspace_bytes.get(size, 0) > spec.workspace_bytes:
            continue
        if profile.io_bytes.get(size, 0) > spec.io_bytes:
            continue
        half_ns = min([ns for smaller, ns in row_ns.items() if 2 * smaller <= size])
        each_ns = infer_ns / size
        if each_ns <= half_ns * (1 - config.min_batch_gain) and each_ns <= min(row_ns.values()):
            row_ns[size] = each_ns
    return frozenset(row_ns)


# ------------------------------------------------------------
# What the controller believes of a device's pages: who holds which, and where to make room.
#
# Weights lie in one contiguous extent, so that no tensor straddles pages that are not neighbours.


# ruff: noqa: PLR1730 - max() costs 100 ns more than a condition


Holder = TypeVar("Holder")

_NONE: Final = 1 << 64
"""Above every rank."""


class ExtentChoice(Generic[Holder]):
    """Where weights may go, and whom that displaces."""

    __slots__ = ("displaced", "extent")

    def __init__(self, extent: Extent, displaced: list[Holder]) -> None:
        self.extent = extent
        self.displaced = displaced


class PageMap(Generic[Holder]):
    """Extents by address. Held extents never overlap and lie inside ``0 .. count``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.used = 0
        """The sum of all held extents, in pages."""
        self._sizes: dict[int, int] = {}
        """How many held extents there are of each size."""
        self._firsts: list[int] = []
        """First pages of all held extents, ascending."""
        self._held: list[tuple[Extent, Holder]] = []
        """Parallel to ``_firsts``."""
        self._widest = count
        """No free gap is wider than that."""

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, extent: Extent, holder: Holder) -> None:
        """Give an extent that is free to a holder."""
        at = bisect_left(self._firsts, extent.first)
        self._firsts.insert(at, extent.first)
        self._held.insert(at, (extent, holder))
        self.used += extent.count
        self._sizes[extent.count] = self._sizes.get(extent.count, 0) + 1

    def release(self, extent: Extent) -> None:
        """Take an extent back from its holder."""
        at = bisect_left(self._firsts, extent.first)
        assert self._held[at][0] == extent, f"{extent} is not held; found {self._held[at][0]}"
        del self._firsts[at]
        del self._held[at]
        self.used -= extent.count
        if self._sizes[extent.count] == 1:
            del self._sizes[extent.count]
        else:
            self._sizes[extent.count] -= 1
        end = self._firsts[at] if at < len(self._firsts) else self.count
        gap = end - (self._end(at - 1) if at else 0)
        if gap > self._widest:
            self._widest = gap

    def holders(self) -> list[Holder]:
        """All holders, by address."""
        return [holder for _, holder in self._held]

    def gap(self, count: int) -> Extent | None:
        """The smallest free gap that takes ``count`` pages (its front), if there is one."""
        if self._widest < count or self.count - self.used < count:
            return None
        if not self._held or self._end(len(self._held) - 1) == self.used:
            return Extent(self.used, count)
        best = self.count + 1
        best_first = end = widest = 0
        for extent, _ in self._held:
            gap = extent.first - end
            if gap > widest:
                widest = gap
            if count <= gap < best:
                best, best_first = gap, end
            end = extent.first + extent.count
        gap = self.count - end
        if count <= gap < best:
            best, best_first = gap, end
        if gap > widest:
            widest = gap
        self._widest = widest
        return None if best > self.count else Extent(best_first, count)

    def all_of(self, count: int) -> bool:
        """Whether all held extents have this size: then any one of them makes room for another."""
        return len(self._sizes) == 1 and count in self._sizes

    def instead(self, extent: Extent) -> Extent:
        """Where weights of the same size go if those of a held extent go away."""
        at = bisect_left(self._firsts, extent.first)
        return Extent(self._end(at - 1) if at else 0, extent.count)

    def _end(self, at: int) -> int:
        extent = self._held[at][0]
        return extent.first + extent.count

    def room(self, count: int, rank: Callable[[Holder], int | None]) -> ExtentChoice[Holder] | None:
        """Make room for ``count`` pages, where there is no gap, by displacing neighbours of the lowest rank.

        ``rank`` tells how much a holder is wanted, from 0; None, that it may not be displaced. Of all
        contiguous stretches, the one whose most wanted holder is least wanted is taken (with models of one
        size, that is plain least-recently-used order).
        """
        held = self._held
        ranks = [rank(holder) for _, holder in held]
        best_worst, best_victims, best_at, best_start = _NONE, 0, 0, 0
        for at, first_rank in enumerate(ranks):
            if first_rank is None or first_rank > best_worst:
                continue
            start = self._end(at - 1) if at else 0
            worst, last = first_rank, at
            while True:
                last += 1
                end = held[last][0].first if last < len(held) else self.count
                if end - start >= count:
                    if worst < best_worst or last - at < best_victims:
                        best_worst, best_victims, best_at, best_start = worst, last - at, at, start
                    break
                wanted = ranks[last] if last < len(held) else None
                if wanted is None or wanted > best_worst:
                    break
                if wanted > worst:
                    worst = wanted
        if best_victims == 0:
            return None
        displaced = [holder for _, holder in held[best_at : best_at + best_victims]]
        return ExtentChoice(Extent(best_start, count), displaced)

    def check(self) -> None:
        """Assert the invariants."""
        end = 0
        for (extent, _), first in zip(self._held, self._firsts, strict=True):
            assert extent.first == first
            assert 0 <= extent.first - end <= self._widest, f"{extent} after {end}; gap <= {self._widest}"
            assert extent.count > 0
            end = extent.first + extent.count
        assert 0 <= self.count - end <= self._widest
        assert self.used == sum(extent.count for extent, _ in self._held)
        sizes = [extent.count for extent, _ in self._held]
        assert self._sizes == {size: sizes.count(size) for size in sizes}


# ------------------------------------------------------------
# What a policy keeps for a device: its strategies by urgency and what it waits for; it sends nothing.
#
# Strategies are kept lazily: at most one live entry each, whose key is never above the true urgency and is
# corrected when it surfaces. Pushing each batch size to each replica costs 500 us a request at 256 devices,
# lazy keys 9 to 22 us (measured on a prototype).


STALE_MIN: Final = 64
"""A heap of twice as many entries as after its last clearing, and this many more, is cleared again."""


class LaneTimer(Timer):
    """When a policy wants to look at a lane again."""

    __slots__ = ("is_exec", "plan")

    def __init__(self, plan: LanePlan, order: int, *, is_exec: bool) -> None:
        super().__init__(order)
        self.plan = plan
        self.is_exec = is_exec


class LanePlan:
    """See the module. The heap keeps itself in order; flags and timers are the policy's to use."""

    __slots__ = (
        "changed", "device", "exec_rests", "exec_timer", "full", "heap", "load_awake", "load_timer",
        "starved",
    )  # fmt: skip

    def __init__(self, device: DeviceBelief) -> None:
        self.device = device
        self.heap: list[tuple[int, int, Strategy]] = []
        """(key, queue order, strategy); stale where the strategy's ``key_ns`` is another."""
        self.full = STALE_MIN
        """With so many entries, the heap is cleared of stale ones."""
        self.changed = False
        """The exec lane is to be looked at."""
        self.exec_rests = False
        """The exec lane is full: its timer or its next result says when to look again."""
        self.exec_timer = LaneTimer(self, 2 * device.index, is_exec=True)
        self.load_awake = False
        """The load lane is to be offered all candidates, not only new ones."""
        self.starved = False
        """A candidate found no room or no time here; when that may have changed, it is offered again."""
        self.load_timer = LaneTimer(self, 2 * device.index + 1, is_exec=False)

    def push(self, strategy: Strategy, key_ns: int) -> None:
        """Enter a strategy with a key below the one it has, if it has one."""
        strategy.key_ns = key_ns
        heap = self.heap
        heappush(heap, (key_ns, strategy.queue.order, strategy))
        if len(heap) > self.full:
            entries = {id(entry[2]): entry for entry in heap if entry[2].key_ns == entry[0]}
            heap[:] = entries.values()
            heapify(heap)
            self.full = 2 * len(heap) + STALE_MIN

    def top(self) -> Strategy | None:
        """The strategy of the lowest live key."""
        heap = self.heap
        while heap:
            key_ns, _, strategy = heap[0]
            if strategy.key_ns == key_ns:
                return strategy
            heappop(heap)
        return None

    def pop(self) -> None:
        """Take out the strategy that ``top`` just returned."""
        heappop(self.heap)[2].key_ns = NEVER_NS

    def remove(self, strategy: Strategy) -> None:
        """Its weights are going: its entries are stale."""
        strategy.key_ns = NEVER_NS

    def check(self, strategy: Strategy) -> None:
        """Assert that a strategy did not fall out of the heap."""
        entry = (strategy.key_ns, strategy.queue.order, strategy)
        assert strategy.key_ns == NEVER_NS or entry in self.heap, f"{self.device.name}: a strategy fell out"


# ------------------------------------------------------------
# When those who are told to come again should: one after another, as fast as a device could serve them.
#
# Told the same, all who were refused in one instant would come again in one instant, and almost all in vain.
# So each is told a turn of its own. Nothing is kept free for it: a turn is advice, not a reservation.


RETURNS_MAX_NS: Final = 2 * NS_PER_S
"""No turn is later than this: many never come again, or sooner than told, and others would wait for them."""


class Returns:
    """The turns that were given on a device."""

    __slots__ = ("_next_ns",)

    def __init__(self) -> None:
        self._next_ns = 0

    def turn_ns(self, soonest_ns: int, cost_ns: int, now_ns: int) -> int:
        """The next turn, not before ``soonest_ns``; who takes it will use ``cost_ns`` of the device."""
        turn_ns = max(soonest_ns, min(self._next_ns, now_ns + RETURNS_MAX_NS))
        self._next_ns = turn_ns + cost_ns
        return turn_ns


# ------------------------------------------------------------
# What the controller believes of workers: lanes, pages, weights, actions in flight.


# ruff: noqa: FURB136 - max() and min() cost 100 ns more than a condition


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
        """Its live key in its device's ``LanePlan``; NEVER_NS if it has none there."""
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


class AdoptedAction:
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
        self.pages: PageMap[Residency] = PageMap(spec.pages)
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
        self.plan = LanePlan(self)
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
