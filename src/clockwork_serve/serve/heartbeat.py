"""Beats that the process at the other end of a link returns at once while its loop runs.

Silence is counted in ticks, not by a clock: who itself was stopped has heard nobody. What silence means is
for others to decide. A worker without work would otherwise be found hung by a request that misses its
deadline, and the server be ready until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from clockwork_serve.messages import Beat, WorkerHeard, WorkerHung, WorkerSilent
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import NS_PER_S

BEAT_S: Final = 0.35
MISSED: Final = 4
"""Who has not returned a beat by so many ticks is silent: 1.4 to 1.75 s after it stopped."""

PULSE_S: Final = 0.25
PULSES_MISSED: Final = 5
"""A process that serves others is missed sooner: 1.25 to 1.5 s after it stopped."""

_log = logging.getLogger(__name__)


class Pulse:
    """Whether one process answers. ``send`` sends it a beat; ``changed`` is called when that changed."""

    def __init__(
        self, send: Callable[[Beat], None], changed: Callable[[], None], beat_s: float = PULSE_S
    ) -> None:
        self.silent = False
        self._send = send
        self._changed = changed
        self._beat_s = beat_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # None while nobody is there
        self._missed = -1  # ticks since a beat was sent and not returned; -1 if it was

    @property
    def silent_s(self) -> float:
        """For so long it has not answered, in ticks of ours."""
        return max(0, self._missed) * self._beat_s

    def begin(self) -> None:
        """It is there."""
        self.end()
        self._timer = self._loop.call_later(self._beat_s, self._tick)

    def end(self) -> None:
        """It is gone; nobody is silent then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._missed, self.silent = -1, False

    def heard(self) -> None:
        """It returned a beat."""
        self._missed = -1
        if self.silent:
            self.silent = False
            self._changed()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._beat_s, self._tick)
        if self._missed < 0:
            self._send(Beat())
        self._missed += 1
        if self._missed >= PULSES_MISSED and not self.silent:
            self.silent = True
            self._changed()


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
