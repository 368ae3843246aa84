"""Accepts TLS connections, so that those whose handshake is not done are counted and end in time.

It reads nothing; the loop's own ``create_server`` does all this where nothing is encrypted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from clockwork_serve.serve.gateway_sharing import Sharing
from clockwork_serve.serve.gateway_tls import Tls

BURST: Final = 64
"""Most connections that are accepted before the loop may do other things."""
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
