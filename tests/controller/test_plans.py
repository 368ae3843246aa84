"""Plans of devices: their ends and rooms, kept up to date as reservations come, change and leave."""

from __future__ import annotations

from bisect import insort

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Queue, Reservation, Residency, Waiter
from clockwork_serve.controller.plans import check, enter, hold, leave, outranked, plan_of
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve

NOW_NS = ms(10)
MARGIN_NS = ms(0.5)


class Plan:
    """The plan of one device with one model, whose requests may have any SLO."""

    def __init__(self) -> None:
        self.belief: Belief = belief("d0", pages=16)
        self.model = serve(self.belief, "m")
        self.residency: Residency = place(self.belief, self.model, "d0")
        self.device: DeviceBelief = self.belief.devices["d0"]

    def waiters(self, *slos_ms: int, priority: int = 0) -> list[Waiter]:
        """New requests, by due time."""
        found = []
        for slo_ms in slos_ms:
            queue: Queue = ask(self.belief, self.model, slo_ms, priority=priority)
            found.append(queue.waiters[-1] if len(queue.waiters) == 1 else max(queue.waiters, key=_number))
        return sorted(found, key=_due)

    def open(self, *slos_ms: int, priority: int = 0) -> Reservation:
        """A reservation for new requests."""
        waiters = self.waiters(*slos_ms, priority=priority)
        made = Reservation(waiters[0].queue, self.residency, MARGIN_NS)
        for waiter in waiters:
            waiter.promised_ns = NOW_NS
        hold(made, waiters)
        enter(made)
        self.residency.reserved += 1
        return made

    def join(self, one: Reservation, slo_ms: int, planned_ns: int) -> None:
        """Another request joins, and the batch is planned to occupy at least that long."""
        (waiter,) = self.waiters(slo_ms)
        waiter.promised_ns = NOW_NS
        waiters = one.waiters.copy()
        insort(waiters, waiter, key=_due)
        hold(one, waiters, planned_ns)

    def expected(self) -> tuple[list[int], list[int]]:
        """Ends and rooms by their definition, from when the first reservation begins."""
        ends_ns = [self.device.ends_ns[0]]
        for one in self.device.reserved:
            ends_ns.append(ends_ns[-1] + one.lasts_ns)
        left_ns = [
            one.due_ns - one.margin_ns - end_ns
            for one, end_ns in zip(self.device.reserved, ends_ns[1:], strict=True)
        ]
        return ends_ns, [min([*left_ns[at:], NEVER_NS]) for at in range(len(ends_ns))]


def _due(waiter: Waiter) -> int:
    return waiter.due_ns


def _number(waiter: Waiter) -> int:
    return int(waiter.request.request_id[1:])


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["open", "open", "join", "leave", "leave all"]),
        st.integers(min_value=0, max_value=9),
        st.integers(min_value=20, max_value=400),
    ),
    max_size=25,
)


@given(changes=CHANGES)
def test_ends_and_rooms_are_those_of_a_plan_computed_anew(changes: list[tuple[str, int, int]]) -> None:
    plan = Plan()
    plan_of(plan.device, NOW_NS)
    for kind, at, slo_ms in changes:
        reserved = plan.device.reserved
        one = reserved[at % len(reserved)] if reserved else None
        if kind == "open":
            plan.open(*([slo_ms] * (1 + at % 3)))
        elif one is None:
            continue
        elif kind == "join" and len(one.waiters) < 8:
            plan.join(one, slo_ms, ms(at))
        elif kind == "leave":
            leave(one.waiters[: 1 + at % len(one.waiters)])
        elif kind == "leave all":
            leave(one.waiters)

        check(plan.device)
        assert (plan.device.ends_ns, plan.device.rooms_ns) == plan.expected()


def test_what_was_planned_before_a_batch_that_runs_first_ends_later_and_what_was_planned_after_it_does_not():
    plan = Plan()
    _, second, third = plan.open(100), plan.open(200), plan.open(300)
    start_ns, first_ns, second_ns, third_ns = plan_of(plan.device, NOW_NS)[0]

    leave(second.waiters)

    lasts_ns = second_ns - first_ns
    assert plan.device.ends_ns == [start_ns + lasts_ns, first_ns + lasts_ns, third_ns]
    assert second.waiters == [] and third.waiters[0].place is third


def test_a_batch_whose_weights_are_loading_may_change_all_ends():
    plan = Plan()
    plan.open(100)
    other = serve(plan.belief, "n")
    plan.belief.send_load(plan.device, other, plan.device.pages.gap(4), NOW_NS, NOW_NS)  # type: ignore[arg-type]
    plan_of(plan.device, NOW_NS)

    plan.open(50)

    assert plan.device.ends_ns == []


def test_the_least_urgent_end_first_and_of_those_the_ones_with_most_time_for_a_request():
    plan = Plan()
    alone, least = plan.open(100), plan.open(*[101] * 4, priority=12)
    several, urgent = plan.open(*[102] * 8), plan.open(104, priority=4)
    lasts_ms = [one.lasts_ns / ms(1) for one in (alone, least, several, urgent)]
    assert lasts_ms == [10, 22, 38, 10], "38 ms for eight are 4.75 for each"

    def ended(room_ms: int) -> list[Reservation] | None:
        return outranked(plan.device, 4, urgent.due_ns - urgent.margin_ns - ms(room_ms))

    assert ended(80) == []
    assert ended(79) == [least]
    assert ended(57) == [least, alone]
    assert ended(47) == [least, alone, several]
    assert ended(9) is None, "it is late by itself"
