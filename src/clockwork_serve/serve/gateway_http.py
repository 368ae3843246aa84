"""The HTTP server of a gateway: listens, keeps its connections, has requests answered. It decides nothing."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import numpy as np

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import Coding, TooLarge, decompress, wanted_coding
from clockwork_serve.oip.records import Buffer
from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_acceptor import BACKLOG, Admission, TlsAcceptor, listening_socket
from clockwork_serve.serve.gateway_arrivals import AcceptQueue
from clockwork_serve.serve.gateway_codec import INLINE_BYTES, Codec, CodecFailed, Crowded
from clockwork_serve.serve.gateway_connection import HttpConnection
from clockwork_serve.serve.gateway_door import Door
from clockwork_serve.serve.gateway_endpoints import Endpoints
from clockwork_serve.serve.gateway_exchange import Exchange, byte_count
from clockwork_serve.serve.gateway_intake import RoundRobin
from clockwork_serve.serve.gateway_limits import SETTING, SMALL_READ_BYTES, json_excess
from clockwork_serve.serve.gateway_outbox import Outbox, send_held
from clockwork_serve.serve.gateway_outputs import Heavy
from clockwork_serve.serve.gateway_packing import Packer
from clockwork_serve.serve.gateway_responses import Response, error_response
from clockwork_serve.serve.gateway_routes import Route, answer, find_route, settled
from clockwork_serve.serve.gateway_sharing import Newcomer, Share, Sharing
from clockwork_serve.units import KIB, MIB

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

_log = logging.getLogger(__name__)


class HttpServer:
    """Listens, and keeps its connections. ``buffer`` is where all of them read: no two at a time."""

    def __init__(
        self, gateway: Gateway, endpoints: Endpoints, door: Door, find_route: FindRoute = find_route
    ) -> None:
        self.gateway = gateway
        self.limits = door.limits
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
        self.held_ns = 0
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
            admission = Admission(lambda: HttpConnection(self), self._admits, self.limits.header_s)
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
        if len(self._connections) + greeting < self.limits.connections + SPARE_CONNECTIONS:
            return True
        self.reached("connections")
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
        beyond = len(self._connections) - self.limits.connections
        if beyond > SPARE_CONNECTIONS:
            connection.cut("connections")
        elif beyond > 0:
            connection.turn_away("connections")

    def reached(self, limit: str) -> None:
        """A client was cut off by that limit; to be told in the log."""
        self._reached[limit] += 1

    def closed(self, connection: HttpConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self.gateway.connections -= 1
        if self._sharing is not None:
            self._sharing.ended()

    def room(self, exchange: Exchange, length: int) -> memoryview:
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

    def announce(self, exchange: Exchange, arrived_ns: Callable[[], int]) -> None:
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

    def dispatch(self, exchange: Exchange) -> None:
        """Have a request that is complete answered."""
        if exchange.encoding and exchange.encoding.lower() != b"identity":
            if len(exchange.content) > UNPACK_BYTES:
                self._start(self._unpacked_soon(exchange))
                return
            if not self._unpack(exchange):
                return
        route, method, size = exchange.route, exchange.method, len(exchange.content)
        much = json_excess(self.limits, exchange.json_bytes) if size > self.limits.json_bytes else ""
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

    def _infer_large(self, exchange: Exchange) -> None:
        if exchange.json_bytes > INLINE_BYTES:
            length = exchange.header_length
            at = None if length is None else byte_count(length)
            # A length that is none, or 0, is for others to find.
            if length is None or at:
                self._start(self._read_soon(exchange, at))
                return
        exchange.request_id = self.gateway.infer(exchange)

    async def _read_soon(self, exchange: Exchange, length: int | None) -> None:
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

    def _write(self, exchange: Exchange, heavy: Heavy) -> None:
        self._start(self._write_soon(exchange, heavy))

    async def _write_soon(self, exchange: Exchange, heavy: Heavy) -> None:
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

    async def _respond_soon(self, exchange: Exchange, found: Awaitable[Response]) -> None:
        exchange.respond(await settled(found))

    def _pack(self, coding: Coding, exchange: Exchange, response: Response) -> None:
        found = self._packer.pack(response, coding)
        if isinstance(found, Response):
            exchange.respond(found)
        else:
            self._start(self._respond_soon(exchange, found))

    def _unpack(self, exchange: Exchange) -> bool:
        try:
            exchange.content = memoryview(self._unpacked(exchange))
        except InvalidRequest as error:
            exchange.end(self.gateway.unreadable(error))
            return False
        return True

    async def _unpacked_soon(self, exchange: Exchange) -> None:
        try:
            found = await asyncio.to_thread(self._unpacked, exchange)
        except InvalidRequest as error:
            exchange.end(self.gateway.unreadable(error))
            return
        exchange.content, exchange.encoding = memoryview(found), b""
        if not exchange.abandoned:
            self.dispatch(exchange)

    def _unpacked(self, exchange: Exchange) -> bytearray:
        return decompress(exchange.content, exchange.encoding.decode("latin-1"), self.limits.body_bytes)

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
            told = ", ".join(f"{SETTING[limit]} {count}" for limit, count in sorted(self._reached.items()))
            _log.warning("clients cut off, by the setting that they reached: %s", told)
            self._reached.clear()
        if self._connections:
            self._sweep = self.loop.call_later(SWEEP_S, self._end_overdue)
