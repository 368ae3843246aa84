"""Beats that workers' processes return at once while they run; what silence means is the brain's to decide.

A worker without work would otherwise be found hung by a request that misses its deadline, and the server be
ready until then. Silence is counted in ticks, not by a clock: a controller that itself was stopped has heard
nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from clockwork_serve.messages import Beat, WorkerHeard, WorkerHung, WorkerSilent
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import NS_PER_S

BEAT_S: Final = 0.5
MISSED: Final = 4
"""Who has not returned a beat by so many ticks is silent: two seconds, as long as an action may be late."""

_log = logging.getLogger(__name__)


class Heartbeat:
    """Asks all workers now and then, and tells ``post`` who is silent and who is heard again."""

    def __init__(self, post: Callable[[WorkerSilent | WorkerHeard], None], beat_s: float = BEAT_S) -> None:
        self._post = post
        self._beat_s = beat_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # None while there is no worker
        self._missed: dict[Link, int] = {}
        """By worker's link: ticks since it was sent a beat that it has not returned; -1 if it has."""

    def watch(self, link: Link) -> None:
        """A worker connected."""
        self._missed[link] = -1
        if self._timer is None:
            self._timer = self._loop.call_later(self._beat_s, self._tick)

    def forget(self, link: Link) -> None:
        """It is gone."""
        self._missed.pop(link, None)

    def heard(self, link: Link) -> None:
        """It returned a beat."""
        if self._missed.get(link, -1) >= MISSED:
            self._post(WorkerHeard(worker=link.peer.name))
        if link in self._missed:
            self._missed[link] = -1

    def told(self, hung: WorkerHung, keeper: Link | None) -> None:
        """The brain says which worker hung, is to be ended, or is back."""
        if not hung.why:
            _log.warning("%s answers again", hung.worker)
        elif not hung.end:
            _log.error("%s hung: %s; nothing is planned on it", hung.worker, hung.why)
        else:
            _log.error("%s is ended: %s", hung.worker, hung.why)
            if keeper is not None:
                keeper.send(hung)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._beat_s, self._tick) if self._missed else None
        for link, missed in self._missed.items():
            if missed < 0:
                link.send(Beat())
            self._missed[link] = missed + 1
            if missed + 1 >= MISSED:
                for_ns = round((missed + 1) * self._beat_s * NS_PER_S)
                self._post(WorkerSilent(worker=link.peer.name, for_ns=for_ns))
