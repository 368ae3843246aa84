"""Shared memory of clients through a real server of two gateways, over both protocols."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from harness.serving import Serving, until
from tests.end_to_end.conftest import LONG, WIDE, call, product
from tests.serve.segments import PREFIX, Segment, segment

# The stock client's destructor stumbles when the collector happens to run it in another thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")

X = np.random.default_rng(1).random((1, WIDE), np.float32)
Y_BYTES = LONG * 4
Y_AT = 1024
SLO = {"slo_ms": 10_000}
TURNS = 20  # connections, of which each gateway gets some


@pytest.fixture(scope="module")
def server(repository: Path, start: Callable[..., AbstractContextManager[Serving]]) -> Iterator[Serving]:
    with start(repository, gateways=2, shared_memory=PREFIX) as serving:
        yield serving


@pytest.fixture(params=["http", "grpc"])
def kind(request: pytest.FixtureRequest) -> Any:
    return {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]


@pytest.fixture
def shared() -> Iterator[Segment]:
    with segment(4096, X.tobytes()) as found:
        yield found


def connect(server: Serving, kind: Any) -> Any:
    if kind is tritonclient.http:
        return kind.InferenceServerClient(server.http_url.removeprefix("http://"))
    # Else all clients of one process share one connection.
    return kind.InferenceServerClient(server.grpc_url, channel_args=[("grpc.use_local_subchannel_pool", 1)])


def infer(client: Any, kind: Any, shared: Segment) -> bool:
    """Ask matrix 3 through shared memory; whether its answer is there."""
    there, wanted = kind.InferInput("x", [1, WIDE], "FP32"), kind.InferRequestedOutput("y")
    there.set_shared_memory("r", X.nbytes)
    wanted.set_shared_memory("r", Y_BYTES, Y_AT)
    shared.write(bytes(Y_BYTES), Y_AT)
    client.infer("m3", [there], outputs=[wanted], parameters=SLO)
    found = np.frombuffer(shared.read(Y_BYTES, Y_AT), np.float32)
    return len(found) == LONG and bool(np.allclose(found, product(3, X)[0], rtol=1e-5))


def test_a_region_registered_at_one_gateway_is_there_at_all(
    server: Serving, kind: Any, shared: Segment
) -> None:
    with connect(server, kind) as client:
        client.unregister_system_shared_memory()
        client.register_system_shared_memory("r", shared.key, 4096)
    for _ in range(TURNS):
        with connect(server, kind) as client:
            assert infer(client, kind, shared)
            status = client.get_system_shared_memory_status("r")
            assert len(status if kind is tritonclient.http else status.regions) == 1
    with connect(server, kind) as client:
        client.unregister_system_shared_memory("r")
    for _ in range(TURNS):
        with (
            connect(server, kind) as client,
            pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'r'"),
        ):
            infer(client, kind, shared)


def test_a_gateway_that_starts_again_knows_the_regions(server: Serving, shared: Segment) -> None:
    kind = tritonclient.http
    with connect(server, kind) as client:
        client.unregister_system_shared_memory()
        client.register_system_shared_memory("r", shared.key, 4096)
    before = server.server.pid("gateway-1")
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until("it runs again", lambda: server.server.pid("gateway-1") not in (None, before))
    server.server.wait_ready(30)
    for _ in range(TURNS):
        with connect(server, kind) as client:
            assert infer(client, kind, shared)


@pytest.mark.timeout(90)
def test_a_client_that_truncates_its_memory_ends_no_process(server: Serving, kind: Any) -> None:
    pids = server.pids()
    stop = threading.Event()
    with segment(4096, X.tobytes()) as moving, connect(server, kind) as client:
        client.unregister_system_shared_memory()
        client.register_system_shared_memory("r", moving.key, 4096)

        def shrink_and_grow() -> None:
            while not stop.is_set():
                moving.resize(0)
                moving.resize(4096)

        mover = threading.Thread(target=shrink_and_grow)
        mover.start()
        refused = 0
        try:
            for count in range(20_000):
                # On a busy machine the two may long take turns, and neither ever find the other at work.
                if count >= 300 and refused:
                    break
                try:
                    infer(client, kind, moving)
                except InferenceServerException as error:
                    assert "400" in error.status() or "INVALID_ARGUMENT" in error.status()  # noqa: PT017
                    refused += 1
        finally:
            stop.set()
            mover.join()
        assert refused > 0
        moving.write(X.tobytes())
        assert infer(client, kind, moving)
    assert server.pids() == pids


def test_the_setting_reaches_the_gateways(server: Serving) -> None:
    assert "system_shared_memory" in call(server.http_url, "/v2").json["extensions"]
