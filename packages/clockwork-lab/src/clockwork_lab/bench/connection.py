"""A socket that connects, reads and writes without ever waiting; what bytes mean is its wire's business."""

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
    """One connection of a sender's. Wires say what to do when it stands, when bytes came, when it ended.

    ``dead``: it may not be used any more. ``rest``: what is still to be written before anything else.
    """

    __slots__ = ("dead", "fd", "rest", "run", "sock", "standing")
    http2: ClassVar[bool] = False

    def __init__(self, run: Sender) -> None:
        self.run = run
        self.dead = self.standing = False
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

    # What a wire does

    def stands(self) -> None:
        """There is a connection; a wire that must hear something first calls :meth:`stood` later."""
        self.stood()

    def send(self, row: int, message: int) -> None:
        """Send one request."""
        raise AssertionError("a wire says how")

    def took(self, data: bytes) -> None:
        """Bytes came."""
        raise AssertionError("a wire says what they mean")

    def lost(self, why: str) -> None:
        """The other side ended it."""
        raise AssertionError("a wire says for whom that is bad")

    def abandon(self, row: int) -> None:
        """Give up a request that is out."""
        raise AssertionError("a wire says how")

    def written(self) -> None:
        """All of ``rest`` is out."""

    def flush(self) -> None:
        """Write what was put together in this turn."""

    # The socket

    def stood(self) -> None:
        """It can be used from now on."""
        self.standing = True
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
        self.run.handlers[self.fd] = self._shake_hands
        self._shake_hands(0)

    def _shake_hands(self, events: int) -> None:
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
        self.stands()

    def _event(self, events: int) -> None:
        if events & OUT:
            self._go_on()
        if events & ~OUT and not self.dead:
            try:
                data = self.sock.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self.lost(errno.errorcode.get(error.errno or 0, "error"))
                return
            if data:
                self.took(data)
            else:
                self.lost("closed")

    def _tls_event(self, events: int) -> None:
        if events & OUT:
            self._go_on()
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
            self.took(data)

    def write(self, data: bytes) -> None:
        """Write, or keep what does not go out at once. Nothing may be kept already."""
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
        """Go on with that when there is room."""
        self.rest = rest
        self.run.epoll.modify(self.fd, IN | OUT)

    def _go_on(self) -> None:
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
        """End it. Who still waits for something of it has been told."""
        if self.dead:
            return
        self.dead = True
        self.rest = None
        del self.run.handlers[self.fd]
        self.run.epoll.unregister(self.fd)
        self.sock.close()
        self.run.total -= 1
        if not self.standing:
            self.run.opening -= 1
