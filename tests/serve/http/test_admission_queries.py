"""Admission queries over HTTP: an infeasible request is rejected by its head, before its body is received."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Outcome, Reason, SoonestEnd, SoonestEnds
from clockwork_serve.serve.gateway import admission_queries
from clockwork_serve.serve.http import connection
from clockwork_serve.serve.http.connection import DIRECT_BYTES
from clockwork_serve.serve.http.server import SMALL_READ_BYTES
from clockwork_serve.units import MIB, ms
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import get

VALUES = np.arange(150_000, dtype=np.float32)
URL = "/v2/models/any/infer"
LIVE = get("/v2/health/live").replace(b"Connection: close\r\n", b"")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    """It has just rejected a request, and sends queries at once."""
    with running_gateway(tmp_path) as running:
        running.do(lambda: expect(running, refusals=True))
        yield running


def expect(gateway: RunningGateway, *, refusals: bool) -> None:
    gateway.servers.gateway.admission_queries._rejections_until_s = math.inf if refusals else 0.0


def message(values: np.ndarray = VALUES, *headers: str, length: int | None = None) -> tuple[bytes, bytes]:
    """Head and body of a request of 600 kB."""
    described = json.dumps(
        {
            "inputs": [
                {
                    "name": "X", "shape": [len(values)], "datatype": "FP32",
                    "parameters": {"binary_data_size": values.nbytes},
                }
            ]
        }
    ).encode()  # fmt: skip
    body = described + values.tobytes()
    lines = [
        f"POST {URL} HTTP/1.1", "Host: h", f"Content-Length: {length or len(body)}",
        f"Inference-Header-Content-Length: {len(described)}", *headers,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode(), body


def infeasible(announced: AdmissionQuery) -> AdmissionReply:
    return AdmissionReply(
        announced_id=announced.announced_id, gateway=announced.gateway, reason=Reason.WOULD_MISS_DEADLINE,
        message="the deadline would be missed by 7.0 ms", retry_after_ns=ms(7),
    )  # fmt: skip


def feasible(announced: AdmissionQuery) -> AdmissionReply:
    return AdmissionReply(announced_id=announced.announced_id, gateway=announced.gateway)


def read_response(client: socket.socket) -> tuple[bytes, dict[str, object]]:
    """One response, and no byte after it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    body = b""
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(length - len(body))
    return head, json.loads(body)


def test_an_infeasible_request_is_rejected_before_its_body_is_received(gateway: RunningGateway) -> None:
    gateway.controller.on_admission_query = infeasible
    head, body = message(VALUES, "x-slo-ms: 60000")
    with gateway.connect() as client:
        client.sendall(head + body[:1000])
        head, answer = read_response(client)
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 1\r" in head or b"Retry-After: 2\r" in head
        assert (answer["reason"], answer["retry_after_ms"]) == ("would_miss_deadline", 7.0)
        client.sendall(body[1000:] + get("/v2/health/live"))
        assert read_response(client)[1] == {"live": True}, "the connection goes on behind the unwanted body"
    (announced,) = gateway.controller.admission_queries
    assert announced.model == "any/1"
    assert announced.deadline_ns - announced.arrival_ns == ms(60_000)
    assert gateway.controller.requests == []


def test_it_is_counted_once_and_its_memory_is_freed(gateway: RunningGateway) -> None:
    gateway.controller.on_admission_query = infeasible
    head, body = message(VALUES, "x-slo-ms: 60000")
    with gateway.connect() as client:
        for _ in range(3):
            client.sendall(head)
            assert read_response(client)[0].startswith(b"HTTP/1.1 429 ")
            client.sendall(body)
    counters = gateway.do(gateway.servers.gateway.counters)
    assert counters.received == 3
    assert counters.outcomes == {"rejected:would_miss_deadline": 3}
    assert counters.region_used_bytes == 0


def test_what_a_summary_shows_to_be_hopeless_is_rejected_without_a_query(gateway: RunningGateway) -> None:
    now_ns, link = time.monotonic_ns(), gateway.servers.gateway.link
    late_ns = now_ns + ms(120_000)
    ends = {"any/1": SoonestEnd(due_ns=now_ns, end_ns=late_ns, each_ns=0, other_end_ns=late_ns)}
    gateway.do(lambda: gateway.controller.send(SoonestEnds(ends=ends, until_ns=late_ns)))
    gateway.until(lambda: link.ends.known)
    head, body = message(VALUES, "x-slo-ms: 60000")
    with gateway.connect() as client:
        client.sendall(head)
        first, told = read_response(client)
        client.sendall(body)
        client.sendall(head + body)
        assert read_response(client)[0].startswith(b"HTTP/1.1 429 ")
    assert first.startswith(b"HTTP/1.1 429 ")
    assert told["reason"] == "would_miss_deadline"
    assert gateway.controller.requests == gateway.controller.admission_queries == []
    counters = gateway.do(gateway.servers.gateway.counters)
    assert (counters.received, counters.refused_by_summary) == (2, 2)
    assert (counters.outcomes, counters.region_used_bytes) == ({"rejected:would_miss_deadline": 2}, 0)


def test_a_feasible_request_keeps_the_deadline_of_its_head(gateway: RunningGateway) -> None:
    head, body = message(VALUES, "x-slo-ms: 5000")
    with gateway.connect() as client:
        client.sendall(head)
        gateway.until(lambda: gateway.controller.admission_queries)
        client.sendall(body)
        head, answer = read_response(client)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert answer["outputs"][0]["shape"] == [len(VALUES)]
    (announced,), (request,) = gateway.controller.admission_queries, gateway.controller.requests
    assert (request.arrival_ns, request.deadline_ns) == (announced.arrival_ns, announced.deadline_ns)


def test_a_complete_request_waits_for_the_reply_to_its_query(gateway: RunningGateway) -> None:
    controller = gateway.controller
    controller.on_admission_query = lambda _: None
    head, body = message(VALUES, "x-slo-ms: 5000")
    with gateway.connect() as client:
        client.sendall(head + body + LIVE)
        gateway.until(lambda: controller.admission_queries)
        assert controller.requests == []
        gateway.do(lambda: controller.send(infeasible(controller.admission_queries[0])))
        assert read_response(client)[0].startswith(b"HTTP/1.1 429 ")
        assert read_response(client)[1] == {"live": True}
        client.sendall(head + body)
        gateway.until(lambda: len(controller.admission_queries) == 2)
        gateway.do(lambda: controller.send(feasible(controller.admission_queries[1])))
        assert read_response(client)[0].startswith(b"HTTP/1.1 200 ")
    assert len(controller.requests) == 1


class Timers:
    """The loop of queries, and when its timers are to fire, in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.at_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def call_at(self, when: float, *work: Any) -> asyncio.TimerHandle:
        self.at_s.append(when)
        return self.loop.call_at(when, *work)


def test_a_query_ends_after_its_deadline_though_timers_may_fire_a_millisecond_early(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = gateway.servers.gateway.admission_queries
    timers = Timers(queries._loop)
    monkeypatch.setattr(queries, "_loop", timers)
    with gateway.connect() as client:
        client.sendall(b"".join(message(VALUES, "x-slo-ms: 5000")))
        assert read_response(client)[0].startswith(b"HTTP/1.1 200 ")
    (query,) = gateway.controller.admission_queries
    assert [round((at_s - query.deadline_ns / 1e9) * 1e3) for at_s in timers.at_s] == [1]


def test_a_query_without_a_reply_ends_at_the_deadline(gateway: RunningGateway) -> None:
    gateway.controller.on_admission_query = lambda _: None
    with gateway.connect() as client:
        client.sendall(b"".join(message(VALUES, "x-slo-ms: 100")))
        assert read_response(client)[0].startswith(b"HTTP/1.1 504 "), "it was waited for until then"
    assert gateway.controller.requests == []


def test_late_and_repeated_replies_change_nothing(gateway: RunningGateway) -> None:
    controller = gateway.controller
    controller.on_admission_query = lambda _: None
    with gateway.connect() as client:
        client.sendall(b"".join(message(VALUES, "x-slo-ms: 1000")))
        assert read_response(client)[0].startswith(b"HTTP/1.1 504 "), "waited for in vain"
        gateway.do(lambda: controller.send(infeasible(controller.admission_queries[0])))
        client.sendall(b"".join(message(VALUES, "x-slo-ms: 5000")))
        gateway.until(lambda: len(controller.admission_queries) == 2)
        twice = feasible(controller.admission_queries[1]), infeasible(controller.admission_queries[1])
        gateway.do(lambda: controller.send(*twice))
        assert read_response(client)[0].startswith(b"HTTP/1.1 200 "), "the first one counts"
    assert len(controller.requests) == 1
    assert gateway.do(gateway.servers.gateway.counters).outcomes == {"expired": 1}


@pytest.mark.parametrize("word", [feasible, infeasible])
def test_after_a_rejection_no_body_is_read_before_the_reply(
    gateway: RunningGateway, word: Callable[[AdmissionQuery], AdmissionReply]
) -> None:
    controller, http = gateway.controller, gateway.servers.http
    controller.on_admission_query = infeasible
    whole = b"".join(message(VALUES, "x-slo-ms: 5000"))
    with gateway.connect() as client, ThreadPoolExecutor(1) as another:
        client.sendall(whole)
        assert read_response(client)[0].startswith(b"HTTP/1.1 429 ")
        controller.on_admission_query = lambda _: None
        sending = another.submit(client.sendall, whole + LIVE)
        gateway.until(lambda: len(controller.admission_queries) == 2)
        time.sleep(0.05)  # in which it could read
        (connection,) = gateway.do(lambda: tuple(http._connections))
        assert connection._content_bytes <= SMALL_READ_BYTES
        gateway.do(lambda: controller.send(word(controller.admission_queries[1])))
        assert read_response(client)[0].startswith(b"HTTP/1.1 200 " if word is feasible else b"HTTP/1.1 429 ")
        sending.result(60)
        assert read_response(client)[1] == {"live": True}


def test_a_lost_controller_ends_queries(gateway: RunningGateway) -> None:
    gateway.controller.on_admission_query = lambda _: None
    with gateway.connect() as client:
        client.sendall(b"".join(message(VALUES, "x-slo-ms: 3600000")))
        gateway.until(lambda: gateway.controller.admission_queries)
        gateway.do(gateway.controller.stop)
        assert read_response(client)[0].startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("headers", [(), ("x-slo-ms: soon",)])
def test_there_is_no_query_without_an_slo_in_the_head(
    gateway: RunningGateway, headers: tuple[str, ...]
) -> None:
    head, body = message(VALUES, *headers)
    with gateway.connect() as client:
        client.sendall(head + body)
        assert read_response(client)[0].startswith(b"HTTP/1.1 400 " if headers else b"HTTP/1.1 200 ")
    assert gateway.controller.admission_queries == []


def test_there_is_no_query_for_a_small_body(gateway: RunningGateway) -> None:
    small = VALUES[: DIRECT_BYTES // 8]
    with gateway.connect() as client:
        client.sendall(b"".join(message(small, "x-slo-ms: 5000")))
        assert read_response(client)[0].startswith(b"HTTP/1.1 200 ")
    assert gateway.controller.admission_queries == []


def test_a_body_too_large_to_discard_closes_the_connection(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "DISCARDED_MAX", MIB)
    gateway.controller.on_admission_query = infeasible
    head, body = message(VALUES, "x-slo-ms: 60000", length=2 * MIB)
    with gateway.connect() as client:
        client.sendall(head + body)
        head, answer = read_response(client)
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"Connection: close" in head
        assert answer["reason"] == "would_miss_deadline"
        client.sendall(body)
        assert client.recv(1) == b""


def test_there_is_no_query_for_a_fast_body_while_nothing_is_rejected(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_queries, "BODY_WAIT_S", 5.0)
    gateway.do(lambda: expect(gateway, refusals=False))
    with gateway.connect() as client:
        client.sendall(b"".join(message(VALUES, "x-slo-ms: 30000")) + LIVE)
        assert read_response(client)[0].startswith(b"HTTP/1.1 200 ")
        assert read_response(client)[1] == {"live": True}
    time.sleep(0.05)
    assert gateway.controller.admission_queries == []
    assert gateway.do(lambda: gateway.servers.gateway.admission_queries._open) == {}


def test_there_is_a_query_for_a_slow_body(gateway: RunningGateway) -> None:
    gateway.do(lambda: expect(gateway, refusals=False))
    gateway.controller.on_admission_query = infeasible
    head, body = message(VALUES, "x-slo-ms: 5000")
    with gateway.connect() as client:
        client.sendall(head + body[:1000])
        assert read_response(client)[0].startswith(b"HTTP/1.1 429 ")
        client.sendall(body[1000:])
    assert gateway.controller.requests == []


@pytest.mark.parametrize("how", ["told", "answered"])
def test_after_a_rejection_queries_are_sent_at_once(
    gateway: RunningGateway, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_queries, "BODY_WAIT_S", 5.0)
    monkeypatch.setattr(admission_queries, "REJECTIONS_LIKELY_S", 3600.0)
    controller = gateway.controller
    gateway.do(lambda: expect(gateway, refusals=how == "told"))
    controller.on_request = lambda request: controller.answer(
        request, outcome=Outcome.REJECTED, reason=Reason.WOULD_MISS_DEADLINE, release=True
    )
    controller.on_admission_query = infeasible if how == "told" else feasible
    with gateway.connect() as client:
        for _ in range(2):
            client.sendall(b"".join(message(VALUES, "x-slo-ms: 30000")))
            assert read_response(client)[0].startswith(b"HTTP/1.1 429 ")
    assert len(controller.admission_queries) == (2 if how == "told" else 1)


def test_a_client_that_disconnects_before_its_query_leaves_nothing_behind(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_queries, "BODY_WAIT_S", 0.05)
    gateway.do(lambda: expect(gateway, refusals=False))
    head, body = message(VALUES, "x-slo-ms: 30000")
    with gateway.connect() as client:
        client.sendall(head + body[:1000])
        gateway.until(lambda: gateway.servers.gateway.admission_queries._open)
    gateway.until(lambda: gateway.servers.gateway.counters().connections == 0)
    time.sleep(0.1)
    assert gateway.controller.admission_queries == []


def test_a_client_that_disconnects_while_sending_leaves_nothing_behind(gateway: RunningGateway) -> None:
    gateway.controller.on_admission_query = lambda _: None
    head, body = message(VALUES, "x-slo-ms: 5000")
    with gateway.connect() as client:
        client.sendall(head + body[:1000])
        gateway.until(lambda: gateway.controller.admission_queries)
    gateway.until(lambda: gateway.servers.gateway.counters().connections == 0)
    gateway.do(lambda: gateway.controller.send(infeasible(gateway.controller.admission_queries[0])))
    with gateway.connect() as client:
        client.sendall(get("/v2/health/live"))
        assert read_response(client)[1] == {"live": True}
    counters = gateway.do(gateway.servers.gateway.counters)
    assert (counters.received, counters.region_used_bytes) == (0, 0)


def test_a_client_that_resets_while_sending_leaves_nothing_behind(gateway: RunningGateway) -> None:
    """Direct reads from the socket must not hide the disconnect from the loop."""
    gateway.do(lambda: expect(gateway, refusals=False))
    head, body = message(VALUES, "x-slo-ms: 30000")
    for size in (1000, 300_000, len(body) - 1):
        with gateway.connect() as client:
            client.sendall(head + body[:size])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def gone() -> bool:
        # Not only without connections: the last may not have been accepted yet.
        counters = gateway.servers.gateway.counters()
        return (counters.connections, counters.region_used_bytes) == (0, 0)

    gateway.until(gone)
    assert gateway.do(gateway.servers.gateway.counters).received == 0
