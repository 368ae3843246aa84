"""Records of belief: models, queues, requests, devices, lanes and weights, which refer to each other.

A *model* has queues of *waiters* (requests that are not over) and *residencies* (its weights on a device). A
queue has a *strategy* for each device that has its weights ready. A *device* has lanes, pages, codes, and an
*agenda*: its strategies by urgency.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heapify, heappop, heappush
from typing import Annotated, Final

from msgspec.structs import replace

from clockwork_serve.controller.codes import BatchChoice, CodeOnDevice
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.estimates import UNIT_BITS, Delays, Samples
from clockwork_serve.controller.lanes import STALE_MIN, LaneBelief, Watch
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
from clockwork_serve.controller.record import SHARED, Record
from clockwork_serve.controller.timers import NEVER_NS, RetrySlots, Timer
from clockwork_serve.messages import (
    LEAST_PRIORITY,
    USUAL_PRIORITY,
    Cause,
    Code,
    DeviceSpec,
    Extent,
    Model,
    Request,
)

IDLE_MIN: Final = 64
"""A device's ``idle`` is rebuilt when it has this many more entries than twice the weights on the device."""

UNBROKEN: Final = Cause.NONE
"""No cause: every request has this one, and a member of an enumeration takes 50 ns to find."""


# ------------------------------------------------------------
# Requests, by model and by what may share a batch, earliest deadline first.


BAND_NS: Final = 1 << 58
"""Distance between the keys of two classes of priority: more than between any two instants."""


def level(priority: int) -> int:
    """The class of a priority: 1 (most urgent) to 15; a priority of 0 or less means the usual class."""
    if priority <= 0:
        return USUAL_PRIORITY
    return min(priority, LEAST_PRIORITY)


class Waiter(Record):
    """A request that is not over, and its state in the controller (``life``)."""

    __slots__ = (
        "alone", "cause", "cold", "demand_ns", "device", "due_ns", "place", "promised_ns",
        "queue", "request", "retries", "slo_ns", "state", "tensor_refs",
    )  # fmt: skip

    alone: bool
    cause: Cause
    cold: bool
    demand_ns: int
    device: DeviceBelief | None
    due_ns: int
    place: Reservation | None
    promised_ns: int
    queue: Queue
    request: Request
    retries: int
    slo_ns: int
    state: int
    tensor_refs: int

    def __init__(self, request: Request, due_ns: int, slo_ns: int, demand_ns: int, queue: Queue) -> None:
        self.request = request
        self.due_ns = due_ns
        """The instant by which its execution must end; see ``Belief.due_ns``."""
        self.slo_ns = slo_ns
        """``request.slo_ns``, which is computed at each use."""
        self.demand_ns = demand_ns
        """What it adds to its model's demand while it waits."""
        self.queue = queue
        self.state = WAITING
        self.cold = not queue.model.residencies
        """Its weights were on no device when it arrived."""
        self.alone = False
        """It shared a batch that failed, and may not share one again."""
        self.retries = 0
        """How often it was in flight on a worker that was lost."""
        self.tensor_refs = 0
        """In-flight actions that have its tensors: on hung workers and, once SPENT, the one it was in."""
        self.promised_ns = -1
        """When it was promised, or got another place after that; -1 if it was not. See ``promises``."""
        self.place = None
        """While it is promised and waits: its place in a device's plan, unless that was lost."""
        self.device = None
        """Where it was planned last, or sent, if it is promised."""
        self.cause = UNBROKEN
        """Why it lost its place, until it has another one."""

    def step(self, step: int) -> None:
        """Change state by the table ``REQUEST_AFTER``; asserts that the step is legal."""
        after = REQUEST_AFTER[self.state][step]
        assert after != NEVER, (
            f"{self.request.request_id}: {REQUEST_STEPS[step]} while {REQUEST_STATES[self.state]}"
        )
        self.state = after


class Queue(Record):
    """Requests of one model that may share a batch (equal priority and signature, one row each), by due time.

    Requests of several rows, and those marked ``alone``, have queues of their own and run one at a time.
    ``sizes`` are the batch sizes to choose from, as (requests, batch size to run), ascending.
    """

    __slots__ = (
        "alone", "band_ns", "dues", "filling_until_ns", "least", "level", "model", "order",
        "place_ns", "reserved", "rows", "signature", "sizes", "strategies", "to_recheck", "undecided",
        "waiters", "watch",
    )  # fmt: skip

    alone: bool
    band_ns: int
    dues: list[int]
    filling_until_ns: int
    least: int
    level: int
    model: ServedModel
    order: int
    place_ns: int
    reserved: list[Reservation]
    rows: int
    signature: str
    sizes: tuple[tuple[int, int], ...]
    strategies: tuple[Strategy, ...]
    to_recheck: bool
    undecided: list[Waiter]
    waiters: list[Waiter]
    watch: Watch | None

    def __init__(
        self, model: ServedModel, signature: str, rows: int, order: int, *, alone: bool, priority: int = 0
    ) -> None:
        self.model = model
        self.level = level(priority)
        self.band_ns = (self.level - USUAL_PRIORITY) * BAND_NS
        """Added to the keys of its strategies, so that every key of a more urgent class is lower."""
        self.signature = signature
        self.rows = rows
        self.alone = alone
        self.sizes = model.sizes(rows, alone=alone)
        self.order = order
        """Creation order: breaks ties between queues."""
        self.dues = []
        """``due_ns`` of each of ``waiters``, ascending."""
        self.waiters = []
        """All and only requests WAITING here."""
        self.undecided = []
        """Those whose verdict is pending, by due time; who is sent leaves when its verdict is due."""
        self.strategies = ()
        """One per device that has the weights READY."""
        self.reserved = []
        """Its reservations on all devices, by due time."""
        self.least = self.sizes[0][1]
        """The smallest batch size that the policy runs this queue at; see ``Belief.require``."""
        self.filling_until_ns = NEVER_NS
        """For the policy: its next batch waits until then for more requests; NEVER_NS: it does not."""
        self.to_recheck = False
        """Its feasibility is to be rechecked: it is in ``Belief.rechecks``."""
        self.watch = None
        """The watch that has its live entry, with the key ``place_ns``."""
        self.place_ns = 0

    def __len__(self) -> int:
        return len(self.waiters)

    def add(self, waiter: Waiter) -> bool:
        """Insert a request by its due time; true if it is the first now."""
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
        """Remove and return up to ``count`` requests, from index ``first``."""
        if not first and count >= len(self.waiters):
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
        "arrived_ns", "band_ns", "base_ns", "batch", "code", "code_id", "demand_ns", "dirty", "gap_ns", "key",
        "load_key", "main", "model", "order", "pace_at_ns", "pace_ns", "popularity", "priority",
        "quarantined", "queue_limit", "queues", "removed", "residencies", "sole", "unservable", "waiting",
    )  # fmt: skip

    arrived_ns: int
    band_ns: int
    base_ns: int
    batch: int
    code: Code
    code_id: str
    demand_ns: int
    dirty: bool
    gap_ns: int
    key: str
    load_key: int | None
    main: Queue | None
    model: Model
    order: int
    pace_at_ns: int
    pace_ns: int
    popularity: int
    priority: int
    quarantined: bool
    queue_limit: int
    queues: dict[tuple[str, int, bool, int], Queue]
    removed: bool
    residencies: dict[str, Residency]
    sole: Residency | None
    unservable: str
    waiting: int

    def __init__(self, model: Model, code: Code, order: int) -> None:
        self.model = model
        self.key = model.key
        self.queue_limit = model.queue_limit
        self.code = code
        self.code_id = code.code_id
        self.order = order
        self.priority = model.priority
        self.main = None
        """The queue of ordinary requests (no signature, one row, the model's priority), once needed."""
        self.queues = {}
        """Queue by (signature, rows, alone, class): ``main``, and others that are not empty."""
        self.residencies = {}
        """Weights by device: all and only those LOADING or READY."""
        self.sole = None
        """The only residency, if there is exactly one."""
        self.waiting = 0
        """Requests in all queues together."""
        self.band_ns = 0
        """``Queue.band_ns`` of the most urgent class that waits for it; 0 if none does."""
        self.demand_ns = 0
        """Lane time that the waiting requests need, weighted by how short their SLOs are."""
        self.popularity = 0
        """Decayed request rate on a logarithmic scale, if the policy keeps it; see ``estimates``."""
        self.base_ns = 0
        """The duration of batch 1, from the first profile known; 0 until needed."""
        self.pace_ns = 0
        """Device time per request in its best batch over all capable devices; 0: unknown."""
        self.batch, self.pace_at_ns = 1, 0
        """The size of that batch, and when both were computed."""
        self.arrived_ns = self.gap_ns = 0
        """When the last request came, and the mean time between two; kept where requests are promised."""
        self.dirty = False
        """Its demand or residencies changed since the policy ranked it; see ``Belief.dirty_models``."""
        self.load_key = None
        """Its key in the policy's heap of LOAD candidates; None if it is not there."""
        self.removed = False
        self.quarantined = False
        """It is in quarantine: no request is admitted."""
        self.unservable = ""
        """Why no device that has joined can ever run it, once that is certain."""

    def share_ns(self, residency: Residency) -> int:
        """The share of the model's demand that is assigned to this residency's device."""
        return self.demand_ns if residency is self.sole else residency.share_ns

    def add_residency(self, residency: Residency) -> None:
        """Add weights whose LOAD is sent; a sole residency is assigned the whole demand."""
        sole = self.sole
        for other in self.residencies.values():
            other.device.lower(other)
        if sole is not None:
            sole.share_ns = self.demand_ns
            self.sole = None
        elif not self.residencies:
            self.sole = residency
            residency.assign(self.demand_ns)
        self.residencies[residency.device.name] = residency

    def remove_residency(self, residency: Residency) -> None:
        """Remove weights that have left a device."""
        residency.assign(0)
        residency.share_ns = 0
        del self.residencies[residency.device.name]
        self.sole = None
        if len(self.residencies) == 1:
            self.sole = sole = next(iter(self.residencies.values()))
            sole.assign(self.demand_ns)
            sole.share_ns = 0

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
        """Whether a request of ``rows`` rows fits a batch."""
        return 1 <= rows <= self.model.batch_sizes[-1]

    def sizes(self, rows: int, *, alone: bool) -> tuple[tuple[int, int], ...]:
        """The batches of a queue of such requests, as (requests, batch size), ascending."""
        sizes = self.model.batch_sizes
        if rows > 1:
            return ((1, next(size for size in sizes if size >= rows)),)
        if alone or not self.code.batched:
            return ((1, sizes[0]),)
        return tuple([(size, size) for size in sizes])


# ------------------------------------------------------------
# What a policy keeps for a device: its strategies by urgency, flags and timers.
# The heap is lazy: at most one live entry for each strategy, whose key is a lower bound of the true urgency.
# Pushing each batch size to each replica costs 500 us a request at 256 devices, lazy keys 9 to 22.


class LaneTimer(Timer):
    """When a policy is to top up a lane again."""

    __slots__ = ("agenda", "is_exec")

    def __init__(self, agenda: Agenda, order: int, *, is_exec: bool) -> None:
        super().__init__(order)
        self.agenda = agenda
        self.is_exec = is_exec


class Agenda(Record):
    """A device's strategies by urgency; flags and timers are for the policy."""

    __slots__ = (
        "changed", "device", "exec_full", "exec_timer", "full", "heap", "in_vain", "load_blocked",
        "load_dirty", "load_timer", "room_blocked",
    )  # fmt: skip

    def __init__(self, device: DeviceBelief) -> None:
        self.device = device
        self.heap: list[tuple[int, int, Strategy]] = []
        """(key, queue order, strategy); stale where the strategy's ``key_ns`` is another."""
        self.full = STALE_MIN
        """The number of entries above which stale ones are dropped."""
        self.changed = False
        """The exec lane is to be topped up in the next ``schedule``."""
        self.exec_full = False
        """The exec lane is full: it is topped up again when its timer fires or its next result arrives."""
        self.exec_timer = LaneTimer(self, 2 * device.index, is_exec=True)
        self.load_dirty = False
        """All LOAD candidates are to be considered for the load lane, not only new ones."""
        self.load_blocked = False
        """A candidate was declined for lack of time; reconsider it when that may have changed."""
        self.room_blocked = False
        """A candidate was declined for lack of pages; reconsider it once ``in_vain`` is empty."""
        self.load_timer = LaneTimer(self, 2 * device.index + 1, is_exec=False)
        self.in_vain: list[tuple[int, int, int, int]] = []
        """Searches for room in vain since more could be evicted: pages, demand, limit of worth, class."""

    def may_load(self) -> bool:
        """Whether a candidate that was declined may be accepted now."""
        return self.load_blocked or (self.room_blocked and not self.in_vain)

    def push(self, strategy: Strategy, key_ns: int) -> None:
        """Add a strategy, or lower its key."""
        strategy.key_ns = key_ns
        heap = self.heap
        heappush(heap, (key_ns, strategy.queue.order, strategy))
        if len(heap) > self.full:
            entries = {id(entry[2]): entry for entry in heap if entry[2].key_ns == entry[0]}
            heap[:] = entries.values()
            heapify(heap)
            self.full = 2 * len(heap) + STALE_MIN

    def top(self) -> Strategy | None:
        """The strategy with the lowest live key; None if there is none."""
        heap = self.heap
        while heap:
            key_ns, _, strategy = heap[0]
            if strategy.key_ns == key_ns:
                return strategy
            heappop(heap)
        return None

    def pop(self) -> None:
        """Remove the strategy that ``top`` just returned."""
        heappop(self.heap)[2].key_ns = NEVER_NS

    def remove(self, strategy: Strategy) -> None:
        """Remove a strategy (its entries become stale)."""
        strategy.key_ns = NEVER_NS

    def check(self, strategy: Strategy) -> None:
        """Assert that a strategy with a key is in the heap."""
        entry = (strategy.key_ns, strategy.queue.order, strategy)
        assert strategy.key_ns == NEVER_NS or entry in self.heap, f"{self.device.name}: a strategy is missing"


# ------------------------------------------------------------
# Reservations: batches of promised requests that wait, in the plan of a device (``plans``).


class Reservation(Record):
    """A batch of promised requests of one queue, planned on a device that has, or is loading, the weights.

    ``batch`` is the smallest of the device's ``batches`` that takes its ``waiters``, of whom the first is due
    at ``due_ns``; plans end it ``margin_ns`` before, and gave it ``lasts_ns`` when it last changed.
    """

    __slots__ = ("batch", "batches", "due_ns", "lasts_ns", "margin_ns", "queue", "residency", "waiters")

    def __init__(self, queue: Queue, residency: Residency, margin_ns: int) -> None:
        self.queue = queue
        self.residency = residency
        self.margin_ns = margin_ns
        self.batches = residency.code.batches(queue.signature, queue.sizes)
        self.batch = self.batches[0]
        self.due_ns = NEVER_NS
        self.lasts_ns = 0
        self.waiters: list[Waiter] = []


# ------------------------------------------------------------
# Weights on a device, and devices.


class Residency(Record):
    """One model's weights on one device."""

    __slots__ = (
        "code", "considered", "demand_ns", "device", "extent", "in_flight", "model", "ready_ns", "reserved",
        "share_ns", "slow", "state", "used", "version",
    )  # fmt: skip

    code: CodeOnDevice
    considered: bool
    demand_ns: int
    device: DeviceBelief
    extent: Extent
    in_flight: int
    model: ServedModel
    ready_ns: int
    reserved: int
    share_ns: int
    slow: bool
    state: int
    used: int
    version: int

    def __init__(
        self, model: ServedModel, device: DeviceBelief, code: CodeOnDevice, extent: Extent, version: int
    ) -> None:
        self.model = model
        self.device = device
        self.code = code
        self.extent = extent
        self.version = version
        self.state = LOADING
        self.ready_ns = 0
        """When the LOAD is expected to end."""
        self.in_flight = 0
        """INFERs in flight that read these weights; weights in use are never evicted."""
        self.reserved = 0
        """Reservations that need these weights, which are not evicted either."""
        self.used = 0
        """The device's use counter at the last use: the least recently used weights have the lowest."""
        self.share_ns = 0
        """The share of the model's demand that is assigned to its device; unused for a sole residency."""
        self.demand_ns = 0
        """That share in the device's own time: what it adds to the device's demand."""
        self.slow = False
        """Its least batch takes longer here than a waiting request's SLO; cleared by the next INFER here."""
        self.considered = False
        """It could be evicted in each search of its device's ``in_vain`` that was not for a copy."""

    def loosen(self) -> None:
        """Have room sought anew: it may be possible to evict these weights, which it was not before."""
        if not self.considered:
            self.device.agenda.in_vain.clear()

    def assign(self, share_ns: int) -> None:
        """Have the device serve this share of the model's demand."""
        demand_ns = share_ns * self.code.timings.pace >> UNIT_BITS
        self.device.demand_ns += demand_ns - self.demand_ns
        self.demand_ns = demand_ns

    @property
    def stalled(self) -> bool:
        """Whether a lane is stalled that a request for these weights has to wait for."""
        device = self.device
        return device.exec.stalled or (self.state == LOADING and device.load.stalled)

    @property
    def serves(self) -> bool:
        """Whether its device can serve the model's demand: it is neither stalled nor too slow for it."""
        return not (self.slow or self.stalled)

    def step(self, step: int) -> None:
        """Change state by the table ``WEIGHTS_AFTER``; asserts that the step is legal."""
        after = WEIGHTS_AFTER[self.state][step]
        assert after != NEVER, f"{self.model.key}: {WEIGHTS_STEPS[step]} while {WEIGHTS_STATES[self.state]}"
        self.state = after


class Strategy(Record):
    """One way to serve a queue: on a device that has its weights READY, in batches of any of its sizes."""

    __slots__ = ("agenda", "batches", "device", "key_ns", "lane", "least", "queue", "residency")

    agenda: Agenda
    batches: Annotated[tuple[BatchChoice, ...], SHARED]
    device: DeviceBelief
    key_ns: int
    lane: LaneBelief
    least: Samples
    queue: Queue
    residency: Residency

    def __init__(self, queue: Queue, residency: Residency) -> None:
        self.queue = queue
        self.residency = residency
        self.device = residency.device
        self.lane = residency.device.exec
        self.agenda = residency.device.agenda
        self.batches = residency.code.batches(queue.signature, queue.sizes)
        """The batches that the device allows, ascending; the first runs one request."""
        self.least = residency.code.timings.infer(queue.least, queue.signature)
        """Durations of the smallest batch that the policy runs."""
        self.key_ns = NEVER_NS
        """Its live key in its device's ``Agenda``; NEVER_NS if it has none."""

    def __lt__(self, other: Strategy) -> bool:
        return self.residency.version < other.residency.version


class HangTimer(Timer):
    """When to check next whether a device's worker hangs; set while the device has work (``hangs.Hangs``)."""

    __slots__ = ("confirming", "device")

    def __init__(self, device: DeviceBelief, *, off: bool) -> None:
        super().__init__(device.index)
        self.device = device
        self.confirming = False
        """An action was late at the last check, a moment ago."""
        if off:
            self.at_ns = 0  # looks set, so that it is never put into a heap


class StallTimer(Timer):
    """When to check next whether a lane of a device is stalled.

    Set for the exec lane while the device has work, for the load lane to when its running action is overdue.
    """

    __slots__ = ("device", "lane", "late_id", "no_heartbeat", "unresponsive")

    def __init__(self, device: DeviceBelief, lane: LaneBelief) -> None:
        super().__init__(device.index)
        self.device = device
        self.lane = lane
        self.late_id = 0
        """The action that was too late at the last check."""
        self.unresponsive = False
        """Its running action is so late that the device does not count as warm for readiness."""
        self.no_heartbeat = False
        """Its worker returns no heartbeats, and no running INFER explains it."""

    @property
    def serves(self) -> bool:
        """Whether the device counts for readiness: it executes actions and returns heartbeats."""
        return not (self.unresponsive or self.no_heartbeat)


class DeviceBelief(Record):
    """One device."""

    __slots__ = (
        "agenda", "codes", "delays", "demand_ns", "ends_ns", "ends_until_ns", "exec", "failed_codes",
        "failed_weights", "hang_timer", "idle", "index", "load", "load_key_ns", "load_stall_timer", "name",
        "pages", "pending_codes", "renewed_ns", "reserved", "reserved_ns", "retry_slots", "room_bytes",
        "rooms_ns", "since_ns", "slowed_ns", "spec", "stall_timer", "up", "used", "warm", "worker",
    )  # fmt: skip

    def __init__(self, spec: DeviceSpec, worker: str, index: int, config: ControllerConfig) -> None:
        self.spec = spec
        self.name = spec.device
        self.worker = worker
        self.room_bytes = spec.pages * spec.page_bytes
        """The largest weights that fit it."""
        self.index = index
        """Creation order: breaks ties between devices."""
        self.up = True
        self.exec = LaneBelief(config.network_ns)
        self.load = LaneBelief(config.network_ns)
        self.delays = Delays(config.network_ns, config.slack_ns, shares_cores=spec.lanes_share)
        self.pages: PageMap[Residency] = PageMap(spec.pages)
        self.codes: dict[str, CodeOnDevice] = {}
        """All and only codes that the worker prepared here."""
        self.failed_codes: dict[str, str] = {}
        """Codes that the worker could not prepare here, or that this device cannot run; and why."""
        self.failed_weights: dict[str, str] = {}
        """Weights of which the worker has no valid file, and why: they cannot be loaded here."""
        self.pending_codes: set[str] = set()
        """Codes that the worker has yet to prepare here."""
        self.warm = False
        """Whether every code known when it joined has been prepared."""
        self.used = 0
        """A counter of uses, for least-recently-used order."""
        self.idle: list[tuple[int, int, Residency]] = []
        """Heap of (worth, version, weights) of all weights here, each worth corrected when it surfaces."""
        self.demand_ns = 0
        """Demand assigned to this device, in its own time: the sum of what its residencies are assigned."""
        self.load_key_ns = NEVER_NS
        self.agenda = Agenda(self)
        self.reserved: list[Reservation] = []
        """Its plan: promised batches on its exec lane, in their order; see ``plans``."""
        self.reserved_ns = 0
        """The sum of their ``lasts_ns``, which were all computed anew at ``renewed_ns``."""
        self.renewed_ns = 0
        self.ends_ns: list[int] = []
        self.rooms_ns: list[int] = []
        self.ends_until_ns = 0
        """A cache of ``plans``, until an instant: when they end, and how much later they may be."""
        self.slowed_ns = -1
        """When an action last took clearly longer than expected."""
        self.retry_slots = RetrySlots()
        self.hang_timer = HangTimer(self, off=not config.hang_ns)
        self.stall_timer = StallTimer(self, self.exec)
        self.load_stall_timer = StallTimer(self, self.load)
        self.since_ns = 0
        """When it was last sent a code to prepare, or had prepared one."""

    def add_code(self, code: Code) -> None:
        """Add a code that the worker will prepare here, if the device can run it."""
        if self.spec.runs(code.backend):
            self.pending_codes.add(code.code_id)
        else:
            self.failed_codes[code.code_id] = self.spec.misfit(code.backend)

    def code_of(self, model: ServedModel) -> CodeOnDevice | None:
        """The code of a model, if it is prepared here and the model's weights can be loaded here."""
        if self.failed_weights and model.model.weights.weights_id in self.failed_weights:
            return None
        return self.codes.get(model.code_id)

    def add_pages(self, pages: int) -> None:
        """It has so many more pages."""
        self.spec = replace(self.spec, pages=self.spec.pages + pages)
        self.room_bytes = self.spec.pages * self.spec.page_bytes
        self.pages.add(pages)
        self.agenda.in_vain.clear()

    def hold(self, residency: Residency) -> None:
        """Assign pages to weights that are to be loaded."""
        self.used = residency.used = self.used + 1
        self.pages.hold(residency.extent, residency)
        self.lower(residency)

    def lower(self, residency: Residency) -> None:
        """Weights are here that are worth less than before, or new: another device has them, too."""
        self.agenda.in_vain.clear()
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
