"""The controller as a real process, with the real brain; the test plays supervisor, worker and gateway."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from clockwork_serve.config import Settings
from clockwork_serve.controller import Controller
from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Answer,
    Ask,
    Cancel,
    CodeAdded,
    CodeReady,
    Delivered,
    Drain,
    Frame,
    HandingOver,
    Infer,
    Load,
    ModelAdded,
    Outcome,
    Question,
    Readiness,
    Reason,
    Reply,
    Request,
    Result,
    Role,
    Status,
)
from clockwork_serve.serve import lease as lease_module
from clockwork_serve.serve.child import EXIT_BROKEN, EXIT_CONFIG
from clockwork_serve.serve.lease import LEASE_NAME, StoreLease, create_lease
from clockwork_serve.serve.processes import controller as process
from clockwork_serve.serve.processes.controller import ControllerProcessConfig
from clockwork_serve.serve.supervisor.processes import Child, Launch
from clockwork_serve.serve.transport import SOCKET_NAME, Link, connect, hello
from clockwork_serve.store.shared import FolderFiles
from clockwork_serve.telemetry import read_journal
from clockwork_serve.units import NS_PER_S
from tests.serve.controller.exchanges import joined
from tests.serve.supervisor.catalogues import profile, served

A = served("a/1")
CODE = CodeAdded(code=A.code, profiles=(profile(infer_ns=1_000_000),))
MODEL = ModelAdded(model=A.model)


class Peer:
    """A link, and all frames received over it."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lost = asyncio.Event()
        self.link: Link

    def of(self, kind: type) -> list[Any]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    async def until(self, kind: type, condition: Callable[[Any], bool] = lambda frame: True) -> Any:
        async with asyncio.timeout(60):
            while True:
                for frame in self.of(kind):
                    if condition(frame):
                        return frame
                await asyncio.sleep(0.002)


@asynccontextmanager
async def controller(run_dir: Path, **fields: Any) -> AsyncIterator[Child]:
    if not (run_dir / LEASE_NAME).exists():
        create_lease(run_dir)
    config = ControllerProcessConfig(run_dir=str(run_dir), **fields)
    child = Child(Launch.of(config.name, "controller", config), lambda line: None)
    try:
        yield child
    finally:
        await child.stop(grace_s=20)


def waiting_for_locks() -> set[int]:
    """Processes that wait for a file's lock."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return {int(words[5]) for words in lines if words[1:3] == ["->", "FLOCK"]}


async def standing_by(child: Child) -> None:
    """Return once it waits for the lock."""
    async with asyncio.timeout(30):
        while child.pid not in waiting_for_locks():
            assert not child.exited
            await asyncio.sleep(0.01)


async def peer(run_dir: Path, role: Role, name: str) -> Peer:
    made = Peer()
    async with asyncio.timeout(60):
        while True:
            try:
                made.link = await connect(
                    run_dir / SOCKET_NAME,
                    hello(role, name),
                    lambda link, frames: made.frames.extend(frames),
                    lambda link: made.lost.set(),
                )
            except TransportError:
                await asyncio.sleep(0.01)
            else:
                return made


async def warm(run_dir: Path) -> tuple[Peer, Peer, Peer]:
    """Supervisor, worker and gateway of a controller that is ready."""
    supervisor = await peer(run_dir, Role.SUPERVISOR, "keeper")
    for frame in (CODE, MODEL, Ask(ask_id=1, what=Question.STATE)):
        supervisor.link.send(frame)
    worker = await peer(run_dir, Role.WORKER, "w")
    worker.link.send(joined("w", "d"))
    gateway = await peer(run_dir, Role.GATEWAY, "g")
    await worker.until(CodeAdded)
    assert not any(frame.ready for frame in gateway.of(Readiness)), "the code is not prepared yet"
    worker.link.send(CodeReady(device="d", code_id="c1"))
    await gateway.until(Readiness, lambda frame: frame.ready)
    await supervisor.until(Readiness, lambda frame: frame.ready)
    return supervisor, worker, gateway


class StandIn:
    """A lease that is free from the start, or once the test says so, and may be lost."""

    def __init__(self, *, free: bool = True) -> None:
        self.lost = asyncio.Event()
        self.free = asyncio.Event()
        self.released = False
        if free:
            self.free.set()

    async def acquire(self) -> int:
        await self.free.wait()
        return 7

    def release(self) -> None:
        self.released = True


def test_what_came_while_it_started_is_frozen_without_a_pass_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(process, "_FREEZE_AFTER_S", 0.05)

    async def main() -> None:
        stop, config = asyncio.Event(), ControllerProcessConfig(run_dir=str(tmp_path))
        serving = asyncio.create_task(process.lead_once(config, StandIn(), stop))
        async with asyncio.timeout(60):
            while done.count("freeze") < 2:
                await asyncio.sleep(0.01)
        stop.set()
        await serving

    usual = gc.get_threshold()
    try:
        uvloop.run(main())
    finally:
        gc.set_threshold(*usual)
    assert done == ["collect", "freeze", "freeze"]


async def test_it_leads_no_longer_once_the_lease_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.child, "freeze_live_objects", lambda *_: None)
    config, lease = ControllerProcessConfig(run_dir=str(tmp_path)), StandIn()
    leading = asyncio.create_task(process.lead_once(config, lease, asyncio.Event()))
    gateway = await peer(tmp_path, Role.GATEWAY, "g")
    assert gateway.link.peer.epoch == 7
    assert not lease.released
    lease.lost.set()
    async with asyncio.timeout(30):
        await gateway.lost.wait()
        await leading
    assert lease.released


async def test_who_stands_by_ends_when_it_is_told_to_and_never_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.child, "freeze_live_objects", lambda *_: None)
    stop, lease = asyncio.Event(), StandIn(free=False)
    config = ControllerProcessConfig(run_dir=str(tmp_path))
    waiting = asyncio.create_task(process.lead_once(config, lease, stop))
    await asyncio.sleep(0.05)
    stop.set()
    lease.free.set()  # at the same instant
    async with asyncio.timeout(30):
        await waiting
    assert lease.released
    assert not (tmp_path / SOCKET_NAME).exists()


async def test_a_leader_whose_last_worker_is_gone_hands_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "REIGN_S", 0.1)
    lease, stop = StoreLease(FolderFiles(tmp_path), "main", 0.4), asyncio.Event()
    config = ControllerProcessConfig(run_dir=str(tmp_path))
    epoch = await lease.acquire()
    serving = asyncio.create_task(
        process.serve(
            config, Controller(config.controller), stop, epoch=epoch, leave=asyncio.Event(), lease=lease
        )
    )
    _, worker, gateway = await warm(tmp_path)
    await asyncio.sleep(1)
    assert not gateway.of(HandingOver)
    worker.link.close()
    await gateway.until(HandingOver)
    async with asyncio.timeout(30):
        await serving
    assert stop.is_set()
    lease.release()


def request(number: int) -> Request:
    now_ns = time.monotonic_ns()
    return Request(
        request_id=f"r{number}",
        gateway="g",
        model="a/1",
        arrival_ns=now_ns,
        deadline_ns=now_ns + 20 * NS_PER_S,
    )


def ok(action: Load | Infer) -> Result:
    now_ns = time.monotonic_ns()
    outputs = tuple(b"out" for _ in action.calls) if isinstance(action, Infer) else ()
    return Result(
        action_id=action.action_id, device=action.device, status=Status.OK, started_ns=now_ns,
        ended_ns=now_ns + 1_000_000, outputs=outputs,
    )  # fmt: skip


async def test_a_request_is_loaded_for_executed_and_answered(tmp_path: Path) -> None:
    async with controller(tmp_path, settings=Settings(journal=str(tmp_path / "journal"))) as child:
        supervisor, worker, gateway = await warm(tmp_path)
        gateway.link.send(request(1))
        worker.link.send(ok(await worker.until(Load)))
        infer = await worker.until(Infer)
        assert [call.request_id for call in infer.calls] == ["r1"]
        worker.link.send(ok(infer))
        answer = await gateway.until(Answer)
        assert (answer.request_id, answer.outcome, answer.outputs) == ("r1", Outcome.OK, b"out")
        supervisor.link.send(Ask(ask_id=2, what=Question.STATE))
        state = msgspec.json.decode((await supervisor.until(Reply, lambda reply: reply.ask_id == 2)).body)
        assert (state["open"], state["ready"], state["devices"]["d"]["actions"]) == (
            0, True, {"load:ok": 1, "infer:ok": 1},
        )  # fmt: skip
        assert await child.stop(grace_s=20) == 0
    events = [event for step in read_journal(tmp_path / "journal") for event in step.events]
    assert [event.request_id for event in events if isinstance(event, Request)] == ["r1"]


async def test_a_lost_worker_makes_it_not_ready_and_every_request_is_answered(tmp_path: Path) -> None:
    async with controller(tmp_path):
        _, worker, gateway = await warm(tmp_path)
        for number in range(5):
            gateway.link.send(request(number))
        await worker.until(Load)
        worker.link.close()
        await gateway.until(Readiness, lambda frame: not frame.ready and "warm" in frame.why)
        again = await peer(tmp_path, Role.WORKER, "w")
        again.link.send(joined("w", "d"))
        await again.until(CodeAdded)
        again.link.send(CodeReady(device="d", code_id="c1"))
        answered: set[str] = set()
        done: set[int] = set()
        async with asyncio.timeout(60):
            while len(answered) < 5:
                for action in [*again.of(Load), *again.of(Infer)]:
                    if action.action_id not in done:
                        done.add(action.action_id)
                        again.link.send(ok(action))
                answered = {answer.request_id for answer in gateway.of(Answer)}
                await asyncio.sleep(0.002)
        assert len(gateway.of(Answer)) == 5, "each once"


@pytest.mark.skipif(os.sched_getscheduler(0) != os.SCHED_OTHER, reason="given another scheduling class")
async def test_it_uses_the_batch_policy_while_messages_arrive_in_bursts_only(tmp_path: Path) -> None:
    async with controller(tmp_path) as child:
        _, _, gateway = await warm(tmp_path)

        async def until(policy: int, messages: int) -> None:
            async with asyncio.timeout(60):
                while os.sched_getscheduler(child.pid) != policy:
                    for _ in range(messages):
                        gateway.link.send(Cancel(request_id="of nobody"))
                    gateway.link.send(Ask(ask_id=1, what=Question.STATE))
                    await gateway.until(Reply)
                    gateway.frames.clear()

        assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER
        await until(os.SCHED_BATCH, 64)
        await until(os.SCHED_OTHER, 1)


async def test_draining_refuses_new_requests_and_says_so(tmp_path: Path) -> None:
    async with controller(tmp_path):
        supervisor, _, gateway = await warm(tmp_path)
        supervisor.link.send(Drain())
        await gateway.until(Readiness, lambda frame: frame.why == "draining")
        gateway.link.send(request(1))
        answer = await gateway.until(Answer)
        assert (answer.outcome, answer.reason) == (Outcome.REJECTED, Reason.DRAINING)


async def test_all_links_end_when_it_is_killed(tmp_path: Path) -> None:
    async with controller(tmp_path) as child:
        peers = await warm(tmp_path)
        child.signal(signal.SIGKILL)
        async with asyncio.timeout(60):
            for each in peers:
                await each.lost.wait()
        assert await child.ended == -signal.SIGKILL


async def test_one_that_stands_by_takes_over_from_what_workers_hold(tmp_path: Path) -> None:
    async with controller(tmp_path) as first:
        _, worker, gateway = await warm(tmp_path)
        gateway.link.send(request(1))
        worker.link.send(ok(await worker.until(Load)))
        infer = await worker.until(Infer)
        async with controller(tmp_path, name="controller-1") as second:
            await standing_by(second)
            assert (await peer(tmp_path, Role.GATEWAY, "h")).link.peer.name == "controller"
            assert gateway.link.peer.epoch == 1
            first.signal(signal.SIGKILL)
            again = await peer(tmp_path, Role.SUPERVISOR, "keeper")
            assert (again.link.peer.name, again.link.peer.epoch) == ("controller-1", 2)
            for frame in (CODE, MODEL, Ask(ask_id=1, what=Question.STATE)):
                again.link.send(frame)
            state = msgspec.json.decode((await again.until(Reply)).body)
            assert (state["epoch"], state["standbys"]) == (2, 0)
            _, other, asking = await warm(tmp_path)
            asking.link.send(request(2))
            later = await other.until(Load)
            assert later.action_id > infer.action_id, "ids are never used again"
            assert await second.stop(grace_s=20) == 0


async def test_by_a_signal_it_finishes_what_it_has_and_hands_over(tmp_path: Path) -> None:
    async with controller(tmp_path) as first:
        _, worker, gateway = await warm(tmp_path)
        gateway.link.send(request(1))
        worker.link.send(ok(await worker.until(Load)))
        infer = await worker.until(Infer)
        async with controller(tmp_path, name="controller-1") as second:
            await standing_by(second)
            second.signal(signal.SIGUSR1)  # it has nothing to give up
            first.signal(signal.SIGUSR1)
            await gateway.until(HandingOver)
            worker.link.send(ok(infer))
            assert (await gateway.until(Answer)).outcome is Outcome.OK
            gateway.link.send(Delivered(in_time=("r1",)))
            async with asyncio.timeout(30):
                await gateway.lost.wait()
                assert await first.ended == 0
            again = await peer(tmp_path, Role.GATEWAY, "g")
            assert (again.link.peer.name, again.link.peer.epoch) == ("controller-1", 2)
            assert not second.exited


async def test_a_lease_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / LEASE_NAME).write_bytes(b"7")
    async with controller(tmp_path) as child:
        assert await asyncio.wait_for(child.ended, 30) == EXIT_CONFIG
        assert any("lease: expected the epoch of the last controller" in line for line in child.tail)


async def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    async with controller(tmp_path, settings=Settings(journal=str(tmp_path / "no" / "journal"))) as child:
        assert await asyncio.wait_for(child.ended, 60) == EXIT_CONFIG
        assert any("journal: cannot write" in line for line in child.tail)


async def test_a_broken_invariant_ends_it(tmp_path: Path) -> None:
    async with controller(tmp_path) as child:
        _, _, gateway = await warm(tmp_path)
        gateway.link.send(request(1))
        gateway.link.send(request(1))
        assert await asyncio.wait_for(child.ended, 60) == EXIT_BROKEN
        assert any("r1 came twice" in line for line in child.tail)
