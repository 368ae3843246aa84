"""A process that only sends: each request at its instant, on a free connection; it computes no statistics.

One loop over epoll. Everything is prepared, so that a request costs a system call to send, one to receive,
and little beside them. What is due is sent before what came is looked at; so much of either in a turn.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from time import monotonic_ns
from typing import Any, Final

from clockwork_lab.bench.connection import Connection
from clockwork_lab.bench.job import Clients, Job
from clockwork_lab.bench.records import ANSWERED, Ends, Kind, Rows
from clockwork_serve.units import NS_PER_S

TURN: Final = 16
"""Requests sent, and sockets read, before the other kind has its turn."""
OPENED_PER_TURN: Final = 4
SPIN_NS: Final = 20_000
"""Instants closer than this are not slept for: waking takes longer."""
SLEEP_NS: Final = 200_000_000
SENT_AGAIN_MAX: Final = 3
LINGER_NS: Final = 50_000_000
"""Once nothing is out: how long a second response may still come and be seen."""


class Sender:
    """The loop. Wires use its public fields; instants in the columns count from ``start_ns``."""

    def __init__(
        self,
        job: Job,
        rows: Rows,
        ends: Ends,
        *,
        wire: type[Connection],
        prepared: Any,
        tls: ssl.SSLContext | None,
        stop_fd: int,
    ) -> None:
        found = socket.getaddrinfo(job.ip, job.port, type=socket.SOCK_STREAM)[0]
        self.family, self.place = found[0], found[4]
        self.host = job.host
        self.tls = tls
        self.ends = ends
        self.prepared = prepared
        self.start_ns = 0
        self.sent, self.first, self.nbytes = rows.view("sent_ns"), rows.view("first_ns"), rows.view("nbytes")
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.idle: deque[Connection] = deque()
        self.dirty: list[Connection] = []
        self.trailers: dict[bytes, tuple[int, int | None]] = {}
        self.total = self.opening = 0
        self.unexpected = self.unexpected_bytes = 0
        self.waited = self.most_connections = 0
        self.full = False
        self._wire, self._job, self._size = wire, job, rows.size
        self._due, self._slos = rows.view("scheduled_ns"), rows.view("slo_ns")
        self._messages, self._models, self._loads = (rows.view(n) for n in ("message", "model", "load"))
        self._last, self._status, self._log = (rows.view(n) for n in ("last_ns", "status", "ended"))
        self._counts = rows.counts
        self._waiting: deque[int] = deque()
        self._at, self._count, self._used = 0, job.open_rows, job.open_rows
        self._logged = self._out = 0
        self._stopping = False
        self._refusals: list[str] = []
        # Closed loads: when which client sends next; which client has which row out.
        self._next: list[tuple[int, int, Clients]] = []
        self._of: dict[int, tuple[int, Clients]] = {}
        for group in job.clients:
            for due_ns in group.starts_ns:
                heappush(self._next, (due_ns, len(self._next), group))
        self._deadlines: list[tuple[int, int, Connection]] = []
        self._put_back: dict[int, int] = {}
        self._stop_fd = stop_fd
        self.epoll.register(stop_fd, select.EPOLLIN)
        self.handlers[stop_fd] = self._told_to_stop

    def open(self, wait_s: float) -> str:
        """Open the first connections; the reason why there are none, empty if there are."""
        until_ns = monotonic_ns() + round(wait_s * NS_PER_S)
        self._open(self._job.first_connections)
        while self.opening and monotonic_ns() < until_ns and not self._stopping:
            self._listen(until_ns)
            self._flush()
        if self.idle:
            return ""
        return self._refusals[-1] if self._refusals else f"no connection within {wait_s:g} s"

    def run(self, start_ns: int) -> None:
        """Send everything, and wait for what is out; ``start_ns`` is an instant of CLOCK_MONOTONIC."""
        self.start_ns = start_ns
        stop_ns = self._job.end_ns
        while True:
            now_ns = monotonic_ns() - start_ns
            wake_ns = now_ns + SLEEP_NS
            if not self._stopping:
                if self._at < self._count and (wake_ns := self._due[self._at]) <= now_ns:
                    self._send_due(now_ns)
                if self._next:
                    if self._next[0][0] <= now_ns:
                        self._send_next(now_ns)
                    wake_ns = min(wake_ns, self._next[0][0]) if self._next else wake_ns
            if self._deadlines:
                self._abandon_due(now_ns)
                if self._deadlines:
                    wake_ns = min(wake_ns, self._deadlines[0][0])
            if self.dirty:
                self._flush()
            if self._stopping:
                stop_ns = min(stop_ns, now_ns)
            if (self._stopping or (self._at == self._count and not self._next)) and (
                not self._out or now_ns >= stop_ns + self._job.drain_ns
            ):
                break
            self._listen(start_ns + min(wake_ns, now_ns + SLEEP_NS))
        end_ns = monotonic_ns() + LINGER_NS
        while monotonic_ns() < end_ns - SPIN_NS:
            self._listen(end_ns)

    def nobody_asked(self, nbytes: int) -> None:
        """A response, or a part of one, came on a connection that had its answer."""
        self.unexpected += 1
        self.unexpected_bytes += nbytes

    # Sending

    def _send_due(self, now_ns: int) -> None:
        due, idle, waiting, messages = self._due, self.idle, self._waiting, self._messages
        first = row = self._at
        last = min(row + TURN, self._count)
        while row < last and due[row] <= now_ns:
            self._out += 1
            while idle and not waiting:
                connection = idle.popleft()
                if not connection.dead:
                    connection.send(row, messages[row])
                    if self._job.abandon:
                        heappush(self._deadlines, (due[row] + self._slos[row], row, connection))
                    break
            else:
                self.waited += 1
                waiting.append(row)
            row += 1
        self._at = self._counts[1] = row
        assert row > first, "it was called because one was due"
        if waiting or len(idle) < self._job.reserve:
            self._grow()

    def _send_next(self, now_ns: int) -> None:
        """Clients whose turn it is."""
        for _ in range(TURN):
            if not self._next or self._next[0][0] > now_ns:
                break
            due_ns, number, group = heappop(self._next)
            if due_ns >= group.stop_ns:
                continue
            row = self._used
            if row >= self._size:
                self.full = True
                continue
            self._used = row + 1
            slo_ns, message = group.steps[0][1:]
            for from_ns, *step in group.steps[1:]:
                if due_ns < from_ns:
                    break
                slo_ns, message = step
            self._due[row], self._slos[row], self._messages[row] = due_ns, slo_ns, message
            self._models[row], self._loads[row] = group.model, group.load
            self._of[row] = (number, group)
            self._counts[2] = row + 1 - self._count
            self._out += 1
            self._waiting.append(row)
            if not self.idle:
                self.waited += 1
        self._serve_waiting()
        if self._waiting:
            self._grow()

    def _serve_waiting(self) -> None:
        idle, waiting = self.idle, self._waiting
        while waiting and idle:
            connection = idle.popleft()
            if connection.dead:
                continue
            row = waiting.popleft()
            connection.send(row, self._messages[row])
            if self._job.abandon:
                heappush(self._deadlines, (self._due[row] + self._slos[row], row, connection))

    def _flush(self) -> None:
        dirty, self.dirty = self.dirty, []
        for connection in dirty:
            connection.flush()

    def _abandon_due(self, now_ns: int) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_ns:
            _, row, connection = heappop(deadlines)
            if not self._status[row] and not connection.dead:
                connection.abandon(row)

    def _grow(self) -> None:
        """Open connections for what waits, and some ahead."""
        wanted = len(self._waiting) + self._job.reserve - len(self.idle) - self.opening
        self._open(min(OPENED_PER_TURN, wanted, self._job.connections - self.total))

    def _open(self, connections: int) -> None:
        for _ in range(connections):
            try:
                self._wire(self)
            except OSError as error:
                self.refused(error.strerror or str(error))
                return
            self.total += 1
            self.opening += 1
            self.most_connections = max(self.most_connections, self.total)

    # What wires tell

    def free(self, connection: Connection) -> None:
        """It can take a request."""
        self.idle.append(connection)
        if self._waiting:
            self._serve_waiting()

    def refused(self, why: str) -> None:
        """A connection could not be made: the request that waited longest has none."""
        self._refusals.append(why)
        if self._waiting:
            now_ns = monotonic_ns() - self.start_ns
            row = self._waiting.popleft()
            self.ended(row, self.ends.code(Kind.BROKEN, f"no connection: {why}"), now_ns, 0, None)

    def may_go_again(self, row: int) -> bool:
        """Whether a request that the server says it has not looked at is to be sent again."""
        times = self._put_back[row] = self._put_back.get(row, 0) + 1
        return times <= SENT_AGAIN_MAX

    def put_back(self, row: int) -> None:
        """It waits again, before all others."""
        self.sent[row] = self.first[row] = self.nbytes[row] = 0
        self._waiting.appendleft(row)
        self._serve_waiting()

    def ended(self, row: int, code: int, now_ns: int, nbytes: int, wait_ns: int | None) -> None:
        """A request is over; ``wait_ns`` is how long its client was told to stay away."""
        self._last[row] = now_ns
        self.nbytes[row] = nbytes
        self._status[row] = code
        self._log[self._logged] = row
        self._logged += 1
        self._counts[0] = self._logged
        self._out -= 1
        if row >= self._count:
            number, group = self._of.pop(row)
            due_ns = now_ns
            if code != ANSWERED:
                told = group.retry_after and wait_ns is not None
                due_ns += wait_ns if told and wait_ns is not None else group.retry_ns
            if due_ns < group.stop_ns:
                heappush(self._next, (due_ns, number, group))

    # Listening

    def _listen(self, until_ns: int) -> None:
        """Take in what came; if nothing did, wait for it until an instant of CLOCK_MONOTONIC."""
        events = self.epoll.poll(0, TURN)
        if not events:
            left_ns = until_ns - monotonic_ns()
            if left_ns > SPIN_NS:
                # epoll itself counts in milliseconds.
                select.select([self.epoll.fileno()], [], [], left_ns / NS_PER_S)
                events = self.epoll.poll(0, TURN)
        handlers = self.handlers
        for fd, event in events:
            handler = handlers.get(fd)
            if handler is not None:  # else it was closed in this very turn
                handler(event)

    def _told_to_stop(self, events: int) -> None:
        """Our parent wants no more of it, or is gone."""
        self._stopping = True
        self.epoll.unregister(self._stop_fd)
        del self.handlers[self._stop_fd]
