"""The live page over HTTP: what it answers and to whom, and that readers cost nothing who do not read."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clockwork_serve.config import read_settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Outcome, Reason
from clockwork_serve.serve.http import live
from clockwork_serve.serve.http.live import FILES, POLICY, Explain, LivePage, PageServer
from clockwork_serve.telemetry import Step, head_of
from clockwork_serve.telemetry.live import LiveView
from clockwork_serve.units import ms
from tests.telemetry import stories

PAGE_BYTES = 200_000


def refused(view: LiveView, name: str, at_ms: float, model: str = stories.MODEL) -> None:
    answer = Answer(request_id=name, gateway="g0", outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL)
    view.on_record(Step(ms(at_ms), (stories.request(name, at_ms, model=model),), (answer,)))


def view_of(count: int = 3) -> LiveView:
    view = LiveView()
    view.on_record(head_of(ControllerConfig()))
    view.on_record(Step(0, (stories.worker_joined(),), ()))
    for at in range(count):
        refused(view, f"r{at}", at)
    return view


@asynccontextmanager
async def serving(view: LiveView, folder: Path, explain: Explain | None = None) -> AsyncIterator[PageServer]:
    server = PageServer(LivePage(view, explain))
    await server.listen_unix(folder / "o.sock")
    try:
        yield server
    finally:
        server.close()


async def asked(folder: Path, target: str, *headers: str, method: str = "GET") -> tuple[int, str, bytes]:
    """Status, head and body."""
    reader, writer = await asyncio.open_unix_connection(str(folder / "o.sock"))
    lines = [f"{method} {target} HTTP/1.1", "Connection: close", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    async with asyncio.timeout(60):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), head.decode(), body


async def one(
    view: LiveView, folder: Path, target: str, *headers: str, **given: str
) -> tuple[int, str, bytes]:
    async with serving(view, folder):
        return await asked(folder, target, *headers, **given)


@pytest.mark.parametrize("name", [path.name for path in FILES.iterdir()])
async def test_every_file_of_the_page_is_there_with_its_type_and_may_do_nothing_else(
    tmp_path: Path, name: str
) -> None:
    target = "/" if name == "index.html" else f"/live/{name}"
    status, head, body = await one(view_of(), tmp_path, target)

    assert (status, body) == (200, (FILES / name).read_bytes())
    assert f"Content-Security-Policy: {POLICY}\r\n" in head
    assert "X-Content-Type-Options: nosniff" in head
    kind = {"html": "text/html", "js": "text/javascript", "css": "text/css"}[name.rpartition(".")[2]]
    assert f"Content-Type: {kind}; charset=utf-8" in head


def test_the_page_is_small_and_runs_its_own_files_alone() -> None:
    text = (FILES / "index.html").read_text()
    scripts = "".join(path.read_text() for path in FILES.glob("*.js"))

    assert sum(path.stat().st_size for path in FILES.iterdir()) <= PAGE_BYTES
    assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", text) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", scripts) == []
    assert "unsafe" not in POLICY
    for directive in (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'",
        "img-src 'self' data:",
    ):  # fmt: skip
        assert directive in POLICY


@pytest.mark.parametrize(
    ("target", "status", "part"),
    [
        ("/live/window?from=0&to=5000&pixels=100", 200, b'"lanes"'),
        ("/live/requests?from=0&to=99999&only=bad&limit=2", 200, b'"total":3'),
        ("/live/panels", 200, b'"devices"'),
        ("/live/requests?from=0&to=x", 400, b"to: expected a whole number"),
        ("/live/requests?only=some", 400, b"only: expected good or bad"),
        ("/live/window?from=9&to=5", 400, b"to: expected no less than from"),
        ("/live/window?pixels=0", 400, b"pixels: expected a whole number from 1 to 10000"),
        ("/live/stream?pixel=a", 400, b"pixel: expected"),
        ("/live/window?" + "&".join(["a=1"] * 40), 400, b"Max number of fields exceeded"),
        ("/live/explain", 400, b"id: expected"),
        ("/live/explain?id=r1", 501, b"not available"),
        ("/live/", 404, b"Not Found"),
        ("/live/..%2Flive.py", 404, b"Not Found"),
        ("/live/%2e%2e/live.py", 404, b"Not Found"),
        ("/metrics", 404, b"Not Found"),
    ],
)
async def test_what_is_asked_is_answered_or_refused_with_a_reason(
    tmp_path: Path, target: str, status: int, part: bytes
) -> None:
    found, head, body = await one(view_of(), tmp_path, target)

    assert (found, part in body) == (status, True), body
    assert "nosniff" in head


async def test_nothing_but_get_and_head_is_answered(tmp_path: Path) -> None:
    assert (await one(view_of(), tmp_path, "/live/panels", method="POST"))[0] == 405
    status, _, body = await one(view_of(), tmp_path, "/live/panels", method="HEAD")
    assert (status, body) == (200, b"")


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01", b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000, b"\r\nrubbish\r\n\r\n"]
)
async def test_what_is_no_request_ends_its_connection_alone(tmp_path: Path, data: bytes) -> None:
    async with serving(view_of(), tmp_path):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "o.sock"))
        writer.write(data)
        async with asyncio.timeout(60):
            assert (await reader.read()).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        writer.close()
        assert (await asked(tmp_path, "/"))[0] == 200


async def test_a_tenant_gets_his_requests_and_nothing_else(tmp_path: Path) -> None:
    for target, status in (
        ("/live/window", 403), ("/live/panels", 403), ("/live/stream", 404), ("/live/requests?to=99999", 200),
        ("/live/explain?id=r1", 404), ("/", 200),
    ):  # fmt: skip
        found, _, body = await one(view_of(), tmp_path, target, "Clockwork-Tenant: team")
        assert found == status, target
        assert b"r1" not in body, target
    found = await one(view_of(), tmp_path, "/live/requests?to=99999&tenant=", "Clockwork-Tenant: team")
    assert json.loads(found[2])["total"] == 0


def frames(data: bytes) -> list[dict]:
    return [
        json.loads(one.removeprefix(b"data: ")) for one in data.split(b"\n\n") if one.startswith(b"data: ")
    ]


async def test_the_stream_tells_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FRAME_S", 0.01)
    view = view_of()
    async with serving(view, tmp_path):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "o.sock"))
        writer.write(b"GET /live/stream?pixel=100 HTTP/1.1\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"text/event-stream" in head and b"Content-Length" not in head
        data = await reader.readuntil(b"\n\n")
        refused(view, "late", 50)
        while b"50000" not in data:
            async with asyncio.timeout(60):
                data += await reader.readuntil(b"\n\n")
        writer.close()
    found = frames(data)
    assert found[0]["lanes"] == []
    assert found[0]["names"][1] == [["cpu:0", "load"], ["cpu:0", "exec"], ["rejected: queue_full", "refused"]]
    assert [lane for one in found for lane in one["lanes"]] == [[2, [[50_000, 1, 0]]]]


async def test_readers_that_stop_reading_cost_one_frame_and_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FRAME_S", 0.001)
    view = view_of()
    most = 0
    async with serving(view, tmp_path) as server:
        writers = []
        for _ in range(10):
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "o.sock"), limit=1)
            writer.write(b"GET /live/stream?pixel=1 HTTP/1.1\r\n\r\n")
            writers.append(writer)
        for at in range(100, 20_000):
            refused(view, f"r{at}", at, model=f"model-{at}")
            if at % 20 == 0:
                await asyncio.sleep(0)
                held = [
                    one._transport.get_write_buffer_size() for one in server.connections if one._transport
                ]
                most = max(most, *held, 0)
            if not server.connections and at > 5000:
                break
        until = asyncio.get_running_loop().time() + 20
        while server.connections and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)
        left = len(server.connections)
        for writer in writers:
            writer.close()
    assert most < 2_000_000
    assert left == 0


def test_a_reader_that_was_slow_is_told_of_the_gap(tmp_path: Path) -> None:
    class Pipe(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.sent = False, list[bytes]()

        def get_write_buffer_size(self) -> int:
            return 1 if self.full else 0

        def write(self, data: bytes) -> None:
            self.sent.append(data)

    async def main() -> list[dict]:
        connection, pipe = live.PageConnection(PageServer(LivePage(view_of()))), Pipe()
        connection.connection_made(pipe)
        connection.data_received(b"GET /live/stream HTTP/1.1\r\n\r\n")
        pipe.full = True
        reader = connection._timer._args[0]
        for _ in range(live.GAP_FRAMES):
            connection._frame(reader, 1)
        pipe.full = False
        connection._frame(reader, 1)
        connection.connection_lost(None)
        return frames(b"".join(pipe.sent[1:]))

    found = asyncio.run(main())
    assert [one.get("gap") for one in found] == [None, True]


async def test_who_does_not_know_the_key_or_comes_by_another_name_gets_nothing() -> None:
    server = PageServer(LivePage(view_of()), key="secret")
    port = await server.listen(0)

    async def ask(target: str, *headers: str, host: str = f"127.0.0.1:{port}") -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
        writer.write("\r\n".join(lines).encode())
        data = await reader.read()
        writer.close()
        return data

    assert (await ask("/")).startswith(b"HTTP/1.1 401")
    assert (await ask("/?key=wrong")).startswith(b"HTTP/1.1 401")
    assert (await ask("/live/panels?key=secret")).startswith(b"HTTP/1.1 401")
    entered = await ask("/?key=secret")
    assert entered.startswith(b"HTTP/1.1 303")
    cookie = re.search(rb"Set-Cookie: ([^;]+); Path=/; HttpOnly; SameSite=Strict", entered)
    assert cookie is not None
    known = f"Cookie: other=1; {cookie[1].decode()}"
    assert (await ask("/live/panels", known)).startswith(b"HTTP/1.1 200")
    assert (await ask("/live/panels", known, host="evil.example.com")).startswith(b"HTTP/1.1 403")
    server.close()


async def test_an_explanation_is_waited_for_and_others_are_answered_meanwhile(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def explain(
        request_id: str, tenant: str | None, changes: Sequence[str]
    ) -> dict[str, object] | None:
        await go.wait()
        if request_id == "broken":
            raise RuntimeError
        if "odd" in changes:
            raise ConfigError("if: expected a change")
        return {"sentence": f"{request_id} for {tenant}"} if request_id != "none" else None

    async with serving(view_of(), tmp_path, explain) as server:
        asking = [
            asyncio.ensure_future(asked(tmp_path, f"/live/explain?id={name}"))
            for name in ("x", "none", "broken")
        ]
        assert (await asked(tmp_path, "/live/panels"))[0] == 200
        go.set()
        found = [await one for one in asking]
        assert [status for status, _, _ in found] == [200, 404, 500]
        assert json.loads(found[0][2]) == {"sentence": "x for None"}
        of_tenant = await asked(tmp_path, "/live/explain?id=x", "Clockwork-Tenant: team")
        assert json.loads(of_tenant[2]) == {"sentence": "x for team"}
        refused = await asked(tmp_path, "/live/explain?id=x&if=priority%3D1&if=odd")
        assert refused[0] == 400
        assert b"if: expected a change" in refused[2]
        go.clear()
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "o.sock"))
        writer.write(b"GET /live/explain?id=x HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.05)
        (connection,) = server.connections
        writer.close()
        while server.connections:
            await asyncio.sleep(0.01)
        assert connection._waiting is None or connection._waiting.cancelled()


async def test_a_connection_may_have_been_another_protocols_before(tmp_path: Path) -> None:
    class Other(asyncio.Protocol):
        def __init__(self, server: PageServer) -> None:
            self._server = server

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = transport

        def data_received(self, data: bytes) -> None:
            reader = self._server.connection()
            self._transport.set_protocol(reader)
            reader.connection_made(self._transport)
            reader.data_received(data)

    page = PageServer(LivePage(view_of()))
    server = await asyncio.get_running_loop().create_unix_server(
        lambda: Other(page), str(tmp_path / "o.sock")
    )
    found = await asked(tmp_path, "/live/panels")
    server.close()
    page.close()
    assert found[0] == 200


def test_settings_are_shown_with_where_they_come_from() -> None:
    settings = read_settings(
        {"repository": "models", "device": ("cpu", "cpu:3")}, {"CLOCKWORK_SLO_MS": "50"}, None
    )
    rows = {name: (value, origin) for name, value, origin in settings.rows()}

    assert rows["slo_ms"] == ("50.0", "CLOCKWORK_SLO_MS")
    assert rows["device"] == ("cpu:0, cpu:3", "--device")
    assert rows["live_page"] == ("true", "default")
    view = LiveView(settings=settings.rows())
    assert ["slo_ms", "50.0", "CLOCKWORK_SLO_MS"] in view.panels(0, 1)["settings"]
