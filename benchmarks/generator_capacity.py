"""How many requests a second `clockwork bench` can send from one core before it is late itself.

Steps of load to a server that answers at once, on a core of its own, until the requests are sent more than a
millisecond late (p99), or the server no longer keeps up. The sender has the other core. The server does
nothing else, and speaks just enough of the Open Inference Protocol; as ``python -m
benchmarks.generator_capacity --server http|grpc`` it is run alone, and prints its address.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

import uvloop

from clockwork_lab.bench.messages import literal
from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.report import BenchReport
from clockwork_lab.bench.run import run
from clockwork_serve.oip.protobuf import ModelInferResponse, message
from harness.grpc_load import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    HEAD_BYTES,
    HEADER_TABLE,
    HEADERS,
    INITIAL_WINDOW,
    LARGEST_WINDOW,
    OPENING,
    PING,
    SETTINGS,
    WINDOW,
    frame,
)
from harness.report import Outcome, finish, parser
from harness.stand_in import module

NAME: Final = "benchmarks.generator_capacity"
STEPS: Final = {"http": (5, 10, 20, 25, 30, 40, 50), "grpc": (5, 10, 15, 20, 25, 30, 40)}
"""Thousands of requests a second."""
ASKED_RPS: Final = 20_000
LATE_MS: Final = 1.0
SCENARIO = """
name = "flat"
seconds = {seconds}
warmup_s = 1
[[models]]
name = "m"
kind = "any"
[[loads]]
name = "flat"
models = ["m"]
arrivals = "poisson"
rate_rps = 1000
slo_ms = 100
"""
FLOATS = 256
_METADATA = (
    b'{"name":"m","versions":["1"],"platform":"none","inputs":[{"name":"x","datatype":"FP32","shape":[1,%d]}],'
    b'"outputs":[]}' % FLOATS
)
_ANSWER = b'{"model_name":"m","model_version":"1","outputs":[]}'
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class Http(asyncio.Protocol):
    """Requests one after the other."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer, once all is there."""
        assert self._transport is not None
        received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        self._received = received
        if end < 0:
            return
        body = _METADATA
        if received.startswith(b"POST"):
            at = received.find(b"\r\nContent-Length: ") + 18
            if len(received) < end + 4 + int(received[at : received.find(b"\r", at)]):
                return
            body = _ANSWER
        self._received = b""
        self._transport.write(_OK % (len(body), body))


def _answer_of(record: object) -> bytes:
    content: bytes = record.SerializeToString()  # type: ignore[attr-defined]
    return b"\0" + len(content).to_bytes(4, "big") + content


class Grpc(asyncio.Protocol):
    """Calls; which of the two methods one is for is told by the length of its request."""

    def __init__(self) -> None:
        self._received = b""
        self._greeted = False
        self._unread = 0
        self._transport: asyncio.Transport | None = None
        self._sizes: dict[int, int] = {}
        metadata = message("inference.ModelMetadataResponse")(name="m")
        metadata.inputs.add(name="x", datatype="FP32", shape=(1, FLOATS))
        self._metadata = _answer_of(metadata)
        self._answer = _answer_of(ModelInferResponse(model_name="m", model_version="1"))
        self._head = b"\x88" + literal("content-type", "application/grpc")
        self._trailers = literal("grpc-status", "0")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HIHI", HEADER_TABLE, 0, INITIAL_WINDOW, LARGEST_WINDOW)
        more = struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW)
        self._transport.write(frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, more))

    def data_received(self, data: bytes) -> None:
        """Answer the calls that are whole."""
        assert self._transport is not None
        received = self._received + data if self._received else data
        at = 0
        sent: list[bytes] = []
        if not self._greeted and len(received) >= len(OPENING):
            self._greeted, at = True, len(OPENING)
        while self._greeted and len(received) - at >= HEAD_BYTES:
            end = at + HEAD_BYTES + int.from_bytes(received[at : at + 3], "big")
            if len(received) < end:
                break
            kind, flags, stream = struct.unpack_from(">BBI", received, at + 3)
            if kind == DATA:
                self._unread += end - at - HEAD_BYTES
                size = self._sizes.pop(stream, 0) + end - at - HEAD_BYTES
                if flags & END_STREAM:
                    sent += self._answered(stream, size)
                else:
                    self._sizes[stream] = size
            elif kind in (SETTINGS, PING) and not flags & ACK:
                sent.append(frame(kind, ACK, 0, received[at + HEAD_BYTES : end] if kind == PING else b""))
            at = end
        self._received = received[at:]
        if self._unread > 2**30:
            sent.append(frame(WINDOW, 0, 0, struct.pack(">I", self._unread)))
            self._unread = 0
        if sent:
            self._transport.write(b"".join(sent))

    def _answered(self, stream: int, size: int) -> tuple[bytes, bytes, bytes]:
        content = self._answer if size > FLOATS else self._metadata
        return (
            frame(HEADERS, END_HEADERS, stream, self._head),
            frame(DATA, 0, stream, content),
            frame(HEADERS, END_HEADERS | END_STREAM, stream, self._trailers),
        )


async def _serve(kind: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Grpc if kind == "grpc" else Http, "127.0.0.1", 0, backlog=4096)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


def measured(scenario: Path, url: str, kind: str, thousands: int, *, realtime: bool) -> BenchReport:
    """One step."""
    protocol: Any = kind
    core = max(os.sched_getaffinity(0))
    options = Options(
        url=url, protocol=protocol, rate_scale=thousands, cores=(core,), realtime=realtime,
        max_lateness_ms=LATE_MS,
    )  # fmt: skip
    return run(make_plan(scenario, options)).report


def steps(outcome: Outcome, kind: str, given: Any) -> float:
    """The most requests a second that were sent in time, in the best of some rounds."""
    most = 0.0
    print(f"\n{kind}: requests/s sent late p50, p99, max ms  answered  p99 ms  core  us each")
    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, module(core, NAME, "--server", kind) as (pid, url):
        if given.realtime:
            os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
        scenario = Path(folder) / "flat.toml"
        scenario.write_text(SCENARIO.format(seconds=1 + given.seconds))
        for thousands in STEPS[kind]:
            reports = [
                measured(scenario, url, kind, thousands, realtime=given.realtime) for _ in range(given.rounds)
            ]
            late_ms = median(report.lateness.p99_ms or 0.0 for report in reports)
            report = min(reports, key=lambda one: one.lateness.p99_ms or 0.0)
            late, answers, share = report.lateness, report.total.answers, report.sending.cpu_share
            print(
                f"  {report.total.offered_rps:>15,.0f}  {late.p50_ms:7.3f} {late.p99_ms:7.3f}"
                f" {late.max_ms:7.2f}"
                f"  {answers.count / report.total.offered:>11.1%}  {answers.p99_ms:6.2f}  {share:4.0%}"
                f"  {share * 1e6 / report.total.offered_rps:5.1f}   (median p99: {late_ms:.3f})"
            )
            outcome.figures[f"{kind}_{thousands}k"] = {
                "offered_rps": report.total.offered_rps, "lateness_p99_ms": [
                    one.lateness.p99_ms for one in reports
                ], "answers_p99_ms": answers.p99_ms, "cpu_share": share,
            }  # fmt: skip
            if (late.p99_ms or 0.0) > LATE_MS:
                break
            most = report.total.offered_rps
    return most


def main() -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=4.0, help="of each step, after one of warm-up")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--realtime", action="store_true", help="sender and server go before all others")
    options.add_argument("--protocol", choices=sorted(STEPS), nargs="*", default=sorted(STEPS, reverse=True))
    options.add_argument("--server", choices=STEPS, help="be the server that is asked, and nothing else")
    given = options.parse_args()
    if given.server:
        uvloop.run(_serve(given.server))
    outcome = Outcome(NAME)
    if len(os.sched_getaffinity(0)) < 2:
        outcome.invalid = "it takes two cores"
        return finish(outcome, given.json)
    for kind in given.protocol:
        most = steps(outcome, kind, given)
        outcome.judge(
            f"{kind}: requests/s of 1 kB from one core, sent at most {LATE_MS:g} ms late (p99)",
            asked=f">= {ASKED_RPS * 0.98:,.0f}" if kind == "http" else "what it reaches",
            found=f"{most:,.0f}", good=kind != "http" or most >= ASKED_RPS * 0.98,
        )  # fmt: skip
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
