"""A whole server as one object: for the command line, for tests and for demonstrations."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvloop

from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.serve.supervisor.keeper import Keeper, StartError
from clockwork_serve.serve.supervisor.preparation import OnProgress, StartProgress
from clockwork_serve.serve.supervisor.run_dir import addresses
from clockwork_serve.telemetry import Counters

# ------------------------------------------------------------
# Stopping a process in the foreground: the first SIGTERM or SIGINT requests a graceful stop, the second one
# forces it.


class Stopping:
    """Handles both signals from its creation on. For the running loop, which must be the main thread's."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.signal = signal.SIGTERM
        """The last signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    @property
    def status(self) -> int:
        """The exit status of a process that ends by the signal."""
        return 128 + self.signal

    def _on_signal(self, number: signal.Signals) -> None:
        self.signal = number
        (self.forced if self.requested.is_set() else self.requested).set()


async def run_unless(event: asyncio.Event, coroutine: Coroutine[Any, Any, object]) -> bool:
    """Run ``coroutine`` to its end; if ``event`` is set first, cancel it and return False."""
    work = asyncio.ensure_future(coroutine)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        work.cancel()
        await asyncio.wait({work})
        return False
    finally:
        waiting.cancel()


# ------------------------------------------------------------
# A whole server as one object: for the command line, for tests and for demonstrations.


__all__ = ["RunningServer", "Server", "ServerConfig", "StartError", "StartProgress", "run", "running_server"]

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Server(Keeper):
    """A server on the running loop: ``await start()``, ``await wait_ready()``, ``await stop()``."""

    @property
    def http_url(self) -> str:
        """Where HTTP is served, as ``host:port`` with the scheme."""
        return self._addresses["http"]

    @property
    def grpc_url(self) -> str:
        """Where gRPC is served, as ``host:port``; empty if it is off."""
        return self._addresses["grpc"]

    @property
    def metrics_url(self) -> str:
        """Where metrics are served; empty if that is off."""
        return self._addresses["metrics"]

    @property
    def _addresses(self) -> dict[str, str]:
        settings = self.settings
        return addresses(settings.host, self.ports.number_by_name, tls=bool(settings.tls_certificate))


class RunningServer:
    """A server on a loop in a thread of its own; its methods may be called from any other thread."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.http_url = server.http_url
        self.grpc_url = server.grpc_url
        self.metrics_url = server.metrics_url
        self.http_port = server.ports.number_by_name["http_port"]
        self.grpc_port = server.ports.number_by_name.get("grpc_port")
        self.metrics_port = server.ports.number_by_name.get("metrics_port")
        self._loop = loop

    @property
    def names(self) -> list[str]:
        """The names of its processes, such as ``controller``, ``worker-cpu:0``, ``gateway-0``."""
        return self.server.supervisor.names

    def pid(self, name: str) -> int | None:
        """The process id of one of them, while it runs."""
        return self.server.supervisor.pid(name)

    def state(self) -> dict[str, Any]:
        """The controller's state. Raises :class:`TransportError` if it does not answer."""
        return self._call(self.server.state())

    def counters(self) -> Counters:
        """The controller's counters. Raises :class:`TransportError` if it does not answer."""
        return self._call(self.server.counters())

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return once clients are served.

        Raises :class:`StartError` after ``timeout_s``, or if a process keeps failing.
        """
        self._call(self.server.wait_ready(timeout_s))

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@contextmanager
def running_server(
    config: ServerConfig,
    *,
    timeout_s: float = 120.0,
    on_progress: OnProgress = lambda progress: None,
    on_line: Callable[[str], None] | None = None,
) -> Iterator[RunningServer]:
    """A server that is ready; it is drained and stopped at the end of the block.

    Raises what :meth:`Keeper.start` and :meth:`Keeper.wait_ready` raise.
    """
    loop = uvloop.new_event_loop()
    # The kernel kills the children when the thread that started them ends, so this one stays until the end.
    thread = threading.Thread(target=loop.run_forever, name="keeper", daemon=True)
    thread.start()

    def call(coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        server = call(_make(config, on_progress, on_line))
        try:
            call(server.start())
            call(server.wait_ready(timeout_s))
            yield RunningServer(server, loop)
            call(server.stop())
        finally:
            call(server.close())
    finally:
        call(_cancel_others())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    """Cancel the tasks that an interrupted start left behind, so that none is destroyed while pending."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def run(
    config: ServerConfig,
    *,
    on_progress: OnProgress = lambda progress: None,
    on_ready: Callable[[Server], None] = lambda server: None,
    on_line: Callable[[str], None] | None = None,
    timeout_s: float = 600.0,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. For the main thread.

    The first signal drains and stops, a second one stops at once. Raises :class:`ClockworkError` if the
    server cannot start.
    """
    return uvloop.run(_run(config, on_progress, on_ready, on_line, timeout_s))


async def _run(
    config: ServerConfig,
    on_progress: OnProgress,
    on_ready: Callable[[Server], None],
    on_line: Callable[[str], None] | None,
    timeout_s: float,
) -> int:
    stopping = Stopping()
    server = Server(config, on_progress, on_line)
    try:
        if not await run_unless(stopping.requested, _start_and_wait(server, timeout_s)):
            return stopping.status
        on_ready(server)
        await stopping.requested.wait()
        _log.info("%s: draining", stopping.signal.name)
        return 0 if await run_unless(stopping.forced, server.stop()) else stopping.status
    finally:
        await server.close()


async def _start_and_wait(server: Server, timeout_s: float) -> None:
    await server.start()
    await server.wait_ready(timeout_s)


async def _make(
    config: ServerConfig, on_progress: OnProgress, on_line: Callable[[str], None] | None
) -> Server:
    return Server(config, on_progress, on_line)
