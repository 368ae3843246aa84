"""What the controller believes of models and devices: records that refer to each other, in one place.

A *model* has queues of *waiters* (requests that are not over) and *residencies* (its weights on a device). A
queue has a *strategy* for each device where it could run. A *device* has two lanes, pages, codes, and what a
policy keeps for it. Nothing here chooses.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heapify, heappop, heappush
from typing import Final

from clockwork_serve.controller.codes import CodeOnDevice
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.estimates import Delays
from clockwork_serve.controller.life import (
    LOADING,
    NEVER,
    REQUEST_AFTER,
    REQUEST_STATES,
    REQUEST_STEPS,
    WAITING,
    WEIGHTS_AFTER,
    WEIGHTS_STATES,
    WEIGHTS_STEPS,
)
from clockwork_serve.controller.pages import PageMap
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS, RetrySlots, Timer
from clockwork_serve.messages import (
    LEAST_PRIORITY,
    USUAL_PRIORITY,
    Code,
    DeviceSpec,
    Extent,
    Model,
    Request,
)
from clockwork_serve.units import NS_PER_MS

# ruff: noqa: FURB136 - max() and min() cost 100 ns more than a condition

STALE_MIN: Final = 64
"""A heap of twice as many entries as after its last clearing, and this many more, is cleared again."""

IDLE_MIN: Final = 64
"""A device's ``idle`` is made anew when it has so many more entries than twice its weights."""

LOOK_NS: Final = 25 * NS_PER_MS
"""A device that has work is looked at so often: do its lanes move?"""

PAUSE_NS: Final = NS_PER_MS
"""A lane that had no work for less than this made no pause."""


# ------------------------------------------------------------
# Requests that wait, by model and by what may share a batch, earliest deadline first.


BAND_NS: Final = 1 << 58
"""A class of priority is so far from the next on an axis of keys: farther than any two instants."""


def level(priority: int) -> int:
    """The class of a priority: 1 (most urgent) to 15; 0 stands for the usual one."""
    if priority <= 0:
        return USUAL_PRIORITY
    return min(priority, LEAST_PRIORITY)


class Waiter(Record):
    """A request that is not over yet, and its state in the controller."""

    __slots__ = (
        "alone", "cold", "demand_ns", "due_ns", "held", "queue", "request", "retries", "slo_ns", "state",
    )  # fmt: skip

    def __init__(
        self, request: Request, due_ns: int, slo_ns: int, demand_ns: int, queue: Queue, *, cold: bool
    ) -> None:
        self.request = request
        self.due_ns = due_ns
        """When its execution must have ended, by plan; see ``Belief.due_ns``."""
        self.slo_ns = slo_ns
        """As in its request, which computes it anew each time."""
        self.demand_ns = demand_ns
        """What it adds to its model's demand while it waits."""
        self.queue = queue
        self.state: int = WAITING
        self.cold = cold
        """Its weights were on no device when it arrived."""
        self.alone = False
        """It shared a batch that failed, and may not share one again."""
        self.retries = 0
        """How often it was in flight on a worker that was lost."""
        self.held = 0
        """How many actions keep its tensors beside the one that it waits for: those of workers that hung,
        and, once it is SPENT, whichever it was in."""

    def step(self, step: int) -> None:
        """Move on by the table; a step that is not in it is a bug."""
        after = REQUEST_AFTER[self.state][step]
        assert after != NEVER, (
            f"{self.request.request_id}: {REQUEST_STEPS[step]} while {REQUEST_STATES[self.state]}"
        )
        self.state = after


class Queue(Record):
    """Requests of one model that may share a batch: equal class and signature, one row each, or each alone.

    ``sizes`` are the batch sizes to choose from, as (requests, batch size to run), ascending.
    """

    __slots__ = (
        "alone",
        "band_ns",
        "dues",
        "floors",
        "least",
        "level",
        "model",
        "order",
        "place_ns",
        "rows",
        "signature",
        "sizes",
        "strategies",
        "to_recheck",
        "waiters",
        "watch",
    )  # fmt: skip

    def __init__(
        self, model: ServedModel, signature: str, rows: int, order: int, *, alone: bool, priority: int = 0
    ) -> None:
        self.model = model
        self.level = level(priority)
        self.band_ns = (self.level - USUAL_PRIORITY) * BAND_NS
        """Added to the keys of its strategies, so that any of a more urgent class comes first."""
        self.signature = signature
        self.rows = rows
        self.alone = alone
        self.sizes = model.sizes(rows, alone=alone)
        self.order = order
        """Creation order: makes ties between queues definite."""
        self.dues: list[int] = []
        """``due_ns`` of each of ``waiters``, ascending."""
        self.waiters: list[Waiter] = []
        """All and only requests WAITING here."""
        self.strategies: tuple[Strategy, ...] = ()
        """One per device that has the weights READY."""
        self.floors: dict[int, int] = {}
        """By batch (requests): those due before this are given up at that size; a policy's to use."""
        self.least = self.sizes[0][1]
        """The least batch size that the policy will run this queue at; see ``Belief.require``."""
        self.to_recheck = False
        """The rejecting layer is to judge it: it is in ``Belief.rechecks``."""
        self.watch: Watch | None = None
        """Where the rejecting layer has its entry, at ``place_ns``."""
        self.place_ns = 0

    def __len__(self) -> int:
        return len(self.waiters)

    def add(self, waiter: Waiter) -> bool:
        """Put a request in its place; true if it is the first now."""
        dues, due_ns = self.dues, waiter.due_ns
        if not dues or dues[-1] <= due_ns:
            dues.append(due_ns)
            self.waiters.append(waiter)
            return len(dues) == 1
        at = bisect_right(dues, due_ns)
        dues.insert(at, due_ns)
        self.waiters.insert(at, waiter)
        return at == 0

    def remove(self, waiter: Waiter) -> None:
        """Take one request out."""
        at = bisect_left(self.dues, waiter.due_ns)
        while self.waiters[at] is not waiter:
            at += 1
        del self.dues[at]
        del self.waiters[at]

    def take(self, first: int, count: int) -> list[Waiter]:
        """Take ``count`` requests out, from place ``first``."""
        if count == len(self.waiters):
            taken, self.waiters = self.waiters, []
            self.dues.clear()
            return taken
        taken = self.waiters[first : first + count]
        del self.dues[first : first + count]
        del self.waiters[first : first + count]
        return taken

    def check(self) -> None:
        """Assert the invariants."""
        assert self.dues == sorted(self.dues)
        assert self.dues == [waiter.due_ns for waiter in self.waiters]
        assert all(waiter.state == WAITING for waiter in self.waiters)
        assert all(waiter.queue is self for waiter in self.waiters)
        for strategy in self.strategies:
            assert strategy.queue is self
            assert strategy.residency is self.model.residencies[strategy.device.name]


class ServedModel(Record):
    """A model that is served: its queues, its demand and where its weights are."""

    __slots__ = (
        "base_ns",
        "batch",
        "code",
        "code_id",
        "demand_ns",
        "dirty",
        "heat",
        "key",
        "load_key",
        "main",
        "model",
        "order",
        "pace_at_ns",
        "pace_ns",
        "priority",
        "quarantined",
        "queue_limit",
        "queues",
        "removed",
        "residencies",
        "sole",
        "waiting",
    )  # fmt: skip

    def __init__(self, model: Model, code: Code, order: int) -> None:
        self.model = model
        self.key = model.key
        self.queue_limit = model.queue_limit
        self.code = code
        self.code_id = code.code_id
        self.order = order
        self.priority = model.priority
        self.main: Queue | None = None
        """The queue of ordinary requests (no signature, one row, the model's class), once there was one; it
        stays.
        """
        self.queues: dict[tuple[str, int, bool, int], Queue] = {}
        """Queue by (signature, rows, alone, class): ``main``, and others that are not empty."""
        self.residencies: dict[str, Residency] = {}
        """Weights by device: all and only those LOADING or READY."""
        self.sole: Residency | None = None
        """The only one of them, if there is exactly one."""
        self.waiting = 0
        """Requests in all queues together."""
        self.demand_ns = 0
        """Lane time that the waiting requests ask for, weighted by how soon they want it."""
        self.heat = 0
        """How much it is asked for, if the policy keeps account of that; see ``heat``."""
        self.base_ns = 0
        """Batch-1 time by the first profile known; 0 until asked for."""
        self.pace_ns = 0
        """How long one of many requests takes at least, if known; see ``backlog``."""
        self.batch = 1
        """How many run together then."""
        self.pace_at_ns = 0
        """When that was looked up."""
        self.dirty = False
        """Its demand or residencies changed since the policy last looked; see ``Belief.dirty_models``."""
        self.load_key: int | None = None
        """Its priority in the scheduler's heap of LOAD candidates; None if it is not there."""
        self.removed = False
        self.quarantined = False
        """It takes devices down and is not served; nobody may wait for it, so ``queue_limit`` is 0."""

    def share_ns(self, residency: Residency) -> int:
        """How much of the demand a device that has the weights is counted for."""
        return self.demand_ns if residency is self.sole else residency.share_ns

    def add_residency(self, residency: Residency) -> None:
        """A LOAD of the weights is sent; a device that has them alone takes the whole demand."""
        sole = self.sole
        if sole is not None:
            sole.share_ns = self.demand_ns
            self.sole = None
        elif not self.residencies:
            self.sole = residency
            residency.device.load_ns += self.demand_ns
        self.residencies[residency.device.name] = residency

    def remove_residency(self, residency: Residency) -> None:
        """Weights are gone from a device."""
        residency.device.load_ns -= self.share_ns(residency)
        residency.share_ns = 0
        del self.residencies[residency.device.name]
        self.sole = None
        if len(self.residencies) == 1:
            self.sole = sole = next(iter(self.residencies.values()))
            sole.device.load_ns += self.demand_ns - sole.share_ns
            sole.share_ns = 0

    def band_ns(self) -> int:
        """Of the most urgent class that waits for it."""
        least_ns = 0
        first = True
        for queue in self.queues.values():
            if queue.dues and (first or queue.band_ns < least_ns):
                least_ns = queue.band_ns
                first = False
        return least_ns

    def find(self, request: Request, *, alone: bool) -> Queue | None:
        """The queue for such requests, if there is one."""
        return self.queues.get((request.signature, request.rows, alone, level(request.priority)))

    def open(self, signature: str, rows: int, order: int, *, alone: bool, priority: int = 0) -> Queue:
        """Make the queue for such requests."""
        queue = Queue(self, signature, rows, order, alone=alone, priority=priority)
        self.queues[signature, rows, alone, queue.level] = queue
        if not signature and rows == 1 and not alone and queue.level == level(self.priority):
            self.main = queue
        return queue

    def fits(self, rows: int) -> bool:
        """Whether a request of so many rows can be run at all."""
        return 1 <= rows <= self.model.batch_sizes[-1]

    def sizes(self, rows: int, *, alone: bool) -> tuple[tuple[int, int], ...]:
        """What a queue of such requests may run as, (requests, batch size), ascending."""
        sizes = self.model.batch_sizes
        if rows > 1:
            return ((1, next(size for size in sizes if size >= rows)),)
        if alone or not self.code.batched:
            return ((1, sizes[0]),)
        return tuple([(size, size) for size in sizes])


# ------------------------------------------------------------
# Lanes, and the queues whose heads can be in time on them.


class LaneBelief(Record):
    """When a lane will be free. Actions on it run one after another, in the order sent."""

    __slots__ = (
        "_outstanding",
        "behind_ns",
        "busy_since_ns",
        "dirty",
        "free_ns",
        "head_end_ns",
        "network_ns",
        "stalled",
        "watch",
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
        """The first of them is so late that its end cannot be predicted; see ``hangs.Stalls``."""
        self.dirty = False
        """It was given work since the rejecting layer last looked; see ``Belief.dirty_lanes``."""
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


class Watch(Timer):
    """The queues of a lane.

    A queue has at most one live entry on all lanes, never later than its head's latest start: it is
    corrected when it surfaces. The timer fires when the first can no longer start in time if nothing happens.
    """

    __slots__ = ("behind_ns", "first_ns", "full", "heap", "lane")

    def __init__(self, lane: LaneBelief, order: int) -> None:
        super().__init__(order)
        self.lane = lane
        self.heap: list[tuple[int, int, Queue]] = []
        """(latest start, queue order, queue); stale unless the queue's ``watch`` and ``place_ns`` say so."""
        self.first_ns = NEVER_NS
        """The earliest latest start: if the lane is not free by then, a head has become infeasible here."""
        self.behind_ns = 0
        """The timer is early enough while no more work than this waits behind the running action."""
        self.full = STALE_MIN
        """With so many entries, the heap is cleared of stale ones."""

    def place(self, queue: Queue, latest_ns: int) -> bool:
        """Watch a queue here from now on; true if its head may become infeasible before any other."""
        queue.watch = self
        queue.place_ns = latest_ns
        heap = self.heap
        heappush(heap, (latest_ns, queue.order, queue))
        if len(heap) > self.full:
            heap[:] = [entry for entry in heap if entry[2].watch is self and entry[2].place_ns == entry[0]]
            heapify(heap)
            self.full = 2 * len(heap) + STALE_MIN
        return latest_ns < self.first_ns

    def surface(self, start_ns: int) -> list[Queue]:
        """Take out all queues whose heads can no longer start in time if the lane is free at ``start_ns``."""
        surfaced: list[Queue] = []
        heap = self.heap
        while heap:
            latest_ns, _, queue = heap[0]
            if queue.watch is self and queue.place_ns == latest_ns:
                if queue.dues and latest_ns >= start_ns:
                    break
                queue.watch = None
                if queue.dues:
                    surfaced.append(queue)
            heappop(heap)
        return surfaced

    def clear(self) -> list[Queue]:
        """Take out all queues: the lane is gone."""
        found = []
        for latest_ns, _, queue in self.heap:
            if queue.watch is self and queue.place_ns == latest_ns:
                queue.watch = None
                found.append(queue)
        self.heap.clear()
        self.first_ns = NEVER_NS
        return found


# ------------------------------------------------------------
# What a policy keeps for a device: its strategies by urgency and what it waits for; it sends nothing.
#
# Strategies are kept lazily: at most one live entry each, whose key is never above the true urgency and is
# corrected when it surfaces. Pushing each batch size to each replica costs 500 us a request at 256 devices,
# lazy keys 9 to 22 us (measured on a prototype).


class LaneTimer(Timer):
    """When a policy is to top up a lane again."""

    __slots__ = ("is_exec", "plan")

    def __init__(self, plan: LanePlan, order: int, *, is_exec: bool) -> None:
        super().__init__(order)
        self.plan = plan
        self.is_exec = is_exec


class LanePlan(Record):
    """See the module. The heap keeps itself in order; flags and timers are the policy's to use."""

    __slots__ = (
        "changed",
        "device",
        "exec_full",
        "exec_timer",
        "full",
        "heap",
        "load_blocked",
        "load_dirty",
        "load_timer",
    )  # fmt: skip

    def __init__(self, device: DeviceBelief) -> None:
        self.device = device
        self.heap: list[tuple[int, int, Strategy]] = []
        """(key, queue order, strategy); stale where the strategy's ``key_ns`` is another."""
        self.full = STALE_MIN
        """With so many entries, the heap is cleared of stale ones."""
        self.changed = False
        """The exec lane is to be looked at."""
        self.exec_full = False
        """The exec lane is full: its timer or its next result says when to look again."""
        self.exec_timer = LaneTimer(self, 2 * device.index, is_exec=True)
        self.load_dirty = False
        """The load lane is to be offered all candidates, not only new ones."""
        self.load_blocked = False
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
# Weights on a device, and devices.


class Residency(Record):
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
        """It took longer here than a request had that was feasible by a LOAD elsewhere; no INFER since."""

    @property
    def serves(self) -> bool:
        """Whether its device serves the model, as far as is known: it moves, and is quick enough."""
        return not (self.slow or self.device.exec.stalled)

    def step(self, step: int) -> None:
        """Move on by the table; a step that is not in it is a bug."""
        after = WEIGHTS_AFTER[self.state][step]
        assert after != NEVER, f"{self.model.key}: {WEIGHTS_STEPS[step]} while {WEIGHTS_STATES[self.state]}"
        self.state = after


class Strategy(Record):
    """A queue on one device that has its weights READY: what a policy weighs against others there."""

    __slots__ = ("batches", "count", "device", "key_ns", "lane", "least", "plan", "queue", "residency")

    def __init__(self, queue: Queue, residency: Residency) -> None:
        self.queue = queue
        self.residency = residency
        self.device = residency.device
        self.lane = residency.device.exec
        self.plan = residency.device.plan
        self.batches = residency.code.batches(queue.signature, queue.sizes)
        """Ways to run it that the device allows, ascending; the first takes one request."""
        self.least = residency.code.timings.infer(queue.least, queue.signature)
        """How long the least batch takes that the policy will run."""
        self.key_ns = NEVER_NS
        """Its live key in its device's ``LanePlan``; NEVER_NS if it has none there."""
        self.count = 0
        """The batch (requests) that the key is for; a policy's to use."""

    def __lt__(self, other: Strategy) -> bool:
        return self.residency.version < other.residency.version


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
        """Its exec lane has not moved for so long that the device counts as not serving."""
        self.silent = False
        """Its worker returned no beats, and was at nothing that explains it."""
        if off:
            self.at_ns = 0  # as a guard

    @property
    def serves(self) -> bool:
        """Whether the device does what it is asked, as far as is known."""
        return not (self.still or self.silent)


class DeviceBelief(Record):
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
        self.returns = RetrySlots()
        """When rejected clients were advised to retry."""
        self.guard = Guard(self, off=not config.hang_ns)
        self.look = Look(self, off=config.released)
        self.since_ns = 0
        """When it was last sent a code to prepare, or had prepared one."""

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
