"""More requests than a gateway may submit or keep: which wait, which are rejected; nothing is left over."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from clockwork_serve.messages import RequestCredit
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, post


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    """Its controller answers nothing by itself, and grants credit for two requests."""
    with running_gateway(tmp_path, max_requests=6) as found:
        found.controller.on_request = lambda request: None
        found.do(lambda: found.controller.send(RequestCredit(heard=0, most=2)))
        found.until(lambda: found.servers.gateway.link._credit_gate._credit.most == 2)
        yield found


def begin(gateway: RunningGateway, clients: ExitStack, slo_ms: int) -> socket.socket:
    client = clients.enter_context(gateway.connect())
    before = gateway.do(gateway.servers.gateway.counters).received
    client.sendall(post(INFER, IDENT_JSON, f"x-slo-ms: {slo_ms}"))
    gateway.until(lambda: gateway.servers.gateway.counters().received > before)
    return client


def end(client: socket.socket) -> Found:
    raw = b""
    while part := client.recv(65536):
        raw += part
    return Found(raw)


def answer(gateway: RunningGateway, *numbers: int) -> None:
    controller = gateway.controller
    gateway.until(lambda: len(controller.requests) > max(numbers))
    gateway.do(lambda: controller.send(*[controller.echo(controller.requests[number]) for number in numbers]))


def test_a_request_without_credit_for_too_long_is_rejected_with_advice(gateway: RunningGateway) -> None:
    with ExitStack() as clients:
        first, second = (begin(gateway, clients, 20_000) for _ in range(2))
        third = end(begin(gateway, clients, 200))
        assert len(gateway.controller.requests) == 2
        assert (third.status, third.json["outcome"], third.json["reason"]) == (429, "rejected", "queue_full")
        assert third.json["retry_after_ms"] > 0
        assert "more requests arrive than" in third.json["error"]
        answer(gateway, 0, 1)
        assert [end(client).status for client in (first, second)] == [200, 200]
    counters = gateway.do(gateway.servers.gateway.counters)
    assert (counters.received, counters.open, counters.outcomes) == (3, 0, {"rejected:queue_full": 1})
    assert counters.region_used_bytes == 0


def test_a_request_without_credit_of_a_silent_controller_is_told_that_it_is_silent(
    gateway: RunningGateway,
) -> None:
    gateway.controller.beats = False
    gateway.until(lambda: gateway.servers.gateway.link.why_silent)
    with ExitStack() as clients:
        for _ in range(2):
            begin(gateway, clients, 20_000)
        third = end(begin(gateway, clients, 200))
    assert (third.status, third.json["reason"]) == (503, "not_serving")
    assert "the controller has not answered for" in third.json["error"]


def test_once_requests_waited_in_vain_few_wait(gateway: RunningGateway) -> None:
    with ExitStack() as clients:
        gateway.do(lambda: gateway.controller.send(RequestCredit(heard=0, most=1)))
        begin(gateway, clients, 20_000)
        assert end(begin(gateway, clients, 100)).json["reason"] == "queue_full"
        oldest, *_ = (begin(gateway, clients, 20_000) for _ in range(3))
        refused = end(oldest)
        assert (refused.status, refused.json["reason"]) == (429, "queue_full")
        assert "more requests arrive than the server can schedule" in refused.json["error"]
        assert refused.json["retry_after_ms"] > 0
        assert len(gateway.controller.requests) == 1


def test_the_newest_request_is_sent_first_when_there_is_credit(gateway: RunningGateway) -> None:
    with ExitStack() as clients:
        held = [begin(gateway, clients, 20_000) for _ in range(4)]
        gateway.do(lambda: gateway.controller.send(RequestCredit(heard=1, most=2)))
        answer(gateway, 2)
        assert end(held[3]).status == 200
        gateway.do(lambda: gateway.controller.send(RequestCredit(heard=2, most=2)))
        answer(gateway, 0, 1, 3)
        assert [end(client).status for client in held[:3]] == [200] * 3


def test_a_client_that_leaves_before_submission_is_not_submitted(
    gateway: RunningGateway,
) -> None:
    with ExitStack() as clients:
        for _ in range(2):
            begin(gateway, clients, 20_000)
        begin(gateway, clients, 20_000).close()
        gateway.until(lambda: gateway.servers.gateway.counters().outcomes == {"cancelled": 1})
        gateway.do(lambda: gateway.controller.send(RequestCredit(heard=2, most=2)))
        answer(gateway, 0, 1)
        assert (len(gateway.controller.requests), gateway.controller.cancels) == (2, [])
        gateway.until(lambda: gateway.servers.gateway.slots.used_bytes == 0)


def test_no_more_requests_are_open_than_may_be(gateway: RunningGateway) -> None:
    with ExitStack() as clients:
        for _ in range(6):
            begin(gateway, clients, 20_000)
        refused = end(begin(gateway, clients, 20_000))
        assert (refused.status, refused.json["reason"]) == (429, "queue_full")
        assert "requests wait for answers already" in refused.json["error"]


def test_a_lost_controller_ends_waiting_requests_too(gateway: RunningGateway) -> None:
    with ExitStack() as clients:
        held = [begin(gateway, clients, 20_000) for _ in range(4)]
        gateway.do(gateway.controller.stop)
        assert [end(client).status for client in held] == [503] * 4
    assert gateway.do(gateway.servers.gateway.counters).outcomes == {"rejected:not_serving": 4}
