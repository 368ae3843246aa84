"""What a process of the server starts ends with it, whatever it is: each carries a mark that is inherited.

The mark is a limit of the process, the soft one of file locks: Linux has not applied it since 2.4.25, and
hands it on through ``fork``, ``setsid`` and ``exec``, with any environment. It names the family, which is all
that one supervisor started, and the process of the server that the others descend from.

Also the program of the guard, which ends the family when its supervisor was killed. For that it is run by a
bare interpreter, so this imports nothing but the standard library, and of that little.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

FAMILY_VARIABLE: Final = "CLOCKWORK_FAMILY"  # set for a child: the family whose mark it is to carry
GIVE_UP_S: Final = 5.0
"""How long to wait for the end of processes that were killed: the kernel may be unable to end one."""
_RLIMIT_LOCKS: Final = 10
_PR_SET_PDEATHSIG: Final = 1
_FAMILY_BYTES: Final = 5
_PID_BITS: Final = 22  # the kernel's PID_MAX_LIMIT
_NOT_FOR_GUARDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Sent to every process of the server at its end, and the family is not to be ended before the others."""
_CHECK_S: Final = 0.005
_RESTART_S: Final = 0.1

_log = logging.getLogger(__name__)
_families: dict[int, int] = {}
"""The family of this process, by its pid: a fork of it, in which nothing of ours runs, has none."""


def join_family() -> None:
    """Mark this process, and so whatever it starts, as the environment says. To be called at its begin."""
    family = os.environ.pop(FAMILY_VARIABLE, None)
    if family is None:
        return
    pid = os.getpid()
    _families[pid] = int(family)
    _, hard = resource.getrlimit(_RLIMIT_LOCKS)
    try:
        resource.setrlimit(_RLIMIT_LOCKS, (_mark(int(family), pid), hard))
    except (OSError, ValueError) as error:
        _log.warning(
            "what models start may outlive their process: expected no hard limit of file locks (ulimit -Hx), "
            "found %d (%s); remove that limit", hard, error,
        )  # fmt: skip


def family() -> int:
    """The family of this process and its children; at first it is founded, and a guard started for it."""
    pid = os.getpid()
    if pid not in _families:
        number = _families[pid] = int.from_bytes(os.urandom(_FAMILY_BYTES), sys.byteorder)
        threading.Thread(target=_keep_guard, args=(number, pid), name="guard", daemon=True).start()
    return _families[pid]


def end_offspring(pid: int) -> None:
    """Kill what a child of this process, which has ended, has started; returns when all of it has ended."""
    mark = _mark(family(), pid)
    _end(lambda found: found == mark)


def _mark(number: int, pid: int) -> int:
    return number << _PID_BITS | pid


def _end(wanted: Callable[[int], bool]) -> None:
    give_up_s = time.monotonic() + GIVE_UP_S
    # Again, until there is none: while one is found, another may start one more.
    while found := [pid for pid in _pids() if _has(pid, wanted)]:
        for pid in found:
            _kill(pid, wanted)
        if time.monotonic() > give_up_s:
            _log.error("processes %s do not end although they were killed", found)
            return
        time.sleep(_CHECK_S)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - a fifth of the time


def _has(pid: int, wanted: Callable[[int], bool]) -> bool:
    """Whether a process that has not ended has such a mark."""
    try:
        if not wanted(resource.prlimit(pid, _RLIMIT_LOCKS)[0]):
            return False
        # A name may hold blanks and brackets; what follows its last bracket is fields 3 and on (proc(5)).
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):  # it has ended, or belongs to somebody else
        return False


def _kill(pid: int, wanted: Callable[[int], bool]) -> None:
    with suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            # Asked again: now the id cannot become another process's before the signal is sent.
            if _has(pid, wanted):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


# ------------------------------------------------------------
# The guard: a process that waits for the end of its supervisor, and then ends the family. What the supervisor
# itself started dies with it in any case, by the kernel; this is for what those processes started.


def _keep_guard(number: int, pid: int) -> None:
    """Run a guard for this process, and another one whenever it ends."""
    command = [sys.executable, "-I", "-S", __file__, str(number), str(pid)]
    # A child inherits what is blocked in this thread: the guard is not ended while its interpreter starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_GUARDS)
    while True:
        started_s = time.monotonic()
        try:
            # A session of its own: it does not end with the supervisor's process group.
            guard = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            _log.warning("what models start may outlive a server that is killed: no guard: %s", error)
            return
        guard.wait()
        if time.monotonic() - started_s < _RESTART_S:
            time.sleep(_RESTART_S)


def main(argv: Sequence[str]) -> int:
    """Guard the family ``argv[1]`` of the supervisor with pid ``argv[2]``; returns the exit status."""
    for number in _NOT_FOR_GUARDS:
        signal.signal(number, signal.SIG_IGN)
    # It may have been stopped with the whole server, which is then killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)
    own, pid = int(argv[1]), int(argv[2])
    with suppress(ProcessLookupError):
        supervisor = os.pidfd_open(pid)
        if os.getppid() == pid:
            select.select((supervisor,), (), ())
    _end(lambda found: found >> _PID_BITS == own)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
