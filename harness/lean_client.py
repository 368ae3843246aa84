"""A client that costs little: closed loop over some connections for a time, one JSON line of what it found.

``python -m harness.lean_client http HOST:PORT CONNECTIONS SECONDS < REQUEST`` sends the same bytes again
and again; ``frames`` expects answers that begin with two lengths.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any, cast

import uvloop

from benchmarks.yardsticks import LENGTHS
from harness.report import quantile


class Run:
    """What all connections share."""

    def __init__(self, message: bytes, *, framed: bool) -> None:
        self.message = message
        self.framed = framed
        self.measuring = True
        self.count = 0
        self.latencies_ns: list[int] = []
        self.bad = 0


class Caller(asyncio.Protocol):
    """Sends its next request when it has an answer."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._received = b""
        self._sent_ns = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take an answer, and ask again."""
        received = self._received = self._received + data if self._received else data
        if self._run.framed:
            whole = LENGTHS.size + sum(LENGTHS.unpack_from(received))
            good = True
        else:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            at = received.find(b"Content-Length: ")
            if at > end or received[at - 2 : at] != b"\r\n":  # a name that ends like it
                at = received.find(b"\r\nContent-Length: ") + 2
            whole = end + 4 + int(received[at + 16 : received.find(b"\r", at)])
            good = received.startswith(b"HTTP/1.1 200")
        if len(received) < whole:
            return
        self._received = b""
        run = self._run
        if not good or len(received) != whole:
            run.bad += 1
        if run.measuring:
            run.count += 1
            run.latencies_ns.append(time.monotonic_ns() - self._sent_ns)
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """It should not be."""
        if self._run.measuring:
            self._run.bad += 1

    def close(self) -> None:
        """End."""
        assert self._transport is not None
        self._transport.close()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_ns = time.monotonic_ns()
        self._transport.write(self._run.message)


async def measure(address: str, connections: int, seconds: float, run: Run) -> dict[str, Any]:
    """Ask for ``seconds``."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Caller(run), host, int(port)) for _ in range(connections)]
    gc.collect()
    gc.disable()
    await asyncio.sleep(0.2)
    run.latencies_ns.clear()
    started, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    run.measuring = False
    took, cpu = time.monotonic() - started, time.process_time() - cpu
    count = len(run.latencies_ns)
    await asyncio.sleep(0.05)
    found = {
        "requests": count,
        "all_requests": run.count + connections,
        "seconds": took,
        "bad": run.bad,
        "client_us": cpu / max(1, count) * 1e6,
        "p50_us": quantile(run.latencies_ns, 0.5) / 1e3,
        "p99_us": quantile(run.latencies_ns, 0.99) / 1e3,
    }
    for _, caller in made:
        caller.close()
    return found


def main() -> None:
    """Run it."""
    kind, address, connections, seconds = sys.argv[1:5]
    run = Run(sys.stdin.buffer.read(), framed=kind == "frames")
    print(json.dumps(uvloop.run(measure(address, int(connections), float(seconds), run))))


if __name__ == "__main__":
    main()
