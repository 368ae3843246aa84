"""The default policy: the paper's, with late decisions, overload trade-offs, and LOADs that can still help.

Differences to ``paper``; the gain of each is in docs/develop/policies.md:

- *Measured delays*: plans leave as much slack as recently measured delays need (``estimates.Delays``).
- *Late choices*: a lane is topped up only as far ahead as the network needs, not 5 ms.
- *Full batches while time is short*: on a lane in overload, where a queue can be served in part only, a
  larger batch of another queue goes first.
- *Best batch for the head*: the largest batch that still meets the earliest deadline; a larger size that is
  not full is run where that costs less per request than the full one below it.
- *Least loss*: where running the most urgent batch first would make others too late, the batches that serve
  the fewest requests per lane time are dropped (Moore and Hodgson, on the few most urgent).
- *Classes share*: a more urgent class goes first only where it could not wait, and its batches are filled up
  with requests of other classes; none is lost for one of a class below.
- *No sacrifice without need*: requests whose early deadlines limit their queue's batch are skipped only
  where the others cannot wait.
- *Relaxed work stays short* while it has ample time and requests of a tighter SLO arrive at its devices.
- *Loads by need*: of models with equal LOAD priority, the one whose request is due first is loaded; in
  overload of the load lane, the first that could still wait for another LOAD.
- *INFERs first*: where the lanes share cores, few LOADs are sent while INFERs are short of time.
- *Loads ahead*: where no LOAD is fast enough for a request, weights are loaded for later ones.
- *Least missed first*: weights of the least popular models are evicted, not the least recently used
  (``estimates.popularity_after``).
- *Last copies stay*: a further copy is worth an eighth of the one before, and evicts nothing worth more.
- *Copies into idle memory*: a free load lane copies what is asked for into free pages, before it is missed.
- *Few devices where little is to do*: an idle device leaves relaxed batches to those before it.
- *Few actions while the controller is busy*: where devices have time, batches wait until they are full.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush
from itertools import islice
from typing import Final

from clockwork_serve.controller.belief import Belief, joining, sharers
from clockwork_serve.controller.cluster import (
    Agenda,
    DeviceBelief,
    Queue,
    Reservation,
    ServedModel,
    Strategy,
    Waiter,
)
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.estimates import Timings, popularity_after
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.placement import Candidates, no_copy
from clockwork_serve.controller.plans import fits_in_any_order, free_ns, is_next, margin_ns, missed, outranked
from clockwork_serve.controller.policies.paper import PaperScheduler
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS, Timer
from clockwork_serve.messages import Cause
from clockwork_serve.units import NS_PER_MS, NS_PER_S, NS_PER_US

MARGIN_NS: Final = 100 * NS_PER_US
"""A lane is topped up when it will be free in less than the network's delay plus this."""

RIVALS_MAX: Final = 12
"""At most this many of the most urgent strategies are compared where they conflict."""

RELAXED: Final = 2
"""A request is relaxed if its SLO is more than this many times the tightest on its device."""

AMPLE: Final = 2
"""It has ample time while more than this part (1 / ``AMPLE``) of its SLO is left. Short batches serve fewer:
in overload they would cost others far more than the tight requests gain."""

DOUBTFUL: Final = 8
"""A LOAD is doubtful if it leaves less than this part (1 / ``DOUBTFUL``) of the SLO for messages."""

SHORT: Final = 2
"""Time is short (a lane is in overload) once its busy period is longer than this many SLOs."""

SCANNED_MAX: Final = 24
"""At most this many strategies are examined for a more efficient batch where time is short."""

PRESSED: Final = 4
"""A lane is pressed if its most urgent batch has less slack than its SLO divided by this."""

BETTER: Final = 1.02
"""A batch is more efficient if it serves this many times as many requests per lane time."""

COPIED: Final = 4
"""Idle memory takes another copy if this part (1 / ``COPIED``) of the horizon does not suffice for demand."""

KEPT_FREE: Final = 16
"""This part (1 / ``KEPT_FREE``) of a device's pages takes no copies."""

ROOMY_MAX: Final = 8
"""At most this many devices are tried for a copy."""

PATIENT: Final = 8
LAX: Final = 64
"""Requests may be left to devices in use if their SLO is between so many times as long as one of them takes.

With a longer one nobody waits for a deadline: such clients want throughput.
"""

LEFT_MAX: Final = 8
"""At most this many batches are left to others in one decision: where there are more, there is much to do."""

IDLE: Final = 2
"""Devices are not busy if this many times what is asked of them would still be done in time."""

SPARED: Final = 4
"""They are left to others for as long as this part (1 / ``SPARED``) of their SLO is to spare."""

OTHERS_MAX: Final = 4
"""At most this many other devices are considered for that."""

TIGHT_NS: Final = NS_PER_S
"""How long an SLO counts on a device after the last request that had it."""


class Choice:
    """A batch that a strategy could run now: requests from index ``first`` on, or ``waiters`` if given.

    It must start by ``latest_ns`` and takes ``lasts_ns``; ``cost_ns`` is ``lasts_ns`` divided by the number
    of devices that could serve the queue.
    """

    __slots__ = ("batch", "cost_ns", "first", "lasts_ns", "latest_ns", "rank", "strategy", "waiters")

    def __init__(
        self, strategy: Strategy, first: int, batch: BatchChoice, due_ns: int,
        waiters: list[Waiter] | None = None,
    ) -> None:  # fmt: skip
        self.strategy = strategy
        self.first = first
        self.waiters = waiters
        self.batch = batch
        self.lasts_ns = batch.samples.estimate_ns
        self.latest_ns = due_ns - self.lasts_ns
        self.cost_ns = self.lasts_ns // len(strategy.queue.strategies)
        self.rank = strategy.queue.band_ns
        """Lower for a more urgent class."""


class Tight(Record):
    """The tightest SLO of recent requests on a device."""

    __slots__ = ("_infer_ns", "_queue", "_wait_ns", "band_ns", "slo_ns", "until_ns")

    def __init__(self, strategy: Strategy, slo_ns: int, wait_ns: int, until_ns: int) -> None:
        self._queue = strategy.queue
        self.band_ns = strategy.queue.band_ns
        self._infer_ns = strategy.batches[0].samples.estimate_ns
        self._wait_ns = wait_ns
        self.slo_ns = slo_ns
        self.until_ns = until_ns

    def room_ns(self) -> int:
        """How long other work may occupy the lane.

        As long as the tight requests can wait; longer if other devices serve them, too, for one of those is
        likely to be free sooner (measured on the paper's Fig 8).
        """
        devices = len(self._queue.strategies) or 1
        return self._wait_ns + 2 * self._infer_ns * (devices - 1) // devices


class Filling(Timer):
    """Queues whose next batches wait for more requests. Itself the timer of the first that has to run."""

    __slots__ = ("queues",)

    def __init__(self) -> None:
        super().__init__(-3)
        self.queues: list[tuple[int, int, Queue]] = []
        """Heap of (until when at most, queue order, queue)."""

    def add(self, queue: Queue, until_ns: int) -> None:
        """Add a queue, or have it wait less."""
        queue.filling_until_ns = until_ns
        heappush(self.queues, (until_ns, queue.order, queue))

    def due(self, now_ns: int) -> list[Queue]:
        """Remove and return those that have waited for long enough."""
        found = []
        while self.queues and self.queues[0][0] <= now_ns:
            until_ns, _, queue = heappop(self.queues)
            if until_ns == queue.filling_until_ns:
                queue.filling_until_ns = NEVER_NS
                found.append(queue)
        return found

    def next_ns(self) -> int:
        """When the first of them has."""
        return self.queues[0][0] if self.queues else NEVER_NS


class DefaultScheduler(PaperScheduler):
    """The default policy; see the module for the differences to its base class."""

    def __init__(self, belief: Belief) -> None:
        super().__init__(belief)
        belief.measures = belief.keeps_promises = True
        self._by_popularity = True
        self._candidates = Candidates(belief, by_due=True)
        self._spare = False
        """Where time is short, accept a LOAD only for models that could wait for another LOAD before it."""
        self._short = False
        """While ``_spare``: time was short for some model."""
        self._network_ns = belief.config.network_ns
        self._capacity_ns = belief.config.capacity_ns
        self._tight: dict[Agenda, Tight] = {}
        self._filling = Filling()
        self._roomy: dict[Agenda, None] = {}
        """Devices that have pages for copies."""
        self._all_above_ns = belief.dirty_above_ns
        """``Belief.dirty_above_ns`` where there is no memory, or no time, for copies."""

    def queued(self, queue: Queue) -> None:
        """As in ``paper``; also updates popularity and the tightest SLO of devices."""
        first = queue.waiters[0]
        slo_ns, arrival_ns = first.slo_ns, first.request.arrival_ns
        queue.model.popularity = popularity_after(
            queue.model.popularity, queue.waiters[-1].request.arrival_ns
        )
        until_ns = arrival_ns + TIGHT_NS
        for strategy in queue.strategies:
            tight = self._tight.get(strategy.device.agenda)
            if tight is not None and slo_ns == tight.slo_ns:
                tight.until_ns = until_ns
            elif tight is None or slo_ns < tight.slo_ns or arrival_ns > tight.until_ns:
                wait_ns = slo_ns - strategy.batches[0].samples.estimate_ns - 2 * self._network_ns
                if wait_ns >= 0:  # else the SLO cannot be met, and shorter batches of others do not help
                    self._tight[strategy.device.agenda] = Tight(strategy, slo_ns, wait_ns, until_ns)
        if arrival_ns >= self._belief.busy_until_ns or not self._held(queue, arrival_ns):
            PaperScheduler.queued(self, queue)  # super() takes 100 ns more

    def device_lost(self, device: DeviceBelief) -> None:
        """Forget the device."""
        self._tight.pop(device.agenda, None)
        self._roomy.pop(device.agenda, None)
        super().device_lost(device)

    def device_changed(self, device: DeviceBelief) -> None:
        """As in ``paper``; also notes whether it has memory for copies."""
        self._find_roomy(device)
        super().device_changed(device)

    def load_changed(self, device: DeviceBelief) -> None:
        """As in ``paper``; also notes whether it has memory for copies, and ends waiting for weights."""
        self._find_roomy(device)
        if device.reserved:
            self._mark_exec_dirty(device.agenda)
        super().load_changed(device)

    def exec_changed(self, device: DeviceBelief) -> None:
        """As in ``paper``; also notes whether it has time for copies."""
        if device.agenda in self._roomy and COPIED * device.demand_ns < self._capacity_ns:
            self._belief.dirty_above_ns = self._all_above_ns // COPIED
        PaperScheduler.exec_changed(self, device)

    def _find_roomy(self, device: DeviceBelief) -> None:
        free = device.pages.count - device.pages.used
        if device.up and free > device.pages.count // KEPT_FREE:
            self._roomy[device.agenda] = None
        else:
            self._roomy.pop(device.agenda, None)
        self._belief.dirty_above_ns = self._all_above_ns // COPIED if self._roomy else self._all_above_ns

    def schedule(self, now_ns: int) -> None:
        """As in ``paper``; first the queues whose batches were filled for long enough."""
        if self._filling.queues:
            for queue in self._filling.due(now_ns):
                if queue.dues and not self._held(queue, now_ns):
                    PaperScheduler.queued(self, queue)
            self._timers.set(self._filling, self._filling.next_ns())
        PaperScheduler.schedule(self, now_ns)

    # Exec lanes

    def _held(self, queue: Queue, now_ns: int) -> bool:
        """Whether no device is to look at a queue yet."""
        return bool(queue.strategies) and self._fills(queue.strategies[0], now_ns)

    def _fills(self, strategy: Strategy, now_ns: int) -> bool:
        """Whether a batch waits for more requests while the controller is busy and devices are not.

        An action costs the controller more than twice as much as a request in it. So none is sent for fewer
        than the largest batch, for as long as there is time to spare: where devices have time for all that
        is asked, larger batches serve more only by that.
        """
        queue, device = strategy.queue, strategy.device
        largest = strategy.batches[-1]
        if len(queue.dues) >= largest.count:
            return False
        held_until_ns = queue.filling_until_ns
        if held_until_ns == NEVER_NS and (device.reserved or IDLE * device.demand_ns > self._capacity_ns):
            return False
        first = queue.waiters[0]
        until_ns = min(
            first.due_ns - first.slo_ns // SPARED - largest.samples.estimate_ns - self._network_ns,
            first.request.arrival_ns + self._capacity_ns,  # without a deadline none waits for ever
            self._belief.busy_until_ns,
        )
        if until_ns <= now_ns:
            return False
        if until_ns < held_until_ns:  # the first, or one that is due sooner than those that wait
            self._filling.add(queue, until_ns)
            self._timers.set(self._filling, self._filling.next_ns())
        return True

    def _top_up_exec(self, agenda: Agenda, now_ns: int) -> None:
        device, heap = agenda.device, agenda.heap
        lane, sent = device.exec, device.exec.outstanding
        reach_ns = lane.network_ns + device.delays.transfer_out_ns + MARGIN_NS  # results come so much later
        late_ns = now_ns - lane.head_end_ns
        while agenda.top() is not None:
            start_ns = lane.available_ns(now_ns)
            # Full: it has work for as long as the next action takes to arrive, or its running action is so
            # late that its end cannot be predicted.
            if start_ns >= now_ns + reach_ns or (late_ns > self._lag_ns and (lane.stalled or len(sent) > 1)):
                agenda.exec_full = True
                if late_ns <= 0:  # else its next result says when there is room again
                    self._timers.set(agenda.exec_timer, start_ns - reach_ns + 1)
                return
            strategy = heappop(heap)[2]
            top_ns, strategy.key_ns = strategy.key_ns, NEVER_NS
            # Due times leave the slack that some device needs; this one may need more.
            from_ns = start_ns + (device.delays.extra_ns and self._belief.extra_ns(device, now_ns))
            choice = self._best(strategy, from_ns) if strategy.queue.dues else None
            if choice is None:
                self._drop_outliers(strategy, from_ns, now_ns)
                continue
            if self._waits(choice, now_ns):
                continue
            after = agenda.top()
            if after is not None:
                band_ns = strategy.queue.band_ns
                key_ns = choice.latest_ns + band_ns
                # Keys are lower bounds: this one was too low, and another strategy is more urgent.
                if key_ns > after.key_ns and key_ns > top_ns:
                    agenda.push(strategy, key_ns)
                    continue
                # If it runs first, the next one, or one of a class below, is too late: choose which to drop.
                end_ns = from_ns + choice.cost_ns + band_ns
                if end_ns > after.key_ns or len(self._belief.waiting_by_class) > 1:
                    choice = self._least_loss(agenda, choice, from_ns)
            if choice.batch.count < len(choice.strategy.queue.dues):
                choice = self._fuller(self._better(agenda, choice, from_ns, now_ns), from_ns)
            choice = self._relaxed(agenda, choice, now_ns)
            if device.reserved:
                choice = self._kept(choice, start_ns)
                if choice is None:
                    return
            strategy = choice.strategy
            self._belief.send_infer(strategy, choice.batch, choice.first, start_ns, now_ns, choice.waiters)
            if strategy.queue.dues:
                self._enqueue(strategy)

    def _waits(self, choice: Choice, now_ns: int) -> bool:
        """Whether a batch is not for now, or not for this device."""
        strategy = choice.strategy
        if now_ns < self._belief.busy_until_ns and self._fills(strategy, now_ns):
            return True
        return not strategy.lane.outstanding and self._left_to_others(choice, now_ns)

    def _left_to_others(self, choice: Choice, now_ns: int) -> bool:
        """Whether an idle device leaves a batch to one before it, which can well run it in time.

        Where there is little to do, few devices do it, in larger batches; the others stay idle, and can be
        seen to be needless. Not where the SLO is tight: what comes next may need the time that was left.
        """
        strategy, agenda = choice.strategy, choice.strategy.agenda
        slo_ns = strategy.queue.waiters[choice.first].slo_ns
        lasts_ns = strategy.least.estimate_ns
        if not PATIENT * lasts_ns <= slo_ns <= LAX * lasts_ns or agenda.device.reserved:
            return False
        if len(self._left) >= LEFT_MAX:
            return False
        limit_ns = choice.latest_ns - slo_ns // SPARED
        if now_ns + agenda.device.exec.network_ns >= limit_ns:
            return False
        others = 0
        for other in strategy.queue.strategies:
            if other.device.index < agenda.device.index and other.residency.serves:
                others += 1
                if other.lane.available_ns(now_ns) <= limit_ns:
                    self._left.append(strategy)
                    wake_ns = limit_ns - agenda.device.exec.network_ns
                    if wake_ns < agenda.exec_timer.at_ns:
                        self._timers.set(agenda.exec_timer, wake_ns)
                    return True
                if others == OTHERS_MAX:
                    break
        return False

    def _kept(self, choice: Choice, start_ns: int) -> Choice | None:
        """The choice, if as many promises are kept after it; else the first reservation that keeps as many.

        None if there is none: the lane waits for weights that are still loading. A choice that does not run
        is put back into the agenda; one that cannot wait outranks promises of less urgent classes.
        """
        device, queue = choice.strategy.device, choice.strategy.queue
        waiters = queue.waiters[choice.first : choice.first + choice.batch.count]
        if len(waiters) < choice.batch.count:  # the plan has time again for those of other classes that join
            waiters += joining(queue, choice.batch.count - len(waiters), start_ns + choice.lasts_ns)
        if is_next(device, waiters, start_ns, choice.lasts_ns) or fits_in_any_order(
            device, start_ns, choice.lasts_ns, NEVER_NS
        ):
            return choice
        if not missed(device, waiters, start_ns + choice.lasts_ns, margin=True):
            return choice
        least = missed(device, [], start_ns, margin=False)
        if least and missed(device, waiters, start_ns + choice.lasts_ns, margin=False) <= least:
            return choice
        best: Choice | None = None
        for one in device.reserved:
            if one.residency.state == READY:
                planned = self._planned(one)
                end_ns = start_ns + planned.lasts_ns
                if missed(device, planned.waiters or [], end_ns, margin=False) <= least:
                    best = planned
                    break
        if self._outranks(choice, best, waiters, start_ns):
            return choice
        if best is None:
            self._wait_for_weights(device, start_ns)
        if best is None or best.strategy is not choice.strategy:
            strategy = choice.strategy
            strategy.agenda.push(strategy, choice.latest_ns + queue.band_ns)
        return best

    def _wait_for_weights(self, device: DeviceBelief, start_ns: int) -> None:
        """Have a waiting lane topped up once weights are too late for what they are promised to."""
        timer = device.agenda.exec_timer
        wake_ns = timer.at_ns
        for one in device.reserved:
            latest_ns = one.due_ns - one.batch.samples.estimate_ns
            if one.residency.state != READY and start_ns <= latest_ns < wake_ns:
                wake_ns = latest_ns + 1
        self._timers.set(timer, wake_ns)

    def _outranks(self, choice: Choice, first: Choice | None, waiters: list[Waiter], start_ns: int) -> bool:
        """Whether a choice runs though that breaks promises of less urgent classes, which are displaced.

        It does if it would be late after what would run ``first``, which is of such a class.
        """
        device, level = choice.strategy.device, choice.strategy.queue.level
        if first is None:
            planned = device.reserved[0]
            queue, end_ns = planned.queue, free_ns(planned.residency, start_ns) + planned.lasts_ns
        else:
            queue, end_ns = first.strategy.queue, start_ns + first.lasts_ns
        spare_ns = margin_ns(device, waiters[0].slo_ns, choice.batch.samples)
        if queue.level <= level or end_ns + spare_ns <= choice.latest_ns:
            return False
        ended = outranked(device, level, start_ns + choice.lasts_ns, sent=waiters)
        if ended is None:
            return False
        self._belief.displace(ended, Cause.OUTRANKED)
        return True

    def _planned(self, reservation: Reservation) -> Choice:
        """A reservation's batch, filled up with requests of its queue that are due no sooner."""
        queue, batch, residency = reservation.queue, reservation.batch, reservation.residency
        first = queue.waiters.index(reservation.waiters[0])
        others = [one for one in queue.waiters[first:] if one.place is not reservation]
        waiters = [*reservation.waiters, *others[: batch.count - len(reservation.waiters)]]
        strategy = next(each for each in queue.strategies if each.residency is residency)
        filled = BatchChoice(len(waiters), batch.size, batch.samples)
        return Choice(strategy, first, filled, reservation.due_ns, waiters)

    def _best(self, strategy: Strategy, start_ns: int) -> Choice | None:
        """The largest batch that meets the due time of the first request that is feasible at all."""
        dues, batches = strategy.queue.dues, strategy.batches
        if not dues:
            return None
        best = batches[0]
        soonest_ns = start_ns + best.samples.estimate_ns
        first = 0 if dues[0] >= soonest_ns else bisect_left(dues, soonest_ns)
        waiting = len(dues) - first
        if waiting <= 0:
            return None
        due_ns = dues[first]
        for batch in batches:
            if best.count >= waiting:
                break
            infer_ns = batch.samples.estimate_ns
            if start_ns + infer_ns > due_ns:
                break
            if batch.count <= waiting:
                best = batch
            # A batch that is not full runs all waiting requests, if that takes less time for each than the
            # full one below.
            elif waiting * best.samples.estimate_ns > best.count * infer_ns:
                best = BatchChoice(waiting, batch.size, batch.samples)
        return Choice(strategy, first, best, due_ns)

    def _least_loss(self, agenda: Agenda, urgent: Choice, start_ns: int) -> Choice:
        """The choice to run first so that as few requests as possible are late.

        Moore and Hodgson: in order of urgency, whenever a choice would start too late, drop the one so far
        that serves the fewest requests per lane time. Class by class: none is dropped for one of a class
        below. All but the returned one are put back into the agenda.
        """
        rivals = self._rivals(agenda, urgent, start_ns)
        kept: list[Choice] = []
        for choice in sorted(rivals, key=_class_and_latest):
            at = len(kept)
            while at and kept[at - 1].latest_ns > choice.latest_ns:
                at -= 1
            kept.insert(at, choice)
            late = _late(kept, start_ns)
            if late >= 0:  # they do not all fit: drop the least efficient of this class
                alike = [one for one in kept[late::-1] if one.rank == choice.rank]
                kept.remove(min(alike or [choice], key=_efficiency))  # of equals, the one that is due last
        winner = kept[0] if kept else min(rivals, key=_class_and_latest)  # it may still be in time
        if kept:
            winner = self._share(winner, kept, start_ns)
            first = min(kept, key=_class_and_latest)
            if first.rank < winner.rank:  # it gives way only where that serves as much for the time
                first = self._share(first, kept, start_ns)
                if _efficiency(first) > _efficiency(winner):
                    winner = first
        for choice in rivals:
            if choice.strategy is not winner.strategy:
                agenda.push(choice.strategy, choice.latest_ns + choice.rank)
        return winner

    def _rivals(self, agenda: Agenda, urgent: Choice, start_ns: int) -> list[Choice]:
        """The most urgent choices, taken out of the agenda: those that cannot all wait for those before them.

        Where there are several classes, also those that can: one of a class below may not.
        """
        rivals, end_ns = [urgent], start_ns + urgent.cost_ns
        several = len(self._belief.waiting_by_class) > 1
        while (
            len(rivals) < (SCANNED_MAX if several else RIVALS_MAX) and (strategy := agenda.top()) is not None
        ):
            if strategy.key_ns >= end_ns + urgent.rank and not several:
                break
            agenda.pop()
            choice = self._best(strategy, start_ns)
            if choice is not None:
                rivals.append(choice)
                end_ns += choice.cost_ns
        return rivals

    def _share(self, choice: Choice, kept: list[Choice], start_ns: int) -> Choice:
        """A larger batch that requests of other classes of the model fill up, if it is more efficient.

        Its own requests are still in time, and so are those in ``kept`` of classes above any that join, even
        if as much comes for these meanwhile as the batch takes.
        """
        strategy, queue = choice.strategy, choice.strategy.queue
        others = sharers(queue)
        if not others:
            return choice
        due_ns = queue.dues[choice.first]
        for batch in strategy.batches:
            lasts_ns = batch.samples.estimate_ns
            if batch.count <= choice.batch.count:
                continue
            if start_ns + lasts_ns > due_ns:
                break
            count, rank = len(queue.dues) - choice.first, queue.band_ns
            for other in others:
                joining = len(other.dues) - bisect_left(other.dues, start_ns + lasts_ns)
                if joining and count < batch.count:
                    count, rank = min(count + joining, batch.count), max(rank, other.band_ns)
            if count * choice.lasts_ns <= choice.batch.count * lasts_ns:
                continue
            end_ns = start_ns + lasts_ns // len(queue.strategies) + lasts_ns
            above = [one for one in kept if one.rank < rank and one.strategy is not strategy]
            if lasts_ns > choice.lasts_ns and not _all_in_time(above, end_ns):
                break
            choice = Choice(strategy, choice.first, BatchChoice(count, batch.size, batch.samples), due_ns)
        return choice

    def _better(self, agenda: Agenda, choice: Choice, start_ns: int, now_ns: int) -> Choice:
        """The most urgent more efficient batch of another strategy, if time is short; else ``choice``.

        Only if this batch is smaller than one that its waiting requests could fill. Requests with much longer
        SLOs are not preferred: they can wait until time is not short. All but the returned choice are put
        back into the agenda.
        """
        queue, count = choice.strategy.queue, choice.batch.count
        slo_ns = queue.waiters[choice.first].slo_ns  # others of this queue may have far longer ones
        if now_ns - agenda.device.exec.busy_since_ns <= SHORT * slo_ns:
            return choice
        waiting = len(queue.dues) - choice.first
        if not any(count < batch.count <= waiting for batch in choice.strategy.batches):
            return choice  # no larger batch could be filled
        passed: list[Choice] = []
        winner = choice
        while len(passed) < SCANNED_MAX and winner is choice and (strategy := agenda.top()) is not None:
            if strategy.queue.band_ns != queue.band_ns:
                break  # a class of priority never gives way to a less urgent one
            agenda.pop()
            other = self._best(strategy, start_ns)
            if other is None:
                continue
            if strategy.queue.waiters[-1].slo_ns <= RELAXED * slo_ns and _efficiency(
                other
            ) > BETTER * _efficiency(choice):
                winner = other
            else:
                passed.append(other)
        if winner is not choice:
            passed.append(choice)
        for other in passed:
            agenda.push(other.strategy, other.latest_ns + queue.band_ns)
        return winner

    def _fuller(self, choice: Choice, start_ns: int) -> Choice:
        """A larger batch that skips the first requests, if it is more efficient and cannot run later."""
        strategy, batch = choice.strategy, choice.batch
        if len(strategy.queue.dues) - choice.first <= batch.count:
            return choice
        fit = self._choose(strategy, start_ns)
        if fit is None:
            return choice
        larger, first, _ = fit
        if larger.count * choice.lasts_ns <= batch.count * larger.samples.estimate_ns:
            return choice
        fuller = Choice(strategy, first, larger, strategy.queue.dues[first])
        return fuller if start_ns + choice.cost_ns > fuller.latest_ns else choice

    def _relaxed(self, agenda: Agenda, choice: Choice, now_ns: int) -> Choice:
        """A smaller, shorter batch, if these requests have ample time and others on this device are tight."""
        tight = self._tight.get(agenda)
        if tight is None or now_ns > tight.until_ns:
            return choice
        strategy = choice.strategy
        if tight.band_ns > strategy.queue.band_ns:
            return choice  # the tight requests are of a less urgent class
        slo_ns = strategy.queue.waiters[choice.first].slo_ns
        if slo_ns <= RELAXED * tight.slo_ns or choice.latest_ns - now_ns <= slo_ns // AMPLE:
            return choice
        room_ns = tight.room_ns()
        if choice.lasts_ns <= room_ns:
            return choice
        short = strategy.batches[0]
        for batch in strategy.batches:
            if batch.count <= choice.batch.count and batch.samples.estimate_ns <= room_ns:
                short = batch
        return Choice(strategy, choice.first, short, strategy.queue.dues[choice.first])

    # LOADs

    def _top_up_loads(self, now_ns: int) -> None:
        """As in ``paper``; then idle load lanes take copies into idle memory."""
        asked = [model for model in self._belief.dirty_models if model.waiting] if self._roomy else []
        super()._top_up_loads(now_ns)
        for model in asked:
            if self._candidates.top() is not None:
                return  # a LOAD that is needed comes first
            if model.waiting and model.residencies and not model.removed:
                self._copy(model, now_ns)

    def _copy(self, model: ServedModel, now_ns: int) -> None:
        """Send a LOAD of another copy of a model that is asked for, if a device is idle enough to take it.

        It evicts nothing, and leaves half of the load lanes idle for LOADs that are needed.
        """
        if self._candidates.priority(model, COPIED) <= 0:
            return
        best: DeviceBelief | None = None
        tried = idle = 0
        for agenda in islice(self._roomy, ROOMY_MAX):
            device = agenda.device
            if COPIED * device.demand_ns >= self._capacity_ns:
                continue  # a copy would take time from others there
            tried += 1
            if device.load.outstanding:
                continue
            idle += 1
            if (
                device.name not in model.residencies and device.code_of(model) is not None
                and (best is None or device.demand_ns < best.demand_ns)
            ):  # fmt: skip
                best = device
        if not tried:
            self._belief.dirty_above_ns = self._all_above_ns  # until one has time again
        if best is None or 2 * (idle - 1) < tried - 1:
            return
        extent = best.pages.gap(best.spec.pages_of(model.model.weights.size))
        if extent is not None:
            self._belief.send_load(best, model, extent, best.load.available_ns(now_ns), now_ns)
            self._rank_dirty()
            self._has_room(best.agenda, now_ns)

    def _load_ahead_ns(self, agenda: Agenda) -> int:
        """As for exec lanes, only as far ahead as the network needs."""
        device = agenda.device
        return max(device.exec.network_ns, device.load.network_ns) + MARGIN_NS

    def _has_room(self, agenda: Agenda, now_ns: int) -> bool:
        """As in ``paper``, but False while INFERs go first."""
        return not self._infers_first(agenda, now_ns) and super()._has_room(agenda, now_ns)

    def _offer(self, model: ServedModel, now_ns: int) -> None:
        for agenda in tuple(self._free):
            self._infers_first(agenda, now_ns)
        super()._offer(model, now_ns)

    def _infers_first(self, agenda: Agenda, now_ns: int) -> bool:
        """Whether LOADs have to wait for INFERs; if so, they are tried again when the exec lane changes.

        They have where both lanes use the same cores, the exec lane is pressed, and no model of a more urgent
        class needs a LOAD. One LOAD per SLO is sent even so; otherwise models that are on no device would
        starve.
        """
        device = agenda.device
        first = self._candidates.top() if device.spec.lanes_share else None
        top = agenda.top() if first is not None else None
        if first is None or top is None or not top.queue.waiters:
            return False
        queue = top.queue
        slo_ns, band_ns = queue.waiters[-1].slo_ns, queue.band_ns
        if (
            top.key_ns - band_ns - device.exec.available_ns(now_ns) >= slo_ns // PRESSED
            or first.band_ns < band_ns
            or now_ns - device.load.free_ns >= slo_ns
        ):
            return False
        self._free.pop(agenda, None)
        agenda.load_blocked = True
        return True

    def _load_one(self, agenda: Agenda, now_ns: int) -> bool:
        """Where time is short, first try models that could wait for another LOAD.

        Weights that are ready at the last moment are often useless: the exec lane has other work just then.
        """
        self._spare, self._short = True, False
        sent = super()._load_one(agenda, now_ns)
        self._spare = False
        return sent or (self._short and super()._load_one(agenda, now_ns))

    def _load(self, agenda: Agenda, model: ServedModel, now_ns: int) -> bool:
        """As in ``paper``; a further copy is not tried again where there was room for none."""
        if agenda.in_vain and model.residencies and no_copy(agenda.device, model):
            return False
        return super()._load(agenda, model, now_ns)

    def _timely(self, agenda: Agenda, model: ServedModel, start_ns: int, now_ns: int) -> bool:
        """Whether a LOAD that starts then is useful for a waiting request, or for later ones."""
        timings = agenda.device.codes[model.code_id].timings
        load_ns = timings.load(model.model.weights.size).estimate_ns
        queues = [queue for queue in model.queues.values() if queue.waiters]
        if self._spare:
            busy_ns = now_ns - agenda.device.load.busy_since_ns
            if any(busy_ns > SHORT * queue.waiters[-1].slo_ns for queue in queues):
                self._short = True
                start_ns += load_ns
        return super()._timely(agenda, model, start_ns, now_ns) or self._for_others(queues, timings, load_ns)

    def _for_others(self, queues: list[Queue], timings: Timings, load_ns: int) -> bool:
        """Whether a LOAD takes longer than a waiting request ever had, so that only later ones profit."""
        load_ns += max(self._belief.config.slack_ns, self._belief.slack_ns)
        for queue in queues:
            last, infer_ns = queue.waiters[-1], timings.infer(queue.least, queue.signature).estimate_ns
            spare_ns = max(NS_PER_MS, last.slo_ns // DOUBTFUL)
            if last.slo_ns - last.request.way_ns < load_ns + infer_ns + spare_ns:
                return True
        return False


def _class_and_latest(choice: Choice) -> tuple[int, int]:
    return choice.rank, choice.latest_ns


def _late(choices: list[Choice], start_ns: int) -> int:
    """The index of the first of them that is late if they run in this order, from ``start_ns``; else -1.

    After one of a less urgent class, a part of the SLO must be left: others of its class may come meanwhile.
    """
    lowest = choices[0].rank if choices else 0
    for at, choice in enumerate(choices):
        latest_ns = choice.latest_ns
        if choice.rank < lowest:
            latest_ns -= choice.strategy.queue.waiters[choice.first].slo_ns // PRESSED
        else:
            lowest = choice.rank
        if start_ns > latest_ns:
            return at
        start_ns += choice.cost_ns
    return -1


def _all_in_time(choices: list[Choice], start_ns: int) -> bool:
    """Whether all are in time if they run in this order, from ``start_ns``."""
    for choice in choices:
        if start_ns > choice.latest_ns:
            return False
        start_ns += choice.cost_ns
    return True


def _efficiency(choice: Choice) -> float:
    """Requests served per ns of lane."""
    return choice.batch.count / choice.lasts_ns
