"""One connection of the blocking client: a request, then its response, in time. It retries nothing."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

from clockwork_serve.client.wire import Address, Response, ResponseReader
from clockwork_serve.oip.records import Buffer

if TYPE_CHECKING:
    import ssl


def is_stale(fd: int) -> bool:
    """Whether an idle connection has something to read: its end, or what nobody asked for."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Connection:
    """All instants are of ``time.monotonic``. Raises OSError; TimeoutError where it was not in time."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, until: float) -> None:
        self._socket = socket.create_connection((address.host, address.port), _left(until))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=address.host)
        except BaseException:
            self.close()
            raise
        self._reader = ResponseReader()
        self.idle_since = 0.0

    @property
    def stale(self) -> bool:
        """Whether the server closed it while it was idle."""
        return is_stale(self._socket.fileno())

    def exchange(self, message: tuple[Buffer, ...], until: float) -> Response:
        """Send a request; its response."""
        broken: OSError | None = None
        self._reader.expect()
        try:
            for part in message:
                self._socket.settimeout(_left(until))
                self._socket.sendall(part)
        except TimeoutError:
            raise
        except OSError as error:
            # A server that refuses a large body answers before it has read all of it.
            broken = error
        try:
            response = self._receive(until)
        except OSError as error:
            raise broken or error from None
        return response if broken is None else response._replace(keep_alive=False)

    def _receive(self, until: float) -> Response:
        while True:
            self._socket.settimeout(_left(until))
            received = self._socket.recv_into(self._reader.get_buffer())
            if not received:
                raise ConnectionResetError("the server closed it")
            response = self._reader.received(received)
            if response is not None:
                return response

    def shut(self) -> None:
        """End it from another thread: whoever waits for it is told."""
        with contextlib.suppress(OSError):  # it is ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give it up; the server takes a request in flight for cancelled."""
        self._socket.close()


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
