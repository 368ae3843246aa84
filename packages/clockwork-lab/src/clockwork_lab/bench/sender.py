"""A process that only sends: each request at its scheduled instant, on an idle connection.

One event loop over epoll. Everything is prepared before the run, so that a request costs a system call to
send, one to receive, and little beside them. In each iteration, due requests are sent before sockets are
read; both are bounded by ``TURN``.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from time import monotonic_ns
from typing import Any, ClassVar, Final

from clockwork_lab.bench.job import ClosedClients, Job
from clockwork_lab.bench.records import ANSWERED, Ends, Kind, Rows
from clockwork_serve.units import NS_PER_S

TURN: Final = 16  # the most requests sent, and the most sockets read, in one iteration
OPENED_PER_TURN: Final = 4
SPIN_NS: Final = 20_000  # waits shorter than this are spun, for waking from a sleep takes longer
SLEEP_NS: Final = 200_000_000
RETRIES_MAX: Final = 3
LINGER_NS: Final = 50_000_000
"""How long sockets are read after the last response, to detect unexpected further ones."""


class Sender:
    """The event loop. Wires use its public fields; instants in the columns are relative to ``start_ns``."""

    def __init__(
        self, job: Job, rows: Rows, ends: Ends, *, wire: type[LoadConnection], prepared: Any,
        tls: ssl.SSLContext | None, stop_fd: int,
    ) -> None:  # fmt: skip
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
        self.idle: deque[LoadConnection] = deque()
        self.dirty: list[LoadConnection] = []
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
        # Closed loads: when each client sends next; which client each row in flight belongs to.
        self._next: list[tuple[int, int, ClosedClients]] = []
        self._of: dict[int, tuple[int, ClosedClients]] = {}
        for group in job.clients:
            for due_ns in group.starts_ns:
                heappush(self._next, (due_ns, len(self._next), group))
        self._deadlines: list[tuple[int, int, LoadConnection]] = []
        self._requeued: dict[int, int] = {}
        self._stop_fd = stop_fd
        self.epoll.register(stop_fd, select.EPOLLIN)
        self.handlers[stop_fd] = self._on_stop

    def open(self, wait_s: float) -> str:
        """Open the first connections; the reason if none could be opened, else empty."""
        until_ns = monotonic_ns() + round(wait_s * NS_PER_S)
        self._open(self._job.first_connections)
        while self.opening and monotonic_ns() < until_ns and not self._stopping:
            self._poll(until_ns)
            self._flush()
        if self.idle:
            return ""
        return self._refusals[-1] if self._refusals else f"no connection within {wait_s:g} s"

    def run(self, start_ns: int) -> None:
        """Send everything, and await what is in flight; ``start_ns`` is an instant of CLOCK_MONOTONIC."""
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
            self._poll(start_ns + min(wake_ns, now_ns + SLEEP_NS))
        end_ns = monotonic_ns() + LINGER_NS
        while monotonic_ns() < end_ns - SPIN_NS:
            self._poll(end_ns)

    def unexpected_response(self, nbytes: int) -> None:
        """Count bytes that were received on a connection after its response."""
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
        """Send for the clients of closed loads that are due."""
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
        """Open connections for waiting requests, and a reserve."""
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

    # Called by wires

    def free(self, connection: LoadConnection) -> None:
        """A connection can accept a request."""
        self.idle.append(connection)
        if self._waiting:
            self._serve_waiting()

    def refused(self, why: str) -> None:
        """A connection could not be opened: the request that waited longest ends as BROKEN."""
        self._refusals.append(why)
        if self._waiting:
            now_ns = monotonic_ns() - self.start_ns
            row = self._waiting.popleft()
            self.ended(row, self.ends.code(Kind.BROKEN, f"no connection: {why}"), now_ns, 0, None)

    def may_retry(self, row: int) -> bool:
        """Whether a request that the server refused unprocessed is to be sent again."""
        times = self._requeued[row] = self._requeued.get(row, 0) + 1
        return times <= RETRIES_MAX

    def requeue(self, row: int) -> None:
        """Queue a request again, before all others."""
        self.sent[row] = self.first[row] = self.nbytes[row] = 0
        self._waiting.appendleft(row)
        self._serve_waiting()

    def ended(self, row: int, code: int, now_ns: int, nbytes: int, wait_ns: int | None) -> None:
        """A request ended; ``wait_ns`` is the server's advice on when its client may retry."""
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
                obey = group.retry_after and wait_ns is not None
                due_ns += wait_ns if obey and wait_ns is not None else group.retry_ns
            if due_ns < group.stop_ns:
                heappush(self._next, (due_ns, number, group))

    # Polling

    def _poll(self, until_ns: int) -> None:
        """Handle events; if there are none, wait for some until an instant of CLOCK_MONOTONIC."""
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
            if handler is not None:  # else it was closed in this iteration
                handler(event)

    def _on_stop(self, events: int) -> None:
        """The parent requested the end, or ended itself."""
        self._stopping = True
        self.epoll.unregister(self._stop_fd)
        del self.handlers[self._stop_fd]


# ------------------------------------------------------------
# A non-blocking socket of a sender; subclasses, called wires, implement the protocols.


READ_BYTES: Final = 1 << 16
IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT
_LATER: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class LoadConnection:
    """One connection of a sender. A wire handles connecting, received bytes and the connection's end.

    ``dead``: it may not be used any more. ``rest``: bytes to be written before any others.
    """

    __slots__ = ("dead", "fd", "is_established", "rest", "run", "sock")
    http2: ClassVar[bool] = False

    def __init__(self, run: Sender) -> None:
        self.run = run
        self.dead = self.is_established = False
        self.rest: memoryview | None = None
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self.sock: Any = socket.socket(run.family, kind)
        self.fd: int = self.sock.fileno()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = self.sock.connect_ex(run.place)
        if code not in (0, errno.EINPROGRESS):
            self.sock.close()
            raise OSError(code, errno.errorcode.get(code, "error"))
        run.epoll.register(self.fd, OUT)
        run.handlers[self.fd] = self._connected

    # Implemented by wires

    def connected(self) -> None:
        """The socket is connected; a wire that waits for the peer first calls :meth:`established` later."""
        self.established()

    def send(self, row: int, message: int) -> None:
        """Send one request."""
        raise AssertionError("to be implemented by a wire")

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        raise AssertionError("to be implemented by a wire")

    def lost(self, why: str) -> None:
        """The peer closed the connection."""
        raise AssertionError("to be implemented by a wire")

    def abandon(self, row: int) -> None:
        """Cancel a request in flight."""
        raise AssertionError("to be implemented by a wire")

    def written(self) -> None:
        """All of ``rest`` was written."""

    def flush(self) -> None:
        """Write the frames collected in this iteration."""

    # The socket

    def established(self) -> None:
        """The connection can be used from now on."""
        self.is_established = True
        self.run.opening -= 1
        self.run.free(self)

    def _connected(self, events: int) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._refused(errno.errorcode.get(code, str(code)))
            return
        context = self.run.tls
        if context is None:
            self._ready()
            return
        self.sock = context.wrap_socket(
            self.sock, server_hostname=self.run.host, do_handshake_on_connect=False
        )
        self.run.handlers[self.fd] = self._handshake
        self._handshake(0)

    def _handshake(self, events: int) -> None:
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.run.epoll.modify(self.fd, IN)
        except ssl.SSLWantWriteError:
            self.run.epoll.modify(self.fd, OUT)
        except OSError as error:
            self._refused(f"TLS: {getattr(error, 'reason', None) or error.strerror or error}")
        else:
            if self.http2 and self.sock.selected_alpn_protocol() != "h2":
                self._refused("TLS: the server does not offer h2")
            else:
                self._ready()

    def _refused(self, why: str) -> None:
        self.close()
        self.run.refused(why)

    def _ready(self) -> None:
        self.run.epoll.modify(self.fd, IN)
        self.run.handlers[self.fd] = self._event if self.run.tls is None else self._tls_event
        self.connected()

    def _event(self, events: int) -> None:
        if events & OUT:
            self._write_rest()
        if events & ~OUT and not self.dead:
            try:
                data = self.sock.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self.lost(errno.errorcode.get(error.errno or 0, "error"))
                return
            if data:
                self.data_received(data)
            else:
                self.lost("closed")

    def _tls_event(self, events: int) -> None:
        if events & OUT:
            self._write_rest()
        while not self.dead:
            try:
                data = self.sock.recv(READ_BYTES)
            except _LATER:
                return
            except OSError as error:
                self.lost(errno.errorcode.get(error.errno or 0, "TLS"))
                return
            if not data:
                self.lost("closed")
                return
            self.data_received(data)

    def write(self, data: bytes) -> None:
        """Write data, and keep what the socket does not accept at once. ``rest`` must be None."""
        try:
            sent = self.sock.send(data)
        except _LATER:
            sent = 0
        except OSError as error:
            self.lost(errno.errorcode.get(error.errno or 0, "error"))
            return
        if sent < len(data):
            self.keep(memoryview(data)[sent:])

    def keep(self, rest: memoryview) -> None:
        """Keep ``rest`` to be written when the socket is writable."""
        self.rest = rest
        self.run.epoll.modify(self.fd, IN | OUT)

    def _write_rest(self) -> None:
        rest = self.rest
        if rest is None:
            return
        try:
            rest = rest[self.sock.send(rest) :]
        except _LATER:
            return
        except OSError as error:
            self.lost(errno.errorcode.get(error.errno or 0, "error"))
            return
        self.rest = rest or None
        if self.rest is None:
            self.run.epoll.modify(self.fd, IN)
            self.written()

    def close(self) -> None:
        """Close the connection. The caller has ended its requests."""
        if self.dead:
            return
        self.dead = True
        self.rest = None
        del self.run.handlers[self.fd]
        self.run.epoll.unregister(self.fd)
        self.sock.close()
        self.run.total -= 1
        if not self.is_established:
            self.run.opening -= 1
