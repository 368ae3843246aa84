"""Whom a LOAD displaces: where all weights are of one size, the quick way finds what the search finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import Residency
from clockwork_serve.controller.estimates import BASE, ONE
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.placement import make_room
from clockwork_serve.controller.plans import leave
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, promise, serve


def searched(made: Belief, wanted_ns: int) -> object:
    def rank(other: Residency) -> int | None:
        if other.state != READY or other.in_flight:
            return None
        if not other.model.waiting:
            return other.used
        return other.used + NEVER_NS if other.model.demand_ns < wanted_ns else None

    room = made.devices["d0"].pages.room(4, rank)
    return room and (room.extent, [one.model.key for one in room.evicted])


USES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["touch", "ask", "fly", "load"])), max_size=14)


@given(USES, st.integers(1, 5), st.integers(16, 19))
def test_the_quick_way_finds_what_the_search_finds(uses, tens: int, pages: int) -> None:  # type: ignore[no-untyped-def]
    made = belief("d0", pages=pages)
    served = [serve(made, f"m{at}") for at in range(4)]
    held = [place(made, one, "d0", first=4 * at) for at, one in enumerate(served)]
    newcomer = serve(made, "new")
    for at, what in uses:
        residency = served[at].residencies["d0"]
        if what == "touch":
            device = residency.device
            device.used = residency.used = device.used + 1
        elif what == "ask":
            ask(made, served[at])
        elif what == "fly":
            residency.in_flight ^= 1
            residency.loosen()
        elif not residency.in_flight:
            made.send_unload(residency, ms(20))
            held[at] = place(made, served[at], "d0", first=residency.extent.first)
        room = make_room(made.devices["d0"], newcomer, ms(10 * tens))
        quick = room and (room.extent, [one.model.key for one in room.evicted])
        assert quick == searched(made, ms(10 * tens))


def test_where_there_is_a_gap_nothing_is_displaced() -> None:
    made = belief("d0")
    place(made, serve(made, "a"), "d0")
    room = make_room(made.devices["d0"], serve(made, "b"), NEVER_NS)
    assert room is not None
    assert (room.extent.first, room.extent.count, room.evicted) == (4, 4, [])


def test_weights_of_many_sizes_make_room_together() -> None:
    made = belief("d0", pages=4)
    for at in range(4):
        place(made, serve(made, f"m{at}", mib=1), "d0", first=at)
    room = make_room(made.devices["d0"], serve(made, "large", mib=3), NEVER_NS)
    assert room is not None
    assert [one.model.key for one in room.evicted] == ["m0/1", "m1/1", "m2/1"]


def test_a_second_copy_goes_before_the_only_one_of_a_model_less_asked_for() -> None:
    made = belief("d0", "d1", pages=8)
    cool, hot, new = (serve(made, name) for name in ("cool", "hot", "new"))
    place(made, cool, "d0")
    place(made, hot, "d0", first=4)
    place(made, hot, "d1")
    cool.popularity, hot.popularity = BASE, BASE + 2 * ONE
    for model in (cool, hot):
        model.waiting = 0
    room = make_room(made.devices["d0"], new, NEVER_NS, by_popularity=True)
    assert room is not None and room.evicted == [hot.residencies["d0"]]
    hot.popularity = BASE + 4 * ONE
    room = make_room(made.devices["d0"], new, NEVER_NS, by_popularity=True)
    assert room is not None and room.evicted == [cool.residencies["d0"]]


def test_a_further_copy_evicts_only_what_is_worth_less() -> None:
    made = belief("d0", "d1", pages=4)
    cool, hot = serve(made, "cool"), serve(made, "hot")
    place(made, cool, "d0")
    place(made, hot, "d1")
    cool.popularity, hot.popularity = BASE, BASE + 2 * ONE
    assert make_room(made.devices["d0"], hot, NEVER_NS, by_popularity=True) is None
    hot.popularity = BASE + 4 * ONE
    room = make_room(made.devices["d0"], hot, NEVER_NS, by_popularity=True)
    assert room is not None and room.evicted == [cool.residencies["d0"]]


def test_room_that_was_sought_in_vain_is_sought_again_once_more_can_be_evicted() -> None:
    made = belief("d0", pages=4)
    held, new = place(made, serve(made, "held"), "d0"), serve(made, "new")
    held.in_flight = 1
    agenda = made.devices["d0"].agenda
    assert make_room(made.devices["d0"], new, NEVER_NS) is None
    assert agenda.in_vain
    held.in_flight = 0
    assert make_room(made.devices["d0"], new, NEVER_NS) is None, "it is not looked for"
    held.loosen()
    assert make_room(made.devices["d0"], new, NEVER_NS) is not None


def test_a_further_copy_is_worth_no_promise_not_even_of_a_less_urgent_class() -> None:
    made = belief("d0", "d1", pages=4)
    cool, hot = serve(made, "cool"), serve(made, "hot")
    held = place(made, cool, "d0")
    place(made, hot, "d1")
    ask(made, hot)
    promise(ask(made, cool, priority=12), held)
    cool.popularity, hot.popularity = BASE, BASE + 4 * ONE
    assert make_room(made.devices["d0"], hot, NEVER_NS, by_popularity=True) is None
    leave(held.device.reserved[0].waiters)
    room = make_room(made.devices["d0"], hot, NEVER_NS, by_popularity=True)
    assert room is not None and room.evicted == [held], "it still waits, and was not promised"


def test_a_search_in_vain_for_a_class_says_nothing_of_a_more_urgent_one() -> None:
    made = belief("d0", pages=4)
    held = place(made, serve(made, "held"), "d0")
    promise(ask(made, held.model), held)
    usual, urgent = serve(made, "usual"), serve(made, "urgent")
    ask(made, usual)
    ask(made, urgent, priority=4)
    assert make_room(made.devices["d0"], usual, NEVER_NS) is None
    room = make_room(made.devices["d0"], urgent, ms(100))
    assert room is not None and room.evicted == [held]


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5)], ids=["of one size", "of several"])
def test_promised_weights_go_last_though_they_were_used_longest_ago(sizes: tuple[int, int]) -> None:
    made = belief("d0", pages=8)
    promised, waiting = (
        place(made, serve(made, name, mib=mib), "d0", first=first)
        for name, mib, first in zip(("promised", "waiting"), sizes, (0, sizes[0]), strict=True)
    )
    promise(ask(made, promised.model, priority=12), promised)
    ask(made, waiting.model)
    new = serve(made, "new", mib=min(sizes))
    ask(made, new, priority=4)
    room = make_room(made.devices["d0"], new, NEVER_NS)
    assert room is not None and room.evicted == [waiting]
    waiting.in_flight = 1
    room = make_room(made.devices["d0"], new, NEVER_NS)
    assert room is not None and room.evicted == [promised]
