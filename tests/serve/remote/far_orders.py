"""A bridge's and a gateway's part in tests of far workers: artefacts, orders, and tensors."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from msgspec import structs

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.messages import (
    Admitted,
    CodeAdded,
    CodeReady,
    Frame,
    Infer,
    Load,
    MachineHello,
    Result,
    Role,
    Status,
    Window,
    WorkerJoined,
)
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.serve.remote.config import ClusterContext, bound
from clockwork_serve.serve.remote.link import MachineListener
from clockwork_serve.serve.remote.tensor_server import TensorServer
from clockwork_serve.serve.transport import Link, hello
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.store import Cache
from clockwork_serve.units import MIB, ms
from tests.serve.certificates import certificates
from tests.serve.processes.workers import spawn
from tests.serve.proxy import Proxy, proxy
from tests.serve.remote.machine_links import ours, theirs
from tests.worker.actions import CODE, infer, load

Wanted = TypeVar("Wanted", bound=Frame)
PATIENCE_S = 120.0
DEVICE = DeviceConfig(device="gpu:0", kind="emulated", memory_bytes=1000, page_bytes=100)
X = np.arange(4, dtype=np.float32).reshape(1, 4)
ROOM = 64


class FarOrders:
    """One worker at a time; ``proxy`` is the network to it, ``gateways`` that from it to the tensors."""

    def __init__(self, folder: Path, silence_s: float) -> None:
        self.heard: asyncio.Queue[Frame] = asyncio.Queue()
        self.link: Link | None = None
        self.lost: list[Link] = []
        self.proxy: Proxy
        self.gateways: Proxy
        self.process: subprocess.Popen[bytes]
        own = hello(Role.CONTROLLER, "bridge")
        context = ClusterContext(ours(certificates(folder)), server=True)
        self.listener = MachineListener(
            context, own, self._on_link, self._on_frames, self.lost.append, silence_s
        )
        self.slots = Slots(MIB)
        self.tensors = TensorServer(self.slots, context, silence_s)
        self.asked: dict[int, Slot] = {}  # by INFER

    def send(self, *frames: Frame) -> None:
        assert self.link is not None
        for frame in frames:
            self.link.send(frame)

    async def hear(self, kind: type[Wanted]) -> Wanted:
        """The next frame, which must be of this kind."""
        frame = await asyncio.wait_for(self.heard.get(), PATIENCE_S)
        assert isinstance(frame, kind), f"expected {kind.__name__}, heard {frame}"
        return frame

    async def results(self, count: int) -> dict[int, Result]:
        """So many results, by action."""
        found: dict[int, Result] = {}
        while len(found) < count:
            frame = await asyncio.wait_for(self.heard.get(), PATIENCE_S)
            if isinstance(frame, Result):
                assert frame.action_id not in found, "an action has one result"
                found[frame.action_id] = frame
        return found

    def asking(self, action_id: int, for_ms: float, room: int = ROOM) -> Infer:
        """An INFER of model ``a``, which may start from now on for so long; its inputs are in a slot here."""
        slot = self.slots.fill([InputTensor("x", "FP32", (1, 4), X.tobytes())], room)
        assert slot is not None
        self.asked[action_id] = slot
        action = infer(action_id, "a", 0)
        call = structs.replace(action.calls[0], tensors=slot.encoded)
        return timely(structs.replace(action, calls=(call,)), for_ms)

    def outputs(self, result: Result) -> list[bytes]:
        """The outputs of one, as they are in its slot."""
        found, own = self.asked[result.action_id].outputs(result.outputs[0])
        assert not own
        return [bytes(output.data) for output in found]

    async def ready(self) -> None:
        """It joined, took its code from the store, and has the weights of model ``a``."""
        await self.hear(MachineHello)
        await self.hear(WorkerJoined)
        self.send(CodeAdded(code=structs.replace(CODE, path="/on/the/server")))
        told = await self.hear(CodeReady)
        assert told.ok, told.message
        self.send(timely(load(1, "a", 0), 10_000))
        assert (await self.results(1))[1].status is Status.OK

    def _on_link(self, link: Link) -> None:
        self.link = link
        link.send(Admitted())

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            self.heard.put_nowait(frame)


Timed = TypeVar("Timed", Load, Infer)


def timely(action: Timed, for_ms: float) -> Timed:
    """The action, which may start from now on for so long."""
    now_ns = time.monotonic_ns()
    return structs.replace(action, window=Window(now_ns, now_ns + ms(for_ms)))


@asynccontextmanager
async def far_orders(folder: Path, silence_s: float, infer_ms: float = 1) -> AsyncIterator[FarOrders]:
    """A worker process that joins over a network of ours, ready for what is said."""
    made = FarOrders(folder, silence_s)
    (folder / "store").mkdir()
    profile = json.dumps({"infer_ns": {"1": round(infer_ms * 1e6)}, "load_ns": 1000}).encode()
    with Cache(folder / "builder", store=str(folder / "store")) as builder:
        builder.save_code(CODE, {"profile.json": profile})
    listening = bound("127.0.0.1", 0)
    port = listening.getsockname()[1]
    made.listener.listen(listening)
    (folder / "run").mkdir()
    with proxy(port) as between, proxy(made.tensors.listen_at("127.0.0.1", 0)) as gateways:
        made.proxy, made.gateways = between, gateways
        made.slots.server = f"127.0.0.1:{gateways.port}"
        settings = Settings(
            controller=f"127.0.0.1:{between.port}", cache=str(folder / "cache"), silence_s=silence_s,
            store=str(folder / "store"),
            **theirs(certificates(folder)).named(),
        )  # fmt: skip
        config = WorkerConfig(
            run_dir=str(folder / "run"), name="gpu:0", devices=(DEVICE,), settings=settings, elsewhere=True
        )
        made.process = spawn(config)
        try:
            await made.ready()
            yield made
        finally:
            made.process.kill()
            await asyncio.to_thread(made.process.communicate)
            made.listener.close()
            made.tensors.close()
            made.slots.close()
            await asyncio.sleep(0.05)
