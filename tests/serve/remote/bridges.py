"""A bridge between a controller and workers and gateways of another machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from clockwork_serve.messages import (
    FarGateway,
    Frame,
    Hello,
    MachineHello,
    ModelAdded,
    Readiness,
    Refused,
    Role,
    WorkerJoined,
)
from clockwork_serve.serve.remote.bridge import Bridge, judge_of
from clockwork_serve.serve.remote.config import ClusterContext, bound
from clockwork_serve.serve.remote.link import (
    MachineLink,
    MachineListener,
)
from clockwork_serve.serve.transport import hello
from harness import records
from tests.serve.certificates import certificates
from tests.serve.links import Side, until
from tests.serve.remote.machine_links import connect, ours, theirs
from tests.serve.worker.ordering import Orders
from tests.worker.actions import SPEC

NAME = "alpha.cpu:0"
MACHINE = MachineHello(worker=NAME, version="1", runtime={"cpu": "good"}, kinds=("toy",))
GATEWAY = "alpha.gateway-0"
GUEST = FarGateway(gateway=GATEWAY, version="1")
READY = Readiness(ready=True)
MODEL = records.model("a", "net", size=8, sizes=(1,), path="/x/w.bin", platform="toy", output_bytes=8)


class Middle:
    """A bridge with a controller of ours on one side, and machines of ours on the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.controller = Orders(folder)
        judge = judge_of({"cpu": "good"}, ("toy",))
        self.bridge = Bridge(self.controller.path, judge)
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

    async def guest(self) -> Far:
        """A gateway that the controller has taken in."""
        far = await self.machine(GUEST, name=GATEWAY, role=Role.GATEWAY)
        await self.controller.linked()
        return far


class Far:
    """A machine."""

    def __init__(self, side: Side, link: MachineLink) -> None:
        self.side = side
        self.link = link

    def send(self, *frames: Frame) -> None:
        for frame in frames:
            self.link.send(frame)

    async def hears(self, *frames: Frame) -> None:
        """These and no other, so far."""
        await until(lambda: len(self.side.frames) >= len(frames))
        assert self.side.frames == list(frames)

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
        made.controller.send(ModelAdded(model=MODEL), READY)
        await until(lambda: bridge._complete)
    try:
        yield made
    finally:
        catalogue.cancel()
        listener.close()
        bridge.close()
        made.controller.close()
        await asyncio.sleep(0.05)
