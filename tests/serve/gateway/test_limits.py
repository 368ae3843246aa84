"""Limits on connections and slow clients, on real sockets; other clients are not affected."""

from __future__ import annotations

import gzip
import logging
import random
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from clockwork_serve.config import SETTINGS, Settings, setting
from clockwork_serve.messages import Request
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE
from clockwork_serve.serve.gateway.settings import FIXED, excess, grpc_options
from clockwork_serve.serve.http.routes import _remembered
from clockwork_serve.units import MIB
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, ask, get, post

IDLE_S = 2.0
LIMITS: dict[str, Any] = {
    "max_head": 4096, "max_headers": 20, "head_s": 1.0, "body_s": 1.0, "send_s": 1.0, "idle_s": IDLE_S,
    "bytes_per_s": 64 * MIB, "max_unsent": 24 * MIB, "max_connections": 300,
}  # fmt: skip
BOMB_BYTES = 512 * MIB
# Seconds each, and together more than a quick check should take.
waits = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), **LIMITS, grpc_port=0) as found:
        yield found


@pytest.fixture
def gateway(shared: RunningGateway) -> Iterator[RunningGateway]:
    shared.controller.on_request = shared.controller.echo
    yield shared
    gone(shared)


def gone(gateway: RunningGateway) -> None:
    """All connections of a test end by themselves, and their memory is freed."""
    gateway.until(lambda: gateway.servers.gateway.connections == 0)
    gateway.until(lambda: gateway.servers.gateway.slots.used_bytes == 0)


def rest(client: socket.socket) -> bytes:
    """All further bytes, until the server closes or resets."""
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


def trickled(client: socket.socket, content: bytes, pause_s: float = 0.05) -> bytes:
    """Send byte by byte until the server closes; its response."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(pause_s)
    for at in range(len(content)):
        try:
            client.sendall(content[at : at + 1])
            part = client.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
        client.settimeout(60)
        return part + rest(client)
    raise AssertionError("nothing was limited")


@pytest.mark.parametrize("settings", [Settings(), Settings(max_body=64 * MIB), Settings(max_body=3 * MIB)])
def test_a_message_over_grpc_may_be_as_large_as_a_body(settings: Settings) -> None:
    most = dict(grpc_options(settings))["grpc.max_receive_message_length"]
    assert 0 <= most - settings.max_body < MIB


def test_who_exceeds_a_limit_is_told_the_setting_and_what_else_helps() -> None:
    limits = [setting.name for setting in SETTINGS if setting.excess]
    assert {"max_body", "max_connections"} <= set(limits)
    for name, parts in FIXED.items():
        text = excess(name, 1)
        assert text.endswith(parts[2]), "no setting raises it"
        assert all(part in text for part in parts)
    for name in limits:
        text = excess(name, 1)
        assert text.endswith(f"or raise the server's {name}")
        assert all(part and part in text for part in setting(name).excess)
    with pytest.raises(KeyError):
        excess("max_calls", 1)  # nothing says what is exceeded


@pytest.mark.parametrize(
    ("sent", "status", "named"),
    [
        (get("/v2", *(f"A{n}: b" for n in range(18))), 200, ""),
        (
            get("/v2", *(f"A{n}: b" for n in range(19))),
            431,
            "at most 20 lines, found 21; send fewer",
        ),
        (get("/v2", *(f"A{n}: b" for n in range(19))), 431, "header: expected at most"),
        (get("/v2", "A: " + "b" * 3900), 200, ""),
        (get("/v2", "A: " + "b" * 4200), 431, "at most 4096 bytes"),
        (get("/v2?" + "b" * 4200), 431, "header: expected at most"),
        (get("/v2", *("A: " + "b" * 400 for n in range(11))), 431, "header: expected at most"),
        (get("/v2", "A: " + "b" * 10 * MIB), 431, "header: expected at most"),
        (post(INFER, bytes(8 * MIB + 1)), 413, "max_body"),
    ],
)
def test_too_large_a_head_or_body_names_the_setting(
    gateway: RunningGateway, sent: bytes, status: int, named: str
) -> None:
    found = ask(gateway, sent)
    assert found.status == status
    assert named in (found.json["error"] if named else "")


CHUNKED = f"POST {INFER} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


@pytest.mark.parametrize(
    "endless", [b"0\r\nA: " + b"b" * 9 * MIB, b"0\r\n" + b"A: b\r\n" * MIB, b"5;" + b"e" * 9 * MIB]
)
def test_trailers_and_chunk_extensions_count_towards_the_head_s_limit(
    gateway: RunningGateway, endless: bytes
) -> None:
    with gateway.connect() as client:
        try:
            client.sendall(CHUNKED + endless)
        except ConnectionError:
            return
        assert Found(rest(client)).status == 431


def test_many_small_chunks_are_one_body(gateway: RunningGateway) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in IDENT_JSON)
    sent = CHUNKED.replace(b"Host", b"Connection: close\r\nHost") + chunks + b"0\r\n\r\n"
    assert ask(gateway, sent).json["outputs"][0]["data"] == [1.5, -2]


@pytest.fixture(scope="module")
def bomb() -> bytes:
    return gzip.compress(bytes(BOMB_BYTES), 1)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_zip_bomb_is_rejected_and_not_inflated(gateway: RunningGateway, bomb: bytes, layers: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = bomb if layers == 1 else gzip.compress(bomb)
    found = ask(gateway, post(INFER, sent, "Content-Encoding: gzip"))
    # Only the outer layer is one by HTTP; what is in it is more than the model's JSON can be.
    assert found.status == 413
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BOMB_BYTES // 4


@waits
@pytest.mark.parametrize(
    ("start", "content", "limit"),
    [
        (b"", b"GET /v2 HTTP/1.1\r\nA: " + b"b" * 1000, "head_s"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", bytes(1000), "body_s"),
        (CHUNKED, b"1\r\na\r\n" * 1000, "body_s"),
        (CHUNKED + b"0\r\n", b"A: b\r\n" * 1000, "body_s"),
        (get("/v2/health/live").replace(b"Connection: close\r\n", b""), b"GET /" + b"b" * 1000, "head_s"),
    ],
    ids=["head", "body", "chunks", "trailers", "second"],
)
def test_trickled_bytes_do_not_keep_a_connection_open(
    gateway: RunningGateway, start: bytes, content: bytes, limit: str
) -> None:
    with gateway.connect() as client:
        client.sendall(start)
        if start.startswith(b"GET"):
            assert b'{"live":true}' in client.recv(1000)
        found = Found(trickled(client, content))
    assert found.status == 408
    assert limit in found.json["error"]


@waits
def test_an_idle_connection_is_closed(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        client.sendall(post(INFER, IDENT_JSON, close=False))
        assert b"200 OK" in client.recv(65536)
        assert client.recv(100) == b""


def test_a_new_connection_times_out_sooner_than_an_idle_one(tmp_path: Path) -> None:
    with running_gateway(tmp_path, head_s=3.0) as found, found.connect() as fresh, found.connect() as used:
        used.sendall(post(INFER, IDENT_JSON, close=False))
        assert b"200 OK" in used.recv(65536)
        assert fresh.recv(100) == b""
        time.sleep(1)
        used.sendall(post(INFER, IDENT_JSON))
        assert b"200 OK" in rest(used)


@waits
def test_a_connection_whose_answer_takes_long_is_not_idle(gateway: RunningGateway) -> None:
    gateway.controller.on_request = lambda request: None
    gateway.controller.requests.clear()
    with gateway.connect() as client:
        client.sendall(post(INFER, IDENT_JSON, "x-slo-ms: 60000", close=False))
        gateway.until(lambda: gateway.controller.requests)
        time.sleep(IDLE_S + 3)
        gateway.do(lambda: gateway.controller.send(gateway.controller.echo(gateway.controller.requests[0])))
        assert b"200 OK" in client.recv(65536)


def greedy(gateway: RunningGateway, count: int, mib: int) -> socket.socket:
    """A client that requests large responses and reads none."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", gateway.http_port))
    client.settimeout(60)
    sent = post("/v2/models/any/infer", bytes(mib * MIB), "Inference-Header-Content-Length: 0", close=False)
    try:
        for _ in range(count):
            client.sendall(sent)
    except ConnectionError:
        pass
    return client


@waits
def test_a_client_that_does_not_read_is_disconnected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_gateway(tmp_path, send_s=1.0, bytes_per_s=64 * MIB) as found, greedy(found, 1, 3) as client:
        assert client.recv(1, socket.MSG_PEEK)  # else it may not be connected yet
        gone(found)
    assert "send_s 1" in caplog.text


@waits
def test_a_client_that_reads_a_little_is_disconnected(gateway: RunningGateway) -> None:
    with greedy(gateway, 1, 4) as client:
        end = time.monotonic() + 20
        while gateway.do(lambda: gateway.servers.gateway.connections):
            assert time.monotonic() < end
            client.recv(100)
            time.sleep(0.05)


@waits
def test_what_a_client_leaves_unread_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held: list[Request] = []
    with running_gateway(tmp_path, max_unsent=MIB) as found:
        # Three responses at once, to a client that sent all requests before it reads.
        found.controller.on_request = held.append
        with greedy(found, 3, 4):
            found.until(lambda: len(held) == 3)
            found.do(lambda: found.controller.send(*map(found.controller.echo, held)))
            gone(found)
        found.until(lambda: "max_unsent 1" in caplog.text)


@waits
def test_a_closing_connection_that_is_not_read_is_disconnected(tmp_path: Path) -> None:
    # A slow reader has much time; a closing connection has not.
    with running_gateway(tmp_path, send_s=1.0, bytes_per_s=1) as found, greedy(found, 1, 3):
        found.until(lambda: all(each._outbox.unread for each in found.servers.http._connections))
        found.do(lambda: [each.stop() for each in found.servers.http._connections])
        gone(found)


def test_a_connection_beyond_the_limit_gets_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_gateway(tmp_path, max_connections=3) as found, ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(found.connect())
            client.sendall(get("/v2/health/live").replace(b"close", b"keep-alive"))
            assert b"200 OK" in client.recv(1000)
        refused = Found(found.exchange(b""))
        assert refused.status == 429
        assert refused.headers["retry-after"] in {"1", "2"}
        assert "at most 3 of this port at once" in refused.json["error"]
        assert "max_connections" in refused.json["error"]
        client.close()
        found.until(lambda: found.servers.gateway.connections == 2)
        client = stack.enter_context(found.connect())
        client.sendall(get("/v2/health/live").replace(b"close", b"keep-alive"))
        assert b"200 OK" in client.recv(1000)
        # Many at once are closed without a response, and hold nothing.
        many = [stack.enter_context(found.connect()) for _ in range(200)]
        endings = [rest(each)[:12] for each in many]
        assert set(endings) == {b"HTTP/1.1 429", b""}
        assert endings.count(b"") >= 100
        found.until(lambda: found.servers.gateway.connections == 3)


def test_grpc_connections_are_limited_and_silent_ones_closed(tmp_path: Path) -> None:
    with running_gateway(tmp_path, max_connections=3, head_s=3.0, grpc_port=0) as found, ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", grpc_port(found)), timeout=60))
            for _ in range(8)
        ]
        # The server greets those that it takes.
        assert [bool(client.recv(1000)) for client in silent] == [True] * 3 + [False] * 5
        for client in silent[:3]:
            assert b"before handshake timeout" in rest(client)
        with grpc.insecure_channel(found.grpc_url) as channel:
            assert channel.unary_unary(f"/{INFERENCE_SERVICE}/ServerLive")(b"", timeout=60)


# Other clients are not affected

_random = random.Random(7)
NASTY: list[Callable[[socket.socket], None]] = [
    lambda client: None,
    lambda client: client.sendall(b"GET /v2 HTTP/1.1\r\nA: "),
    lambda client: client.sendall(b"POST /v2 HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n{"),
    lambda client: client.sendall(CHUNKED + b"1\r\n"),
    lambda client: client.sendall(_random.randbytes(10_000)),
    lambda client: client.sendall(b"GET / HTTP/9.9\r\n\r\n"),
    lambda client: client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    lambda client: client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    lambda client: client.sendall(get("/v2/models").replace(b"close", b"keep-alive") * 100),
    lambda client: client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
]


@waits
def test_a_hundred_slow_and_garbage_clients_do_not_block_others(gateway: RunningGateway) -> None:
    asked = 200
    with ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(gateway.connect())
            NASTY[number % len(NASTY)](client)
            if number % 2:
                stack.enter_context(socket.create_connection(("127.0.0.1", grpc_port(gateway)))).sendall(
                    b"PRI"
                )
        answered = 0
        for _ in range(asked):
            answered += ask(gateway, post(INFER, IDENT_JSON)).status == 200
        assert answered == asked
        with grpc.insecure_channel(gateway.grpc_url) as channel:
            assert channel.unary_unary(f"/{INFERENCE_SERVICE}/ServerLive")(b"", timeout=60)
        # In the end all are closed, though the clients keep their sides open.
        gone(gateway)


def grpc_port(gateway: RunningGateway) -> int:
    return gateway.servers.port_by_name["grpc_port"]


def test_bodies_take_no_memory_before_they_are_received(gateway: RunningGateway) -> None:
    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * resource.getpagesize()

    before = resident()
    with ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(gateway.connect())
            client.sendall(b"POST /v2 HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n")
        gateway.until(
            lambda: sum(each._direct is not None for each in gateway.servers.http._connections) == 100
        )
        assert resident() - before < 100 * MIB


@waits
@pytest.mark.parametrize("chunked", [False, True])
def test_incomplete_large_bodies_are_limited_together(gateway: RunningGateway, *, chunked: bool) -> None:
    head = b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%s\r\n" % bytes(65536)
    part = head + (b"6acfc0\r\n" + bytes(7_000_000))
    if not chunked:
        part = b"POST /v2 HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n" + bytes(7_000_000)
    server = gateway.servers.http
    with ExitStack() as stack:
        for held in range(1, 5):
            stack.enter_context(gateway.connect()).sendall(part)
            gateway.until(lambda held=held: server.arriving_bytes >= held * 6_900_000)
        client = stack.enter_context(gateway.connect())
        client.sendall(part)
        refused = Found(rest(client))
        assert refused.status == 429
        assert "gateway_memory" in refused.json["error"]
        # Small ones are not asked to wait for large ones.
        assert ask(gateway, post(INFER, IDENT_JSON)).status == 200
        gone(gateway)
    assert server.arriving_bytes == 0


@waits
def test_disconnects_are_logged_in_one_line(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    def logged() -> list[int]:
        found = [record.getMessage() for record in caplog.records]
        return [int(line.rpartition("head_s ")[2]) for line in found if "clients disconnected" in line]

    caplog.set_level(logging.WARNING)
    with ExitStack() as stack:

        def connect_all() -> None:
            for _ in range(30):
                stack.enter_context(gateway.connect()).sendall(b"GET /")

        gateway.do(connect_all)  # on the server's loop: it accepts none before all are there
        gateway.until(lambda: sum(logged()) == 30)
        gone(gateway)
    assert len(logged()) <= 3


def test_long_paths_are_not_cached(gateway: RunningGateway) -> None:
    before = _remembered.cache_info().currsize
    assert ask(gateway, get("/v2/health/live?" + "b" * 2000)).status == 200
    assert _remembered.cache_info().currsize == before
