"""A model that takes workers down is served to nobody, until it is pardoned or changed; all others are."""

from __future__ import annotations

import msgspec
import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    AdmissionQuery,
    AdmissionReply,
    Code,
    CodeReady,
    CodeRemoved,
    Drain,
    Infer,
    Load,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Quarantined,
    Reason,
    ReleaseFromQuarantine,
    WorkerCrashed,
    WorkerLost,
)
from clockwork_serve.units import ms
from tests.controller.honest import CODE, World, device, model, profile

OTHER: Code = msgspec.structs.replace(CODE, code_id="other")


def world_of(*names: str, **settings: object) -> World:
    """One device that may die."""
    world = World(msgspec.convert({"policy": "default", **settings}, ControllerConfig))
    world.serve(*[model(name) for name in names])
    world.join(device())
    return world


def die_running(world: World, name: str, slo_ms: float = 25) -> str:
    """A request is asked, runs, and its worker dies of it; a new one joins. The request's id."""
    request_id = world.request(name, slo_ms=slo_ms)
    die(world)
    return request_id


def die(world: World, *, crashes_early: bool | None = None) -> None:
    """Whichever worker runs an INFER next dies of it; a new one joins. That it crashed may be told, too."""
    for _ in range(200):
        world.run(until_ms=0.5)
        for start_ns, end_ns, action in world.started:
            if isinstance(action, Infer) and start_ns <= world.now_ns < end_ns:
                worker = f"w{action.device[1:]}"
                if crashes_early:
                    world.tell(WorkerCrashed(worker=worker))
                world.kill(worker, action.device, known=True)
                if crashes_early is False:
                    world.tell(WorkerCrashed(worker=worker))
                world.join(device(action.device), worker=worker)
                return
    pytest.fail("nothing runs")


def quarantined(*names: str, **settings: object) -> World:
    """A world whose model ``bad`` took three workers down."""
    world = world_of("bad", *names, **settings)
    for _ in range(3):
        die_running(world, "bad")
        world.run(until_ms=100)
    return world


def test_the_third_worker_in_a_row_brings_its_model_into_quarantine() -> None:
    world = quarantined("good")
    (told,) = world.quarantined
    assert (told.model, told.code_id) == ("bad/1", "")
    assert told.why == (
        "in quarantine: it took a device down 3 times within 1 s, the last time running a request; "
        "to release it: clockwork models load bad"
    )


def test_its_requests_fail_at_once_with_the_reason_and_others_are_answered() -> None:
    world = quarantined("good")
    bad, good = world.request("bad", slo_ms=500), world.request("good", slo_ms=500)
    assert (world.answers[bad].outcome, world.answers[bad].reason) == (Outcome.FAILED, Reason.QUARANTINED)
    assert "bad/1 is in quarantine since 0 s ago: it took a device down 3 times" in world.answers[bad].message
    world.run()
    assert world.answers[good].outcome is Outcome.OK


def test_who_waits_for_it_is_answered() -> None:
    world = world_of("bad", reject_infeasible=False, quarantine_after=1)
    ids = [world.request("bad", slo_ms=5000) for _ in range(40)]
    die(world)
    assert {world.answers[one].reason for one in ids} == {Reason.QUARANTINED}
    assert {world.answers[one].outcome for one in ids} == {Outcome.FAILED}


def test_a_success_in_between_tells_that_it_was_not_the_model() -> None:
    world = world_of("a")
    for _ in range(5):
        die_running(world, "a")
        again = world.ask("a", slo_ms=500, until_ms=500)
        assert world.answers[again].outcome is Outcome.OK
    assert not world.quarantined


def test_one_request_that_kills_twice_alone_is_not_forgotten_for_others_that_go_well() -> None:
    world = world_of("a")
    world.join(device("d1"), worker="w1")
    poison = die_running(world, "a", slo_ms=5000)
    die(world)
    assert world.answers[poison].reason is Reason.WORKER_LOST, "it is sent to no third one"
    fine = world.ask("a", slo_ms=500, until_ms=500)
    assert (world.answers[fine].outcome, world.quarantined) == (Outcome.OK, [])
    die_running(world, "a", slo_ms=5000)
    assert [one.model for one in world.quarantined] == ["a/1"]


@pytest.mark.parametrize("early", [False, True])
def test_a_crash_of_what_ran_alone_is_not_forgotten_for_requests_that_go_well(early: bool) -> None:
    world = world_of("a")
    for _ in range(3):
        world.request("a", slo_ms=25)
        die(world, crashes_early=early)
        world.ask("a", slo_ms=500, until_ms=500)
    assert [one.model for one in world.quarantined] == ["a/1"]


def test_what_waited_behind_it_costs_no_attempt() -> None:
    world = world_of("bad", "good", retries=0, reject_infeasible=False)
    for name in ("bad", "good"):
        world.ask(name, slo_ms=500, until_ms=500)
    bad, good = world.request("bad", slo_ms=500), world.request("good", slo_ms=500)
    sent: set[str] = set()
    while good not in sent:
        world.run(until_ms=0.1)
        sent = {call.request_id for one in world.actions if isinstance(one, Infer) for call in one.calls}
    assert bad not in world.answers
    world.kill("w0", "d0", known=True)
    world.join(device())
    world.run(until_ms=500)
    assert (world.answers[bad].reason, world.answers[good].outcome) == (Reason.WORKER_LOST, Outcome.OK)


def test_what_is_not_known_to_have_run_is_blamed_for_nothing() -> None:
    world = world_of("a")
    for _ in range(5):
        world.ask("a", slo_ms=25, until_ms=12)
        world.kill("w0", "d0")
        world.join(device())
        world.run(until_ms=100)
    assert not world.quarantined


def test_a_load_that_kills_is_named_as_such() -> None:
    world = world_of("a", quarantine_after=1)
    world.ask("a", slo_ms=500, until_ms=1)
    world.kill("w0", "d0", known=True)
    assert "once within 0 s, the last time loading its weights" in world.quarantined[0].why


def test_0_quarantines_nobody() -> None:
    assert not quarantined("good", quarantine_after=0).quarantined


def test_a_pardon_lets_it_be_served_and_forgets_what_it_did() -> None:
    world = quarantined("good")
    world.tell(ReleaseFromQuarantine(model="bad"))
    assert world.quarantined[-1] == Quarantined(model="bad/1")
    request_id = world.ask("bad", slo_ms=500, until_ms=500)
    assert world.answers[request_id].outcome is Outcome.OK
    for _ in range(2):
        die_running(world, "bad")
        world.run(until_ms=100)
    assert len(world.quarantined) == 2


def test_a_new_version_is_served_and_so_is_one_that_changed() -> None:
    world = quarantined()
    world.tell(ModelAdded(model=msgspec.structs.replace(model("bad"), key="bad/2", version="2")))
    assert len(world.quarantined) == 1
    world.tell(ModelAdded(model=model("bad", mib=5)))
    assert world.quarantined[1:] == [Quarantined(model="bad/1")]
    request_id = world.ask("bad", slo_ms=500, until_ms=500)
    assert world.answers[request_id].outcome is Outcome.OK


def test_a_model_that_left_service_leaves_quarantine_too() -> None:
    world = quarantined()
    world.tell(ModelRemoved(model="bad/1"))
    assert world.quarantined[-1] == Quarantined(model="bad/1")
    world.tell(ReleaseFromQuarantine(model="bad"), ReleaseFromQuarantine(model="nobody"))
    assert len(world.quarantined) == 2


def reply(world: World) -> AdmissionReply:
    """What is told of a request for ``bad`` of which only the head has arrived."""
    announced = AdmissionQuery(
        announced_id="x",
        gateway="g0",
        model="bad/1",
        arrival_ns=world.now_ns,
        deadline_ns=world.now_ns + ms(9),
    )
    world.controller.observe(announced, world.now_ns)
    (told,) = world.controller.decide(world.now_ns)
    assert isinstance(told, AdmissionReply)
    return told


def test_of_a_body_on_its_way_nothing_is_foretold_so_that_its_request_hears_the_reason() -> None:
    assert reply(quarantined()).reason is Reason.NONE


def test_a_server_that_drains_says_so_of_a_body_on_its_way_whatever_its_model_did() -> None:
    world = quarantined()
    world.tell(Drain())
    assert reply(world).reason is Reason.DRAINING


def dying_to_prepare(after: int = 3) -> World:
    """A world in which a code that two models have took so many workers down."""
    world = world_of("fine")
    world.serve(model("a", code_id="other"), model("b", code_id="other"), code=OTHER, times=profile("other"))
    del world.durations["other"]  # no worker says that it is ready
    for _ in range(after):
        world.kill("w0", "d0", known=True, preparing=("other",))
        world.join(device())
    return world


def test_a_code_that_kills_who_prepares_it_is_withheld_with_all_its_models() -> None:
    assert not dying_to_prepare(2).quarantined
    world = dying_to_prepare()
    assert [(one.model, one.code_id) for one in world.quarantined] == [("a/1", "other"), ("b/1", "other")]
    assert "the last time preparing its code" in world.quarantined[0].why
    (state,) = world.controller.snapshot()["devices"]
    assert (state["warm"], state["pending_codes"], list(state["failed_codes"])) == (True, 0, ["other"])
    ids = [world.request(name, slo_ms=500) for name in ("a", "fine")]
    world.run(until_ms=500)
    assert [world.answers[one].reason for one in ids] == [Reason.QUARANTINED, Reason.NONE]


def test_a_model_that_comes_later_with_such_a_code_is_in_quarantine_too() -> None:
    world = dying_to_prepare()
    world.tell(ModelAdded(model=model("c", code_id="other")))
    assert [one.model for one in world.quarantined] == ["a/1", "b/1", "c/1"]


def test_a_pardon_of_one_has_the_code_prepared_again_for_all() -> None:
    world = dying_to_prepare()
    world.tell(CodeReady(device="d0", code_id="other"))
    world.tell(ReleaseFromQuarantine(model="a"))
    assert {one.model for one in world.quarantined[2:] if not one.why} == {"a/1", "b/1"}
    (state,) = world.controller.snapshot()["devices"]
    assert (state["pending_codes"], state["failed_codes"]) == (1, {})
    world.durations["other"] = profile("other")
    world.tell(CodeReady(device="d0", code_id="other"))
    request_id = world.ask("b", slo_ms=500, until_ms=500)
    assert world.answers[request_id].outcome is Outcome.OK


def test_a_code_that_was_prepared_in_between_is_not_to_blame() -> None:
    world = dying_to_prepare(2)
    world.tell(CodeReady(device="d0", code_id="other"))
    world.kill("w0", "d0", known=True, preparing=("other",))
    assert not world.quarantined


def test_a_code_that_is_gone_is_forgotten() -> None:
    world = dying_to_prepare()
    world.tell(ModelRemoved(model="a/1"), ModelRemoved(model="b/1"), CodeRemoved(code_id="other"))
    world.tell(WorkerLost(worker="w0", running=(), preparing=("other",)))
    world.serve(model("a", code_id="other"), code=OTHER, times=profile("other"))
    assert world.controller.snapshot()["quarantined"] == {}


def test_what_runs_on_another_worker_is_blamed_for_nothing() -> None:
    world = world_of("bad", quarantine_after=1)
    world.join(device("d1"), worker="w1")
    world.request("bad", slo_ms=500)
    infers: list[int] = []
    while not infers:
        world.run(until_ms=0.5)
        infers = [one.action.action_id for one in world.controller._belief.sent.values() if one.waiters]
    here = world.actions[-1].device
    mine, others = ("w0", "w1") if here == "d0" else ("w1", "w0")
    world.tell(WorkerLost(worker=others, running=tuple(infers)))
    assert not world.quarantined
    world.tell(WorkerLost(worker=mine, running=tuple(infers)))
    assert [one.model for one in world.quarantined] == ["bad/1"]


def test_a_pardon_of_another_changes_nothing() -> None:
    world = dying_to_prepare()
    world.tell(ReleaseFromQuarantine(model="fine"))
    assert len(world.quarantined) == 2


def test_its_weights_leave_other_devices_and_come_back_after_a_pardon() -> None:
    world = world_of("bad", quarantine_after=1)
    world.join(device("d1"), worker="w1")
    for _ in range(40):
        world.request("bad", slo_ms=60)
    world.run(until_ms=500)
    assert {one.device for one in world.actions if isinstance(one, Load)} == {"d0", "d1"}
    die_running(world, "bad")
    world.actions.clear()
    world.run(until_ms=100)
    assert not world.controller._belief.models["bad/1"].residencies
    world.tell(ReleaseFromQuarantine(model="bad"))
    request_id = world.ask("bad", slo_ms=500, until_ms=500)
    assert world.answers[request_id].outcome is Outcome.OK
    assert [type(one) for one in world.actions] == [Load, Infer]


def test_what_is_refused_or_lost_when_its_model_is_in_quarantine_is_not_tried_again() -> None:
    world = world_of("bad", quarantine_after=1)
    world.join(device("d1"), worker="w1")
    for _ in range(40):
        world.request("bad", slo_ms=60)
    world.run(until_ms=500)
    ids = [world.request("bad", slo_ms=60) for _ in range(16)]
    die(world)
    assert world.quarantined
    die(world)
    assert {world.answers[one].reason for one in ids} == {Reason.QUARANTINED}
    assert len(world.quarantined) == 1


def test_a_loss_of_what_was_sent_before_it_came_into_quarantine_counts_against_nobody_else() -> None:
    world = world_of("bad", "good", quarantine_after=1)
    world.join(device("d1"), worker="w1")
    for _ in range(20):
        world.request("bad", slo_ms=200)
        world.request("good", slo_ms=200)
    world.run(until_ms=10)
    assert [(type(one), one.device, one.model) for one in world.actions[2:]] == [
        (Load, "d0", "good/1"), (Load, "d1", "bad/1"), (Infer, "d0", "bad/1"), (Infer, "d1", "good/1"),
    ]  # fmt: skip
    world.kill("w0", "d0", known=True)
    world.kill("w1", "d1", known=True)
    assert [one.model for one in world.quarantined] == ["bad/1"]


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_what_still_runs_of_a_model_in_quarantine_is_answered_when_its_worker_dies(
    removed: bool, known: bool
) -> None:
    world = world_of("bad", quarantine_after=1)
    world.join(device("d1"), worker="w1")
    ids = [world.request("bad", slo_ms=200) for _ in range(40)]
    running: set[str] = set()
    while running != {"d0", "d1"}:
        world.run(until_ms=0.5)
        running = {
            one.device for _, end_ns, one in world.started if isinstance(one, Infer) and end_ns > world.now_ns
        }
    world.kill("w0", "d0", known=True)
    if removed:
        world.tell(ModelRemoved(model="bad/1"))
    world.kill("w1", "d1", known=known)

    reasons = {world.answers[one].reason for one in ids if world.answers[one].outcome is not Outcome.OK}
    assert Reason.QUARANTINED in reasons
    assert reasons <= {Reason.QUARANTINED, Reason.WORKER_LOST, Reason.NOT_SERVING}
    if removed:
        world.join(device("d2"), worker="w2")
        world.serve(model("bad"))
        again = world.ask("bad", slo_ms=200, until_ms=200)
        assert world.answers[again].outcome is Outcome.OK, "it starts anew"
