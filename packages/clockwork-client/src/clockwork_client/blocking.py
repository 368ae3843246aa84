"""``Client``: blocking calls, from any number of threads at once."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from clockwork_client import calls
from clockwork_client.base import LOAD_TIMEOUT_S, ClientBase
from clockwork_client.calls import (
    Call,
    Inputs,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    Patience,
    Result,
    ServerMetadata,
    T,
)
from clockwork_client.datatypes import Buffer, Parameter
from clockwork_client.errors import Disconnected, Expired, NotServing, ServingError
from clockwork_client.pool import Pool
from clockwork_client.wire import Address, Response, ResponseReader

if TYPE_CHECKING:
    import ssl


# ------------------------------------------------------------
# One connection of the blocking client: a request, then its response, in time. It retries nothing.


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


# ------------------------------------------------------------
# ``Client``: blocking calls, from any number of threads at once.


class Client(ClientBase):
    """A blocking client. Threads may share it; after a fork, make a new one.

    ``url`` is ``http://HOST:PORT``, ``https://...`` or ``HOST:PORT``. ``timeout_s`` limits each call over all
    its attempts; ``grace_s`` is how long after an SLO it waits for the server to say how the request ended;
    ``connections`` are open at most, each for one request at a time. ``api_key`` is sent as
    ``Authorization: Bearer``; ``tls`` is for certificates that the system does not know.

    Calls raise :class:`ServingError`, by what happened. Close it, or use it as a context manager.
    """

    def _set_up(self, connections: int) -> None:
        self._places = threading.Semaphore(connections)
        self._pool: Pool[Connection] = Pool()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls in flight in other threads end with :class:`Disconnected`."""
        self._closed = True
        idle, busy = self._pool.close()
        for connection in idle:
            connection.close()
        for connection in busy:
            connection.shut()

    def infer(  # noqa: PLR0913 - what a request may say
        self,
        model: str,
        inputs: Inputs,
        *,
        slo_ms: float | None = None,
        version: str = "",
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        request_id: str = "",
        datatypes: Mapping[str, str] | None = None,
        retries: int = 0,
        timeout_s: float | None = None,
    ) -> Result:
        """Ask a model. ``inputs`` are arrays by name, strings as ``bytes`` or ``str`` in an object array.

        ``slo_ms`` is each attempt's deadline on the server, and with ``grace_s`` how long the client waits
        for it; without it, the model's own counts. ``outputs`` are the names wanted, all if None.
        ``request_id`` is the caller's own and comes back. ``datatypes={"x": "BF16"}`` sends ``uint16`` as the
        bits of BF16. Where the server says when to come back, up to ``retries`` more attempts are made then,
        all within ``timeout_s``. Raises :class:`ServingError`.
        """
        call = calls.infer(
            model, inputs, version=version, outputs=outputs, parameters=parameters, request_id=request_id,
            datatypes=datatypes,
        )  # fmt: skip
        self._fits(model, version, inputs, outputs)
        return self._do(call, self._patience(time.monotonic(), timeout_s, slo_ms, retries))

    def live(self) -> bool:
        """Whether the server answers at all."""
        return self._is(calls.health("live"))

    def ready(self) -> bool:
        """Whether the server serves."""
        return self._is(calls.health("ready"))

    def model_ready(self, model: str, version: str = "") -> bool:
        """Whether a model can be asked now."""
        return self._is(calls.model_ready(model, version))

    def metadata(self) -> ServerMetadata:
        """Who serves."""
        return self._ask(calls.metadata())

    def model_metadata(self, model: str, version: str = "") -> ModelMetadata:
        """A model's inputs and outputs. They are remembered, and :meth:`infer` checks by them."""
        return self._learn(model, version, self._ask(calls.model_metadata(model, version)))

    def models(self) -> list[ModelState]:
        """Every version of every model in the server's repository."""
        return self._ask(calls.models())

    def statistics(self, model: str = "", version: str = "") -> list[ModelStatistics]:
        """What a model did so far; all models if none is named."""
        return self._ask(calls.statistics(model, version))

    def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Serve a model of the repository, or serve it anew. It may have to be compiled first."""
        self._forget(model)
        self._ask(calls.control(model, "load"), timeout_s)

    def unload(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Serve a model no more."""
        self._forget(model)
        self._ask(calls.control(model, "unload"), timeout_s)

    # Inside

    def _is(self, call: Call[bool]) -> bool:
        try:
            return self._ask(call)
        except (NotServing, Expired, Disconnected):
            return False

    def _ask(self, call: Call[T], timeout_s: float | None = None) -> T:
        return self._do(call, self._patience(time.monotonic(), timeout_s))

    def _do(self, call: Call[T], patience: Patience) -> T:
        while True:
            try:
                return call.read(self._attempt(call, patience))
            except ServingError as error:
                error.request_id = error.request_id or call.id
                wait_s = patience.wait_s(error, time.monotonic())
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    def _attempt(self, call: Call[T], patience: Patience) -> Response:
        now = time.monotonic()
        until = patience.start(now)
        if not self._places.acquire(timeout=max(0.0, until - now)):
            raise Expired(f"none of {self._connections} connections was free in time; nothing was sent")
        try:
            return self._exchange(call, patience, until)
        finally:
            self._places.release()

    def _exchange(self, call: Call[T], patience: Patience, until: float) -> Response:
        try:
            connection = self._take(until)
        except TimeoutError:
            raise self._no_answer() from None
        except OSError as error:
            raise self._unreachable(error) from None
        keep = False
        try:
            message = self._message(call, patience, time.monotonic())
            response = connection.exchange(message, until)
            keep = response.keep_alive
        except OSError as error:
            raise self._broken(error) from None
        finally:
            if not self._pool.give_back(connection, time.monotonic(), keep=keep):
                connection.close()
        return response

    def _take(self, until: float) -> Connection:
        connection, dropped = self._pool.take(time.monotonic())
        for each in dropped:
            each.close()
        if connection is None:
            connection = Connection(self._address, self._tls, until)
            if not self._pool.add(connection):
                connection.close()
                raise ConnectionAbortedError("this client, closed")
        return connection
