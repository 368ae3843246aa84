"""Flow control between processes: credit for gateways' requests, and heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Final

from clockwork_serve.messages import (
    Beat,
    ControllerBusy,
    CreditBlocked,
    Frame,
    Request,
    RequestCredit,
    SoonestEnd,
    SoonestEnds,
    WorkerHeard,
    WorkerHung,
    WorkerSilent,
)
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import NS_PER_S, ms

# ------------------------------------------------------------
# The controller's side of credit-based flow control: how many requests each gateway may have in transit.
#
# A gateway is granted as many requests as the controller works through within a few milliseconds, by the time
# that each took it lately, in which it ran or waited for a CPU. That is too few where a gateway takes long to
# send the next: the controller idles meanwhile. So a gateway says when it has to hold requests back
# (:class:`messages.CreditBlocked`), and gets more for as long as the controller idles. Which requests then
# wait, and which are refused, the gateway chooses (:class:`CreditGate`).


DELAY_NS: Final = ms(1)
"""How long a request is in transit at most, roughly, even when gateways offer more than can be received. With
twice that the controller took in more than it had time to plan: 85 instead of 94 % of the best goodput."""
EXTRA_MOST_NS: Final = ms(6)
"""Of credit beyond that for gateways that take long to send the next requests, or are far away."""
LEAST: Final = 32
"""The least credit of all gateways together: what a controller that is not busy receives in one turn."""
LEAST_EACH: Final = 16
MOST: Final = 4096
FIRST: Final = 256
WEIGHT: Final = 8  # the mean is over about this many grants
IDLE_PART: Final = 16  # a controller that holds requests back may idle for one part in this many of the time

BUSY_NS: Final = ms(100)
"""For how long a controller counts as busy once it had no time to spare while gateways held requests back."""


class BusyClock:
    """For how long the calling thread was not idle, in ns: it ran, or waited for a CPU or for another thread.

    The CPU time of the whole process counts: while another of its threads runs, this one may be waiting for
    the interpreter. Without the kernel's statistics (``CONFIG_SCHED_INFO``) it was never idle. For the thread
    that made it.
    """

    def __init__(self, path: str = "/proc/thread-self/schedstat") -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)

    def __call__(self) -> int:
        """Read it: about 2 us."""
        if self._file is None:
            return time.monotonic_ns()
        _, waited_ns, _ = os.pread(self._file, 64, 0).split()
        return time.process_time_ns() + int(waited_ns)


class _GatewayRate:
    """Of one gateway: requests received since the last grant, and what the next one follows from.

    In a *round*, as many requests are received as might be in transit when it began.
    """

    __slots__ = (
        "blocked", "busy_at_ns", "busy_ns", "extra_ns", "incoming", "last_ns", "most", "round_held_ns",
        "round_idle_ns", "round_left", "round_took_ns", "short",
    )  # fmt: skip

    def __init__(self, now_ns: int, busy_at_ns: int) -> None:
        self.incoming = 0
        self.most = FIRST
        self.blocked = False  # whether it held requests back since the last grant
        self.busy_ns = DELAY_NS // FIRST  # for each request, the mean
        self.extra_ns = 0  # for how long more than ``DELAY_NS`` requests in transit keep the controller busy
        self.short = False
        """Whether the controller was busy in the last round, in most of which requests were held back."""
        self.last_ns, self.busy_at_ns = now_ns, busy_at_ns
        self.round_took_ns = self.round_idle_ns = self.round_held_ns = 0
        self.round_left = FIRST

    def received(self, now_ns: int, busy_at_ns: int) -> None:
        """What was received since the last grant took until now."""
        took_ns = now_ns - self.last_ns
        busy_ns = min(took_ns, busy_at_ns - self.busy_at_ns)
        self.busy_ns += (busy_ns // self.incoming - self.busy_ns) // WEIGHT
        self.round_took_ns += took_ns
        if self.blocked:  # else it idled because nothing was asked for
            self.round_idle_ns += took_ns - busy_ns
            self.round_held_ns += took_ns
        self.round_left -= self.incoming
        if self.round_left <= 0:
            idled = self.round_idle_ns * IDLE_PART > self.round_took_ns
            self.short = not idled and 2 * self.round_held_ns > self.round_took_ns
            if idled:
                self.extra_ns = min(EXTRA_MOST_NS, self.extra_ns + self.round_idle_ns // 2)
            else:
                self.extra_ns -= self.extra_ns // WEIGHT
            self.round_took_ns = self.round_idle_ns = self.round_held_ns = 0
            self.round_left = self.most
        self.incoming, self.blocked, self.last_ns, self.busy_at_ns = 0, False, now_ns, busy_at_ns


class CreditIssuer:
    """Grants each gateway its credit (:class:`messages.RequestCredit`). For the loop's own thread.

    ``post`` tells the controller that it is short of time: requests are held back, and it does not idle.
    ``busy_clock`` counts the time in which this thread was not idle.
    """

    def __init__(
        self, post: Callable[[ControllerBusy], None], clock: Callable[[], int] = time.monotonic_ns,
        busy_clock: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self._post = post
        self._post_from_ns = 0
        self._clock = clock
        self._busy_clock = BusyClock() if busy_clock is None else busy_clock
        self._rates: dict[Link, _GatewayRate] = {}

    def add_gateway(self, link: Link) -> None:
        """Grant a gateway that connected its first credit."""
        self._rates[link] = _GatewayRate(self._clock(), self._busy_clock())
        link.send(RequestCredit(heard=0, most=FIRST))

    def blocked(self, link: Link) -> None:
        """Note that a gateway has to hold requests back."""
        if link in self._rates:
            self._rates[link].blocked = True

    def remove_gateway(self, link: Link) -> None:
        """Forget a gateway whose link was lost."""
        self._rates.pop(link, None)

    def received(self, link: Link, frames: Collection[Frame]) -> None:
        """Count the requests among received frames; grant new credit once a quarter of it was used."""
        rate = self._rates.get(link)
        if rate is None:
            return
        rate.incoming += _requests(frames)
        if 4 * rate.incoming < rate.most:
            return
        heard, blocked, now_ns = rate.incoming, rate.blocked, self._clock()
        rate.received(now_ns, self._busy_clock())
        least = max(LEAST_EACH, LEAST // len(self._rates))
        rate.most = min(MOST, max(least, (DELAY_NS + rate.extra_ns) // max(1, rate.busy_ns)))
        link.send(RequestCredit(heard=heard, most=rate.most))
        if blocked:  # it sends the next while these are decided about
            link.flush()
        if rate.short and now_ns >= self._post_from_ns:
            self._post_from_ns = now_ns + BUSY_NS // 2
            self._post(ControllerBusy(for_ns=BUSY_NS))


def _requests(frames: Collection[Frame]) -> int:
    return sum([type(frame) is Request for frame in frames])


# ------------------------------------------------------------
# Summaries for gateways of when requests could end, so that hopeless ones cost the controller nothing.
#
# Where devices are overloaded, most requests would be sent only to be rejected: each costs the controller a
# decision, and takes credit from requests that can be served. So while requests are rejected since they would
# miss their deadlines, all gateways are sent the soonest ends. By them they answer a query that only the head
# of a request has caused, as the controller would; and where credit is scarce they refuse what would end too
# late. What they let pass the controller judges as ever. It judges better: some of the requests that are due
# before will be refused themselves, which a summary does not know. (Refusing by it without need cost a closed
# loop its full batches: 142 answers a second instead of 162.)


SUMMARY_NS: Final = ms(5)
"""A summary is made at most this often, and takes at most 1 / ``SUMMARY_PART`` of the time."""
SUMMARY_PART: Final = 50
TRUSTED_NS: Final = ms(25)
"""For how long gateways rely on one: a controller that is stuck or dead sends no other."""
REJECTING_NS: Final = ms(500)  # for how long after a rejection summaries are made
SUMMARY_MODELS_MAX: Final = 256


class SummaryIssuer:
    """Publishes summaries of the models asked for lately.

    ``compute`` gets model keys and an instant, and returns the soonest ends of those for which requests wait.
    """

    def __init__(
        self, compute: Callable[[Iterable[str], int], dict[str, SoonestEnd]],
        send: Callable[[SoonestEnds], None], cpu_clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:  # fmt: skip
        self._compute = compute
        self._send = send
        self._cpu_clock = cpu_clock
        self._asked: dict[str, None] = {}  # since the last summary, or in it
        self._next_ns = 0
        self._rejecting_until_ns = 0
        self.active = False  # whether summaries are made; the models asked for are to be noted only then

    def asked_for(self, model: str) -> None:
        """Note a request for a model; the first models count, if there are too many."""
        if len(self._asked) < SUMMARY_MODELS_MAX:
            self._asked[model] = None

    def rejected(self, now_ns: int) -> None:
        """Note that a request was rejected because it would miss its deadline."""
        self._rejecting_until_ns = now_ns + REJECTING_NS
        self.active = True

    def publish(self, now_ns: int) -> None:
        """Publish a summary if one is due; to be called after each step of the brain, while ``active``."""
        if now_ns < self._next_ns:
            return
        began_ns = self._cpu_clock()
        next_ns = now_ns + SUMMARY_NS  # what ends before is over by the next summary
        ends = {
            key: one
            for key, one in self._compute(self._asked, now_ns).items()
            if one.end_ns > next_ns < one.other_end_ns
        }
        self._send(SoonestEnds(ends=ends, until_ns=now_ns + TRUSTED_NS))
        self._asked = dict.fromkeys(ends)
        self.active = bool(ends) or now_ns < self._rejecting_until_ns
        self._next_ns = now_ns + max(SUMMARY_NS, SUMMARY_PART * (self._cpu_clock() - began_ns))


class KnownEnds:
    """What a gateway knows of when requests could end: the controller's last summary, and what it let pass.

    All instants are ns on the clock of this process.
    """

    def __init__(self) -> None:
        self._until_ns = 0
        self.known: dict[str, tuple[int, int, int, int]] = {}
        """By model key: the fields of :class:`messages.SoonestEnd`."""
        self._slot_ns: dict[str, int] = {}  # by model key: after the retry of the last one that was refused
        self.refused = 0  # how many requests it told a shortage of

    def update(self, summary: SoonestEnds) -> None:
        """Replace what is known."""
        self._until_ns = summary.until_ns
        self.known = {
            key: (one.due_ns, one.end_ns, one.each_ns, one.other_end_ns) for key, one in summary.ends.items()
        }

        self._slot_ns = {key: at_ns for key, at_ns in self._slot_ns.items() if key in self.known}

    def reset(self) -> None:
        """Forget it: the link was lost."""
        self.known = {}

    def shortage_ns(self, model: str, due_ns: int, now_ns: int, *, count: bool = True) -> int:
        """By how much a request would miss ``due_ns`` (its deadline less ``way_ns``); 0 if it may be in time.

        Then, with ``count``, it is passed on, and is before later ones.
        """
        known = self.known.get(model)
        if known is None or now_ns >= self._until_ns:
            return 0
        latest_ns, end_ns, each_ns, other_end_ns = known
        shortage_ns = min(end_ns, other_end_ns) - due_ns
        if shortage_ns > 0 and due_ns >= latest_ns:
            self.refused += 1
            return shortage_ns
        if count:  # it is one more that is due before
            self.known[model] = (max(latest_ns, due_ns), end_ns + each_ns, each_ns, other_end_ns)
        return 0

    def retry_after_ns(self, model: str, shortage_ns: int, now_ns: int) -> int:
        """The retry advice for a request with that shortage: each has a time of its own to come again."""
        slot_ns = max(self._slot_ns.get(model, 0), now_ns + shortage_ns)
        self._slot_ns[model] = slot_ns + self.known[model][2]
        return slot_ns - now_ns


# ------------------------------------------------------------
# Heartbeats: beats that the process at the other end of a link returns at once while its loop runs.
#
# Missed beats are counted in ticks of this process's loop, not by a clock: a process that was itself stopped
# received nothing meanwhile, and its peers are not to blame. What follows from a stall is for the caller to
# decide. Without heartbeats an idle worker would be found hung only by a request that misses its deadline,
# and the server would report ready until then.


BEAT_S: Final = 0.35
BEATS_MISSED: Final = 4
"""A worker that returns no beat for this many ticks is stalled: 1.4 to 1.75 s after it stopped."""

PEER_BEAT_S: Final = 0.25
PEER_BEATS_MISSED: Final = 5
"""The same for the controller and the supervisor, on which others depend: 1.25 to 1.5 s after it stopped."""

_log = logging.getLogger(__name__)


class PeerHeartbeat:
    """Whether one peer returns beats.

    ``send`` sends it one; ``changed`` is called when ``stalled`` changes.
    """

    def __init__(
        self, send: Callable[[Beat], None], changed: Callable[[], None], beat_s: float = PEER_BEAT_S
    ) -> None:
        self.stalled = False
        self._send = send
        self._changed = changed
        self._beat_s = beat_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # None while there is no peer
        self._missed = -1  # ticks since a beat that was not returned; -1 if it was

    @property
    def stalled_s(self) -> float:
        """How long the peer has returned no beat, counted in ticks."""
        return max(0, self._missed) * self._beat_s

    @property
    def late(self) -> bool:
        """Whether a beat was not returned before the next one was due."""
        return self._missed >= 1

    def start(self) -> None:
        """Send beats from now on: the peer connected."""
        self.stop()
        self._timer = self._loop.call_later(self._beat_s, self._tick)

    def stop(self) -> None:
        """Send no more beats: the peer disconnected. It is not stalled then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._missed, self.stalled = -1, False

    def beat_received(self) -> None:
        """Note that the peer returned a beat."""
        self._missed = -1
        if self.stalled:
            self.stalled = False
            self._changed()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._beat_s, self._tick)
        if self._missed < 0:
            self._send(Beat())
        self._missed += 1
        if self._missed >= PEER_BEATS_MISSED and not self.stalled:
            self.stalled = True
            self._changed()


class WorkerHeartbeats:
    """Sends beats to all workers, and posts events about them to the brain.

    ``WorkerSilent`` is posted at each tick while a worker is stalled, ``WorkerHeard`` once it returns a beat.
    """

    def __init__(self, post: Callable[[WorkerSilent | WorkerHeard], None], beat_s: float = BEAT_S) -> None:
        self._post = post
        self._beat_s = beat_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # None while there is no worker
        self._missed: dict[Link, int] = {}
        """By worker's link: ticks since a beat that it has not returned; -1 if it has."""

    def watch(self, link: Link) -> None:
        """Send beats to a worker that connected."""
        self._missed[link] = -1
        if self._timer is None:
            self._timer = self._loop.call_later(self._beat_s, self._tick)

    def unwatch(self, link: Link) -> None:
        """Send no more beats to a worker that disconnected."""
        self._missed.pop(link, None)

    def beat_received(self, link: Link) -> None:
        """Note that a worker returned a beat."""
        if self._missed.get(link, -1) >= BEATS_MISSED:
            self._post(WorkerHeard(worker=link.peer.name))
        if link in self._missed:
            self._missed[link] = -1

    def report_hung(self, hung: WorkerHung, supervisor: Link | None) -> None:
        """Log the brain's verdict on a worker, and pass it to the supervisor if the worker is to be ended."""
        if not hung.why:
            _log.warning("%s answers again", hung.worker)
        elif not hung.end:
            _log.error("%s hung: %s; nothing is planned on it", hung.worker, hung.why)
        else:
            _log.error("%s is ended: %s", hung.worker, hung.why)
            if supervisor is not None:
                supervisor.send(hung)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._beat_s, self._tick) if self._missed else None
        for link, missed in self._missed.items():
            if missed < 0:
                link.send(Beat())
            self._missed[link] = missed + 1
            if missed + 1 >= BEATS_MISSED:
                for_ns = round((missed + 1) * self._beat_s * NS_PER_S)
                self._post(WorkerSilent(worker=link.peer.name, for_ns=for_ns))


# ------------------------------------------------------------
# The gateway's side of credit-based flow control: no more requests are in transit than were granted.
#
# Requests queued in the socket would reach the controller late, and delay all that follow: under overload the
# controller would receive nothing but requests whose deadlines have passed. So the excess waits here, where
# refusing it costs the controller nothing, and the newest is sent first: where not all can be received, the
# controller should receive those that have time left.


SWEEP_NS: Final = 2_000_000  # how often a gateway checks for requests that have waited too long
CROWDED_NS: Final = ms(250)
"""For how long, after a request waited in vain, no more than ``CROWDED_TIMES`` as many wait as may be in
transit, each model's share of them."""
CROWDED_TIMES: Final = 2
SILENT_NS: Final = ms(20)
"""A controller that grants no credit for so long may be dead; where requests wait, it does each turn."""
SCARCE_NS: Final = ms(500)  # for how long after a request was held back credit counts as scarce


class CreditGate:
    """Sends requests within the credit, and holds back the rest. For one thread.

    ``refuse`` gets each request that is not sent, and how long it waited, in ns.
    """

    def __init__(
        self, send: Callable[[Frame], None], refuse: Callable[[Request, int], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        self._send = send
        self._refuse = refuse
        self._clock = clock
        self._credit = RequestCredit(heard=0, most=0)
        self._in_transit = 0  # sent and not yet acknowledged by a grant
        self._said = False  # that requests are held back, since the last grant
        self._held: dict[str, tuple[Request, int]] = {}  # held back, and since when; the oldest first
        # Ids of these by model, the oldest first; none is empty.
        self._waiting: dict[str, dict[str, None]] = {}
        self._granted_at_ns = 0  # when credit was last granted
        self._crowded_until_ns = self._scarce_until_ns = 0

    @property
    def holds(self) -> bool:
        """Whether any request is held back."""
        return bool(self._held)

    @property
    def scarce(self) -> bool:
        """Whether requests were held back lately: a hopeless one would take the credit of another."""
        return self._clock() < self._scarce_until_ns

    def submit(self, request: Request) -> bool:
        """Send a request, now or once there is credit, or refuse it later; whether any is held back now.

        Where more than ``RequestCredit.held`` wait, the oldest is refused.
        """
        credit = self._credit
        if self._in_transit < credit.most:
            self._in_transit += 1
            self._send(request)
        elif not credit.most:
            self._send(request)
        else:
            held = self._held
            now_ns = self._clock()
            held[request.request_id] = (request, now_ns)
            alike = self._waiting.setdefault(request.model, {})
            alike[request.request_id] = None
            self._say_blocked()
            if len(held) > credit.held:
                self._refuse_oldest(held, now_ns)
            elif now_ns < self._crowded_until_ns and len(alike) > self._share() and self._granted(now_ns):
                self._crowded_until_ns = now_ns + CROWDED_NS
                self._refuse_oldest(alike, now_ns)
        return bool(self._held)

    def on_credit(self, credit: RequestCredit) -> None:
        """Apply a grant of the controller, and send what it allows, the newest first."""
        self._granted_at_ns = self._clock()
        self._credit = credit
        self._in_transit = max(0, self._in_transit - credit.heard)
        self._said = False
        held = self._held
        if not held:
            return
        self.sweep()
        while held and (self._in_transit < credit.most or not credit.most):
            self._in_transit += bool(credit.most)
            self._send(self._take(next(reversed(held)))[0])
        if held:
            self._say_blocked()

    def _say_blocked(self) -> None:
        """Tell the controller that requests are held back, once after each grant."""
        self._scarce_until_ns = self._clock() + SCARCE_NS
        if not self._said:
            self._said = True
            self._send(CreditBlocked())

    def sweep(self) -> None:
        """Refuse each request that has waited for more than the ``patience``-th part of its SLO."""
        now_ns, patience = self._clock(), self._credit.patience
        overdue = [
            (request, now_ns - since_ns)
            for request, since_ns in self._held.values()
            if (now_ns - since_ns) * patience > request.slo_ns
        ]
        for request, _ in overdue:
            self._take(request.request_id)
        if overdue:
            self._crowded_until_ns = now_ns + CROWDED_NS
        for request, waited_ns in overdue:
            self._refuse(request, waited_ns)

    def withdraw(self, request_id: str) -> bool:
        """Drop a request whose client has gone; whether it was held back here, and so never sent."""
        found = request_id in self._held
        if found:
            self._take(request_id)
        return found

    def _share(self) -> int:
        """How many requests for one model may wait, once some have waited in vain.

        A burst may wait. But then more come than the controller receives, and a short queue keeps it as busy.
        It is shared between models, so that one that is asked for too much takes nothing from others.
        """
        return max(1, CROWDED_TIMES * self._credit.most // len(self._waiting))

    def _granted(self, now_ns: int) -> bool:
        """Whether credit is granted; if not, the controller may be dead, and the next one serve who waits."""
        return now_ns < self._granted_at_ns + SILENT_NS

    def _refuse_oldest(self, ids: Iterable[str], now_ns: int) -> None:
        request, since_ns = self._take(next(iter(ids)))
        self._refuse(request, now_ns - since_ns)

    def _take(self, request_id: str) -> tuple[Request, int]:
        """Remove a request that is held back; since when it was."""
        request, since_ns = self._held.pop(request_id)
        alike = self._waiting[request.model]
        del alike[request_id]
        if not alike:
            del self._waiting[request.model]
        return request, since_ns

    def reset(self) -> None:
        """Forget all requests and the credit: the link was lost."""
        self._held.clear()
        self._waiting.clear()
        self._said = False
        self._in_transit = self._crowded_until_ns = self._scarce_until_ns = 0
        self._credit = RequestCredit(heard=0, most=0)
