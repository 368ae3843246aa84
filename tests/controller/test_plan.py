"""A device's heap of strategies, against a plain dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.cluster import STALE_MIN, LanePlan, Strategy
from clockwork_serve.controller.timers import NEVER_NS
from tests.controller.clusters import ask, belief, place, serve


def strategies(count: int) -> tuple[LanePlan, list[Strategy]]:
    made = belief("d0")
    found = []
    for at in range(count):
        served = serve(made, f"m{at}", mib=1)
        place(made, served, "d0", first=at)
        found.append(ask(made, served).strategies[0])
    return made.devices["d0"].plan, found


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.sampled_from("ppprt")), max_size=80))
def test_any_history_agrees_with_a_plain_dict(steps: list[tuple[int, int, str]]) -> None:
    plan, found = strategies(5)
    truth: dict[int, int] = {}
    for at, key_ns, what in steps:
        strategy = found[at]
        if what == "p" and key_ns < strategy.key_ns:
            plan.push(strategy, key_ns)
            truth[at] = key_ns
        elif what == "r":
            plan.remove(strategy)
            truth.pop(at, None)
        elif what == "t" and plan.top() is not None:
            first = min(truth, key=lambda one: (truth[one], found[one].queue.order))
            assert plan.top() is found[first]
            plan.pop()
            assert found[first].key_ns == NEVER_NS
            del truth[first]
        for one in found:
            plan.check(one)
    assert (plan.top() is None) == (not truth)


def test_stale_entries_do_not_pile_up() -> None:
    plan, found = strategies(3)
    for key_ns in range(10_000, 0, -1):
        plan.push(found[key_ns % 3], key_ns)
    assert len(plan.heap) <= 2 * 3 + STALE_MIN + 1
    assert plan.top() is found[1]
