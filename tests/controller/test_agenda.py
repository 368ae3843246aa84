"""A device's heap of strategies, against a plain dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.cluster import Agenda, Strategy
from clockwork_serve.controller.lanes import STALE_MIN
from clockwork_serve.controller.timers import NEVER_NS
from tests.controller.clusters import ask, belief, place, serve


def strategies(count: int) -> tuple[Agenda, list[Strategy]]:
    made = belief("d0")
    found = []
    for at in range(count):
        served = serve(made, f"m{at}", mib=1)
        place(made, served, "d0", first=at)
        found.append(ask(made, served).strategies[0])
    return made.devices["d0"].agenda, found


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.sampled_from("ppprt")), max_size=80))
def test_any_history_agrees_with_a_plain_dict(steps: list[tuple[int, int, str]]) -> None:
    agenda, found = strategies(5)
    truth: dict[int, int] = {}
    for at, key_ns, what in steps:
        strategy = found[at]
        if what == "p" and key_ns < strategy.key_ns:
            agenda.push(strategy, key_ns)
            truth[at] = key_ns
        elif what == "r":
            agenda.remove(strategy)
            truth.pop(at, None)
        elif what == "t" and agenda.top() is not None:
            first = min(truth, key=lambda one: (truth[one], found[one].queue.order))
            assert agenda.top() is found[first]
            agenda.pop()
            assert found[first].key_ns == NEVER_NS
            del truth[first]
        for one in found:
            agenda.check(one)
    assert (agenda.top() is None) == (not truth)


def test_stale_entries_do_not_pile_up() -> None:
    agenda, found = strategies(3)
    for key_ns in range(10_000, 0, -1):
        agenda.push(found[key_ns % 3], key_ns)
    assert len(agenda.heap) <= 2 * 3 + STALE_MIN + 1
    assert agenda.top() is found[1]
