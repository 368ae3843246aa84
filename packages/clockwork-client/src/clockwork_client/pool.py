"""A pool of open connections: which one to use next. Its clients open and close them."""

from __future__ import annotations

import threading
from typing import Final, Generic, Protocol, TypeVar

IDLE_S: Final = 50.0
"""Many proxies close a connection that is idle for a minute; older connections are not reused."""


class Pooled(Protocol):
    """A connection. ``stale``: the server closed it while it was idle."""

    idle_since: float

    @property
    def stale(self) -> bool: ...  # noqa: D102 - documented above


C = TypeVar("C", bound=Pooled)


class Pool(Generic[C]):
    """All methods are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[C] = set()
        self._idle: list[C] = []  # of those open; the one used last is used next
        self._closed = False

    def acquire(self, now: float) -> tuple[C | None, list[C]]:
        """A connection to use, or None, and those to close: idle for too long, or closed by the server."""
        dropped: list[C] = []
        while True:
            with self._lock:
                if not self._idle:
                    return None, dropped
                connection = self._idle.pop()
            if now - connection.idle_since < IDLE_S and not connection.stale:
                return connection, dropped
            with self._lock:
                self._open.discard(connection)
            dropped.append(connection)

    def add(self, connection: C) -> bool:
        """Register a new connection, which is in use; False if the pool is closed."""
        with self._lock:
            if not self._closed:
                self._open.add(connection)
            return not self._closed

    def release(self, connection: C, now: float, *, keep: bool) -> bool:
        """Release a connection after use; whether the pool keeps it."""
        with self._lock:
            kept = keep and not self._closed
            if kept:
                connection.idle_since = now
                self._idle.append(connection)
            else:
                self._open.discard(connection)
            return kept

    def close(self) -> tuple[list[C], list[C]]:
        """Close the pool; the idle connections and those in use."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._open.difference(idle))
            self._open.clear()
            return idle, busy
