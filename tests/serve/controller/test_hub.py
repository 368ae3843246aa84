"""The controller process's links to all others."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from clockwork_serve.messages import (
    Answer,
    ArtefactDamaged,
    Ask,
    Beat,
    Cancel,
    CodeReady,
    CodeRemade,
    CodeRemoved,
    ControllerBusy,
    CreditBlocked,
    DamageCounted,
    DeviceNumbers,
    Drain,
    Extent,
    Frame,
    GatewayLost,
    Infer,
    Load,
    ModelRemoved,
    ModelsAskedFor,
    Outcome,
    Preparing,
    ProcessesEnded,
    Question,
    Readiness,
    Reason,
    Release,
    ReleaseFromQuarantine,
    Reply,
    Request,
    RequestCredit,
    Result,
    Role,
    SoonestEnd,
    SoonestEnds,
    StandbysCounted,
    Status,
    Weights,
    Window,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.serve import flow_control
from clockwork_serve.serve.controller.hub import Questions
from clockwork_serve.telemetry import decode, render
from clockwork_serve.units import ms
from tests.serve.controller.exchanges import World, code, joined, model
from tests.serve.links import until

# The controller's links: catalogue, routing, questions, and processes that connect, die and misbehave.


def request(request_id: str = "r1", gateway: str = "g") -> Request:
    return Request(request_id=request_id, gateway=gateway, model="m/1", arrival_ns=1, deadline_ns=2)


def answer(gateway: str, request_id: str = "r1") -> Answer:
    return Answer(request_id=request_id, gateway=gateway, outcome=Outcome.OK)


def load(device: str) -> Load:
    return Load(
        action_id=7, device=device, model="m/1", code_id="c1", extent=Extent(0, 1), version=1,
        weights=Weights(weights_id="w", path="/w", size=1),
        window=Window(0, 1), expected_ns=1,
    )  # fmt: skip


def infer(device: str) -> Infer:
    return Infer(
        action_id=8, device=device, model="m/1", code_id="c1", extent=Extent(0, 1), version=1, batch=1,
        calls=(), window=Window(0, 1), expected_ns=1,
    )  # fmt: skip


def result(device: str) -> Result:
    return Result(action_id=7, device=device, status=Status.OK, started_ns=1, ended_ns=2)


async def test_new_processes_are_sent_the_catalogue(world: World) -> None:
    await world.supervisor(code(), model("m/1"), model("m/2"), ModelRemoved(model="m/2"))
    gateway = await world.peer(Role.GATEWAY, "g")
    worker = await world.worker("w", "d")
    await until(lambda: gateway.of(RequestCredit) and len(worker.frames) == 2)
    told = [code(), model("m/1"), Readiness(ready=False, why="starting")]
    assert [frame for frame in gateway.frames if not isinstance(frame, RequestCredit)] == told
    assert worker.frames == [code(), model("m/1")]
    assert world.brain.seen == [
        code(), model("m/1"), model("m/2"), ModelRemoved(model="m/2"), joined("w", "d"),
    ]  # fmt: skip


async def test_changes_are_sent_to_all_connected_processes(world: World) -> None:
    supervisor = await world.supervisor()
    gateway = await world.peer(Role.GATEWAY, "g")
    worker = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    changes: list[Frame] = [code(), model(), ModelRemoved(model="m/1"), CodeRemoved(code_id="c1")]
    supervisor.send(*changes)
    await until(lambda: len(worker.frames) == 3 and len(gateway.frames) == 6)
    assert gateway.frames[2:] == changes
    assert worker.frames == [code(), model(), CodeRemoved(code_id="c1")]
    assert [*world.brain.seen] == [joined("w", "d"), *changes]


async def test_a_controller_without_time_is_told_so_while_gateways_hold_requests_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_control, "BusyClock", lambda: time.monotonic_ns)  # it never idles
    gateway = await world.peer(Role.GATEWAY, "g")

    def told() -> bool:
        gateway.send(CreditBlocked(), *[request(f"r{at}") for at in range(100)])
        return any(isinstance(event, ControllerBusy) for event in world.brain.seen)

    await until(told)


async def test_what_is_still_to_be_prepared_is_told_to_gateways_and_what_they_are_asked_for_to_the_supervisor(
    world: World,
) -> None:
    first = await world.peer(Role.GATEWAY, "g0")
    two = Preparing(waiting=("a", "b"), total=3)
    supervisor = await world.supervisor(two)
    await until(lambda: first.of(Preparing))
    second = await world.peer(Role.GATEWAY, "g1")
    await until(lambda: second.of(Readiness))
    assert second.frames[:2] == [two, Readiness(ready=False, why="starting")]
    assert world.recorder.counters.models_waiting == 2
    asked = ModelsAskedFor(requests={"b": 4})
    second.send(asked)
    await until(lambda: supervisor.of(ModelsAskedFor))
    assert supervisor.of(ModelsAskedFor) == [asked]
    supervisor.send(Preparing(total=3))
    await until(lambda: len(first.of(Preparing)) == 2)
    assert (first.of(Preparing)[1].waiting, world.recorder.counters.models_waiting) == ((), 0)
    assert world.brain.seen == [], "what is to be prepared is no matter of scheduling"


async def test_workers_wait_until_the_catalogue_is_complete(world: World) -> None:
    worker = await world.worker("w", "d")
    gone = await world.worker("gone", "other")
    supervisor = await world.peer(Role.SUPERVISOR, "keeper")
    supervisor.send(code())
    await until(lambda: world.brain.seen)
    gone.link.close()
    await asyncio.sleep(0.02)
    assert world.brain.seen == [code()]
    assert worker.frames == []
    supervisor.send(model(), Ask(ask_id=1, what=Question.STATE))
    await until(lambda: len(worker.frames) == 2)
    assert world.brain.seen == [code(), model(), joined("w", "d")]
    assert worker.frames == [code(), model()], "told once"


async def test_damage_is_reported_to_the_supervisor_and_a_rebuilt_code_to_all(world: World) -> None:
    supervisor = await world.supervisor(code(), model())
    worker = await world.worker("w", "d")
    await until(lambda: len(worker.frames) == 2)
    found = ArtefactDamaged(what="code", name="c1", message="a bit")
    worker.send(found)
    await until(lambda: supervisor.of(ArtefactDamaged) == [found])
    supervisor.send(CodeRemade(code_id="c1"), CodeRemade(code_id="unknown"))
    supervisor.send(DamageCounted(found={"code": 1}, remade=1))
    await until(lambda: len(worker.frames) == 3 and world.recorder.counters.artefacts_remade)
    assert worker.frames[2] == code(), "to prepare it once more"
    assert world.brain.seen[-1] == CodeRemade(code_id="c1")
    assert world.recorder.counters.damaged_files == {"code": 1}


async def test_a_supervisor_that_repeats_its_catalogue_changes_nothing(world: World) -> None:
    await world.supervisor(code(), model())
    await world.supervisor(code(), model())
    assert world.brain.seen == [code(), model()]
    await world.supervisor(code(), model(priority=5))
    assert world.brain.seen[2:] == [ModelRemoved(model="m/1"), model(priority=5)]


async def test_effects_are_sent_to_the_right_process(world: World) -> None:
    supervisor = await world.supervisor()
    one, two = await world.peer(Role.GATEWAY, "one"), await world.peer(Role.GATEWAY, "two")
    first, second = await world.worker("w1", "d1", "d2"), await world.worker("w2", "d3")
    await until(lambda: len(world.brain.seen) == 2)
    release = Release(request_id="r1", gateway="two")
    world.decide(
        answer("one"), release, answer("gone"), load("d2"), infer("d3"), load("gone"), Readiness(ready=True)
    )
    everyone = [one, two, supervisor]
    await until(lambda: all(Readiness(ready=True) in peer.frames for peer in everyone))
    await until(lambda: first.frames and second.frames)
    assert one.of(Answer) == [answer("one")]
    assert (two.of(Answer), two.of(Release)) == ([], [release])
    assert (first.frames, second.frames) == ([load("d2")], [infer("d3")])
    late = await world.peer(Role.GATEWAY, "late")
    await until(lambda: late.of(Readiness))
    assert late.of(Readiness) == [Readiness(ready=True)]


async def test_gateways_are_sent_the_soonest_ends_while_requests_would_miss_their_deadlines(
    world: World,
) -> None:
    gateways = [await world.peer(Role.GATEWAY, name) for name in ("g0", "g1")]
    soon_ns = time.monotonic_ns() + ms(60_000)
    soonest = SoonestEnd(due_ns=0, end_ns=soon_ns, each_ns=1, other_end_ns=soon_ns)
    world.brain.ends = {"m/1": soonest, "m/2": soonest}
    gateways[0].send(request(gateway="g0"))
    await until(lambda: world.brain.seen)
    missed = Answer(
        request_id="r1", gateway="g0", outcome=Outcome.REJECTED, reason=Reason.WOULD_MISS_DEADLINE
    )
    world.decide(missed)
    await until(lambda: gateways[0].of(Answer))
    while not gateways[1].of(SoonestEnds) or not gateways[1].of(SoonestEnds)[-1].ends:
        gateways[0].send(request(gateway="g0"))
        await asyncio.sleep(0.01)
    for gateway in gateways:
        assert gateway.of(SoonestEnds)[-1].ends == {"m/1": soonest}


async def test_an_action_is_sent_however_late_for_its_worker_heeds_the_window(world: World) -> None:
    await world.supervisor()
    worker = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    world.decide(load("d"), infer("d"))  # whose windows closed long ago
    await until(lambda: len(worker.frames) == 2)
    assert worker.frames == [load("d"), infer("d")]


async def test_frames_of_gateways_and_workers_reach_the_brain(world: World) -> None:
    supervisor = await world.supervisor()
    gateway = await world.peer(Role.GATEWAY, "g")
    worker = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    gateway.send(request(), Cancel(request_id="r1"))
    await until(lambda: len(world.brain.seen) == 3)
    worker.send(result("d"), CodeReady(device="d", code_id="c1"))
    await until(lambda: len(world.brain.seen) == 5)
    supervisor.send(Drain())
    await until(lambda: len(world.brain.seen) == 6)
    assert world.brain.seen[1:] == [
        request(), Cancel(request_id="r1"), result("d"), CodeReady(device="d", code_id="c1"), Drain(),
    ]  # fmt: skip


async def test_the_brain_observes_lost_workers_and_gateways(world: World) -> None:
    await world.supervisor()
    gateway = await world.peer(Role.GATEWAY, "g")
    worker = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    worker.link.close()
    gateway.link.close()
    await until(lambda: len(world.brain.seen) == 3)
    for lost in (WorkerLost(worker="w"), GatewayLost(gateway="g")):
        assert lost in world.brain.seen
    again = await world.worker("w2", "d")
    await until(lambda: len(world.brain.seen) == 4)
    assert world.brain.seen[3] == joined("w2", "d"), "its device is free again"
    world.decide(load("d"))
    await until(lambda: again.frames)


async def test_a_process_that_connects_again_replaces_its_old_link(world: World) -> None:
    await world.supervisor()
    old = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    new = await world.worker("w", "d")
    await until(lambda: len(world.brain.seen) == 3 and old.is_lost)
    assert world.brain.seen == [joined("w", "d"), WorkerLost(worker="w"), joined("w", "d")]
    world.decide(load("d"))
    await until(lambda: new.frames)
    first = await world.peer(Role.GATEWAY, "g")
    second = await world.peer(Role.GATEWAY, "g")
    await until(lambda: first.is_lost)
    world.decide(answer("g"))
    await until(lambda: second.of(Answer))
    assert world.brain.seen[3:] == [GatewayLost(gateway="g")]
    assert first.of(Answer) == []


@pytest.mark.parametrize(
    ("role", "frame"),
    [
        (Role.GATEWAY, result("d")),
        (Role.GATEWAY, request(gateway="another")),
        (Role.GATEWAY, Drain()),
        (Role.WORKER, result("not its own")),
        (Role.WORKER, request(gateway="x")),
        (Role.WORKER, joined("another name", "e")),
        (Role.WORKER, joined("x")),
        (Role.WORKER, joined("x", "d")),
        (Role.SUPERVISOR, request(gateway="x")),
        (Role.SUPERVISOR, model(code_id="never added")),
        (Role.CONTROLLER, Drain()),
    ],
)
async def test_a_process_that_sends_what_it_may_not_is_cut_off(
    world: World, role: Role, frame: Frame
) -> None:
    await world.supervisor()
    worker = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    bad = await world.peer(role, "x")
    bad.send(frame)
    await until(lambda: bad.is_lost)
    await asyncio.sleep(0.01)
    assert [event for event in world.brain.seen[1:] if not isinstance(event, GatewayLost)] == []
    world.decide(load("d"))
    await until(lambda: worker.frames)


async def test_state_and_counters_are_answered_here(world: World) -> None:
    await world.supervisor(code(), model())
    gateway = await world.peer(Role.GATEWAY, "g")
    gateway.send(request(), Ask(ask_id=5, what=Question.STATE))
    await until(lambda: gateway.of(Reply))
    gateway.send(
        Ask(ask_id=6, what=Question.METRICS),
        Ask(ask_id=7, what=Question.STATISTICS, body=b'{"model": "m/1"}'),
        Ask(ask_id=8, what=Question.STATISTICS, body=b"nonsense"),
        Ask(ask_id=9, what="weather"),
    )
    await until(lambda: len(gateway.of(Reply)) == 5)
    state, metrics, statistics, nonsense, unknown = gateway.of(Reply)
    assert [reply.ask_id for reply in gateway.of(Reply)] == [5, 6, 7, 8, 9]
    found = msgspec.json.decode(state.body)
    assert (found["ready"], found["gateways"], found["workers"]) == (False, ["g"], [])
    assert decode(metrics.body).received == 1
    assert msgspec.json.decode(statistics.body)["model_stats"][0]["name"] == "m"
    assert (nonsense.ok, nonsense.code, unknown.ok, unknown.code) == (False, 400, False, 400)
    assert "expected one of" in msgspec.json.decode(unknown.body)["error"]


async def test_an_answer_knows_what_was_sent_before_the_question(world: World) -> None:
    supervisor = await world.supervisor(code(), model())
    before = len(world.brain.seen)
    supervisor.send(ReleaseFromQuarantine(model="m"), Ask(ask_id=2, what=Question.STATE))
    await until(lambda: len(supervisor.of(Reply)) == 2)
    state = msgspec.json.decode(supervisor.of(Reply)[-1].body)
    assert state["controller"]["seen"] == before + 1


async def test_questions_about_the_repository_go_to_the_supervisor_and_back(world: World) -> None:
    supervisor = await world.supervisor()
    one, two = await world.peer(Role.GATEWAY, "one"), await world.peer(Role.GATEWAY, "two")
    one.send(Ask(ask_id=1, what=Question.INDEX))
    two.send(Ask(ask_id=1, what=Question.LOAD, body=b'{"model": "m"}'))
    await until(lambda: len(supervisor.of(Ask)) == 2)
    asked = {ask.what: ask for ask in supervisor.of(Ask)}
    assert asked["load"].body == b'{"model": "m"}'
    supervisor.send(
        Reply(ask_id=asked["load"].ask_id, ok=False, code=400, body=b'{"error": "no"}'),
        Reply(ask_id=asked["index"].ask_id, ok=True, body=b"[]"),
        Reply(ask_id=999, ok=True),
    )
    await until(lambda: one.of(Reply) and two.of(Reply))
    assert one.of(Reply) == [Reply(ask_id=1, ok=True, body=b"[]")]
    assert two.of(Reply) == [Reply(ask_id=1, ok=False, code=400, body=b'{"error": "no"}')]


async def test_questions_to_a_supervisor_that_is_not_connected_are_refused(world: World) -> None:
    gateway = await world.peer(Role.GATEWAY, "g")
    gateway.send(Ask(ask_id=1, what=Question.INDEX))
    await until(lambda: gateway.of(Reply))
    supervisor = await world.supervisor()
    gateway.send(Ask(ask_id=2, what=Question.INDEX))
    await until(lambda: supervisor.of(Ask))
    supervisor.link.close()
    await until(lambda: len(gateway.of(Reply)) == 2)
    assert [(reply.ask_id, reply.ok, reply.code) for reply in gateway.of(Reply)] == [
        (1, False, 503), (2, False, 503),
    ]  # fmt: skip


# The controller's links and different devices: which codes a worker is sent, and devices' counters.


async def test_a_worker_is_sent_only_codes_that_one_of_its_devices_runs(world: World) -> None:
    def on(worker: str, *backends: str) -> WorkerJoined:
        spec = msgspec.structs.replace(joined(worker, worker).devices[0], backends=backends)
        return WorkerJoined(worker=worker, devices=(spec,))

    supervisor = await world.supervisor(code("c1"))
    able, unable = await world.peer(Role.WORKER, "able"), await world.peer(Role.WORKER, "unable")
    able.send(on("able", "python", "onnx"))
    unable.send(on("unable", "torch"))
    await until(lambda: len(world.brain.seen) == 3)
    supervisor.send(code("c2"), CodeRemoved(code_id="c2"))
    await until(lambda: unable.frames and len(able.frames) == 3)
    assert able.frames == [code("c1"), code("c2"), CodeRemoved(code_id="c2")]
    assert unable.frames == [CodeRemoved(code_id="c2")]


async def test_counters_of_devices_are_kept_for_metrics(world: World) -> None:
    await world.supervisor()
    worker = await world.worker("w", "d")
    await until(lambda: world.brain.seen)
    worker.send(DeviceNumbers(device="d", numbers={"swaps": 3}))
    devices = world.recorder.counters.devices
    await until(lambda: "d" in devices and devices["d"].numbers)
    assert b'clockwork_device_number{device="d",number="swaps"} 3' in render(world.recorder.counters)
    worker.send(DeviceNumbers(device="other's", numbers={}))
    await until(lambda: worker.is_lost)


# The controller's links and workers that hang: heartbeats, and reports to the supervisor.


async def test_a_worker_is_sent_beats_and_may_return_them(world: World) -> None:
    await world.supervisor()
    worker = await world.worker("w", "d")
    await until(lambda: Beat() in worker.frames)
    worker.send(Beat())
    await until(lambda: worker.frames.count(Beat()) > 1)
    assert not worker.is_lost


async def test_only_workers_to_be_ended_are_reported_to_the_supervisor_and_all_are_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    end = WorkerHung(worker="w", why="it is late", end=True)
    supervisor = await world.supervisor()
    worker = await world.worker("w", "d")
    for effect in (WorkerHung(worker="w", why="it is late"), end, WorkerHung(worker="w")):
        world.exchange.perform(effect)
    world.exchange.perform(Readiness(ready=True))
    await until(lambda: Readiness(ready=True) in supervisor.frames)
    assert [one for one in supervisor.frames if isinstance(one, WorkerHung)] == [end]
    assert not [one for one in worker.frames if isinstance(one, WorkerHung)]
    said = [record.message for record in caplog.records if record.message.startswith("w ")]
    assert said == [
        "w hung: it is late; nothing is planned on it",
        "w is ended: it is late",
        "w answers again",
    ]


async def test_a_gateway_gets_its_beats_back(world: World) -> None:
    gateway = await world.peer(Role.GATEWAY, "g")
    gateway.send(Beat(), Beat())
    await until(lambda: gateway.frames.count(Beat()) == 2)


async def test_a_question_to_a_stalled_supervisor_is_refused_with_its_process_id(world: World) -> None:
    supervisor = await world.supervisor()
    gateway = await world.peer(Role.GATEWAY, "g")
    supervisor.beats = False
    gateway.send(Ask(ask_id=1, what=Question.LOAD, body=b'{"model":"m"}'))
    await until(lambda: gateway.of(Reply))
    gateway.send(Ask(ask_id=2, what=Question.INDEX))
    await until(lambda: len(gateway.of(Reply)) == 2)
    for reply in gateway.of(Reply):
        assert (reply.ok, reply.code) == (False, 503)
        said = msgspec.json.decode(reply.body)["error"]
        assert f"the supervisor (process {supervisor.link.own.pid}) has not answered for" in said
        assert "kill -CONT" in said
    assert [ask.what for ask in supervisor.of(Ask)] == [Question.LOAD]
    assert b"clockwork_keeper_up 0" in render(world.recorder.counters)
    supervisor.beats = True
    supervisor.send(Beat())
    await until(lambda: not world.exchange._supervisor_stuck())
    gateway.send(Ask(ask_id=3, what=Question.INDEX))
    await until(lambda: len(supervisor.of(Ask)) == 2)
    assert b"clockwork_keeper_up 1" in render(world.recorder.counters)


async def test_the_supervisor_reports_processes_that_it_ended_since_the_start(world: World) -> None:
    supervisor = await world.supervisor(ProcessesEnded(unanswering={"controller": 1}))
    supervisor.send(ProcessesEnded(unanswering={"controller": 1, "gateway-0": 2}))
    text = b'clockwork_processes_ended_total{process="gateway-0"} 2'
    await until(lambda: text in render(world.recorder.counters))
    assert b'clockwork_processes_ended_total{process="controller"} 1' in render(world.recorder.counters)
    supervisor.send(StandbysCounted(ready=1))
    await until(lambda: b"clockwork_controllers_standing_by 1" in render(world.recorder.counters))
    bridge = await world.peer(Role.GATEWAY, "bridge")
    bridge.send(StandbysCounted(ready=1))  # on other hosts
    await until(lambda: b"clockwork_controllers_standing_by 2" in render(world.recorder.counters))
    bridge.link.close()
    await until(lambda: b"clockwork_controllers_standing_by 1" in render(world.recorder.counters))


# Questions: each gets one reply, from the controller or the supervisor, whichever links are lost.


def link() -> Any:
    """A link that records the frames sent."""
    sent: list[Any] = []
    return SimpleNamespace(sent=sent, send=sent.append)


def answered(ask: Ask) -> bytes:
    if ask.body == b"bad":
        raise ValueError("expected something good")
    return b"state"


def index(ask_id: int) -> Ask:
    """A question for the supervisor."""
    return Ask(ask_id=ask_id, what=Question.INDEX, body=b"")


def test_questions_to_the_controller_are_answered_at_once() -> None:
    asker, questions = link(), Questions(answered)
    questions.ask(asker, Ask(ask_id=7, what=Question.STATE, body=b""), None)
    questions.ask(asker, Ask(ask_id=8, what=Question.STATE, body=b"bad"), None)
    good, bad = asker.sent
    assert good == Reply(ask_id=7, ok=True, body=b"state")
    assert (bad.ask_id, bad.ok, bad.code) == (8, False, 400)
    assert msgspec.json.decode(bad.body) == {"error": "state: expected something good"}


def test_two_questions_of_one_id_get_their_own_replies() -> None:
    first, second, supervisor, questions = link(), link(), link(), Questions(answered)
    questions.ask(first, index(5), supervisor)
    questions.ask(second, index(5), supervisor)
    of_first, of_second = supervisor.sent
    questions.reply(Reply(ask_id=of_second.ask_id, ok=True, body=b"2"))
    questions.reply(Reply(ask_id=of_first.ask_id, ok=True, body=b"1"))
    questions.reply(Reply(ask_id=of_first.ask_id, ok=True, body=b"again"))
    assert first.sent == [Reply(ask_id=5, ok=True, body=b"1")]
    assert second.sent == [Reply(ask_id=5, ok=True, body=b"2")]


def test_without_a_supervisor_and_when_its_link_is_lost_the_reply_is_503() -> None:
    asker, questions = link(), Questions(answered)
    questions.ask(asker, index(1), None)
    questions.ask(asker, index(2), link())
    questions.supervisor_lost()
    questions.supervisor_lost()
    assert [(reply.ask_id, reply.code) for reply in asker.sent] == [(1, 503), (2, 503)]


def test_a_lost_link_is_sent_no_reply() -> None:
    gone, stays, supervisor, questions = link(), link(), link(), Questions(answered)
    questions.ask(gone, index(1), supervisor)
    questions.ask(stays, index(2), supervisor)
    questions.requester_lost(gone)
    for passed in supervisor.sent:
        questions.reply(Reply(ask_id=passed.ask_id, ok=True, body=b""))
    assert (gone.sent, len(stays.sent)) == ([], 1)


def test_a_stalled_supervisor_is_reported_at_once_and_its_late_reply_is_dropped() -> None:
    stuck = ""
    asker, supervisor = link(), link()
    questions = Questions(answered, lambda: stuck)
    questions.ask(asker, index(1), supervisor)
    stuck = "the supervisor has not answered for 1.2 s"
    questions.supervisor_stalled(stuck)
    questions.ask(asker, index(2), supervisor)
    questions.reply(Reply(ask_id=supervisor.sent[0].ask_id, ok=True, body=b"late"))
    assert len(supervisor.sent) == 1
    assert [(reply.ask_id, reply.code) for reply in asker.sent] == [(1, 503), (2, 503)]
    assert all(stuck in msgspec.json.decode(reply.body)["error"] for reply in asker.sent)
    stuck = ""
    questions.ask(asker, index(3), supervisor)
    assert len(supervisor.sent) == 2
