"""A non-blocking socket of a sender; subclasses, called wires, implement the protocols."""

from __future__ import annotations

import errno
import select
import socket
import ssl
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from clockwork_lab.bench.sender import Sender

READ_BYTES: Final = 1 << 16
IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT
_LATER: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
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
