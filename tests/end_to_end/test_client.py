"""Our own clients and a real server: outcomes, retries, and a place that is free again after a cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import pytest

from clockwork_serve import AsyncClient, Client, Failed, Invalid, Rejected
from harness import repositories
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import LONG, WIDE, product
from tests.timing import Timing

X = {"x": np.zeros((1, 4), np.float32)}
SLOW_MS = 2000


@pytest.fixture(scope="module")
def slow(
    tmp_path_factory: pytest.TempPathFactory, start: Callable[..., AbstractContextManager[Serving]]
) -> Iterator[Serving]:
    """A server with one model that takes two seconds and no core."""
    root = tmp_path_factory.mktemp("slow") / "models"
    repositories.emulated(root, "slow", {1: SLOW_MS})
    with start(root, device="emulated") as serving:
        yield serving


@pytest.fixture
def client(server: Serving) -> Iterator[Client]:
    with Client(server.http_url) as found:
        yield found


def test_answers_are_the_models_own(client: Client) -> None:
    x = np.random.default_rng(5).standard_normal((3, WIDE), dtype=np.float32)
    result = client.infer("m5", {"x": x}, slo_ms=10_000, request_id="five")

    np.testing.assert_allclose(result["y"], product(5, x), rtol=1e-4, atol=1e-5)
    assert result["y"].shape == (3, LONG)
    assert (result.model, result.id) == ("m5", "five")
    assert result.exec_ms is not None
    assert result.exec_ms > 0


def test_texts_go_and_come(client: Client) -> None:
    texts = np.array([["never odd or even"], ["ä"]], object)
    result = client.infer("words", {"text": texts}, outputs=["reversed"], slo_ms=10_000)

    assert list(result.outputs) == ["reversed"]
    assert [each.decode() for each in result["reversed"][:, 0]] == ["neve ro ddo reven", "ä"]


def test_a_model_that_raises_is_failed(client: Client) -> None:
    with pytest.raises(Failed, match="thirteen is not served") as caught:
        client.infer("moody", {"x": np.full((1, 4), 13, np.float32)}, slo_ms=10_000)

    assert caught.value.reason == "model_raised"


def test_models_are_listed_described_loaded_and_unloaded(client: Client) -> None:
    states = {each.name: each.state for each in client.models()}
    assert states["m1"] == "READY"
    assert states["corrupt"] == "UNAVAILABLE"
    assert client.model_metadata("m1").inputs[0].shape == (-1, WIDE)
    client.unload("m29")
    assert not client.model_ready("m29")
    with pytest.raises(Invalid):
        client.infer("m29", {"x": np.zeros((1, WIDE), np.float32)})
    client.load("m29")
    assert client.model_ready("m29")


def test_an_slo_that_cannot_be_met_is_rejected(slow: Serving) -> None:
    with Client(slow.http_url) as client, pytest.raises(Rejected) as caught:
        client.infer("slow", X, slo_ms=0.9 * SLOW_MS)

    assert caught.value.reason == "would_miss_deadline"


def test_who_comes_back_when_told_is_answered(slow: Serving, timing: Timing) -> None:
    """Two that have time for one run each: the second is refused, and served when the first is done."""
    refused_before = total(slow.metrics(), "clockwork_requests_total", outcome="rejected")

    with Client(slow.http_url) as client, ThreadPoolExecutor() as pool:

        def one() -> tuple[int, ...]:
            return client.infer("slow", X, slo_ms=1.6 * SLOW_MS, retries=8, timeout_s=60)["y"].shape

        ends = [pool.submit(one) for _ in range(2)]
        with timing.judged():  # each has 0.6 runs of time to spare
            assert [end.result() for end in ends] == [(1, 4), (1, 4)]
    assert total(slow.metrics(), "clockwork_requests_total", outcome="rejected") > refused_before


def test_a_cancelled_call_frees_its_place(slow: Serving) -> None:
    def counted(outcome: str) -> float:
        return total(slow.metrics(), "clockwork_requests_total", outcome=outcome)

    before = counted("cancelled")
    received = total(slow.metrics(), "clockwork_requests_received_total")

    async def leave() -> None:
        async with AsyncClient(slow.http_url) as client:
            calls = [asyncio.create_task(client.infer("slow", X, slo_ms=20_000)) for _ in range(4)]
            while total(slow.metrics(), "clockwork_requests_received_total") < received + 4:
                await asyncio.sleep(0.01)
            for call in calls[1:]:
                call.cancel()
            assert (await calls[0])["y"].shape == (1, 4)
            ends = await asyncio.gather(*calls[1:], return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError] * 3

    asyncio.run(leave())
    until("the server counts them", lambda: counted("cancelled") == before + 3)
    assert total(slow.metrics(), "clockwork_requests_open") == 0
    with Client(slow.http_url) as client:
        # Nothing of theirs is in the way: there is time for one run, not for two.
        assert client.infer("slow", X, slo_ms=1.9 * SLOW_MS)["y"].shape == (1, 4)
