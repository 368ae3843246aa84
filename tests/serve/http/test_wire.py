"""HTTP over raw sockets: split input, pipelines, slow and hostile clients; and metrics."""

from __future__ import annotations

import json
import socket
import time
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from clockwork_serve.messages import Answer, Request
from clockwork_serve.units import MIB
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, X, ask, get, post

# The stock client's destructor stumbles when the collector happens to run it in another thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")

# HTTP itself


def test_pipelined_requests_are_answered_in_order(gateway: RunningGateway) -> None:
    held: list[Request] = []

    def first_is_slow(request: Request) -> Answer | None:
        if not held:
            held.append(request)
            return None
        return gateway.controller.echo(request)

    gateway.controller.on_request = first_is_slow
    with gateway.connect() as client:
        bodies = [IDENT_JSON.replace(b"1.5", str(n).encode()) for n in range(5)]
        client.sendall(
            b"".join(post("/v2/models/ident/infer", body, close=False) for body in bodies)
            + get("/v2/health/live")
        )
        gateway.until(lambda: len(gateway.controller.requests) == 5)
        gateway.do(lambda: gateway.controller.send(gateway.controller.echo(held[0])))
        found = b""
        while part := client.recv(65536):
            found += part
    bodies_back = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in found.split(b"HTTP/1.1 ")[1:]]
    assert [body["outputs"][0]["data"] for body in bodies_back[:5]] == [[n, -2] for n in range(5)]
    assert bodies_back[5] == {"live": True}


def test_more_pipelined_requests_than_are_read_at_once(gateway: RunningGateway) -> None:
    count = 2000
    sent = get("/v2/health/live").replace(b"Connection: close\r\n", b"") * count + get("/v2")
    found = gateway.exchange(sent)
    assert found.count(b"HTTP/1.1 200 OK") == count + 1


@pytest.mark.parametrize("step", [1, 7, 100])
def test_requests_may_be_split(gateway: RunningGateway, step: int) -> None:
    head = b'{"inputs":[{"name":"X","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}'
    sent = post("/v2/models/ident/infer", head + X.tobytes(), f"Inference-Header-Content-Length: {len(head)}")
    with gateway.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(sent), step):
            client.sendall(sent[at : at + step])
        found = Found(client.makefile("rb").read())
    assert found.json["outputs"][0]["data"] == [1.5, -2]


def test_chunked_bodies(gateway: RunningGateway) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (IDENT_JSON[:10], IDENT_JSON[10:]))
    head = b"POST /v2/models/ident/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert ask(gateway, head + chunks + b"0\r\n\r\n").json["outputs"][0]["data"] == [1.5, -2]
    endless = b"%x\r\n%s\r\n" % (MIB, bytes(MIB)) * 9
    assert ask(gateway, head + endless).status == 413


def test_a_client_may_expect_100_continue(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        sent = post("/v2/models/ident/infer", IDENT_JSON, "Expect: 100-continue")
        client.sendall(sent[: -len(IDENT_JSON)])
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(IDENT_JSON)
        assert Found(client.makefile("rb").read()).status == 200
    assert ask(gateway, post("/v2", b"x", "Expect: miracles")).status == 417


def test_http_1_0_clients(gateway: RunningGateway) -> None:
    found = gateway.exchange(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert b"Connection: close" in found
    with gateway.connect() as client:
        client.sendall(b"GET /v2/health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"Connection: keep-alive" in client.recv(1000)
        client.sendall(b"GET /v2/health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"200 OK" in client.recv(1000)


def test_upgrades_are_not_supported(gateway: RunningGateway) -> None:
    asked = b"GET /v2 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    found = gateway.exchange(asked + get("/v2/health/live"))
    assert found.count(b"HTTP/1.1 200 OK") == 2
    assert b"clockwork-serve" in found


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n", 413),
        (b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 400_000, 431),
        (b"GET /" + b"x" * 400_000, 431),
    ],
)
def test_malformed_http_is_rejected_and_the_connection_closed(
    gateway: RunningGateway, sent: bytes, status: int
) -> None:
    found = ask(gateway, sent)
    assert found.status == status
    assert found.headers["connection"] == "close"
    assert ask(gateway, get("/v2/health/live")).status == 200


def test_earlier_requests_are_answered_before_the_rejection(gateway: RunningGateway) -> None:
    found = gateway.exchange(post("/v2/models/ident/infer", IDENT_JSON, close=False) + b"nonsense\r\n\r\n")
    statuses = [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"400"]


def test_too_large_a_body_is_rejected_before_it_is_read(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        client.sendall(
            post("/v2/models/any/infer", b"")[:-4].replace(b"th: 0", b"th: 90000000") + b"\r\n\r\n"
        )
        found = b""
        while b"}" not in found:
            found += client.recv(1000)
        # It may go on sending for a while; it is read and thrown away.
        client.sendall(bytes(500_000))
    assert Found(found).status == 413
    assert "at most 8388608 bytes, found 90000000" in Found(found).json["error"]


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        (b"GET /v2 HTTP/1.1\r\nHost: ", "header"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc", "body"),
        (post("/v2/models/any/infer", bytes(200_000), "Inference-Header-Content-Length: 9")[:-100], "body"),
    ],
)
def test_slow_clients_are_disconnected(gateway: RunningGateway, sent: bytes, what: str) -> None:
    found = ask(gateway, sent)
    assert found.status == 408
    assert what in found.json["error"]


def test_no_requests_are_read_while_a_client_reads_no_responses(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = np.zeros(500_000, np.float32).tobytes()
        sent = post("/v2/models/any/infer", body, "Inference-Header-Content-Length: 0", close=False)
        client.settimeout(0.5)
        sent_bytes = 0
        try:
            for _ in range(200):
                client.sendall(sent)
                sent_bytes += len(sent)
        except TimeoutError:
            pass
        assert sent_bytes < 100 * len(sent)
        assert ask(gateway, get("/v2/health/live")).status == 200


# Metrics


def test_metrics_combine_the_controllers_counters_and_the_gateways(gateway: RunningGateway) -> None:
    ask(gateway, post("/v2/models/nope/infer", IDENT_JSON))
    url = f"127.0.0.1:{gateway.servers.port_by_name['metrics_port']}"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(get("/metrics"))
        found = Found(client.makefile("rb").read())
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = found.body.decode().splitlines()
    assert "clockwork_requests_received_total 7" in lines
    assert any(
        line.startswith(
            'clockwork_gateway_requests_total{gateway="g0",outcome="invalid",reason="unknown_model"}'
        )
        for line in lines
    )
    assert ask(gateway, get("/metrics")).status == 200


def test_who_asks_for_openmetrics_gets_them_on_a_connection_with_others(gateway: RunningGateway) -> None:
    port = gateway.servers.port_by_name["metrics_port"]
    asked = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    kinds = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        answers = client.makefile("rb")
        for headers in ((), (asked,), (asked,), ()):
            client.sendall(get("/metrics", *headers).replace(b"Connection: close\r\n", b""))
            length = 0
            while (line := answers.readline()) != b"\r\n":
                name, _, value = line.decode().strip().partition(": ")
                length = int(value) if name == "Content-Length" else length
                kinds += [value] if name == "Content-Type" else []
            assert answers.read(length).endswith(b"# EOF\n") == kinds[-1].startswith("application")

    assert [kind.partition(";")[0] for kind in kinds] == [
        "text/plain", "application/openmetrics-text", "application/openmetrics-text", "text/plain",
    ]  # fmt: skip


def test_the_port_for_metrics_serves_nothing_else(gateway: RunningGateway) -> None:
    port = gateway.servers.port_by_name["metrics_port"]
    for sent, status in (
        (get("/metrics"), 200),
        (get("/v2/health/live"), 200),
        (get("/v2/health/ready"), 200),
        (get("/v2"), 404),
        (post(INFER, IDENT_JSON), 404),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(sent)
            assert Found(client.makefile("rb").read()).status == status


def test_an_answer_that_cannot_be_encoded_is_500(gateway: RunningGateway) -> None:
    def nameless(request: Request) -> Answer:
        tensors = gateway.controller.tensors(request)
        return gateway.controller.echo(
            request, outputs=msgspec.msgpack.encode(msgspec.structs.replace(tensors, refs=()))
        )

    gateway.controller.on_request = nameless
    assert ask(gateway, post(INFER, IDENT_JSON)).status == 500
    gateway.controller.on_request = gateway.controller.echo
    assert ask(gateway, post(INFER, IDENT_JSON)).status == 200


def test_deflate_without_its_header(gateway: RunningGateway) -> None:
    stream = zlib.compressobj(wbits=-15)
    body = stream.compress(IDENT_JSON) + stream.flush()
    assert ask(gateway, post("/v2/models/ident/infer", body, "Content-Encoding: deflate")).status == 200


def test_closing_completes_requests_in_flight(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as found:
        found.controller.on_request = lambda request: None
        with found.connect() as client:
            client.sendall(post("/v2/models/ident/infer", IDENT_JSON, close=False))
            found.until(lambda: found.controller.requests)
            closing = found.loop.create_task
            found.loop.call_soon_threadsafe(lambda: closing(found.servers.http.close(20)))
            time.sleep(0.05)
            found.do(lambda: found.controller.send(found.controller.echo(found.controller.requests[0])))
            answered = client.makefile("rb").read()
        assert b"200 OK" in answered
