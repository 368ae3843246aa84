"""Connections that are open, and which of them to use next; it opens and closes none."""

from __future__ import annotations

import threading
from typing import Final, Generic, Protocol, TypeVar

IDLE_S: Final = 50.0
"""Many proxies close a connection that is silent for a minute; one that may be closed soon is not used."""


class Pooled(Protocol):
    """A connection. ``stale``: the server closed it while it was idle."""

    idle_since: float

    @property
    def stale(self) -> bool: ...  # noqa: D102 - told above


C = TypeVar("C", bound=Pooled)


class Pool(Generic[C]):
    """All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[C] = set()
        self._idle: list[C] = []  # of those open; the one used last is used next
        self._closed = False

    def take(self, now: float) -> tuple[C | None, list[C]]:
        """A connection to use, if there is one, and those to close: too old, or closed by the server."""
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
        """A new one, in use from now on; False if the pool is closed."""
        with self._lock:
            if not self._closed:
                self._open.add(connection)
            return not self._closed

    def give_back(self, connection: C, now: float, *, keep: bool) -> bool:
        """Used; whether it is kept for later."""
        with self._lock:
            kept = keep and not self._closed
            if kept:
                connection.idle_since = now
                self._idle.append(connection)
            else:
                self._open.discard(connection)
            return kept

    def close(self) -> tuple[list[C], list[C]]:
        """Keep none any more; those idle, and those in use."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._open.difference(idle))
            self._open.clear()
            return idle, busy
