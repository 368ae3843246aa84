"""The load that asks gRPC servers, on one of ours."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from clockwork_serve.serve.grpc.server import GrpcServer, callback
from harness.grpc_load import Load


@pytest.fixture
def port() -> Iterator[int]:
    loop = asyncio.new_event_loop()

    async def start() -> tuple[GrpcServer, int]:
        server = GrpcServer([callback("/t/echo", bytes, lambda call, request: call.reply(request))], [])
        return server, await server.listen("127.0.0.1:0")

    server, found = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield found
    asyncio.run_coroutine_threadsafe(server.close(0), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()


@pytest.mark.parametrize("size", [0, 1000, 40_000])
def test_calls_are_asked_and_answered(port: int, size: int) -> None:
    load = Load(port, "/t/echo", bytes(size), [1, 1])
    load.run(0.3)
    load.close()
    assert load.done > 10
    assert load.failed == 0


def test_an_error_is_no_answer(port: int) -> None:
    load = Load(port, "/t/nothing", b"x", [3])
    load.run(0.3)
    load.close()
    assert load.failed == load.done > 10
