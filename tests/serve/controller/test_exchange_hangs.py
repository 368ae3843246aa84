"""The controller's links and workers that hang: heartbeats, and reports to the supervisor."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clockwork_serve.messages import Ask, Beat, ProcessesEnded, Question, Readiness, Reply, Role, WorkerHung
from clockwork_serve.telemetry import render
from tests.serve.controller.exchanges import World, play
from tests.serve.links import until


def test_a_worker_is_sent_beats_and_may_return_them(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.supervisor()
        worker = await world.worker("w", "d")
        await until(lambda: Beat() in worker.frames)
        worker.send(Beat())
        await until(lambda: worker.frames.count(Beat()) > 1)
        assert not worker.is_lost

    play(tmp_path, story)


def test_only_workers_to_be_ended_are_reported_to_the_supervisor_and_all_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end = WorkerHung(worker="w", why="it is late", end=True)

    async def story(world: World) -> None:
        supervisor = await world.supervisor()
        worker = await world.worker("w", "d")
        for effect in (WorkerHung(worker="w", why="it is late"), end, WorkerHung(worker="w")):
            world.exchange.perform(effect)
        world.exchange.perform(Readiness(ready=True))
        await until(lambda: Readiness(ready=True) in supervisor.frames)
        assert [one for one in supervisor.frames if isinstance(one, WorkerHung)] == [end]
        assert not [one for one in worker.frames if isinstance(one, WorkerHung)]

    play(tmp_path, story)
    said = [record.message for record in caplog.records if record.message.startswith("w ")]
    assert said == [
        "w hung: it is late; nothing is planned on it",
        "w is ended: it is late",
        "w answers again",
    ]


def test_a_gateway_gets_its_beats_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        gateway = await world.peer(Role.GATEWAY, "g")
        gateway.send(Beat(), Beat())
        await until(lambda: gateway.frames.count(Beat()) == 2)

    play(tmp_path, story)


def test_a_question_to_a_stalled_supervisor_is_refused_with_its_process_id(tmp_path: Path) -> None:
    async def story(world: World) -> None:
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

    play(tmp_path, story)


def test_the_supervisor_reports_processes_that_it_ended_since_the_start(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        supervisor = await world.supervisor(ProcessesEnded(unanswering={"controller": 1}))
        supervisor.send(ProcessesEnded(unanswering={"controller": 1, "gateway-0": 2}))
        text = b'clockwork_processes_ended_total{process="gateway-0"} 2'
        await until(lambda: text in render(world.recorder.counters))
        assert b'clockwork_processes_ended_total{process="controller"} 1' in render(world.recorder.counters)

    play(tmp_path, story)
