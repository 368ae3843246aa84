"""Where a model's weights may go on a device, and which weights that displaces: those missed least.

That is the least recently used ones (the paper's order) or those of the models least asked for (``by_heat``).
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

from clockwork_serve.controller.cluster import DeviceBelief, Residency
from clockwork_serve.controller.life import GONE, READY
from clockwork_serve.controller.pages import Room
from clockwork_serve.controller.queues import ServedModel
from clockwork_serve.controller.timers import NEVER_NS


def make_room(
    device: DeviceBelief, model: ServedModel, wanted_ns: int, *, by_heat: bool = False
) -> Room[Residency] | None:
    """Room for a model on a device that lacks it, or None.

    Weights in use stay. Those that no request waits for go first, least missed first; then those of models
    for which less urgent requests wait, or whose demand is below ``wanted_ns``.
    """
    wanted_ns -= model.band_ns()
    pages = device.pages
    count = device.spec.pages_of(model.model.weights.size)
    gap = pages.gap(count)
    if gap is not None:
        return Room(gap, [])
    if pages.all_of(count):
        victim = _least_missed(device, wanted_ns, by_heat=by_heat)
        return None if victim is None else Room(pages.instead(victim.extent), [victim])

    def rank(other: Residency) -> int | None:
        if other.state != READY or other.in_flight:
            return None
        worth = other.model.heat if by_heat else other.used
        if not other.model.waiting:
            return worth
        return worth + NEVER_NS if other.model.demand_ns - other.model.band_ns() < wanted_ns else None

    return pages.room(count, rank)


def _least_missed(device: DeviceBelief, wanted_ns: int, *, by_heat: bool) -> Residency | None:
    """Whom to displace where all weights are of one size."""
    idle = device.idle
    aside: list[tuple[int, int, Residency]] = []
    victim: Residency | None = None
    while idle:
        known, version, residency = idle[0]
        if residency.state == GONE:
            heappop(idle)
            continue
        worth = residency.model.heat if by_heat else residency.used
        if worth != known:
            heapreplace(idle, (worth, version, residency))
            continue
        if residency.state == READY and not residency.in_flight:
            if not residency.model.waiting:
                victim = residency
                break
            other = residency.model
            if victim is None and other.demand_ns - other.band_ns() < wanted_ns:
                victim = residency
        aside.append(heappop(idle))
    for entry in aside:
        heappush(idle, entry)
    return victim
