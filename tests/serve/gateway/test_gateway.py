"""The core of a gateway against a fake controller: each request ends once, and its slot is freed in time."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import msgspec
import pytest

from clockwork_client.datatypes import encode_strings
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import (
    Answer,
    Outcome,
    Preparing,
    Question,
    Readiness,
    Reason,
    Reply,
    Request,
    SoonestEnd,
    SoonestEnds,
)
from clockwork_serve.oip import OutputTensor, Served
from clockwork_serve.serve.gateway import controller_link
from clockwork_serve.serve.gateway.access import Tenant
from clockwork_serve.serve.gateway.controller_link import GRACE_NS
from clockwork_serve.serve.gateway.gateway import PREPARED_NS, SWEEP_LEAST_S, Gateway
from clockwork_serve.serve.gateway.requests import OutputReserves
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.shm import Region
from clockwork_serve.units import KIB, MIB, NS_PER_S, ms
from tests.serve.gateway.worlds import ANY, IDENT, SMALL, Client, World


async def test_a_request_is_described_to_the_controller_and_its_answer_given(world: World) -> None:
    client = await world.infer(Client(data=b"12345678" * 3, rows=3, priority=2))
    assert client.ended == (Outcome.OK, Reason.NONE)
    assert client.outputs == [b"12345678" * 3]
    (request,) = world.controller.requests
    assert (request.model, request.rows, request.signature, request.priority, request.gateway) == (
        "ident/1", 3, "", 2, "g0",
    )  # fmt: skip
    assert request.deadline_ns - request.arrival_ns == ms(60_000)
    assert client.ends[0].request_id == request.request_id
    assert world.controller.tensors(request).output_bytes == 3 * 4096
    assert client.ends[0].parameters == {
        "queue_ms": 1.0, "exec_ms": 2.0, "expected_ms": 2.5, "batch_size": 1, "cold_start": False,
    }  # fmt: skip
    assert world.gateway.slots.used_bytes == 0


# Outputs whose size only a run tells: what is reserved is learnt, and is never too little.


def reserved(world: World) -> list[int]:
    return [world.controller.tensors(request).output_bytes for request in world.controller.requests]


async def test_room_is_reserved_as_answers_of_those_shapes_took_it_and_the_first_guess_before(
    world: World,
) -> None:
    for rows in (2, 2, 1):
        client = await world.infer(Client("any", b"abc" * 1000 * rows, rows=rows))
        assert client.outputs == [b"abc" * 1000 * rows]
    await world.infer(Client("any", b"abcd" * 2, rows=2))
    assert reserved(world) == [2 * 100 + 64, 2 * 3000 + 64, 3000 + 64, 2 * 100 + 64]
    # The fake worker's memory was needed for the first alone.
    assert world.controller.spill.used_bytes == 8 * KIB
    assert not world.controller.spill.free_unused()


def test_one_large_answer_is_forgotten_by_and_by() -> None:
    any_served = Served(ANY[1].model, ANY[0].code, ms(100))
    reserves, region = OutputReserves(), Region.create(1 * MIB)
    request = Request(request_id="r", gateway="g", model="any/1", arrival_ns=0, deadline_ns=1, rows=2)

    def room_after(*sizes: int) -> int:
        for size in sizes:
            reserves.learn(request, [OutputTensor("Y", "UINT8", (2, size // 2), bytes(size))])
        return reserves.room(any_served, 2, "", region)

    assert room_after(20_000) == 20_064
    assert room_after(1000) == 20_064 * 7 // 8 + 8
    assert room_after(*[1000] * 50) == 1064
    region.close()


async def test_no_request_is_refused_for_the_sake_of_a_reserve(world: World) -> None:
    await world.infer(Client("any", bytes(200_000)))
    answer, world.controller.on_request = world.controller.echo, world.keep
    clients = [Client("any", bytes(200_000)) for _ in range(4)]
    for client in clients:
        world.gateway.infer(client)
    await world.until(lambda: len(world.controller.requests) == 5)
    # Of 1 MiB, the half is for what must be there: inputs.
    assert reserved(world) == [164, 200_064, 4096, 4096, 4096]
    world.controller.send(*map(answer, world.controller.requests[1:]))
    await world.until(lambda: all(client.ends for client in clients))
    assert {client.ended for client in clients} == {(Outcome.OK, Reason.NONE)}
    assert [client.outputs for client in clients] == [[bytes(200_000)]] * 4
    assert world.gateway.slots.used_bytes == 0


async def test_a_request_that_has_no_room_is_told_of_which_setting(world: World) -> None:
    world.controller.on_request = world.keep
    for _ in range(3):
        world.gateway.infer(Client("any", bytes(300_000)))
    refused = await world.infer(Client("any", bytes(300_000)))
    assert refused.ended == (Outcome.REJECTED, Reason.QUEUE_FULL)
    assert refused.ends[0].message == (
        "no room for 300288 bytes of one more request's tensors among the 1048576 of gateway_memory; "
        "raise it if this is often so"
    )


async def test_outputs_of_a_worker_that_has_died_since_fail_their_request_alone(world: World) -> None:
    def die(request: Request) -> Answer:
        answer = world.controller.echo(request)
        world.controller.spill.close()
        return answer

    world.controller.on_request = die
    assert (await world.infer(Client("any", bytes(1000)))).ended == (Outcome.FAILED, Reason.NONE)
    world.controller.on_request = world.controller.echo
    assert (await world.infer(Client("any", bytes(1000)))).ended == (Outcome.OK, Reason.NONE)
    assert world.gateway.slots.used_bytes == 0


async def test_ids_are_never_used_again(world: World) -> None:
    for _ in range(50):
        await world.infer(Client())
    other = Gateway(GatewayConfig(run_dir="/nowhere", name="g0", settings=SMALL))
    ids = {request.request_id for request in world.controller.requests}
    assert len(ids) == 50
    assert all(request_id.startswith("g0-") for request_id in ids)
    assert other._prefix != world.gateway._prefix
    other.close()


async def test_shapes_that_the_request_chose_are_its_signature(world: World) -> None:
    await world.infer(Client("any", b"123456", rows=2))
    assert world.controller.requests[0].signature == "X:3"


async def test_the_tightest_slo_sets_the_deadline(world: World) -> None:
    client = Client(slo_ms=30_000, timeout=25_000_000)
    client.slo_header, client.remaining_s = "20000", 50
    await world.infer(client)
    request = world.controller.requests[0]
    assert request.deadline_ns - request.arrival_ns == ms(20_000)
    assert request.arrival_ns == client.arrival_ns


async def test_a_tenant_s_requests_are_capped_and_labelled(world: World) -> None:
    world.tenants["t"] = Tenant(name="t", min_slo_ns=ms(4000), max_priority=5)
    tight, relaxed, other = (
        Client(slo_ms=3000, priority=1), Client(slo_ms=5000, priority=9), Client(slo_ms=3000),
    )  # fmt: skip
    for client, tenant in ((tight, "t"), (relaxed, "t"), (other, "")):
        client.identity = tenant
        await world.infer(client)
    assert [
        (request.tenant, request.deadline_ns - request.arrival_ns, request.priority)
        for request in world.controller.requests
    ] == [("t", ms(4000), 5), ("t", ms(5000), 9), ("", ms(3000), 0)]
    given = [client.ends[0].parameters.get("slo_ms") for client in (tight, relaxed, other)]
    assert given == [4000, None, None], "told where it is not what was asked for"


async def test_every_outcome_of_the_controller_is_passed_on(world: World) -> None:
    for outcome, reason in (
        (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE),
        (Outcome.EXPIRED, Reason.LATE),
        (Outcome.FAILED, Reason.MODEL_RAISED),
    ):
        world.controller.on_request = partial(
            world.controller.answer, outcome=outcome, reason=reason, message="so it is", retry_after_ns=5
        )
        client = await world.infer(Client())
        assert client.ended == (outcome, reason)
        assert (client.ends[0].message, client.ends[0].retry_after_ns) == ("so it is", 5)
    assert world.gateway.slots.used_bytes == 0
    # The controller counts them.
    assert world.gateway.counters().outcomes == {}


@pytest.mark.parametrize(
    ("client", "status", "reason", "words"),
    [
        (Client("nope"), 404, Reason.UNKNOWN_MODEL, "unknown model: 'nope'"),
        (Client(data=b"123"), 400, Reason.BAD_INPUT, "expected 8 bytes"),
        (Client(slo_ms=-1), 400, Reason.BAD_INPUT, "'slo_ms'"),
        (Client(priority="high"), 400, Reason.BAD_INPUT, "'priority'"),
        (Client("any", bytes(2 * MIB)), 400, Reason.BAD_INPUT, "send fewer rows at once"),
    ],
)
async def test_invalid_requests_end_here_and_are_counted_here(
    world: World, client: Client, status: int, reason: Reason, words: str
) -> None:
    client.ends.clear()
    client.arrival_ns = time.monotonic_ns()
    assert world.gateway.infer(client) == ""
    assert client.ended == (Outcome.INVALID, reason)
    assert client.ends[0].status.http == status
    assert words in client.ends[0].message
    counters = world.gateway.counters()
    assert counters.received == 1
    assert counters.outcomes == {f"invalid:{reason}": 1}
    assert world.gateway.counters().invalid.get("ident/1", 0) == (client.model == "ident")
    assert world.gateway.slots.used_bytes == 0
    await asyncio.sleep(0.01)
    assert world.controller.requests == []


async def test_a_request_that_triggers_a_bug_fails_alone(world: World) -> None:
    client = Client()
    client.error = ZeroDivisionError("ours")
    client.body = world.gateway.slots.body(1000, 0)
    world.gateway.infer(client)
    assert client.ended == (Outcome.FAILED, Reason.NONE)
    assert "ours" not in client.ends[0].message
    assert world.gateway.slots.used_bytes == 0
    assert (await world.infer(Client())).ended == (Outcome.OK, Reason.NONE)


async def test_an_invalid_request_frees_its_body(world: World) -> None:
    client = Client()
    client.error = InvalidRequest("no")
    client.body = world.gateway.slots.body(1000, 0)
    world.gateway.infer(client)
    assert client.ended == (Outcome.INVALID, Reason.BAD_INPUT)
    assert world.gateway.slots.used_bytes == 0


# Strings are looked at a piece in a turn of the loop, before the controller knows of their request.


MANY = encode_strings(["é".encode()] * 9000)


async def test_many_strings_are_sent_once_all_are_looked_at(world: World) -> None:
    in_place, copied = Client("words", MANY), Client("words", MANY)
    body = in_place.body = world.gateway.slots.body(len(MANY), 0)
    assert body is not None
    body.view[:] = MANY
    in_place.data = body.view
    for client in (in_place, copied):
        assert world.gateway.infer(client)
    await asyncio.sleep(0)
    assert not world.controller.requests
    await world.until(lambda: in_place.ends and copied.ends)
    assert [*map(bytes, in_place.outputs), *map(bytes, copied.outputs)] == [MANY, MANY]
    assert world.gateway.slots.used_bytes == 0


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_wrong_string_among_many_ends_its_request_whenever_it_is_found(
    world: World, *, leaves: bool
) -> None:
    client = Client("words", MANY[:-2] + b"\xc3\xc3")
    request_id = world.gateway.infer(client)
    assert request_id and not client.ends
    if leaves:
        world.gateway.cancel(request_id)
    else:
        await world.until(lambda: client.ends)
        assert client.ended == (Outcome.INVALID, Reason.BAD_INPUT)
        assert "element 8999: expected UTF-8" in client.ends[0].message
    outcome = "cancelled" if leaves else f"invalid:{Reason.BAD_INPUT}"
    assert [*world.gateway.counters().outcomes] == [outcome]
    assert world.gateway.slots.used_bytes == 0
    assert (await world.infer(Client("words", MANY))).ended == (Outcome.OK, Reason.NONE)
    assert len(world.controller.requests) == 1


async def test_many_strings_without_room_hold_nothing(world: World) -> None:
    world.controller.on_request = world.keep
    for _ in range(3):
        world.gateway.infer(Client("any", bytes(300_000)))
    used = world.gateway.slots.used_bytes
    client = Client("words", encode_strings([b"x" * 20] * 9000))
    client.body = world.gateway.slots.body(1000, 0)
    assert (await world.infer(client)).ended == (Outcome.REJECTED, Reason.QUEUE_FULL)
    assert world.gateway.slots.used_bytes == used


async def test_a_full_region_is_a_full_queue(world: World) -> None:
    world.controller.on_request = world.keep
    big = [Client("any", bytes(400_000)) for _ in range(3)]
    for client in big:
        world.gateway.infer(client)
    assert [len(client.ends) for client in big] == [0, 0, 1]
    assert big[2].ended == (Outcome.REJECTED, Reason.QUEUE_FULL)
    assert big[2].ends[0].retry_after_ns > 0
    assert world.gateway.counters().outcomes == {"rejected:queue_full": 1}


async def test_a_slot_is_kept_until_no_worker_accesses_it(world: World) -> None:
    world.controller.on_request = lambda request: world.controller.echo(request, release=False)
    client = await world.infer(Client())
    (request,) = world.controller.requests
    tensors = world.controller.tensors(request)
    assert client.ended == (Outcome.OK, Reason.NONE)
    assert world.gateway.slots.used_bytes > 0
    assert world.controller.epoch(tensors) == tensors.epoch
    world.controller.release(request)
    await world.until(lambda: world.gateway.slots.used_bytes == 0)
    assert world.controller.epoch(tensors) != tensors.epoch


async def test_an_answer_that_cannot_be_delivered_fails_alone(world: World) -> None:
    def outside(request: Request) -> Answer:
        tensors = world.controller.tensors(request)
        ref = msgspec.structs.replace(tensors.refs[0], offset=tensors.header_offset)
        outputs = msgspec.msgpack.encode(msgspec.structs.replace(tensors, refs=(ref,)))
        return world.controller.echo(request, outputs=outputs)

    world.controller.on_request = outside
    client = await world.infer(Client())
    assert client.ended == (Outcome.FAILED, Reason.NONE)
    assert world.gateway.slots.used_bytes == 0
    world.controller.on_request = world.controller.echo
    assert (await world.infer(Client())).ended == (Outcome.OK, Reason.NONE)


async def test_a_client_that_left_is_cancelled_and_gets_no_response(world: World) -> None:
    world.controller.on_request = world.keep
    client = Client()
    request_id = world.gateway.infer(client)
    await world.until(lambda: world.controller.requests)
    world.gateway.cancel(request_id)
    world.gateway.cancel(request_id)
    await world.until(lambda: world.controller.cancels)
    assert [cancel.request_id for cancel in world.controller.cancels] == [request_id]
    assert world.gateway.slots.used_bytes > 0
    (request,) = world.controller.requests
    world.controller.send(world.controller.answer(request, outcome=Outcome.CANCELLED))
    await world.until(lambda: world.gateway.slots.used_bytes == 0)
    assert client.ends == []


async def test_a_stuck_controller_does_not_keep_clients_waiting(world: World) -> None:
    world.controller.on_request = world.keep
    client = Client(slo_ms=100)
    await world.infer(client)
    assert client.ended == (Outcome.EXPIRED, Reason.NONE)
    assert client.ends[0].status.http == 504
    assert time.monotonic_ns() >= client.arrival_ns + ms(100) + GRACE_NS
    assert ms(45) >= GRACE_NS + SWEEP_LEAST_S * NS_PER_S, "so that clients hear within 50 ms"
    # A worker may still write there, and the controller counts it when it wakes up.
    assert world.gateway.slots.used_bytes > 0
    assert world.gateway.counters().outcomes == {}
    world.controller.send(world.controller.echo(world.controller.requests[0]))
    await world.until(lambda: world.gateway.slots.used_bytes == 0)
    assert len(client.ends) == 1
    assert world.gateway.counters().unheard == {"left": 0, "over": 1}


async def test_a_good_answer_for_a_client_that_left_is_counted(world: World) -> None:
    world.controller.on_request = world.keep
    world.gateway.cancel(world.gateway.infer(Client(slo_ms=60_000)))
    await world.until(lambda: len(world.controller.requests) == 1)
    world.controller.send(world.controller.echo(world.controller.requests[0]))
    await world.until(lambda: world.gateway.slots.used_bytes == 0)
    assert world.gateway.counters().unheard == {"left": 1, "over": 0}


async def test_a_stopped_gateway_reads_answers_before_it_ends_requests(world: World) -> None:
    def sleep(request: Request) -> Answer:
        time.sleep(0.1)  # both of them, for they share a process here
        return world.controller.echo(request)

    world.controller.on_request = sleep
    client = await world.infer(Client(slo_ms=50))
    # It was read, for it is known that it ran; but its time is over.
    assert client.ended == (Outcome.EXPIRED, Reason.LATE)


async def summarise(world: World, *, until_ms: float = 60_000) -> None:
    """The controller says that who is due last ends in 10 s at the soonest."""
    now_ns = time.monotonic_ns()
    soonest = SoonestEnd(
        due_ns=now_ns, end_ns=now_ns + ms(10_000), each_ns=0, other_end_ns=now_ns + ms(20_000)
    )
    ends = {"ident/1": soonest}
    world.controller.send(SoonestEnds(ends=ends, until_ns=now_ns + ms(until_ms)))
    await world.until(lambda: world.gateway.link.ends.known)


async def test_while_the_controller_has_time_it_judges_better_than_its_summary(world: World) -> None:
    await summarise(world)
    assert (await world.infer(Client(slo_ms=1_000))).ended == (Outcome.OK, Reason.NONE)


async def test_what_the_controllers_summary_shows_to_be_hopeless_takes_no_scarce_credit(world: World) -> None:
    await summarise(world)
    world.hold_back()
    client = await world.infer(Client(slo_ms=1_000))
    assert client.ended == (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE)
    assert ms(8_000) < client.ends[0].retry_after_ns < ms(9_100)
    assert "the deadline would be missed by" in client.ends[0].message
    assert world.controller.requests == []
    assert world.gateway.slots.used_bytes == 0
    counters = world.gateway.counters()
    assert (counters.received, counters.refused_by_summary) == (1, 1)
    assert counters.outcomes == {"rejected:would_miss_deadline": 1}


async def test_a_summary_is_about_requests_of_the_models_own_class_and_of_one_row(world: World) -> None:
    await summarise(world)
    world.hold_back()
    for client in (
        Client(slo_ms=1_000, priority=1),
        Client(slo_ms=1_000, priority=9),
        Client(slo_ms=1_000, data=bytes(24), rows=3),
        Client("any", slo_ms=1_000),
        Client(slo_ms=15_000),
    ):
        assert (await world.infer(client)).ended == (Outcome.OK, Reason.NONE)


async def test_an_old_summary_refuses_nothing(world: World) -> None:
    await summarise(world, until_ms=0)
    world.hold_back()
    assert (await world.infer(Client(slo_ms=1_000))).ended == (Outcome.OK, Reason.NONE)
    assert world.gateway.counters().refused_by_summary == 0


async def test_a_lost_controller_ends_urgent_requests_and_is_found_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_link, "FAILOVER_LEAST_NS", ms(100_000))
    world.controller.on_request = world.keep
    waiting, left, late = Client(slo_ms=60_000), Client(slo_ms=60_000), Client(slo_ms=1000)
    for client in (waiting, left, late):
        request_id = world.gateway.infer(client)
        if client is left:
            world.gateway.cancel(request_id)
    await world.until(lambda: late.ends and len(world.controller.requests) == 3)
    region = world.gateway.slots.region.name
    world.controller.stop()
    await world.until(lambda: waiting.ends)
    assert waiting.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert waiting.ends[0].status.http == 503
    assert waiting.ends[0].retry_after_ns > 0
    assert left.ends == []
    assert world.gateway.counters().outcomes == {
        "rejected:not_serving": 1, "cancelled": 1, "expired": 1,
    }  # fmt: skip
    assert not world.gateway.link.ready
    refused = Client()
    world.gateway.infer(refused)
    assert refused.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert refused.ends[0].retry_after_ns > 0
    assert refused.ends[0].retry_after_s >= 1
    assert world.gateway.slots.region.name != region
    assert world.gateway.slots.used_bytes == 0

    world.controller.on_request = world.controller.echo
    await world.controller.start()
    await world.until(lambda: world.gateway.link.ready)
    assert (await world.infer(Client())).ended == (Outcome.OK, Reason.NONE)


async def test_while_models_are_prepared_others_are_served_and_refusals_say_which_to_prepare_first(
    world: World,
) -> None:
    link = world.gateway.link
    world.controller.send(Preparing(waiting=("late", "later"), total=5))
    await world.until(lambda: not link.ready)
    assert link.serves
    assert link.why_not_ready == "models are being prepared, 3 of 5 are done"
    assert (await world.infer(Client())).ended == (Outcome.OK, Reason.NONE)
    for name in ("late", "late", "later"):
        refused = Client(name)
        world.gateway.infer(refused)
        assert refused.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
        (end,) = refused.ends
        assert end.message == f"model {name} is being prepared, 3 of 5 models are done"
        assert (end.status.http, end.retry_after_ns) == (503, PREPARED_NS)
    unknown = Client("nobody")
    world.gateway.infer(unknown)
    assert unknown.ended == (Outcome.INVALID, Reason.UNKNOWN_MODEL)
    await world.until(lambda: world.controller.asked_for)
    assert world.controller.asked_for == [{"late": 2, "later": 1}], "together, not one by one"
    world.controller.send(Preparing(total=5))
    await world.until(lambda: link.ready)
    assert not link.why_waiting("late")


async def test_what_one_controller_said_is_to_be_prepared_is_forgotten_with_it(world: World) -> None:
    world.controller.send(Preparing(waiting=("ident",), total=1))
    await world.until(lambda: not world.gateway.link.ready)
    refused = Client()
    world.gateway.infer(refused)
    assert refused.ended == (Outcome.REJECTED, Reason.NOT_SERVING), "devices still prepare its code"
    world.controller.stop()
    await world.until(lambda: not world.gateway.link.is_open)
    await world.controller.start()
    await world.until(lambda: world.gateway.link.ready)


async def test_a_new_controller_without_models_is_not_ready(world: World) -> None:
    told = []
    world.gateway.readiness_listeners.append(lambda: told.append(world.gateway.link.ready))
    world.controller.stop()
    world.controller.catalogue.clear()
    world.controller.ready = Readiness(ready=False, why="starting")
    await world.controller.start()
    await world.until(lambda: told and world.gateway.link.is_open)
    client = Client()
    world.gateway.infer(client)
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert "starting" in client.ends[0].message
    world.controller.send(*IDENT, Readiness(ready=True))
    await world.until(lambda: world.gateway.link.ready)
    assert told[0] is False
    assert told[-1] is True
    unknown = Client("any")
    world.gateway.infer(unknown)
    assert unknown.ended == (Outcome.INVALID, Reason.UNKNOWN_MODEL)


async def test_questions_get_replies_or_errors(world: World) -> None:
    gateway, controller = world.gateway, world.controller
    controller.on_ask = lambda ask: Reply(ask_id=ask.ask_id, ok=True, body=ask.body)
    replies = await asyncio.gather(*(gateway.ask(Question.INDEX, b"%d" % n) for n in range(5)))
    assert [reply.body for reply in replies] == [b"0", b"1", b"2", b"3", b"4"]
    controller.on_ask = lambda ask: Reply(ask_id=-1, ok=True)
    slow = await gateway.ask(Question.LOAD, timeout_s=0.01)
    assert (slow.ok, slow.code) == (False, 504)
    asking = asyncio.ensure_future(gateway.ask(Question.LOAD))
    await world.until(lambda: len(controller.asks) == 7)
    controller.stop()
    assert (await asking).code == 503
    assert (await gateway.ask(Question.LOAD)).code == 503
