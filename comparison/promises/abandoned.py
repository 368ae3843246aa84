"""Clients that disconnect: whether the device still runs their requests.

Each client sends one request and disconnects at its timeout, over HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest
from comparison.peers.loads import EMULATED, names
from comparison.peers.measure import Serving
from comparison.peers.peer import HOST, Floats
from comparison.peers.record import NS_PER_MS
from comparison.promises.question import Figures, Question, Row, Runs, at_most, column
from comparison.promises.rejections import message
from comparison.promises.rig import NUMBERED, Rig, executions, log_of, numbered, started
from harness.http_load import poisson

MODELS: Final = 15
SLO_MS: Final = 1000
"""Long, so that many requests wait when half of it is over."""
RATE: Final = 200
"""About twice what the device can do."""
SECONDS: Final = 20
SLACK_NS: Final = 20_000_000
CHANNELS: Final = 4
METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"
GRACE_S: Final = 3.0
"""After the last one: what the server still does, it has done by then."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, due ``at_ns`` after the start."""

    number: int
    at_ns: int
    message: bytes


@dataclass(slots=True)
class End:
    """What became of one; instants of CLOCK_MONOTONIC, 0 is never."""

    number: int
    sent_ns: int = 0
    hung_ns: int = 0
    done_ns: int = 0
    status: str = ""


Send = Callable[[Ask, End], Coroutine[Any, Any, None]]


async def all_of(asks: Sequence[Ask], patience_s: float, send: Send) -> list[End]:
    """Send each at its instant, give it so long, hang up."""
    start_ns = time.monotonic_ns()
    ends = []
    async with asyncio.TaskGroup() as group:
        for ask in asks:
            await asyncio.sleep(max(0.0, (start_ns + ask.at_ns - time.monotonic_ns()) / 1e9))
            ends.append(End(ask.number))
            group.create_task(_one(ask, ends[-1], patience_s, send))
    await asyncio.sleep(GRACE_S)
    return ends


async def _one(ask: Ask, end: End, patience_s: float, send: Send) -> None:
    try:
        # The time-out cancels what is sent; the transport is closed, or the call reset, within that.
        async with asyncio.timeout(patience_s):
            await send(ask, end)
    except TimeoutError:
        end.status = "hung up"
    except OSError as error:
        end.status = repr(error)


def over_http(host: str, port: int) -> Send:
    """A connection for each, which is closed with it."""

    async def send(ask: Ask, end: End) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            end.sent_ns = time.monotonic_ns()
            writer.write(ask.message)
            line = await reader.readline()
            end.done_ns, end.status = time.monotonic_ns(), line.split()[1].decode() if line else "closed"
        finally:
            writer.close()
            if not end.done_ns:
                end.hung_ns = time.monotonic_ns()

    return send


async def grpc_all(target: str, method: str, asks: Sequence[Ask], patience_s: float) -> list[End]:
    """The same over gRPC: a call that is given up is reset (RST_STREAM)."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(CHANNELS)]
    calls = [channel.unary_unary(method) for channel in channels]

    async def send(ask: Ask, end: End) -> None:
        end.sent_ns = time.monotonic_ns()
        call = calls[ask.number % CHANNELS](ask.message)
        try:
            with suppress(grpc.aio.AioRpcError):
                await call
            end.done_ns, end.status = time.monotonic_ns(), (await call.code()).name
        finally:
            call.cancel()
            if not end.done_ns:
                end.hung_ns = time.monotonic_ns()

    try:
        return await all_of(asks, patience_s, send)
    finally:
        for channel in channels:
            await channel.close()


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """``http``: sockets are closed; ``grpc``: calls are reset."""
    with rig.serving(EMULATED, names(MODELS), asked=NUMBERED) as up:
        asks = _asks(up, variant, repeat)
        log = log_of(up.setup)
        log.write_text("")
        patience_s = SLO_MS / 2e3
        with up.metered():
            if variant == "http":
                send = over_http(HOST, up.setup.port)
                ends = asyncio.run(all_of(asks, patience_s, send))
            else:
                ends = asyncio.run(grpc_all(up.grpc, METHOD, asks, patience_s))
        ran = executions(log.read_text().splitlines())
    return {**up.used, "rate_rps": RATE, **told(ends, started(ran))}


def _asks(up: Serving, variant: str, repeat: int) -> list[Ask]:
    rng, names = random.Random(repeat), up.setup.names
    found = []
    for number, at_ns in enumerate(poisson(RATE, SECONDS, rng)):
        model = names[rng.randrange(MODELS)]
        if variant == "http":
            sent = message(up, model, number, SLO_MS)
        else:
            sent = grpc_message(model, numbered(up.x, number))
        found.append(Ask(number, at_ns, sent))
    return found


def grpc_message(model: str, x: Floats) -> bytes:
    """One row, as a raw tensor."""
    message = ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[1, *x.shape[1:]])
    message.parameters["slo_ms"].int64_param = SLO_MS
    return bytes(message.SerializeToString())


def told(ends: Sequence[End], began_ns: Mapping[int, int]) -> Figures:
    """Of those who hung up: whose execution began afterwards, and how long afterwards."""
    hung = [end for end in ends if end.hung_ns]
    after_ns = [began_ns[end.number] - end.hung_ns for end in hung if end.number in began_ns]
    return {
        "asked": len(ends), "hung_up": len(hung), "ends": Counter(end.status for end in ends),
        "answered_and_ran": sum(not end.hung_ns and end.number in began_ns for end in ends),
        "began_before": sum(one <= 0 for one in after_ns),
        "began_soon_after": sum(0 < one <= SLACK_NS for one in after_ns),
        "began_long_after": sum(one > SLACK_NS for one in after_ns),
        "latest_ms": max((one for one in after_ns if one > 0), default=0) / NS_PER_MS,
        "hung_late_ms": max((end.hung_ns - end.sent_ns for end in hung), default=0) / NS_PER_MS - SLO_MS / 2,
    }  # fmt: skip


def rows(runs: Runs) -> list[Row]:
    """None should be begun so late."""
    found = []
    for variant, title in (("http", "HTTP, socket closed"), ("grpc", "gRPC, call reset")):
        found += [
            Row(f"{title}: executions begun more than 20 ms after the client hung up",
                column(runs, variant, "began_long_after"), "{:.0f}", at_most(0, every=True)),
            Row(f"{title}: begun within 20 ms after", column(runs, variant, "began_soon_after"), "{:.0f}"),
            Row(f"{title}: the latest, after", column(runs, variant, "latest_ms"), "{:.1f} ms"),
            Row(f"{title}: the client was late, at most", column(runs, variant, "hung_late_ms"), "{:.1f} ms"),
            Row(f"{title}: clients that hung up", column(runs, variant, "hung_up"), "{:.0f}"),
        ]  # fmt: skip
    return found


QUESTION: Final = Question(
    "abandoned", "Clients that hang up at half of the SLO", ("http", "grpc"), measure, rows
)
