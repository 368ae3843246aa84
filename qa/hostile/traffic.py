"""Sends hostile traffic to a server's ports: a rate of attacks, and a number of slow connections.

It is a process of its own, which runs only when nothing else wants a core, and reports at its end what it
sent and the cost of that. A seed determines what is sent, the machine when.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qa.hostile import frames as hostile_frames
from qa.hostile import http as hostile_http
from qa.hostile.http import RESET, Plan

ROOT: Final = Path(__file__).parents[2]
WAIT_S: Final = 1.0
DRIP_S: Final = 0.5
"""How often each slow connection says something."""
RARE: Final = 50
"""One attack of so many is one that costs the server milliseconds, by its nature."""


@dataclass(slots=True)
class Count:
    """What was sent, by attack, and what came of it."""

    sent: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    held: int = 0
    held_again: int = 0


class Slow:
    """One connection that says little, and again once it was cut off."""

    def __init__(self, port: int, start: bytes, drip: bytes, *, reads: bool = True) -> None:
        self._port = port
        self._start = start
        self._drip = drip
        self._reads = reads
        self._at = 0
        self._socket: socket.socket | None = None

    def step(self, count: Count) -> None:
        """Connect, or say one byte more."""
        try:
            if self._socket is None:
                self._socket = _connected(self._port, small=not self._reads)
                self._at = 0
                count.held_again += 1
                self._socket.sendall(self._start)
            elif self._drip:
                self._socket.sendall(self._drip[self._at : self._at + 1])
                self._at = (self._at + 1) % len(self._drip)
            self._socket.setblocking(False)  # noqa: FBT003 - the socket's own word
            if self._reads and not self._socket.recv(4096):
                self.close()
        except (BlockingIOError, TimeoutError):
            pass
        except OSError:
            self.close()

    def close(self) -> None:
        """Let go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def slow_ones(given: argparse.Namespace) -> list[Slow]:
    """So many slow connections, of all kinds in turn."""
    http, grpc, metrics = given.http, given.grpc, given.metrics
    endless = b"0123456789" * 10
    chunked = b"POST /v2/models/m1/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    sized = b"POST /v2/models/m1/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    stream = hostile_frames.START + hostile_frames.opened(1, hostile_frames.STREAM)
    kinds: list[Callable[[], Slow]] = [
        lambda: Slow(http, b"", b""),
        lambda: Slow(http, b"GET /v2 HTTP/1.1\r\nA: ", endless),
        lambda: Slow(http, sized % 1000, endless),
        lambda: Slow(http, sized % 5_000_000, endless),
        lambda: Slow(http, chunked, b"1\r\na\r\n"),
        lambda: Slow(http, chunked + b"0\r\n", b"A: b\r\n"),
        lambda: Slow(metrics, b"GET /metrics HTTP/1.1\r\nA: ", endless),
    ]
    over_grpc: list[Callable[[], Slow]] = [
        lambda: Slow(grpc, b"PRI", b""),
        lambda: Slow(grpc, hostile_frames.START, hostile_frames.frame(hostile_frames.PING, 0, 0, bytes(8))),
        lambda: Slow(grpc, stream, b""),
    ]
    if given.grpc_share:
        kinds += over_grpc
    # Few, for what they ask for costs the server milliseconds each time.
    unread = [Slow(metrics, b"GET /metrics HTTP/1.1\r\n\r\n" * 60, b"", reads=False) for _ in range(2)]
    return (unread + [kinds[number % len(kinds)]() for number in range(given.held)])[: given.held]


def attack(port: int, plan: Plan) -> str:
    """Carry one out; how it ended."""
    try:
        client = _connected(port)
    except OSError as error:
        return type(error).__name__
    end = "silence"
    with client:
        try:
            for piece in plan.pieces:
                client.sendall(piece)
                if plan.pause_s:
                    time.sleep(plan.pause_s)
            if plan.end == "half":
                client.shutdown(socket.SHUT_WR)
            if plan.hold_s and plan.end != "unread":
                client.settimeout(plan.hold_s)
                found = client.recv(65536)
                end = found[9:12].decode("latin-1") if found.startswith(b"HTTP/1.1 ") else "other"
                end = end if found else "closed"
        except TimeoutError:
            pass
        except OSError as error:
            end = type(error).__name__
        if plan.end == RESET:
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return end


def _connected(port: int, *, small: bool = False) -> socket.socket:
    made = socket.socket()
    if small:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(WAIT_S)
    try:
        made.connect(("127.0.0.1", port))
    except OSError:
        made.close()
        raise
    return made


def chosen(dice: random.Random, given: argparse.Namespace) -> tuple[str, int, Plan]:
    """The next attack: its name, where, and what."""
    if not dice.randrange(RARE):
        return "bombs", given.http, hostile_http.bombs(dice)
    if dice.random() < given.grpc_share:
        make = dice.choice(hostile_frames.ATTACKS + hostile_frames.BEYOND_GRPCIO * given.all)
        return make.__name__, given.grpc, make(dice)
    make = dice.choice(hostile_http.ATTACKS)
    return make.__name__, given.metrics if dice.random() < 0.05 else given.http, make(dice)


def step_aside() -> None:
    """Run only where nothing else wants the core."""
    os.nice(19)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run(given: argparse.Namespace) -> Count:
    """Attack for so long."""
    dice, count = random.Random(given.seed), Count(held=given.held)
    slow = slow_ones(given)
    start = time.monotonic()
    drips = attacks = 0
    try:
        while (now := time.monotonic() - start) < given.seconds:
            while slow and drips < now / DRIP_S * len(slow):
                slow[drips % len(slow)].step(count)
                drips += 1
            if attacks >= now * given.rate:
                time.sleep(0.002)
                continue
            # What the machine had no time for is left out.
            attacks = max(attacks + 1, int(now * given.rate))
            name, port, plan = chosen(dice, given)
            count.sent[name] += 1
            count.ends[attack(port, plan)] += 1
    finally:
        for each in slow:
            each.close()
    return count


def start(
    ports: tuple[int | None, ...], *, seconds: float, rate: float, held: int, seed: int,
    grpc_share: float = 0.3, insists: bool = False,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """The hostile process, on the last core; ``ports`` of HTTP, gRPC and metrics."""
    options = {
        **dict(zip(("http", "grpc", "metrics"), ports, strict=True)), "seconds": seconds, "rate": rate,
        "held": held, "seed": seed, "grpc-share": grpc_share, "core": max(os.sched_getaffinity(0)),
    }  # fmt: skip
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "qa.hostile.traffic", *more, *["--insist"] * insists]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def main() -> int:
    """Run it; the last line is what was sent, as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("http", "grpc", "metrics"):
        options.add_argument(f"--{name}", type=int, required=True, metavar="PORT")
    options.add_argument("--seconds", type=float, default=10)
    options.add_argument("--rate", type=float, default=20, help="attacks a second, at most")
    options.add_argument("--held", type=int, default=200, help="slow connections")
    options.add_argument("--grpc-share", type=float, default=0.3, help="of attacks that are over gRPC")
    options.add_argument("--all", action="store_true", help="also those that leave memory behind in grpcio")
    options.add_argument("--core", type=int, help="the one core to run on")
    options.add_argument("--insist", action="store_true", help="take a share of it, whoever wants it too")
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    if not given.insist:
        step_aside()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    count = run(given)
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "attacks": sum(count.sent.values()), "sent": dict(count.sent), "ends": dict(count.ends),
        "held": count.held,
        "connected_slowly": count.held_again, "cpu_s": used.ru_utime + used.ru_stime,
    }  # fmt: skip
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
