"""Workers that run and never connect: stopped while the controller was replaced, or stuck before they joined.

The controller cannot miss whom it never met; who started them can. It ends them, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from clockwork_serve.errors import TransportError
from clockwork_serve.serve.supervisor import Supervisor

LOOK_S: Final = 5.0
MISSED: Final = 24
"""Who is missing so often in a row, for two minutes, will not come: torch and a GPU take less to start."""

_log = logging.getLogger(__name__)


async def end_missing(
    supervisor: Supervisor, ask_state: Callable[[], Awaitable[dict[str, Any]]], look_s: float = LOOK_S
) -> None:
    """For ever: ask the controller who is connected, and end workers that are not, for long."""
    missed: Counter[tuple[str, int]] = Counter()
    while True:
        await asyncio.sleep(look_s)
        try:
            connected = set((await ask_state())["workers"])
        except TransportError:
            continue  # there is no controller that they could connect to
        before, missed = missed, Counter()
        for name in supervisor.names:
            pid = supervisor.pid(name)
            if not name.startswith("worker") or name in connected or pid is None:
                continue
            missed[name, pid] = before[name, pid] + 1
            if missed[name, pid] >= MISSED:
                _log.error("%s runs and does not connect: it is ended", name, extra={"pid": pid})
                supervisor.end(name)
