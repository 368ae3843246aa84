"""Input of one connection can neither crash the gateway nor block others; each case once did."""

from __future__ import annotations

import gc
import json
import logging
import socket
import time
import weakref
from collections import Counter

import pytest

from clockwork_serve.messages import Ask, Reply
from clockwork_serve.serve.gateway.settings import SMALL_READ_BYTES
from clockwork_serve.serve.http.exchange import HttpExchange
from tests.serve.gateway.running import RunningGateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, ask, get, post

UPGRADE = b"GET /v2/health/live HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
CONNECT = b"CONNECT a:1 HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize("digits", [5000, 20_000])
def test_a_content_length_of_thousands_of_digits_is_a_number_too(
    gateway: RunningGateway, digits: int, caplog: pytest.LogCaptureFixture
) -> None:
    sent = post(INFER, IDENT_JSON)
    length = f"Content-Length: {len(IDENT_JSON)}".encode()
    sent = sent.replace(length, b"Content-Length: %s%d" % (b"0" * digits, len(IDENT_JSON)))
    assert ask(gateway, sent).status == (200 if digits == 5000 else 431)
    assert caplog.text == ""


@pytest.mark.parametrize("body_bytes", [10, 100_000])
@pytest.mark.parametrize(("value", "status"), [("9" * 5000, 400), ("0" * 5000 + "1", 400), ("²", 400)])
def test_a_header_length_of_thousands_of_digits_is_an_error(
    gateway: RunningGateway, body_bytes: int, value: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    body = bytes(body_bytes)
    head = post(INFER, body).replace(
        b"Host: here", b"Inference-Header-Content-Length: " + value.encode("latin-1")
    )
    assert ask(gateway, head).status == status
    assert caplog.text == ""


@pytest.mark.parametrize("one", [UPGRADE, CONNECT])
def test_thousands_of_requests_for_other_protocols_in_a_row(gateway: RunningGateway, one: bytes) -> None:
    count = 3000
    found = gateway.exchange(one * count + get("/v2/health/live"))
    assert found.count(b"HTTP/1.1 ") == count + 1


def test_a_hundred_thousand_requests_at_once_do_not_block_others(gateway: RunningGateway) -> None:
    http = gateway.servers.http
    find = http.find_route
    greedy: list[bytes] = []
    before: list[int] = []

    def counting(url: bytes):
        (greedy if url == b"/v2/health/live" else before).append(
            url if url == b"/v2/health/live" else len(greedy)
        )
        return find(url)

    one = get("/v2/health/live").replace(b"Connection: close\r\n", b"")
    http.find_route = counting
    try:
        with gateway.connect() as many, gateway.connect() as other:
            many.setblocking(False)
            # While the loop is held, both are in the system's buffers.
            gateway.loop.call_soon_threadsafe(time.sleep, 0.5)
            sent = many.send(one * 100_000)
            other.sendall(get("/v2"))
            assert Found(other.makefile("rb").read()).status == 200
            assert sent > 20 * SMALL_READ_BYTES
            assert before[0] * len(one) < 8 * SMALL_READ_BYTES
            many.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    finally:
        http.find_route = find


@pytest.mark.parametrize("padding", [0, 100], ids=["tiny", "small"])
def test_many_requests_at_once_are_handled_a_few_in_a_turn(gateway: RunningGateway, padding: int) -> None:
    count = 60
    http, values = gateway.servers.http, [float(n) for n in range(count)]
    dispatch, taken, turn = http.dispatch, Counter(), [0]

    def counting(exchange: HttpExchange) -> None:
        taken[turn[0]] += 1
        dispatch(exchange)

    def next_turn() -> None:
        turn[0] += 1
        if http.dispatch is counting:
            gateway.loop.call_soon(next_turn)

    def body(value: float) -> bytes:
        tensor = {"name": "X", "shape": [1, 2], "datatype": "FP32", "data": [value, 0]}
        return json.dumps({"inputs": [tensor]}).encode() + b" " * padding

    http.dispatch = counting
    try:
        gateway.loop.call_soon_threadsafe(next_turn)
        last = post(INFER, body(-1))
        found = gateway.exchange(b"".join(post(INFER, body(value), close=False) for value in values) + last)
    finally:
        http.dispatch = dispatch
    answers = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in found.split(b"HTTP/1.1 200 OK")[1:]]
    assert [answer["outputs"][0]["data"][0] for answer in answers] == [*values, -1]
    # Eight and those of the last kilobyte that was parsed; twice, as it is read before callbacks and in one.
    assert max(taken.values()) <= 2 * (8 + 1024 // len(post(INFER, body(0))))


def test_a_bug_in_answering_is_one_500(gateway: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    reply = gateway.controller.on_ask

    def nonsense(question: Ask) -> Reply:
        return Reply(ask_id=question.ask_id, ok=True, body=b"nonsense")

    gateway.controller.on_ask = nonsense
    try:
        with caplog.at_level(logging.ERROR):
            found = ask(gateway, get("/v2/models/stats"))
    finally:
        gateway.controller.on_ask = reply
    assert found.status == 500
    assert "see its log" in found.json["error"]
    assert "Traceback" in caplog.text
    assert ask(gateway, get("/v2/health/live")).status == 200


def test_a_bug_in_reading_is_one_500(gateway: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    http = gateway.servers.http
    find = http.find_route

    def broken(url: bytes):
        raise ZeroDivisionError(url)

    http.find_route = broken
    try:
        found = ask(gateway, get("/v2"))
    finally:
        http.find_route = find
    assert found.status == 500
    assert "ZeroDivisionError" in caplog.text
    assert ask(gateway, get("/v2")).status == 200


def test_a_body_that_cannot_be_decompressed_counts_as_an_invalid_request(gateway: RunningGateway) -> None:
    before = gateway.do(gateway.servers.gateway.counters)
    for size in (100, 10_000):
        assert ask(gateway, post(INFER, bytes(size), "Content-Encoding: gzip")).status == 400
    after = gateway.do(gateway.servers.gateway.counters)
    assert after.received - before.received == 2
    assert sum(after.outcomes.values()) - sum(before.outcomes.values()) == 2


def test_paths_longer_than_any_name_are_not_parsed(gateway: RunningGateway) -> None:
    assert ask(gateway, get("/v2/models/" + "%41" * 1500)).status == 404
    assert ask(gateway, get("/v2?" + "b" * 5000)).status == 200


def test_a_closed_connection_s_input_is_freed(gateway: RunningGateway) -> None:
    gc.disable()
    try:
        with gateway.connect() as client:
            client.sendall(b"GET /" + b"b" * 1000)
            gateway.until(lambda: any(each._phase for each in gateway.servers.http._connections))
            (known,) = gateway.do(lambda: [weakref.ref(each) for each in gateway.servers.http._connections])
        gateway.until(lambda: known() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("body", [get("/v2/health/live"), bytes(100_000)], ids=["small", "large"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("method", [b"POST", b"CONNECT"])
def test_a_body_with_an_upgrade_is_neither_a_request_nor_stale_memory(
    gateway: RunningGateway, method: bytes, body: bytes, chunked: bool
) -> None:
    gateway.controller.requests.clear()
    body += b"-" * (-len(body) % 4)
    headers = ("Inference-Header-Content-Length: 0", "Upgrade: h2c", "Connection: Upgrade")
    sent = post("/v2/models/any/infer", body, *headers, close=False).replace(b"POST", method, 1)
    if chunked:
        length = b"Content-Length: %d" % len(body)
        sent = sent.replace(length, b"Transfer-Encoding: chunked").replace(
            body, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        )
    found = gateway.exchange(sent + (b"" if method == b"CONNECT" else get("/v2/health/live")))
    if method == b"CONNECT":
        assert Found(found).status == 400
        assert "CONNECT: expected no body" in Found(found).json["error"]
        assert gateway.controller.requests == []
    else:
        answer, _, after = found.rpartition(b"HTTP/1.1 200 OK")
        assert Found(answer).status == 200
        assert answer.endswith(body)
        assert after.endswith(b'{"live":true}')
