"""How a process in the foreground is told to stop: the first SIGTERM or SIGINT asks, the next one insists."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


class Stopping:
    """Listens from when it is made, in the running loop, which is the main thread's."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self.signal = signal.SIGTERM
        """The last one."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)

    @property
    def status(self) -> int:
        """The exit status of who ends by it."""
        return 128 + self.signal

    def _heard(self, number: signal.Signals) -> None:
        self.signal = number
        (self.insisted if self.asked.is_set() else self.asked).set()


async def unless(event: asyncio.Event, coroutine: Coroutine[Any, Any, object]) -> bool:
    """Run ``coroutine`` to its end, unless ``event`` comes first: then it is cancelled, and False."""
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
