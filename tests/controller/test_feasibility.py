"""When exactly a waiting request is given up, and when a device's batch sizes are used at all."""

from __future__ import annotations

import re

import msgspec
import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    CodeReady,
    CodeRemade,
    Infer,
    Load,
    Outcome,
    Readiness,
    Reason,
    Request,
    Result,
    Status,
    Unload,
    WeightsReady,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.units import ms
from tests.controller.honest import Lane, World, device, model, profile, serving


def warm(*names: str, b1_ms: float = 100, config: ControllerConfig | None = None) -> World:
    world = World(config or ControllerConfig(policy="paper", max_batch=1))
    world.serve(*[model(name) for name in names], times=profile(b1_ms=b1_ms))
    world.join(device())
    for name in names:
        world.ask(name, slo_ms=5000)
    world.actions.clear()
    return world


def test_a_request_that_even_the_usual_duration_makes_late_is_no_reason_to_doubt_estimates() -> None:
    world = warm("a", b1_ms=10)
    world.slower = 3.0
    for _ in range(3):
        world.ask("a", slo_ms=500)
    ids = [world.request("a", slo_ms=slo) for slo in (5, 5, 5, 25)]
    assert all(world.answers[one].reason is Reason.WOULD_MISS_DEADLINE for one in ids), "it takes 30 ms"


def test_a_model_that_no_device_could_prepare_is_refused_with_the_reason() -> None:
    world = World()
    world.serve(model("a"))
    world.tell(WorkerJoined(worker="w0", devices=(device(),)))
    world.tell(CodeReady(device="d0", code_id="c", ok=False, message="no such operator"))
    answer = world.answers[world.request("a", slo_ms=500)]
    assert answer.reason is Reason.NOT_SERVING
    assert answer.message == "device d0 could not prepare the model: no such operator"


def test_a_code_that_was_made_again_is_expected_of_who_could_not_prepare_it_and_served() -> None:
    world = World()
    world.serve(model("a"))
    world.lanes = {("d0", "exec"): Lane(), ("d0", "load"): Lane()}
    world.tell(WorkerJoined(worker="w0", devices=(device(),)))
    world.tell(CodeReady(device="d0", code_id="c", ok=False, message="a bit is wrong"))
    world.tell(CodeRemade(code_id="unknown"))
    world.tell(CodeRemade(code_id="c"))
    world.tell(CodeReady(device="d0", code_id="c"))
    answer = world.ask("a", slo_ms=500)
    assert world.answers[answer].outcome is Outcome.OK


def weights_found(why: str) -> WeightsReady:
    return WeightsReady(device="d0", weights_id=model("a").weights.weights_id, ok=not why, message=why)


@pytest.mark.parametrize("policy", ["paper", "default"])
def test_a_device_without_a_model_s_weights_is_sent_no_load_of_it_until_it_has_them(policy: str) -> None:
    world = World(ControllerConfig(policy=policy))
    world.serve(model("a"), model("b"))
    world.join(device())
    world.tell(weights_found("none in the store"))
    for _ in range(3):
        answer = world.answers[world.ask("a", slo_ms=500)]
        assert answer.reason is Reason.NOT_SERVING
        assert answer.message == "device d0 has no weights of the model: none in the store"
    assert world.answers[world.ask("b", slo_ms=500)].outcome is Outcome.OK, "which has other weights"
    world.join(device("d1"), worker="w1")
    assert world.answers[world.ask("a", slo_ms=500)].outcome is Outcome.OK
    assert {each.device for each in world.actions if each.model == "a/1"} == {"d1"}
    world.tell(WorkerLost(worker="w1"))
    world.tell(weights_found(""))
    assert world.answers[world.ask("a", slo_ms=500)].outcome is Outcome.OK


class Verifying(World):
    """Workers verify each file for 400 ms at its LOAD."""

    def reply(self, action: Load | Unload | Infer, status: Status, start_ns: int, end_ns: int) -> None:
        super().reply(action, status, start_ns, end_ns)
        if isinstance(action, Load):
            at_ns, action_id, result = self._inbox.pop()
            assert isinstance(result, Result)
            result = msgspec.structs.replace(result, ended_ns=end_ns + ms(400), once_ns=ms(400))
            self._inbox.append((at_ns + ms(400), action_id, result))


@pytest.mark.parametrize("made", [World, Verifying])
def test_what_verifying_a_file_took_is_not_learnt_as_a_load_s_duration(made: type[World]) -> None:
    world = made()
    world.serve(model("a"), model("b"))
    world.join(device())
    for name in ("a", "b"):
        world.ask(name, slo_ms=5000)
    first, second = [action for action in world.actions if isinstance(action, Load)]
    assert second.expected_ns == first.expected_ns


def test_a_waiting_request_is_refused_at_the_instant_its_device_is_given_to_another() -> None:
    world = warm("a", "b", "c")
    began_ns = world.now_ns
    world.request("a", slo_ms=500)
    loser = world.request("b", slo_ms=232)
    winner = world.request("c", slo_ms=225)
    world.run()
    assert world.answers[winner].outcome is Outcome.OK
    assert world.answers[loser].reason is Reason.WOULD_MISS_DEADLINE
    assert world.answered_ns[loser] - began_ns < ms(96), "not at 131 ms, when it would be plain to anyone"


def test_a_refusal_says_how_long_it_takes_and_by_how_much_it_would_miss() -> None:
    world = warm("a", "b")
    world.request("b", slo_ms=500)
    late, never = world.request("a", slo_ms=152), world.request("a", slo_ms=99)
    assert world.answers[late].message == (
        "the deadline would be missed by 50.2 ms: d0 is busy for 100.2 ms, it takes 100.0 ms, "
        "and 2.0 ms are kept for the way and delays, of an SLO of 152.0 ms"
    )
    assert world.answers[late].retry_after_ns == ms(50.2)
    assert world.answers[never].message == (
        "the deadline cannot be met: it takes 100.0 ms, "
        "and 2.0 ms are kept for the way and delays, of an SLO of 99.0 ms"
    )


def added_up(message: str) -> float:
    """What a refusal's parts make, less the SLO and what is missing of it: 0 if it says all of them."""
    missed, *parts, slo = (float(number) for number in re.findall(r"([0-9.]+) ms", message))
    return sum(parts) - slo - missed


def test_a_device_that_is_idle_is_not_called_busy_and_the_parts_of_a_refusal_add_up() -> None:
    world = warm("a", "b", "c")
    idle = world.answers[world.request("a", slo_ms=102.1)].message
    world.slower = 1.5
    world.ask("a", slo_ms=5000, until_ms=97)
    world.ask("b", slo_ms=250, until_ms=1)
    waited = world.answers[world.ask("c", slo_ms=235)].message
    assert "busy" not in idle
    assert "d0 is 0.2 ms away, " in idle
    assert " ms are over, " in waited
    assert added_up(idle) == pytest.approx(0, abs=0.2)
    assert added_up(waited) == pytest.approx(0, abs=0.2)


def test_a_request_for_weights_that_arrive_too_late_is_refused_at_once() -> None:
    world = serving("a", times=profile(b1_ms=10, load_ms=50))
    world.request("a", slo_ms=500)
    hopeless = world.request("a", slo_ms=55)
    assert world.answers[hopeless].reason is Reason.WOULD_MISS_DEADLINE


def test_while_an_action_runs_late_what_waits_behind_two_is_given_up_in_time() -> None:
    world = warm("a", "b", "c")
    began_ns = world.now_ns
    world.slower = 1.5
    world.ask("a", slo_ms=5000, until_ms=97)
    world.ask("b", slo_ms=250, until_ms=1)
    waiting = world.ask("c", slo_ms=235)
    sent = [action.model for action in world.actions if isinstance(action, Infer)]
    assert sent == ["a/1", "b/1"]
    gave_up_ms = (world.answered_ns[waiting] - began_ns) / 1e6
    assert world.answers[waiting].reason is Reason.WOULD_MISS_DEADLINE
    assert 130 < gave_up_ms < 136, "98 + 235 - 1 - 100 (b) - 100 (c) = 132 ms is the last hope"


def test_a_result_that_comes_after_the_deadline_is_late_even_if_nobody_looked_in_between() -> None:
    world = warm("a")
    request_id = world.request("a", slo_ms=150)
    (infer,) = world.actions
    world._inbox.clear()
    world.now_ns += ms(151)
    world.tell(
        Result(
            action_id=infer.action_id, device="d0", status=Status.OK, started_ns=world.now_ns - ms(150),
            ended_ns=world.now_ns - ms(50), outputs=(b"",),
        )
    )  # fmt: skip
    assert (world.answers[request_id].outcome, world.answers[request_id].reason) == (
        Outcome.EXPIRED,
        Reason.LATE,
    )
    assert world.answers[request_id].release


def test_ready_means_that_all_expected_devices_are_warm_and_stays_while_one_is() -> None:
    world = World(ControllerConfig(expected_devices=2))
    world.serve(model("a"))
    told: list[bool] = []
    perform = world._perform

    def listen(effects) -> None:  # type: ignore[no-untyped-def]
        told.extend(effect.ready for effect in effects if isinstance(effect, Readiness))
        perform(effects)

    world._perform = listen  # type: ignore[method-assign]
    world.join(device("d0"), worker="w0")
    assert told == []
    world.join(device("d1"), worker="w1")
    assert told == [True]
    world.kill("w0", "d0")
    assert told == [True]
    world.kill("w1", "d1")
    assert told == [True, False]


def test_a_device_that_still_prepares_the_code_is_waited_for() -> None:
    world = World()
    world.serve(model("a"))
    world.tell(WorkerJoined(worker="w0", devices=(device(),)))
    waiting = world.request("a", slo_ms=200)
    assert waiting not in world.answers
    world.join(device())
    world.run()
    assert world.answers[waiting].outcome is Outcome.OK


def test_what_waits_is_run_as_soon_as_its_code_is_ready() -> None:
    world = World()
    world.serve(model("a"))
    world.lanes = {("d0", "exec"): Lane(), ("d0", "load"): Lane()}
    world.tell(WorkerJoined(worker="w0", devices=(device(),)))
    waiting = world.request("a", slo_ms=200)
    world.tell(CodeReady(device="d0", code_id="c"))
    world.run()
    assert world.answers[waiting].outcome is Outcome.OK


def test_a_request_in_flight_on_two_lost_workers_fails_and_says_so() -> None:
    world = warm("a")
    request_id = world.request("a", slo_ms=60_000)
    world.join(device("d1"), worker="w1")
    world.kill("w0", "d0")
    world.run(until_ms=20)
    assert world.actions[-1].device == "d1"
    world.join(device("d0"), worker="w0")
    world.kill("w1", "d1")
    assert world.answers[request_id].reason is Reason.WORKER_LOST
    assert world.answers[request_id].cold is False


def batches(world: World) -> set[int]:
    for _ in range(16):
        world.request("a", slo_ms=60_000)
    world.run()
    return {action.batch for action in world.actions if isinstance(action, Infer)}


def test_a_batch_size_that_saves_no_time_is_not_used() -> None:
    world = serving("a", times=profile(b1_ms=10, step_ms=9.8))
    assert batches(world) == {1}


def test_a_batch_size_that_does_not_fit_the_io_area_is_not_used() -> None:
    world = World()
    io_bytes = {1: 100, 2: 200, 4: 400, 8: 800}
    world.serve(model("a"), times=msgspec.structs.replace(profile(), io_bytes=io_bytes))
    world.join(msgspec.structs.replace(device(), io_bytes=500))
    assert max(batches(world)) == 4


def test_a_batch_that_takes_too_long_is_not_used() -> None:
    world = serving("a", max_exec_ns=ms(25))
    assert max(batches(world)) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("estimate_quantile", 0), ("estimate_quantile", 1.5), ("slack_ns", -1),
        *[(name, 0) for name in (
            "look_ahead_ns", "max_batch", "max_exec_ns", "lag_ns", "estimate_window", "capacity_ns",
            "expected_devices",
        )],
        ("network_ns", -1), ("retries", -1), ("retries", 101), ("slack_ns", 10**9 + 1),
    ],
)  # fmt: skip
def test_a_bad_setting_names_itself(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: expected .*found"):
        ControllerConfig(**{field: value})  # type: ignore[arg-type]


def test_the_same_request_twice_is_a_bug() -> None:
    world = warm("a")
    now_ns = world.now_ns
    request = Request(
        request_id="x", gateway="g", model="a/1", arrival_ns=now_ns, deadline_ns=now_ns + ms(900)
    )
    world.controller.observe(request, world.now_ns)
    world.controller.observe(request, world.now_ns)
    with pytest.raises(AssertionError, match="x came twice"):
        world.controller.decide(world.now_ns)


def many(count: int) -> World:
    """``count`` devices whose load lanes were each given 50 ms of work, 5 ms after the one before."""
    world = World()
    world.serve(*[model(f"m{at}") for at in range(12)], times=profile(b1_ms=10, load_ms=50))
    for at in range(count):
        world.join(device(f"d{at}"), worker=f"w{at}")
    for at in range(count):
        world.ask(f"m{at}", slo_ms=500, until_ms=5)
    assert [action.device for action in world.actions] == [f"d{at}" for at in range(count)]
    return world


def test_of_many_devices_the_one_whose_load_lane_is_free_soonest_is_hoped_for() -> None:
    world = many(8)
    in_time = world.request("m8", slo_ms=78)
    hopeless = world.request("m9", slo_ms=65)
    world.run()
    assert world.answers[in_time].outcome is Outcome.OK, "d0: 10 ms to go, LOAD 50, INFER 10"
    assert world.answers[hopeless].reason is Reason.WOULD_MISS_DEADLINE


def test_nothing_is_hoped_for_from_a_device_that_is_gone() -> None:
    world = many(8)
    waiting = world.request("m8", slo_ms=95)
    for at in range(7):
        world.kill(f"w{at}", f"d{at}")
    assert world.answers[waiting].reason is Reason.WOULD_MISS_DEADLINE, "d7 alone: 45 ms to go, LOAD 50"
    later = world.ask("m9", slo_ms=500)
    assert world.answers[later].outcome is Outcome.OK


@pytest.mark.parametrize(
    ("batch", "reason"), [(8, Reason.WOULD_MISS_DEADLINE), (1, Reason.NONE)], ids=["least 8", "least 1"]
)
def test_no_hope_rests_on_a_batch_smaller_than_the_policy_will_run(batch: int, reason: Reason) -> None:
    world = warm("a", "b", b1_ms=10)
    belief = world.controller._belief
    queue = belief.models["a/1"].main
    assert queue is not None
    belief.require(queue, batch)
    world.request("b", slo_ms=100)
    waiting = world.request("a", slo_ms=30)
    world.run()
    assert world.answers[waiting].reason is reason, "10 ms to go; batch 1 takes 10 ms, batch 8 38 ms"


def test_an_estimate_may_be_the_largest_of_all() -> None:
    assert ControllerConfig(estimate_quantile=1.0).estimate_quantile == 1
