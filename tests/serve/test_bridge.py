"""The bridge between a controller and machines that are not all as they should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from clockwork_serve.messages import (
    Fetch,
    Frame,
    Hello,
    Machine,
    Model,
    ModelAdded,
    Part,
    Readiness,
    Refused,
    Request,
    Result,
    Role,
    Status,
    Weights,
    WorkerJoined,
)
from clockwork_serve.serve.bridge import Bridge, judge_of
from clockwork_serve.serve.cluster_tls import ClusterContext
from clockwork_serve.serve.machine_config import FAR_NAME, bound
from clockwork_serve.serve.machine_link import MachineLink, MachineListener
from clockwork_serve.serve.transport import hello
from tests.serve.certificates import certificates
from tests.serve.ordering import Orders
from tests.serve.test_machine_link import connect, ours, theirs
from tests.serve.test_transport import Side, until
from tests.worker.actions import SPEC

NAME = "alpha.cpu:0"
MACHINE = Machine(worker=NAME, version="1", runtime={"cpu": "good"}, kinds=("toy",))
MODEL = Model(
    key="a/1", name="a", version="1", code_id="net", weights=Weights(weights_id="w", path="/x/w.bin", size=8),
    platform="toy", max_batch_size=1, batch_sizes=(1,), output_bytes=8,
)  # fmt: skip


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 60))


class Middle:
    """A bridge with a controller of ours on one side, and machines of ours on the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.controller = Orders(folder)
        self.bridge = Bridge(self.controller.path, judge_of("1", {"cpu": "good"}, ("toy",)))
        self.port = 0

    async def machine(self, *frames: Frame, name: str = NAME, role: Role = Role.WORKER) -> Far:
        side = Side()
        own: Hello = hello(role, name)
        files = theirs(certificates(self.folder))
        link = await connect(
            side, self.port, files, name=own.name, role=own.role, pid=len(self.bridge._peers)
        )
        for frame in frames:
            link.send(frame)
        return Far(side, link)

    async def joined(self) -> Far:
        """A machine that the controller has taken in."""
        far = await self.machine(MACHINE, joining(NAME))
        await self.controller.linked()
        await self.controller.hear(WorkerJoined)
        return far


class Far:
    """A machine."""

    def __init__(self, side: Side, link: MachineLink) -> None:
        self.side = side
        self.link = link

    async def refusal(self) -> Refused:
        await until(lambda: any(isinstance(frame, Refused) for frame in self.side.frames))
        (refused,) = (frame for frame in self.side.frames if isinstance(frame, Refused))
        await until(lambda: self.side.lost)
        return refused


def joining(device: str) -> WorkerJoined:
    return WorkerJoined(worker=NAME, devices=(msgspec.structs.replace(SPEC, device=device),))


@asynccontextmanager
async def middle(folder: Path, *, ready: bool = True) -> AsyncIterator[Middle]:
    made = Middle(folder)
    await made.controller.open()
    bridge = made.bridge
    listener = MachineListener(
        ClusterContext(ours(certificates(folder)), server=True), hello(Role.CONTROLLER, "bridge"),
        bridge.on_link, bridge.on_frames, bridge.on_lost, 5.0,
    )  # fmt: skip
    listening = bound("127.0.0.1", 0)
    made.port = listening.getsockname()[1]
    listener.listen(listening)
    catalogue = asyncio.get_running_loop().create_task(bridge.run())
    await made.controller.linked()
    if ready:
        made.controller.send(ModelAdded(model=MODEL), Readiness(ready=True))
        await until(lambda: bridge._complete)
    yield made
    catalogue.cancel()
    listener.close()
    bridge.close()
    made.controller.close()
    await asyncio.sleep(0.05)


def test_a_far_worker_is_to_the_controller_a_worker_here(tmp_path: Path) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            far = await at.machine(MACHINE, joining(NAME))
            inside = await at.controller.linked()
            told = await at.controller.hear(WorkerJoined)
            assert (inside.peer.role, inside.peer.name, told.worker) == (
                Role.WORKER, f"worker-{NAME}", f"worker-{NAME}",
            )  # fmt: skip
            await until(lambda: ModelAdded(model=MODEL) in far.side.frames)
            far.link.close()
            await until(at.controller.lost.is_set)
            assert not at.bridge._peers

    run(test())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"version": "2"}, "clockwork-serve: expected 1, found 2"),
        ({"runtime": {"cpu": "other"}}, "cpu: expected what the server's models were compiled for"),
        ({"runtime": {}}, "cpu good here, None there"),
        ({"kinds": ("cuda:sm_90",)}, "device: expected one of kind toy"),
    ],
)
def test_who_does_not_fit_is_told_why_for_good(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            far = await at.machine(msgspec.structs.replace(MACHINE, **changed))
            refused = await far.refusal()
            assert why in refused.why
            assert refused.final

    run(test())


@pytest.mark.parametrize(
    ("name", "role"),
    [("cpu:0", Role.WORKER), ("gateway-0", Role.WORKER), (NAME, Role.GATEWAY), (NAME, Role.KEEPER)],
)
def test_nobody_from_elsewhere_passes_for_a_process_of_the_server(
    tmp_path: Path, name: str, role: Role
) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            far = await at.machine(name=name, role=role)
            assert "expected a worker that is called NAME.DEVICE:NUMBER" in (await far.refusal()).why

    run(test())


def test_no_local_worker_has_a_name_that_a_far_one_may_have() -> None:
    for local in ("cpu:0", "torch-cpu:1", "cuda:0", "emulated:0", "emulated"):
        assert FAR_NAME.fullmatch(local) is None
    assert FAR_NAME.fullmatch(NAME)
    assert FAR_NAME.fullmatch("../etc.cpu:0") is None


def test_without_a_controller_one_is_to_come_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with middle(tmp_path, ready=False) as at:
            refused = await (await at.machine(MACHINE)).refusal()
            assert not refused.final

    run(test())


def test_a_name_that_is_taken_is_to_be_tried_again_but_its_own_process_takes_over(tmp_path: Path) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            first = await at.joined()
            other = await at.machine(MACHINE)
            refused = await other.refusal()
            assert "another worker of this server is called alpha.cpu:0" in refused.why
            assert not refused.final
            files = theirs(certificates(tmp_path))
            again = await connect(Side(), at.port, files, name=NAME, pid=first.link.own.pid)
            await until(lambda: first.side.lost)
            assert again.is_open

    run(test())


@pytest.mark.parametrize(
    "frame",
    [
        joining("cpu:0"),
        Result(action_id=7, device=NAME, status=Status.OK, started_ns=1, ended_ns=2),
        Request(request_id="r", gateway="gateway-0", model="a/1", arrival_ns=1, deadline_ns=2),
        Readiness(ready=False),
        MACHINE,
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_who_sends_what_is_not_his_is_cut_off_and_the_controller_hears_nothing_of_it(
    tmp_path: Path, frame: Frame
) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            far = await at.joined()
            far.link.send(frame)
            await until(lambda: far.side.lost)
            await until(at.controller.lost.is_set)
            assert at.controller.heard.empty()

    run(test())


def test_what_is_not_served_is_not_given(tmp_path: Path) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            far = await at.joined()
            far.link.send(Fetch(what="code", name="../../etc"))
            far.link.send(Fetch(what="weights", name="nobody"))
            await until(lambda: sum(isinstance(frame, Part) for frame in far.side.frames) == 2)
            parts = [frame for frame in far.side.frames if isinstance(frame, Part)]
            assert all(part.last and "is not served here" in part.error and not part.data for part in parts)

    run(test())


def test_with_the_controller_all_machines_are_let_go(tmp_path: Path) -> None:
    async def test() -> None:
        async with middle(tmp_path) as at:
            far = await at.joined()
            at.controller.close()
            await until(lambda: far.side.lost)

    run(test())
