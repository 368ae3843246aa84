"""Keeps processes running that join a server elsewhere; what they are for it does not know."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import uvloop

from clockwork_serve.errors import ClockworkError
from clockwork_serve.serve.supervisor import Launch, Supervisor

LOOK_S: Final = 0.1


class ChildrenEnded(ClockworkError):
    """One cannot run, or the server does not take it; the message holds its last words."""


def run(launches: Callable[[Path], Sequence[Launch]], drain_s: float) -> int:
    """Run these, given a private folder, until SIGTERM or SIGINT; the exit status. For the main thread.

    A second signal ends them at once. Raises :class:`ChildrenEnded` if one cannot run or is not let in.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="clockwork-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    try:
        return uvloop.run(_run(launches(run_dir), drain_s))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


async def _run(launches: Sequence[Launch], drain_s: float) -> int:
    loop = asyncio.get_running_loop()
    signals: deque[int] = deque()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal(number: int) -> None:
        signals.append(number)
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    supervisor = Supervisor(_to_stderr)
    try:
        for launch in launches:
            supervisor.start(launch)
        while not first.is_set():
            if (why := supervisor.hopeless()) is not None:
                raise ChildrenEnded(why)
            with suppress(TimeoutError):
                await asyncio.wait_for(first.wait(), LOOK_S)
        insisted = asyncio.ensure_future(second.wait())
        together = asyncio.gather(*[supervisor.stop(name, drain_s) for name in supervisor.names])
        await asyncio.wait((insisted, together), return_when=asyncio.FIRST_COMPLETED)
        insisted.cancel()
        if together.done():
            return 0
        together.cancel()
        return 128 + signals[-1]
    finally:
        await supervisor.kill()


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
