"""The paper's policy where lanes are late or lost: what waits is looked at again, and at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.policies.paper import PaperScheduler
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import Cancel, Infer, Load, Outcome, Request, Unload
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import World, device, model, profile, serving


def warm(*names: str, **settings: object) -> World:
    """One device that has all weights; INFERs take 10 ms, and 4 more for each further request."""
    made = World(ControllerConfig(policy="paper", **settings))  # type: ignore[arg-type]
    made.serve(*[model(name) for name in names])
    made.join(device())
    for name in names:
        made.ask(name, slo_ms=5000, until_ms=100)
    made.actions.clear()
    return made


def test_a_lane_that_was_late_takes_work_again_when_it_has_caught_up() -> None:
    made = warm("a", max_batch=1, look_ahead_ns=ms(20))
    made.slower = 3.0
    ids = [made.request("a", slo_ms=500)]
    for pause_ms in (6, 15):
        made.run(until_ms=pause_ms)
        ids.append(made.request("a", slo_ms=500))
    assert len(made.actions) == 2, "30 ms for 10: more than the 10 ms at which a lane is given no more"
    made.run(until_ms=200)
    ids.append(made.request("a", slo_ms=500))
    made.run()
    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 4


def test_one_action_that_is_late_does_not_stop_the_next() -> None:
    made = warm("a", max_batch=1)
    made.slower = 3.0
    for pause_ms in (25, 5):
        made.ask("a", slo_ms=500, until_ms=pause_ms)
    assert len(made.actions) == 2, "late by 15 ms, and nothing is behind it"


def test_a_lane_that_is_free_early_takes_work_at_once() -> None:
    made = warm("a", max_batch=1)
    made.slower = 0.2
    ids = [made.request("a", slo_ms=500) for _ in range(3)]
    made.run(until_ms=8)
    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 3, "2 ms each, not 10"
    assert len([one for one in made.actions if isinstance(one, Infer)]) == 3


def test_of_two_models_that_come_at_once_the_one_that_asks_for_more_is_loaded_first() -> None:
    made = warm("x")
    made.serve(model("a"), model("b"))
    requests = [
        Request(request_id=f"q{at}", gateway="g0", model=f"{name}/1", arrival_ns=made.now_ns,
                deadline_ns=made.now_ns + ms(500))
        for at, name in enumerate("abb")
    ]  # fmt: skip
    made.tell(*requests)
    made.run()
    assert [one.model for one in made.actions if isinstance(one, Load)] == ["b/1", "a/1"]


def test_where_no_larger_batch_has_time_the_head_runs_alone() -> None:
    made = warm("a", "b")
    ids = [made.request(name, slo_ms=slo) for name, slo in (("b", 100), ("a", 25), ("a", 100))]
    made.run()
    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 3
    assert [one.batch for one in made.actions if isinstance(one, Infer)] == [1, 1, 1]


def test_a_full_batch_is_as_urgent_as_its_whole_length_asks() -> None:
    made = warm("a", "b", "c")
    for name, slo in (("c", 500), ("b", 100), ("b", 100), ("b", 100), ("b", 100), ("a", 95)):
        made.request(name, slo_ms=slo)
    made.run()
    sent = [(one.model, one.batch) for one in made.actions if isinstance(one, Infer)]
    assert sent == [("c/1", 1), ("b/1", 4), ("a/1", 1)], "22 ms for four of b by 100, 10 ms for a by 95"


def test_a_queue_that_is_less_urgent_than_it_was_lets_others_go_first_at_once() -> None:
    made = warm("a", "b", "c")
    made.request("c", slo_ms=500)
    keeps, *gone = [made.request("a", slo_ms=60) for _ in range(4)]
    other = made.request("b", slo_ms=55)
    made.tell(*[Cancel(request_id=one) for one in gone])
    made.run(until_ms=8)
    assert [one.model for one in made.actions] == ["c/1", "b/1"], "c has 2 ms to go"
    made.run()
    assert made.answers[keeps].outcome is made.answers[other].outcome is Outcome.OK


def test_weights_that_found_no_room_are_loaded_once_there_is_though_others_were_loaded_meanwhile() -> None:
    made = serving(
        "x", "y", "a", model("b", mib=8), pages=12, times=profile(b1_ms=100, load_ms=8), policy="paper"
    )
    made.ask("x", slo_ms=5000, until_ms=20)
    ids = [made.request(name, slo_ms=5000) for name in ("y", "b", "b", "a")]
    made.run()
    loads = [one.model for one in made.actions if isinstance(one, Load)]
    assert loads[:4] == ["x/1", "y/1", "a/1", "b/1"]
    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 4


def test_weights_that_nobody_waits_for_any_more_make_room_at_once() -> None:
    made = serving("x", "y", "b", pages=8, times=profile(b1_ms=100, load_ms=8), policy="paper")
    for name in ("x", "y"):
        made.ask(name, slo_ms=5000, until_ms=500)
    made.request("x", slo_ms=5000)
    gone = made.request("y", slo_ms=300)
    made.request("b", slo_ms=5000)
    made.run(until_ms=20)
    made.actions.clear()
    made.tell(Cancel(request_id=gone))
    assert [(type(one), one.model) for one in made.actions] == [(Unload, "y/1"), (Load, "b/1")]


def test_weights_that_would_have_come_too_late_for_a_busy_lane_are_loaded_if_it_is_free_early() -> None:
    made = serving("x", "b", times=profile(b1_ms=50, load_ms=8), policy="paper", reject_infeasible=False)
    made.ask("x", slo_ms=500, until_ms=100)
    made.slower = 0.2
    made.request("x", slo_ms=500)
    made.actions.clear()
    waiting = made.request("b", slo_ms=90)
    assert made.actions == [], "50 ms of x, and b must start by 38"
    made.run()
    assert made.answers[waiting].outcome is Outcome.OK


@given(st.lists(st.integers(8, 60), min_size=1, max_size=12), st.integers(0, 30))
def test_the_batch_is_the_largest_on_the_way_up_whose_requests_can_all_be_in_time(
    slos_ms: list[int], start_ms: int
) -> None:
    made = belief("d0")
    served = serve(made, "a")
    place(made, served, "d0")
    for slo_ms in slos_ms:
        queue = ask(made, served, slo_ms)
    start_ns, found, urgency_ns = ms(10 + start_ms), None, NEVER_NS
    for size, infer_ns in ((1, ms(10)), (2, ms(14)), (4, ms(22)), (8, ms(38))):
        due = [due_ns for due_ns in queue.dues if due_ns >= start_ns + infer_ns]
        if len(due) < size:
            break
        found, urgency_ns = (size, len(queue.dues) - len(due)), min(urgency_ns, due[0] - infer_ns)
    scheduler = PaperScheduler(made)
    fit = scheduler._choose(queue.strategies[0], start_ns)
    assert (fit and (fit[0].size, fit[1])) == found
    assert fit is None or fit[2] == urgency_ns
