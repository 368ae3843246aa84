"""Whether a worker gets tensors from a gateway: tried, reported, and tried again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from msgspec import structs

from clockwork_serve.config import CLUSTER_NAME
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Status, TensorsOffered, TensorsReached
from clockwork_serve.serve.remote.config import ClusterContext, ClusterFiles, refused_by_itself
from clockwork_serve.serve.remote.tensor_server import TensorServer
from harness.ports import free_port
from tests.serve.certificates import certificates
from tests.serve.links import until
from tests.serve.proxy import Proxy, proxy
from tests.serve.remote.machine_links import ours
from tests.serve.remote.tensor_ends import Gateway, Worker, ends, over

GATEWAY = "b.gateway-0"
YES = TensorsReached(gateway=GATEWAY, ok=True)


def offer(server: str) -> TensorsOffered:
    return TensorsOffered(gateway=GATEWAY, server=server)


async def told(worker: Worker) -> TensorsReached:
    """What it reports next."""
    await until(lambda: worker.reached)
    return worker.reached.pop(0)


@asynccontextmanager
async def reached_by_proxy(folder: Path) -> AsyncIterator[tuple[Gateway, Worker, Proxy]]:
    """A worker that reaches a gateway, and what is between them."""
    async with ends(folder, silence_s=0.5) as (gateway, worker):
        with proxy(gateway.port) as between:
            gateway.slots.server = f"127.0.0.1:{between.port}"
            worker.tensors.offered(offer(gateway.slots.server))
            assert await told(worker) == YES
            yield gateway, worker, between


async def test_a_gateway_is_reached_once_it_has_answered_and_said_again_to_the_next_leader(
    tmp_path: Path,
) -> None:
    async with ends(tmp_path) as (gateway, worker):
        worker.tensors.offered(offer(gateway.slots.server))
        assert await told(worker) == YES
        worker.tensors.renew()
        worker.tensors.offered(offer(gateway.slots.server))
        assert await told(worker) == YES
        worker.tensors.offered(offer(""))
        gateway.server.close()
        await until(lambda: not worker.tensors._sources)
        assert not worker.reached, "it is gone, and nobody waits for it"


async def test_a_gateway_that_nobody_reaches_is_tried_until_it_is_reached(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        port = gateway.port
        gateway.server.close()
        worker.tensors.offered(offer(gateway.slots.server))
        found = await told(worker)
        assert (found.ok, found.gateway) == (False, GATEWAY)
        assert f"cannot connect to 127.0.0.1:{port}" in found.why
        again = TensorServer(gateway.slots, ClusterContext(ours(certificates(tmp_path)), server=True), 10.0)
        again.listen_at("127.0.0.1", port)
        assert await told(worker) == YES
        again.close()


async def test_a_short_cut_is_not_reported_and_a_long_one_is_and_ends_what_waits(tmp_path: Path) -> None:
    async with reached_by_proxy(tmp_path) as (gateway, worker, between):
        between.reset()
        assert await told(worker) == YES, "by the next connection"
        between.target = free_port()
        between.reset()
        assert worker.tensors.bring(over(1, gateway.ask(b"x")))
        found = await told(worker)
        assert not found.ok
        result = await worker.result()
        assert result.status is Status.INPUT_GONE
        assert result.message == found.why
        between.target = gateway.port
        assert await told(worker) == YES


async def test_a_cut_is_found_though_nothing_is_asked_for(tmp_path: Path) -> None:
    async with reached_by_proxy(tmp_path) as (_, worker, between):
        between.cut()
        assert not (await told(worker)).ok
        between.heal()
        assert await told(worker) == YES


async def test_a_gateway_of_the_worker_s_own_host_needs_no_trial(tmp_path: Path) -> None:
    async with ends(tmp_path, server="") as (_, worker):
        worker.tensors.offered(offer(":7001"))
        assert worker.reached == [YES]
        assert not worker.tensors._sources


# Certificates that others will not accept, by those who show them


def issued(folder: Path, authority: trustme.CA, leaf: trustme.LeafCert) -> ClusterFiles:
    found = ClusterFiles(
        certificate=f"{folder}/leaf.pem", key=f"{folder}/leaf.key", ca=f"{folder}/authority.pem"
    )
    authority.cert_pem.write_to_path(found.ca)
    leaf.private_key_pem.write_to_path(found.key)
    leaf.cert_chain_pems[0].write_to_path(found.certificate)
    return found


def test_a_certificate_is_refused_by_its_own_machine_as_by_others(tmp_path: Path) -> None:
    ours, strange = trustme.CA(), trustme.CA()
    good = issued(tmp_path, ours, ours.issue_cert(CLUSTER_NAME))
    assert refused_by_itself(good) == ""
    good.check("a worker")
    other = structs.replace(good, name="clockwork.internal")
    assert "not valid for 'clockwork.internal'" in refused_by_itself(other)
    with pytest.raises(ConfigError, match=r"expected one that names clockwork\.internal.*--cluster-name"):
        other.check("a worker")
    by_another = issued(tmp_path, ours, strange.issue_cert(CLUSTER_NAME))
    assert "unable to get local issuer" in refused_by_itself(by_another)
    by_another.check("a worker")  # its authority may be the one that is to be replaced
