"""What a gateway ends by itself is kept, with an id that its client is told, and what it delivered late."""

from __future__ import annotations

import time

import msgspec
import pytest
from msgspec import structs

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Answer, Outcome, Readiness, Reason, Request, SoonestEnd, SoonestEnds
from clockwork_serve.serve.gateway.gateway import NAME_CHARS
from clockwork_serve.telemetry import Journal, Step
from clockwork_serve.units import MIB, NS_PER_S, ms
from tests.serve.gateway.worlds import Client, World

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Kept(Journal):
    """Keeps steps in memory."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_step(self, now_ns, events, effects) -> None:
        self.steps.append(Step(now_ns, tuple(events), tuple(effects)))

    @property
    def ends(self) -> list[tuple[str, str, str]]:
        """Model, outcome and reason of each."""
        return [
            (request.model, answer.outcome, answer.reason)
            for step in self.steps
            for request, answer in zip(step.events, step.effects, strict=False)
            if isinstance(request, Request) and isinstance(answer, Answer)
        ]


@pytest.fixture
def kept(world: World) -> Kept:
    world.gateway.refusals = found = Kept()
    return found


async def test_who_is_answered_well_is_kept_by_the_controller_alone(world: World, kept: Kept) -> None:
    client = Client()
    client.trace = TRACE
    await world.infer(client)
    assert world.controller.requests[0].trace == TRACE
    assert kept.steps == []


async def test_what_is_wrong_has_an_id_that_its_client_is_told(world: World, kept: Kept) -> None:
    client, unknown = Client(data=b"123"), Client("x" * 1000)
    client.trace, client.identity = TRACE, "team-a"
    await world.infer(client)
    await world.infer(unknown)
    request, answer = kept.steps[0].events[0], kept.steps[0].effects[0]
    assert isinstance(request, Request)
    assert isinstance(answer, Answer)
    assert request.request_id == answer.request_id == client.ends[0].request_id
    assert (request.trace, request.tenant, request.gateway) == (TRACE, "team-a", "g0")
    assert answer.message == client.ends[0].message
    assert len({client.ends[0].request_id, unknown.ends[0].request_id, ""}) == 3
    assert kept.ends == [
        ("ident/1", "invalid", "bad_input"), ("x" * (NAME_CHARS - 3) + "...", "invalid", "unknown_model"),
    ]  # fmt: skip


async def test_refusals_of_all_kinds_are_kept(world: World, kept: Kept) -> None:
    gateway = world.gateway
    world.controller.on_request = world.keep
    # Its deadline was over before it was read.
    old = Client(slo_ms=100)
    old.arrival_ns -= NS_PER_S
    await world.infer(old)
    # Hopeless by the controller's summary.
    now_ns = time.monotonic_ns()
    soonest = SoonestEnd(
        due_ns=now_ns, end_ns=now_ns + ms(90_000), each_ns=0, other_end_ns=now_ns + ms(99_000)
    )
    world.controller.send(SoonestEnds(ends={"ident/1": soonest}, until_ns=now_ns + ms(60_000)))
    await world.until(lambda: gateway.link.ends.known)
    world.hold_back()
    await world.infer(Client())
    # No room for its tensors.
    first = Client("any", bytes(MIB // 2))
    gateway.infer(first)
    await world.infer(Client("any", bytes(MIB // 2)))
    await world.until(lambda: world.controller.requests)
    (sent,) = world.controller.requests
    refused, reason = Outcome.REJECTED, Reason.QUEUE_FULL
    world.controller.send(
        Answer(request_id=sent.request_id, gateway=sent.gateway, outcome=refused, reason=reason)
    )
    await world.until(lambda: first.ends)  # the controller has kept it itself
    # The server does not serve.
    world.controller.send(Readiness(ready=False, why="no worker"))
    await world.until(lambda: not gateway.link.serves)
    await world.infer(Client("nope"))
    assert kept.ends == [
        ("ident/1", "expired", ""), ("ident/1", "rejected", "would_miss_deadline"),
        ("any/1", "rejected", "queue_full"),
        ("nope/", "rejected", "not_serving"),
    ]  # fmt: skip
    slos = [event.slo_ns for step in kept.steps for event in step.events if isinstance(event, Request)]
    assert slos[:2] == [ms(100), ms(60_000)]
    assert all(
        not event.tensors for step in kept.steps for event in step.events if isinstance(event, Request)
    )


async def test_late_answers_are_named(world: World, kept: Kept) -> None:
    def late(request: Request) -> Answer:
        time.sleep(0.03)
        return world.controller.echo(request)

    world.controller.on_request = late
    client = await world.infer(Client(slo_ms=10))
    assert client.ended == (Outcome.EXPIRED, Reason.LATE)
    world.gateway.link.report_delivered()
    (answer,) = kept.steps[0].effects
    assert kept.steps[0].events == ()
    assert (answer.request_id, answer.reason) == (client.ends[0].request_id, "late")


async def test_who_loses_the_controller_is_kept_as_it_was_told(world: World, kept: Kept) -> None:
    world.controller.on_request = world.keep
    client = Client()
    request_id = world.gateway.infer(client)
    world.gateway.close()
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert client.ends[0].request_id == kept.steps[0].events[0].request_id == request_id
    assert kept.ends == [("ident/1", "rejected", "not_serving")]


async def test_an_answer_that_cannot_be_delivered_is_kept_as_the_client_was_told(
    world: World, kept: Kept
) -> None:
    world.controller.on_request = lambda request: structs.replace(
        world.controller.echo(request), outputs=b"what nobody can read"
    )
    client = await world.infer(Client())
    assert client.ended == (Outcome.FAILED, Reason.NONE)
    assert kept.steps[0].events[0].request_id == world.controller.requests[0].request_id
    assert kept.ends == [("ident/1", "failed", "")]


async def test_unreadable_bodies_are_kept(world: World, kept: Kept) -> None:
    response = world.gateway.unreadable(Client(), InvalidRequest("no gzip"))
    world.gateway.refuse_unread(Client(), "busy", busy=True)
    assert response.request_id
    assert kept.ends == [
        ("ident/", "invalid", "bad_input"), ("ident/", "rejected", "queue_full"),
    ]  # fmt: skip


def test_what_is_kept_is_small() -> None:
    request = Request(
        request_id="gateway-0-19b0b2c5d5e-12345", gateway="gateway-0", model="resnet50/1", arrival_ns=1 << 50,
        deadline_ns=1 << 50,
    )  # fmt: skip
    answer = Answer(
        request_id=request.request_id, gateway="gateway-0", outcome=Outcome.REJECTED,
        reason=Reason.WOULD_MISS_DEADLINE, message="the deadline would be missed by 12.3 ms: others are due",
    )  # fmt: skip

    assert len(msgspec.msgpack.encode((1 << 50, (request,), (answer,), 0))) < 800
