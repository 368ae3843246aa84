"""What all child processes share: logging to stderr, signals, heartbeats, exit, and trimming of memory."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop
from msgspec import Struct

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError, encodable, printable
from clockwork_serve.serve.offspring import FAMILY_VARIABLE, family, join_family
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# Structured logs of one process, to stderr: a line of JSON or of text per record.
#
# Fields beside the message come from ``extra``: ``log.warning("slow", extra={"request_id": "r1"})``.


LEVELS: Final = ("debug", "info", "warning", "error", "critical")
FORMATS: Final = ("text", "json")
WRITE_TIMEOUT_MS: Final = 10
"""How long to wait until the pipe has room for a line; not at all once a line had to be dropped."""

LINE_MAX: Final = 64 * KIB
"""Characters of one record, its traceback included: a message of a gigabyte may not block the process."""

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(
    process: str, level: str = "info", log_format: str = "text", handler: logging.Handler | None = None
) -> None:
    """Configure logging of this process to stderr, or by ``handler``; replaces what was configured before.

    Each record has the name of the ``process``.
    """
    if level not in LEVELS:
        raise ConfigError(f"log_level: expected one of {', '.join(LEVELS)}; found {level!r}")
    if log_format not in FORMATS:
        raise ConfigError(f"log_format: expected one of {', '.join(FORMATS)}; found {log_format!r}")
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class NonBlockingHandler(logging.Handler):
    """Writes to a pipe without blocking: while the reader does not read, lines are dropped, and counted.

    The reader may be stopped; that must not stop this process.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or drop it."""
        try:
            line = self.format(record)
            if self._dropped:
                line += f" (lines left out before: {self._dropped})"
            data = memoryview(f"{line}\n".encode(errors="backslashreplace"))
            while data:
                # A pipe that is ready for writing has room for PIPE_BUF bytes at least.
                if not self._poll.poll(0 if self._dropped else WRITE_TIMEOUT_MS):
                    self._dropped += 1
                    return
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
            self._dropped = 0
        except BaseException:  # noqa: BLE001 - a failure to log may not end the process
            self._dropped += 1


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "process", "logger", "message", ...fields}``, times in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": _truncated(record.getMessage()),
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = _traceback(record)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:
            texts = {name: encodable(str(value)) for name, value in line.items()}
            return msgspec.json.encode(texts).decode()


class TextFormatter(logging.Formatter):
    """``time level process: message key=value ...``, times local."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line; further lines of the message and the traceback follow, indented.

        Control characters are escaped: text of a client in it can neither forge a record nor move the cursor.
        """
        clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"
        line = f"{clock} {record.levelname.lower():7} {self._process}: {_truncated(record.getMessage())}"
        for name, value in fields_of(record).items():
            line += f" {name}={value}"
        if record.exc_info:
            line += f"\n{_traceback(record)}"
        return "\n  ".join(printable(part, LINE_MAX) for part in _truncated(line).split("\n"))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields given by ``extra``."""
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _traceback(record: logging.LogRecord) -> str:
    assert record.exc_info
    return _truncated("".join(traceback.format_exception(*record.exc_info)).rstrip())


def _truncated(text: str) -> str:
    return text if len(text) <= LINE_MAX else text[: LINE_MAX - 3] + "..."


# ------------------------------------------------------------
# Start and end of every child process.


SUPERVISOR_PID_VARIABLE: Final = "CLOCKWORK_SUPERVISOR_PID"
"""Set by the supervisor for its children: the process that must be their parent."""
BEATS_FD_VARIABLE: Final = "CLOCKWORK_BEATS_FD"
"""Set by the supervisor for a child that it watches: the socket on which it sends heartbeats."""
BEAT: Final = b"."
EXIT_BROKEN: Final = 70  # exit status of a process whose invariant broke (sysexits' EX_SOFTWARE)
EXIT_CONFIG: Final = 78
"""Exit status where a setting or the host does not allow to start (sysexits' EX_CONFIG)."""

_PR_SET_PDEATHSIG: Final = 1
_log = logging.getLogger(__name__)


class ObserverConfig(Struct, frozen=True, kw_only=True):
    """The observer's configuration."""

    run_dir: str
    settings: Settings = Settings()


ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Read when numpy is imported, which else makes a thread for each core; at the start each spins for some
70 ms. A lane computes in one thread, so models are measured in one, too, and no other process computes."""


def environment_of_child() -> dict[str, str]:
    """Our environment, with what a child needs to end with us: see :func:`prepare`.

    Numerical libraries have one thread, unless our environment says otherwise.
    """
    ours = {SUPERVISOR_PID_VARIABLE: str(os.getpid()), FAMILY_VARIABLE: str(family())}
    return {**ONE_THREAD, **os.environ, **ours}


def prepare(process: str, settings: Settings) -> None:
    """Configure logging under this name, die with the supervisor, and ignore SIGINT.

    To be called first; Ctrl-C is for the supervisor to handle.
    """
    # The supervisor reads the logs; if it is stopped, that must not block this process.
    configure(process, settings.log_level, settings.log_format, NonBlockingHandler(sys.stderr.fileno()))
    join_family()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    supervisor_pid = os.environ.get(SUPERVISOR_PID_VARIABLE)
    # The supervisor may have died before prctl took effect.
    if supervisor_pid is not None and os.getppid() != int(supervisor_pid):
        sys.exit("the supervisor has died")


def run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run ``main(stop)`` on uvloop; SIGTERM sets ``stop``. An uncaught error ends the process.

    Returns the exit status: 0, ``EXIT_CONFIG`` for a :class:`ConfigError`, or ``EXIT_BROKEN``.
    """

    async def body() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.set_exception_handler(_end_if_broken)
        await main(stop)

    try:
        uvloop.run(body())
    except ConfigError as error:
        _log.critical("%s", error)
        return EXIT_CONFIG
    except Exception:  # noqa: BLE001 - no caller could log it
        _log.critical("ended by an error", exc_info=True)
        return EXIT_BROKEN
    return 0


def freeze_live_objects(*thresholds: int) -> None:
    """Exempt all present objects from garbage collection: a full pass takes 0.2 us per object.

    Ours create few reference cycles, if any; for those of libraries and of users' models rare passes over
    young objects remain, at these ``thresholds`` of :func:`gc.set_threshold`.
    """
    gc.collect()
    gc.freeze()
    if thresholds:
        gc.set_threshold(*thresholds)


def answer_beats() -> None:
    """Have the running loop return the supervisor's heartbeats from now on, if it sends any.

    To be called at the end of start-up. The supervisor kills a process that does not return them, so only the
    loop itself may answer.
    """
    number = os.environ.pop(BEATS_FD_VARIABLE, None)
    if number is None:
        return
    beats = socket.socket(fileno=int(number))
    beats.set_inheritable(False)
    beats.setblocking(False)  # noqa: FBT003 - the socket's own word
    loop = asyncio.get_running_loop()

    def answer() -> None:
        try:
            data = beats.recv(64)
            if data:
                beats.send(data)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the supervisor has died, so this process is about to be killed
            loop.remove_reader(beats.fileno())
            beats.close()

    loop.add_reader(beats.fileno(), answer)


def _end_if_broken(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if error is None or isinstance(error, OSError):
        # A connection broke; its protocol handles that.
        _log.warning("%s: %s", context.get("message"), error)
        return
    _log.critical("%s", context.get("message"), exc_info=error)
    logging.shutdown()
    # Not sys.exit: the process's state is wrong, and must not be acted on any more, not even in clean-up.
    os._exit(EXIT_BROKEN)


# ------------------------------------------------------------
# Returns freed memory to the system that the C library keeps for reuse (``malloc_trim``).
#
# gRPC's core allocates in threads of its own, and what hostile clients make it free stays with those threads'
# arenas. Two gateways that had 33 MiB were sent 1,400 connections whose 200 calls were reset at once, twice
# (h2_rapid_reset of qa.hostile.frames): 22 s later the one that trims had 47 MiB, the other 151. Trimming
# takes a thread 3 to 9 ms, and allocations wait meanwhile; so it is not done for a small gain.
#
# Trimming leaves fragments: after 1,100 messages of benchmarks.heaviest a gateway held 159 MiB, most of it in
# the arenas of eight threads, and more after each hundred; with two arenas 46 MiB.


CHECK_INTERVAL_S: Final = 10.0
ARENAS: Final = 2
"""Heaps of the C library: what gRPC's threads free stays in pieces in the heap that each of them uses."""
_M_ARENA_MAX: Final = -8
MUCH_BYTES: Final = 16 * MIB
"""Memory is trimmed once the process has grown by this much since the last trim, and again while it holds as
much more than its least."""
LITTLE_BYTES: Final = MIB
"""A trim that frees no more is followed by a longer pause: of at most :data:`PAUSE_CHECKS` checks."""
PAUSE_CHECKS: Final = 6


class Trimmer:
    """Calls ``trim`` in a thread when the process has grown; ``held`` returns its private memory in bytes."""

    def __init__(self, trim: Callable[[], object], held: Callable[[], int]) -> None:
        self._trim = trim
        self._held = held
        self._least_bytes = self._kept_bytes = held()  # ever, and since the last trim
        self._pause = self._checks_left = 0

    async def run(self, interval_s: float = CHECK_INTERVAL_S) -> None:
        """Check periodically, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await self.check()

    async def check(self) -> None:
        """Trim, if the process has grown much since the last trim.

        Also, ever less often, while it holds much more than its least: what was in use may be free by now.
        """
        held_bytes = self._held()
        self._checks_left -= 1
        grown = held_bytes - self._kept_bytes > MUCH_BYTES
        if grown or (held_bytes - self._least_bytes > MUCH_BYTES and self._checks_left <= 0):
            await asyncio.to_thread(self._trim)
            self._kept_bytes = self._held()
            freed_bytes = held_bytes - self._kept_bytes
            self._pause = 1 if freed_bytes > LITTLE_BYTES else min(2 * self._pause + 1, PAUSE_CHECKS)
            self._checks_left = self._pause
        self._kept_bytes = min(self._kept_bytes, held_bytes)
        self._least_bytes = min(self._least_bytes, self._kept_bytes)


def limit_arenas() -> None:
    """Have this process's threads share :data:`ARENAS`, if the C library is glibc.

    To be called before there are any: those that threads have by then stay in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)


async def trim_memory() -> None:
    """Trim this process's memory until cancelled; return at once if the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        await Trimmer(lambda: trim(0), own_bytes).run()


def own_bytes() -> int:
    """Resident memory of this process that it does not share with others."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()
