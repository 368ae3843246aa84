"""Clients with a timeout: each sends one request, and disconnects at the timeout; over HTTP or gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

CHANNELS: Final = 4
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
