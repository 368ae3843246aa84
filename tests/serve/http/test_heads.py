"""Requests with equal heads on one connection: each is handled as if its head had been parsed."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

import pytest

from clockwork_serve.messages import Request
from clockwork_serve.serve.http import connection
from tests.serve.gateway.running import RunningGateway
from tests.serve.http.requests import IDENT_JSON, INFER, post


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All heads that are reused."""
    used: list[object] = []
    again = connection.ParsedHead.new_exchange

    def counted(self: connection.ParsedHead, on_response: Any) -> Any:
        used.append(self)
        return again(self, on_response)

    monkeypatch.setattr(connection.ParsedHead, "new_exchange", counted)
    return used


def binary(values: tuple[float, float], **parameters: Any) -> bytes:
    tensor = struct.pack("<2f", *values)
    inputs = [{"name": "X", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True, **parameters}}).encode()
    return post(INFER, head + tensor, f"Inference-Header-Content-Length: {len(head)}", close=False)


def response(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one response, and no byte after it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    body = b""
    while len(body) < length:
        body += client.recv(length - len(body))
    return head, body


def values(body: bytes) -> tuple[float, ...]:
    return struct.unpack("<2f", body[-8:])


def test_each_request_with_the_same_head_has_its_own_values(
    gateway: RunningGateway, heads: list[object]
) -> None:
    with gateway.connect() as client:
        for n in range(5):
            client.sendall(binary((n, -n)))
            head, body = response(client)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert values(body) == (n, -n)
    assert len(heads) == 4


def test_a_repeated_head_is_reused_with_a_json_body_too(gateway: RunningGateway, heads: list[object]) -> None:
    with gateway.connect() as client:
        for n in (1.5, 2.5, 3.5):
            client.sendall(post(INFER, IDENT_JSON.replace(b"1.5", str(n).encode()), close=False))
            assert json.loads(response(client)[1])["outputs"][0]["data"] == [n, -2]
    assert len(heads) == 2


@pytest.mark.parametrize("cut", [1, 40, -9, -1])
def test_a_request_that_arrives_in_pieces_after_one_that_did_not(gateway: RunningGateway, cut: int) -> None:
    message = binary((1, 2))
    with gateway.connect() as client:
        client.sendall(message)
        response(client)
        client.sendall(message[:cut])
        gateway.do(lambda: None)
        client.sendall(message[cut:])
        assert values(response(client)[1]) == (1, 2)
        client.sendall(message)
        assert values(response(client)[1]) == (1, 2)


def test_two_requests_in_one_read_after_one_alone(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        client.sendall(binary((1, 2)))
        response(client)
        client.sendall(binary((3, 4)) + binary((5, 6)))
        assert values(response(client)[1]) == (3, 4)
        assert values(response(client)[1]) == (5, 6)


@pytest.mark.parametrize("around", [(b"\r\n", b""), (b"", b"\r\n"), (b"\r\n\r\n", b"")])
def test_empty_lines_between_requests_are_not_part_of_them(
    gateway: RunningGateway, around: tuple[bytes, bytes]
) -> None:
    before, after = around
    with gateway.connect() as client:
        for n in range(4):
            client.sendall(before + binary((n, n + 1)) + after)
            assert values(response(client)[1]) == (n, n + 1)


def test_a_head_with_connection_close_is_not_reused(gateway: RunningGateway, heads: list[object]) -> None:
    with gateway.connect() as client:
        client.sendall(binary((1, 2)))
        response(client)
        client.sendall(post(INFER, IDENT_JSON))
        response(client)
        assert client.recv(1) == b""
    assert not heads


def test_an_slo_in_a_repeated_head_counts_from_each_arrival(
    gateway: RunningGateway, heads: list[object]
) -> None:
    message = binary((1, 2)).replace(b"Host: here", b"Host: here\r\nx-slo-ms: 25000")
    with gateway.connect() as client:
        for _ in range(3):
            time.sleep(0.02)  # an arrival is known to a tick of the kernel
            client.sendall(message)
            response(client)
    assert len(heads) == 2
    requests: list[Request] = gateway.controller.requests
    assert [request.deadline_ns - request.arrival_ns for request in requests] == [25_000_000_000] * 3
    assert len({request.arrival_ns for request in requests}) == 3


def test_an_invalid_body_with_a_reused_head_is_rejected(gateway: RunningGateway) -> None:
    good = binary((1, 2))
    wrong = good.replace(b'"FP32"', b'"FP16"')
    with gateway.connect() as client:
        for message, status in ((good, 200), (good, 200), (wrong, 400), (good, 200)):
            client.sendall(message)
            assert response(client)[0].startswith(b"HTTP/1.1 %d " % status)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((), ""),
        ((f"traceparent: 00-{TRACE}",), TRACE),
        ((f"TraceParent: 00-{TRACE}", "tracestate: a=1", "Tracestate: b=2"), f"{TRACE} a=1,b=2"),
        ((f"traceparent: 00-{TRACE}", f"traceparent: 00-{TRACE}"), ""),
        (("traceparent: nonsense", "tracestate: a=1"), ""),
        (("tracestate: a=1",), ""),
    ],
)
def test_the_trace_of_a_client_goes_with_each_request_of_its_head(
    gateway: RunningGateway, heads: list[object], lines: tuple[str, ...], found: str
) -> None:
    with gateway.connect() as client:
        for _ in range(3):
            client.sendall(post(INFER, IDENT_JSON, *lines, close=False))
            assert response(client)[0].startswith(b"HTTP/1.1 200")
        client.sendall(post(INFER, IDENT_JSON, close=False))
        response(client)

    assert len(heads) == (2 if lines else 3)
    assert [one.trace for one in gateway.controller.requests] == [found, found, found, ""]
