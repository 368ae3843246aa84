"""The HTTP front end alone, against the least that such a server can do, on one core.

1 kB: a server of httptools on uvloop that parses the same JSON header and answers at once. 600 kB: an echo of
length-prefixed frames, each two lengths, a msgpack header and a tensor, received into a buffer that is used
again. All servers are up all the time and are asked in turns; the client and the controller's stand-in have
another core. As ``python -m benchmarks.http_front_end --yardstick http|frames`` it is one of these servers.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import tempfile
from contextlib import ExitStack
from statistics import median
from typing import Any, Final, cast

import httptools
import msgspec
import uvloop

from clockwork_serve.units import MIB
from harness.http_load import infer_message
from harness.lean_load import LENGTHS, Subject, ask
from harness.report import Outcome, finish, in_turns, parser, table
from harness.stand_in import MODEL, gateway, module

NAME: Final = "benchmarks.http_front_end"
OURS: Final = "ours"
SMALL_FLOATS, LARGE_FLOATS = 256, 150_000
SMALL_SHARE, LARGE_SHARE = 0.4, 0.7
CASES: Final = {
    "1 kB, 32 connections": (SMALL_FLOATS, 32, SMALL_SHARE),
    "600 kB, 1 connection": (LARGE_FLOATS, 1, LARGE_SHARE),
    "600 kB, 8 connections": (LARGE_FLOATS, 8, LARGE_SHARE),
}
OUTPUT_FLOATS: Final = 16
OUTPUT: Final = bytes(4 * OUTPUT_FLOATS)


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None


class _Head(msgspec.Struct):
    inputs: list[_Tensor]
    parameters: dict[str, Any] | None = None


_ANSWER: Final = msgspec.json.encode(
    {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, OUTPUT_FLOATS],
             "parameters": {"binary_data_size": len(OUTPUT)}}
        ],
    }
)  # fmt: skip
_heads = msgspec.json.Decoder(_Head)
_frame_heads = msgspec.msgpack.Decoder(_Head)


class HttpYardstick(asyncio.Protocol):
    """Reads a whole request, looks at its tensor, answers at once."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._header_length = 0
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Remember the only one that is needed."""
        if name.lower() == b"inference-header-content-length":
            self._header_length = int(value)

    def on_body(self, data: bytes) -> None:
        """Collect."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Answer."""
        body = memoryview(b"".join(self._body))
        self._body.clear()
        head = _heads.decode(body[: self._header_length])
        size = (head.inputs[0].parameters or {})["binary_data_size"]
        assert len(body) == self._header_length + size
        assert self._transport is not None
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n"
            b"Inference-Header-Content-Length: %d\r\n\r\n%s%s"
            % (len(_ANSWER) + len(OUTPUT), len(_ANSWER), _ANSWER, OUTPUT)
        )


class FrameYardstick(asyncio.BufferedProtocol):
    """Receives frames into one buffer and answers each at once with a small one."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(MIB))
        self._end = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """One request at a time is on a connection."""
        self._end += nbytes
        if self._end < LENGTHS.size:
            return
        head_bytes, tensor_bytes = LENGTHS.unpack_from(self._buffer)
        if self._end < LENGTHS.size + head_bytes + tensor_bytes:
            return
        _frame_heads.decode(self._buffer[LENGTHS.size : LENGTHS.size + head_bytes])
        self._end = 0
        assert self._transport is not None
        self._transport.write(LENGTHS.pack(len(_ANSWER), len(OUTPUT)) + _ANSWER + OUTPUT)


async def _serve(kind: str) -> None:
    protocol = HttpYardstick if kind == "http" else FrameYardstick
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=512)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


def compare(floats: int, connections: int, given: Any) -> tuple[Any, Any]:
    """Both servers in turns: what each did, and the medians of it."""
    server_core, client_core = sorted(os.sched_getaffinity(0))[:2]
    kind = "http" if floats < LARGE_FLOATS else "frames"
    with ExitStack() as stack:
        run_dir = stack.enter_context(tempfile.TemporaryDirectory())
        bare_pid, bare = stack.enter_context(module(server_core, NAME, "--yardstick", kind))
        stack.enter_context(module(client_core, "harness.stand_in", run_dir, floats, OUTPUT_FLOATS))
        our_pid, port = stack.enter_context(gateway(server_core, run_dir, grpc_port=None))
        ours, data = f"127.0.0.1:{port}", bytes(4 * floats)
        tensor = ("x", "FP32", (1, floats), data)
        request = infer_message(f"http://{ours}", MODEL, [tensor], parameters={"slo_ms": 10_000})
        head = msgspec.msgpack.encode({"inputs": [{"name": "x", "shape": [1, floats], "datatype": "FP32"}]})
        frame = LENGTHS.pack(len(head), len(data)) + head + data
        subjects = {
            "bare": Subject([bare_pid], kind, bare, request if kind == "http" else frame),
            OURS: Subject([our_pid], "http", ours, request),
        }
        sides = {
            name: functools.partial(ask, subject, client_core, connections, given.seconds)
            for name, subject in subjects.items()
        }
        return in_turns(sides, given.rounds)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=2.0, help="of each server in each round")
    options.add_argument("--yardstick", choices=("http", "frames"), help="be this server, and nothing else")
    given = options.parse_args()
    if given.yardstick:
        uvloop.run(_serve(given.yardstick))
    outcome = Outcome(NAME)
    rows = []
    for what, (floats, connections, share) in CASES.items():
        found, middle = compare(floats, connections, given)
        rows += [
            (
                what,
                name,
                f"{one['per_s']:,.0f}",
                *(f"{one[field]:.1f}" for field in ("us", "p50_us", "p99_us")),
            )
            for name, one in middle.items()
        ]
        ratio = median(
            ours["per_s"] / bare["per_s"] for ours, bare in zip(found[OURS], found["bare"], strict=True)
        )
        outcome.at_least(f"{what}: requests/s", share, ratio, "x")
        outcome.figures[what] = {"median": middle, "shots": found}
        outcome.at_most(f"{what}: bad answers", 0, sum(shot["bad"] for shot in found[OURS]), digits=0)
    print(table(("", "server", "requests/s", "us of CPU", "p50 us", "p99 us"), rows))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
