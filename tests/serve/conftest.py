"""A gateway that the HTTP tests of a module share, whole and empty before and after each."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.http

from clockwork_serve.units import MIB
from tests.serve.gateway.running import RunningGateway, running_gateway


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    limits = {"head_s": 1.0, "body_s": 1.0, "bytes_per_s": 64 * MIB, "max_head": 8192}
    with running_gateway(tmp_path_factory.mktemp("gateway"), metrics_port=0, **limits) as found:
        yield found
    gc.collect()  # what stock clients left, in their own thread


@pytest.fixture
def gateway(shared: RunningGateway) -> Iterator[RunningGateway]:
    controller = shared.controller
    controller.on_request = controller.echo
    controller.requests.clear()
    controller.cancels.clear()
    controller.asks.clear()
    yield shared
    # Whatever a test did, nothing stays behind.
    controller.on_request = controller.echo
    shared.until(lambda: shared.servers.gateway.slots.used_bytes == 0)
    shared.servers.gateway.slots.region.check()


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Any]:
    found = tritonclient.http.InferenceServerClient(gateway.http_url)
    yield found
    found.close()
