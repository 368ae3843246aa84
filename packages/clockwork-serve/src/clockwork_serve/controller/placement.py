"""Placement: which models need a LOAD most, and which weights are evicted for one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import Agenda, DeviceBelief, Residency, ServedModel
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.estimates import ONE
from clockwork_serve.controller.lanes import STALE_MIN
from clockwork_serve.controller.life import GONE, READY
from clockwork_serve.controller.pages import ExtentChoice
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.units import NS_PER_MS

# ------------------------------------------------------------
# Candidates for a LOAD, by the paper's priority.
#
# Paper section 5.3: a model's demand d_m is divided among the devices that have its weights (a(m, g) inverse
# to the demand on g, 0 where m is not, summing to d_m); its LOAD priority is the part that these devices,
# with the demand they have, cannot serve within the horizon. A device that is stalled, or too slow for the
# model, is assumed to serve nothing of it.


class Candidates(Record):
    """A heap of the models that need a LOAD, by class of priority and then LOAD priority.

    Ties are broken by the order in which models were added or, with ``by_due``, first by the due time of the
    model's first request.
    """

    def __init__(self, belief: Belief, *, by_due: bool = False) -> None:
        self._belief = belief
        self._by_due = by_due
        self._capacity_ns = belief.config.capacity_ns
        self._heap: list[tuple[int, int, int, ServedModel]] = []
        """(class less priority, due time or 0, order, model); stale where ``model.load_key`` differs."""
        self._full = STALE_MIN
        """The number of entries above which stale ones are dropped."""

    def __len__(self) -> int:
        return len(self._heap)

    def rank(self, model: ServedModel) -> bool:
        """Update a model whose demand or residencies changed; true if it is a candidate."""
        if model.sole is None and model.residencies:
            self.share(model)
        return self.enqueue(model)

    def enqueue(self, model: ServedModel) -> bool:
        """Add a model to the heap, or update its key, if it is a candidate; true if it is."""
        if not model.waiting or model.removed:
            model.load_key = None
            return False
        priority = self.priority(model)
        able = self._belief.capable_devices(model.code.backend)
        everywhere = 0 < able <= len(model.residencies)
        if everywhere or priority <= 0:
            model.load_key = None
            return False
        key = model.band_ns - priority
        if key != model.load_key:
            model.load_key = key
            heappush(self._heap, (key, self._due_ns(model), model.order, model))
            if len(self._heap) > self._full:
                live = {id(entry[3]): entry for entry in self._heap if entry[3].load_key == entry[0]}
                self._heap = list(live.values())
                heapify(self._heap)
                self._full = 2 * len(self._heap) + STALE_MIN
        return True

    def top(self) -> ServedModel | None:
        """The first model, by the keys that were current when models were enqueued; None if there is none."""
        heap = self._heap
        while heap and heap[0][3].load_key != heap[0][0]:
            heappop(heap)
        return heap[0][3] if heap else None

    def pop(self) -> ServedModel | None:
        """Remove and return the first model by current keys; None if there is none."""
        while self._heap:
            key, due_ns, _, model = heappop(self._heap)
            if model.load_key != key:
                continue
            model.load_key = None
            now = model.band_ns - self.priority(model)
            if now > key or due_ns < self._due_ns(model):
                self.enqueue(model)
                continue
            return model
        return None

    def _due_ns(self, model: ServedModel) -> int:
        """The due time of its first request, if ties are broken by it; else 0."""
        due_ns = 0
        if self._by_due:
            for queue in model.queues.values():
                if queue.dues and (not due_ns or queue.dues[0] < due_ns):
                    due_ns = queue.dues[0]
        return due_ns

    def priority(self, model: ServedModel, parts: int = 1) -> int:
        """Demand in ns that the devices with the weights cannot serve within the horizon; may be negative.

        ``parts``: within so small a part of it.
        """
        capacity_ns, served_ns = self._capacity_ns // parts, 0
        if model.sole is not None:
            if not model.sole.serves:
                return model.demand_ns
            device_demand_ns = model.sole.device.demand_ns
            return model.demand_ns - model.demand_ns * capacity_ns // (
                device_demand_ns if device_demand_ns > 0 else 1
            )
        for residency in model.residencies.values():
            if not residency.serves:
                continue
            device_demand_ns = residency.device.demand_ns
            served_ns += residency.share_ns * capacity_ns // (device_demand_ns if device_demand_ns > 0 else 1)
        return model.demand_ns - served_ns

    def share(self, model: ServedModel) -> None:
        """Divide a model's demand among the devices that have, or are loading, its weights."""
        residencies, demand_ns = model.residencies.values(), model.demand_ns
        if not demand_ns:
            for residency in residencies:
                if residency.share_ns or residency.demand_ns:
                    residency.share_ns = 0
                    residency.assign(0)
            return
        inverses = [
            1 / (one.code.timings.pace * (one.device.demand_ns - one.demand_ns + NS_PER_MS))
            for one in residencies
        ]
        total = sum(inverses)
        for residency, inverse in zip(residencies, inverses, strict=True):
            residency.share_ns = share_ns = int(demand_ns * inverse / total)
            residency.assign(share_ns)

    def check(self) -> None:
        """Assert the invariants."""
        entered = {id(model) for key, _, _, model in self._heap if model.load_key == key}
        for model in self._belief.models.values():
            assert model.load_key is None or id(model) in entered, f"{model.key} fell out"
            shares_ns = sum(model.share_ns(residency) for residency in model.residencies.values())
            low_ns = model.demand_ns - len(model.residencies) if model.residencies else 0
            assert model.dirty or low_ns <= shares_ns <= model.demand_ns, model.key


# ------------------------------------------------------------
# Work that goes first: the lane time of waiting requests that are due earlier.
#
# A lane is topped up for a few milliseconds only, so when it will be free says little about overload; the
# queues do.


QUEUES_MAX: Final = 64
"""At most this many queues of a device are added up; the others are not counted."""


def ahead_ns(agenda: Agenda, urgency: int, due_ns: int, enough_ns: int) -> int:
    """A lower bound of the lane time of requests due by ``due_ns`` whose class is no less urgent.

    Stops adding up above ``enough_ns``.
    """
    total_ns = 0
    cost_by_code: dict[int, int] = {}
    added: set[int] = set()
    for key_ns, order, strategy in agenda.heap[:QUEUES_MAX]:
        if strategy.key_ns != key_ns or order in added:  # an old entry may have the key that is live again
            continue
        added.add(order)
        queue, batches = strategy.queue, strategy.batches
        if queue.level > urgency:
            continue
        count = bisect_right(queue.dues, due_ns)
        if count:
            cost_ns = cost_by_code.get(id(batches))  # models of one code share this object
            if cost_ns is None:
                cost_ns = cost_by_code[id(batches)] = usual_cost_ns(batches)
            total_ns += count * cost_ns // len(queue.strategies)
            if total_ns > enough_ns:
                break
    return total_ns


def usual_cost_ns(batches: Sequence[BatchChoice]) -> int:
    """The median lane time per request in the largest batch, which is the most efficient."""
    largest = batches[-1]
    return largest.samples.median_ns // largest.count


# ------------------------------------------------------------
# Pages for a model's weights on a device, and eviction.
#
# Victims are the least recently used weights (the paper's order) or the least valuable (``by_popularity``): a
# copy serves those requests that come while the others are busy, so each further one is worth a fraction.


COPY_LOSS: Final = 3 * ONE
"""Each further copy of a model's weights is worth as much as those of a model asked for 8 times less."""

NO_LIMIT: Final = 1 << 62
"""Above every worth."""

TRIED_MAX: Final = 4
"""At most so many weights are tried for eviction in favour of a further copy, the least valuable ones."""

IN_VAIN_MAX: Final = 8
"""So many searches in vain are remembered for a device."""


def worth(residency: Residency, *, by_popularity: bool) -> int:
    """What weights are worth on their device; the least valuable are evicted first."""
    if not by_popularity:
        return residency.used
    return residency.model.popularity - COPY_LOSS * (len(residency.model.residencies) - 1)


def make_room(
    device: DeviceBelief, model: ServedModel, wanted_ns: int, *, by_popularity: bool = False
) -> ExtentChoice[Residency] | None:
    """An extent for a model on a device that lacks it, and the weights to evict; None if there is no room.

    Weights in use are not evicted. Those that no request waits for are evicted first, the least valuable
    first; then those of models whose waiting requests are less urgent, or whose demand is below
    ``wanted_ns``; then those that are promised to less urgent classes alone. By popularity, a further copy
    evicts only what is worth less than itself.
    """
    pages, in_vain = device.pages, device.agenda.in_vain
    count = device.spec.pages_of(model.model.weights.size)
    band_ns = model.band_ns
    wanted_ns -= band_ns
    limit = NO_LIMIT
    if by_popularity and model.residencies and (
        copies := sum([one.serves for one in model.residencies.values()])
    ):  # fmt: skip
        limit = model.popularity - COPY_LOSS * copies
        band_ns = NEVER_NS  # a further copy is worth no promise
    for vain_count, vain_wanted_ns, vain_limit, vain_band_ns in in_vain:
        if (
            count >= vain_count and wanted_ns <= vain_wanted_ns and limit <= vain_limit
            and band_ns >= vain_band_ns
        ):  # fmt: skip
            return None  # there was no gap, and whatever can be evicted now could be then
    gap = pages.gap(count)
    if gap is not None:
        return ExtentChoice(gap, [])
    if len(in_vain) >= IN_VAIN_MAX:
        in_vain.clear()
    if limit != NO_LIMIT:
        return _in_place_of_one(device, count, wanted_ns, band_ns, limit, TRIED_MAX, by_popularity=True)
    if pages.all_of(count):
        room = _in_place_of_one(
            device, count, wanted_ns, band_ns, NO_LIMIT, len(device.idle), by_popularity=by_popularity
        )
    else:
        room = pages.room(count, lambda other: _rank(other, wanted_ns, band_ns, by_popularity=by_popularity))
    if room is None:
        for other in pages.holders():
            evictable = _rank(other, wanted_ns, band_ns, by_popularity=by_popularity) is not None
            other.considered = evictable and (other.considered or not in_vain)
        in_vain.append((count, wanted_ns, NO_LIMIT, band_ns))
    return room


def no_copy(device: DeviceBelief, model: ServedModel) -> bool:
    """Whether room for a further copy was sought in vain here, for this model or such a one."""
    limit = model.popularity - COPY_LOSS * len(model.residencies)
    count = device.spec.pages_of(model.model.weights.size)
    for vain_count, _, vain_limit, _ in device.agenda.in_vain:
        if count >= vain_count and limit <= vain_limit != NO_LIMIT:
            return all(one.serves for one in model.residencies.values())
    return False


def _rank(residency: Residency, wanted_ns: int, band_ns: int, *, by_popularity: bool) -> int | None:
    """The order of eviction; None if these weights may not be evicted. See ``make_room``."""
    model = residency.model
    if residency.state != READY or residency.in_flight or (
        model.waiting and model.demand_ns - model.band_ns >= wanted_ns
    ):  # fmt: skip
        return None
    if residency.reserved and any(
        one.residency is residency and one.queue.band_ns <= band_ns for one in residency.device.reserved
    ):
        return None
    value = worth(residency, by_popularity=by_popularity)
    if model.waiting:
        value += NEVER_NS << 1 if residency.reserved else NEVER_NS
    return value


def _in_place_of_one(
    device: DeviceBelief, count: int, wanted_ns: int, band_ns: int, limit: int, tries: int,
    *, by_popularity: bool,
) -> ExtentChoice[Residency] | None:  # fmt: skip
    """The first weights worth less than ``limit``, of at most ``tries``, that leave enough pages.

    For a further copy, which is not urgent, a search in vain stands until more weights could be evicted.
    """
    idle = device.idle
    beyond = NO_LIMIT - 1
    least = NEVER_NS << 2
    aside: list[tuple[int, int, Residency]] = []
    room: ExtentChoice[Residency] | None = None
    while idle and len(aside) < tries:
        known, version, residency = idle[0]
        if residency.state == GONE:
            heappop(idle)
            continue
        value = worth(residency, by_popularity=by_popularity)
        if value != known:
            heapreplace(idle, (value, version, residency))
            continue
        if value >= limit:
            beyond = value
            break
        rank = _rank(residency, wanted_ns, band_ns, by_popularity=by_popularity)
        if rank is not None and rank < least:  # of those worth less, the promised go later
            extent = device.pages.instead(residency.extent, count)
            if extent is not None:
                room, least = ExtentChoice(extent, [residency]), rank
                if rank < NEVER_NS:
                    break  # no request waits for it
        aside.append(heappop(idle))
    for entry in aside:
        heappush(idle, entry)
    if room is None and limit != NO_LIMIT:
        device.agenda.in_vain.append((count, NEVER_NS, beyond, band_ns))
    return room
