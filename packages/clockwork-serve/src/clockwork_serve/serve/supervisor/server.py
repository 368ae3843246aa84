"""A whole server as one object: for the command line, for tests and for demonstrations.

It is the supervisor (``keeper`` in logs and metrics): it prepares the repository, runs the other processes,
loads and unloads models, and sends the catalogue to the controller. No request passes through it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import msgspec
import uvloop

from clockwork_serve.errors import ClockworkError, RepositoryError, TransportError
from clockwork_serve.messages import (
    ArtefactDamaged,
    Ask,
    Drain,
    Frame,
    ModelsAskedFor,
    ProcessesEnded,
    Quarantined,
    Question,
    Reply,
    StandbysCounted,
    WorkerCrashed,
    WorkerHung,
)
from clockwork_serve.serve.gateway.access import check_access_files
from clockwork_serve.serve.processes.controller import check_shared_lease
from clockwork_serve.serve.remote.config import check_listening
from clockwork_serve.serve.supervisor.catalogue import Catalogue, Repairs
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.serve.supervisor.limits import check_limits
from clockwork_serve.serve.supervisor.link import Quotas, SupervisorLink, end_unconnected_workers
from clockwork_serve.serve.supervisor.loading import Loader, NotInRepository
from clockwork_serve.serve.supervisor.preparation import (
    LOAD_NICE,
    OnPart,
    OnProgress,
    Preparation,
    PreparedRepository,
    StartProgress,
    Steering,
    SuspectArtefact,
    prepare,
)
from clockwork_serve.serve.supervisor.processes import Supervisor, crashed, launches, listens, to_stderr
from clockwork_serve.serve.supervisor.run_dir import Ports, RunDir, addresses
from clockwork_serve.serve.transport import SOCKET_NAME
from clockwork_serve.store import opened
from clockwork_serve.telemetry import Counters, Journal
from clockwork_serve.telemetry.counters import WANTED_FILE

__all__ = ["RunningServer", "Server", "ServerConfig", "StartError", "StartProgress", "run", "running_server"]

Result = TypeVar("Result")
_log = logging.getLogger(__name__)

# ------------------------------------------------------------
# The server on a loop.


POLL_S: Final = 0.02
CHECK_S: Final = 1.0  # how often it is looked whether a controller by itself keeps failing
STANDBY_POLL_S: Final = 0.25
"""How often it is looked how many controllers stand by: the watchdog sends its beats as often."""
PROBES: Final = 4  # of each gateway on average, before all are taken for ready
STOP_GRACE_S: Final = 5.0


class StartError(ClockworkError):
    """The server did not become ready; the message has the last lines of the process to blame."""


class Server:
    """A server on the running loop, from ``start`` to ``stop``. All methods are for that loop."""

    def __init__(
        self, config: ServerConfig, on_progress: OnProgress = lambda progress: None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """``on_line`` gets each line that the other processes log; by default it is written to stderr.

        Raises :class:`RepositoryError` for a repository that cannot be read, then :class:`ConfigError` for
        a file or a port that cannot be used.
        """
        settings = self.settings = config.settings
        opened(settings.repository, config.store)
        check_access_files(settings)
        check_limits(settings, config.devices)
        if settings.listen_machines:
            check_listening(settings)
        self.config = config
        ports = settings.ports if config.devices else {"metrics_port": settings.metrics_port}
        self.ports = Ports(settings.host, ports)
        self.catalogue = Catalogue()
        self.quotas = Quotas(settings.api_keys)
        self._run_dir = RunDir(config.run_dir)
        self.run_dir = self._run_dir.path
        self._on_progress = on_progress
        self._on_line = on_line or to_stderr
        self.supervisor = Supervisor(self._on_line, self._on_end)
        self._link = SupervisorLink(self.run_dir / SOCKET_NAME, self._catalogue)
        self.repairs = Repairs(self.catalogue, self._prepare, self._link.send, self._report)
        self._loader = Loader(
            config, self.catalogue, self._link, self.repairs,
            prepare=self._prepare, prepare_all=self._prepare_all, report=self._report,
            check_running=self.check_running,
        )  # fmt: skip
        self._link.handlers |= {
            Ask: lambda ask: self._run(self._answer(ask)),
            Quarantined: self._on_quarantined,
            WorkerHung: self._on_hung,
            ArtefactDamaged: self.repairs.on_damaged,
            ModelsAskedFor: self._loader.asked_for,
        }
        self._hung: set[str] = set()  # workers that were killed because they hung, and have not ended yet
        self._preparing = asyncio.Lock()
        self._preparations = 0
        self._standbys = 0  # as the controller was told
        self._tasks: set[asyncio.Task[None]] = set()  # background work, and answers to questions

    async def start(self) -> None:
        """Start all processes, then compile, profile and serve every model; each is served once it is ready.

        Raises :class:`ClockworkError` if nothing can be served, or a process keeps failing.
        """
        if not self.config.devices:
            await check_shared_lease(self.settings)
        await self._loader.find_all()
        if (journal := self.settings.journal_path(str(self.run_dir))) is not None:
            Journal(journal).close()  # a path that cannot be written ends the start, not a process later
        self._link.start()
        self._run(self.quotas.keep_fresh(self._link.send))
        self._run(end_unconnected_workers(self.supervisor, self.state))
        for launch in launches(self.config, self.run_dir, self.ports.number_by_name):
            self.supervisor.start(launch)
        if self.settings.controllers > 1:
            self._run(self._watch_standbys())
        if not self.config.devices:
            self._run(self._loader.follow())
        total = self._loader.preparing.total
        text = "models are served as they are ready"
        if self.http_url:  # else clients ask gateways on other machines
            text = f"models are served at {self.http_url} as they are ready"
        self._on_progress(StartProgress(stage="prepare", done=0, total=total, text=text))
        await self._loader.load_all(self._on_progress)
        self._run(self._loader.refine())

    async def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return once clients are served.

        Raises :class:`StartError` after ``timeout_s``, or if a process keeps failing.
        """
        link = self._link
        deadline_s = time.monotonic() + timeout_s
        while not (link.readiness.ready and await self._gateways_ready()):
            self.check_running()
            whys = self.unservable
            if link.readiness.ready and whys and len(whys) == len(self.catalogue.models):
                if self.settings.listen_machines:
                    break  # a device that can run one may join
                raise StartError("\n  ".join(["no model can be served:", *whys]))
            if time.monotonic() > deadline_s:
                why = "its gateways do not answer" if link.readiness.ready else link.readiness.why
                raise StartError(f"not ready within {timeout_s:.0f} s: {why}")
            self._on_progress(StartProgress(stage="start", done=0, total=1, text=link.readiness.why))
            await asyncio.sleep(POLL_S)
        self._on_progress(StartProgress(stage="start", done=1, total=1, text="ready"))

    def check_running(self) -> None:
        """Raise :class:`StartError` if a process keeps failing."""
        if (why := self.supervisor.why_failing()) is not None:
            raise StartError(why)

    async def stop(self) -> None:
        """Refuse new requests, finish those in flight within ``drain_s``, and stop all processes."""
        order: tuple[str, ...] = ("gateway", "bridge", "worker", "controller", "observer")
        if self.config.devices:
            await self._drain()
        else:  # another controller takes over, with what waits at gateways
            order = ("controller", "bridge", "gateway", "observer")
        names = self.supervisor.names
        for prefix in order:
            group = [name for name in names if name.startswith(prefix)]
            await asyncio.gather(*(self.supervisor.stop(name, STOP_GRACE_S) for name in group))
        await self.close()

    async def close(self) -> None:
        """Kill all processes, and release ports and the private folder."""
        await self.repairs.close()
        working = [*self._tasks]
        for task in working:
            task.cancel()
        self._link.close()
        await self.supervisor.kill()
        if working:
            # A child that measures codes again is ended by its task; cancelled twice, that would leave it.
            await asyncio.wait(working)
        self.ports.close()
        self._run_dir.close()

    @property
    def leader(self) -> str:
        """The name of the controller process that leads; "" while none is connected."""
        return self._link.leader

    async def state(self) -> dict[str, Any]:
        """The controller's state. Raises :class:`TransportError` if it does not answer."""
        return await self._link.ask(Question.STATE)

    async def counters(self) -> Counters:
        """The controller's counters. Raises :class:`TransportError` if it does not answer."""
        return msgspec.convert(await self._link.ask(Question.METRICS), Counters, strict=False)

    async def _gateways_ready(self) -> bool:
        ports = self.ports.number_by_name
        host, port = self.settings.host, ports["http_port"]
        # Gateways share a port, and the kernel chooses which of them answers: one may know of models a moment
        # later than another.
        for _ in range(1 if self.settings.gateways == 1 else PROBES * self.settings.gateways):
            # Under TLS a client may need a certificate, which the supervisor lacks: then connecting must do.
            if not await listens(host, port, ready=not self.settings.tls_certificate):
                return False
        try:
            there = (await self.state())["gateways"]
            if sum(name.startswith("gateway") for name in there) < self.settings.gateways:
                return False
        except TransportError:
            return False
        others = [port for name, port in ports.items() if name != "http_port"]
        return all([await listens(self.settings.host, port) for port in others])

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
    def unservable(self) -> list[str]:
        """Why each model that no device can run cannot."""
        found = self._link.quarantines.unservable
        return [f"model {key}: {one.why}" for key, one in found.items()]

    @property
    def wanted_file(self) -> str:
        """Where it says how many devices are wanted, while it knows; empty if that is off."""
        settings, place = self.settings, str(self.run_dir)
        says = settings.scaling_target is not None and settings.journal_path(place) is not None
        return str(self.run_dir / WANTED_FILE) if says else ""

    @property
    def _addresses(self) -> dict[str, str]:
        settings = self.settings
        return addresses(settings.host, self.ports.number_by_name, tls=bool(settings.tls_certificate))

    # Preparing

    async def _prepare(
        self, names: tuple[str, ...], suspects: tuple[SuspectArtefact, ...] = (), *,
        on_progress: OnProgress | None = None, again: bool = False,
    ) -> PreparedRepository:  # fmt: skip
        preparation = self._preparation(names=names, suspects=suspects, again=again, nice=LOAD_NICE)
        async with self._preparing:
            return await prepare(preparation, on_progress or self._on_progress, self._on_line)

    async def _prepare_all(
        self, on_progress: OnProgress, on_part: OnPart, steering: Steering
    ) -> PreparedRepository:
        preparation = self._preparation(parts=True)
        return await prepare(preparation, on_progress, self._on_line, on_part, steering)

    def _preparation(self, **more: Any) -> Preparation:
        self._preparations += 1
        return Preparation(
            settings=self.settings, store=self.config.store, devices=self.config.devices,
            result=str(self.run_dir / f"prepared-{self._preparations}.msgpack"), **more,
        )  # fmt: skip

    def _report(self, prepared: PreparedRepository) -> None:
        self.repairs.count(prepared.damage)
        for problem in prepared.problems:
            _log.error("%s", problem)
        for warning in prepared.warnings:
            _log.warning("%s", warning)
        for each in prepared.served:
            for warning in each.model.warnings:
                _log.warning("model %s: %s", each.model.key, warning)

    def _catalogue(self) -> list[Frame]:
        return [
            self._loader.preparing,
            *self.quotas.frames(),
            *self.catalogue.frames(),
            *self._ended_counts(),
            self.repairs.counted,
            self._standbys_counted(),
        ]

    def _ended_counts(self) -> list[Frame]:
        """How often each process was killed because it did not answer.

        Counted here, for a controller that was killed loses its own counters.
        """
        counts = self.supervisor.unresponsive
        return [ProcessesEnded(unanswering=dict(counts))] if counts else []

    def _standbys_counted(self) -> StandbysCounted:
        self._standbys = max(0, self.supervisor.started("controller") - 1)
        return StandbysCounted(ready=self._standbys)

    async def _watch_standbys(self) -> None:
        """Tell the controller how many others stand by, whenever that changes; never returns."""
        while True:
            await asyncio.sleep(STANDBY_POLL_S)
            before, counted = self._standbys, self._standbys_counted()
            if counted.ready != before:
                self._link.send(counted)

    def _on_end(self, name: str, status: int) -> None:
        self._link.send(*self._ended_counts())
        by_itself = name in self._hung
        self._hung.discard(name)
        if name.startswith("worker") and (crashed(status) or by_itself):
            self._link.send(WorkerCrashed(worker=name))

    def _on_hung(self, hung: WorkerHung) -> None:
        """Kill a worker that hung. Unless a signal had stopped it, count that as a crash of its own."""
        ran = self.supervisor.end(hung.worker)
        if ran is None:
            _log.error("%s hung, and is no process of this supervisor", hung.worker)
        elif ran:
            self._hung.add(hung.worker)
        else:
            _log.warning("%s was stopped by a signal; no model is to blame for that", hung.worker)

    def _on_quarantined(self, quarantined: Quarantined) -> None:
        """Restart workers without delay: the model that crashed them is not served any more."""
        if quarantined.why:
            self.supervisor.reset_backoff("worker")

    # Questions

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, ask: Ask) -> None:
        try:
            asked = msgspec.json.decode(ask.body, type=dict[str, Any])
            match ask.what:
                case Question.INDEX:
                    body = await self._loader.index(ready=bool(asked.get("ready", False)))
                case Question.LOAD:
                    body = await self._loader.load(str(asked.get("model", "")))
                case Question.UNLOAD:
                    body = await self._loader.unload(str(asked.get("model", "")))
                case _:
                    raise RepositoryError(f"the supervisor does not know about {ask.what!r}")
            reply = Reply(ask_id=ask.ask_id, ok=True, body=body)
        except (ClockworkError, msgspec.MsgspecError, ValueError, RecursionError, OSError) as error:
            body = msgspec.json.encode({"error": str(error)})
            code = 404 if isinstance(error, NotInRepository) else 400
            reply = Reply(ask_id=ask.ask_id, ok=False, body=body, code=code)
        self._link.send(reply)

    # Stopping

    async def _drain(self) -> None:
        self._link.send(Drain())
        deadline_s = time.monotonic() + self.settings.drain_s
        try:
            while (waiting := (await self.state())["open"]) > 0:
                if time.monotonic() > deadline_s:
                    _log.warning("stopping although %d requests wait: drain_s is over", waiting)
                    return
                await asyncio.sleep(POLL_S)
        except TransportError as error:
            _log.warning("not drained: %s", error)


# ------------------------------------------------------------
# Stopping a process in the foreground: the first SIGTERM, SIGINT or SIGHUP requests a graceful stop, the
# second one forces it.


class Stopping:
    """Handles these signals from its creation on. For the running loop, which must be the main thread's."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.signal = signal.SIGTERM  # the last signal
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: it outlives its terminal
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)

    @property
    def status(self) -> int:
        """The exit status of a process that ends by the signal."""
        return 128 + self.signal

    def _on_signal(self, number: signal.Signals) -> None:
        self.signal = number
        (self.forced if self.requested.is_set() else self.requested).set()


async def run_unless(event: asyncio.Event, wanted: Awaitable[object]) -> bool:
    """Wait for ``wanted`` to its end; if ``event`` is set first, cancel it and return False."""
    work = asyncio.ensure_future(wanted)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        work.cancel()
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # what was gathered ends with an exception, which is logged unless somebody asks
        return False
    finally:
        waiting.cancel()


# ------------------------------------------------------------
# Ways to run a server: in a thread of its own, and in the foreground.


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

    @property
    def leader(self) -> str:
        """See :attr:`Server.leader`."""
        return self.server.leader

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
    config: ServerConfig, *, timeout_s: float = 120.0, on_progress: OnProgress = lambda progress: None,
    on_line: Callable[[str], None] | None = None,
) -> Iterator[RunningServer]:  # fmt: skip
    """A server that is ready; it is drained and stopped at the end of the block.

    Raises what :meth:`Server.start` and :meth:`Server.wait_ready` raise.
    """
    loop = uvloop.new_event_loop()
    # The kernel kills the children when the thread that started them ends, so this one stays until the end.
    thread = threading.Thread(target=loop.run_forever, name="supervisor", daemon=True)
    thread.start()

    def call(coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    async def make() -> Server:
        return Server(config, on_progress, on_line)

    try:
        server = call(make())
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
    config: ServerConfig, *, on_progress: OnProgress = lambda progress: None,
    on_ready: Callable[[Server], None] = lambda server: None, on_line: Callable[[str], None] | None = None,
    timeout_s: float = 600.0,
) -> int:  # fmt: skip
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit status. For the main thread.

    The first signal drains and stops, a second one stops at once. A controller by itself is ready once it
    has started, for it may stand by. Raises :class:`ClockworkError` if the server cannot start, or that keeps
    failing.
    """
    return uvloop.run(_run(config, on_progress, on_ready, on_line, timeout_s))


async def _run(
    config: ServerConfig, on_progress: OnProgress, on_ready: Callable[[Server], None],
    on_line: Callable[[str], None] | None, timeout_s: float,
) -> int:  # fmt: skip
    stopping = Stopping()
    server = Server(config, on_progress, on_line)

    async def start() -> None:
        await server.start()
        if config.devices:
            await server.wait_ready(timeout_s)

    try:
        if not await run_unless(stopping.requested, start()):
            if server.catalogue.models:  # they may be asked already
                await run_unless(stopping.forced, server.stop())
            return stopping.status
        on_ready(server)
        while not stopping.requested.is_set():
            if not config.devices:
                server.check_running()
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.requested.wait(), CHECK_S)
        _log.info("%s: draining", stopping.signal.name)
        return 0 if await run_unless(stopping.forced, server.stop()) else stopping.status
    finally:
        await server.close()
