"""A real gateway with a fake controller, for both clients; its models echo one input of each datatype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clockwork_client import Client
from clockwork_serve.messages import DATATYPES
from tests.serve.gateway.fake_controller import served, spec
from tests.serve.gateway.running import RunningGateway, running_gateway


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    echoes = [
        served(
            f"echo_{datatype}", (spec("x", datatype, -1),), (spec("y", datatype, -1),), output_bytes=1 << 22
        )
        for datatype in DATATYPES
    ]
    with running_gateway(tmp_path_factory.mktemp("gateway")) as found:
        frames = [frame for echo in echoes for frame in echo]
        found.do(lambda: (found.controller.catalogue.extend(echoes), found.controller.send(*frames)))
        found.until(lambda: "echo_BYTES" in found.servers.gateway.models.names())
        yield found


@pytest.fixture
def gateway(shared: RunningGateway) -> Iterator[RunningGateway]:
    controller = shared.controller
    controller.on_request = controller.echo
    controller.requests.clear()
    controller.cancels.clear()
    yield shared
    controller.on_request = controller.echo
    # Whatever a test did, nothing stays behind.
    shared.until(lambda: shared.servers.gateway.slots.used_bytes == 0)


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Client]:
    with Client(gateway.http_url) as found:
        yield found
