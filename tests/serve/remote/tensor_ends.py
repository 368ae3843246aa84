"""Both ends of the way of tensors: a gateway's slots, and a worker whose lanes a test plays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from clockwork_serve.devices.base import put_outputs
from clockwork_serve.messages import Call, Infer, Result, Status, TensorSpec, TensorsReached
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.serve.remote.config import ClusterContext
from clockwork_serve.serve.remote.tensor_server import TensorServer
from clockwork_serve.serve.remote.tensors import RemoteTensors
from clockwork_serve.serve.shm import Calls, OpenCall, RegionMap, SpilledOutputs, check_epochs, encode_outputs
from clockwork_serve.units import MIB, ms
from tests.serve.certificates import certificates
from tests.serve.links import until
from tests.serve.remote.far_orders import timely
from tests.serve.remote.machine_links import ours, theirs
from tests.worker.actions import GPU, infer

REGION = 64 * MIB
LASTED_NS = ms(1)
"""What a worker here says that each INFER took."""


class Worker:
    """One whose INFERs are posted here."""

    def __init__(self, folder: Path, *, server: str = "127.0.0.1", silence_s: float = 10.0) -> None:
        self.posted: list[Infer] = []
        self.results: list[Result] = []
        self.reached: list[TensorsReached] = []
        self.spill = SpilledOutputs(REGION)
        self._calls = Calls(RegionMap(), self.spill)
        context = ClusterContext(theirs(certificates(folder)), server=False)
        self.tensors = RemoteTensors(REGION, context, silence_s, self.posted.append, self._send, server)

    def _send(self, frame: Result | TensorsReached) -> None:
        if isinstance(frame, TensorsReached):
            self.reached.append(frame)
        else:
            self.results.append(frame)

    def open(self, action: Infer) -> list[OpenCall]:
        """The tensors of an INFER that was posted, as its lane has them."""
        return self._calls.open(action)

    def end(self, action: Infer, calls: list[OpenCall], outputs: list[list[bytes]]) -> None:
        """Write these outputs of each call, and have the result sent."""
        for call, blobs in zip(calls, outputs, strict=True):
            named = (TensorSpec(name=f"y{at}", datatype="UINT8", shape=(-1,)) for at in range(len(blobs)))
            arrays = [np.frombuffer(blob, np.uint8)[None] for blob in blobs]
            put_outputs(call, zip(named, arrays, strict=True))
        check_epochs(calls)
        ended_ns = time.monotonic_ns()
        found = Result(
            action_id=action.action_id, device=GPU, status=Status.OK, started_ns=ended_ns - LASTED_NS,
            ended_ns=ended_ns, run_ns=LASTED_NS, outputs=encode_outputs(calls),
        )  # fmt: skip
        ready = self.tensors.answer(found)
        if ready is not None:
            self.results.append(ready)

    async def post(self, action: Infer) -> Infer:
        """The INFER once its inputs are there."""
        assert self.tensors.bring(action)
        await until(lambda: self.posted or self.results)
        assert not self.results, self.results
        return self.posted.pop()

    async def result(self) -> Result:
        await until(lambda: self.results)
        return self.results.pop()


class Gateway:
    """The slots of one, and its tensor server."""

    def __init__(self, folder: Path, *, elsewhere: bool = False, region_bytes: int = REGION) -> None:
        self.slots = Slots(region_bytes, elsewhere=elsewhere)
        context = ClusterContext(ours(certificates(folder)), server=True)
        self.server = TensorServer(self.slots, context, 10.0)
        self.port = self.server.listen_at("127.0.0.1", 0)
        self.slots.server = f"127.0.0.1:{self.port}"

    def ask(self, *blobs: bytes, room: int = 0) -> Slot:
        """A request with these inputs."""
        inputs = [InputTensor(f"x{at}", "UINT8", (1, len(blob)), blob) for at, blob in enumerate(blobs)]
        slot = self.slots.fill(inputs, room)
        assert slot is not None
        return slot

    def close(self) -> None:
        self.server.close()
        self.slots.close()


def over(action_id: int, *slots: Slot, for_ms: float = 20_000) -> Infer:
    """An INFER of these requests."""
    calls = tuple([Call(request_id=f"r{at}", rows=1, tensors=slot.encoded) for at, slot in enumerate(slots)])
    return timely(structs.replace(infer(action_id, "a", 0), calls=calls, batch=len(calls)), for_ms)


def seen(calls: list[OpenCall]) -> list[list[bytes]]:
    """The inputs of each call."""
    return [[np.asarray(array).tobytes() for array in call.inputs.values()] for call in calls]


def answered(slot: Slot, encoded: bytes) -> list[bytes]:
    """The outputs as their gateway finds them."""
    found, own = slot.outputs(encoded)
    assert not own
    return [bytes(output.data) for output in found]


@asynccontextmanager
async def ends(folder: Path, **options: Any) -> AsyncIterator[tuple[Gateway, Worker]]:
    """A gateway and a worker, each on another machine."""
    gateway, worker = Gateway(folder), Worker(folder, **options)
    try:
        yield gateway, worker
    finally:
        worker.tensors.close()
        gateway.close()
        await asyncio.sleep(0.05)
