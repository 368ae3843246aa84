"""Clients in closed loop by a gateway's own link to the controller: each asks again when it has its answer.

HTTP and gRPC are left out, so that it is the device that is measured; all else is what serves. It starts no
process and judges nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks.gpu.rig import Floats
from benchmarks.past_saturation.requests import Accounting
from clockwork_serve.errors import ClockworkError
from clockwork_serve.messages import Answer, Outcome, Question, Release, Request
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.controller_link import GatewayLink, LinkListener, local_connector
from clockwork_serve.serve.gateway.requests import Slot, Slots
from clockwork_serve.store import ServedVersion
from clockwork_serve.telemetry import Counters
from clockwork_serve.units import MIB, NS_PER_S, ms

NAME: Final = "gateway-0"
READY_S, POLL_S, ANSWER_S = 30.0, 0.001, 5.0
RETRY_S: Final = 0.001
"""A client that was told no waits so long, as the simulated ones do."""
CHECK_EVERY: Final = 8
"""Every so many good answers, one is compared."""

Choose = Callable[[int], str]
"""The key of the model that a client, by its number, asks next."""
Check = Callable[[str, Floats], float]
"""The error of an answer of a model."""


@dataclass(slots=True)
class Told:
    """The result of an interval: accounting of requests that began in it, latencies of good ones, errors."""

    seconds: float
    accounting: Accounting = field(default_factory=Accounting)
    latencies_ns: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    @property
    def good_rps(self) -> float:
        """Good answers a second."""
        return self.accounting.good / self.seconds


@dataclass(slots=True)
class Client:
    """One client: the room for its tensors, and what it asked last."""

    number: int
    slot: Slot
    encoded: bytes
    model: str = ""
    arrival_ns: int = 0
    slo_ns: int = 0


class Clients:
    """A gateway without a port. All methods are for the running loop's own thread."""

    def __init__(self, socket: Path, count: int, served: ServedVersion, rows: Floats) -> None:
        spec = served.code.inputs[0]
        inputs = [InputTensor(spec.name, "FP32", rows.shape, rows.tobytes())]
        room = served.model.output_bytes
        self._loop = asyncio.get_running_loop()
        self._slots = Slots(2 * MIB + 2 * count * (rows.nbytes + room + 4096))
        self._count = count
        self._quiet = asyncio.Event()  # set when no client has anything more to wait for
        self._idle: list[Client] = []
        for number in range(count):
            slot = self._slots.fill(inputs, room)
            if slot is None:
                raise ClockworkError(f"no memory for the tensors of {count} clients")
            self._idle.append(Client(number, slot, slot.encoded))
        self._output = served.code.outputs[0].name
        self._open: dict[str, Client] = {}  # by request: all and only clients that wait for an answer
        self._held: dict[str, Client] = {}  # clients whose memory a worker may still touch
        self._told = Told(1.0)
        self._choose: Choose = lambda number: ""
        self._check: Check | None = None
        self._slo_ns = 0
        self._counts_ns = self._ends_ns = 0  # requests that begin between the two count; then none begins
        self._sent = self._compared = 0
        self._lost = ""
        listener = LinkListener(self._on_answer, self._on_release, self._on_lost, lambda: None)
        self._link = GatewayLink(local_connector(socket, NAME), None, listener)
        self._running = self._loop.create_task(self._link.run())

    async def ready(self) -> None:
        """Return once the controller takes requests of this gateway. Raises :class:`ClockworkError`."""
        end_s = time.monotonic() + READY_S
        while not self._link.ready:
            if time.monotonic() > end_s:
                raise ClockworkError(f"no link to the controller: {self._link.why_not_ready}")
            await asyncio.sleep(POLL_S)

    async def ask(
        self,
        choose: Choose,
        slo_ms: float,
        seconds: float,
        *,
        warm_s: float = 0.0,
        check: Check | None = None,
    ) -> Told:
        """All clients ask for so long after ``warm_s``; what came. Raises :class:`ClockworkError`."""
        self._told = told = Told(seconds)
        self._choose, self._check, self._slo_ns = choose, check, ms(slo_ms)
        self._counts_ns = time.monotonic_ns() + round(warm_s * NS_PER_S)
        self._ends_ns = self._counts_ns + round(seconds * NS_PER_S)
        self._quiet.clear()
        starting, self._idle = self._idle, []
        for client in starting:
            self._send(client)
        await asyncio.sleep(warm_s + seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), ANSWER_S)
        if self._lost:
            raise ClockworkError(f"the controller: {self._lost}")
        told.accounting.unanswered += len(self._open)
        return told

    async def numbers(self, device: str) -> dict[str, int]:
        """What the worker's device last said of itself. Raises :class:`ClockworkError` if nobody answers."""
        reply = await self._link.ask(Question.METRICS, b"{}", ANSWER_S)
        if not reply.ok:
            raise ClockworkError(f"the controller: {reply.body.decode(errors='replace')}")
        counted = msgspec.json.decode(reply.body, type=Counters, strict=False).devices.get(device)
        return {} if counted is None else counted.numbers

    async def close(self) -> None:
        """Let go of the controller and of the tensors' memory."""
        self._running.cancel()
        await asyncio.wait({self._running})
        self._link.close()
        self._slots.close()

    def _send(self, client: Client) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._ends_ns or self._lost:
            self._idle.append(client)
            if len(self._idle) == self._count:
                self._quiet.set()
            return
        self._sent += 1
        client.model, client.arrival_ns, client.slo_ns = self._choose(client.number), now_ns, self._slo_ns
        request_id = f"{NAME}-{self._sent}"
        self._open[request_id] = client
        if now_ns >= self._counts_ns:
            self._told.accounting.offered += 1
        self._link.send(
            Request(
                request_id=request_id, gateway=NAME, model=client.model, arrival_ns=now_ns,
                deadline_ns=now_ns + client.slo_ns, tensors=client.encoded,
            )
        )  # fmt: skip

    def _on_answer(self, answer: Answer) -> None:
        client = self._open.pop(answer.request_id, None)
        if client is None:
            self._told.accounting.twice += 1
            return
        took_ns = time.monotonic_ns() - client.arrival_ns
        self._link.note_delivered(answer.request_id, in_time=took_ns <= client.slo_ns)
        if client.arrival_ns >= self._counts_ns:
            self._enter(answer, client, took_ns)
        if answer.release:
            self._next(client, told_no=answer.outcome is not Outcome.OK)
        else:
            self._held[answer.request_id] = client

    def _enter(self, answer: Answer, client: Client, took_ns: int) -> None:
        accounting = self._told.accounting
        match answer.outcome:
            case Outcome.OK if took_ns <= client.slo_ns:
                accounting.good += 1
                self._told.latencies_ns.append(took_ns)
                self._compare(answer, client)
            case Outcome.OK | Outcome.EXPIRED:
                accounting.late += 1
            case Outcome.REJECTED:
                accounting.rejected += 1
            case _:
                accounting.failed += 1

    def _compare(self, answer: Answer, client: Client) -> None:
        self._compared += 1
        if self._check is None or self._compared % CHECK_EVERY:
            return
        for tensor in client.slot.outputs(answer.outputs)[0]:
            if tensor.name == self._output:
                found = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
                self._told.errors.append(self._check(client.model, found))

    def _next(self, client: Client, *, told_no: bool) -> None:
        if told_no:
            self._loop.call_later(RETRY_S, self._send, client)
        else:
            self._send(client)

    def _on_release(self, release: Release) -> None:
        client = self._held.pop(release.request_id, None)
        if client is not None:
            self._next(client, told_no=True)

    def _on_lost(self, why: str) -> None:
        self._lost = why
        self._quiet.set()
