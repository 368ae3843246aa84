"""Readiness of a gateway: it says whether requests would be served, whatever the reason if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Outcome,
    Quarantined,
    Question,
    Readiness,
    Reason,
    TensorsOffered,
    TensorsReached,
)
from clockwork_serve.serve.gateway.controller_link import GRACE_NS, ControllerLink, GatewayLink, LinkListener
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.gateway.worlds import Client, World
from tests.serve.http.requests import IDENT_JSON, INFER, Found, get, post


async def test_a_stuck_controller_gets_no_more_questions(world: World) -> None:
    gateway, controller = world.gateway, world.controller
    changes: list[bool] = []
    gateway.readiness_listeners.append(lambda: changes.append(gateway.link.ready))
    controller.on_request = world.keep
    waits = Client(slo_ms=60_000)
    gateway.infer(waits)
    await world.until(lambda: controller.requests)
    controller.beats = False
    await world.until(lambda: gateway.link.stuck)
    assert changes[-1] is False
    assert "the controller has not answered for" in gateway.link.why_not_ready
    late = Client(slo_ms=60_000)
    assert gateway.infer(late) == "", "it is refused at once"
    assert late.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert late.ends[0].retry_after_ns > 0
    reply = await gateway.ask(Question.STATISTICS)
    assert (reply.ok, reply.code) == (False, 503)
    assert not waits.ends, "its controller may be back, or another one be there, in time"
    # It continues: heartbeats are returned, and the answer is sent.
    controller.beats = True
    controller.send(*controller.kept_beats)
    await world.until(lambda: gateway.link.ready)
    assert changes[-1] is True
    controller.send(controller.echo(controller.requests[0]))
    await world.until(lambda: waits.ends)
    assert waits.ended == (Outcome.OK, Reason.NONE)
    assert len(controller.requests) == 1


async def test_open_questions_fail_when_the_controller_is_stuck(world: World) -> None:
    world.controller.on_ask = lambda ask: None
    world.controller.beats = False
    reply = await world.gateway.ask(Question.LOAD, timeout_s=600)
    assert (reply.ok, reply.code) == (False, 503)
    assert "the controller has not answered" in msgspec.json.decode(reply.body)["error"]


async def test_the_next_controller_gets_the_requests_of_a_stuck_one(world: World) -> None:
    world.controller.on_request = world.keep
    client = Client(slo_ms=60_000)
    world.gateway.infer(client)
    await world.until(lambda: world.controller.requests)
    world.controller.beats = False
    await world.until(lambda: world.gateway.link.stuck)
    world.controller.stop()
    world.controller.beats = True
    world.controller.on_request = world.controller.echo
    await world.until(lambda: not world.gateway.link.is_open)
    await world.controller.start()
    await world.until(lambda: client.ends)
    assert client.ended == (Outcome.OK, Reason.NONE)
    assert world.gateway.link.ready


def probe(gateway: RunningGateway, path: str) -> int:
    return Found(gateway.exchange(get(path))).status


def test_ready_is_503_whenever_requests_are_not_served_and_live_is_200(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        controller = gateway.controller

        def serves() -> bool:
            ready = probe(gateway, "/v2/health/ready") == 200
            answered = Found(gateway.exchange(post(INFER, IDENT_JSON))).status == 200
            assert ready == answered
            assert probe(gateway, "/v2/health/live") == 200
            return ready

        def turns(*, to: bool) -> None:
            gateway.until(lambda: gateway.servers.gateway.link.ready is to)
            assert serves() is to

        assert serves()
        # All models are in quarantine: the controller would fail every request.
        on_request = controller.on_request
        keys = [added.model.key for _, added in controller.catalogue]
        controller.on_request = lambda request: controller.answer(
            request, outcome=Outcome.FAILED, reason=Reason.QUARANTINED
        )
        gateway.do(lambda: controller.send(*[Quarantined(model=key, why="it kills") for key in keys]))
        turns(to=False)
        controller.on_request = on_request
        gateway.do(lambda: controller.send(Quarantined(model="ident/1")))
        turns(to=True)
        # There is no worker that could run one, or the server is stopping.
        for why in ("0 of 1 devices are warm", "draining"):
            controller.on_request = lambda request: controller.answer(
                request, outcome=Outcome.REJECTED, reason=Reason.NOT_SERVING
            )
            gateway.do(lambda why=why: controller.send(Readiness(ready=False, why=why)))
            turns(to=False)
            controller.on_request = on_request
            gateway.do(lambda: controller.send(Readiness(ready=True)))
            turns(to=True)
        # The controller is connected and stuck; then it dies.
        controller.beats = False
        turns(to=False)
        gateway.do(controller.stop)
        turns(to=False)
        controller.beats = True
        gateway.run(controller.start())
        turns(to=True)


@pytest.mark.parametrize("standby", [True, False])
async def test_who_waits_for_a_silent_controller_waits_on_where_another_one_stands_by(standby: bool) -> None:
    unwanted = LinkListener(*[lambda *_: None] * 4)
    link = GatewayLink(_nobody, None, unwanted, standby=standby)
    swept: list[bool] = []
    link._credit_gate.sweep = lambda: swept.append(True)  # type: ignore[method-assign]
    link._sweep_waiting()
    assert (swept, link.grace_ns()) == ([True], GRACE_NS), "it answers"
    link._pulse._missed = 1
    assert link.grace_ns() == 0, "nobody is told later than necessary"
    link._sweep_waiting()
    assert len(swept) == (1 if standby else 2)


async def _nobody(*_: Any) -> ControllerLink:
    raise TransportError("nobody")


async def test_a_gateway_that_no_worker_reaches_accepts_nothing_and_says_why(world: World) -> None:
    gateway, controller = world.gateway, world.controller
    controller.send(TensorsReached(gateway="g0", ok=False, why="worker-a: its port is filtered"))
    await world.until(lambda: not gateway.link.ready)
    client = Client(slo_ms=60_000)
    assert gateway.infer(client) == "", "at once"
    assert client.ended == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert "no worker gets tensors from this gateway: worker-a: its port" in client.ends[0].message
    controller.stop()
    await world.until(lambda: not gateway.link.is_open)
    await controller.start()
    await world.until(lambda: gateway.link.is_open)
    assert not gateway.link.ready, "the next controller has said nothing of it yet"
    controller.send(TensorsReached(gateway="g0", ok=True))
    await world.until(lambda: gateway.link.ready)
    assert not controller.requests


async def test_a_gateway_offers_its_tensors_on_each_link(world: World) -> None:
    world.gateway.slots.server = "10.0.0.4:7001"
    world.controller.stop()
    await world.until(lambda: not world.gateway.link.is_open)
    await world.controller.start()
    await world.until(lambda: world.controller.offers)
    assert world.controller.offers == [TensorsOffered(gateway="g0", server="10.0.0.4:7001")]
