"""Backpressure between gateways and the controller: credit for requests, and beats that show who is alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Final

from msgspec import structs

from clockwork_serve.messages import (
    Beat,
    Frame,
    Request,
    RequestCredit,
    WorkerHeard,
    WorkerHung,
    WorkerSilent,
)
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import NS_PER_S, ms

# ------------------------------------------------------------
# How many requests each gateway may have on their way here: what is heard within a few milliseconds.
#
# It computes what :class:`messages.Intake` announces, from how fast requests were heard of late, and nothing
# else: which requests wait, and which are refused, is for others.


DELAY_NS: Final = ms(2)
"""Requests on their way are heard within about so long, even when more come than can be heard."""
LEAST: Final = 32
"""So many may always be on their way, by all gateways together: a turn of a controller that is not busy."""
LEAST_EACH: Final = 16
MOST: Final = 4096
FIRST: Final = 256
WEIGHT: Final = 8
"""The mean is over about so many announcements."""


class _Pace:
    """Of one gateway: requests heard and not announced yet, and the mean time from one to the next."""

    __slots__ = ("gap_ns", "heard", "last_ns", "most")

    def __init__(self, now_ns: int) -> None:
        self.heard = 0
        self.most = FIRST
        self.gap_ns = DELAY_NS // FIRST
        self.last_ns = now_ns


class CreditIssuer:
    """Methods are for the loop's own thread."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._paces: dict[Link, _Pace] = {}

    def welcome(self, link: Link) -> None:
        """A gateway is there."""
        self._paces[link] = _Pace(self._clock())
        link.send(RequestCredit(heard=0, most=FIRST))

    def forget(self, link: Link) -> None:
        """It is gone."""
        self._paces.pop(link, None)

    def heard(self, link: Link, frames: Collection[Frame]) -> None:
        """Frames came; now and then the gateway is told, after the turn that they cause."""
        pace = self._paces.get(link)
        if pace is None:
            return
        pace.heard += _requests(frames)
        if 4 * pace.heard < pace.most:
            return
        now_ns = self._clock()
        gap_ns = (now_ns - pace.last_ns) // pace.heard
        pace.gap_ns += (gap_ns - pace.gap_ns) // WEIGHT
        least = max(LEAST_EACH, LEAST // len(self._paces))
        pace.most = min(MOST, max(least, DELAY_NS // max(1, pace.gap_ns)))
        link.send(RequestCredit(heard=pace.heard, most=pace.most))
        pace.heard, pace.last_ns = 0, now_ns


def _requests(frames: Collection[Frame]) -> int:
    return sum([type(frame) is Request for frame in frames])


# ------------------------------------------------------------
# Beats that the process at the other end of a link returns at once while its loop runs.
#
# Silence is counted in ticks, not by a clock: who itself was stopped has heard nobody. What silence means is
# for others to decide. A worker without work would otherwise be found hung by a request that misses its
# deadline, and the server be ready until then.


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


# ------------------------------------------------------------
# Lets as many requests be on their way to the controller as that has announced; it chooses nothing.
#
# Whatever else waits on the way would be heard late, and all that follows it too: past what the controller
# can hear, it would hear of nothing but requests whose time is up. So the rest waits here, where refusing it
# costs the controller nothing, and the newest goes first: where not all can be heard, those are that have
# time left.


SWEEP_NS: Final = 2_000_000
"""Who has waited for too long is looked for as often as that."""


class CreditGate:
    """For one thread. ``refuse`` gets a request that is not passed on, and for how long it waited, in ns."""

    def __init__(
        self,
        send: Callable[[Frame], None],
        refuse: Callable[[Request, int], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._send = send
        self._refuse = refuse
        self._clock = clock
        self._rule = RequestCredit(heard=0, most=0)
        self._unheard = 0  # sent and not heard, since there is a rule
        self._held: dict[str, tuple[Request, int]] = {}  # who waits, and since when; the oldest first

    @property
    def holds(self) -> bool:
        """Whether any request waits here."""
        return bool(self._held)

    def enter(self, request: Request) -> bool:
        """Send a request, now or when it is its turn, or refuse it later; whether any waits here then."""
        rule = self._rule
        if self._unheard < rule.most:
            self._unheard += 1
            self._send(request)
        elif not rule.most:
            self._send(request)
        else:
            held = self._held
            now_ns = self._clock()
            held[request.request_id] = (request, now_ns)
            if len(held) > rule.held:
                oldest, since_ns = held.pop(next(iter(held)))
                self._refuse(oldest, now_ns - since_ns)
        return bool(self._held)

    def take(self, rule: RequestCredit) -> None:
        """What the controller says."""
        self._rule = rule
        self._unheard = max(0, self._unheard - rule.heard)
        held = self._held
        if not held:
            return
        self.sweep()
        while held and (self._unheard < rule.most or not rule.most):
            self._unheard += bool(rule.most)
            self._send(held.popitem()[1][0])

    def take_back(self) -> None:
        """One of those that were sent will not be heard."""
        self.take(structs.replace(self._rule, heard=1))

    def sweep(self) -> None:
        """Refuse who has waited for too long."""
        now_ns, patience = self._clock(), self._rule.patience
        overdue = [
            (request, now_ns - since_ns)
            for request, since_ns in self._held.values()
            if (now_ns - since_ns) * patience > request.slo_ns
        ]
        for request, _ in overdue:
            del self._held[request.request_id]
        for request, waited_ns in overdue:
            self._refuse(request, waited_ns)

    def withdraw(self, request_id: str) -> bool:
        """Nobody waits for a request any more; whether it was here still, and is gone without a trace."""
        return self._held.pop(request_id, None) is not None

    def reset(self) -> None:
        """The link is gone, and all that was sent."""
        self._held.clear()
        self._unheard = 0
        self._rule = RequestCredit(heard=0, most=0)
