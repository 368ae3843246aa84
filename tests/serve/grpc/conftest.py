"""A gateway that the tests of a module share, and what asks it over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import tritonclient.grpc

from tests.serve.gateway.running import RunningGateway, running_gateway


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_port=0) as found:
        yield found


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Any]:
    found = tritonclient.grpc.InferenceServerClient(gateway.grpc_url)
    yield found
    found.close()


@pytest.fixture
def channel(gateway: RunningGateway) -> Iterator[Any]:
    with grpc.insecure_channel(gateway.grpc_url) as found:
        yield found
