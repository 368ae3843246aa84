"""What both clients share: a pool of connections, settings, cached metadata, requests and errors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from clockwork_client import __version__, calls
from clockwork_client.calls import CallTimeout, ClientCall, Inputs, ModelMetadata, T, check_seconds
from clockwork_client.datatypes import Buffer
from clockwork_client.errors import Disconnected, Expired, Invalid, NotServing, ServingError
from clockwork_client.wire import Address, Malformed

if TYPE_CHECKING:
    import ssl

# ------------------------------------------------------------
# A pool of open connections: which one to use next. The clients open and close them.


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


# ------------------------------------------------------------
# Settings, cached metadata, building of requests and of errors.


TIMEOUT_S: Final = 60.0
LOAD_TIMEOUT_S: Final = 600.0
"""A model may have to be compiled first."""
GRACE_S: Final = 0.1
"""Twice as long as a gateway waits for its controller after a deadline."""
CONNECTIONS: Final = 100


class ClientBase:
    """Settings and cached model metadata. :class:`Client` documents the settings.

    Each client's ``_set_up`` creates what its connections need.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        grace_s: float = GRACE_S,
        connections: int = CONNECTIONS,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        check_seconds("timeout_s", timeout_s)
        if grace_s < 0:
            raise Invalid(f"parameter 'grace_s': expected seconds, 0 or more, found {grace_s!r}")
        if connections < 1:
            raise Invalid(f"parameter 'connections': expected 1 or more, found {connections!r}")
        self._address = Address.of(url, api_key, f"clockwork-client/{__version__}")
        if self._address.tls and tls is None:
            import ssl

            tls = ssl.create_default_context()
        self._tls = tls if self._address.tls else None
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._connections = connections
        self._known: dict[tuple[str, str], ModelMetadata] = {}
        self._closed = False
        self._set_up(connections)

    def _set_up(self, connections: int) -> None:
        raise AssertionError("Client and AsyncClient are for use, not what they have in common")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._address)!r})"

    def _check_fits(self, model: str, version: str, inputs: Inputs, outputs: Sequence[str] | None) -> None:
        """Raise :class:`Invalid` if a request does not match its model's cached metadata, if there is any."""
        known = self._known.get((model, version))
        if known is not None:
            try:
                calls.check(known, inputs, outputs)
            except Invalid:
                # The model may have been replaced: a repeated call is checked by the server instead.
                self._forget(model)
                raise

    def _remember(self, model: str, version: str, found: ModelMetadata) -> ModelMetadata:
        self._known[model, version] = found
        return found

    def _forget(self, model: str) -> None:
        for key in [key for key in tuple(self._known) if key[0] == model]:
            self._known.pop(key, None)

    def _new_timeout(
        self, now: float, timeout_s: float | None, slo_ms: float | None = None, retries: int = 0
    ) -> CallTimeout:
        if self._closed:
            raise RuntimeError("this client is closed")
        return CallTimeout(
            now, self._timeout_s if timeout_s is None else timeout_s, slo_ms, self._grace_s, retries
        )

    def _message(self, call: ClientCall[T], call_timeout: CallTimeout, now: float) -> tuple[Buffer, ...]:
        remaining_ms = call_timeout.remaining_ms(now)
        headers = (
            call.headers if remaining_ms is None else b"%sx-slo-ms: %.3f\r\n" % (call.headers, remaining_ms)
        )
        return self._address.message(call.method, call.path, headers, call.parts)

    def _unreachable(self, error: OSError) -> ServingError:
        reason = str(error) or type(error).__name__
        return NotServing(
            f"parameter 'url': expected a server at {self._address}, found {reason}", reason="unreachable"
        )

    def _broken(self, error: OSError) -> ServingError:
        if isinstance(error, TimeoutError):
            return self._timed_out()
        if isinstance(error, Malformed):
            return Disconnected(f"{self._address}: {error}")
        reason = str(error) or type(error).__name__
        return Disconnected(f"the connection to {self._address} broke before the answer came: {reason}")

    def _timed_out(self) -> ServingError:
        return Expired(f"no answer from {self._address} in the time given; the connection is closed")
