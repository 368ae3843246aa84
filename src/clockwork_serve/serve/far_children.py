"""Keeps processes running that join a server elsewhere; what they are for it does not know."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import uvloop

from clockwork_serve.errors import ClockworkError
from clockwork_serve.serve.stopping import Stopping, unless
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
    stopping = Stopping()
    supervisor = Supervisor(_to_stderr)
    try:
        for launch in launches:
            supervisor.start(launch)
        while not stopping.asked.is_set():
            if (why := supervisor.hopeless()) is not None:
                raise ChildrenEnded(why)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.asked.wait(), LOOK_S)
        stopped = await unless(stopping.insisted, _stop(supervisor, drain_s))
        return 0 if stopped else stopping.status
    finally:
        await supervisor.kill()


async def _stop(supervisor: Supervisor, drain_s: float) -> None:
    await asyncio.gather(*[supervisor.stop(name, drain_s) for name in supervisor.names])


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
