"""The asynchronous client, on both event loops: the same answers, many at once, calls that are cancelled."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import uvloop

from clockwork_client import AsyncClient, Denied, Disconnected, Expired, Failed, Invalid, NotServing, Rejected
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.units import ms
from tests.client.arrays import ARRAYS
from tests.client.scripted import OK, request, scripted

X = np.array([[1.5, -2.0]], np.float32)
Run = Callable[[Any], Any]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


@pytest.fixture
def ask(run, gateway):
    """Runs a coroutine function with a client of the gateway."""

    def asked(work, **settings):
        async def main():
            async with AsyncClient(gateway.http_url, **settings) as client:
                return await work(client)

        return run(main())

    return asked


def end(gateway, outcome=Outcome.CANCELLED):
    """Have the controller end what it holds."""
    for sent in gateway.controller.requests:
        gateway.do(
            lambda sent=sent: gateway.controller.send(gateway.controller.answer(sent, outcome=outcome))
        )


def test_every_datatype_goes_and_comes(ask):
    async def work(client):
        return {name: (await client.infer(f"echo_{name}", {"x": x}))["y"] for name, x in ARRAYS.items()}

    for name, found in ask(work).items():
        assert found.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(found, ARRAYS[name])


@pytest.mark.parametrize("count", [20_000, 900_000])
def test_a_large_tensor_goes_and_comes(ask, count):
    x = np.arange(count, dtype=np.float32).reshape(1, count)

    async def work(client):
        return [(await client.infer("echo_FP32", {"x": x}))["y"] for _ in range(2)]

    for found in ask(work):
        np.testing.assert_array_equal(found, x)


def test_many_at_once_share_the_connections(ask, gateway):
    async def work(client):
        async def one(number):
            return (await client.infer("ident", {"X": np.full((1, 2), number, np.float32)}))["Y"][0, 0]

        found = await asyncio.gather(*map(one, range(300)))
        return found, gateway.do(lambda: gateway.servers.gateway.connections)

    found, connections = ask(work, connections=7)
    assert found == list(range(300))
    assert connections == 7


def test_everything_beside_inference(ask):
    async def work(client):
        assert await client.live()
        assert await client.ready()
        assert await client.model_ready("ident")
        assert not await client.model_ready("nope")
        assert (await client.metadata()).name == "clockwork-serve"
        assert (await client.model_metadata("ident")).outputs[0].name == "Y"
        assert [each.name for each in await client.models()] == ["ident"]
        assert [each.name for each in await client.statistics("ident")] == ["ident"]
        await client.load("ident")
        await client.unload("ident")
        await client.model_metadata("ident")
        with pytest.raises(Invalid, match="unexpected input"):
            await client.infer("ident", {"Z": X})

    ask(work)


def test_a_call_that_is_cancelled_is_cancelled_on_the_server(ask, gateway):
    gateway.controller.on_request = lambda request: None

    async def work(client):
        call = asyncio.create_task(client.infer("ident", {"X": X}, slo_ms=20_000))
        await asyncio.to_thread(gateway.until, lambda: gateway.controller.requests)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(gateway.until, lambda: gateway.controller.cancels)
        # The client itself is as good as before, and its other calls were not touched.
        gateway.controller.on_request = gateway.controller.echo
        assert (await client.infer("ident", {"X": X}))["Y"].shape == (1, 2)

    ask(work, connections=1)
    first, second = gateway.controller.requests
    assert [cancel.request_id for cancel in gateway.controller.cancels] == [first.request_id]
    assert second.model == "ident/1"
    gateway.do(lambda: gateway.controller.send(gateway.controller.answer(first, outcome=Outcome.CANCELLED)))


def test_closing_ends_what_is_in_flight(run, gateway):
    gateway.controller.on_request = lambda request: None

    async def main():
        client = AsyncClient(gateway.http_url)
        call = asyncio.create_task(client.infer("ident", {"X": X}, slo_ms=20_000))
        await asyncio.to_thread(gateway.until, lambda: gateway.controller.requests)
        await client.close()
        with pytest.raises(Disconnected):
            await call
        with pytest.raises(RuntimeError, match="closed"):
            await client.live()

    run(main())
    gateway.until(lambda: gateway.controller.cancels)
    end(gateway)
    gc.collect()  # nothing is left for the collector to warn of


def test_the_slo_bounds_the_wait(ask, gateway):
    gateway.controller.on_request = lambda request: None

    async def work(client):
        with pytest.raises(Expired) as caught:
            await client.infer("ident", {"X": X}, slo_ms=2000)
        return caught.value.status

    assert ask(work, grace_s=0.0) == 0
    assert ms(50) < gateway.controller.requests[0].deadline_ns - gateway.controller.requests[0].arrival_ns
    gateway.until(lambda: gateway.controller.cancels)
    end(gateway)


def test_a_place_in_line_is_waited_for_no_longer_than_the_deadline(ask, gateway):
    gateway.controller.on_request = lambda request: None

    async def work(client):
        first = asyncio.create_task(client.infer("ident", {"X": X}, slo_ms=20_000))
        await asyncio.to_thread(gateway.until, lambda: gateway.controller.requests)
        with pytest.raises(Expired):
            await client.infer("ident", {"X": X}, slo_ms=20)
        first.cancel()

    ask(work, connections=1)
    assert len(gateway.controller.requests) == 1
    gateway.until(lambda: gateway.controller.cancels)
    end(gateway)


@pytest.mark.parametrize(
    ("outcome", "kind"), [(Outcome.REJECTED, Rejected), (Outcome.EXPIRED, Expired), (Outcome.FAILED, Failed)]
)
def test_each_outcome_is_an_exception(ask, gateway, outcome, kind):
    controller = gateway.controller
    controller.on_request = lambda request: controller.answer(request, outcome=outcome, message="so it is")

    async def work(client):
        with pytest.raises(kind, match="so it is"):
            await client.infer("ident", {"X": X})

    ask(work)


def test_it_comes_back_when_the_server_said(ask, gateway):
    controller, at_ns = gateway.controller, []

    def answer(request):
        at_ns.append(time.monotonic_ns())
        if len(at_ns) == 2:
            return controller.echo(request)
        return controller.answer(
            request, outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL, retry_after_ns=ms(30)
        )

    controller.on_request = answer

    async def work(client):
        return await client.infer("ident", {"X": X}, retries=1)

    assert ask(work)["Y"].shape == (1, 2)
    first_ns, second_ns = at_ns
    assert second_ns - first_ns >= ms(30)


# Connections that end


def test_a_connection_that_the_server_closed_meanwhile_is_not_used(run):
    def once(connection):
        request(connection)
        connection.sendall(OK)

    async def main(url):
        async with AsyncClient(url) as client:
            for _ in range(2):
                assert (await client.metadata()).name == "mock"
                await asyncio.sleep(0.1)

    with scripted(once, once) as url:
        run(main(url))


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"SSH-2.0-nobody\r\n"]
)
def test_a_request_that_was_sent_is_not_sent_again(run, said):
    seen = []

    def break_off(connection):
        seen.append(request(connection))
        connection.sendall(said)

    async def main(url):
        async with AsyncClient(url) as client:
            with pytest.raises(Disconnected):
                await client.metadata()

    with scripted(break_off) as url:
        run(main(url))
    assert len(seen) == 1


def test_a_refused_key_is_denied(run):
    def refuse(connection):
        assert b"Bearer key\r\n" in request(connection)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    async def main(url):
        async with AsyncClient(url, api_key="key") as client:
            with pytest.raises(Denied):
                await client.live()

    with scripted(refuse) as url:
        run(main(url))


def test_nobody_there_is_not_serving(run):
    async def main(url):
        async with AsyncClient(url) as client:
            with pytest.raises(NotServing):
                await client.metadata()
            assert not await client.live()

    with scripted() as url:
        pass
    run(main(url))
