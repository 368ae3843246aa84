"""A process that only sends load: one prepared HTTP request again and again, on keep-alive sockets.

Open loop: requests arrive as a Poisson process, and the latency of each counts from its arrival. Closed loop:
each connection sends its next request when it has its answer. It is lean where ``harness.http_load`` is
convenient, for it shares the machine with the server that it measures: no event loop, no parser, no copies of
the message, no samples. It never retries.

    python -m harness.lean_load '{"host": ...}'

writes one line of JSON when its connections stand and the load begins, and one when all is answered.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar

import msgspec
from msgspec import Struct

from harness.machine import cpu_ns, wait_for_peace
from harness.report import milliseconds, quantile

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)
GRACE_NS = 5_000_000_000
WARM_UP_S: Final = 0.2
LATE_NS: Final = 5_000_000
"""A generator whose p99 is later than this did not offer the load that it was told to."""
OTHERS_SHARE: Final = 0.05
"""Of one core: what processes that take no part may use."""

LENGTHS: Final = struct.Struct("<II")
"""What a frame begins with, instead of HTTP: the lengths of its header and of its tensor."""


class Plan(Struct, frozen=True, kw_only=True):
    """``message`` is a file that holds the whole request; ``rate``: requests a second, 0 for a closed loop.

    Requests of the first ``warmup_s`` are not counted. ``framed``: answers are frames, not HTTP.
    """

    host: str
    port: int
    message: str
    seconds: float
    connections: int
    rate: float = 0.0
    warmup_s: float = 1.0
    seed: int = 1
    nice: int = 0
    cores: tuple[int, ...] = ()
    framed: bool = False


class Started(Struct, frozen=True, kw_only=True):
    """When the load begins."""

    start_ns: int


class Found(Struct, frozen=True, kw_only=True):
    """What became of the counted requests. Durations in ns by share of ``SHARES``."""

    seconds: float
    asked: int
    sent: int
    """All requests, those that are not counted too."""
    ends: dict[int, int]
    """By HTTP status; 0 for those that the server cut off or never answered."""
    latency_ns: list[float]
    late_ns: list[float]
    """How long after its instant a request was sent although a connection was free."""
    waited: int
    """Requests that found no free connection."""

    def why_invalid(self, others: float, answered: float = 1.0) -> str:
        """Why it proves nothing, if it does not.

        ``others``: what processes that take no part used of a core; ``answered``: the share of good answers
        that there must be at least.
        """
        if self.late_ns[2] > LATE_NS:
            return f"the generator sent its requests up to {milliseconds(self.late_ns[2])} late (p99)"
        if self.ends.get(200, 0) < answered * self.asked:
            return f"of {self.asked} requests {self.ends.get(200, 0)} were answered well: {self.ends}"
        if others > OTHERS_SHARE:
            return f"processes that take no part used {others:.0%} of a core"
        return ""


def undisturbed(
    run: Callable[[], T], why_invalid: Callable[[T], str], *, retries: int, patience_s: float
) -> T:
    """Run a load on a quiet machine, again if it proved nothing, at most so often."""
    for left in range(retries, -1, -1):
        wait_for_peace(OTHERS_SHARE, patience_s)
        found = run()
        if not left or not why_invalid(found):
            break
    return found


class Generator:
    """The process, as the benchmark that starts it sees it."""

    def __init__(self, plan: Plan) -> None:
        """Start it, and wait until the load begins."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.lean_load", msgspec.json.encode(plan).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self.started = msgspec.json.decode(self._line(), type=Started)

    def result(self) -> Found:
        """Wait for it; the process is there until :meth:`close`, so that its CPU time can be read."""
        return msgspec.json.decode(self._line(), type=Found)

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _line(self) -> bytes:
        line = self._output.readline()
        if not line:
            raise RuntimeError(f"the load generator ended with status {self._process.wait()}")
        return line


@dataclass(frozen=True, slots=True)
class Subject:
    """A server to ask: its processes, its address, and what is sent there again and again."""

    pids: list[int]
    kind: str
    address: str
    message: bytes


def ask(server: Subject, core: int, connections: int, seconds: float) -> dict[str, float]:
    """What a server does for a while: requests/s, us of CPU a request of its processes, p50 and p99 in us."""
    host, _, port = server.address.rpartition(":")
    with tempfile.NamedTemporaryFile() as message:
        message.write(server.message)
        message.flush()
        plan = Plan(
            host=host, port=int(port), message=message.name, seconds=seconds, connections=connections,
            warmup_s=WARM_UP_S, cores=(core,), framed=server.kind == "frames",
        )  # fmt: skip
        before = sum(map(cpu_ns, server.pids))
        with closing(Generator(plan)) as generator:
            found = generator.result()
        used_ns = sum(map(cpu_ns, server.pids)) - before
    return {
        "per_s": found.ends.get(200, 0) / seconds, "us": used_ns / 1e3 / found.sent,
        "p50_us": found.latency_ns[0] / 1e3, "p99_us": found.latency_ns[2] / 1e3,
        "bad": sum(found.ends.values()) - found.ends.get(200, 0),
    }  # fmt: skip


Parse = Callable[[bytes], tuple[int, int] | None]
"""Status and length of the answer that some bytes start with; None while it is not whole."""


class Connection:
    """One keep-alive socket with at most one request out."""

    __slots__ = ("due_ns", "received", "rest", "socket")

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due_ns = 0  # of the request that is out; 0 if there is none
        self.rest: memoryview | None = None  # what is left to be sent of it
        self.received = b""

    def ask_once(self, message: bytes, parse: Parse) -> None:
        """One request, and its answer. RuntimeError if it is no good one."""
        self.socket.sendall(message)
        received = b""
        while (found := parse(received)) is None:
            data = self.socket.recv(1 << 16)
            if not data:
                raise RuntimeError(f"the server closed the connection after {received!r}")
            received += data
        if found[0] != 200:
            raise RuntimeError(f"the request was answered {received!r}")


def http_answer(received: bytes) -> tuple[int, int] | None:
    """Status and length of an HTTP response whose head is as our server writes it."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    at = received.find(b"Content-Length: ")
    if received[at - 2 : at] != b"\r\n":  # a longer name that ends like it
        at = received.index(b"\r\nContent-Length: ") + 2
    length = end + 4 + int(received[at + 16 : received.index(b"\r", at)])
    return (int(received[9:12]), length) if len(received) >= length else None


def _frame(received: bytes) -> tuple[int, int] | None:
    if len(received) < LENGTHS.size:
        return None
    length = LENGTHS.size + sum(LENGTHS.unpack_from(received))
    return (200, length) if len(received) >= length else None


def connected(plan: Plan, message: bytes) -> list[Connection]:
    """The connections of a plan, each of which has been asked once."""
    found = []
    for _ in range(plan.connections):
        connection = Connection(plan.host, plan.port)
        connection.ask_once(message, _frame if plan.framed else http_answer)
        found.append(connection)
    return found


class _Load:
    """The load itself."""

    def __init__(self, plan: Plan, message: bytes, connections: list[Connection]) -> None:
        self._message = message
        self._connections = connections
        self._random = random.Random(plan.seed)
        self._rate = plan.rate
        self._parse: Parse = _frame if plan.framed else http_answer
        self._idle = deque(connections)
        self._waiting: deque[int] = deque()
        self._epoll = select.epoll()
        self._by_fd = {connection.socket.fileno(): connection for connection in connections}
        for fd, connection in self._by_fd.items():
            connection.socket.setblocking(False)  # noqa: FBT003 (the socket's own word)
            self._epoll.register(fd, select.EPOLLIN)
        self._out = 0
        self._counted_ns = self._end_ns = 0
        self.asked = self.sent = self.waited = 0
        self.ends: Counter[int] = Counter()
        self.latencies_ns: list[int] = []
        self.lates_ns: list[int] = []

    def run(self, start_ns: int, counted_ns: int, end_ns: int) -> None:
        """Ask from ``start_ns`` until ``end_ns``, and wait a while for what is out."""
        self._counted_ns, self._end_ns = counted_ns, end_ns
        if self._rate:
            self._open_loop(start_ns, end_ns)
        else:
            for _ in self._connections:
                self._ask(time.monotonic_ns())
        while self._out and time.monotonic_ns() < end_ns + GRACE_NS:
            self._take(0.1)
        self.ends[0] += self.asked - sum(self.ends.values())

    def _open_loop(self, start_ns: int, end_ns: int) -> None:
        gaps = (self._random.expovariate(self._rate) for _ in itertools.count())
        arrivals = itertools.accumulate((round(gap * 1e9) for gap in gaps), initial=start_ns)
        next(arrivals)
        due_ns = next(arrivals)
        while due_ns < end_ns:
            now_ns = time.monotonic_ns()
            while due_ns <= now_ns and due_ns < end_ns:
                self._ask(due_ns)
                due_ns = next(arrivals)
            self._listen(due_ns)

    def _ask(self, due_ns: int) -> None:
        counted = due_ns >= self._counted_ns
        self.asked += counted
        self._out += 1
        if not self._idle:
            self.waited += counted
            self._waiting.append(due_ns)
            return
        if counted:
            self.lates_ns.append(time.monotonic_ns() - due_ns)
        self._send(self._idle.popleft(), due_ns)

    def _send(self, connection: Connection, due_ns: int) -> None:
        self.sent += 1
        connection.due_ns = due_ns
        try:
            sent = connection.socket.send(self._message)
        except BlockingIOError:
            sent = 0
        if sent < len(self._message):
            connection.rest = memoryview(self._message)[sent:]
            self._epoll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _go_on(self, connection: Connection) -> bool:
        """Send more of its request; whether that was all."""
        assert connection.rest is not None
        try:
            connection.rest = connection.rest[connection.socket.send(connection.rest) :] or None
        except BlockingIOError:
            return False
        return connection.rest is None

    def _listen(self, until_ns: int) -> None:
        """Take in what comes until that instant; epoll itself would round it to milliseconds."""
        left_s = (until_ns - time.monotonic_ns()) / 1e9
        if left_s > 0:
            select.select([self._epoll.fileno()], [], [], left_s)
        self._take(0)

    def _take(self, timeout_s: float) -> None:
        for fd, events in self._epoll.poll(timeout_s):
            connection = self._by_fd[fd]
            if connection.rest is not None and events & select.EPOLLOUT and self._go_on(connection):
                self._epoll.modify(fd, select.EPOLLIN)
                if not connection.due_ns:
                    self._free(connection)
            if events & ~select.EPOLLOUT:
                self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise RuntimeError(f"the server closed a connection after {connection.received!r}")
        received = connection.received + data if connection.received else data
        found = self._parse(received)
        if found is None:
            connection.received = received
            return
        connection.received = b""
        due_ns, connection.due_ns = connection.due_ns, 0
        self._out -= 1
        if due_ns >= self._counted_ns:
            self.latencies_ns.append(time.monotonic_ns() - due_ns)
            self.ends[found[0]] += 1
        if connection.rest is None:  # else it was refused before it was sent, which comes first
            self._free(connection)

    def _free(self, connection: Connection) -> None:
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        elif not self._rate:
            now_ns = time.monotonic_ns()
            if now_ns < self._end_ns:
                self._out += 1
                self.asked += now_ns >= self._counted_ns
                self._send(connection, now_ns)
        else:
            self._idle.append(connection)


def main() -> int:
    """Run the plan in ``argv[1]``."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    _give_way(plan)
    message = Path(plan.message).read_bytes()
    connections = connected(plan, message)
    load = _Load(plan, message, connections)
    gc.collect()
    gc.disable()
    start_ns = time.monotonic_ns() + 50_000_000
    _tell(Started(start_ns=start_ns))
    counted_ns = start_ns + round(plan.warmup_s * 1e9)
    load.run(start_ns, counted_ns, counted_ns + round(plan.seconds * 1e9))
    latency_ns = [quantile(load.latencies_ns or [0], share) for share in SHARES]
    late_ns = [quantile(load.lates_ns or [0], share) for share in SHARES]
    _tell(
        Found(
            seconds=plan.seconds, asked=load.asked, sent=load.sent + len(connections),
            ends={end: n for end, n in load.ends.items() if n},
            latency_ns=latency_ns, late_ns=late_ns, waited=load.waited,
        )
    )  # fmt: skip
    sys.stdin.read()
    return 0


def _give_way(plan: Plan) -> None:
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    if plan.nice:
        os.nice(plan.nice)
        try:
            # In a session of its own, the niceness of its group is what counts.
            Path("/proc/self/autogroup").write_text(str(plan.nice))
        except OSError:
            return


def _tell(record: Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(record) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
