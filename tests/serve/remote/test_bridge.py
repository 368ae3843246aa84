"""The bridge between a controller and machines that are not all as they should be."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve.messages import (
    AdmissionQuery,
    AdmissionReply,
    Answer,
    Ask,
    Cancel,
    FarGateway,
    Frame,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Question,
    Readiness,
    Release,
    Request,
    Result,
    Role,
    Status,
    TensorRef,
    Tensors,
    WorkerJoined,
)
from clockwork_serve.serve.remote.bridge import judge_of
from clockwork_serve.serve.remote.config import FAR_NAME
from clockwork_serve.serve.remote.tensor_link import encode
from tests.serve.certificates import certificates
from tests.serve.links import Side, until
from tests.serve.remote.bridges import GATEWAY, GUEST, MACHINE, MODEL, NAME, READY, joining, middle
from tests.serve.remote.machine_links import connect, theirs

OWN_ID, OWN_HEAD, FOREIGN_ID = f"{GATEWAY}-1a-7", f"{GATEWAY}-1a-a3", "beta.gateway-0-1a-7"
X = TensorRef(name="x", datatype="UINT8", shape=(1, 3), offset=0, nbytes=3)


async def test_a_far_worker_is_to_the_controller_a_worker_here(tmp_path: Path) -> None:
    async with middle(tmp_path) as at:
        far = await at.machine(MACHINE, joining(NAME))
        inside = await at.controller.linked()
        told = await at.controller.hear(WorkerJoined)
        assert (inside.peer.role, inside.peer.name, told.worker) == (
            Role.WORKER, f"worker-{NAME}", f"worker-{NAME}",
        )  # fmt: skip
        await until(lambda: ModelAdded(model=MODEL) in far.side.frames)
        far.link.close()
        await until(at.controller.lost.is_set)
        assert not at.bridge._peers


async def test_nothing_of_a_controller_that_was_deposed_reaches_another_machine(tmp_path: Path) -> None:
    async with middle(tmp_path) as at:
        for epoch in (2, 1):
            at.controller.close()
            await until(lambda: not at.bridge._complete)
            at.controller.epoch = epoch
            await at.controller.open()
            await at.controller.linked()
            at.controller.send(READY)
            await until(lambda: at.bridge._complete) if epoch == 2 else await asyncio.sleep(0.2)
        far = await at.machine(MACHINE, joining(NAME))
        assert (await far.refusal()).why == "the server has no controller now"
        assert at.controller.heard.empty()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"runtime": {"cpu": "other"}}, "cpu: expected what the server's models were compiled for"),
        ({"runtime": {}}, "cpu good here, None there"),
        ({"kinds": ("cuda:sm_90",)}, "device: expected one of kind toy"),
    ],
)
async def test_who_does_not_fit_is_told_why_for_good(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    async with middle(tmp_path) as at:
        far = await at.machine(msgspec.structs.replace(MACHINE, **changed))
        refused = await far.refusal()
        assert why in refused.why
        assert refused.final


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("cpu:0", Role.WORKER), ("gateway-0", Role.WORKER), (GATEWAY, Role.WORKER), (NAME, Role.GATEWAY),
        ("gateway-0", Role.GATEWAY), ("bridge", Role.GATEWAY), ("alpha.gateway-100", Role.GATEWAY),
        (NAME, Role.SUPERVISOR), (GATEWAY, Role.CONTROLLER),
    ],
)  # fmt: skip
async def test_nobody_from_elsewhere_passes_for_a_process_of_the_server(
    tmp_path: Path, name: str, role: Role
) -> None:
    async with middle(tmp_path) as at:
        far = await at.machine(name=name, role=role)
        refused = await far.refusal()
        assert "expected a worker that is called NAME.DEVICE:NUMBER" in refused.why
        assert refused.final


def test_no_local_worker_has_a_name_that_a_far_one_may_have() -> None:
    for local in ("cpu:0", "torch-cpu:1", "cuda:0", "emulated:0", "emulated"):
        assert FAR_NAME.fullmatch(local) is None
    assert FAR_NAME.fullmatch(NAME)
    assert FAR_NAME.fullmatch("../etc.cpu:0") is None


async def test_without_a_controller_one_is_to_come_again(tmp_path: Path) -> None:
    async with middle(tmp_path, ready=False) as at:
        refused = await (await at.machine(MACHINE)).refusal()
        assert not refused.final


async def test_a_name_that_is_taken_is_to_be_tried_again_but_its_own_process_takes_over(
    tmp_path: Path,
) -> None:
    async with middle(tmp_path) as at:
        first = await at.joined()
        other = await at.machine(MACHINE)
        refused = await other.refusal()
        assert "another worker of this server is called alpha.cpu:0" in refused.why
        assert not refused.final
        files = theirs(certificates(tmp_path))
        again = await connect(Side(), at.port, files, name=NAME, pid=first.link.own.pid)
        again.send(MACHINE)
        await until(lambda: first.side.lost)
        assert again.is_open


@pytest.mark.parametrize(
    "frame",
    [
        joining("cpu:0"),
        Result(action_id=7, device=NAME, status=Status.OK, started_ns=1, ended_ns=2),
        Request(request_id=OWN_ID, gateway="gateway-0", model="a/1", arrival_ns=1, deadline_ns=2),
        Readiness(ready=False),
        MACHINE,
    ],
    ids=lambda frame: type(frame).__name__,
)
async def test_who_sends_what_is_not_his_is_cut_off_and_the_controller_hears_nothing_of_it(
    tmp_path: Path, frame: Frame
) -> None:
    async with middle(tmp_path) as at:
        far = await at.joined()
        far.link.send(frame)
        await until(lambda: far.side.lost)
        await until(at.controller.lost.is_set)
        assert at.controller.heard.empty()


async def test_with_the_controller_all_machines_are_let_go(tmp_path: Path) -> None:
    async with middle(tmp_path) as at:
        worker, gateway = await at.joined(), await at.guest()
        gateway.send(request())
        at.controller.close()
        await until(lambda: worker.side.lost and gateway.side.lost)
        await until(lambda: not at.bridge._peers)


# Gateways


THERE = Tensors(region="", epoch=7, header_offset=0, refs=(X,), output_bytes=64, server="10.0.0.9:7001")


def request(name: str = OWN_ID, **fields: Any) -> Request:
    made = Request(request_id=name, gateway=GATEWAY, model="a/1", arrival_ns=1, deadline_ns=2)
    return msgspec.structs.replace(made, **({"tensors": encode(THERE)} | fields))


def placed(**changes: Any) -> Request:
    """A request whose tensors are said to be elsewhere."""
    return request(tensors=encode(msgspec.structs.replace(THERE, **changes)))


ASK = Ask(ask_id=1, what=Question.INDEX, body=b"{}")
ANNOUNCED = AdmissionQuery(announced_id=OWN_HEAD, gateway=GATEWAY, model="a/1", arrival_ns=1, deadline_ns=2)


async def test_a_far_gateway_is_to_the_controller_a_gateway_of_its_name(tmp_path: Path) -> None:
    async with middle(tmp_path) as at:
        catalogue = at.controller._link
        assert catalogue is not None
        far = await at.machine(GUEST, ASK, name=GATEWAY, role=Role.GATEWAY)
        inside = await at.controller.linked()
        assert (inside.peer.role, inside.peer.name) == (Role.GATEWAY, GATEWAY)
        assert await at.controller.hear(Ask) == ASK
        far.send(ANNOUNCED)
        assert await at.controller.hear(AdmissionQuery) == ANNOUNCED
        catalogue.send(ModelRemoved(model="a/1"))
        await until(lambda: not at.bridge.models)
        told = ModelAdded(model=MODEL), READY, AdmissionReply(announced_id=OWN_HEAD, gateway=GATEWAY)
        at.controller.send(*told)
        await far.hears(*told)  # from the controller, and nothing from the bridge
        far.link.close()
        await until(at.controller.lost.is_set)
        assert not at.bridge._peers


async def test_requests_answers_and_releases_pass_as_they_are(tmp_path: Path) -> None:
    async with middle(tmp_path) as at:
        far = await at.guest()
        far.send(request(), Cancel(request_id=OWN_ID))
        assert await at.controller.hear(Request) == request()
        await at.controller.hear(Cancel)
        answer = Answer(
            request_id=OWN_ID, gateway=GATEWAY, outcome=Outcome.OK, outputs=b"there", release=False
        )
        release = Release(request_id=OWN_ID, gateway=GATEWAY)
        at.controller.send(answer, release)
        await far.hears(answer, release)
        far.send(request())
        assert await at.controller.hear(Request) == request(), "the id is free again"


@pytest.mark.parametrize(
    "frames",
    [
        [request(gateway="beta.gateway-0")],
        [request(gateway="gateway-0")],
        [request(name=FOREIGN_ID)],
        [Cancel(request_id=FOREIGN_ID)],
        [msgspec.structs.replace(ANNOUNCED, announced_id=FOREIGN_ID)],
        [request(tensors=b"\xc1")],
        [placed(region="1:2:4096")],
        [placed(server="")],
        [placed(server=":7001")],
        [placed(server="10.0.0.9")],
        [placed(output_bytes=-1)],
        [msgspec.structs.replace(ANNOUNCED, gateway="gateway-0")],
        [joining(NAME)],
        [Result(action_id=7, device=NAME, status=Status.OK, started_ns=1, ended_ns=2)],
        [Answer(request_id=OWN_ID, gateway=GATEWAY, outcome=Outcome.OK)],
        [READY],
        [GUEST],
    ],
    ids=lambda frames: " ".join(type(frame).__name__ for frame in frames),
)
async def test_a_gateway_that_sends_what_is_not_its_to_send_is_cut_off(
    tmp_path: Path, frames: list[Frame]
) -> None:
    async with middle(tmp_path) as at:
        far = await at.guest()
        far.send(*frames, ASK)
        await until(lambda: far.side.lost)
        await until(at.controller.lost.is_set)
        assert at.controller.heard.empty()
        assert not at.bridge._peers


@pytest.mark.parametrize(
    "first", [FarGateway(gateway="beta.gateway-0", version="1"), MACHINE, request(), ASK]
)
async def test_who_does_not_say_first_what_he_is_does_not_get_in(tmp_path: Path, first: Frame) -> None:
    async with middle(tmp_path) as at:
        far = await at.machine(first, name=GATEWAY, role=Role.GATEWAY)
        await until(lambda: far.side.lost)
        assert far.side.frames == []
        assert at.controller._linked.empty()


def test_a_worker_needs_more_than_a_gateway_and_neither_the_server_s_version() -> None:
    judge = judge_of({"cpu": "good"}, ("toy",))
    for version in ("1", "2"):
        shown = [msgspec.structs.replace(each, version=version) for each in (GUEST, MACHINE)]
        assert [judge(each) for each in shown] == [None, None]
    for lacking in ({"runtime": {}}, {"kinds": ("strange",)}):
        assert judge(msgspec.structs.replace(MACHINE, **lacking)) is not None, "a worker needs more"


def test_a_server_without_a_store_takes_gateways_and_no_worker() -> None:
    judge = judge_of({"cpu": "good"}, ("toy",), store=False)
    assert judge(GUEST) is None
    refused = judge(MACHINE)
    assert refused is not None
    assert refused.final
    assert "start the server (clockwork serve) with --store" in refused.why


async def test_a_gateway_s_name_is_given_once_and_its_own_process_takes_over(tmp_path: Path) -> None:
    async with middle(tmp_path) as at:
        first = await at.guest()
        refused = await (await at.machine(GUEST, name=GATEWAY, role=Role.GATEWAY)).refusal()
        assert "another gateway of this server is called alpha.gateway-0" in refused.why
        assert not refused.final
        files, pid = theirs(certificates(tmp_path)), first.link.own.pid
        again = await connect(Side(), at.port, files, name=GATEWAY, role=Role.GATEWAY, pid=pid)
        again.send(GUEST)
        await until(lambda: first.side.lost)
        await at.controller.linked()
        assert again.is_open


async def test_a_request_that_a_gateway_sends_twice_is_passed_on_once(tmp_path: Path) -> None:
    """The controller takes an id that comes twice for an error of its own."""
    async with middle(tmp_path) as at:
        far = await at.guest()
        far.send(request(), request(), ASK)
        assert await at.controller.hear(Request) == request()
        await until(lambda: far.side.lost)
        await until(at.controller.lost.is_set)
        assert at.controller.heard.empty()


async def test_nothing_arrives_in_the_future_and_all_keep_their_slos(tmp_path: Path) -> None:
    ahead = {"arrival_ns": 2**62, "deadline_ns": 2**62 + 70}
    async with middle(tmp_path) as at:
        far = await at.guest()
        far.send(request(**ahead), msgspec.structs.replace(ANNOUNCED, **ahead))
        for kind in (Request, AdmissionQuery):
            found = await at.controller.hear(kind)
            assert 0 <= time.monotonic_ns() - found.arrival_ns < 60e9
            assert found.deadline_ns - found.arrival_ns == 70
