"""Child processes, restarted when they die; it does not know what they are for.

All methods are for one loop's own thread, which must live as long as the children: the kernel ends them when
the thread that started them ends.
"""

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
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.serve.child import BEAT, BEATS_FD_VARIABLE, EXIT_BROKEN, EXIT_CONFIG, KEEPER_PID_VARIABLE
from clockwork_serve.serve.watchdog import GAP_S, TICK_S, ProcessWatch, look_at
from clockwork_serve.units import KIB

FAST_S: Final = 5.0
"""A child that lived for less was never well."""
FAST_DEATHS: Final = 5
"""So many in a row, and restarting it again soon will not help."""
RETRY_S: Final = 0.1
RETRY_S_MAX: Final = 30.0
TAIL_LINES: Final = 40
LINE_MAX: Final = 64 * KIB
"""A longer line of a child comes in pieces: a model may write without an end."""
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
"""Signals that a process gets for what it did."""

_log = logging.getLogger(__name__)

OnLine = Callable[[str], None]


class Launch(Struct, frozen=True, kw_only=True):
    """What to run: ``python -m module config``, under a ``name`` for logs.

    One that does not answer for ``silence_s`` is ended, to be started again; 0: it is not watched.
    """

    name: str
    module: str
    config: str
    silence_s: float = 0.0

    @classmethod
    def of(cls, name: str, kind: str, config: object, silence_s: float = 0.0) -> Launch:
        """One of ours: ``controller``, ``worker``, ``gateway``, ..., whose configuration is sent as JSON."""
        return cls(
            name=name,
            module=f"clockwork_serve.serve.{kind}_process",
            config=msgspec.json.encode(config).decode(),
            silence_s=silence_s,
        )


class Backoff:
    """How long to wait before a restart: not at all at first, then longer with each fast death in a row."""

    def __init__(self) -> None:
        self.fast_deaths = 0

    def died(self, lived_s: float, status: int = 0) -> float:
        """Seconds to wait, given how long the child lived and its exit status."""
        self.fast_deaths = self.fast_deaths + 1 if lived_s < FAST_S else 0
        if status == EXIT_CONFIG:
            # It said itself that trying again is of no use.
            self.fast_deaths = max(self.fast_deaths, FAST_DEATHS)
        if self.fast_deaths <= 1:
            return 0.0
        return float(min(RETRY_S_MAX, RETRY_S * 2 ** (self.fast_deaths - 2)))

    @property
    def hopeless(self) -> bool:
        """Whether it died so often so fast that a person should look."""
        return self.fast_deaths >= FAST_DEATHS


class Child:
    """One run of one program: its process, the last lines it wrote, and word of its end."""

    def __init__(self, launch: Launch, on_line: OnLine, on_output: OnLine | None = None) -> None:
        """Start it. ``on_line`` gets each line of its stderr, ``on_output`` of its stdout."""
        self.launch = launch
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.started_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        beats, theirs = socket.socketpair() if launch.silence_s else (None, None)
        environment = {**os.environ, KEEPER_PID_VARIABLE: str(os.getpid())}
        if theirs is not None:
            environment[BEATS_FD_VARIABLE] = str(theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", launch.module, launch.config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if on_output is None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Its own session: Ctrl-C in the terminal is the keeper's to handle.
            start_new_session=True,
            env=environment,
            pass_fds=() if theirs is None else (theirs.fileno(),),
        )
        if theirs is not None:
            theirs.close()
        self.pulse = None if beats is None else _Pulse(beats, self._process.pid, launch.silence_s)
        self._on_line = on_line
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        assert self._process.stderr is not None
        self._readers = [_LineReader(self._process.stderr.fileno(), self._heard)]
        if on_output is not None:
            assert self._process.stdout is not None
            self._readers.append(_LineReader(self._process.stdout.fileno(), on_output))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if not self.ended.done():
            self._process.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """Ask it to end, insist after ``grace_s``; its exit status."""
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(asyncio.shield(self.ended), grace_s)
        except TimeoutError:
            _log.warning("%s did not stop within %.1f s: killed", self.launch.name, grace_s)
            self.signal(signal.SIGKILL)
            return await self.ended

    def _heard(self, line: str) -> None:
        self.tail.append(line)
        self._on_line(line)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        for reader in self._readers:
            reader.close()
        if self.pulse is not None:
            self.pulse.close()
        for stream in (self._process.stderr, self._process.stdout):
            if stream is not None:
                stream.close()
        self.ended.set_result(status)


class _Pulse:
    """Beats to a child, and those that it returns."""

    def __init__(self, beats: socket.socket, pid: int, limit_s: float) -> None:
        self._beats = beats
        self._loop = asyncio.get_running_loop()
        self.watch = ProcessWatch(pid, limit_s, self._send)
        beats.setblocking(False)  # noqa: FBT003 - the socket's own word
        self._loop.add_reader(beats.fileno(), self._read)

    def close(self) -> None:
        """The child is gone."""
        self._loop.remove_reader(self._beats.fileno())
        self._beats.close()

    def _send(self) -> None:
        with suppress(OSError):  # it ends, which is noticed elsewhere
            self._beats.send(BEAT)

    def _read(self) -> None:
        try:
            data = self._beats.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.watch.heard()
        else:
            self._loop.remove_reader(self._beats.fileno())


class _LineReader:
    """Lines of a pipe, as they come; bytes that are not text are shown as escapes."""

    def __init__(self, fd: int, on_line: OnLine) -> None:
        self._fd = fd
        self._on_line = on_line
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def close(self) -> None:
        """Deliver what is left and stop; the pipe is the caller's to close."""
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


class Supervisor:
    """Keeps children running until they are stopped, and answering if they are watched.

    ``unanswering`` counts, by name, how often one was ended because it did not answer.
    """

    def __init__(
        self, on_line: OnLine, on_end: Callable[[str, int], None] = lambda name, status: None
    ) -> None:
        """``on_end`` gets the name and exit status of each child that ended by itself."""
        self.unanswering: Counter[str] = Counter()
        self._on_line = on_line
        self._on_end = on_end
        self._ticks: asyncio.TimerHandle | None = None  # while any child is watched
        self._ticked_s = 0.0
        self._children: dict[str, Child] = {}  # all and only those that run, by name
        self._backoffs: dict[str, Backoff] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._tails: dict[str, list[str]] = {}  # last words of each child that died

    def start(self, launch: Launch) -> None:
        """Run it, and again whenever it ends, until :meth:`stop`."""
        assert launch.name not in self._watches, launch.name
        self._backoffs[launch.name] = Backoff()
        self._run(launch)
        self._watches[launch.name] = asyncio.get_running_loop().create_task(self._keep(launch))

    def pid(self, name: str) -> int | None:
        """Of a child that runs now."""
        child = self._children.get(name)
        return None if child is None else child.pid

    def end(self, name: str) -> bool | None:
        """Have the kernel end a child, which is started again; None if it does not run.

        Whether it was running until then: false of one that somebody had stopped, as by SIGSTOP.
        """
        child = self._children.get(name)
        if child is None:
            return None
        seen = look_at(child.pid)
        ran = seen is None or not seen.stopped
        child.signal(signal.SIGKILL)
        return ran

    @property
    def names(self) -> list[str]:
        """All children that are kept running, in order of their start."""
        return list(self._watches)

    def hopeless(self) -> str | None:
        """What a person should know about a child that keeps dying at once; None if there is none."""
        for name, backoff in self._backoffs.items():
            if backoff.hopeless:
                said = "\n".join(self._tails.get(name, []))
                return f"{name} cannot run: it ends as soon as it starts; it said:\n{said}"
        return None

    def forgive(self, prefix: str) -> None:
        """What children whose names begin so died of is over: the next death is their first."""
        for name, backoff in self._backoffs.items():
            if name.startswith(prefix):
                backoff.fast_deaths = 0

    async def stop(self, name: str, grace_s: float) -> None:
        """End one child for good."""
        watch = self._watches.pop(name, None)
        if watch is not None:
            watch.cancel()
        child = self._children.pop(name, None)
        if child is not None:
            await child.stop(grace_s)

    async def kill(self) -> None:
        """End all at once, and return when they are gone."""
        if self._ticks is not None:
            self._ticks.cancel()
            self._ticks = None
        for watch in self._watches.values():
            watch.cancel()
        self._watches.clear()
        children = list(self._children.values())
        self._children.clear()
        for child in children:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*(child.ended for child in children))

    def _run(self, launch: Launch) -> Child:
        child = Child(launch, self._on_line)
        self._children[launch.name] = child
        if child.pulse is not None and self._ticks is None:
            self._ticked_s = time.monotonic()
            self._ticks = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        _log.debug("%s started", launch.name, extra={"pid": child.pid})
        return child

    def _tick(self) -> None:
        self._ticks = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        now_s = time.monotonic()
        paused = now_s - self._ticked_s > TICK_S + GAP_S
        self._ticked_s = now_s
        for name, child in self._children.items():
            if child.pulse is None or not (why := child.pulse.watch.tick(paused=paused)):
                continue
            self.unanswering[name] += 1
            _log.error("%s does not answer: %s; it is ended", name, why, extra={"pid": child.pid})
            child.signal(signal.SIGKILL)
            child.pulse.watch.heard()  # it ends once

    async def _keep(self, launch: Launch) -> None:
        backoff = self._backoffs[launch.name]
        child = self._children[launch.name]
        while True:
            status = await asyncio.shield(child.ended)
            self._children.pop(launch.name, None)
            self._tails[launch.name] = list(child.tail)
            self._on_end(launch.name, status)
            delay_s = backoff.died(time.monotonic() - child.started_s, status)
            _log.error(
                "%s ended: %s; %s",
                launch.name,
                describe_exit(status),
                "restarting" if delay_s == 0 else f"restarting in {delay_s:.1f} s",
                extra={"pid": child.pid, "fast_deaths": backoff.fast_deaths},
            )
            if backoff.fast_deaths == FAST_DEATHS:
                _log.critical("%s keeps ending at once; see its messages above", launch.name)
            if delay_s:
                await asyncio.sleep(delay_s)
            child = self._run(launch)


def crashed(status: int) -> bool:
    """Whether what a process ran ended it: nobody else did, and not its own code for a reason of its own."""
    return -status in FAULTS if status < 0 else status not in (EXIT_BROKEN, EXIT_CONFIG)


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
