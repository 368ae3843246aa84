"""Our policy, idea by idea: each test fails without the idea it names."""

from __future__ import annotations

from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import CodeReady, Infer, Load, Outcome, Profile, Reason, Unload
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import CODE, World, device, model, profile


def world(*names: str, times: Profile | None = None, devices: int = 1, pages: int = 64) -> World:
    """Models that are warm on every device, under our policy."""
    made = World(ControllerConfig(policy="default"))
    made.serve(*[model(name) for name in names], times=times or profile(b1_ms=10, step_ms=1, load_ms=8))
    for at in range(devices):
        made.join(device(f"d{at}", pages), worker=f"w{at}")
    for name in names:
        made.request(name, slo_ms=500)
        made.run(until_ms=100)
    made.actions.clear()
    return made


def infers(made: World) -> list[tuple[str, int, int]]:
    """(model, batch size, requests) of each INFER."""
    return [(one.model, one.batch, len(one.calls)) for one in made.actions if isinstance(one, Infer)]


def test_the_next_action_is_chosen_when_the_lane_is_nearly_free() -> None:
    made = world("a", "b", "c")
    made.request("a", slo_ms=200)
    made.run(until_ms=5)
    made.request("b", slo_ms=190)
    made.run(until_ms=3)
    assert infers(made) == [("a/1", 1, 1)], "the lane is busy for 2 ms more; paper would have sent b"
    made.request("c", slo_ms=60)
    made.run(until_ms=30)
    assert [name for name, _, _ in infers(made)] == ["a/1", "c/1", "b/1"], "c came last and is due first"


def test_the_size_that_is_full_is_run_and_no_larger_one() -> None:
    made = world("a", "b")
    made.request("b", slo_ms=400)
    for _ in range(2):
        made.request("a", slo_ms=300)
    made.run(until_ms=100)
    assert infers(made) == [("b/1", 1, 1), ("a/1", 2, 2)]


def test_a_larger_size_that_is_not_full_is_run_where_it_pays() -> None:
    made = world("a", "b")
    made.request("b", slo_ms=400)
    for _ in range(3):
        made.request("a", slo_ms=300)
    made.run(until_ms=100)
    assert infers(made) == [("b/1", 1, 1), ("a/1", 4, 3)], "13 ms for three, not 11 + 10"


def test_a_larger_size_that_is_not_full_is_not_run_where_it_does_not_pay() -> None:
    made = world("a", "b", times=profile(b1_ms=10, step_ms=9))
    made.request("b", slo_ms=400)
    for _ in range(3):
        made.request("a", slo_ms=300)
    made.run(until_ms=100)
    assert ("a/1", 4, 3) not in infers(made), "37 ms for three, not 19 + 10"


def test_the_head_is_not_passed_over_for_a_larger_batch_that_can_wait() -> None:
    made = world("a", "b", times=profile(b1_ms=10, step_ms=2))
    made.request("b", slo_ms=400)
    head = made.request("a", slo_ms=21)
    for _ in range(4):
        made.request("a", slo_ms=41)
    made.run(until_ms=100)
    assert made.answers[head].outcome is Outcome.OK
    assert infers(made)[1:] == [("a/1", 1, 1), ("a/1", 4, 4)]


def test_the_head_is_passed_over_for_a_larger_batch_that_cannot_wait() -> None:
    made = world("a", "b", times=profile(b1_ms=10, step_ms=2))
    made.request("b", slo_ms=400)
    head = made.request("a", slo_ms=21)
    others = [made.request("a", slo_ms=29) for _ in range(4)]
    made.run(until_ms=100)
    assert made.answers[head].reason is Reason.WOULD_MISS_DEADLINE
    assert all(made.answers[other].outcome is Outcome.OK for other in others)


def test_where_not_all_can_be_in_time_the_batch_that_serves_least_is_passed_over() -> None:
    made = world("a", "b", "c")
    made.request("c", slo_ms=400)
    urgent = made.request("a", slo_ms=25)
    many = [made.request("b", slo_ms=28.5) for _ in range(8)]
    made.run(until_ms=100)
    assert made.answers[urgent].reason is Reason.WOULD_MISS_DEADLINE
    assert all(made.answers[one].outcome is Outcome.OK for one in many)


def test_the_most_urgent_is_passed_over_where_it_serves_least_and_makes_others_late() -> None:
    made = world("a", "b", "c")
    made.request("c", slo_ms=400)
    urgent = made.request("a", slo_ms=23.5)
    many = [made.request("b", slo_ms=34) for _ in range(8)]
    made.run(until_ms=100)
    assert made.answers[urgent].reason is Reason.WOULD_MISS_DEADLINE
    assert [made.answers[one].outcome for one in many] == [Outcome.OK] * 8, "17 ms after c, and not after a"


def test_who_serves_fewest_for_its_time_is_passed_over_not_who_serves_fewest() -> None:
    made = world("b", "c")
    made.serve(
        model("q", code_id="quick"), code=replace(CODE, code_id="quick"), times=profile("quick", b1_ms=2)
    )
    made.tell(CodeReady(device="d0", code_id="quick"))
    made.request("q", slo_ms=500)
    made.run(until_ms=100)
    made.request("c", slo_ms=400)
    for _ in range(4):
        made.request("b", slo_ms=24.5)
    quick = made.request("q", slo_ms=20)
    made.run(until_ms=100)
    assert made.answers[quick].outcome is Outcome.OK, "one in 2 ms; four in 13 ms are less"


def test_nothing_is_passed_over_where_all_can_be_in_time() -> None:
    made = world("a", "b", "c")
    made.request("c", slo_ms=400)
    urgent = made.request("a", slo_ms=25)
    many = [made.request("b", slo_ms=48) for _ in range(8)]
    made.run(until_ms=100)
    assert all(made.answers[one].outcome is Outcome.OK for one in (urgent, *many))
    assert [name for name, _, _ in infers(made)] == ["c/1", "a/1", "b/1"]


def relaxed_batches(made: World) -> list[int]:
    """The batch sizes of eight requests without a hurry."""
    made.actions.clear()
    for _ in range(8):
        made.request("relaxed", slo_ms=5000)
    made.run(until_ms=200)
    return [batch for name, batch, _ in infers(made) if name == "relaxed/1"]


def test_relaxed_work_stays_short_while_others_are_in_a_hurry() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.request("tight", slo_ms=25)
    made.run(until_ms=50)
    made.request("other", slo_ms=5000)
    assert max(relaxed_batches(made)) == 2, "14.6 ms may be waited; a batch of 4 takes 16 ms"


def test_relaxed_work_may_take_all_the_time_that_others_can_wait() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=4.6))
    made.request("tight", slo_ms=25)
    made.run(until_ms=50)
    made.request("other", slo_ms=5000)
    assert max(relaxed_batches(made)) == 2, "25 ms less 10 for itself and 0.4 on the way: 14.6"


def test_relaxed_work_takes_its_full_batch_once_nobody_is_in_a_hurry_any_more() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.request("tight", slo_ms=25)
    made.run(until_ms=1100)
    made.request("other", slo_ms=5000)
    assert relaxed_batches(made) == [8]


def test_an_slo_that_nobody_can_meet_shortens_nothing() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.request("tight", slo_ms=9)
    made.run(until_ms=50)
    made.request("other", slo_ms=5000)
    assert relaxed_batches(made) == [8]


def test_weights_are_loaded_for_those_who_come_next_where_no_load_is_quick_enough() -> None:
    made = World(ControllerConfig(policy="default"))
    made.serve(model("a"), times=profile(b1_ms=2, step_ms=1, load_ms=8))
    made.join(device())
    first = made.request("a", slo_ms=6)
    made.run(until_ms=20)
    second = made.request("a", slo_ms=6)
    made.run(until_ms=20)
    assert made.answers[first].reason is Reason.WOULD_MISS_DEADLINE
    assert made.answers[second].outcome is Outcome.OK
    assert sum(isinstance(one, Load) for one in made.actions) == 1


def test_weights_least_asked_for_make_room_not_those_used_longest_ago() -> None:
    made = World(ControllerConfig(policy="default"))
    made.serve(*[model(name, mib=1) for name in ("hot", "cold", "new")])
    made.join(device(pages=2))
    for name in ("hot", "hot", "hot", "cold", "new"):
        made.request(name, slo_ms=500)
        made.run(until_ms=100)
    assert [one.model for one in made.actions if isinstance(one, Unload)] == ["cold/1"]


def test_a_window_leaves_room_for_all_although_delays_were_measured_anew_since_they_came() -> None:
    made = belief("d0")
    served = serve(made, "a")
    place(made, served, "d0")
    for slack_ms in (4, 0.5):
        made.slack_ns = ms(slack_ms)
        queue = ask(made, served, slo_ms=100 + (slack_ms > 1) * 3.5)
    made.slack_ns = ms(20)
    strategy = queue.strategies[0]
    batch = next(one for one in strategy.batches if one.count == 2)
    made.send_infer(strategy, batch, 0, ms(20), ms(20))
    sent = made.effects[-1]
    assert isinstance(sent, Infer)
    assert sent.window.latest_ns + sent.expected_ns <= ms(110)
