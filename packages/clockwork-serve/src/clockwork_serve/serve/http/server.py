"""The HTTP server of a gateway: accepts connections, balances them between gateways, dispatches requests."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import struct
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import Coding, OutputTensor, TooLarge, decompress, wanted_coding
from clockwork_serve.serve.accepting import BURST, Acceptor, Strangers, network_of
from clockwork_serve.serve.gateway.access import AccessControl
from clockwork_serve.serve.gateway.codec import INLINE_BYTES, Codec, CodecBusy, CodecFailed, LargeOutputs
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.requests import Copies, Copying, InferResponse
from clockwork_serve.serve.gateway.settings import SMALL_READ_BYTES, json_excess
from clockwork_serve.serve.gateway.timing import AcceptQueue
from clockwork_serve.serve.gateway.tls import Tls
from clockwork_serve.serve.http.connection import HttpConnection
from clockwork_serve.serve.http.exchange import HttpExchange, Outbox, byte_count, send_held
from clockwork_serve.serve.http.reading import RoundRobin
from clockwork_serve.serve.http.relay import PageRelay
from clockwork_serve.serve.http.responses import HttpResponse, Packer, error_response
from clockwork_serve.serve.http.routes import (
    Endpoints,
    Route,
    answer,
    find_route,
    live_page,
    no_such_path,
    resolved,
)
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# Balancing of connections between the gateways that share a port: each is passed to the one with the fewest.
#
# The kernel distributes them by a hash, without counting: of 16 connections, one of two gateways gets 10 or
# more almost every second time. Passing takes a message between two gateways, once in a connection's life.
# It does not delay a connection: one that no other gateway can receive is kept. A gateway whose loop is
# stalled is passed none: it would neither read nor reject it.


BEAT_S: Final = 0.25
STALLED_BEATS: Final = 3
"""A gateway that missed this many of our own beats gets no connections. Our own delays do not count."""
_FD: Final = struct.Struct("i")
_SINCE: Final = struct.Struct("q")


class ConnectionCounts:
    """How many connections each gateway has, in a file that all map; ``beats``: counts turns of its loop.

    Row ``i`` counts the connections that gateway ``i`` passed to each (itself included). The last two rows
    count closed connections, and beats. Every cell has one writer: ``i`` writes row ``i`` and its own cells
    of the last two rows. There is no lock: a reader may be off by one, which the next connection corrects.
    """

    def __init__(self, path: Path, gateways: int, number: int) -> None:
        """Connections of an earlier process of that number count as closed."""
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
        """The open connections of each gateway, including those just passed to it."""
        found: npt.NDArray[np.int64] = self._given.sum(axis=0) - self._ended
        return found

    def count_passed(self, to: int) -> None:
        """Count a connection of a gateway, which may be our own."""
        self._given[self._number, to] += 1

    def count_closed(self) -> None:
        """Count a closed connection of ours."""
        self._ended[self._number] += 1

    def beat(self) -> None:
        """Count a turn of our loop."""
        self.beats[self._number] += 1


class BalancerConfig(Struct, frozen=True):
    """Gateway ``number`` of ``gateways`` (from 0), which share a port; its files are ``folder/name*``."""

    folder: Path
    name: str
    gateways: int
    number: int


class ConnectionBalancer:
    """One gateway's part in balancing. All methods are for the loop's thread. Raises OSError."""

    def __init__(self, share: BalancerConfig) -> None:
        self._tally = ConnectionCounts(share.folder / f"{share.name}.tally", share.gateways, share.number)
        self._number = number = share.number
        self._on_connection: Callable[[socket.socket, int], None] = lambda accepted, _: accepted.close()
        self._paths = [str(share.folder / f"{share.name}-{other}.sock") for other in range(share.gateways)]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # noqa: FBT003 - the socket's own word
        own = Path(self._paths[number])
        own.unlink(missing_ok=True)
        self._socket.bind(str(own))
        own.chmod(0o600)
        self._loop = asyncio.get_running_loop()
        self._tally.beat()
        self._beats = self._tally.beats.copy()  # as of our last beat
        self._missed_beats = np.zeros(share.gateways, np.int64)  # by gateway, our beats since its last one
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, on_connection: Callable[[socket.socket, int], None]) -> None:
        """Have ``on_connection`` called with connections of other gateways, and since when they may wait."""
        self._on_connection = on_connection
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._beat()

    def pass_on(self, fd: int, since_ns: int = 0) -> bool:
        """Pass a connection, which may wait since ``since_ns``, to the gateway with the fewest.

        True if another gateway has it, and ours is to be closed. Else it counts as ours, until
        :meth:`count_closed`.
        """
        connections = self._tally.open()
        own = connections[self._number]
        if connections.min() < own:
            # Not ``send_fds``: it ignores the address.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))]
            for other in map(int, np.argsort(connections, kind="stable")):
                if connections[other] >= own:
                    break
                if self._is_stalled(other):
                    continue
                try:
                    self._socket.sendmsg([_SINCE.pack(since_ns)], rights, 0, self._paths[other])
                except OSError:
                    continue  # it does not run, or its socket's queue is full
                self._tally.count_passed(other)
                return True
        self._tally.count_passed(self._number)
        return False

    def count_closed(self) -> None:
        """A connection that counted as ours was closed."""
        self._tally.count_closed()

    def close(self) -> None:
        """Receive no more; connections that were passed and not received are closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        Path(self._paths[self._number]).unlink(missing_ok=True)

    def _is_stalled(self, other: int) -> bool:
        """Whether a gateway's loop is stalled. One that restarted since our last beat is not."""
        return bool(
            self._missed_beats[other] >= STALLED_BEATS and self._tally.beats[other] == self._beats[other]
        )

    def _beat(self) -> None:
        self._timer = self._loop.call_later(BEAT_S, self._beat)
        self._tally.beat()
        beats = self._tally.beats.copy()
        self._missed_beats = np.where(beats == self._beats, self._missed_beats + 1, 0)
        self._beats = beats

    def _receive(self) -> None:
        for _ in range(BURST):
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, _SINCE.size, 1)
            except (BlockingIOError, InterruptedError):
                return
            if not fds:
                self._tally.count_closed()  # no file descriptor was left, and the system closed it
            for fd in fds:
                self._on_connection(socket.socket(fileno=fd), *_SINCE.unpack(data))


class AcceptedConnection(asyncio.Protocol):
    """A connection that the loop accepted: it is passed to another gateway, or becomes ours.

    Used without TLS only: accepting a socket ourselves costs 0.1 ms more than letting the loop do it.
    """

    def __init__(
        self, balancer: ConnectionBalancer, make: Callable[[], asyncio.BaseProtocol], since_ns: int
    ) -> None:
        self._since_ns = since_ns
        self._balancer = balancer
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Pass it on, or replace this protocol by what ``make`` returns."""
        made = cast("asyncio.Transport", transport)
        if self._balancer.pass_on(made.get_extra_info("socket").fileno(), self._since_ns):
            made.abort()  # closes our descriptor only
            return
        protocol = self._make()
        made.set_protocol(protocol)
        protocol.connection_made(made)


# ------------------------------------------------------------
# Accepts TLS connections, so that handshakes are limited in number and in time.
#
# Without TLS the loop's own ``create_server`` is used.


BACKLOG: Final = 1024
SHUTDOWN_S: Final = 5.0  # how long a client may take for the TLS shutdown

_log = logging.getLogger(__name__)


class HandshakeConfig(Struct, frozen=True):
    """How a TLS acceptor makes and limits connections.

    ``admits(n, network)``: whether another handshake may begin, from there, while ``n`` are in progress; each
    must end in ``handshake_s``. They are among the ``strangers``: who is displaced is to be cancelled.
    """

    make: Callable[[], asyncio.BaseProtocol]
    admits: Callable[[int, str], bool]
    handshake_s: float
    strangers: Strangers[Any]


class TlsAcceptor:
    """One listening socket.

    With ``balancer``, connections are passed between gateways before their handshake.
    """

    def __init__(
        self, listener: socket.socket, tls: Tls, handshakes: HandshakeConfig,
        balancer: ConnectionBalancer | None = None,
    ) -> None:  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._balancer = balancer
        self._tls = tls
        self._handshakes = handshakes
        self._handshaking: set[asyncio.Task[None]] = set()
        if balancer is not None:
            # When it was accepted is not needed: no request arrives before the handshake.
            balancer.begin(lambda accepted, _since_ns: self._serve(accepted, _host_of(accepted)))
        self._acceptor = Acceptor(listener, self._accepted)

    def close(self) -> None:
        """Accept no more, and drop connections whose handshake is not complete."""
        self._acceptor.close()
        for task in self._handshaking:
            task.cancel()

    def _accepted(self, accepted: socket.socket, host: str) -> None:
        if self._balancer is not None and self._balancer.pass_on(accepted.fileno()):
            accepted.close()
        else:
            self._serve(accepted, host)

    def _serve(self, accepted: socket.socket, host: str) -> None:
        """Begin a handshake."""
        network = network_of(host)
        if not self._handshakes.admits(len(self._handshaking), network):
            accepted.close()
            self._ended()
            return
        accepted.setblocking(False)  # noqa: FBT003 - the socket's own word
        task = self._loop.create_task(self._handshake(accepted))
        self._handshaking.add(task)
        self._handshakes.strangers.add(task, network, self._loop.time())
        task.add_done_callback(partial(self._done, accepted))

    def _done(self, accepted: socket.socket, task: asyncio.Task[None]) -> None:
        self._handshaking.discard(task)
        self._handshakes.strangers.discard(task)
        if task.cancelled():  # perhaps before it began
            accepted.close()
            self._ended()

    def _ended(self) -> None:
        """A connection ended before its handshake was complete."""
        if self._balancer is not None:
            self._balancer.count_closed()

    async def _handshake(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._handshakes.make, accepted, ssl=self._tls.context,
                ssl_handshake_timeout=self._handshakes.handshake_s, ssl_shutdown_timeout=SHUTDOWN_S,
            )  # fmt: skip
        except (OSError, TimeoutError) as error:
            self._ended()
            # The client's fault: another protocol, no certificate, or nothing sent.
            _log.debug("TLS handshake failed: %s", error)


def _host_of(accepted: socket.socket) -> str:
    """The address of who connected; empty if he is gone."""
    try:
        return str(accepted.getpeername()[0])
    except OSError:
        return ""


def listening_socket(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """A listening socket. Raises OSError."""
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
# The HTTP server of a gateway: listens, keeps its connections, dispatches requests.


READ_BYTES: Final = 256 * KIB
UNPACK_BYTES: Final = KIB
"""Compressed bodies above this are decompressed in a thread: they may become a thousand times as large."""
ENDPOINT_BYTES: Final = 64 * KIB  # the largest body of a request other than inference
MIXED_JSON_BYTES: Final = MIB  # the most JSON before binary data, which is copied
_MUCH_FOR_AN_ENDPOINT: Final = (
    f"body: expected at most {ENDPOINT_BYTES} bytes here, found more; send less in it"
)
REFUSED_AT_ONCE: Final = 8
"""Connections with a refusal that are read again in one turn of the loop: two milliseconds of 600 kB each."""
GIVEN_BACK_BYTES: Final = 4 * MIB  # the memory of bodies that is given back to the system at once, in 0.4 ms
SWEEP_S: Final = 1.0  # the interval between checks of connections' time limits
QUIET_S: Final = 5.0
"""Who has asked nothing for so long makes room, where there is none, like those who have not asked yet."""
SPARE_CONNECTIONS: Final = 64
"""Clients beyond the limit that get a response; further ones are disconnected without one."""
FindRoute = Callable[[bytes], Route | None]


class HttpServer:
    """Listens, and keeps its connections. All of them read into ``buffer``, one at a time."""

    def __init__(
        self, gateway: Gateway, endpoints: Endpoints, access: AccessControl,
        find_route: FindRoute = find_route,
    ) -> None:  # fmt: skip
        self.gateway = gateway
        self.config = access.config
        self._settings = access.config.settings
        self.access = access
        self._tls = access.tls
        self.find_route = find_route
        self.loop = asyncio.get_running_loop()
        self.readers, self.refused = RoundRobin(self.loop), RoundRobin(self.loop, REFUSED_AT_ONCE)
        self.tick_s = self.loop.time()
        self.received = bytearray(READ_BYTES)
        self.buffer = memoryview(self.received)
        self.small_buffer = self.buffer[:SMALL_READ_BYTES]
        self.arriving_bytes = 0
        self.held: list[Outbox] = []
        self.held_since_ns = 0
        gateway.batch_listeners.append(lambda: send_held(self.held) if self.held else None)
        self._endpoints = endpoints
        self._relay = PageRelay(self.config.run_dir)
        self._packer = Packer()
        self.codec = Codec()
        self._writes, self._copy_outputs = self._write, self._copy  # bound once
        self._copies = Copies(self._on_copied)
        self._copied: dict[str, tuple[HttpExchange, InferResponse]] = {}  # by request, once it is
        self._connections: set[HttpConnection] = set()
        self._turned_away: set[HttpConnection] = set()  # of these: those that come to their end
        # Those who ask nothing, and handshakes: they make room for others.
        self._strangers = Strangers[HttpConnection | asyncio.Task[None]]()
        self._servers: list[asyncio.Server | TlsAcceptor] = []
        self._balancer: ConnectionBalancer | None = None
        self._reached: Counter[str] = Counter()  # by limit; since the last log line
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None

    async def listen(
        self, host: str, port: int, *, reuse_port: bool, share: BalancerConfig | None = None
    ) -> int:
        """Accept connections, balanced as in ``share``; the port (chosen if 0). Raises OSError."""
        number: int
        balancer = self._balancer = None if share is None else ConnectionBalancer(share)
        if self._tls is not None:
            listener = listening_socket(host, port, reuse_port=reuse_port)
            number = listener.getsockname()[1]
            handshakes = HandshakeConfig(
                lambda: HttpConnection(self), self._admits, self._settings.head_s, self._strangers
            )
            self._servers.append(TlsAcceptor(listener, self._tls, handshakes, balancer))
            return number

        waiting = AcceptQueue(self.gateway.turns)

        def make() -> asyncio.BaseProtocol:
            since_ns = waiting.since_ns()
            if balancer is None:
                return HttpConnection(self, since_ns)
            return AcceptedConnection(balancer, lambda: HttpConnection(self, since_ns), since_ns)

        if balancer is not None:
            balancer.begin(
                lambda accepted, since: self._start(self._handle_passed(accepted, since, balancer))
            )
        server = await self.loop.create_server(make, host, port, reuse_port=reuse_port, backlog=BACKLOG)
        self._servers.append(server)
        number = server.sockets[0].getsockname()[1]
        return number

    async def _handle_passed(
        self, accepted: socket.socket, since_ns: int, balancer: ConnectionBalancer
    ) -> None:
        """Handle a connection that another gateway accepted."""
        accepted.setblocking(False)  # noqa: FBT003 - the socket's own word
        try:
            await self.loop.connect_accepted_socket(lambda: HttpConnection(self, since_ns), accepted)
        except OSError as error:
            balancer.count_closed()
            _log.debug("a connection was lost on its way from another gateway: %s", error)

    def _admits(self, handshaking: int, network: str) -> bool:
        """Whether another handshake may begin, from there, while ``handshaking`` are in progress."""
        beyond = self._beyond() + handshaking
        if beyond < 0 or self._make_room(network) or beyond + len(self._turned_away) < SPARE_CONNECTIONS:
            return True
        self.count_disconnect("max_connections")
        return False

    def _make_room(self, network: str) -> bool:
        """Disconnect somebody who asks nothing, for somebody from that network; whether there was one."""
        displaced = self._strangers.displace(network, self.loop.time())
        if isinstance(displaced, HttpConnection):
            self._turned_away.add(displaced)
            displaced.disconnect("max_connections")
        elif displaced is not None:
            self.count_disconnect("max_connections")
            displaced.cancel()
        return displaced is not None

    async def close(self, grace_s: float) -> None:
        """Accept no more, let open requests complete for ``grace_s``, then close all connections."""
        for server in self._servers:
            server.close()
        if self._balancer is not None:
            self._balancer.close()
        end_s = self.loop.time() + grace_s
        # A short wait, once in a process's life.
        while self.loop.time() < end_s and self._busy():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for connection in tuple(self._connections):
            connection.stop()
        if self._sweep is not None:
            self._sweep.cancel()
        for task in self._tasks:
            task.cancel()
        self._copies.clear()
        self._packer.close()
        self.codec.close()

    def _busy(self) -> bool:
        return not all(connection.idle for connection in self._connections)

    def opened(self, connection: HttpConnection) -> None:
        """A connection was made."""
        admitted = self._beyond() < 0 or self._make_room(network_of(connection.host))
        self._connections.add(connection)
        if self._sweep is None:
            self.tick_s = self.loop.time()
            self._sweep = self.loop.call_later(SWEEP_S, self._end_overdue)
        self.gateway.connections += 1
        if admitted:
            self._quiet(connection)
            return
        self._turned_away.add(connection)
        if len(self._turned_away) > SPARE_CONNECTIONS:
            connection.disconnect("max_connections")
        else:
            connection.reject_over_limit("max_connections")

    def _beyond(self) -> int:
        """How many connections more there are than there may be; negative if there is room."""
        return len(self._connections) - len(self._turned_away) - self._settings.max_connections

    def _quiet(self, connection: HttpConnection) -> None:
        connection.quiet = True
        self._strangers.add(connection, network_of(connection.host), self.loop.time())

    def asked(self, connection: HttpConnection) -> None:
        """A connection that was quiet has a request."""
        connection.quiet = False
        self._strangers.discard(connection)

    def count_disconnect(self, limit: str) -> None:
        """A client was disconnected by that limit; counted for the log."""
        self._reached[limit] += 1

    def closed(self, connection: HttpConnection) -> None:
        """A connection was closed."""
        self._connections.discard(connection)
        self._turned_away.discard(connection)
        self._strangers.discard(connection)
        self.gateway.connections -= 1
        if self._balancer is not None:
            self._balancer.count_closed()

    def body_buffer(self, exchange: HttpExchange, length: int) -> memoryview:
        """The buffer for a large body: in the region if its tensors can be used in place."""
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
        return self.room(length)

    def room(self, nbytes: int) -> memoryview:
        """Memory that is taken as it is written to, and given back in pieces once nobody refers to it.

        At once, 56 MiB take 5 ms. NumPy would ask for large pages, each of which takes as long when it is
        written to first.
        """
        if nbytes <= GIVEN_BACK_BYTES:
            return np.empty(nbytes, np.uint8).data
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = np.frombuffer(memory, np.uint8)
        weakref.finalize(view, self._give_back_soon, memory).atexit = False
        return view.data

    def _give_back_soon(self, memory: mmap.mmap) -> None:
        """In whichever thread had the last reference."""
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._give_back, memory, 0)

    def _give_back(self, memory: mmap.mmap, at: int) -> None:
        memory.madvise(mmap.MADV_DONTNEED, at, min(GIVEN_BACK_BYTES, len(memory) - at))
        at += GIVEN_BACK_BYTES
        if at < len(memory):
            self.readers.add(partial(self._give_back, memory, at))

    def query_admission(self, exchange: HttpExchange, arrived_ns: Callable[[], int]) -> None:
        """Send an admission query for an inference request whose head says its SLO.

        Its arrival is that of its head.
        """
        route = exchange.route
        if (
            route is not None
            and route.endpoint is None
            and exchange.method == route.method
            and exchange.slo_header
        ):
            exchange.arrival_ns = arrived_ns()
            queries = self.gateway.admission_queries
            exchange.query_id = queries.start(exchange, self.gateway.link)
            exchange.body_deferred = queries.rejecting and bool(exchange.query_id)

    def dispatch(self, exchange: HttpExchange) -> None:
        """Handle a complete request."""
        if exchange.encoding and exchange.encoding.lower() != b"identity":
            if len(exchange.content) > UNPACK_BYTES:
                self._start(self._unpacked_soon(exchange))
                return
            if not self._unpack(exchange):
                return
        route, method, size = exchange.route, exchange.method, len(exchange.content)
        much = json_excess(self._settings, exchange.json_bytes) if size > self._settings.max_json else ""
        if route is None:
            exchange.respond(no_such_path(exchange.target, metrics_port=self.find_route is not find_route))
        elif method != route.method and not route.takes(method):
            exchange.respond(error_response(405, "Method Not Allowed", b"Allow: %s\r\n" % route.method))
        elif much:
            self.gateway.drop_body(exchange)
            exchange.end(self.gateway.unreadable(exchange, TooLarge(much)))
        elif route.endpoint is None:
            if exchange.accepted and (coding := wanted_coding(exchange.accepted.decode("latin-1"))):
                exchange.pack = partial(self._pack, coding)
            exchange.write, exchange.copy = self._writes, self._copy_outputs
            if size > INLINE_BYTES:
                self._infer_large(exchange)
            else:
                exchange.request_id = self.gateway.infer(exchange)
        elif size > ENDPOINT_BYTES:
            exchange.respond(error_response(413, _MUCH_FOR_AN_ENDPOINT))
        elif route.endpoint is live_page and self._settings.live_page:
            whose = exchange.identity if exchange.narrow else None
            self._start(self._relay.answer(exchange, route.target, whose))
        else:
            found = answer(self._endpoints, route, bytes(exchange.content), local=exchange.local)
            if isinstance(found, HttpResponse):
                exchange.respond(found)
            else:
                self._start(self._respond_soon(exchange, found))

    def _infer_large(self, exchange: HttpExchange) -> None:
        if exchange.json_bytes > INLINE_BYTES:
            length = exchange.header_length
            at = None if length is None else byte_count(length)
            # An invalid length, or 0, is handled where the request is parsed.
            if length is None or at:
                self._start(self._read_soon(exchange, at))
                return
        exchange.request_id = self.gateway.infer(exchange)

    async def _read_soon(self, exchange: HttpExchange, length: int | None) -> None:
        """Have the codec process parse large JSON, if the model can need as much; then go on as usual."""
        try:
            served = self.gateway.models.find(exchange.model, exchange.version)
            served.check_json(exchange.json_bytes)
            text: Buffer = exchange.content
            if length is not None and length < len(text):
                if length > MIXED_JSON_BYTES:
                    raise TooLarge(
                        f"JSON: expected at most {MIXED_JSON_BYTES} bytes before binary data, found {length}"
                    )
                # Copied, for the region may be abandoned meanwhile.
                text = bytes(text[:length])
            exchange.read = await self.codec.read(
                text, exchange.content, length, served.tensors_max, lambda: not exchange.abandoned
            )
        except InvalidRequest as error:
            exchange.read = error.with_traceback(None)
        except (CodecBusy, CodecFailed) as error:
            if not exchange.abandoned:
                self.gateway.refuse_unread(exchange, str(error), busy=isinstance(error, CodecBusy))
                return
        if exchange.abandoned:
            self.gateway.drop_body(exchange)
        else:
            exchange.request_id = self.gateway.infer(exchange)

    def _write(self, exchange: HttpExchange, large: LargeOutputs) -> None:
        self._start(self._write_soon(exchange, large))

    async def _write_soon(self, exchange: HttpExchange, large: LargeOutputs) -> None:
        try:
            response = await large.response(self.codec, lambda: not exchange.abandoned)
        except (InvalidRequest, CodecFailed) as error:
            # The controller has counted it as answered.
            self.gateway.discard(large.original)
            exchange.respond(error_response(500, f"the answer could not be written: {error}"))
            return
        if exchange.abandoned:
            self.gateway.discard(response)
        else:
            exchange.end(response, written=True)

    def _copy(self, exchange: HttpExchange, response: InferResponse) -> None:
        """Copy outputs that are wanted out of their slot, a piece in a turn of the loop, and end it then."""
        assert response.keep is not None
        assert response.served is not None
        assert response.call is not None
        wanted = {wish.name for wish in response.served.wanted(response.call)}
        copying, copies = Copying(), []
        for tensor in response.outputs:
            if tensor.name in wanted:
                data = self.room(len(tensor.data))
                copying.add(data, memoryview(tensor.data))
                copies.append(OutputTensor(tensor.name, tensor.datatype, tensor.shape, data))
        copying.release = response.keep()
        response.outputs, response.own, response.keep = copies, True, None
        self._copied[response.request_id] = exchange, response
        self._copies.begin(response.request_id, copying)

    def _on_copied(self, request_id: str) -> None:
        exchange, response = self._copied.pop(request_id)
        if exchange.abandoned:
            self.gateway.discard(response)
        else:
            exchange.end(response)

    async def _respond_soon(self, exchange: HttpExchange, found: Awaitable[HttpResponse]) -> None:
        exchange.respond(await resolved(found))

    def _pack(self, coding: Coding, exchange: HttpExchange, response: HttpResponse) -> None:
        found = self._packer.pack(response, coding)
        if isinstance(found, HttpResponse):
            exchange.respond(found)
        else:
            self._start(self._respond_soon(exchange, found))

    def _unpack(self, exchange: HttpExchange) -> bool:
        try:
            exchange.content = memoryview(self._unpacked(exchange))
        except InvalidRequest as error:
            exchange.end(self.gateway.unreadable(exchange, error))
            return False
        return True

    async def _unpacked_soon(self, exchange: HttpExchange) -> None:
        try:
            found = await asyncio.to_thread(self._unpacked, exchange)
        except InvalidRequest as error:
            exchange.end(self.gateway.unreadable(exchange, error))
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
            # Their time limits were set by a tick up to this old: none is disconnected too early.
            connection.check(self.tick_s - SWEEP_S)
            if connection.is_quiet_since(self.tick_s - QUIET_S):
                self._quiet(connection)
        if self._reached:
            counts = ", ".join(f"{limit} {count}" for limit, count in sorted(self._reached.items()))
            _log.warning("clients disconnected, by the setting that they reached: %s", counts)
            self._reached.clear()
        if self._connections:
            self._sweep = self.loop.call_later(SWEEP_S, self._end_overdue)
