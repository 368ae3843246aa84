"""A gateway between scripted clients and a scripted controller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from clockwork_client.datatypes import Buffer, decode_strings
from clockwork_serve.config import Settings
from clockwork_serve.messages import Answer, Outcome, Reason, Request
from clockwork_serve.oip import InferCall, InputTensor, Parameter, Served
from clockwork_serve.serve.gateway.access import Caps, Tenant
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.requests import Body, InferResponse
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.units import MIB, ms
from tests.serve.gateway.fake_controller import FakeController, served, spec

IDENT = served("ident", (spec("X", "FP32", 2),), (spec("Y", "FP32", 2),))
WORDS = served("words", (spec("X", "BYTES", -1),), (spec("Y", "BYTES", -1),))
ANY = served("any", (spec("X", "UINT8", -1),), (spec("Y", "UINT8", -1),), output_bytes=100)


class Client:
    """A client without a protocol: an exchange, and how it ended."""

    def __init__(
        self, model: str = "ident", data: bytes = bytes(8), rows: int = 1, **parameters: Parameter
    ) -> None:
        self.model = model
        self.version = ""
        self.identity = ""
        self.arrival_ns = time.monotonic_ns()
        self.slo_header: str | None = None
        self.trace = ""
        self.remaining_s: float | None = None
        self.every_output_binary = True
        self.body: Body | None = None
        self.ends: list[InferResponse] = []
        self.outputs: list[bytes] = []
        self.error: Exception | None = None
        self.data: Buffer = data
        self._rows = rows
        self._parameters = parameters

    def call(self, served: Served) -> InferCall:
        if self.error is not None:
            raise self.error
        kind = served.code.inputs[0]
        elements = len([*decode_strings(self.data)]) if kind.datatype == "BYTES" else len(self.data)
        width = 2 if kind.datatype == "FP32" else elements // self._rows
        tensor = InputTensor("X", kind.datatype, (self._rows, width), self.data)
        return InferCall([tensor], parameters=dict(self._parameters))

    def end(self, response: InferResponse) -> None:
        self.ends.append(response)
        self.outputs = [bytes(output.data) for output in response.outputs]

    @property
    def ended(self) -> tuple[Outcome, Reason]:
        (response,) = self.ends
        return response.outcome, response.reason


SMALL = Settings(gateway_memory=1 * MIB, max_body=MIB // 2, slo_ms=60_000)


class World:
    def __init__(self, run_dir: Path, settings: Settings = SMALL) -> None:
        self.controller = FakeController(run_dir / "controller.sock", IDENT, ANY, WORDS)
        config = GatewayConfig(run_dir=str(run_dir), name="g0", settings=settings)
        self.tenants: dict[str, Tenant] = {}
        self.gateway = Gateway(config, caps=Caps(lambda: self.tenants))

    def keep(self, request: Request) -> Answer | None:
        """Answer later."""
        return None

    async def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.002)

    def hold_back(self) -> None:
        """As if a request had been held back now, for want of credit, and the next were for a long time."""
        gate = self.gateway.link._credit_gate
        gate._scarce_until_ns = gate._clock() + ms(60_000)

    async def infer(self, client: Client) -> Client:
        self.gateway.infer(client)
        await self.until(lambda: client.ends)
        return client


@asynccontextmanager
async def a_world(run_dir: Path, settings: Settings = SMALL) -> AsyncIterator[World]:
    world = World(run_dir, settings)
    await world.controller.start()
    link = asyncio.get_running_loop().create_task(world.gateway.link.run())
    await world.until(lambda: world.gateway.link.is_open)
    try:
        yield world
    finally:
        link.cancel()
        world.gateway.close()
        world.controller.stop()
