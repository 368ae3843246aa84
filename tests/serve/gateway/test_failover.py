"""Requests that await failover: the next controller answers those that can wait; none is answered twice."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.messages import HandingOver, Outcome, Readiness, Reason, Request
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway import controller_link
from clockwork_serve.serve.gateway.controller_link import RESUBMITTED
from clockwork_serve.serve.gateway.requests import Slots
from clockwork_serve.units import MIB, ms
from tests.serve.gateway.worlds import SMALL, Client, World, a_world
from tests.timing import Timing

X = struct.pack("<2f", 1.5, -2.0)


async def sent(world: World, *clients: Client) -> list[Request]:
    """The controller receives these requests, and keeps them."""
    world.controller.on_request = world.keep
    before = len(world.controller.requests)
    for client in clients:
        world.gateway.infer(client)
    await world.until(lambda: len(world.controller.requests) == before + len(clients))
    return world.controller.requests[before:]


async def stopped(world: World) -> None:
    """The controller is gone, and the gateway knows."""
    world.controller.stop()
    await world.until(lambda: not world.gateway.link.is_open)


async def next_controller(world: World) -> None:
    world.controller.requests.clear()
    await world.controller.start()
    await world.until(lambda: world.gateway.link.ready)


async def test_a_request_is_resubmitted_once_and_its_answer_delivered(world: World) -> None:
    client = Client(data=X, slo_ms=60_000)
    (first,) = await sent(world, client)
    old = world.controller.memory(world.controller.tensors(first))
    await stopped(world)
    assert world.gateway.counters().open == 1
    # Actions of the dead controller may still write, to the old region.
    tensors = world.controller.tensors(first)
    old[tensors.output_offset : tensors.output_offset + 8] = bytes(8)
    world.controller.on_request = world.controller.echo
    await next_controller(world)
    await world.until(lambda: client.ends)
    (again,) = world.controller.requests
    assert client.ended == (Outcome.OK, Reason.NONE)
    assert client.outputs == [X]
    assert again.request_id == first.request_id + RESUBMITTED, (
        "a controller that only lost the link may know the first"
    )
    assert (again.arrival_ns, again.deadline_ns) == (first.arrival_ns, first.deadline_ns)
    assert (first.awaited, again.awaited) == (False, True)
    assert world.controller.tensors(again).region != tensors.region
    world.controller.send(world.controller.answer(again, outcome=Outcome.OK))  # a second answer
    await asyncio.sleep(0.05)
    assert len(client.ends) == 1
    assert world.gateway.slots.used_bytes == 0
    assert world.gateway.counters().outcomes == {}


async def test_requests_due_before_a_failover_are_ended_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_link, "FAILOVER_LEAST_NS", ms(20_000))
    soon, later = Client(slo_ms=19_000), Client(slo_ms=60_000)
    await sent(world, soon, later)
    world.controller.stop()
    await world.until(lambda: soon.ends, 10)
    assert soon.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert soon.ends[0].status.http == 503
    assert soon.ends[0].retry_after_ns > 0
    assert later.ends == []


async def test_requests_that_await_failover_end_at_their_deadlines(world: World, timing: Timing) -> None:
    client = Client(slo_ms=1500)
    await sent(world, client)
    world.controller.stop()
    await world.until(lambda: client.ends)
    late_ns = world.gateway.clock() - client.arrival_ns - ms(1500)
    with timing.judged():
        assert 0 <= late_ns < ms(50)
    assert client.ended == (Outcome.EXPIRED, Reason.NONE), "a refusal at the deadline is none any more"
    assert world.gateway.slots.used_bytes == 0
    assert world.gateway.counters().open == 0


async def test_awaiting_failover_has_a_timeout(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_link, "FAILOVER_TIMEOUT_NS", ms(100))
    client = Client(slo_ms=60_000)
    await sent(world, client)
    world.controller.stop()
    await world.until(lambda: client.ends, 20)
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)


async def test_a_request_is_submitted_to_two_controllers_at_most(world: World) -> None:
    client = Client(slo_ms=60_000)
    await sent(world, client)
    world.controller.stop()
    await next_controller(world)
    await world.until(lambda: world.controller.requests)
    assert client.ends == []
    world.controller.stop()
    await world.until(lambda: client.ends)
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)


async def test_requests_that_waited_in_vain_for_a_leader_to_be_ready_are_told_that(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(slo_ms=60_000)
    await sent(world, client)
    world.controller.stop()
    world.controller.ready = Readiness(ready=False, why="0 of 1 devices are warm")
    await world.controller.start()
    await world.until(lambda: world.gateway.link.is_open)
    assert client.ends == []
    monkeypatch.setattr(controller_link, "FAILOVER_TIMEOUT_NS", 0)
    await world.until(lambda: client.ends)
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert "not ready in time: 0 of 1 devices are warm" in client.ends[0].message


async def test_requests_await_a_controller_that_is_ready(world: World) -> None:
    client = Client(slo_ms=60_000)
    await sent(world, client)
    world.controller.stop()
    world.controller.requests.clear()
    world.controller.ready = Readiness(ready=False, why="0 of 1 devices are warm")
    await world.controller.start()
    await world.until(lambda: world.gateway.link.is_open)
    await asyncio.sleep(0.05)
    assert world.controller.requests == []
    # It dies before it is ready: that has no effect on requests.
    await stopped(world)
    world.controller.ready = Readiness(ready=True)
    world.controller.on_request = world.controller.echo
    await next_controller(world)
    await world.until(lambda: client.ends)
    assert client.ended == (Outcome.OK, Reason.NONE)


async def test_a_request_whose_client_left_is_not_resubmitted(world: World) -> None:
    client = Client(slo_ms=60_000)
    (request,) = await sent(world, client)
    await stopped(world)
    world.gateway.cancel(request.request_id)
    assert world.gateway.slots.used_bytes == 0
    await next_controller(world)
    await asyncio.sleep(0.05)
    assert world.controller.requests == []
    assert client.ends == []
    assert world.gateway.counters().outcomes == {"cancelled": 1}


async def test_a_resubmitted_request_is_cancelled_by_its_second_id(world: World) -> None:
    (request,) = await sent(world, Client(slo_ms=60_000))
    await stopped(world)
    await next_controller(world)
    await world.until(lambda: world.controller.requests)
    world.gateway.cancel(request.request_id)
    await world.until(lambda: world.controller.cancels)
    assert [one.request_id for one in world.controller.cancels] == [request.request_id + RESUBMITTED]


async def test_requests_that_await_failover_end_when_the_gateway_closes(tmp_path: Path) -> None:
    client = Client(slo_ms=60_000)
    async with a_world(tmp_path) as world:
        await sent(world, client)
        await stopped(world)
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)


async def test_a_controller_that_was_deposed_gets_no_request(world: World) -> None:
    world.controller.leads_with = 2
    await stopped(world)
    await next_controller(world)
    await stopped(world)
    world.controller.leads_with = 1
    await world.controller.start()
    await asyncio.sleep(0.1)
    assert not world.gateway.link.is_open
    client = await world.infer(Client(slo_ms=60_000))
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert world.controller.requests == []
    world.controller.stop()
    world.controller.leads_with = 3
    await next_controller(world)


# A controller stands by: what comes while it takes over waits for it, too.


STANDBY = structs.replace(SMALL, controllers=2)
with_standby = pytest.mark.parametrize("world", [STANDBY], indirect=True)


@with_standby
async def test_what_comes_while_a_standby_takes_over_is_submitted_to_it_and_answered(world: World) -> None:
    await stopped(world)
    clients = [Client(data=X, slo_ms=60_000) for _ in range(5)]
    ids = [world.gateway.infer(client) for client in clients]
    left = clients.pop()
    world.gateway.cancel(ids.pop())
    assert world.gateway.counters().open == 4
    await next_controller(world)
    await world.until(lambda: all(client.ends for client in clients))
    assert [one.request_id for one in world.controller.requests] == ids, "no controller had them before"
    assert {client.ended for client in clients} == {(Outcome.OK, Reason.NONE)}
    assert all(client.outputs == [X] for client in clients)
    assert left.ends == []
    assert world.gateway.slots.used_bytes == 0


@with_standby
async def test_the_catalogue_of_before_counts_until_a_standby_has_one(world: World) -> None:
    controller = world.controller
    await stopped(world)
    catalogue, controller.catalogue = controller.catalogue, []
    controller.ready = Readiness(ready=False, why="starting")
    await controller.start()
    await world.until(lambda: controller.links)
    await asyncio.sleep(0.05)
    client = Client(data=X, slo_ms=60_000)
    world.gateway.infer(client)
    assert client.ends == [], "the model is known"
    controller.catalogue = catalogue
    controller.send(*[frame for added in catalogue for frame in added], Readiness(ready=True))
    await world.until(lambda: client.ends)
    assert client.ended == (Outcome.OK, Reason.NONE)


@with_standby
async def test_what_waited_for_a_standby_may_wait_for_the_next_one_too(world: World) -> None:
    await stopped(world)
    client = Client(data=X, slo_ms=60_000)
    request_id = world.gateway.infer(client)
    world.controller.on_request = world.keep
    await next_controller(world)
    await world.until(lambda: world.controller.requests)
    world.controller.stop()
    world.controller.on_request = world.controller.echo
    await next_controller(world)
    await world.until(lambda: client.ends)
    assert [one.request_id for one in world.controller.requests] == [request_id + RESUBMITTED]
    assert client.ended == (Outcome.OK, Reason.NONE)


async def test_where_a_standby_does_not_come_requests_are_refused_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timing: Timing
) -> None:
    monkeypatch.setattr(controller_link, "FAILOVER_TIMEOUT_NS", ms(4000))

    async with a_world(tmp_path, STANDBY) as world:
        world.controller.stop()
        await world.until(lambda: not world.gateway.link.is_open)
        short = Client(slo_ms=500)
        world.gateway.infer(short)
        assert short.ends == []
        await world.until(lambda: short.ends)
        assert short.ended == (Outcome.EXPIRED, Reason.NONE)
        await asyncio.sleep(0.7)  # more than TAKEOVER_NS has passed since
        late, patient = Client(slo_ms=1000), Client(slo_ms=60_000)
        for client in (late, patient):
            world.gateway.infer(client)
        await world.until(lambda: late.ends)
        with timing.judged():
            assert world.gateway.clock() < late.arrival_ns + ms(500), "it cannot wait for as long again"
        assert late.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
        assert not patient.ends
        await world.until(lambda: patient.ends)
        assert patient.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
        last = Client(slo_ms=60_000)
        assert world.gateway.infer(last) == ""
        assert last.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
        unknown = Client(slo_ms=60_000, model="nobody")
        world.gateway.infer(unknown)
        assert unknown.ended == (Outcome.REJECTED, Reason.NOT_SERVING)


@with_standby
async def test_what_comes_while_the_controller_is_stuck_waits_as_well(world: World) -> None:
    for replaced in (False, True):
        world.controller.requests.clear()
        world.controller.beats = False
        await world.until(lambda: world.gateway.link.stuck)
        client = Client(data=X, slo_ms=60_000)
        world.gateway.infer(client)
        assert (client.ends, world.controller.requests) == ([], [])
        world.controller.beats = True
        if replaced:
            world.controller.stop()
            await next_controller(world)
        else:
            world.controller.send(*world.controller.kept_beats)
        await world.until(lambda client=client: client.ends)
        assert client.ended == (Outcome.OK, Reason.NONE)
        assert len(world.controller.requests) == 1


@with_standby
async def test_a_standby_answers_what_is_due_soon(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_link, "FAILOVER_LEAST_NS", ms(2000))
    client = Client(data=X, slo_ms=1900)
    await sent(world, client)
    await stopped(world)
    assert client.ends == [], "without a standby it would have ended"
    await world.until(lambda: client.ends)


async def test_what_comes_while_the_controller_hands_over_waits_for_the_next_one(world: World) -> None:
    before, after = Client(data=X, slo_ms=60_000), Client(data=X, slo_ms=60_000)
    (first,) = await sent(world, before)
    world.controller.send(HandingOver())
    await world.until(lambda: not world.gateway.link.serves)
    assert world.gateway.link.why_not_ready == "the controller hands over to another one"
    second = world.gateway.infer(after)
    await asyncio.sleep(0.02)
    assert [one.request_id for one in world.controller.requests] == [first.request_id]
    world.controller.send(world.controller.echo(first))
    await world.until(lambda: before.ends)
    assert before.ended == (Outcome.OK, Reason.NONE), "it finishes what it has"
    world.controller.stop()
    world.controller.on_request = world.controller.echo
    await next_controller(world)
    await world.until(lambda: after.ends)
    assert [one.request_id for one in world.controller.requests] == [second]
    assert after.ended == (Outcome.OK, Reason.NONE)
    # One that is lost, and did not hand over, is another matter.
    await stopped(world)
    assert (await world.infer(Client(slo_ms=60_000))).ended == (Outcome.REJECTED, Reason.NOT_SERVING)


def test_requests_without_room_in_the_new_region_are_not_kept() -> None:
    slots = Slots(MIB)
    slot = slots.fill([InputTensor("X", "UINT8", (400_000,), b"\1" * 400_000)], 100)
    assert slot is not None
    first, second, third = slots.renew([slot, slot, slot])
    assert first is not None
    assert second is not None
    assert third is None
    (ref,) = second.tensors.refs
    assert bytes(slots.region.buffer[ref.offset : ref.offset + ref.nbytes]) == b"\1" * 400_000
    slots.free(first)
    slots.free(second)
    assert slots.used_bytes == 0
    slots.close()
