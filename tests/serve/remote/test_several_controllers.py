"""Two bridges, one beside a controller that leads: who is found, who is turned away, what is adopted."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    CodeAdded,
    DeviceState,
    FarGateway,
    Lane,
    MachineHello,
    ModelAdded,
    Refused,
    Result,
    RetainWeights,
    Role,
    Running,
    Status,
    WorkerJoined,
)
from clockwork_serve.serve.processes import bridge as process
from clockwork_serve.serve.remote.config import BridgeConfig, runtime
from clockwork_serve.serve.remote.finding import LeaderFinder
from clockwork_serve.serve.transport import hello
from harness import records
from harness.ports import free_port
from tests.serve.certificates import Certificates, certificates
from tests.serve.links import Side, until
from tests.serve.remote.bridges import MODEL, NAME, READY, joining
from tests.serve.remote.machine_links import connect, ours, theirs
from tests.serve.worker.ordering import Orders
from tests.worker.actions import CODE

PROFILE = records.profile(CODE.code_id, {1: 10**6}, device_kind="toy")


class Host:
    """A bridge as its process runs it, and a controller of ours beside it, at times."""

    def __init__(self, folder: Path, made: Certificates) -> None:
        folder.mkdir()
        self.controller = Orders(folder)
        self.port = free_port()
        settings = Settings(
            listen_machines=f"127.0.0.1:{self.port}", silence_s=5.0, store="s3://x", **ours(made).named()
        )
        self._config = BridgeConfig(run_dir=str(folder), settings=settings, kinds=(), shared=True)
        self._stop = asyncio.Event()
        self._serving = asyncio.ensure_future(process.serve(self._config, self._stop))

    async def lead(self, epoch: int) -> None:
        """From now on, the controller leads."""
        self.controller.epoch = epoch
        await self.controller.open()
        await self.controller.linked()
        self.controller.send(CodeAdded(code=CODE, profiles=(PROFILE,)), ModelAdded(model=MODEL), READY)

    async def end(self) -> None:
        self.controller.close()
        self._stop.set()
        await self._serving


@asynccontextmanager
async def hosts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Host, Host]]:
    monkeypatch.setattr(process.child, "freeze_live_objects", lambda *_: None)
    made = certificates(folder)
    both = Host(folder / "a", made), Host(folder / "b", made)
    try:
        yield both
    finally:
        for host in both:
            await host.end()
        await asyncio.sleep(0.05)


def introduction(kind: str) -> MachineHello:
    """Of a worker with one device."""
    return MachineHello(worker=NAME, version=__version__, runtime=runtime(), kinds=(kind,))


def finder(
    folder: Path, *found: Host, role: Role = Role.WORKER, name: str = NAME
) -> tuple[LeaderFinder, Side]:
    side = Side()
    settings = Settings(
        controller=",".join(f"127.0.0.1:{host.port}" for host in found), silence_s=5.0,
        **theirs(certificates(folder)).named(),
    )  # fmt: skip
    return LeaderFinder(settings, hello(role, name), side.on_frames, side.on_lost, Fence()), side


async def joined(made: LeaderFinder) -> int:
    """Connect, with as many attempts as it takes; the port of who leads."""
    async with asyncio.timeout(30):
        while True:
            try:
                link = await made.connect()
            except TransportError:
                continue
            return int(link.at.rpartition(":")[2])


async def test_who_leads_is_found_and_after_it_the_next_but_none_that_was_deposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, b):
        made, side = finder(tmp_path, a, b)
        with pytest.raises(TransportError, match="cannot connect"):
            await made.connect()
        await a.lead(3)
        assert await joined(made) == a.port
        a.controller.close()
        await until(lambda: side.lost)
        await b.lead(4)
        assert await joined(made) == b.port
        assert len(side.lost) == 1
        await a.lead(3)  # it was paused, and does not know
        b.controller.close()
        await until(lambda: len(side.lost) == 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await joined(made)
        made.close()


async def test_one_controller_by_two_names_is_joined_once_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, _):
        await a.lead(2)
        made, side = finder(tmp_path, a)
        made._addresses.append(("localhost", a.port))
        async with asyncio.timeout(30):
            link = await made.connect()
        link.send(introduction("toy"))
        await a.controller.linked()
        await asyncio.sleep(0.3)
        assert link.is_open
        assert not side.lost
        made.close()


async def test_a_name_that_cannot_be_looked_up_keeps_nobody_from_who_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, _):
        loop, asked = asyncio.get_running_loop(), list[str]()
        look_up = loop.getaddrinfo

        async def looked_up(name: str, *more: Any, **given: Any) -> Any:
            asked.append(name)
            if name == "dead.example":
                await asyncio.Event().wait()
            return await look_up(name, *more, **given)

        monkeypatch.setattr(loop, "getaddrinfo", looked_up)
        made, side = finder(tmp_path, a)
        made._addresses.insert(0, ("dead.example", 7))
        for epoch in (2, 3):
            await a.lead(epoch)
            assert await joined(made) == a.port
            a.controller.close()
            await until(lambda epoch=epoch: len(side.lost) == epoch - 1)
        assert asked.count("dead.example") == 1
        made.close()


async def test_a_bridge_that_does_not_lead_shakes_no_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, _):
        files = theirs(certificates(tmp_path))
        for _ in range(3):
            with pytest.raises(TransportError) as caught:
                await connect(Side(), a.port, files)
            assert isinstance(caught.value.__cause__, ConnectionError | ssl.SSLError)


async def test_a_worker_is_adopted_with_what_it_holds_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, _):
        await a.lead(2)
        made, side = finder(tmp_path, a)
        async with asyncio.timeout(30):
            link = await made.connect()
        assert link.peer.epoch == 2
        running = Running(action_id=17, lane=Lane.EXEC, version=5, left_ns=10**6)
        state = DeviceState(device=NAME, running=(running,))
        link.send(introduction("toy"))
        link.send(msgspec.structs.replace(joining(NAME), states=(state,)))
        await a.controller.linked()
        assert (await a.controller.hear(WorkerJoined)).states == (state,)
        kept = RetainWeights(device=NAME, versions=(5,))
        a.controller.send(kept)
        await until(lambda: kept in side.frames)
        result = Result(
            action_id=17, device=NAME, status=Status.OK, started_ns=1, ended_ns=2, outputs=(b"x",)
        )
        link.send(result)
        assert (await a.controller.hear(Result)) == msgspec.structs.replace(result, outputs=())
        link.send(result)
        await until(lambda: side.lost)
        made.close()


async def test_a_device_of_a_kind_that_nobody_measured_waits_and_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, _):
        await a.lead(2)
        made, side = finder(tmp_path, a)
        async with asyncio.timeout(30):
            link = await made.connect()
        link.send(introduction("cuda:sm_90"))
        await until(lambda: side.frames)
        (refused,) = [frame for frame in side.frames if isinstance(frame, Refused)]
        assert "expected one of kind toy" in refused.why
        assert "clockwork profile REPO --store STORE --device" in refused.why
        assert not refused.final, "one that was measured meanwhile is taken"
        made.close()


async def test_one_that_stands_by_hears_when_the_leader_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosts(tmp_path, monkeypatch) as (a, _):
        await a.lead(2)
        other, side = finder(tmp_path, a, role=Role.CONTROLLER, name="controller")
        async with asyncio.timeout(30):
            link = await other.connect()
        assert link.peer.epoch == 2
        await asyncio.sleep(0.1)
        assert link.is_open
        a.controller.close()
        await until(lambda: side.lost)
        await a.lead(3)
        again, talking = finder(tmp_path, a, role=Role.CONTROLLER, name="controller-1")
        async with asyncio.timeout(30):
            link = await again.connect()
        link.send(FarGateway(gateway="x", version="1"))
        await until(lambda: talking.lost)
