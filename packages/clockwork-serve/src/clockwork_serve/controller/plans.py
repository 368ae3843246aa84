"""Plans of devices: which promised requests that wait run when, so that no promise is broken.

A plan is a list of *reservations* by due time: batches of promised requests, one after another on the exec
lane. Earliest due time first is optimal for batches that can all start now (Jackson's rule): where a plan
fails in this order, it fails in any.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

from clockwork_serve.controller.cluster import (
    DeviceBelief,
    Reservation,
    Residency,
    ServedModel,
    Waiter,
)
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.estimates import Samples
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.units import NS_PER_MS, NS_PER_US

MARGIN_NS: Final = 100 * NS_PER_US
"""Plans end this much before each due time, and by what each device learns (``Delays.drift``)."""

KEPT_NS: Final = NS_PER_MS // 2
"""The ends of a plan are computed again where the lane is free this much sooner."""

EXPECTED_AGE_NS: Final = 8 * NS_PER_MS
EXPECTED_AGE: Final = 32
"""How old the expected numbers of requests that plans are made with may be, or this part of the plan."""

KEPT: Final = 0.999
"""The share of promises that is to be kept, as far as that depends on how long inferences take."""


# ------------------------------------------------------------
# Reservations and their requests.


def batch_for(batches: Sequence[BatchChoice], count: int) -> BatchChoice | None:
    """The smallest batch that takes ``count`` requests; None if the largest is smaller."""
    for batch in batches:
        if batch.count >= count:
            return batch
    return None


def hold(reservation: Reservation, waiters: list[Waiter], planned_ns: int = 0) -> None:
    """Have a reservation consist of these requests, for which there is a batch, by due time.

    ``planned_ns``: the time that it is planned to occupy, if that is more than what this batch takes.
    """
    device = reservation.residency.device
    batch = batch_for(reservation.batches, len(waiters)) or reservation.batches[-1]
    due_ns, lasts_ns = waiters[0].due_ns, max(planned_ns, batch.samples.estimate_ns)
    longer_ns = lasts_ns - reservation.lasts_ns
    changed = reservation.waiters and (longer_ns or due_ns != reservation.due_ns)
    device.reserved_ns += longer_ns
    reservation.batch, reservation.due_ns, reservation.lasts_ns = batch, due_ns, lasts_ns
    reservation.waiters = waiters
    for waiter in waiters:
        waiter.place = reservation
        waiter.device = device
    if changed and device.ends_ns:
        if device.load.outstanding:
            device.ends_ns = []
        else:
            at = device.reserved.index(reservation)
            device.ends_ns[at + 1] += longer_ns
            _delay(device, at + 2, longer_ns)
            _update_rooms(device, at)


def exchange(changed: Reservation) -> None:
    """Have the reservations of a queue exchange requests after one changed: first due, first planned.

    None of them is due sooner afterwards, so each plan stays feasible.
    """
    reserved = changed.queue.reserved
    if len(reserved) == 1:
        return
    at = reserved.index(changed)
    around = reserved[max(0, at - 1) : at + 2]
    if any(one.waiters[-1].due_ns > other.waiters[0].due_ns for one, other in pairwise(around)):
        every = sorted([waiter for one in reserved for waiter in one.waiters], key=_due)
        at = 0
        for one in reserved:
            count = len(one.waiters)
            hold(one, every[at : at + count], one.lasts_ns)
            at += count


def _due(waiter: Waiter) -> int:
    return waiter.due_ns


def enter(reservation: Reservation) -> None:
    """Put a reservation into the plan of its device and its queue's list, after all that are due no later."""
    device = reservation.residency.device
    reserved = reservation.queue.reserved
    reserved.insert(place_of(reserved, reservation.due_ns), reservation)
    at = place_of(device.reserved, reservation.due_ns)
    device.reserved.insert(at, reservation)
    ends_ns = device.ends_ns
    if not ends_ns:
        return
    if at + 1 < len(device.reserved) and (device.load.outstanding or reservation.residency.state != READY):
        device.ends_ns = []  # others may end later, or not
        return
    end_ns = free_ns(reservation.residency, ends_ns[at]) + reservation.lasts_ns
    _delay(device, at + 1, reservation.lasts_ns)
    ends_ns.insert(at + 1, end_ns)
    rooms_ns = device.rooms_ns
    room_ns = min(reservation.due_ns - reservation.margin_ns - end_ns, rooms_ns[at])
    first = bisect_right(rooms_ns, room_ns, 0, at)  # none has more room than what is after it
    rooms_ns[first:at] = [room_ns] * (at + 1 - first)


def leave(waiters: Sequence[Waiter]) -> None:
    """Take requests that were sent, or are over, out of their reservations, which end without requests."""
    places: dict[Reservation, None] = {}
    for waiter in waiters:
        if waiter.place is not None:
            places[waiter.place] = None
            waiter.place = None
    for reservation in places:
        left = [one for one in reservation.waiters if one.place is reservation]
        _withdraw(reservation)
        if left:
            hold(reservation, left)
            enter(reservation)
        else:
            reservation.residency.reserved -= 1
            reservation.residency.loosen()


def _withdraw(reservation: Reservation) -> None:
    """Take a reservation out of its plan.

    The ends of the others are those after it has run, for that is why most leave: what was planned before it
    ends later, what was planned after it as before. Otherwise the lane is free sooner than they say.
    """
    device = reservation.residency.device
    at = device.reserved.index(reservation)
    reservation.queue.reserved.remove(reservation)
    del device.reserved[at]
    device.reserved_ns -= reservation.lasts_ns
    ends_ns = device.ends_ns
    if ends_ns and at and device.load.outstanding:
        device.ends_ns = []
    elif ends_ns:
        del ends_ns[at + 1 if at else 0]
        del device.rooms_ns[at]
        if at:
            for before in range(at + 1):
                ends_ns[before] += reservation.lasts_ns
            _update_rooms(device, at - 1, all_=True)
    reservation.waiters, reservation.lasts_ns = [], 0


def _delay(device: DeviceBelief, first: int, by_ns: int) -> None:
    """Have all that is planned end later by so much, from the end with index ``first`` on."""
    if by_ns and first < len(device.ends_ns):
        ends_ns, rooms_ns = device.ends_ns, device.rooms_ns
        ends_ns[first:] = [end_ns + by_ns for end_ns in ends_ns[first:]]
        rooms_ns[first - 1 : -1] = [room_ns - by_ns for room_ns in rooms_ns[first - 1 : -1]]


def _update_rooms(device: DeviceBelief, at: int, *, all_: bool = False) -> None:
    """Compute the room before the reservation ``at`` anew, and those before it that follow, or all."""
    reserved, ends_ns, rooms_ns = device.reserved, device.ends_ns, device.rooms_ns
    room_ns = rooms_ns[at + 1]
    while at >= 0:
        one = reserved[at]
        left_ns = one.due_ns - one.margin_ns - ends_ns[at + 1]
        if left_ns < room_ns:  # noqa: PLR1730 - min() costs 100 ns more
            room_ns = left_ns
        if room_ns == rooms_ns[at] and not all_:
            return
        rooms_ns[at] = room_ns
        at -= 1


def place_of(reserved: list[Reservation], due_ns: int) -> int:
    """The index in a plan, or a queue's list, for what is due then: after all that are due no later."""
    at = len(reserved)
    while at and reserved[at - 1].due_ns > due_ns:
        at -= 1
    return at


# ------------------------------------------------------------
# When reservations end, and what may run before them.


def free_ns(residency: Residency, lane_ns: int) -> int:
    """When a batch can start on a lane that is free at ``lane_ns``: its weights may still be loading."""
    return residency.ready_ns if residency.state != READY and residency.ready_ns > lane_ns else lane_ns


def planned_ns(
    model: ServedModel, batches: tuple[BatchChoice, ...], count: int, start_ns: int, now_ns: int
) -> int:
    """How long ``count`` requests of a model, and those expected until then, occupy a lane from ``start_ns``.

    The duration of the batch size that takes the least time per request.
    """
    gap_ns = max(now_ns - model.arrived_ns, model.gap_ns)  # the longer none came, the longer it is
    expected = count + (start_ns - now_ns) / (gap_ns * (len(model.residencies) or 1))
    first_ns = best_ns = 0
    least = 0.0
    for batch in batches:
        if batch.count >= count:
            lasts_ns = batch.samples.estimate_ns
            each_ns = lasts_ns / min(expected, batch.count)
            if not first_ns:
                first_ns, best_ns, least = lasts_ns, lasts_ns, each_ns
            elif each_ns < least:
                best_ns, least = lasts_ns, each_ns
            if batch.count >= expected:
                break
    return max(first_ns, best_ns)  # a larger batch that was not measured lately may be believed to be shorter


def margin_ns(device: DeviceBelief, slo_ns: int, samples: Samples) -> int:
    """How long before their due time a device ends requests of an SLO that take as long as ``samples``.

    The batch itself may take longer than its estimate, which is of few durations, by what it takes to keep
    ``KEPT`` of all promises; those before it add up their errors.
    """
    longer_ns = samples.quantile_ns(KEPT) - samples.estimate_ns
    return MARGIN_NS + device.delays.drift_ns(slo_ns) + max(0, longer_ns)


def fits_in_any_order(device: DeviceBelief, start_ns: int, lasts_ns: int, due_ns: int) -> bool:
    """Whether all that is planned, and ``lasts_ns`` of else that is due then, ends before any of it is due.

    That costs a sum. What it says no to may still fit in the order of the plan.
    """
    if device.load.outstanding:
        return False  # it may have to wait for weights
    if device.reserved:
        first = device.reserved[0]
        due_ns = min(due_ns, first.due_ns - first.margin_ns)
    return start_ns + device.reserved_ns + lasts_ns <= due_ns


def is_next(device: DeviceBelief, waiters: list[Waiter], start_ns: int, lasts_ns: int) -> bool:
    """Whether ``waiters`` are the first batch of a plan whose ends are known, and start as planned."""
    if not device.ends_ns or start_ns > device.ends_ns[0] or device.rooms_ns[0] < 0:
        return False
    first = device.reserved[0]
    count = len(first.waiters)
    return (
        lasts_ns <= first.lasts_ns and len(waiters) >= count
        and waiters[0] is first.waiters[0] and waiters[count - 1] is first.waiters[-1]
    )  # fmt: skip


def missed(device: DeviceBelief, waiters: list[Waiter], end_ns: int, *, margin: bool) -> int:
    """How many promised requests a device's plan misses if ``waiters`` run next, until ``end_ns``.

    ``margin``: only what leaves half of the margin of plans counts as kept.
    """
    taken: dict[Reservation, int] = {}
    for waiter in waiters:
        if waiter.place is not None:
            taken[waiter.place] = taken.get(waiter.place, 0) + 1
    missed = 0
    for one in device.reserved:
        batch: BatchChoice | None = one.batch
        count, due_ns = len(one.waiters), one.due_ns
        if one in taken:
            count -= taken[one]
            if not count:
                continue
            batch = batch_for(one.batches, count)
            due_ns = min([each.due_ns for each in one.waiters if each not in waiters])
        assert batch is not None
        done_ns = free_ns(one.residency, end_ns) + batch.samples.estimate_ns
        if done_ns + (one.margin_ns >> 1 if margin else 0) <= due_ns:
            end_ns = done_ns
        else:
            missed += count  # it will not run, so that it delays no other
    return missed


def outranked(
    device: DeviceBelief, level: int, start_ns: int, *, new: Reservation | None = None,
    sent: Sequence[Waiter] = (),
) -> list[Reservation] | None:  # fmt: skip
    """The reservations of classes below ``level`` to end, so that a plan that begins then keeps all others.

    The least urgent, and of those with most time for a request. ``new`` is planned, too; what consists of
    ``sent`` is not. None if the others are not kept even so.
    """
    gone = set(sent)
    planned = [one for one in device.reserved if not gone.issuperset(one.waiters)]
    if new is not None:
        planned.insert(place_of(planned, new.due_ns), new)
    ended: list[Reservation] = []
    while late := _first_late(planned, start_ns):
        below = [one for one in planned[:late] if one.queue.level > level]
        if not below:
            return None
        least = max(below, key=_rank)
        planned.remove(least)
        ended.append(least)
    return ended


def _first_late(planned: Sequence[Reservation], start_ns: int) -> int:
    """The number of reservations up to the first that is late in this order; 0: none is."""
    for number, one in enumerate(planned, start=1):
        start_ns = free_ns(one.residency, start_ns) + one.lasts_ns
        if start_ns > one.due_ns - one.margin_ns:
            return number
    return 0


def _rank(one: Reservation) -> tuple[int, float]:
    return one.queue.level, one.lasts_ns / len(one.waiters)


def plan_lasts_ns(one: Reservation, count: int, start_ns: int, now_ns: int) -> int:
    """How long a reservation with ``count`` requests occupies the lane; see ``planned_ns``."""
    return planned_ns(one.queue.model, one.batches, count, start_ns, now_ns)


def plan_of(device: DeviceBelief, now_ns: int) -> tuple[list[int], list[int]]:
    """A plan's ends, and by how much what begins at each may be later so that nothing after it is late.

    The first end is when the exec lane is free. They are kept while the lane is free about then; but the
    later it is, the fewer requests are expected.
    """
    # Due times leave the slack that some device needs; this one may need more.
    soonest_ns = device.exec.available_ns(now_ns) + device.delays.extra_ns
    ends_ns, rooms_ns = device.ends_ns, device.rooms_ns
    if ends_ns and 0 <= ends_ns[0] - soonest_ns <= KEPT_NS and now_ns < device.ends_until_ns:
        return ends_ns, rooms_ns
    reserved = device.reserved
    age_ns = max(EXPECTED_AGE_NS, device.reserved_ns // EXPECTED_AGE)
    if now_ns >= device.renewed_ns + age_ns:
        device.renewed_ns = now_ns
        end_ns = soonest_ns
        for one in reserved:
            start_ns, lasts_ns = free_ns(one.residency, end_ns), one.batch.samples.estimate_ns
            if one.lasts_ns != lasts_ns:  # as time passes, fewer requests are expected, and never more
                lasts_ns = plan_lasts_ns(one, len(one.waiters), start_ns, now_ns)
                device.reserved_ns += lasts_ns - one.lasts_ns
                one.lasts_ns = lasts_ns
            end_ns = start_ns + lasts_ns
    if device.load.outstanding:  # it may have to wait for weights
        ends_ns = [soonest_ns]
        for one in reserved:
            ends_ns.append(free_ns(one.residency, ends_ns[-1]) + one.lasts_ns)
    else:
        ends_ns = [*accumulate([one.lasts_ns for one in reserved], initial=soonest_ns)]
    left_ns = [one.due_ns - one.margin_ns - end_ns for one, end_ns in zip(reserved, ends_ns[1:], strict=True)]
    rooms_ns = [*accumulate(reversed(left_ns), min, initial=NEVER_NS)][::-1]
    device.ends_ns, device.rooms_ns = ends_ns, rooms_ns
    device.ends_until_ns = now_ns + age_ns
    return ends_ns, rooms_ns


def fits_beside(
    device: DeviceBelief, rivals: list[tuple[int, int]], due_ns: int, lasts_ns: int, now_ns: int
) -> bool:
    """Whether a batch fits a plan together with its rivals, as far as those fit without it.

    Rivals, best first, are (when it has to end, how long it takes), as the batch is ``due_ns``, ``lasts_ns``.
    """
    ends_ns, _ = plan_of(device, now_ns)
    batches = [
        (one.due_ns - one.margin_ns, ends_ns[at + 1] - ends_ns[at]) for at, one in enumerate(device.reserved)
    ]
    for rival in rivals:
        insort(batches, rival)
        if not _in_time(batches, ends_ns[0]):
            batches.remove(rival)
    insort(batches, (due_ns, lasts_ns))
    return _in_time(batches, ends_ns[0])


def _in_time(batches: list[tuple[int, int]], start_ns: int) -> bool:
    for due_ns, lasts_ns in batches:
        start_ns += lasts_ns
        if start_ns > due_ns:
            return False
    return True


def check(device: DeviceBelief) -> None:
    """Assert the invariants of a device's plan."""
    for one in device.reserved:
        assert one.waiters and one in one.queue.reserved
        assert one.due_ns == one.waiters[0].due_ns == min(each.due_ns for each in one.waiters)
        assert one.batch is (batch_for(one.batches, len(one.waiters)) or one.batches[-1])
        assert all(each.place is one and each.promised_ns >= 0 for each in one.waiters)
    ends_ns, rooms_ns = device.ends_ns, device.rooms_ns
    if ends_ns:
        assert len(ends_ns) == len(rooms_ns) == len(device.reserved) + 1 and rooms_ns[-1] == NEVER_NS
        for at, one in enumerate(device.reserved):
            assert ends_ns[at + 1] >= ends_ns[at] + one.lasts_ns
            left_ns = one.due_ns - one.margin_ns - ends_ns[at + 1]
            assert rooms_ns[at] == min(left_ns, rooms_ns[at + 1])
    assert device.reserved_ns == sum(one.lasts_ns for one in device.reserved)
