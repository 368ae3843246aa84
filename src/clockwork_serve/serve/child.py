"""What every child process does first and how it ends; what it is for is not known here."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

import uvloop

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.logs import UnblockedHandler, configure

KEEPER_PID_VARIABLE: Final = "CLOCKWORK_KEEPER_PID"
"""Set by the keeper for its children: who must be their parent."""
BEATS_FD_VARIABLE: Final = "CLOCKWORK_BEATS_FD"
"""Set by the keeper for a child that it watches: the socket on which beats come, to be returned."""
BEAT: Final = b"."
EXIT_BROKEN: Final = 70
"""Exit status of a process whose invariant broke (sysexits' EX_SOFTWARE)."""
EXIT_CONFIG: Final = 78
"""Exit status where a setting or the host does not allow to start (sysexits' EX_CONFIG)."""

_PR_SET_PDEATHSIG: Final = 1
_log = logging.getLogger(__name__)


def prepare(process: str, log_level: str, log_format: str) -> None:
    """Log under this name, die with the keeper, and leave Ctrl-C to it."""
    # The keeper reads what is logged; it may be stopped, and that is to stop nobody else.
    configure(process, log_level, log_format, UnblockedHandler(sys.stderr.fileno()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    keeper_pid = os.environ.get(KEEPER_PID_VARIABLE)
    # The keeper may have died before prctl took effect.
    if keeper_pid is not None and os.getppid() != int(keeper_pid):
        sys.exit("the keeper is gone")


def run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run ``main(stop)`` on uvloop; SIGTERM sets ``stop``. An error that nobody caught ends the process.

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
    except Exception:  # noqa: BLE001 - nobody above could log it
        _log.critical("ended by an error", exc_info=True)
        return EXIT_BROKEN
    return 0


def answer_beats() -> None:
    """From now on the running loop returns the keeper's beats, if there are any: start-up is over.

    Who does not return them for long is ended: nothing else may answer for the loop.
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
        if not data:  # the keeper is gone, and this process soon
            loop.remove_reader(beats.fileno())
            beats.close()

    loop.add_reader(beats.fileno(), answer)


def _end_if_broken(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if error is None or isinstance(error, OSError):
        # A connection broke; its protocol hears of it.
        _log.warning("%s: %s", context.get("message"), error)
        return
    _log.critical("%s", context.get("message"), exc_info=error)
    logging.shutdown()
    # Not sys.exit: belief is wrong, so nothing of it may be acted on any more, not even in clean-up.
    os._exit(EXIT_BROKEN)
