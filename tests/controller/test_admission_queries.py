"""Requests whose heads alone have come: who is told that it need not send the rest."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Drain, Outcome, Reason
from clockwork_serve.units import ms
from tests.controller.honest import World, device, model, profile, serving


def world(**settings: object) -> World:
    """Model a is warm on one device, where a request of 10 ms has just begun."""
    made = World(ControllerConfig(policy="default", **settings))  # type: ignore[arg-type]
    made.serve(model("a", queue_limit=3), model("cold"), times=profile(b1_ms=10, step_ms=1, load_ms=8))
    made.join(device())
    made.ask("a", slo_ms=500, until_ms=100)
    made.request("a", slo_ms=500)
    return made


def announce(made: World, slo_ms: float, name: str = "a", way_ms: float = 0) -> AdmissionReply | None:
    """What is told of a request whose head comes now."""
    made.controller.observe(
        AdmissionQuery(
            announced_id="x", gateway="g0", model=f"{name}/1", arrival_ns=made.now_ns,
            deadline_ns=made.now_ns + ms(slo_ms), way_ns=ms(way_ms),
        ),
        made.now_ns,
    )  # fmt: skip
    effects = made.controller.decide(made.now_ns)
    made.controller.check()
    (told,) = effects
    assert isinstance(told, AdmissionReply)
    assert (told.announced_id, told.gateway) == ("x", "g0")
    return told if told.reason else None


def test_who_cannot_be_in_time_is_told_so_and_when_to_come_again() -> None:
    told = announce(world(), slo_ms=15)
    assert told is not None
    assert told.reason is Reason.WOULD_MISS_DEADLINE
    assert ms(5) < told.retry_after_ns < ms(6), "20 ms and the way, not 15"
    assert "would be missed by 5." in told.message


def test_who_could_never_be_in_time_gets_no_advice() -> None:
    told = announce(world(), slo_ms=9)
    assert told is not None
    assert (told.retry_after_ns, told.reason) == (0, Reason.WOULD_MISS_DEADLINE)


def test_what_the_way_takes_is_not_there_to_run_in() -> None:
    assert announce(world(), slo_ms=25, way_ms=9) is not None
    assert announce(world(), slo_ms=25, way_ms=1) is None


def test_who_may_be_in_time_is_told_nothing() -> None:
    assert announce(world(), slo_ms=25) is None


def test_those_who_wait_for_the_same_model_and_are_due_before_go_first() -> None:
    made = serving("a", times=profile(b1_ms=10, step_ms=1), policy="default")
    made.ask("a", slo_ms=500, until_ms=100)
    for _ in range(33):
        made.request("a", slo_ms=100)
    assert announce(made, slo_ms=95) is None, "they are due later"
    told = announce(made, slo_ms=101)
    assert told is None, "four batches of eight, 17 ms each, and 10 ms and 10 ms"
    for _ in range(8):
        made.request("a", slo_ms=100)
    told = announce(made, slo_ms=101)
    assert told is not None
    assert "would be missed by" in told.message
    assert 0 < told.retry_after_ns < ms(10)


def test_those_of_a_less_urgent_class_do_not_go_first() -> None:
    made = serving("a", "b", times=profile(b1_ms=10, step_ms=1), policy="default")
    for name in ("a", "b"):
        made.request(name, slo_ms=500)
    made.run(until_ms=100)
    for _ in range(40):
        made.request("b", slo_ms=100, priority=9)
    assert announce(made, slo_ms=101, name="a") is None
    for _ in range(40):
        made.request("b", slo_ms=100)
    assert announce(made, slo_ms=101, name="a") is not None


def test_what_was_announced_waits_nowhere() -> None:
    made = world()
    announce(made, slo_ms=25)
    assert made.controller.snapshot()["in_flight"] == 1
    made.run(until_ms=100)
    assert [answer.outcome for answer in made.answers.values()] == [Outcome.OK] * 2


def test_a_full_queue_and_a_server_that_drains_are_told_too() -> None:
    made = world()
    for _ in range(3):
        made.request("a", slo_ms=500)
    told = announce(made, slo_ms=400)
    assert told is not None
    assert told.reason is Reason.QUEUE_FULL
    made.tell(Drain())
    told = announce(made, slo_ms=400)
    assert told is not None
    assert told.reason is Reason.DRAINING


def test_nothing_is_told_of_models_that_nobody_asked_for_yet_or_that_are_not_there() -> None:
    made = world()
    assert announce(made, slo_ms=1, name="cold") is None
    assert announce(made, slo_ms=1, name="none") is None


def test_nothing_is_told_where_hopeless_requests_are_not_rejected() -> None:
    assert announce(world(reject_infeasible=False), slo_ms=15) is None


def test_weights_that_are_not_there_add_their_load() -> None:
    made = serving(
        model("a", mib=9), model("b", mib=9), pages=10, times=profile(b1_ms=10, load_ms=8), policy="default"
    )
    for name in ("a", "b"):
        made.ask(name, slo_ms=500, until_ms=100)
    assert announce(made, slo_ms=22) is None
    assert announce(made, slo_ms=9) is not None
    made.request("a", slo_ms=500)
    told = announce(made, slo_ms=17)
    assert told is not None
    assert ms(1) < told.retry_after_ns < ms(2), "8 to load and 10 to run are more than 17"


def test_who_has_no_time_for_a_load_that_later_ones_need_is_let_in_so_that_it_is_sent() -> None:
    made = serving(
        model("a", mib=9), model("b", mib=9), pages=10, times=profile(b1_ms=10, load_ms=8), policy="default"
    )
    for name in ("a", "b"):
        made.ask(name, slo_ms=500, until_ms=100)
    assert announce(made, slo_ms=17) is None
    first, second = made.ask("a", slo_ms=17, until_ms=20), made.ask("a", slo_ms=17, until_ms=20)
    assert made.answers[first].reason is Reason.WOULD_MISS_DEADLINE
    assert made.answers[second].outcome is Outcome.OK


def test_nobody_is_let_in_for_a_load_on_a_device_that_is_too_small_for_the_weights() -> None:
    for pages, let_in in ((9, True), (8, False)):
        made = serving(model("a", mib=9), times=profile(b1_ms=10, load_ms=42), policy="default")
        made.join(device("d1", pages), worker="w1")
        made.slow["d0"] = 10
        for _ in range(20):
            made.ask("a", slo_ms=500, until_ms=200)
        assert (announce(made, slo_ms=45) is None) == let_in


def test_an_outlier_of_long_ago_refuses_no_queries_for_ever() -> None:
    made = serving("a", times=profile(b1_ms=10, step_ms=1), policy="default")
    made.ask("a", slo_ms=500, until_ms=100)
    made.slower = 9.0
    for _ in range(9):
        made.ask("a", slo_ms=500, until_ms=100)
    made.slower = 1.0
    assert announce(made, slo_ms=25) is not None
    made.run(until_ms=3000)
    announce(made, slo_ms=25)
    assert announce(made, slo_ms=25) is None


def test_load_lanes_are_known_as_they_are_not_as_they_were() -> None:
    made = World(ControllerConfig(policy="default"))
    made.serve(*[model(name, mib=1) for name in "abcdefg"], times=profile(b1_ms=1, load_ms=8))
    for at in range(6):
        made.join(device(f"d{at}"), worker=f"w{at}")
    made.ask("a", slo_ms=500, until_ms=100)
    made.kill("w0", "d0")
    for name in "bcdef":
        made.request(name, slo_ms=500)
    told = announce(made, slo_ms=12, name="a")
    assert told is not None, "all load lanes are busy for 8 ms"
    made.run(until_ms=8.3)
    assert announce(made, slo_ms=12, name="a") is None, "they are free again"


def test_delays_of_long_ago_refuse_no_queries_for_ever() -> None:
    made = serving("a", times=profile(b1_ms=10), policy="default")
    made.ask("a", slo_ms=500, until_ms=100)
    made.network_ns = ms(3)
    for _ in range(20):
        made.ask("a", slo_ms=500, until_ms=100)
    assert announce(made, slo_ms=11.5) is not None
    made.run(until_ms=1100)
    assert announce(made, slo_ms=11.5) is None
