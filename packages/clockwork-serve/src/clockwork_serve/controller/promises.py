"""Promises: which requests were told yes, and a plan of each device's exec lane that keeps all of them.

A verdict is due ``decide_ns`` after a request's arrival (``verdict_ns``). Until then the request is
*undecided*: it may join or open a batch in a plan, or be sent by the policy, which is a yes; else it is
rejected at that instant. From the yes on it is *promised*, and nothing that comes later may make it late.

The policy still chooses what runs next, but only what leaves the plan feasible (``plans.missed``); else the
first reservation runs.

How requests are put into batches is a heuristic, judged by simulation:

- A request joins the first reservation of its queue that can take it without making another one late.
- A reservation is opened as late as possible, when the verdict of its first request is due: others may have
  come, for this model or for better batches of others.
- It occupies the time of the batch size that is best for the requests expected until it starts, by its
  model's arrival rate. Otherwise plans fill with batches of one, and have no room for those who join.
- It is opened only if time is left (``spare_ns``), less for several requests than for one, and only if it
  leaves room for *rivals*: batches of undecided requests that go first by class or use time better. So the
  room that overload leaves goes to models of which several are asked for at once.

The weights of a promised request are not evicted. If they are on no device, the LOAD is part of the promise
and is sent with it.

A more urgent class *outranks* others: reservations that leave no room for it end, and their requests are
planned elsewhere, or their promises are broken. It evicts weights that are promised to others alone. From
broken ones a device learns how much time to leave to more urgent classes (``Delays.headroom``); it is left
while there are such.

The yes is not sent. So of a request that awaited failover until its verdict was due its client believes that
it is promised, whoever took it: it is treated as one that lost its place.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from operator import attrgetter
from typing import Final

from clockwork_serve.controller.belief import Belief, Sent
from clockwork_serve.controller.cluster import (
    DeviceBelief,
    Queue,
    Reservation,
    Residency,
    Waiter,
)
from clockwork_serve.controller.codes import CodeOnDevice
from clockwork_serve.controller.life import SENT, WAITING
from clockwork_serve.controller.placement import make_room
from clockwork_serve.controller.plans import (
    MARGIN_NS,
    batch_for,
    check,
    enter,
    exchange,
    fits_beside,
    free_ns,
    hold,
    leave,
    margin_ns,
    outranked,
    place_of,
    plan_lasts_ns,
    plan_of,
    planned_ns,
)
from clockwork_serve.controller.timers import NEVER_NS, Timer
from clockwork_serve.messages import Cause, Request, Result, Unload
from clockwork_serve.units import NS_PER_S, NS_PER_US

AT_ONCE_NS: Final = 9_500 * NS_PER_US
AT_ONCE: Final = 12
"""A verdict at the door may take this long, or this part (1 / ``AT_ONCE``) of the SLO if that is shorter."""

EARLY_NS: Final = 500 * NS_PER_US
"""By so much a verdict is early where the controller is awake anyway: to wake for each costs most."""

SPARE: Final = 50
SPARE_REFUSED: Final = 5
"""A reservation is opened for one request if these parts of its SLO are left over in the plan: 1 / ``SPARE``,
and, by the share of requests refused, up to 1 / ``SPARE_REFUSED``."""

SEVERAL: Final = 3
"""For each further request that part (1 / ``SEVERAL``) of it is enough."""

DISPLACED_NS: Final = -1
"""Instead of a spare time: for requests that are promised already, whatever it takes."""

JOINED_MAX: Final = 16
"""A request may join one of the last so many batches that are planned for its queue."""

RIVALS_MAX: Final = 32
"""At most so many undecided requests are looked at for rivals."""

CHOOSY: Final = 16
"""They are looked at while more than 1 / ``CHOOSY`` of the requests are refused."""

BETTER_OF_TEN: Final = 9
"""A rival serves at least 9 requests in the time in which the batch at hand serves 10."""

REFUSED_BITS: Final = 6
REFUSED_ALL: Final = 1 << 10
"""The share of requests refused is smoothed over ``2 ** REFUSED_BITS`` verdicts; ``REFUSED_ALL`` is all."""

LATELY_NS: Final = 30 * NS_PER_S
"""Headroom is left to a class of which a request came not longer ago."""

RATE_BITS: Final = 4
"""The mean time between arrivals is smoothed over about ``2 ** RATE_BITS`` of them."""

_due: Final = attrgetter("due_ns")


class Promises(Timer):
    """Gives verdicts when they are due, and says what the policy may run. Itself the timer of verdicts."""

    __slots__ = ("_belief", "_decide_ns", "_last_ns", "_new", "_refused", "_undecided", "active")

    def __init__(self, belief: Belief) -> None:
        super().__init__(-2)
        self._belief = belief
        self.active = False
        """Whether a request has ever asked for a verdict: until then there is nothing to do."""
        self._last_ns: dict[int, int] = {}
        """By class of priority: when a request of it came last."""
        self._decide_ns = belief.config.decide_ns
        self._refused = 0
        """The share of verdicts that were no, of late."""
        self._new: list[Waiter] = []
        """Requests that arrived since the last verdicts."""
        self._undecided: list[tuple[int, int, Waiter]] = []
        """Heap of (when the verdict is due, number, request); the promised and those over leave lazily."""

    # What is asked

    def asked(self, request: Request) -> bool:
        """Whether a request asks for a verdict before it is sent."""
        return (request.decide_ns >= 0 or self._decide_ns >= 0) and self._belief.keeps_promises

    def arrived(self, waiter: Waiter, now_ns: int) -> None:
        """A request was admitted to its queue: its verdict is pending, if it asks for one."""
        if self.active:
            self._last_ns[waiter.queue.level] = now_ns
        if not self.asked(waiter.request):
            return
        self.active = True
        model = waiter.queue.model
        since_ns = now_ns - model.arrived_ns
        model.gap_ns += (since_ns - model.gap_ns) >> RATE_BITS if model.gap_ns else since_ns
        model.gap_ns = model.gap_ns or 1
        model.arrived_ns = now_ns
        if waiter.request.awaited and self.verdict_ns(waiter.request) <= now_ns:
            waiter.promised_ns, waiter.cause = now_ns, Cause.CONTROLLER_LOST
            self._belief.displaced.append(waiter)
            return
        self._new.append(waiter)

    def broken(self, request: Request, now_ns: int) -> bool:
        """Whether a no to a request that has just come breaks a promise that its client has by silence."""
        return request.awaited and self.asked(request) and self.verdict_ns(request) <= now_ns

    def ended(self, sent: Sent, result: Result, now_ns: int) -> None:
        """Note that a device is slower than planned; call it before its lane is updated."""
        lane = sent.device.exec if sent.waiters else sent.device.load
        allowed_ns = MARGIN_NS // 2
        if not isinstance(sent.action, Unload) and (
            result.ended_ns - result.started_ns > sent.action.expected_ns + allowed_ns
            or (lane.head_id == result.action_id and result.ended_ns > lane.head_end_ns + allowed_ns)
        ):
            sent.device.slowed_ns = now_ns

    def policy_changed(self) -> None:
        """Another policy goes on: what waits is bound by no promise; one that keeps them gives verdicts."""
        belief = self._belief
        waiting = [one for one in belief.waiters.values() if one.state == WAITING]
        leave(waiting)
        for waiter in waiting:
            waiter.promised_ns = -1
            waiter.queue.undecided = []
        belief.displaced.clear()
        self._undecided.clear()
        belief.timers.set(self, NEVER_NS)
        self._new = [one for one in waiting if self.asked(one.request)]
        self.active = self.active or bool(self._new)

    def verdict_ns(self, request: Request) -> int:
        """When a request's verdict is due."""
        given_ns = request.decide_ns if request.decide_ns >= 0 else self._decide_ns
        return request.arrival_ns + max(given_ns, min(AT_ONCE_NS, request.slo_ns // AT_ONCE))

    # Verdicts

    def judge(self, now_ns: int) -> list[Waiter]:
        """Promise what can be kept; returns the requests whose verdict is due and that cannot be promised."""
        displaced, undecided = self._belief.displaced, self._undecided
        until_ns = now_ns + EARLY_NS
        if not (self._new or displaced or (undecided and undecided[0][0] <= until_ns)):
            return []
        if displaced:
            self._place_displaced(now_ns)
        for waiter in self._new:
            if waiter.state == WAITING and waiter.promised_ns < 0:
                insort(waiter.queue.undecided, waiter, key=_due)
        for waiter in self._new:
            if waiter.state > SENT:
                continue
            if waiter.state == SENT:
                waiter.promised_ns = now_ns
            elif waiter.promised_ns < 0:
                self._join_all(waiter.queue, now_ns)
            if waiter.promised_ns >= 0:
                self._refused -= self._refused >> REFUSED_BITS
            else:
                heappush(self._undecided, (self.verdict_ns(waiter.request), self._belief.next_id(), waiter))
        self._new.clear()
        refused: list[Waiter] = []
        over: list[Waiter] = []
        while undecided:
            due_ns, _, waiter = undecided[0]
            if due_ns > until_ns and waiter.state == WAITING and waiter.promised_ns < 0:
                break
            heappop(undecided)
            if waiter.state <= SENT:
                found = 0
                if not self._decide(waiter, now_ns):
                    refused.append(waiter)
                    found = REFUSED_ALL
                self._refused += (found - self._refused) >> REFUSED_BITS
            over.append(waiter)
        self._belief.timers.set(self, undecided[0][0] if undecided else NEVER_NS)
        for waiter in over:
            if waiter in waiter.queue.undecided:
                waiter.queue.undecided.remove(waiter)
        if displaced:  # those that a more urgent class outranked just now
            self._place_displaced(now_ns)
        # A batch that was opened for a later one may have taken in an earlier one.
        return [waiter for waiter in refused if waiter.promised_ns < 0]

    def _place_displaced(self, now_ns: int) -> None:
        """Open reservations for promised requests that lost theirs; who outranks others displaces them."""
        while displaced := self._belief.displaced:
            waiter = displaced.pop(0)
            if waiter.state == WAITING and waiter.place is None and not self._join(waiter, now_ns):
                self._open(waiter.queue, [waiter], DISPLACED_NS, now_ns)

    def _decide(self, waiter: Waiter, now_ns: int) -> bool:
        """Promise a request if that can be kept; that it was sent is a promise, too."""
        if waiter.promised_ns < 0:
            if waiter.state == SENT:
                waiter.promised_ns = now_ns
            else:
                if waiter not in waiter.queue.undecided:  # it was moved, or was sent to a device that is lost
                    insort(waiter.queue.undecided, waiter, key=_due)
                self._join_all(waiter.queue, now_ns)
                if waiter.promised_ns < 0:
                    self._open_all(waiter.queue, now_ns)
        return waiter.promised_ns >= 0

    def _undecided_of(self, queue: Queue) -> list[Waiter]:
        """The undecided requests of a queue by due time, at most what one batch takes."""
        queue.undecided = [one for one in queue.undecided if one.state == WAITING and one.promised_ns < 0]
        return queue.undecided[: queue.sizes[-1][0]]

    def _join_all(self, queue: Queue, now_ns: int) -> None:
        """Promise undecided requests of a queue that can join its reservations: first due, first promised."""
        if queue.reserved:
            for waiter in self._undecided_of(queue):
                self._join(waiter, now_ns)

    def _open_all(self, queue: Queue, now_ns: int) -> None:
        """Open a reservation for the undecided requests of a queue, as far as one batch takes them."""
        waiters = self._undecided_of(queue)
        part = REFUSED_ALL * SPARE_REFUSED + SPARE * self._refused
        spare_ns = waiters[0].slo_ns * part // (REFUSED_ALL * SPARE_REFUSED * SPARE)
        self._open(queue, waiters, spare_ns // SEVERAL ** (len(waiters) - 1), now_ns)

    def _join(self, waiter: Waiter, now_ns: int) -> bool:
        """Add a request to the first of the last reservations of its queue that can take it."""
        queue = waiter.queue
        for one in queue.reserved[-JOINED_MAX:]:
            if len(one.waiters) >= one.batches[-1].count:
                continue
            device = one.residency.device
            ends_ns, rooms_ns = plan_of(device, now_ns)
            at = device.reserved.index(one)
            start_ns = free_ns(one.residency, ends_ns[at])
            lasts_ns = plan_lasts_ns(one, len(one.waiters) + 1, start_ns, now_ns)
            end_ns = start_ns + lasts_ns
            due_ns = min(waiter.due_ns, one.due_ns) - one.margin_ns
            if waiter.promised_ns < 0:
                due_ns -= self._headroom_ns(device, queue, end_ns, now_ns)
            if end_ns > due_ns or end_ns - ends_ns[at + 1] > rooms_ns[at + 1]:
                continue
            waiter.promised_ns, waiter.cause = now_ns, Cause.NONE
            waiters = one.waiters.copy()
            insort(waiters, waiter, key=_due)
            hold(one, waiters, lasts_ns)
            # One that is due sooner than the batch stays in it, where it was found to be in time.
            if waiter is not waiters[0]:
                exchange(one)
            return True
        return False

    def _open(self, queue: Queue, waiters: list[Waiter], spare_ns: int, now_ns: int) -> None:
        """Open a reservation on the device where it ends first, if that much time is left over there."""
        best: Residency | None = None
        best_ns, lasts_ns = NEVER_NS, 0
        for residency in queue.model.residencies.values():
            if residency.stalled:
                continue
            ready_ns = free_ns(residency, 0)
            end_ns, needed_ns = self._end_ns(
                residency.device, residency.code, ready_ns, waiters, spare_ns, now_ns
            )
            if end_ns < best_ns:
                best, best_ns, lasts_ns = residency, end_ns, needed_ns
        if best is None:
            best = self._load(queue, waiters, spare_ns, now_ns)
            lasts_ns = 0  # the LOAD may end at another time than it was planned with
        if best is None:
            best, lasts_ns = self._outrank(queue, waiters, now_ns)
            if best is None:
                return
        samples = best.code.batches(queue.signature, queue.sizes)[0].samples
        new = Reservation(queue, best, margin_ns(best.device, waiters[0].slo_ns, samples))
        waiters = waiters[: new.batches[-1].count]
        for waiter in waiters:
            waiter.promised_ns, waiter.cause = now_ns, Cause.NONE
        if not lasts_ns:
            ends_ns, _ = plan_of(best.device, now_ns)
            start_ns = free_ns(best, ends_ns[place_of(best.device.reserved, waiters[0].due_ns)])
            lasts_ns = plan_lasts_ns(new, len(waiters), start_ns, now_ns)
        hold(new, waiters, lasts_ns)
        enter(new)
        exchange(new)
        best.reserved += 1

    def _outrank(self, queue: Queue, waiters: list[Waiter], now_ns: int) -> tuple[Residency | None, int]:
        """End reservations of less urgent classes on the device where that breaks fewest promises.

        Returns where there is room now for these requests, and how long they take.
        """
        best: Residency | None = None
        best_ended: list[Reservation] = []
        fewest = lasts_ns = 0
        for residency in queue.model.residencies.values() if len(self._belief.waiting_by_class) > 1 else ():
            device = residency.device
            if residency.stalled or not any(one.queue.level > queue.level for one in device.reserved):
                continue
            new = Reservation(queue, residency, 0)
            new.margin_ns = margin_ns(device, waiters[0].slo_ns, new.batches[0].samples)
            batch = batch_for(new.batches, len(waiters)) or new.batches[-1]
            new.due_ns, new.lasts_ns = waiters[0].due_ns, batch.samples.estimate_ns
            ended = outranked(device, queue.level, plan_of(device, now_ns)[0][0], new=new)
            count = sum([len(one.waiters) for one in ended or ()])
            if ended is not None and (best is None or count < fewest):
                best, best_ended, fewest, lasts_ns = residency, ended, count, new.lasts_ns
        self._belief.displace(best_ended, Cause.OUTRANKED)
        return best, lasts_ns

    def _load(self, queue: Queue, waiters: list[Waiter], spare_ns: int, now_ns: int) -> Residency | None:
        """Send a LOAD to the device with room where the requests end first after it, if they are in time."""
        model = queue.model
        size = model.model.weights.size
        found: list[tuple[int, int, DeviceBelief]] = []
        for device in self._belief.devices.values():
            code = device.code_of(model)
            if code is None or device.name in model.residencies or size > device.room_bytes:
                continue
            if device.exec.stalled or device.load.stalled:
                continue
            ready_ns = device.load.available_ns(now_ns) + code.timings.load(size).estimate_ns
            end_ns, _ = self._end_ns(device, code, ready_ns, waiters, spare_ns, now_ns)
            if end_ns < NEVER_NS:
                found.append((end_ns, device.index, device))
        for _, _, device in sorted(found):
            room = make_room(device, model, NEVER_NS, by_popularity=True)
            if room is not None:
                for residency in room.evicted:
                    self._belief.send_unload(residency, now_ns)
                start_ns = device.load.available_ns(now_ns)
                self._belief.send_load(device, model, room.extent, start_ns, now_ns)
                return model.residencies[device.name]
        return None

    def _end_ns(
        self, device: DeviceBelief, code: CodeOnDevice, ready_ns: int, waiters: list[Waiter], spare_ns: int,
        now_ns: int,
    ) -> tuple[int, int]:  # fmt: skip
        """When a new reservation would end on a device, with that much time left over, and how long it lasts.

        NEVER_NS if it cannot be opened there. ``ready_ns``: when the weights are there.
        """
        queue = waiters[0].queue
        batches = code.batches(queue.signature, queue.sizes)
        waiters = waiters[: batches[-1].count]
        due_ns = waiters[0].due_ns
        limit_ns = due_ns - margin_ns(device, waiters[0].slo_ns, batches[0].samples)
        at = place_of(device.reserved, due_ns)
        ends_ns, rooms_ns = plan_of(device, now_ns)
        start_ns = max(ends_ns[at], ready_ns)
        if start_ns > due_ns:
            return NEVER_NS, 0
        lasts_ns = planned_ns(queue.model, batches, len(waiters), start_ns, now_ns)
        if spare_ns != DISPLACED_NS:
            limit_ns -= self._headroom_ns(device, queue, start_ns + lasts_ns, now_ns)
        end_ns = start_ns + lasts_ns + max(0, spare_ns)
        if end_ns > limit_ns or end_ns - ends_ns[at] > rooms_ns[at]:
            return NEVER_NS, 0
        if self._refused > REFUSED_ALL // CHOOSY and spare_ns != DISPLACED_NS:
            rivals = self._rivals(device, queue, len(waiters), lasts_ns)
            room_ns = min(rooms_ns[at] - (end_ns - ends_ns[at]), limit_ns - end_ns)
            if sum([cost_ns for _, cost_ns in rivals]) > room_ns and not fits_beside(
                device, rivals, limit_ns, lasts_ns, now_ns
            ):
                return NEVER_NS, 0
        return end_ns, lasts_ns

    def _headroom_ns(self, device: DeviceBelief, queue: Queue, end_ns: int, now_ns: int) -> int:
        """How much earlier than it has to a batch of new promises ends that is planned to end then.

        The longer it waits, the more of those come that go before it.
        """
        if device.delays.headroom:
            for level, last_ns in self._last_ns.items():
                if level < queue.level and now_ns <= last_ns + LATELY_NS:
                    return device.delays.headroom_ns(end_ns - now_ns, queue.level)
        return 0

    def _rivals(self, device: DeviceBelief, queue: Queue, count: int, lasts_ns: int) -> list[tuple[int, int]]:
        """Batches of undecided requests of other queues that precede one on a device, best first.

        Each as (when it has to end, its duration divided by the number of devices that could run it). They
        are of a more urgent class, or of the same one and about as efficient or more.
        """
        found: list[tuple[int, float, int, int]] = []
        seen = {queue}
        for _, _, waiter in self._undecided[:RIVALS_MAX]:
            other = waiter.queue
            if other in seen or waiter.promised_ns >= 0 or waiter.state != WAITING:
                continue
            seen.add(other)
            residency = other.model.residencies.get(device.name)
            if residency is None or other.band_ns > queue.band_ns:
                continue
            waiters = self._undecided_of(other) or [waiter]  # it came back from a device that was lost
            batches = residency.code.batches(other.signature, other.sizes)
            batch = batch_for(batches, len(waiters)) or batches[-1]
            cost_ns = batch.samples.estimate_ns
            if (
                other.band_ns == queue.band_ns
                and 10 * len(waiters) * lasts_ns < BETTER_OF_TEN * count * cost_ns
            ):
                continue
            due_ns = waiters[0].due_ns - margin_ns(device, waiters[0].slo_ns, batches[0].samples)
            each_ns = cost_ns / len(waiters)
            found.append((other.band_ns, each_ns, due_ns, cost_ns // len(other.model.residencies)))
        found.sort()
        return [(due_ns, cost_ns) for _, _, due_ns, cost_ns in found]

    def soonest(self, queue: Queue, now_ns: int) -> tuple[DeviceBelief, int, int] | None:
        """The device that would end one more request of a queue first, when, and how long that takes.

        It would run after all that is planned there.
        """
        best: tuple[DeviceBelief, int, int] | None = None
        for residency in queue.model.residencies.values():
            lasts_ns = residency.code.batches(queue.signature, queue.sizes)[0].samples.estimate_ns
            end_ns = max(plan_of(residency.device, now_ns)[0][-1], free_ns(residency, 0)) + lasts_ns
            if best is None or end_ns < best[1]:
                best = residency.device, end_ns, lasts_ns
        return best

    def slo_ns(self, needed_ns: int) -> int:
        """The SLO with which one request is accepted that ends so long after its arrival."""
        all_ = REFUSED_ALL * SPARE_REFUSED * SPARE
        return needed_ns * all_ // (all_ - REFUSED_ALL * SPARE_REFUSED - SPARE * self._refused)

    def check(self) -> None:
        """Assert that every request that waits is promised, or has a verdict pending."""
        for device in self._belief.devices.values():
            check(device)
        undecided = {id(one) for _, _, one in self._undecided}
        for waiter in self._belief.waiters.values():
            if waiter.state == WAITING and waiter.promised_ns < 0 and self.asked(waiter.request):
                assert id(waiter) in undecided, f"{waiter.request.request_id} has no verdict pending"
