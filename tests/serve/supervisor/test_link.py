"""The supervisor's link to the controller, and what it finds out over it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Ask, Drain, Frame, ModelRemoved, Question, Readiness, Reply
from clockwork_serve.serve.supervisor.link import CHECKS_MISSED, SupervisorLink, end_unconnected_workers
from clockwork_serve.serve.supervisor.processes import Launch, Supervisor
from tests.serve.links import FakeController, until

# The supervisor's link is connected again when it is lost, and sends each controller the whole catalogue.


async def test_each_controller_is_sent_the_catalogue_then_a_question(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    catalogue: list[Frame] = [ModelRemoved(model="one")]
    link = SupervisorLink(path, lambda: catalogue)
    link.start()
    link.send(ModelRemoved(model="said to nobody"))
    first = FakeController()
    listener = await first.listen(path)
    await asyncio.wait_for(link.connected.wait(), 60)
    assert first.told == [ModelRemoved(model="one"), Ask(ask_id=1, what=Question.STATE)]
    first.links[0].send(Readiness(ready=True))
    await until(lambda: link.readiness.ready)
    link.send(Drain())
    await until(lambda: first.told[-1] == Drain())
    listener.close()
    await until(lambda: not link.readiness.ready)
    assert link.readiness.why == "no controller is connected"
    catalogue.append(ModelRemoved(model="two"))
    second = FakeController()
    listener = await second.listen(path)
    await asyncio.wait_for(link.connected.wait(), 60)
    assert second.told[:3] == [ModelRemoved(model="one"), ModelRemoved(model="two"), Drain()]
    link.close()
    listener.close()


async def test_questions_go_both_ways(tmp_path: Path) -> None:
    asked: list[Ask] = []
    controller = FakeController()
    listener = await controller.listen(tmp_path / "c.sock")
    link = SupervisorLink(tmp_path / "c.sock", list)
    link.handlers[Ask] = asked.append
    link.start()
    await asyncio.wait_for(link.connected.wait(), 60)
    assert await link.ask(Question.STATE) == {"open": 3}
    question = Ask(ask_id=9, what=Question.INDEX)
    controller.links[0].send(question)
    await until(lambda: asked)
    assert asked == [question]
    link.close()
    listener.close()


async def test_a_question_fails_when_the_link_is_lost(tmp_path: Path) -> None:
    controller = FakeController()
    listener = await controller.listen(tmp_path / "c.sock")
    link = SupervisorLink(tmp_path / "c.sock", list)
    link.start()
    await asyncio.wait_for(link.connected.wait(), 60)
    controller.silent = True
    question = asyncio.ensure_future(link.ask(Question.STATE))
    await until(lambda: len(controller.told) == 2)
    listener.close()
    with pytest.raises(TransportError, match="the controller went away"):
        await question
    with pytest.raises(TransportError, match="not connected"):
        await link.ask(Question.STATE)
    link.close()


async def test_of_two_questions_at_once_both_are_answered_and_none_is_kept(tmp_path: Path) -> None:
    controller = FakeController()
    listener = await controller.listen(tmp_path / "c.sock")
    link = SupervisorLink(tmp_path / "c.sock", list)
    link.start()
    await asyncio.wait_for(link.connected.wait(), 60)
    controller.silent = True
    questions = [asyncio.ensure_future(link.ask(Question.STATE)) for _ in range(2)]
    await until(lambda: len(controller.told) == 3)
    for ask_id in (2, 3):
        controller.links[0].send(Reply(ask_id=ask_id, ok=True, body=b"{}"))
        assert await asyncio.wait_for(questions[ask_id - 2], 60) == {}
    assert link._replies == {}
    link.close()
    listener.close()


async def test_a_controller_that_was_deposed_is_told_nothing(tmp_path: Path) -> None:
    path, told = tmp_path / "c.sock", FakeController()
    link = SupervisorLink(path, list)
    link.start()
    for epoch, joined in ((2, True), (1, False), (2, True)):
        told.told.clear()
        listener = await told.listen(path, epoch)
        if joined:
            await asyncio.wait_for(link.connected.wait(), 20)
        else:
            await asyncio.sleep(0.1)
            assert not link.connected.is_set()
        assert bool(told.told) is joined
        listener.close()
        await until(lambda: not link.connected.is_set())
    link.close()


# Workers that never connect are ended; connected workers and other processes are not.


CHECK_INTERVAL_S = 0.02


async def test_only_a_worker_that_does_not_connect_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    supervisor = Supervisor(lambda line: None)
    for name in ("worker-here", "worker-missing", "gateway-0"):
        supervisor.start(Launch(name=name, module="waits", config=""))
    before = {name: supervisor.pid(name) for name in supervisor.names}
    asked = 0

    async def state() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked % 3 == 0:
            raise TransportError("no controller")
        return {"workers": ["worker-here"]}

    task = asyncio.get_running_loop().create_task(
        end_unconnected_workers(supervisor, state, CHECK_INTERVAL_S)
    )
    while asked < CHECKS_MISSED:
        await asyncio.sleep(CHECK_INTERVAL_S)
        assert {name: supervisor.pid(name) for name in supervisor.names} == before
    async with asyncio.timeout(60):
        while supervisor.pid("worker-missing") in {None, before["worker-missing"]}:
            await asyncio.sleep(CHECK_INTERVAL_S)
    assert supervisor.pid("worker-here") == before["worker-here"]
    assert supervisor.pid("gateway-0") == before["gateway-0"]
    task.cancel()
    await supervisor.kill()
