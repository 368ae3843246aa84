"""A lean HTTP load client: a written schedule in, one sample per request out; it never retries.

Open loop: each request is sent at its instant whatever happened before, on an idle connection or a new one,
and its latency counts from that instant. Closed loop: each connection sends its next request when it has a
response.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import uvloop

T = TypeVar("T")

LATE_SEND_NS = 5_000_000
"""A request sent later than this after its instant: the client itself was held up."""
CONNECT_S = 5.0
"""How long a connection that is refused or reset is tried again."""
CONNECT_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send ``at_ns`` after the start: the whole HTTP message, and a name for the report."""

    at_ns: int
    message: bytes
    name: str = ""


@dataclass(slots=True)
class Sample:
    """What became of one request; instants of CLOCK_MONOTONIC.

    ``status`` is 0 if the connection ended without a response. ``body`` is the response's.
    """

    name: str
    due_ns: int
    sent_ns: int
    done_ns: int = 0
    status: int = 0
    headers: bytes = b""
    body: bytes = b""

    @property
    def latency_ns(self) -> int:
        """From the scheduled instant to the whole response."""
        return self.done_ns - self.due_ns

    @property
    def end(self) -> str:
        """How it ended, as a name to count by: ``200``, or the status with the server's reason."""
        return "200" if self.status == 200 else f"{self.status} {reason_of(self)}".strip()


@dataclass(slots=True)
class Report:
    """All samples of a run, and what should not have happened."""

    samples: list[Sample] = field(default_factory=list)
    unexpected_bytes: int = 0
    """Bytes that came when nothing was asked: a second response."""

    def ends(self) -> Counter[str]:
        """How many requests ended in which way."""
        return Counter(sample.end for sample in self.samples)

    @property
    def unanswered(self) -> int:
        """Requests without a response."""
        return sum(1 for sample in self.samples if sample.status == 0)

    @property
    def late_sends(self) -> int:
        """Requests that the client itself sent late."""
        return sum(1 for sample in self.samples if sample.sent_ns - sample.due_ns > LATE_SEND_NS)


def infer_message(
    url: str,
    model: str,
    inputs: Sequence[tuple[str, str, Sequence[int], bytes]],
    *,
    slo_ms: float | None = None,
    parameters: dict[str, Any] | None = None,
) -> bytes:
    """A whole inference request with binary tensors: (name, datatype, shape, bytes) each."""
    head: dict[str, Any] = {
        "inputs": [
            {
                "name": name,
                "shape": list(shape),
                "datatype": kind,
                "parameters": {"binary_data_size": len(data)},
            }
            for name, kind, shape, data in inputs
        ],
        "parameters": {"binary_data_output": True, **(parameters or {})},
    }
    text = json.dumps(head).encode()
    body = text + b"".join(data for *_, data in inputs)
    headers = f"Inference-Header-Content-Length: {len(text)}\r\nContent-Type: application/octet-stream\r\n"
    if slo_ms is not None:
        headers += f"x-slo-ms: {slo_ms:g}\r\n"
    return http_message(url, "POST", f"/v2/models/{model}/infer", body, headers)


def http_message(url: str, method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """A whole HTTP/1.1 request that keeps its connection."""
    parts = urlsplit(url)
    lines = (
        f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    )
    return lines.encode() + body


def reason_of(sample: Sample) -> str:
    """Why a request was not answered well, in the server's words; empty if it did not say."""
    try:
        found = json.loads(sample.body)
    except ValueError:
        return ""
    return str(found.get("reason", "")) if isinstance(found, dict) else ""


def header_of(sample: Sample, name: str) -> str:
    """A response's header, by its name in lower case; empty if it has none."""
    for line in sample.headers.split(b"\r\n"):
        found, _, value = line.partition(b":")
        if found.lower() == name.encode():
            return value.strip().decode()
    return ""


def poisson(rate: float, seconds: float, rng: random.Random) -> Iterator[int]:
    """Instants in ns from 0 of a Poisson process of ``rate`` per second."""
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(rate)) < seconds:
        yield round(now_s * 1e9)


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request out."""

    def __init__(self, report: Report, on_done: Callable[[Connection], None]) -> None:
        self._report = report
        self._on_done = on_done
        self._transport: asyncio.Transport | None = None
        self._sample: Sample | None = None
        self._received = bytearray()
        self._body_at = 0  # where the body starts, once the headers are whole
        self._body_bytes = 0

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast("asyncio.Transport", transport)

    def send(self, message: bytes, name: str, due_ns: int) -> Sample:
        """Send one request; its sample is whole when ``on_done`` is called."""
        assert self._sample is None
        sample = self._sample = Sample(name, due_ns, time.monotonic_ns())
        if self._transport is None or self._transport.is_closing():
            self._finish()
        else:
            self._transport.write(message)
        return sample

    def data_received(self, data: bytes) -> None:
        """Collect the response."""
        if self._sample is None:
            self._report.unexpected_bytes += len(data)
            return
        self._received += data
        if not self._body_at:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_headers(bytes(self._received[:end]))
            self._body_at = end + 4
        if len(self._received) >= self._body_at + self._body_bytes:
            self._sample.body = bytes(self._received[self._body_at : self._body_at + self._body_bytes])
            self._report.unexpected_bytes += len(self._received) - self._body_at - self._body_bytes
            self._finish()

    def _read_headers(self, head: bytes) -> None:
        assert self._sample is not None
        first, _, rest = head.partition(b"\r\n")
        self._sample.status = int(first.split()[1])
        self._sample.headers = rest
        self._body_bytes = 0
        for line in rest.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                self._body_bytes = int(value)

    def connection_lost(self, exc: Exception | None) -> None:
        """A request that was out ends without a response."""
        if self._sample is not None:
            self._sample.status = 0
            self._finish()

    def _finish(self) -> None:
        sample = self._sample
        assert sample is not None
        sample.done_ns = time.monotonic_ns()
        self._report.samples.append(sample)
        self._sample = None
        self._received.clear()
        self._body_at = 0
        self._on_done(self)

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run the client's loop with the garbage collector held back, which would delay sends."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return uvloop.run(work)
    finally:
        gc.enable()


async def open_loop(
    url: str, shots: Iterable[Shot], *, connections: int = 32, grace_s: float = 10.0
) -> Report:
    """Send each shot at its instant, on ``connections`` made beforehand and more if need be."""
    report = Report()
    idle: deque[Connection] = deque()
    out = 0
    finished = asyncio.Event()

    def done(connection: Connection) -> None:
        nonlocal out
        out -= 1
        if connection.open:
            idle.append(connection)
        finished.set()

    opened = [await _connect(url, report, done) for _ in range(connections)]
    idle.extend(opened)
    start_ns = time.monotonic_ns()
    for shot in shots:
        await _sleep_until(start_ns + shot.at_ns)
        while idle and not idle[0].open:
            idle.popleft()
        connection = idle.popleft() if idle else None
        if connection is None:
            connection = await _connect(url, report, done)
            opened.append(connection)
        out += 1
        connection.send(shot.message, shot.name, start_ns + shot.at_ns)
    await _until_none_out(lambda: out, finished, grace_s)
    for connection in opened:
        connection.close()
    await asyncio.sleep(0.05)
    return report


async def closed_loop(
    url: str,
    messages: Callable[[int], bytes],
    *,
    requests: int,
    connections: int,
    pause_s: float = 0.0,
    grace_s: float = 60.0,
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> Report:
    """Send ``requests`` in all (``messages(i)`` makes the i-th) from ``connections``, each one at a time.

    A connection that the server closes is replaced. After any answer but a good one a client waits
    ``pause_s``, for else a refusal would turn into more load. ``on_sample`` hears of each end.
    """
    report = Report()
    numbers = iter(range(requests))

    async def client() -> None:
        free = asyncio.Event()
        connection = await _connect(url, report, lambda _: free.set())
        for index in numbers:
            if not connection.open:
                connection = await _connect(url, report, lambda _: free.set())
            free.clear()
            sample = connection.send(messages(index), str(index), time.monotonic_ns())
            try:
                await asyncio.wait_for(free.wait(), grace_s)
            except TimeoutError:
                connection.close()
                await free.wait()
            on_sample(sample)
            if sample.status != 200:
                await asyncio.sleep(pause_s)
        await asyncio.sleep(0.05)
        connection.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    await asyncio.sleep(0.05)
    return report


async def _connect(url: str, report: Report, done: Callable[[Connection], None]) -> Connection:
    """Connect within ``CONNECT_S``, or raise the last ConnectionError.

    A process that is killed resets the connections in its accept queue: such a client connects again.
    """
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port
    assert host is not None
    assert port is not None
    loop = asyncio.get_running_loop()
    end = loop.time() + CONNECT_S
    while True:
        try:
            return (await loop.create_connection(lambda: Connection(report, done), host, port))[1]
        except ConnectionError:
            if loop.time() > end:
                raise
            await asyncio.sleep(CONNECT_PAUSE_S)


async def _sleep_until(at_ns: int) -> None:
    """Sleep, at least giving the loop one turn to read responses."""
    await asyncio.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))
    while (left_ns := at_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - its timers round to ms
        await asyncio.sleep(left_ns / 1e9)


async def _until_none_out(out: Callable[[], int], finished: asyncio.Event, grace_s: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + grace_s
    while out() and loop.time() < end:
        finished.clear()
        try:
            await asyncio.wait_for(finished.wait(), end - loop.time())
        except TimeoutError:
            return
