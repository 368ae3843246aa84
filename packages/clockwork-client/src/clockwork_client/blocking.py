"""``Client``: blocking calls, from any number of threads at once."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from clockwork_client import calls
from clockwork_client.base import LOAD_TIMEOUT_S, ClientBase, Pool
from clockwork_client.calls import (
    CallTimeout,
    ClientCall,
    Inputs,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    Result,
    ServerMetadata,
    T,
)
from clockwork_client.datatypes import Buffer, Parameter
from clockwork_client.errors import Disconnected, Expired, NotServing, ServingError
from clockwork_client.wire import Address, Response, ResponseReader

if TYPE_CHECKING:
    import ssl


# ------------------------------------------------------------
# One connection of the blocking client: a request, then its response, within a time limit. No retries.


def is_stale(fd: int) -> bool:
    """Whether an idle connection is readable: it was closed, or holds bytes that were not requested."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Connection:
    """One connection. Instants are of ``time.monotonic``. Raises OSError, and TimeoutError at ``until``."""

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
        """Send a request; return its response."""
        broken: OSError | None = None
        self._reader.expect()
        try:
            for part in message:
                self._socket.settimeout(_left(until))
                self._socket.sendall(part)
        except TimeoutError:
            raise
        except OSError as error:
            # A server that rejects a large body responds before it has read all of it.
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
        """Shut the connection down from another thread; a thread that is receiving on it gets an error."""
        with contextlib.suppress(OSError):  # already closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the server cancels a request in flight."""
        self._socket.close()


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


# ------------------------------------------------------------
# ``Client``: blocking calls, from any number of threads at once.


class Client(ClientBase):
    """A blocking client. Threads may share it; after a fork, create a new one.

    ``url`` is ``http://HOST:PORT``, ``https://...`` or ``HOST:PORT``. ``timeout_s`` limits each call over all
    its attempts; ``grace_s`` is how long after an SLO it waits for the server to report the outcome;
    ``connections`` is the most connections open at once, each for one request at a time. ``api_key`` is sent
    as ``Authorization: Bearer``; ``tls`` is for certificates that the system does not trust.

    Calls raise a subclass of :class:`ServingError`. Close the client, or use it as a context manager.
    """

    def _set_up(self, connections: int) -> None:
        self._permits = threading.Semaphore(connections)
        self._pool: Pool[Connection] = Pool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
        """Run a model. ``inputs`` are arrays by name, strings as ``bytes`` or ``str`` in an object array.

        ``slo_ms`` is the SLO of each attempt, and with ``grace_s`` how long the client waits for a response;
        without it, the model's own SLO applies. ``outputs`` are the names of the outputs to return, all if
        None. ``request_id`` is the caller's own and is returned. ``datatypes={"x": "BF16"}`` sends ``uint16``
        as the bits of BF16. If the server advises when to retry, up to ``retries`` more attempts are made at
        that time, all within ``timeout_s``. Raises :class:`ServingError`.
        """
        call = calls.infer(
            model, inputs, version=version, outputs=outputs, parameters=parameters, request_id=request_id,
            datatypes=datatypes,
        )  # fmt: skip
        self._check_fits(model, version, inputs, outputs)
        return self._run(call, self._new_timeout(time.monotonic(), timeout_s, slo_ms, retries))

    def live(self) -> bool:
        """Whether the server responds at all."""
        return self._holds(calls.health("live"))

    def ready(self) -> bool:
        """Whether the server accepts inference requests."""
        return self._holds(calls.health("ready"))

    def model_ready(self, model: str, version: str = "") -> bool:
        """Whether a model accepts requests."""
        return self._holds(calls.model_ready(model, version))

    def metadata(self) -> ServerMetadata:
        """The server's name, version and extensions."""
        return self._call(calls.metadata())

    def model_metadata(self, model: str, version: str = "") -> ModelMetadata:
        """A model's inputs and outputs. They are cached, and :meth:`infer` checks requests against them."""
        return self._remember(model, version, self._call(calls.model_metadata(model, version)))

    def models(self) -> list[ModelState]:
        """Every version of every model in the server's repository."""
        return self._call(calls.models())

    def statistics(self, model: str = "", version: str = "") -> list[ModelStatistics]:
        """A model's counters; those of all models if none is named."""
        return self._call(calls.statistics(model, version))

    def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Load a model of the repository, or reload it. It may have to be compiled first."""
        self._forget(model)
        self._call(calls.control(model, "load"), timeout_s)

    def unload(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Stop serving a model."""
        self._forget(model)
        self._call(calls.control(model, "unload"), timeout_s)

    # Internals

    def _holds(self, call: ClientCall[bool]) -> bool:
        try:
            return self._call(call)
        except (NotServing, Expired, Disconnected):
            return False

    def _call(self, call: ClientCall[T], timeout_s: float | None = None) -> T:
        return self._run(call, self._new_timeout(time.monotonic(), timeout_s))

    def _run(self, call: ClientCall[T], call_timeout: CallTimeout) -> T:
        while True:
            try:
                return call.read(self._attempt(call, call_timeout))
            except ServingError as error:
                error.request_id = error.request_id or call.id
                wait_s = call_timeout.wait_s(error, time.monotonic())
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    def _attempt(self, call: ClientCall[T], call_timeout: CallTimeout) -> Response:
        now = time.monotonic()
        until = call_timeout.start(now)
        if not self._permits.acquire(timeout=max(0.0, until - now)):
            raise Expired(f"none of {self._connections} connections was free in time; nothing was sent")
        try:
            return self._exchange(call, call_timeout, until)
        finally:
            self._permits.release()

    def _exchange(self, call: ClientCall[T], call_timeout: CallTimeout, until: float) -> Response:
        try:
            connection = self._acquire(until)
        except TimeoutError:
            raise self._timed_out() from None
        except OSError as error:
            raise self._unreachable(error) from None
        keep = False
        try:
            message = self._message(call, call_timeout, time.monotonic())
            response = connection.exchange(message, until)
            keep = response.keep_alive
        except OSError as error:
            raise self._broken(error) from None
        finally:
            if not self._pool.release(connection, time.monotonic(), keep=keep):
                connection.close()
        return response

    def _acquire(self, until: float) -> Connection:
        connection, dropped = self._pool.acquire(time.monotonic())
        for each in dropped:
            each.close()
        if connection is None:
            connection = Connection(self._address, self._tls, until)
            if not self._pool.add(connection):
                connection.close()
                raise ConnectionAbortedError("this client, closed")
        return connection
