"""The observer beside a journal: parts are apart from each other, and its socket is for its own user."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from msgspec import structs

from clockwork_serve.apps import observer as module
from clockwork_serve.apps.observer import Feed, Observer
from clockwork_serve.config import Settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.serve.child import ObserverConfig
from clockwork_serve.serve.transport import OBSERVER_SOCKET
from clockwork_serve.sim.history import folder_of
from clockwork_serve.telemetry import Journal, JournalHead, Step, head_of, refusals_path
from harness import serving
from harness.collector import collecting
from tests.sim.journals import written
from tests.telemetry import stories


class Kept:
    """A part that keeps what it is fed with, and may fail or dawdle."""

    def __init__(self, fails_at: int = -1, takes_s: float = 0.0) -> None:
        self.records: list[JournalHead | Step] = []
        self._fails_at, self._takes_s = fails_at, takes_s

    def on_record(self, record: JournalHead | Step) -> None:
        if len(self.records) == self._fails_at:
            raise ZeroDivisionError("a part broke")
        time.sleep(self._takes_s)
        self.records.append(record)


def journal(path: Path, steps: int) -> Journal:
    found = Journal(path, head_of(ControllerConfig()))
    for now_ns in range(steps):
        found.on_step(now_ns, [stories.request(f"r{now_ns}")], [])
    found.flush()
    return found


@asynccontextmanager
async def observed(observer: Observer) -> AsyncIterator[None]:
    """An observer runs meanwhile."""
    stop = asyncio.Event()
    running = asyncio.get_running_loop().create_task(observer.run(stop))
    try:
        async with asyncio.timeout(60):
            yield
    finally:
        stop.set()
        await running


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_a_part_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = journal(tmp_path / "j", 50)
    good, bad = Kept(), Kept(fails_at=20)
    observer = Observer(tmp_path / "j", {"good": good, "bad": bad})
    async with observed(observer):
        await until(lambda: len(good.records) == 51)
        book.on_step(50, [], [])
        book.flush()
        await until(lambda: len(good.records) == 52)
    book.close()
    assert len(bad.records) == 20
    assert observer.status() == {
        "good": {"next": 52, "lost": 0, "failed": ""},
        "bad": {"next": 20, "lost": 0, "failed": "ZeroDivisionError('a part broke')"},
    }
    assert "bad is left out from now on: it failed at record 20" in caplog.text


async def test_a_slow_part_delays_itself_alone(tmp_path: Path) -> None:
    book = journal(tmp_path / "j", 1000)
    quick, slow = Kept(), Kept(takes_s=0.005)
    observer = Observer(tmp_path / "j", {"slow": slow, "quick": quick})
    async with observed(observer):
        await until(lambda: len(quick.records) == 1001)
    book.close()
    assert 0 < len(slow.records) < 500


async def test_what_a_part_lost_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = Journal(tmp_path / "j", head_of(ControllerConfig()), file_bytes=1500, files=2)
    part = Kept()
    observer = Observer(tmp_path / "j", {"part": part})
    async with observed(observer):
        await until(lambda: part.records)
        for now_ns in range(300):
            book.on_step(now_ns, [stories.request(f"r{now_ns}")], [])
            book.flush()
        book.close()
        await until(lambda: getattr(part.records[-1], "now_ns", 0) == 299)
    lost = observer.status()["part"]["lost"]
    assert isinstance(lost, int)
    assert lost == 301 - len(part.records) > 0
    assert f"part was behind: {lost} records were deleted unread" in caplog.text


async def test_lines_are_answered_in_a_thread_and_errors_are_answers(tmp_path: Path) -> None:
    book = journal(tmp_path / "j", 1)
    main = threading.get_ident()

    def explain(asked: Mapping[str, Any]) -> object:
        assert threading.get_ident() != main
        return {"of": asked["request_id"].upper()}

    observer = Observer(tmp_path / "j", {}, {"explain": explain})
    async with observed(observer):
        server = await observer.listen(tmp_path / "o.sock")
        assert (tmp_path / "o.sock").stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(tmp_path / "o.sock")
        for line, answer in (
            (b'{"ask": "explain", "request_id": "r1"}', {"of": "R1"}),
            (b'{"ask": "explain"', "truncated"),
            (b'{"ask": "explain", "request_id": 5}', "error"),
            (b'{"ask": "status"}', {}),
            (b'{"ask": "else"}', "expected one of explain, status"),
            (b'{"ask": ["else"]}', "expected one of explain, status"),
        ):
            writer.write(line[:5])
            await asyncio.sleep(0)
            writer.write(line[5:] + b"\n")
            found = json.loads(await reader.readline())
            assert found == answer if isinstance(answer, dict) else answer in str(found)
        writer.close()
        server.close()
    book.close()


class Page(asyncio.Protocol):
    """Says what it heard."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"heard " + data)


async def test_other_connections_are_the_page_s_and_end_where_there_is_none(tmp_path: Path) -> None:
    book = journal(tmp_path / "j", 1)
    observer = Observer(tmp_path / "j", {})
    async with observed(observer):
        server = await observer.listen(tmp_path / "o.sock")
        for page, said in ((None, b""), (Page, b"heard GET /")):
            observer.page = page
            reader, writer = await asyncio.open_unix_connection(tmp_path / "o.sock")
            writer.write(b"GET /")
            try:
                assert await reader.read(100) == said
            except ConnectionResetError:
                assert said == b""
            writer.close()
        server.close()
    book.close()


async def test_another_user_s_process_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = journal(tmp_path / "j", 1)
    observer = Observer(tmp_path / "j", {})
    monkeypatch.setattr(module, "is_own_user", lambda transport: False)
    async with observed(observer):
        server = await observer.listen(tmp_path / "o.sock")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "o.sock")
        try:
            writer.write(b'{"ask": "status"}\n')
            assert await reader.read() == b""
        except ConnectionError:
            pass
        writer.close()
        server.close()
    book.close()


def test_a_feed_begins_where_it_is_told(tmp_path: Path) -> None:
    journal(tmp_path / "j", 10).close()
    numbers: list[int] = []
    ended: list[int] = []
    feed = Feed("f", tmp_path / "j", lambda number, record: numbers.append(number), 7, ended.append)
    assert not feed.work(time.monotonic() + 10)
    feed.close()
    assert (numbers, ended) == ([7, 8, 9, 10], [11])


def status_at(path: Path) -> Any:
    """What an observer says of its parts."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(60)
        link.connect(str(path))
        link.sendall(b'{"ask": "status"}\n')
        return json.loads(link.makefile().readline())


def test_the_process_is_idle_makes_a_history_and_ends_when_told(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", requests=1000)
    settings = Settings(repository="/r", journal=str(path))
    config = msgspec.json.encode(ObserverConfig(run_dir=str(tmp_path), settings=settings)).decode()
    process = subprocess.Popen([sys.executable, "-m", "clockwork_serve.apps.observer", config])
    try:

        def has_read() -> bool:
            assert process.poll() is None
            try:
                found = status_at(tmp_path / OBSERVER_SOCKET)
            except (FileNotFoundError, ConnectionRefusedError):  # its file is there before it listens
                return False
            return bool(found["history"]["next"] > 100)

        serving.until("it has read some", has_read, 120, 0.1)
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert folder_of(path).stat().st_mode & 0o777 == 0o700
    assert list(folder_of(path).glob("*.index"))


# Traces


async def test_idleness_is_told_when_all_is_read(tmp_path: Path) -> None:
    book, told = journal(tmp_path / "j", 3), list[tuple[int, int]]()
    read: list[int] = []
    observer = Observer(tmp_path / "j", {})
    feed = Feed(
        "kept", tmp_path / "j", lambda number, record: read.append(number),
        idle=lambda now_ns: told.append((now_ns, len(read))),
    )  # fmt: skip
    observer.add(feed)
    before_ns = time.monotonic_ns()
    async with observed(observer):
        await until(lambda: told and told[-1][1] == 4)
    book.close()

    assert [number for _, number in told] == sorted(number for _, number in told)
    assert all(before_ns <= now_ns <= time.monotonic_ns() for now_ns, _ in told)


async def test_requests_are_sent_to_a_collector_with_what_gateways_refused(tmp_path: Path) -> None:
    book, beside = journal(tmp_path / "j", 0), Journal(refusals_path(tmp_path / "j", "gateway-0"))
    now_ns = time.monotonic_ns()
    for name, into in (("by-controller", book), ("by-gateway", beside)):
        request = structs.replace(stories.request(name), arrival_ns=now_ns)
        into.on_step(now_ns, (request,), (stories.answer(name, Outcome.REJECTED, Reason.QUEUE_FULL),))
        into.close()
    with collecting() as collector:
        observer = Observer(tmp_path / "j", {})
        module._add_traces(observer, Settings(otlp_endpoint=collector.url, trace_sample=0.0))
        async with observed(observer):
            await until(lambda: observer.status()["traces"]["next"] == 2)
        found = {each.value.string_value for span in collector.spans for each in span.attributes}

        assert {"by-controller", "by-gateway"} <= found
        told = observer.asks["traces"]({})
    assert told == {
        "requests": 2, "missing_steps": 0, "sent": len(collector.spans), "failed": 0, "dropped": 0, "why": "",
    }  # fmt: skip
