"""The HTTP server of a gateway: accepts connections, spreads them over gateways, has requests answered."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import Coding, TooLarge, decompress, wanted_coding
from clockwork_serve.serve.gateway.access import Door
from clockwork_serve.serve.gateway.codec import INLINE_BYTES, Codec, CodecFailed, Crowded, Heavy
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.settings import SMALL_READ_BYTES, json_excess
from clockwork_serve.serve.gateway.timing import AcceptQueue
from clockwork_serve.serve.gateway.tls import Tls
from clockwork_serve.serve.http.connection import HttpConnection, RoundRobin
from clockwork_serve.serve.http.exchange import HttpExchange, Outbox, byte_count, send_held
from clockwork_serve.serve.http.responses import Packer, Response, error_response
from clockwork_serve.serve.http.routes import Endpoints, Route, answer, find_route, settled
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# Connections spread evenly over the gateways that share a port: who accepts one passes it to who has fewest.
#
# The kernel spreads them by a hash, which knows no numbers: of 16 connections, one of two gateways gets 10 or
# more almost every second time. (benchmarks.gateway_balance --gateways 2 --connections 16 --turns 0, twice 20
# trials: 8 and 8 each time; without this 10 in the median, 12 at worst.) Passing takes a message between two
# gateways, once in a connection's life. It never holds a connection up: one that nobody else takes is kept.
# A gateway whose loop does not turn, as one that is stopped, is passed none: it would neither read it nor
# refuse it.


BURST: Final = 64
"""Most connections that are taken over before the loop may do other things."""
BEAT_S: Final = 0.25
STILL: Final = 3
"""A gateway that has not beaten by so many of our own beats gets none: nobody is slow because we were."""
_FD: Final = struct.Struct("i")
_SINCE: Final = struct.Struct("q")


class ConnectionCounts:
    """How many connections each gateway has, in a file that all map; ``beats``: how its loop turns.

    Row ``i`` counts the connections that gateway ``i`` gave to each (itself included), the last two rows
    those that have ended, and beats. Every cell has one writer: ``i`` writes row ``i`` and its own cells of
    the last two. Nothing is locked: who reads in the middle is wrong by one, and the next connection sets it
    right.
    """

    def __init__(self, path: Path, gateways: int, number: int) -> None:
        """What an earlier process of that number had has ended with it."""
        size = (gateways + 2) * gateways * 8
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        cells = np.frombuffer(self._memory, np.int64).reshape(gateways + 2, gateways)
        self._given: npt.NDArray[np.int64] = cells[:gateways]
        self._ended: npt.NDArray[np.int64] = cells[gateways]
        self.beats: npt.NDArray[np.int64] = cells[gateways + 1]
        self._number = number
        self._ended[number] = self._given[:, number].sum()

    def open(self) -> npt.NDArray[np.int64]:
        """By gateway, how many it has or is about to be given."""
        found: npt.NDArray[np.int64] = self._given.sum(axis=0) - self._ended
        return found

    def gave(self, to: int) -> None:
        """One more is that gateway's; it may be our own."""
        self._given[self._number, to] += 1

    def ended(self) -> None:
        """One of ours is gone."""
        self._ended[self._number] += 1

    def beat(self) -> None:
        """Our loop turned once more."""
        self.beats[self._number] += 1


class Share(Struct, frozen=True):
    """Gateway ``number`` of ``gateways`` (from 0), which meet in ``folder`` under a port's ``name``."""

    folder: Path
    name: str
    gateways: int
    number: int


class Sharing:
    """One gateway's part in it. All methods are for the loop's own thread. Raises OSError."""

    def __init__(self, share: Share) -> None:
        self._tally = ConnectionCounts(share.folder / f"{share.name}.tally", share.gateways, share.number)
        self._number = number = share.number
        self._take: Callable[[socket.socket, int], None] = lambda accepted, _: accepted.close()
        self._paths = [str(share.folder / f"{share.name}-{other}.sock") for other in range(share.gateways)]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # noqa: FBT003 - the socket's own word
        own = Path(self._paths[number])
        own.unlink(missing_ok=True)
        self._socket.bind(str(own))
        own.chmod(0o600)
        self._loop = asyncio.get_running_loop()
        self._tally.beat()
        self._beats = self._tally.beats.copy()  # as we saw them when we beat last
        self._still = np.zeros(share.gateways, np.int64)  # by gateway, our beats since its last one
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, take: Callable[[socket.socket, int], None]) -> None:
        """Have ``take`` called with connections of other gateways, and since when they may wait."""
        self._take = take
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._beat()

    def passed_on(self, fd: int, since_ns: int = 0) -> bool:
        """Whether another gateway has that connection now, and ours can be closed. It may wait since then.

        Else it counts as ours, until :meth:`ended`.
        """
        connections = self._tally.open()
        own = connections[self._number]
        if connections.min() < own:
            # Not ``send_fds``: it ignores the address.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))]
            for other in map(int, np.argsort(connections, kind="stable")):
                if connections[other] >= own:
                    break
                if self._stands_still(other):
                    continue
                try:
                    self._socket.sendmsg([_SINCE.pack(since_ns)], rights, 0, self._paths[other])
                except OSError:
                    continue  # it is not there, or has not taken in what it was given before
                self._tally.gave(other)
                return True
        self._tally.gave(self._number)
        return False

    def ended(self) -> None:
        """A connection that counted as ours is gone."""
        self._tally.ended()

    def close(self) -> None:
        """Take no more; what was given and not taken is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        Path(self._paths[self._number]).unlink(missing_ok=True)

    def _stands_still(self, other: int) -> bool:
        """Whether a gateway's loop does not turn. One that was started again since our last beat does."""
        return bool(self._still[other] >= STILL and self._tally.beats[other] == self._beats[other])

    def _beat(self) -> None:
        self._timer = self._loop.call_later(BEAT_S, self._beat)
        self._tally.beat()
        beats = self._tally.beats.copy()
        self._still = np.where(beats == self._beats, self._still + 1, 0)
        self._beats = beats

    def _receive(self) -> None:
        for _ in range(BURST):
            try:
                told, fds, _, _ = socket.recv_fds(self._socket, _SINCE.size, 1)
            except (BlockingIOError, InterruptedError):
                return
            if not fds:
                self._tally.ended()  # the system had no more files for us, and closed it
            for fd in fds:
                self._take(socket.socket(fileno=fd), *_SINCE.unpack(told))


class Newcomer(asyncio.Protocol):
    """A connection that the loop accepted: it goes to another gateway before it is read, or becomes ours.

    So it is where nothing is encrypted, for a socket that we accept ourselves costs 0.1 ms more than one that
    the loop accepts.
    """

    def __init__(self, sharing: Sharing, make: Callable[[], asyncio.BaseProtocol], since_ns: int) -> None:
        self._since_ns = since_ns
        self._sharing = sharing
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Pass it on, or have what ``make`` gives take it from here."""
        made = cast("asyncio.Transport", transport)
        if self._sharing.passed_on(made.get_extra_info("socket").fileno(), self._since_ns):
            made.abort()  # it lives on where it went
            return
        protocol = self._make()
        made.set_protocol(protocol)
        protocol.connection_made(made)


# ------------------------------------------------------------
# Accepts TLS connections, so that those whose handshake is not done are counted and end in time.
#
# It reads nothing; the loop's own ``create_server`` does all this where nothing is encrypted.


BACKLOG: Final = 1024
SHUTDOWN_S: Final = 5.0
"""How long a client may take to say farewell."""
_FULL_S: Final = 0.5
"""When to try again if the system has no more files for us."""

_log = logging.getLogger(__name__)


class Admission(Struct, frozen=True):
    """``admits(n)``: whether one more may come while ``n`` shake hands, which must end in ``handshake_s``."""

    make: Callable[[], asyncio.BaseProtocol]
    admits: Callable[[int], bool]
    handshake_s: float


class TlsAcceptor:
    """One listening socket. With ``sharing``, connections are passed on and taken over before they greet."""

    def __init__(
        self, listener: socket.socket, tls: Tls, admission: Admission, sharing: Sharing | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sharing = sharing
        self._listener = listener
        self._tls = tls
        self._admission = admission
        self._greeting: set[asyncio.Task[None]] = set()
        if sharing is not None:
            sharing.begin(self._take)
        listener.setblocking(False)  # noqa: FBT003 - the socket's own word
        self._loop.add_reader(listener.fileno(), self._accept)
        self._again: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Accept no more, and drop who is not in yet."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for task in self._greeting:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(BURST):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("accepting a connection failed: %s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._again = self._loop.call_later(_FULL_S, self._resume)
                return
            if self._sharing is not None and self._sharing.passed_on(accepted.fileno()):
                accepted.close()
            else:
                self._take(accepted)

    def _take(self, accepted: socket.socket, _since_ns: int = 0) -> None:
        """Serve a connection, whoever accepted it: nobody asks for anything before he was greeted."""
        if not self._admission.admits(len(self._greeting)):
            accepted.close()
            self._ended()
            return
        accepted.setblocking(False)  # noqa: FBT003 - the socket's own word
        task = self._loop.create_task(self._greet(accepted))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    def _ended(self) -> None:
        """One ended that never became a connection of the server's."""
        if self._sharing is not None:
            self._sharing.ended()

    def _resume(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    async def _greet(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._admission.make,
                accepted,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._admission.handshake_s,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except (OSError, TimeoutError) as error:
            self._ended()
            # Not ours to mend: another protocol, no certificate, or nothing at all.
            _log.debug("TLS handshake failed: %s", error)


def listening_socket(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """Where to accept. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


# ------------------------------------------------------------
# The HTTP server of a gateway: listens, keeps its connections, has requests answered. It decides nothing.


READ_BYTES: Final = 256 * KIB
UNPACK_BYTES: Final = KIB
"""Compressed bodies above this are unpacked in a thread: they become up to a thousand times as large."""
ENDPOINT_BYTES: Final = 64 * KIB
"""Of a body that asks for no inference."""
MIXED_JSON_BYTES: Final = MIB
"""Of JSON before binary data, which is copied."""
_MUCH_FOR_AN_ENDPOINT: Final = (
    f"body: expected at most {ENDPOINT_BYTES} bytes here, found more; send less in it"
)
SWEEP_S: Final = 1.0
"""How often deadlines are looked at."""
SPARE_CONNECTIONS: Final = 64
"""Clients beyond the limit who are told so at one time; more are cut off without a word."""
FindRoute = Callable[[bytes], Route | None]


class HttpServer:
    """Listens, and keeps its connections. ``buffer`` is where all of them read: no two at a time."""

    def __init__(
        self, gateway: Gateway, endpoints: Endpoints, door: Door, find_route: FindRoute = find_route
    ) -> None:
        self.gateway = gateway
        self.config = door.config
        self._settings = door.config.settings
        self.keys = door.keys
        self._tls = door.tls
        self.find_route = find_route
        self.loop = asyncio.get_running_loop()
        self.readers = RoundRobin(self.loop)
        self.tick_s = self.loop.time()
        self.received = bytearray(READ_BYTES)
        self.buffer = memoryview(self.received)
        self.small_buffer = self.buffer[:SMALL_READ_BYTES]
        self.arriving_bytes = 0
        self.held: list[Outbox] = []
        self.held_since_ns = 0
        gateway.batch_listeners.append(lambda: send_held(self.held) if self.held else None)
        self._endpoints = endpoints
        self._packer = Packer()
        self.codec = Codec()
        self._writes = self._write  # bound once
        self._connections: set[HttpConnection] = set()
        self._servers: list[asyncio.Server | TlsAcceptor] = []
        self._sharing: Sharing | None = None
        self._reached: Counter[str] = Counter()  # limits, since they were last told
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int, *, reuse_port: bool, share: Share | None = None) -> int:
        """Accept connections, evenly with those of ``share``; the port (chosen if 0). Raises OSError."""
        number: int
        sharing = self._sharing = None if share is None else Sharing(share)
        if self._tls is not None:
            listener = listening_socket(host, port, reuse_port=reuse_port)
            number = listener.getsockname()[1]
            admission = Admission(lambda: HttpConnection(self), self._admits, self._settings.head_s)
            self._servers.append(TlsAcceptor(listener, self._tls, admission, sharing))
            return number

        waiting = AcceptQueue(self.gateway.turns)

        def make() -> asyncio.BaseProtocol:
            since_ns = waiting.since_ns()
            if sharing is None:
                return HttpConnection(self, since_ns)
            return Newcomer(sharing, lambda: HttpConnection(self, since_ns), since_ns)

        if sharing is not None:
            sharing.begin(lambda accepted, since: self._start(self._take_over(accepted, since, sharing)))
        server = await self.loop.create_server(make, host, port, reuse_port=reuse_port, backlog=BACKLOG)
        self._servers.append(server)
        number = server.sockets[0].getsockname()[1]
        return number

    async def _take_over(self, accepted: socket.socket, since_ns: int, sharing: Sharing) -> None:
        """Serve a connection that another gateway accepted."""
        accepted.setblocking(False)  # noqa: FBT003 - the socket's own word
        try:
            await self.loop.connect_accepted_socket(lambda: HttpConnection(self, since_ns), accepted)
        except OSError as error:
            sharing.ended()
            _log.debug("a connection came to nothing on its way from another gateway: %s", error)

    def _admits(self, greeting: int) -> bool:
        """Whether one more may shake hands while ``greeting`` do."""
        if len(self._connections) + greeting < self._settings.max_connections + SPARE_CONNECTIONS:
            return True
        self.reached("max_connections")
        return False

    async def close(self, patience_s: float) -> None:
        """Accept no more, let open requests end for a while, then close all connections."""
        for server in self._servers:
            server.close()
        if self._sharing is not None:
            self._sharing.close()
        end_s = self.loop.time() + patience_s
        # For a moment, once in a process's life.
        while self.loop.time() < end_s and self._busy():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for connection in tuple(self._connections):
            connection.stop()
        if self._sweep is not None:
            self._sweep.cancel()
        for task in self._tasks:
            task.cancel()
        self._packer.close()
        self.codec.close()

    def _busy(self) -> bool:
        return not all(connection.idle for connection in self._connections)

    def opened(self, connection: HttpConnection) -> None:
        """A connection was made."""
        self._connections.add(connection)
        self.gateway.connections += 1
        if self._sweep is None:
            self.tick_s = self.loop.time()
            self._sweep = self.loop.call_later(SWEEP_S, self._end_overdue)
        beyond = len(self._connections) - self._settings.max_connections
        if beyond > SPARE_CONNECTIONS:
            connection.cut("max_connections")
        elif beyond > 0:
            connection.turn_away("max_connections")

    def reached(self, limit: str) -> None:
        """A client was cut off by that limit; to be told in the log."""
        self._reached[limit] += 1

    def closed(self, connection: HttpConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self.gateway.connections -= 1
        if self._sharing is not None:
            self._sharing.ended()

    def room(self, exchange: HttpExchange, length: int) -> memoryview:
        """Where to receive a large body: in the region if it is going to be there anyway."""
        route = exchange.route
        if (
            route is not None
            and route.endpoint is None
            and exchange.method == route.method
            and not exchange.encoding
        ):
            at = None if exchange.header_length is None else byte_count(exchange.header_length)
            if at is not None and at < length:
                exchange.body = self.gateway.slots.body(length, at)
                if exchange.body is not None:
                    return exchange.body.view
        # Unlike a bytearray, it takes no memory before something arrives.
        return np.empty(length, np.uint8).data

    def announce(self, exchange: HttpExchange, arrived_ns: Callable[[], int]) -> None:
        """Ask whether an inference request is worth its body.

        It has arrived with its head, which says how long it may take.
        """
        route = exchange.route
        if (
            route is not None
            and route.endpoint is None
            and exchange.method == route.method
            and exchange.slo_header
        ):
            exchange.arrival_ns = arrived_ns()
            announcements = self.gateway.announcements
            exchange.announced_id = announcements.make(exchange, self.gateway.link)
            exchange.held = announcements.refusing and bool(exchange.announced_id)

    def dispatch(self, exchange: HttpExchange) -> None:
        """Have a request that is complete answered."""
        if exchange.encoding and exchange.encoding.lower() != b"identity":
            if len(exchange.content) > UNPACK_BYTES:
                self._start(self._unpacked_soon(exchange))
                return
            if not self._unpack(exchange):
                return
        route, method, size = exchange.route, exchange.method, len(exchange.content)
        much = json_excess(self._settings, exchange.json_bytes) if size > self._settings.max_json else ""
        if route is None:
            exchange.respond(error_response(404, "Not Found"))
        elif method != route.method and not route.takes(method):
            exchange.respond(error_response(405, "Method Not Allowed", b"Allow: %s\r\n" % route.method))
        elif much:
            self.gateway.drop_body(exchange)
            exchange.end(self.gateway.unreadable(TooLarge(much)))
        elif route.endpoint is None:
            if exchange.accepted and (coding := wanted_coding(exchange.accepted.decode("latin-1"))):
                exchange.pack = partial(self._pack, coding)
            exchange.write = self._writes
            if size > INLINE_BYTES:
                self._infer_large(exchange)
            else:
                exchange.request_id = self.gateway.infer(exchange)
        elif size > ENDPOINT_BYTES:
            exchange.respond(error_response(413, _MUCH_FOR_AN_ENDPOINT))
        else:
            found = answer(self._endpoints, route, bytes(exchange.content), local=exchange.local)
            if isinstance(found, Response):
                exchange.respond(found)
            else:
                self._start(self._respond_soon(exchange, found))

    def _infer_large(self, exchange: HttpExchange) -> None:
        if exchange.json_bytes > INLINE_BYTES:
            length = exchange.header_length
            at = None if length is None else byte_count(length)
            # A length that is none, or 0, is for others to find.
            if length is None or at:
                self._start(self._read_soon(exchange, at))
                return
        exchange.request_id = self.gateway.infer(exchange)

    async def _read_soon(self, exchange: HttpExchange, length: int | None) -> None:
        """Have much JSON read by another process, if the model can need so much; then go on as usual."""
        try:
            served = self.gateway.models.find(exchange.model, exchange.version)
            served.check_json(exchange.json_bytes)
            text: Buffer = exchange.content
            if length is not None and length < len(text):
                if length > MIXED_JSON_BYTES:
                    raise TooLarge(
                        f"JSON: expected at most {MIXED_JSON_BYTES} bytes before binary data, found {length}"
                    )
                # The region may go while that is read.
                text = bytes(text[:length])
            exchange.read = await self.codec.read(
                text, exchange.content, length, served.tensors_max, lambda: not exchange.abandoned
            )
        except InvalidRequest as error:
            exchange.read = error.with_traceback(None)
        except (Crowded, CodecFailed) as error:
            if not exchange.abandoned:
                crowded = isinstance(error, Crowded)
                self.gateway.refuse_unread(exchange, str(error), crowded=crowded)
                return
        if exchange.abandoned:
            self.gateway.drop_body(exchange)
        else:
            exchange.request_id = self.gateway.infer(exchange)

    def _write(self, exchange: HttpExchange, heavy: Heavy) -> None:
        self._start(self._write_soon(exchange, heavy))

    async def _write_soon(self, exchange: HttpExchange, heavy: Heavy) -> None:
        try:
            ending = await heavy.ending(self.codec, lambda: not exchange.abandoned)
        except (InvalidRequest, CodecFailed) as error:
            # The controller has counted it as answered.
            self.gateway.undelivered(heavy.original)
            exchange.respond(error_response(500, f"the answer could not be written: {error}"))
            return
        if exchange.abandoned:
            self.gateway.undelivered(ending)
        else:
            exchange.end(ending, written=True)

    async def _respond_soon(self, exchange: HttpExchange, found: Awaitable[Response]) -> None:
        exchange.respond(await settled(found))

    def _pack(self, coding: Coding, exchange: HttpExchange, response: Response) -> None:
        found = self._packer.pack(response, coding)
        if isinstance(found, Response):
            exchange.respond(found)
        else:
            self._start(self._respond_soon(exchange, found))

    def _unpack(self, exchange: HttpExchange) -> bool:
        try:
            exchange.content = memoryview(self._unpacked(exchange))
        except InvalidRequest as error:
            exchange.end(self.gateway.unreadable(error))
            return False
        return True

    async def _unpacked_soon(self, exchange: HttpExchange) -> None:
        try:
            found = await asyncio.to_thread(self._unpacked, exchange)
        except InvalidRequest as error:
            exchange.end(self.gateway.unreadable(error))
            return
        exchange.content, exchange.encoding = memoryview(found), b""
        if not exchange.abandoned:
            self.dispatch(exchange)

    def _unpacked(self, exchange: HttpExchange) -> bytearray:
        return decompress(exchange.content, exchange.encoding.decode("latin-1"), self._settings.max_body)

    def _start(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.loop.call_exception_handler({"message": "answering a request failed", "exception": error})

    def _end_overdue(self) -> None:
        self._sweep = None
        self.tick_s = self.loop.time()
        for connection in tuple(self._connections):
            # What a connection set its deadline by was as old as that: none is cut off before its time.
            connection.check(self.tick_s - SWEEP_S)
        if self._reached:
            told = ", ".join(f"{limit} {count}" for limit, count in sorted(self._reached.items()))
            _log.warning("clients cut off, by the setting that they reached: %s", told)
            self._reached.clear()
        if self._connections:
            self._sweep = self.loop.call_later(SWEEP_S, self._end_overdue)
