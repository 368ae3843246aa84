"""The load generator against a small server that answers as told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.wakeup_lateness import Phase, Probe, less
from clockwork_serve.telemetry import Histogram
from harness.lean_load import LATE_NS, Generator, Plan
from tests.timing import Timing

ANSWER = "HTTP/1.1 {} X\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def server(*, status: int = 200, body: int = 0, early: bool = False) -> Iterator[int]:
    """``early``: it answers before it reads a body."""
    ready = threading.Event()
    made: list[tuple[int, Callable[[], object]]] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = True
        writers.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                answer = ANSWER.format(200 if first else status).encode()
                first = False
                if early:
                    writer.write(answer)
                    await asyncio.sleep(0.001)
                await reader.readexactly(body)
                if not early:
                    # In two pieces, as TCP may do.
                    writer.write(answer[:20])
                    await asyncio.sleep(0.0005)
                    writer.write(answer[20:])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def main() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        made.append((port, lambda: loop.call_soon_threadsafe(over.set)))
        ready.set()
        async with listening:
            await over.wait()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(60)
    ((port, stop),) = made
    yield port
    stop()
    thread.join(60)


def plan(port: int, folder: Path, **fields: object) -> Plan:
    body = int(str(fields.pop("body", 0)))
    file = folder / "message"
    file.write_bytes(b"POST /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % body + bytes(body))
    settings = {"rate": 300, "seconds": 0.5, "warmup_s": 0.1, "connections": 4}
    return Plan(host="127.0.0.1", port=port, message=str(file), **(settings | fields))


def test_every_request_is_counted_by_its_end(tmp_path: Path) -> None:
    with server() as port, closing(Generator(plan(port, tmp_path))) as generator:
        found = generator.result()
    assert 75 < found.asked < 250
    assert found.ends == {200: found.asked}
    assert sorted(found.latency_ns) == found.latency_ns
    assert found.latency_ns[0] > 400_000


def test_in_a_closed_loop_every_connection_asks_again_when_it_has_its_answer(tmp_path: Path) -> None:
    wanted = plan(0, tmp_path, rate=0, connections=2)
    with server() as port, closing(Generator(structs.replace(wanted, port=port))) as generator:
        found = generator.result()
    # Each answer takes the server half a millisecond at least.
    assert 20 < found.asked <= 2 * (0.5 / 0.0005 + 1)
    assert found.ends == {200: found.asked}
    assert found.sent > found.asked
    assert found.waited == 0


@pytest.mark.parametrize("early", [False, True])
def test_large_requests_are_sent_whole_even_if_refused_before_that(tmp_path: Path, *, early: bool) -> None:
    size = 3_000_000
    with (
        server(status=429, body=size, early=early) as port,
        closing(Generator(plan(port, tmp_path, body=size, rate=50))) as generator,
    ):
        found = generator.result()
    assert found.ends == {429: found.asked}


def test_what_came_in_between_is_a_difference() -> None:
    before = Histogram()
    before.add(1000)
    after = Histogram(list(before.counts), before.sum_ns)
    after.add(700_000)
    assert less(after, before).count == 1
    assert 600_000 < (less(after, before).quantile_ns(1.0) or 0) <= 710_000


def test_a_probe_wakes_about_once_a_millisecond(timing: Timing) -> None:
    found = Probe(0.3).result()
    with timing.judged():
        assert 20 < found.count < 600


def test_a_run_that_was_disturbed_proves_nothing(tmp_path: Path) -> None:
    with server() as port, closing(Generator(plan(port, tmp_path, seconds=0.1))) as generator:
        found = generator.result()
    found = structs.replace(found, late_ns=[0.0] * 5)
    late = Histogram()
    for _ in range(1000):
        late.add(1000)
    phase = Phase(late, found, {}, others=0.01, stolen=0.0)
    assert phase.invalid == ""
    assert "no part used 6%" in replace(phase, others=0.06).invalid
    assert "0 wake-ups" in replace(phase, late=Histogram()).invalid
    late_one = structs.replace(found, late_ns=[0, 0, LATE_NS + 1, 0, 0])
    assert "late" in replace(phase, found=late_one).invalid
    assert "answered well" in replace(phase, found=structs.replace(found, ends={429: found.asked})).invalid
