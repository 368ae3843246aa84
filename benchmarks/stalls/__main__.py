"""Is a late response ever counted as good? Stopped processes, heavy messages, impatient clients; with clocks.

A client with its own clock measures each response. Whatever was late by that clock must not have been
reported as good: not to the client (200), nor in the server's metrics. ``--part`` runs one part alone:

- ``stops``: each process, and the whole server, stopped (SIGSTOP) at random under an ordinary load.
- ``tls``: the same, of stock clients over TLS: HTTPS, and streams of gRPC.
- ``heavy``: the load of ``stops`` beside messages that take a gateway long to read.
- ``hasty``: 240 clients that ask again at once after a refusal, 602 kB each, and a server on one core.
- ``stuck``: see :mod:`benchmarks.stalls.stuck`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import grpc
import msgspec
import trustme

from benchmarks.stalls import stuck
from benchmarks.stalls.clients import Plan, Seen
from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness.http_load import http_message
from harness.report import Outcome, finish, parser
from harness.repositories import convolutions, emulated
from harness.server import Server, started
from harness.serving import read_metrics, total

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = ("stops", "tls", "heavy", "hasty", "stuck")
GOOD, REFUSED = "200", "429"
LATE_MS: Final = 10.0
COUNTED: Final = 0.99
"""What gRPC's core tells of too late to be sure that it was sent in time counts as late."""
MODELS, SLOS_MS = 3, (50, 100, 200, 300)
HTTP_PER_S, GRPC_PER_S, STREAM_PER_S = 80.0, 40.0, 40.0
STOP_S: Final = (0.1, 20.0)
WHOLE: Final = "the whole server"
HEAVY: Final = 20
"""So many heavy messages, one a second."""
_HEAVY_BYTES: Final = 15 * MIB
HASTY_MODELS, HASTY_CLIENTS = 15, 240
SIDE: Final = 224
HASTY_SLO_MS: Final = 100
HASTY_LATE_SHARE: Final = 0.01
TICK_MS: Final = 4.0
"""The kernel tells when bytes came to a tick of 4 ms where it has 250 of them a second."""


class Player:
    """A client at work, in a process of its own."""

    def __init__(self, plan: Plan, core: int | None = None, *, stock: bool = False) -> None:
        module = f"benchmarks.stalls.{'stock' if stock else 'clients'}"
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        self._process = subprocess.Popen(
            [*pinned, sys.executable, "-m", module, msgspec.json.encode(plan).decode()],
            cwd=ROOT, stdout=subprocess.PIPE,
        )  # fmt: skip

    def seen(self) -> list[Seen]:
        """All that it saw, once it is done. RuntimeError if it did not end well."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"a client ended with {self._process.returncode}")
        return msgspec.json.decode(out, type=list[Seen])


# What was seen, and what the server counted of it


def late(seen: Iterable[Seen], status: str, by_ms: float) -> list[Seen]:
    """Those with that status that came later than their SLO by more than so much."""
    return [one for one in seen if one.status == status and one.took_ms > one.slo_ms + by_ms]


def worst(seen: Iterable[Seen], status: str) -> str:
    """How late the latest with that status was; below zero if none was."""
    over_ms = max([one.took_ms - one.slo_ms for one in seen if one.status == status], default=float("-inf"))
    return f"at most {over_ms:+.1f} ms"


def ends(seen: Iterable[Seen]) -> Counter[str]:
    """How many ended how; "" is not at all."""
    return Counter(one.status for one in seen)


def judge_books(
    outcome: Outcome, part: str, server: Server, seen: list[Seen], *, whole: bool, ca: Path | None = None
) -> None:
    """What the metrics say must be what the clients saw; ``whole``: nobody who counts was replaced."""
    metrics = read_metrics(server.facts["metrics"], 10, ca)
    received = total(metrics, "clockwork_requests_received_total")
    known = total(metrics, "clockwork_requests_total") + total(metrics, "clockwork_requests_open")
    outcome.judge(
        f"{part}: received is the sum of outcomes", asked="difference 0", found=f"{received - known:g}",
        good=received == known,
    )  # fmt: skip
    if whole:
        counted, saw = total(metrics, "clockwork_requests_total", outcome="ok"), ends(seen)[GOOD]
        outcome.judge(
            f"{part}: counted as ok, of those that were 200 to a client",
            asked=f"no more, and at least {COUNTED:.0%}", found=f"{counted:g} of {saw}",
            good=COUNTED * saw <= counted <= saw,
        )  # fmt: skip


def judge_lateness(outcome: Outcome, part: str, seen: dict[str, list[Seen]]) -> None:
    """No late answer was called good, by protocol."""
    for protocol, some in seen.items():
        found, refusals, counts = late(some, GOOD, LATE_MS), late(some, REFUSED, LATE_MS), ends(some)
        outcome.judge(
            f"{part}: {protocol}, 200 though late by more than {LATE_MS:g} ms",
            asked="0", good=not found and counts[GOOD] > 0,
            found=f"{len(found)} of {counts[GOOD]}, {worst(some, GOOD)}; {dict(counts)}",
        )  # fmt: skip
        outcome.judge(
            f"{part}: {protocol}, refused after the SLO by more than {LATE_MS:g} ms", asked="0",
            found=f"{len(refusals)} of {counts[REFUSED]}", good=not refusals,
        )  # fmt: skip
        outcome.figures[f"{part} {protocol}"] = dict(counts)


# Stops, and heavy messages


@contextmanager
def served(folder: Path, gateways: int, **tls: Any) -> Iterator[Server]:
    """A server of models that take 10 ms of a device that uses no core. ``tls``: its certificate and key."""
    for model in range(MODELS):
        emulated(folder / "models", f"m{model}", {1: 10, 2: 12, 4: 16})
    config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"), http_port=0, grpc_port=0, metrics_port=0, gateways=gateways,
            log_level="error", **tls,
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="emulated:0", kind="emulated", memory_bytes=64 * MIB),),
    )  # fmt: skip
    with started(config, folder / "server.log") as server:
        yield server


def play(server: Server, seconds: float, seed: int) -> dict[str, Player]:
    """Clients over both protocols, and a stock client's stream."""
    common: dict[str, Any] = {"models": MODELS, "floats": 4, "slos_ms": SLOS_MS}
    common |= {"seconds": seconds, "seed": seed}
    http, grpc_address = server.address("http"), server.address("grpc")
    stream = Plan(protocol="stream", address=grpc_address, per_s=STREAM_PER_S, **common)
    return {
        "HTTP": Player(Plan(protocol="http", address=http, per_s=HTTP_PER_S, **common)),
        "gRPC": Player(Plan(protocol="grpc", address=grpc_address, per_s=GRPC_PER_S, **common)),
        "gRPC stream": Player(stream, stock=True),
    }


def play_tls(server: Server, seconds: float, seed: int, authority: Path) -> dict[str, Player]:
    """Stock clients over TLS."""
    common: dict[str, Any] = {"models": MODELS, "floats": 4, "slos_ms": SLOS_MS, "authority": str(authority)}
    common |= {"seconds": seconds, "seed": seed, "per_s": STREAM_PER_S}
    return {
        "HTTPS": Player(Plan(protocol="http", address=server.address("http"), **common), stock=True),
        "gRPC stream, TLS": Player(
            Plan(protocol="stream", address=server.address("grpc"), **common), stock=True
        ),
    }  # fmt: skip


def judge_players(
    outcome: Outcome, part: str, server: Server, players: dict[str, Player], *,
    before: dict[str, int] | None, ca: Path | None = None,
) -> None:  # fmt: skip
    """What clients saw until their end; ``before``: the processes that there were, if some were stopped."""
    seen = {protocol: player.seen() for protocol, player in players.items()}
    whole = before is not None and server.pids() == before
    judge_lateness(outcome, part, seen)
    all_seen = [one for some in seen.values() for one in some]
    judge_books(outcome, part, server, all_seen, whole=whole, ca=ca)


def stops(outcome: Outcome, folder: Path, seconds: float, seed: int) -> None:
    """Each process and all of them, stopped for a while again and again."""
    with served(folder, gateways=2) as server:
        before = server.pids()
        players = play(server, seconds, seed)
        count = _stop_often(server, seconds, seed)
        judge_players(outcome, f"{count} stops", server, players, before=before)


def stops_with_tls(outcome: Outcome, folder: Path, seconds: float, seed: int) -> None:
    """The same with stock clients, to a server with a certificate."""
    authority, names = trustme.CA(), ("ca.pem", "chain.pem", "key.pem")
    certificate = authority.issue_cert("127.0.0.1")
    folder.mkdir()
    ca, chain, key = (folder / name for name in names)
    authority.cert_pem.write_to_path(ca)
    certificate.private_key_pem.write_to_path(key)
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    with served(folder, gateways=2, tls_certificate=str(chain), tls_key=str(key)) as server:
        before = server.pids()
        players = play_tls(server, seconds, seed, ca)
        count = _stop_often(server, seconds, seed)
        judge_players(outcome, f"{count} stops, TLS", server, players, before=before, ca=ca)


def _stop_often(server: Server, seconds: float, seed: int) -> int:
    """Stop each process in turn, for a time by chance; returns how often."""
    dice = random.Random(seed)
    end, count = time.monotonic() + seconds, 0
    time.sleep(1.5)
    targets = [*sorted(server.pids()), WHOLE]
    longest_s = min(STOP_S[1], seconds / 15)
    while time.monotonic() < end:
        for_s = STOP_S[0] * (longest_s / STOP_S[0]) ** dice.random()
        _stop(server, targets[count % len(targets)], for_s)
        count += 1
        time.sleep(dice.uniform(0.5, 2.0))
    return count


def _stop(server: Server, target: str, for_s: float) -> None:
    pids = [pid for name, pid in server.pids().items() if target in (WHOLE, name)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number is signal.SIGSTOP:
            time.sleep(for_s)


def heavy(outcome: Outcome, folder: Path, seed: int) -> None:
    """The same clients beside messages that take a gateway long to read."""
    with served(folder, gateways=1) as server:
        players = play(server, HEAVY + 4.0, seed)
        time.sleep(2)
        senders = []
        for number in range(HEAVY):
            send = _send_json if number % 2 else _send_contents
            senders.append(threading.Thread(target=send, args=(server,), daemon=True))
            senders[-1].start()
            time.sleep(1)
        judge_players(outcome, f"{HEAVY} heavy messages", server, players, before=None)
        for sender in senders:
            sender.join(60)


def _send_json(server: Server) -> None:
    """Numbers, as many as JSON may have."""
    numbers = b"[0]," * (_HEAVY_BYTES // 4) + b"[0]"
    body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[%s]}]}' % numbers
    message = http_message(server.http_url, "POST", "/v2/models/m0/infer", body)
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", server.http_port), timeout=60) as client,
    ):
        client.sendall(message)
        client.recv(1 << 16)


def _send_contents(server: Server) -> None:
    """Typed contents, four million of them."""
    request: Any = ModelInferRequest(model_name="m0")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    tensor.contents.bytes_contents.extend([b""] * (4 * MIB))
    with grpc.insecure_channel(server.address("grpc")) as channel:
        call = channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")
        with contextlib.suppress(grpc.RpcError):
            call(request.SerializeToString(), timeout=60)


# Hasty clients


@contextmanager
def served_on(folder: Path, core: int) -> Iterator[Server]:
    """A server of convolutions that has one core for all its processes."""
    for model in range(HASTY_MODELS):
        convolutions(folder / "models", f"m{model}", side=SIDE, channels=8, depth=5, seed=model)
    config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"), http_port=0, grpc_port=None, metrics_port=0, log_level="error"
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="cpu:0", kind="cpu", memory_bytes=256 * MIB),),
    )
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        with started(config, folder / "server.log", 300) as server:
            os.sched_setaffinity(0, before)
            yield server
    finally:
        os.sched_setaffinity(0, before)


def hasty(outcome: Outcome, folder: Path, seconds: float) -> None:
    """What was late by the client's clock, and was not said to be."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        outcome.invalid = "clients need a core of their own"
        return
    with served_on(folder, cores[0]) as server:
        plan = Plan(
            protocol="http", address=server.address("http"), models=HASTY_MODELS, floats=3 * SIDE * SIDE,
            slos_ms=(HASTY_SLO_MS,), seconds=seconds, connections=HASTY_CLIENTS,
        )  # fmt: skip
        seen = Player(plan, cores[1]).seen()
        judge_hasty(outcome, seen)
        judge_books(outcome, "hasty", server, seen, whole=False)


def judge_hasty(outcome: Outcome, seen: list[Seen]) -> None:
    """Of all that was seen."""
    counts, good = ends(seen), [one for one in seen if one.status == GOOD]
    over, refused = late(seen, GOOD, 0), late(seen, REFUSED, TICK_MS)
    outcome.judge(
        "hasty: 200 though late", asked=f"at most {HASTY_LATE_SHARE:.0%}",
        found=f"{len(over)} of {len(good)}, {worst(seen, GOOD)}; {dict(counts)}",
        good=len(good) > 0 and len(over) <= HASTY_LATE_SHARE * len(good),
    )  # fmt: skip
    outcome.judge(
        "hasty: refused after the SLO, by more than a tick of the kernel", asked="0",
        found=f"{len(refused)} of {counts[REFUSED]}, {worst(seen, REFUSED)}", good=not refused,
    )  # fmt: skip
    own = sorted(one.own_ns / 1e6 for one in seen if one.ended_ns)
    outcome.figures["hasty"] = {
        "ends": dict(counts), "late_200": len(over), "late_429": len(late(seen, REFUSED, 0)),
        "took_ms": quantiles([one.took_ms for one in good], n=100)[49::49] if len(good) > 1 else [],
        "own_ms_p50_p99_max": [own[len(own) // 2], own[len(own) * 99 // 100], own[-1]] if own else [],
    }  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="below ten minutes")
    options.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    given = options.parse_args()
    outcome = Outcome("benchmarks.stalls")
    parts = given.part or PARTS
    with tempfile.TemporaryDirectory(prefix="cw-") as folder:
        if "stops" in parts:
            stops(outcome, Path(folder) / "stops", 60 if given.short else 300, given.seed)
        if "tls" in parts:
            stops_with_tls(outcome, Path(folder) / "tls", 60 if given.short else 300, given.seed)
        if "heavy" in parts:
            heavy(outcome, Path(folder) / "heavy", given.seed)
        if "hasty" in parts:
            hasty(outcome, Path(folder) / "hasty", 20 if given.short else 60)
    if "stuck" in parts:
        stuck.rows(outcome, short=given.short)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
