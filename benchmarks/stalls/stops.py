"""SIGSTOP of each process and of the whole server at random, and heavy messages, beside an ordinary load."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks.stalls.clients import Plan, Seen
from benchmarks.stalls.judge import GOOD, REFUSED, Player, ends, judge_books, late, worst_ms
from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness.http_load import http_message
from harness.report import Outcome
from harness.repositories import emulated
from harness.server import Server
from harness.server_process import Start

SLOS_MS: Final = (50, 100, 200, 300)
LATE_MS: Final = 10.0
HTTP_PER_S, GRPC_PER_S = 80.0, 40.0
MODELS: Final = 3
STOP_S: Final = (0.1, 20.0)
WHOLE: Final = "the whole server"
HEAVY: Final = 20
"""So many heavy messages, one a second."""
_HEAVY_BYTES: Final = 15 * MIB


@contextmanager
def served(folder: Path, gateways: int) -> Iterator[Server]:
    """A server of models that take 10 ms of a device that uses no core."""
    for model in range(MODELS):
        emulated(folder / "models", f"m{model}", {1: 10, 2: 12, 4: 16})
    config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"),
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            gateways=gateways,
            log_level="error",
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="emulated:0", kind="emulated", memory_bytes=64 * MIB),),
    )
    server = Server(Start(server=config), folder / "server.log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
        server.close()


def play(server: Server, seconds: float, seed: int) -> list[Player]:
    """Clients over both protocols."""
    grpc_address = server.facts["grpc"].removeprefix("grpc://")
    common: dict[str, Any] = {"models": MODELS, "floats": 4, "slos_ms": SLOS_MS}
    common |= {"seconds": seconds, "seed": seed}
    return [
        Player(Plan(protocol="http", address=server.http_url.partition("//")[2], per_s=HTTP_PER_S, **common)),
        Player(Plan(protocol="grpc", address=grpc_address, per_s=GRPC_PER_S, **common)),
    ]


def stopped(outcome: Outcome, folder: Path, seconds: float, seed: int) -> None:
    """Each process and all of them, stopped for a while again and again."""
    dice = random.Random(seed)
    with served(folder, gateways=2) as server:
        before = server.pids()
        players = play(server, seconds, seed)
        end, stops = time.monotonic() + seconds, 0
        time.sleep(1.5)
        targets = [*sorted(before), WHOLE]
        longest_s = min(STOP_S[1], seconds / 15)
        while time.monotonic() < end:
            for_s = STOP_S[0] * (longest_s / STOP_S[0]) ** dice.random()
            _stop(server, targets[stops % len(targets)], for_s)
            stops += 1
            time.sleep(dice.uniform(0.5, 2.0))
        seen = [player.seen() for player in players]
        whole = server.pids() == before
        rows(outcome, f"{stops} stops", dict(zip(("HTTP", "gRPC"), seen, strict=True)))
        judge_books(outcome, f"{stops} stops", server, [one for some in seen for one in some], whole=whole)


def _stop(server: Server, target: str, for_s: float) -> None:
    pids = server.pids()
    chosen = list(pids.values()) if target == WHOLE else [pid for name, pid in pids.items() if name == target]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number is signal.SIGSTOP:
            time.sleep(for_s)


def rows(outcome: Outcome, part: str, seen: dict[str, list[Seen]]) -> None:
    """No late answer was called good."""
    for protocol, some in seen.items():
        found = late(some, GOOD, LATE_MS)
        counts = ends(some)
        outcome.judge(
            f"{part}: {protocol}, 200 though late by more than {LATE_MS:g} ms",
            asked="0", good=not found and counts[GOOD] > 0,
            found=f"{len(found)} of {counts[GOOD]}, at most {worst_ms(some, GOOD):+.1f} ms; {dict(counts)}",
        )  # fmt: skip
        refusals = late(some, REFUSED, LATE_MS)
        outcome.judge(
            f"{part}: {protocol}, refused after the SLO by more than {LATE_MS:g} ms", asked="0",
            found=f"{len(refusals)} of {counts[REFUSED]}", good=not refusals,
        )  # fmt: skip
        outcome.figures[f"{part} {protocol}"] = dict(counts)


def heavy(outcome: Outcome, folder: Path, seed: int) -> None:
    """The same clients beside messages that take a gateway long to read."""
    with served(folder, gateways=1) as server:
        players = play(server, HEAVY + 4.0, seed)
        time.sleep(2)
        senders = []
        for number in range(HEAVY):
            send = _send_json if number % 2 else _send_contents
            sender = threading.Thread(target=send, args=(server,), daemon=True)
            sender.start()
            senders.append(sender)
            time.sleep(1)
        seen = [player.seen() for player in players]
        for sender in senders:
            sender.join(60)
        rows(outcome, f"{HEAVY} heavy messages", dict(zip(("HTTP", "gRPC"), seen, strict=True)))
        judge_books(
            outcome, f"{HEAVY} heavy messages", server, [one for some in seen for one in some], whole=False
        )


def _send_json(server: Server) -> None:
    """Numbers, as many as JSON may have."""
    numbers = b"[0]," * (_HEAVY_BYTES // 4) + b"[0]"
    body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[%s]}]}' % numbers
    _http(server, http_message(server.http_url, "POST", "/v2/models/m0/infer", body))


def _send_contents(server: Server) -> None:
    """Typed contents, four million of them."""
    request: Any = ModelInferRequest(model_name="m0")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    tensor.contents.bytes_contents.extend([b""] * (4 * MIB))
    with grpc.insecure_channel(server.facts["grpc"].removeprefix("grpc://")) as channel:
        call = channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")
        with contextlib.suppress(grpc.RpcError):
            call(request.SerializeToString(), timeout=60)


def _http(server: Server, message: bytes) -> None:
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", server.http_port), timeout=60) as client,
    ):
        client.sendall(message)
        client.recv(1 << 16)
