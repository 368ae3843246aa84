"""The child processes that make up a server: started, watched, and restarted when they die or hang."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, structs

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig, profile_kind
from clockwork_serve.errors import ConfigError, printable
from clockwork_serve.serve.child import (
    BEAT,
    BEATS_FD_VARIABLE,
    EXIT_BROKEN,
    EXIT_CONFIG,
    ObserverConfig,
    environment_of_child,
)
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.offspring import end_offspring
from clockwork_serve.serve.processes.controller import ControllerProcessConfig
from clockwork_serve.serve.remote.config import BridgeConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.units import KIB

# ------------------------------------------------------------
# A watchdog for child processes: a child is stuck if its loop no longer returns heartbeats.
#
# Missed time is counted in the watchdog's own ticks, not by a clock alone: if the whole machine was paused,
# no child is to blame. A tick counts only as far as the child could have answered in it: a child that gets no
# core, or waits for a disk, is not stuck.


TICK_S: Final = 0.25
GAP_S: Final = 1.0
"""If a tick is this much too late, the watchdog was paused itself, and other processes perhaps longer."""
STOPPED_SHARE: Final = 0.4
"""Share of the limit that applies to a child stopped by a signal: it will not continue by itself."""
START_LIMIT_FACTOR: Final = 40
"""The first beat may take this many times the limit: a start imports modules, and collects garbage."""

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")


class ThreadState(Struct, frozen=True):
    """The main thread of a process: its state as in /proc, and its CPU time in seconds."""

    state: str
    ran_s: float

    @property
    def stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it."""
        return self.state in {"T", "t"}


def read_thread_state(pid: int) -> ThreadState | None:
    """The state of a process's main thread; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/task/{pid}/stat").read_bytes()
    except OSError:
        return None
    # After the name, which is in parentheses and may be anything.
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 13:
        return None
    return ThreadState(fields[0].decode(), (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS)


class ProcessWatch:
    """The watchdog of one child: it may return no beat for ``limit_s``; ``send`` sends it one.

    Without ``send`` it is asked for none, and may only not be stopped.
    """

    def __init__(
        self, pid: int, limit_s: float, send: Callable[[], None] | None,
        read_state: Callable[[int], ThreadState | None] = read_thread_state,
    ) -> None:  # fmt: skip
        self._pid = pid
        self._limit_s = limit_s
        self._send = send
        self._read_state = read_state
        self.started = False  # it has returned a beat
        # Its state at the last tick while a beat is not returned; None while none is out.
        self._last_state: ThreadState | None = None
        self._silent_s = 0.0
        self._stopped_s = 0.0

    def beat_received(self) -> None:
        """Note that the child returned a beat."""
        self.started = True
        self._last_state = None

    def tick(self, *, paused: bool = False) -> str:
        """Check the child; returns why it is to be ended, or "".

        ``paused``: the watchdog was paused itself, so missed time is counted anew.
        """
        before, now = self._last_state, self._read_state(self._pid)
        if now is None:
            return ""
        self._last_state = now
        if before is None:
            self._silent_s = self._stopped_s = 0.0
            if self._send is not None:
                self._send()
            return ""
        if paused:
            self._silent_s = self._stopped_s = 0.0
        self._stopped_s = self._stopped_s + TICK_S if now.stopped else 0.0
        self._silent_s += _responsive_s(before, now)
        if self._stopped_s >= STOPPED_SHARE * self._limit_s:
            return f"it has been stopped by a signal for {self._stopped_s:.1f} s"
        limit_s = self._limit_s if self.started else START_LIMIT_FACTOR * self._limit_s
        if self._send is not None and self._silent_s >= limit_s:
            return f"it has not answered for {self._silent_s:.1f} s in which it could have"
        return ""


def _responsive_s(before: ThreadState, now: ThreadState) -> float:
    """For how much of a tick the process could have answered."""
    match now.state:
        case "R":  # it runs, or waits for a core
            return min(TICK_S, now.ran_s - before.ran_s)
        case "D":  # it is in the kernel, waiting for I/O; SIGKILL would have no effect
            return 0.0
        case _:
            return TICK_S


# ------------------------------------------------------------
# Child processes, restarted with a growing delay when they die. Nothing here depends on what they run.
#
# All methods are for one loop's own thread, which must live as long as the children: the kernel ends them
# when the thread that started them ends.


FAST_S: Final = 5.0  # a child that lived for less died fast: it probably never worked
FAST_DEATHS: Final = 5
"""After this many fast deaths in a row the child keeps failing: another restart will not help."""
RETRY_S: Final = 0.1
RETRY_S_MAX: Final = 30.0
TAIL_LINES: Final = 40
LINE_MAX: Final = 64 * KIB
"""A longer line of a child is delivered in pieces: a model may write an endless one."""
FAULTS: Final = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)
"""Signals that a process receives for a fault of its own."""

_log = logging.getLogger(__name__)

OnLine = Callable[[str], None]


class Launch(Struct, frozen=True, kw_only=True):
    """What to run: ``python -m module config``, under a ``name`` for logs.

    A process that returns no heartbeat for ``stuck_s`` is killed and restarted; 0: it is not watched. It runs
    on ``cpus``, if there are any; else where its supervisor may. A server starts without one that is
    ``optional``; it is asked for no heartbeats, for it may wait for a core for ever, and is killed only where
    it is stopped for long.
    """

    name: str
    module: str
    config: str
    stuck_s: float = 0.0
    cpus: tuple[int, ...] = ()
    optional: bool = False

    @classmethod
    def of(
        cls, name: str, kind: str, config: object, stuck_s: float = 0.0, cpus: tuple[int, ...] = ()
    ) -> Launch:
        """A launch of ``kind``: a module of ``processes``, or ``supervisor.preparation``.

        ``config`` is passed as JSON.
        """
        return cls(
            name=name, module="clockwork_serve.serve." + (kind if "." in kind else f"processes.{kind}"),
            config=msgspec.json.encode(config).decode(), stuck_s=stuck_s, cpus=cpus,
        )  # fmt: skip


@contextmanager
def running_on(cpus: Collection[int]) -> Iterator[None]:
    """Have this thread run on these CPUs, and what it starts; empty: change nothing."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Backoff:
    """The delay before a restart: zero at first, then growing with each fast death in a row."""

    def __init__(self) -> None:
        self.fast_deaths = 0

    def died(self, lived_s: float, status: int = 0) -> float:
        """Count a death; returns how many seconds to wait before the restart."""
        self.fast_deaths = self.fast_deaths + 1 if lived_s < FAST_S else 0
        if status == EXIT_CONFIG:
            # By this status the child reports that a restart will not help.
            self.fast_deaths = max(self.fast_deaths, FAST_DEATHS)
        if self.fast_deaths <= 1:
            return 0.0
        return float(min(RETRY_S_MAX, RETRY_S * 2 ** (self.fast_deaths - 2)))

    @property
    def keeps_failing(self) -> bool:
        """Whether it died fast so often in a row that the operator must find out why."""
        return self.fast_deaths >= FAST_DEATHS


class Child:
    """One run of a program: its process, the last lines of its stderr, and its exit status.

    It has ``ended`` once all that it started has ended, too.
    """

    def __init__(self, launch: Launch, on_line: OnLine, on_output: OnLine | None = None) -> None:
        """Start it. ``on_line`` gets each line of its stderr, ``on_output`` of its stdout.

        With ``on_output`` it has a stdin, too.
        """
        self.launch = launch
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.started_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        asked = launch.stuck_s and not launch.optional
        beats, theirs = socket.socketpair() if asked else (None, None)
        environment = environment_of_child()
        if theirs is not None:
            environment[BEATS_FD_VARIABLE] = str(theirs.fileno())
        with running_on(launch.cpus):
            self._process = subprocess.Popen(
                [sys.executable, "-m", launch.module, launch.config],
                stdin=subprocess.DEVNULL if on_output is None else subprocess.PIPE,
                stdout=subprocess.DEVNULL if on_output is None else subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Its own session: Ctrl-C in the terminal is for the supervisor to handle.
                start_new_session=True,
                env=environment,
                pass_fds=() if theirs is None else (theirs.fileno(),),
            )
        if theirs is not None:
            theirs.close()
        self.beats = None if beats is None else _BeatSocket(beats, self._process.pid, launch.stuck_s)
        self.watch = None if self.beats is None else self.beats.watch
        if launch.stuck_s and launch.optional:
            self.watch = ProcessWatch(self._process.pid, launch.stuck_s, None)
        self._on_line = on_line
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        assert self._process.stderr is not None
        self._readers = [_LineReader(self._process.stderr.fileno(), self._on_stderr_line)]
        if on_output is not None:
            assert self._process.stdout is not None and self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            self._readers.append(_LineReader(self._process.stdout.fileno(), on_output))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """Whether the process itself has ended; what it started, and its output, may be left."""
        return self._process.returncode is not None

    def signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        if not self.ended.done():
            self._process.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """Send SIGTERM, and SIGKILL after ``grace_s``; returns the exit status."""
        if self.launch.optional:
            # At idle priority it would get no core to end on while others are busy.
            with suppress(OSError):
                os.sched_setscheduler(self.pid, os.SCHED_OTHER, os.sched_param(0))
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(asyncio.shield(self.ended), grace_s)
        except TimeoutError:
            _log.warning("%s did not stop within %.1f s: killed", self.launch.name, grace_s)
            self.signal(signal.SIGKILL)
            return await self.ended

    def write(self, line: bytes) -> None:
        """Write a line to its stdin; dropped if it does not read, or has ended."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), line + b"\n")

    def _on_stderr_line(self, line: str) -> None:
        self.tail.append(line)
        self._on_line(line)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        for reader in self._readers:
            reader.close()
        if self.beats is not None:
            self.beats.close()
        for stream in (self._process.stderr, self._process.stdout, self._process.stdin):
            if stream is not None:
                stream.close()
        # In a thread: a large process takes long to end.
        ended = self._loop.run_in_executor(None, end_offspring, self.pid)
        ended.add_done_callback(lambda _: self.ended.set_result(status))


class _BeatSocket:
    """The socket over which a child is sent beats and returns them, with the child's watchdog."""

    def __init__(self, beats: socket.socket, pid: int, limit_s: float) -> None:
        self._beats = beats
        self._loop = asyncio.get_running_loop()
        self.watch = ProcessWatch(pid, limit_s, self._send)
        beats.setblocking(False)  # noqa: FBT003 - the socket's own word
        self._loop.add_reader(beats.fileno(), self._read)

    def close(self) -> None:
        """Close the socket: the child has ended."""
        self._loop.remove_reader(self._beats.fileno())
        self._beats.close()

    def _send(self) -> None:
        with suppress(OSError):  # the child is ending, which its pidfd reports
            self._beats.send(BEAT)

    def _read(self) -> None:
        try:
            data = self._beats.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.watch.beat_received()
        else:
            self._loop.remove_reader(self._beats.fileno())


class _LineReader:
    """Reads a pipe line by line; bytes that are not UTF-8 become escapes."""

    def __init__(self, fd: int, on_line: OnLine) -> None:
        self._fd = fd
        self._on_line = on_line
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def close(self) -> None:
        """Deliver what is left, and stop. The caller closes the pipe."""
        while self._read():
            pass
        self._loop.remove_reader(self._fd)
        if self._rest:
            self._on_line(self._rest.decode(errors="backslashreplace"))

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._fd)
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode(errors="backslashreplace"))
        if len(self._rest) > LINE_MAX:
            self._on_line(self._rest.decode(errors="backslashreplace"))
            self._rest = b""
        return True


class _Kept:
    """A child that is kept running: its present run, None between two, and what is known of those before."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.child: Child | None = None
        self.backoff = Backoff()
        self.tail: list[str] = []  # the last lines of the run before
        self.task: asyncio.Task[None] | None = None  # restarts it

    async def stop(self, grace_s: float) -> None:
        self.abandon()
        if self.child is not None:
            await self.child.stop(grace_s)

    def abandon(self) -> None:
        if self.task is not None:
            self.task.cancel()


def to_stderr(line: str) -> None:
    """Write a line of another process, made printable: a model may have written anything."""
    sys.stderr.write("\t".join(printable(part, LINE_MAX) for part in line.split("\t")) + "\n")


class Supervisor:
    """Starts children, and restarts each that dies or, if it is watched, returns no heartbeats.

    ``unresponsive`` counts, by name, how often a child was killed because it returned no heartbeats.
    """

    def __init__(
        self, on_line: OnLine, on_end: Callable[[str, int], None] = lambda name, status: None
    ) -> None:
        """``on_end`` gets the name and exit status of each child that ended by itself."""
        self.unresponsive: Counter[str] = Counter()
        self._on_line = on_line
        self._on_end = on_end
        self._ticks: asyncio.TimerHandle | None = None  # while any child is watched
        self._ticked_s = 0.0
        self._kept: dict[str, _Kept] = {}

    def start(self, launch: Launch) -> None:
        """Start a child, and restart it whenever it ends, until :meth:`stop`."""
        assert launch.name not in self._kept, launch.name
        kept = self._kept[launch.name] = _Kept(launch)
        kept.task = asyncio.get_running_loop().create_task(self._keep(kept, self._run(kept)))

    def pid(self, name: str) -> int | None:
        """The process id of a child; None while it does not run."""
        child = self._child(name)
        return None if child is None else child.pid

    def started(self, prefix: str) -> int:
        """How many children whose names have this prefix run, and have started as far as is known."""
        children = [self._child(name) for name in self._kept if name.startswith(prefix)]
        return sum(child is not None and (child.watch is None or child.watch.started) for child in children)

    def end(self, name: str) -> bool | None:
        """Kill a child, which is then restarted; None if it does not run.

        Returns whether it was running: false if it had been stopped by a signal, such as SIGSTOP.
        """
        child = self._child(name)
        if child is None:
            return None
        seen = read_thread_state(child.pid)
        ran = seen is None or not seen.stopped
        child.signal(signal.SIGKILL)
        return ran

    @property
    def names(self) -> list[str]:
        """All children that are kept running, in order of their start."""
        return list(self._kept)

    def why_failing(self) -> str | None:
        """A message about a child that keeps failing, with its last lines; None if there is none."""
        for name, kept in self._kept.items():
            if kept.backoff.keeps_failing and not kept.launch.optional:
                said = "\n".join(kept.tail)
                return f"{name} cannot run: it ends as soon as it starts; it said:\n{said}"
        return None

    def reset_backoff(self, prefix: str) -> None:
        """Reset the restart delay of children whose names have this prefix: why they died was resolved."""
        for name, kept in self._kept.items():
            if name.startswith(prefix):
                kept.backoff.fast_deaths = 0

    async def stop(self, name: str, grace_s: float) -> None:
        """Stop one child, and do not restart it."""
        if (kept := self._kept.pop(name, None)) is not None:
            await kept.stop(grace_s)

    async def kill(self) -> None:
        """Kill all children, and return when they have ended."""
        if self._ticks is not None:
            self._ticks.cancel()
            self._ticks = None
        for kept in self._kept.values():
            kept.abandon()
        children = [kept.child for kept in self._kept.values() if kept.child is not None]
        self._kept.clear()
        for child in children:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*(child.ended for child in children))

    def _child(self, name: str) -> Child | None:
        kept = self._kept.get(name)
        # One that exited is kept until all that it started has ended; by then its process id may be reused.
        return None if kept is None or kept.child is None or kept.child.exited else kept.child

    def _run(self, kept: _Kept) -> Child:
        child = kept.child = Child(kept.launch, self._on_line)
        if child.watch is not None and self._ticks is None:
            self._ticked_s = time.monotonic()
            self._ticks = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        _log.debug("%s started", kept.launch.name, extra={"pid": child.pid})
        return child

    def _tick(self) -> None:
        self._ticks = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        now_s = time.monotonic()
        paused = now_s - self._ticked_s > TICK_S + GAP_S
        self._ticked_s = now_s
        for name, kept in self._kept.items():
            child = kept.child
            if child is None or child.watch is None or not (why := child.watch.tick(paused=paused)):
                continue
            self.unresponsive[name] += 1
            _log.error("%s does not answer: %s; it is ended", name, why, extra={"pid": child.pid})
            child.signal(signal.SIGKILL)
            child.watch.beat_received()  # so that it is not reported again while it ends

    async def _keep(self, kept: _Kept, child: Child) -> None:
        name, backoff = kept.launch.name, kept.backoff
        while True:
            status = await asyncio.shield(child.ended)
            kept.child, kept.tail = None, list(child.tail)
            self._on_end(name, status)
            delay_s = backoff.died(time.monotonic() - child.started_s, status)
            _log.error(
                "%s ended: %s; %s", name, describe_exit(status),
                "restarting" if delay_s == 0 else f"restarting in {delay_s:.1f} s",
                extra={"pid": child.pid, "fast_deaths": backoff.fast_deaths},
            )  # fmt: skip
            if backoff.fast_deaths == FAST_DEATHS:
                _log.critical("%s keeps ending at once; see its messages above", name)
            if delay_s:
                await asyncio.sleep(delay_s)
            child = self._run(kept)


def crashed(status: int) -> bool:
    """Whether a process crashed by a fault of what it ran.

    False if another process killed it, or if it ended itself with ``EXIT_BROKEN`` or ``EXIT_CONFIG``.
    """
    return -status in FAULTS if status < 0 else status not in (EXIT_BROKEN, EXIT_CONFIG)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


# ------------------------------------------------------------
# The processes of a server, and the configuration of each.


OBSERVER: Final = "clockwork_serve.apps.observer"  # its module, which no part of the server needs


def launches(config: ServerConfig, run_dir: Path, port_by_name: Mapping[str, int]) -> list[Launch]:
    """The long-running child processes: controllers, workers, gateways, observer, a bridge to other machines.

    Workers have no watchdog here: the controller watches them, for it knows how long their actions may take.
    The observer returns no heartbeats: it waits for a core as long as others need it. Raises
    :class:`ConfigError`.
    """
    settings, place = config.settings, str(run_dir)
    of_workers = workers_of(config.devices)
    pins, rest = pinned_cores(settings, len(of_workers))
    alone = not config.devices
    brain = structs.replace(config.controller, expected_devices=max(1, len(config.devices)))
    controllers = []
    for number in range(settings.controllers):
        name = f"controller-{number}" if number else "controller"
        controller = ControllerProcessConfig(
            run_dir=place, name=name, settings=settings, controller=brain, shared=alone
        )
        controllers.append(Launch.of(name, "controller", controller, settings.stuck_s, rest))
    workers = []
    for (name, devices), cpus in zip(of_workers, pins, strict=True):
        worker = WorkerConfig(run_dir=place, name=name, settings=settings, devices=devices)
        workers.append(Launch.of(name, "worker", worker, cpus=cpus))
    bridges = []
    if settings.listen_machines:
        kinds = tuple(dict.fromkeys(profile_kind(device) for device in config.devices))
        bridge = BridgeConfig(run_dir=place, settings=settings, kinds=kinds, shared=alone)
        bridges.append(Launch.of("bridge", "bridge", bridge, settings.stuck_s, rest))
    gateways = []
    if not alone or port_by_name:
        gateways = gateway_launches(settings, run_dir, port_by_name, cpus=rest, metrics_only=alone)
    observers = []
    if settings.journal_path(place) is not None:
        observed = msgspec.json.encode(ObserverConfig(run_dir=place, settings=settings)).decode()
        observers.append(
            Launch(
                name="observer", module=OBSERVER, config=observed, cpus=rest, optional=True,
                stuck_s=settings.stuck_s,
            )
        )  # fmt: skip
    return [*controllers, *workers, *gateways, *bridges, *observers]


def workers_of(devices: tuple[DeviceConfig, ...]) -> list[tuple[str, tuple[DeviceConfig, ...]]]:
    """Names of workers and their devices: one process per device, but one for all emulated devices.

    An emulated device with ``apart`` set has a process of its own.
    """
    emulated = tuple(device for device in devices if device.kind == "emulated" and not device.apart)
    workers: list[tuple[str, tuple[DeviceConfig, ...]]]
    workers = [(f"worker-{each.device}", (each,)) for each in devices if each not in emulated]
    return [*workers, ("worker-emulated", emulated)] if emulated else workers


def pinned_cores(settings: Settings, workers: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The CPUs of each worker, from the last one down, and those of all other processes; empty: any.

    Raises :class:`ConfigError` if ``isolate`` asks for them and there are too few.
    """
    if not (settings.has_own_cores and workers):
        return [()] * workers, ()
    cpus = sorted(os.sched_getaffinity(0), reverse=True)
    if len(cpus) <= workers:
        raise ConfigError(
            f"isolate: expected more than {workers} cores for {workers} workers; found {len(cpus)}; "
            "leave it out"
        )
    each = (len(cpus) - 1) // workers
    pins = [tuple(sorted(cpus[number * each : (number + 1) * each])) for number in range(workers)]
    return pins, tuple(sorted(cpus[workers * each :]))


def gateway_launches(
    settings: Settings, run_dir: Path, port_by_name: Mapping[str, int], machine: str = "",
    cpus: tuple[int, ...] = (), *, metrics_only: bool = False,
) -> list[Launch]:  # fmt: skip
    """The gateways of one machine, named ``gateway-0`` and so on.

    ``machine`` is the prefix of their names, and is given where they join a server on another machine.
    ``metrics_only``: they serve no clients.
    """
    prefix = f"{machine}." if machine else ""
    names = ("metrics_port",) if metrics_only else tuple(settings.ports)
    ports = {name: port_by_name.get(name) for name in names}
    launches = []
    for number in range(settings.gateways):
        # Each gateway has its own counters, so only the first one serves the page of metrics.
        own = ports if number == 0 else ports | {"metrics_port": None}
        config = GatewayConfig(
            run_dir=str(run_dir), name=f"{prefix}gateway-{number}", number=number, reuse_port=True,
            settings=structs.replace(settings, **own), elsewhere=bool(machine), metrics_only=metrics_only,
        )  # fmt: skip
        launches.append(Launch.of(config.name, "gateway", config, settings.stuck_s, cpus))
    return launches


# ------------------------------------------------------------
# Health probes of our own gateways, as a client would send them.


_PROBE_TIMEOUT_S: Final = 2.0
_REQUEST: Final = b"GET /v2/health/ready HTTP/1.1\r\nHost: supervisor\r\nConnection: close\r\n\r\n"


async def listens(host: str, port: int, *, ready: bool = False) -> bool:
    """Whether connections are accepted at that address; ``ready``: and a gateway there says it is ready."""
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(reachable(host), port)
            try:
                if not ready:
                    return True
                writer.write(_REQUEST)
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def reachable(host: str) -> str:
    """The address at which to reach a listener: the loopback address for a wildcard."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
