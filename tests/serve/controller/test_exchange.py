"""The controller's links: catalogue, routing, questions, and processes that connect, die and misbehave."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.messages import (
    Answer,
    ArtefactDamaged,
    Ask,
    Cancel,
    CodeReady,
    CodeRemade,
    CodeRemoved,
    DamageCounted,
    Drain,
    Extent,
    Frame,
    GatewayLost,
    Infer,
    Load,
    ModelRemoved,
    Outcome,
    Question,
    Readiness,
    Release,
    Reply,
    Request,
    RequestCredit,
    Result,
    Role,
    Status,
    Weights,
    Window,
    WorkerLost,
)
from clockwork_serve.telemetry import decode
from tests.serve.controller.exchanges import World, code, joined, model, play
from tests.serve.links import until


def request(request_id: str = "r1", gateway: str = "g") -> Request:
    return Request(request_id=request_id, gateway=gateway, model="m/1", arrival_ns=1, deadline_ns=2)


def answer(gateway: str, request_id: str = "r1") -> Answer:
    return Answer(request_id=request_id, gateway=gateway, outcome=Outcome.OK)


def load(device: str, send_by_ns: int = 0) -> Load:
    return Load(
        action_id=7, device=device, model="m/1", code_id="c1", extent=Extent(0, 1), version=1,
        weights=Weights(weights_id="w", path="/w", size=1),
        window=Window(0, 1), expected_ns=1, send_by_ns=send_by_ns,
    )  # fmt: skip


def infer(device: str) -> Infer:
    return Infer(
        action_id=8, device=device, model="m/1", code_id="c1", extent=Extent(0, 1), version=1, batch=1,
        calls=(), window=Window(0, 1), expected_ns=1,
    )  # fmt: skip


def result(device: str) -> Result:
    return Result(action_id=7, device=device, status=Status.OK, started_ns=1, ended_ns=2)


def test_new_processes_are_sent_the_catalogue(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_changes_are_sent_to_all_connected_processes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_workers_wait_until_the_catalogue_is_complete(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_damage_is_reported_to_the_supervisor_and_a_rebuilt_code_to_all(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_a_supervisor_that_repeats_its_catalogue_changes_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.supervisor(code(), model())
        await world.supervisor(code(), model())
        assert world.brain.seen == [code(), model()]
        await world.supervisor(code(), model(priority=5))
        assert world.brain.seen[2:] == [ModelRemoved(model="m/1"), model(priority=5)]

    play(tmp_path, story)


def test_effects_are_sent_to_the_right_process(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        supervisor = await world.supervisor()
        one, two = await world.peer(Role.GATEWAY, "one"), await world.peer(Role.GATEWAY, "two")
        first, second = await world.worker("w1", "d1", "d2"), await world.worker("w2", "d3")
        await until(lambda: len(world.brain.seen) == 2)
        release = Release(request_id="r1", gateway="two")
        world.decide(
            answer("one"),
            release,
            answer("gone"),
            load("d2"),
            infer("d3"),
            load("gone"),
            Readiness(ready=True),
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

    play(tmp_path, story)


def test_an_action_that_cannot_be_sent_in_time_is_answered_instead(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.supervisor()
        worker = await world.worker("w", "d")
        await until(lambda: world.brain.seen)
        world.decide(load("d", send_by_ns=1), infer("d"))
        await until(lambda: worker.frames and len(world.brain.seen) == 2)
        assert worker.frames == [infer("d")]
        refusal = world.brain.seen[1]
        assert isinstance(refusal, Result)
        assert (refusal.action_id, refusal.device, refusal.status) == (7, "d", Status.TOO_LATE)

    play(tmp_path, story)


def test_frames_of_gateways_and_workers_reach_the_brain(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_the_brain_observes_lost_workers_and_gateways(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_a_process_that_connects_again_replaces_its_old_link(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


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
def test_a_process_that_sends_what_it_may_not_is_cut_off(tmp_path: Path, role: Role, frame: Frame) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_state_and_counters_are_answered_here(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_questions_about_the_repository_go_to_the_supervisor_and_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_questions_to_a_supervisor_that_is_not_connected_are_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)
