"""Our policy, idea by idea: each test fails without the idea it names."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import ServedModel
from clockwork_serve.controller.policies.default import DefaultScheduler
from clockwork_serve.messages import (
    Cancel,
    CodeReady,
    ControllerBusy,
    Infer,
    Load,
    Outcome,
    Profile,
    Reason,
    Request,
    Unload,
)
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import CODE, World, device, model, profile, serving


def world(*names: str, times: Profile | None = None, devices: int = 1, pages: int = 64) -> World:
    """Models that are warm on every device, under our policy."""
    made = World(ControllerConfig(policy="default"))
    made.serve(*[model(name) for name in names], times=times or profile(b1_ms=10, step_ms=1, load_ms=8))
    for at in range(devices):
        made.join(device(f"d{at}", pages), worker=f"w{at}")
    for name in names:
        made.ask(name, slo_ms=500, until_ms=100)
    made.actions.clear()
    return made


def infers(made: World) -> list[tuple[str, int, int]]:
    """(model, batch size, requests) of each INFER."""
    return [(one.model, one.batch, len(one.calls)) for one in made.actions if isinstance(one, Infer)]


def test_the_next_action_is_chosen_when_the_lane_is_nearly_free() -> None:
    made = world("a", "b", "c")
    made.ask("a", slo_ms=200, until_ms=5)
    made.ask("b", slo_ms=190, until_ms=3)
    assert infers(made) == [("a/1", 1, 1)], "the lane is busy for 2 ms more; paper would have sent b"
    made.ask("c", slo_ms=60, until_ms=30)
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
    made.ask("q", slo_ms=500, until_ms=100)
    made.request("c", slo_ms=400)
    for _ in range(4):
        made.request("b", slo_ms=24.5)
    quick = made.request("q", slo_ms=20)
    made.run(until_ms=100)
    assert made.answers[quick].outcome is Outcome.OK, "one in 2 ms; four in 13 ms are less"


def hurried(busy: int, b_slo_ms: float = 50, others_ms: float = 27) -> World:
    """The lane is busy for 10 ms, and ``busy`` times 17 ms; then four of a's eight fit, or all of b's.

    a's first has 27 ms, its others ``others_ms``.
    """
    made = world("a", "b", "c")
    for _ in range(1 + 8 * busy):
        made.request("c", slo_ms=400)
    made.run(until_ms=17 * busy)
    for slo_ms in (27, *[others_ms] * 7):
        made.request("a", slo_ms=slo_ms)
    for _ in range(8):
        made.request("b", slo_ms=b_slo_ms)
    made.actions.clear()
    made.run(until_ms=100)
    return made


def test_where_time_is_short_a_full_batch_goes_before_a_part_of_a_queue() -> None:
    made = hurried(busy=3)
    assert infers(made) == [("b/1", 8, 8)], "busy for 61 ms, more than twice a's 27"


def test_a_part_of_a_queue_is_served_where_the_lane_was_not_busy_for_long() -> None:
    assert infers(hurried(busy=2)) == [("a/1", 4, 4), ("b/1", 8, 8)]


def test_requests_of_a_much_longer_slo_have_no_claim_where_time_is_short() -> None:
    assert infers(hurried(busy=3, b_slo_ms=55))[0] == ("a/1", 4, 4)


def test_nor_where_others_of_the_queue_have_as_long() -> None:
    assert infers(hurried(busy=8, b_slo_ms=55, others_ms=55))[0] == ("a/1", 4, 4)


def test_nothing_is_passed_over_where_all_can_be_in_time() -> None:
    made = world("a", "b", "c")
    made.request("c", slo_ms=400)
    urgent = made.request("a", slo_ms=25)
    many = [made.request("b", slo_ms=48) for _ in range(8)]
    made.run(until_ms=100)
    assert all(made.answers[one].outcome is Outcome.OK for one in (urgent, *many))
    assert [name for name, _, _ in infers(made)] == ["c/1", "a/1", "b/1"]


def relaxed_batches(made: World, slo_ms: float = 5000) -> list[int]:
    """The batch sizes of eight requests without a hurry."""
    made.actions.clear()
    for _ in range(8):
        made.request("relaxed", slo_ms=slo_ms)
    made.run(until_ms=200)
    return [batch for name, batch, _ in infers(made) if name == "relaxed/1"]


def test_relaxed_work_stays_short_while_others_are_in_a_hurry() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.ask("tight", slo_ms=25, until_ms=50)
    made.request("other", slo_ms=5000)
    assert max(relaxed_batches(made)) == 2, "14.6 ms may be waited; a batch of 4 takes 16 ms"


def test_relaxed_work_may_take_all_the_time_that_others_can_wait() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=4.6))
    made.ask("tight", slo_ms=25, until_ms=50)
    made.request("other", slo_ms=5000)
    assert max(relaxed_batches(made)) == 2, "25 ms less 10 for itself and 0.4 on the way: 14.6"


def test_relaxed_work_takes_its_full_batch_once_nobody_is_in_a_hurry_any_more() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.ask("tight", slo_ms=25, until_ms=1100)
    made.request("other", slo_ms=5000)
    assert relaxed_batches(made) == [8]


@pytest.mark.parametrize(("slo_ms", "largest"), [(120, 2), (60, 8)])
def test_relaxed_work_takes_its_full_batch_once_half_of_its_slo_is_over(slo_ms: float, largest: int) -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.ask("tight", slo_ms=25, until_ms=50)
    made.request("other", slo_ms=5000)
    assert max(relaxed_batches(made, slo_ms)) == largest


def test_an_slo_that_nobody_can_meet_shortens_nothing() -> None:
    made = world("relaxed", "tight", "other", times=profile(b1_ms=10, step_ms=2))
    made.ask("tight", slo_ms=9, until_ms=50)
    made.request("other", slo_ms=5000)
    assert relaxed_batches(made) == [8]


def test_weights_are_loaded_for_those_who_come_next_where_no_load_is_quick_enough() -> None:
    made = serving("a", times=profile(b1_ms=2, step_ms=1, load_ms=8), policy="default")
    first = made.ask("a", slo_ms=6, until_ms=20)
    second = made.ask("a", slo_ms=6, until_ms=20)
    assert made.answers[first].reason is Reason.WOULD_MISS_DEADLINE
    assert made.answers[second].outcome is Outcome.OK
    assert sum(isinstance(one, Load) for one in made.actions) == 1


@pytest.mark.parametrize("way_ms", [0, 16, 20, 26, 28, 32, 40])
def test_so_they_are_where_gateways_keep_the_time_that_the_load_would_need(way_ms: float) -> None:
    made = serving("a", times=profile(b1_ms=10, load_ms=42), policy="default")
    for _ in range(5):
        made.ask("a", slo_ms=80, until_ms=80, way_ns=ms(way_ms))
    first, *later = [one.outcome for one in made.answers.values()]
    assert later == [Outcome.OK] * 4
    assert (first is Outcome.OK) == (way_ms < 27)
    assert loads(made) == ["a/1"]


def test_so_they_are_where_plans_leave_much_for_delays() -> None:
    made = serving("a", "b", times=profile(b1_ms=10, load_ms=42), policy="default")
    made.ask("b", slo_ms=500, until_ms=100)
    made.controller._belief.slack_ns = ms(20)
    first, second = made.ask("a", slo_ms=70, until_ms=80), made.ask("a", slo_ms=70, until_ms=80)
    assert made.answers[first].reason is Reason.WOULD_MISS_DEADLINE
    assert made.answers[second].outcome is Outcome.OK


def test_so_they_are_where_requests_were_long_on_their_way_to_the_controller() -> None:
    made = serving("a", times=profile(b1_ms=10, load_ms=42), policy="default")
    for request_id in ("first", "second"):
        made.tell(
            Request(
                request_id=request_id, gateway="g0", model="a/1", arrival_ns=made.now_ns - ms(7),
                deadline_ns=made.now_ns + ms(51),
            )
        )  # fmt: skip
        made.run(until_ms=60)
    assert made.answers["first"].reason is Reason.WOULD_MISS_DEADLINE
    assert made.answers["second"].outcome is Outcome.OK


def test_so_they_are_where_the_only_device_that_has_them_is_too_slow() -> None:
    made = serving("a", "b", pages=4, times=profile(b1_ms=10, load_ms=42), policy="default")
    made.join(device("d1", pages=4), worker="w1")
    for name in ("a", "b"):
        made.ask(name, slo_ms=500, until_ms=100)
    made.slow["d0"] = 10
    for _ in range(20):
        made.ask("a", slo_ms=500, until_ms=200)
    made.actions.clear()
    first, second = made.ask("a", slo_ms=45, until_ms=60), made.ask("a", slo_ms=45, until_ms=60)
    assert made.answers[first].reason is Reason.WOULD_MISS_DEADLINE
    assert made.answers[second].outcome is Outcome.OK
    assert loads(made) == ["a/1"]


def loads(made: World) -> list[str]:
    """The model of each LOAD."""
    return [one.model for one in made.actions if isinstance(one, Load)]


def test_of_models_wanted_equally_the_one_whose_request_is_due_first_is_loaded() -> None:
    made = serving(*("a", "b", "busy"), mib=1, policy="default")
    made.request("busy", slo_ms=100)
    made.request("b", slo_ms=100)
    made.run(until_ms=2)
    made.ask("a", slo_ms=100, until_ms=50)
    assert loads(made) == ["busy/1", "b/1", "a/1"]


def test_a_load_lane_is_topped_up_when_it_is_nearly_free() -> None:
    made = serving(*("a", "b", "busy"), mib=1, policy="default")
    made.request("busy", slo_ms=100)
    made.request("a", slo_ms=100)
    made.run(until_ms=7)
    assert loads(made) == ["busy/1"], "paper would have sent a"
    for _ in range(2):
        made.request("b", slo_ms=100)
    made.run(until_ms=50)
    assert loads(made) == ["busy/1", "b/1", "a/1"], "b came last and is wanted more"


def short_of_loads(busy: int) -> World:
    """The load lane is kept busy by LOADs of 8 ms; then b can wait for no other, and a can."""
    made = World(ControllerConfig(policy="default"))
    others = [f"o{at}" for at in range(busy)]
    made.serve(*[model(name, mib=1) for name in ("a", "b", *others)], times=profile(b1_ms=1, load_ms=8))
    made.join(device(pages=64))
    for name in others:
        for _ in range(2):
            made.request(name, slo_ms=400)
    made.run(until_ms=8 * busy - 7)
    made.ask("b", slo_ms=20, until_ms=6)
    made.request("a", slo_ms=20)
    made.actions.clear()
    made.run(until_ms=50)
    return made


def test_where_loads_are_short_the_model_that_can_still_wait_for_another_is_loaded_first() -> None:
    assert loads(short_of_loads(busy=6)) == ["a/1"], "busy for 48 ms, more than twice the SLO"


def test_the_first_due_is_loaded_first_where_the_load_lane_was_not_busy_for_long() -> None:
    assert loads(short_of_loads(busy=4)) == ["b/1", "a/1"]


def pressed(*, lanes_share: bool = True) -> World:
    """One device whose exec lane is busy with 12 requests of 10 ms, the last of them due soon; and b came."""
    made = World(ControllerConfig(policy="default"))
    made.serve(*[model(name, mib=1) for name in "abc"], times=profile(b1_ms=10, step_ms=10, load_ms=2))
    made.join(replace(device(), lanes_share=lanes_share))
    made.ask("a", slo_ms=500, until_ms=500)
    for _ in range(12):
        made.request("a", slo_ms=130)
    made.run(until_ms=85)
    made.actions.clear()
    made.ask("b", slo_ms=130, until_ms=5)
    return made


def test_where_loads_take_the_time_of_infers_they_wait_while_others_are_short_of_it() -> None:
    made = pressed()
    made.ask("c", slo_ms=130, until_ms=20)
    assert loads(made) == ["b/1"], "one an SLO"
    made.run()
    assert loads(made) == ["b/1", "c/1"]
    assert {answer.outcome for answer in made.answers.values()} == {Outcome.OK}


def test_where_loads_take_nobodys_time_they_wait_for_nobody() -> None:
    made = pressed(lanes_share=False)
    made.request("c", slo_ms=130)
    assert loads(made) == ["b/1", "c/1"]


def test_the_load_of_a_more_urgent_request_waits_for_no_infer_but_the_one_that_runs() -> None:
    made = pressed()
    made.ask("c", slo_ms=130, priority=1, until_ms=10)
    assert loads(made) == ["b/1", "c/1"]


def test_models_that_nobody_loaded_are_served_beside_one_that_is_asked_for_twice_as_much_as_can_be() -> None:
    made = pressed()
    others = [f"o{at}" for at in range(5)]
    made.serve(*[model(name, mib=1) for name in others], times=profile(b1_ms=10, step_ms=10, load_ms=2))
    found = []
    for at in range(100):
        for _ in range(2):
            made.request("a", slo_ms=130)
        if at % 20 == 10:
            found.append(made.request(others[at // 20], slo_ms=130))
        made.run(until_ms=10)
    made.run()
    assert [made.answers[one].outcome for one in found].count(Outcome.OK) >= 4


def test_where_nobody_wants_a_load_no_lane_is_looked_at_for_one() -> None:
    made = pressed()
    assert loads(made) == ["b/1"], "it is there, and a is short of time"
    (found,) = made.controller._belief.devices.values()
    assert not found.agenda.load_blocked
    made.request("c", slo_ms=130)
    assert found.agenda.load_blocked


def test_a_load_waits_for_no_infers_whose_requests_are_gone() -> None:
    made = pressed()
    for at in range(2, 14):
        made.tell(Cancel(request_id=f"r{at}"))
    made.request("b", slo_ms=130)
    made.request("c", slo_ms=130)
    made.run(until_ms=10)
    assert loads(made) == ["b/1", "c/1"]


def test_weights_least_asked_for_make_room_not_those_used_longest_ago() -> None:
    made = serving(*("hot", "cold", "new"), mib=1, pages=2, policy="default")
    for name in ("hot", "hot", "hot", "cold", "new"):
        made.ask(name, slo_ms=500, until_ms=100)
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


def test_equal_slos_ask_for_as_much_whatever_delays_were_measured_lately() -> None:
    made = belief("d0")
    served = serve(made, "a")
    for slack_ms in (4, 0.5):
        made.slack_ns = ms(slack_ms)
        queue = ask(made, served, slo_ms=100)
    assert queue.dues[0] != queue.dues[1]
    assert queue.waiters[0].demand_ns == queue.waiters[1].demand_ns


def test_a_batch_that_leaves_too_few_behind_to_fill_a_larger_one_is_no_sign_that_time_is_short() -> None:
    made = world("a", "b", "c", times=profile(b1_ms=10, step_ms=8))
    for _ in range(9):
        made.request("c", slo_ms=400)
    made.run(until_ms=66)
    for name, slo_ms, count in (("a", 35, 3), ("b", 68, 4)):
        for _ in range(count):
            made.request(name, slo_ms=slo_ms)
    made.actions.clear()
    made.run(until_ms=100)
    assert infers(made)[0] == ("a/1", 2, 2), "four of b are a little more for their time"


def test_idle_memory_takes_a_copy_of_what_waits_and_cannot_wait_long() -> None:
    made = world("a", "b")
    made.join(device("d1"), worker="w1")
    made.run(until_ms=1)
    made.ask("b", slo_ms=28, until_ms=1)
    made.request("a", slo_ms=28)
    assert loads(made) == ["a/1"], "its device is busy, and another one is idle"


def test_idle_memory_takes_no_copy_of_what_can_wait_and_none_where_it_would_evict() -> None:
    for pages, slo_ms in ((64, 300), (2, 28)):
        made = world("a", "b")
        made.join(device("d1", pages), worker="w1")
        made.run(until_ms=1)
        made.ask("b", slo_ms=slo_ms, until_ms=1)
        made.request("a", slo_ms=slo_ms)
        assert loads(made) == []


def crowded(*others: str, pages: int = 16) -> tuple[Belief, DefaultScheduler, ServedModel]:
    """A model whose device is asked for more than a quarter of its time; no lane has room for an INFER."""
    made = belief("d0", *others, pages=pages)
    policy, served = DefaultScheduler(made), serve(made, "a")
    place(made, served, "d0")
    for one in made.devices.values():
        policy.device_changed(one)
        one.exec.send(1, ms(80), ms(10))
    policy.queued(ask(made, served, count=3))
    return made, policy, served


def copies(made: Belief, policy: DefaultScheduler) -> list[str]:
    """The devices that are sent a copy now."""
    made.effects.clear()
    policy.schedule(ms(10))
    return [one.device for one in made.effects if isinstance(one, Load)]


@pytest.mark.parametrize(("count", "copied"), [(2, True), (3, False)], ids=["20 of 100 ms", "31 of 100 ms"])
def test_a_copy_goes_where_less_than_a_quarter_of_the_time_is_asked_for(count: int, copied: bool) -> None:
    made, policy, _ = crowded("d1")
    other = serve(made, "b")
    place(made, other, "d1")
    policy.queued(ask(made, other, count=count))
    assert copies(made, policy) == (["d1"] if copied else [])


@pytest.mark.parametrize(("busy", "copied"), [("d1", True), ("d1 d2", False)])
def test_half_of_the_load_lanes_stay_idle_for_loads_that_are_needed(busy: str, copied: bool) -> None:
    made, policy, _ = crowded("d1", "d2", "d3")
    for name in busy.split():
        made.devices[name].load.send(2, ms(9), ms(10))
    assert copies(made, policy) == (["d2"] if copied else [])


def test_copies_are_made_again_once_a_device_has_time_for_them() -> None:
    made, policy, served = crowded("d1")
    other = serve(made, "b")
    place(made, other, "d1")
    queue = ask(made, other, count=3)
    policy.queued(queue)
    assert copies(made, policy) == []
    assert made.dirty_above_ns == ms(100), "which models are asked for is not looked at meanwhile"
    policy.exec_changed(made.devices["d1"])
    assert made.dirty_above_ns == ms(100), "it has no more time than before"

    for waiter in list(queue.waiters):
        made.answer(waiter, Outcome.CANCELLED, Reason.NONE)
    policy.exec_changed(made.devices["d1"])
    policy.queued(ask(made, served))
    assert copies(made, policy) == ["d1"]


def test_where_no_device_has_memory_for_copies_no_time_for_them_is_noted() -> None:
    made, policy, _ = crowded("d1", pages=4)
    place(made, serve(made, "b"), "d1")
    for one in made.devices.values():
        policy.load_changed(one)
    policy.exec_changed(made.devices["d1"])
    assert made.dirty_above_ns == ms(100)


def test_where_there_is_little_to_do_one_device_does_it() -> None:
    made = world("a")
    made.join(device("d1"), worker="w1")
    made.run(until_ms=1)
    for _ in range(40):
        made.request("a", slo_ms=60)
    made.run(until_ms=300)
    made.actions.clear()
    for _ in range(20):
        made.ask("a", slo_ms=200, until_ms=10)
    made.run(until_ms=200)
    assert {one.device for one in made.actions if isinstance(one, Infer)} == {"d0"}
    made.actions.clear()
    for _ in range(20):
        made.ask("a", slo_ms=40, until_ms=5)
    assert {one.device for one in made.actions if isinstance(one, Infer)} == {"d0", "d1"}, "a tight SLO"


@pytest.mark.parametrize(("busy", "left"), [(1, True), (3, True), (4, False)])
def test_an_idle_device_leaves_work_to_any_of_the_first_before_it_that_have_time_for_it(
    busy: int, left: bool
) -> None:
    made = belief(*[f"d{at}" for at in range(busy + 2)])
    policy, served = DefaultScheduler(made), serve(made, "a")
    for at, one in enumerate(made.devices.values()):
        place(made, served, one.name)
        if at <= busy:
            one.exec.send(1, ms(300 if at < busy else 20), ms(10))
    policy.queued(ask(made, served, slo_ms=200))
    made.effects.clear()
    policy.schedule(ms(10))
    assert [one.device for one in made.effects if isinstance(one, Infer)] == (
        [] if left else [f"d{busy + 1}"]
    )


def filled(made: World, requests: int, *, every_ms: float = 2, slo_ms: float = 200) -> list[str]:
    """Request a model again and again; the requests."""
    asked = []
    for _ in range(requests):
        asked.append(made.request("a", slo_ms=slo_ms))
        made.run(until_ms=every_ms)
    made.run(until_ms=300)
    assert all(made.answers[one].outcome is Outcome.OK for one in asked)
    return asked


def test_while_the_controller_is_busy_a_batch_is_filled_first() -> None:
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(1000)))
    filled(made, 8)
    assert infers(made) == [("a/1", 8, 8)]


def test_otherwise_it_is_not() -> None:
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(1)))
    made.run(until_ms=2)
    filled(made, 8)
    assert infers(made)[0] == ("a/1", 1, 1)


def test_it_is_filled_only_for_as_long_as_there_is_time_to_spare() -> None:
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(1000)))
    filled(made, 3, every_ms=1)
    assert infers(made) == [("a/1", 4, 3)], "a quarter of the SLO before it would be too late"
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(1000)))
    filled(made, 1, slo_ms=30)
    assert infers(made) == [("a/1", 1, 1)]


def test_it_is_filled_no_longer_once_the_controller_is_not_busy() -> None:
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(20)))
    made.ask("a", slo_ms=5000, until_ms=19)
    assert not infers(made)
    made.run(until_ms=2)
    assert infers(made) == [("a/1", 1, 1)]


@pytest.mark.parametrize(("slo_ms", "began_ms"), [(20, 5), (60, 33), (100, 63)])
def test_a_tighter_request_that_joins_ends_the_waiting_in_its_own_time(
    slo_ms: float, began_ms: float
) -> None:
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(1000)))
    asked_ns, relaxed = made.now_ns, made.ask("a", slo_ms=5000, until_ms=5)
    tight = made.ask("a", slo_ms=slo_ms, until_ms=200)
    assert infers(made) == [("a/1", 2, 2)]
    assert abs(made.started[-1][0] - asked_ns - ms(began_ms)) < ms(1), "a quarter of its SLO and 17 ms before"
    assert {made.answers[one].outcome for one in (relaxed, tight)} == {Outcome.OK}


def test_without_a_deadline_none_waits_for_more_than_the_horizon() -> None:
    made = world("a")
    made.tell(ControllerBusy(for_ns=ms(10_000)))
    made.ask("a", slo_ms=1e7, until_ms=101)
    assert infers(made) == [("a/1", 1, 1)]


def test_each_queue_is_released_in_its_own_time() -> None:
    made = world("a", "b")
    made.tell(ControllerBusy(for_ns=ms(1000)))
    made.request("a", slo_ms=100)
    made.run(until_ms=30)  # longer than a's batch takes: no other event wakes the controller
    made.ask("b", slo_ms=100, until_ms=60)
    assert infers(made) == [("a/1", 1, 1), ("b/1", 1, 1)], "58 ms after each, 17 and 25 before its deadline"


def test_no_batch_is_filled_where_devices_have_no_time_to_spare() -> None:
    made = world("a", "b")
    made.tell(ControllerBusy(for_ns=ms(1000)))
    for _ in range(60):
        made.request("b", slo_ms=200)
    made.request("a", slo_ms=150)
    made.run(until_ms=60)
    assert ("a/1", 1, 1) in infers(made), "it is due first; with more time it would wait for 95 ms"
