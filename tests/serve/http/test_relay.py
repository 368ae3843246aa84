"""The live page on the metrics port: what a gateway passes on to the observer, and to whom."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.messages import Outcome
from clockwork_serve.serve.http import relay
from clockwork_serve.serve.http.live import LivePage, PageServer
from clockwork_serve.serve.transport import OBSERVER_SOCKET
from clockwork_serve.telemetry import Step
from clockwork_serve.telemetry.live import LiveView
from clockwork_serve.units import ms
from tests.serve.certificates import certificates
from tests.serve.gateway import keys
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.telemetry import stories

METRICS_KEY, TENANT_KEY = "m" * 43, "t" * 43


@contextmanager
def observed(folder: Path, **settings: Any) -> Iterator[tuple[RunningGateway, LiveView]]:
    """A gateway, and what stands in for an observer on the gateway's loop."""
    view = LiveView()
    view.on_record(Step(0, (stories.worker_joined(),), ()))
    view.on_record(Step(ms(1), (stories.request("a"),), ()))
    view.on_record(Step(ms(2), (), (stories.answer("a"),)))
    server = PageServer(LivePage(view))
    with running_gateway(folder, metrics_port=0, **settings) as gateway:
        gateway.run(server.listen_unix(folder / OBSERVER_SOCKET))
        try:
            yield gateway, view
        finally:
            gateway.do(server.close)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    with observed(tmp_path) as (found, _):
        yield found


def connected(gateway: RunningGateway, port: str = "metrics_port") -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.servers.port_by_name[port]), timeout=60)


def ask(
    gateway: RunningGateway, target: str, *headers: str, method: str = "GET", port: str = "metrics_port"
) -> tuple[int, str, bytes]:
    lines = [f"{method} {target} HTTP/1.1", "Connection: close", *headers, "", ""]
    with connected(gateway, port) as client:
        client.sendall("\r\n".join(lines).encode())
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body


def test_the_metrics_port_passes_on_what_the_observer_says(gateway: RunningGateway, tmp_path: Path) -> None:
    status, head, body = ask(gateway, "/")
    assert (status, b"<title>" in body) == (200, True)
    assert "Content-Security-Policy: default-src 'none'" in head
    assert head.count("Content-Length") == 1
    assert json.loads(ask(gateway, "/live/requests?from=0&to=9999")[2])["total"] == 1
    assert ask(gateway, "/live/app.js")[1].count("text/javascript") == 1
    assert ask(gateway, "/live/window?from=x")[0] == 400
    assert ask(gateway, "/live/none")[0] == 404
    assert ask(gateway, "/", method="HEAD")[2] == b""
    assert ask(gateway, "/live/panels", method="POST")[0] == 405
    assert ask(gateway, "/v2/health/live")[0] == 200


def test_other_ports_do_not_have_it(gateway: RunningGateway, tmp_path: Path) -> None:
    assert ask(gateway, "/", port="http_port")[0] == 404
    assert ask(gateway, "/live/panels", port="http_port")[0] == 404


def test_without_an_observer_it_says_so(tmp_path: Path) -> None:
    with running_gateway(tmp_path, metrics_port=0) as gateway:
        status, _, body = ask(gateway, "/")

    assert status == 503
    assert b"observer" in body


def test_where_the_setting_is_off_there_is_none(tmp_path: Path) -> None:
    with observed(tmp_path, live_page=False) as (gateway, _):
        assert ask(gateway, "/")[0] == 404
        assert ask(gateway, "/live/panels")[0] == 404


def test_a_stream_goes_on_until_its_reader_leaves(gateway: RunningGateway, tmp_path: Path) -> None:
    with connected(gateway) as client, client.makefile("rb") as file:
        client.sendall(b"GET /live/stream?pixel=1000 HTTP/1.1\r\nHost: a\r\n\r\n")
        head = b"".join(iter(file.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200")
        assert b"text/event-stream" in head and b"Content-Length" not in head
        for _ in range(3):
            assert json.loads(file.readline().removeprefix(b"data: "))["now"] == 2000
            assert file.readline() == b"\n"
    gateway.until(lambda: not gateway.servers.metrics._connections)
    gateway.until(lambda: not gateway.servers.metrics._relay._readers)


def test_an_observer_that_ends_ends_its_streams(gateway: RunningGateway, tmp_path: Path) -> None:
    server = PageServer(LivePage(LiveView()))
    (tmp_path / OBSERVER_SOCKET).unlink()
    gateway.run(server.listen_unix(tmp_path / OBSERVER_SOCKET))
    with connected(gateway) as client:
        client.sendall(b"GET /live/stream HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(10)
        gateway.do(server.close)
        client.settimeout(60)
        while client.recv(65536):
            pass


def test_readers_that_do_not_read_cost_no_memory(tmp_path: Path) -> None:
    with observed(tmp_path) as (gateway, view):
        clients = [connected(gateway) for _ in range(10)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /live/stream?pixel=1 HTTP/1.1\r\nHost: a\r\n\r\n")
        names = count(1)

        def work() -> int:
            for _ in range(300):
                at = next(names)
                asked = stories.request(f"r{at}", at, model="m" * 200 + str(at))
                view.on_record(Step(ms(2 + at), (asked,), (stories.answer(f"r{at}", Outcome.REJECTED),)))
            return max(one._transport.get_write_buffer_size() for one in gateway.servers.metrics._connections)

        most = 0
        for _ in range(25):
            most = max(most, gateway.do(work))
            time.sleep(0.1)
        for client in clients:
            client.close()
    assert most < 1 << 20


def basic(key: str) -> str:
    return f"Authorization: Basic {base64.b64encode(f'me:{key}'.encode()).decode()}"


def test_it_asks_for_the_keys_of_the_metrics_port(tmp_path: Path) -> None:
    path = keys.written(
        tmp_path, keys.entry("scrape", METRICS_KEY, "metrics"), keys.entry("team", TENANT_KEY, "infer"),
        keys.entry("boss", "a" * 43, "admin"),
    )  # fmt: skip
    with observed(tmp_path, api_keys=path) as (gateway, _):
        status, head, _ = ask(gateway, "/")
        assert (status, 'WWW-Authenticate: Basic realm="clockwork"' in head) == (401, True)
        assert ask(gateway, "/live/panels", basic("wrong"))[0] == 401
        assert ask(gateway, "/live/panels", "Authorization: Basic %%%")[0] == 401
        assert ask(gateway, "/live/panels", basic(METRICS_KEY))[0] == 200
        assert ask(gateway, "/live/panels", f"Authorization: Bearer {METRICS_KEY}")[0] == 200
        assert ask(gateway, "/live/panels", basic("a" * 43))[0] == 403
        assert ask(gateway, "/metrics", basic(METRICS_KEY))[0] == 401, (
            "programs name a key as they always did"
        )
        assert ask(gateway, "/live/panels", basic(TENANT_KEY))[0] == 403
        found = ask(gateway, "/live/requests?from=0&to=9999", basic(TENANT_KEY))
        assert (found[0], json.loads(found[2])["total"]) == (200, 0)
        forged = ask(gateway, "/live/requests?from=0&to=9999", basic(TENANT_KEY), "Clockwork-Tenant: other")
        assert json.loads(forged[2])["total"] == 0


def test_the_page_of_another_site_cannot_read_it(gateway: RunningGateway, tmp_path: Path) -> None:
    assert ask(gateway, "/live/panels", "Host: a.example.com")[0] == 403
    assert ask(gateway, "/live/panels", "Host: 127.0.0.1", "Origin: https://a.example.com")[0] == 403


@pytest.mark.parametrize("target", ["/live/a b", "/live/" + "a" * 3000, "/live/\x01", "/live/\xe9"])
def test_a_target_that_is_none_is_not_passed_on(gateway: RunningGateway, tmp_path: Path, target: str) -> None:
    assert ask(gateway, target)[0] in (400, 404)


def test_over_tls_it_streams_as_well(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    trusting = ssl.create_default_context(cafile=files.ca)
    with (
        observed(tmp_path, **files.tls_settings()) as (gateway, _),
        connected(gateway) as plain,
        trusting.wrap_socket(plain, server_hostname="localhost") as client,
        client.makefile("rb") as file,
    ):
        client.sendall(b"GET /live/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = b"".join(iter(file.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200")
        for _ in range(3):
            assert json.loads(file.readline().removeprefix(b"data: "))["now"] == 2000
            assert file.readline() == b"\n"


def test_a_gateway_that_stops_ends_streams_at_once(tmp_path: Path) -> None:
    with observed(tmp_path) as (gateway, _):
        client = connected(gateway)
        client.sendall(b"GET /live/stream HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(10)
        began_s = time.monotonic()
        gateway.run(gateway.servers.metrics.close(20))
        while client.recv(65536):
            pass
        client.close()
    assert time.monotonic() - began_s < 10, "a stream is no answer that is waited for"


def test_no_more_than_so_many_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "READERS", 2)
    with observed(tmp_path) as (gateway, _):
        clients = [connected(gateway) for _ in range(2)]
        for client in clients:
            client.sendall(b"GET /live/stream HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(10)
        assert ask(gateway, "/live/panels")[0] == 429
        clients.pop().close()
        gateway.until(lambda: gateway.servers.metrics._relay._readers == 1)
        assert ask(gateway, "/live/panels")[0] == 200
        clients.pop().close()
