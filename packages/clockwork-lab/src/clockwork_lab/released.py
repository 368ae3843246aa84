"""Policy ``released``: the habits of the code that the paper's authors published (INFER5), for comparison.

Differences to ``paper``:

- A strategy is a queue *and a batch size* on one device. Its key, the due time of the first request there
  minus the estimate, is never updated: a new request changes nothing if its queue has strategies.
- When the most urgent strategy is tried, all others of its queue on that device are removed with it. If too
  few requests wait for it, those of smaller batches are added again; if an action is sent, those of all
  batches that a request waits for. So only a queue's most urgent strategy is kept: its key, and its batch in
  ``_counts``.
- Each batch size has a queue of its own (``_floors``), shared by all devices. A request that would be too
  late at that size, on the device at hand, is removed from it for good. When a batch is sent, the requests
  before it are removed from the queues of all sizes, and wait until they expire.
- Devices are served in turn, one action each.
- LOADs are sent whatever their priority, and whether or not a waiting request can still be in time.
- No request is planned to end sooner than the look-ahead and the slack after its arrival. One that waits
  expires when its plan has failed, one that was sent at its deadline (``InternalDeadlines``).
- Every action may start until the look-ahead after its planned start.
- Nobody notices that a lane does not move.

Where requests of one model have different SLOs, earliest deadline comes first; in the published code it is
first come, first served. Its constants are settings of the controller: ``settings``.

It is written anew from ``paper``, and is no subclass of it: mypyc may have compiled that.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import (
    Agenda,
    DeviceBelief,
    LaneTimer,
    Queue,
    Residency,
    ServedModel,
    StallTimer,
    Strategy,
    Waiter,
)
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.life import SENT, WAITING
from clockwork_serve.controller.placement import Candidates, make_room
from clockwork_serve.controller.policies.base import Scheduler
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS, Timer, Timers
from clockwork_serve.messages import Infer, Load, Outcome, Reason, Window
from clockwork_serve.units import NS_PER_MS

if TYPE_CHECKING:
    Base = Record
else:  # compiled records have no interpreted subclasses; they cannot be forked or saved anyway
    Base = object if hasattr(Queue, "__mypyc_attrs__") else Record

ANY: Final = 1 << 30
"""More requests than any batch has."""

SURFACED_MAX: Final = 64
"""LOAD candidates tried for one device in one decision."""

STALE_MIN: Final = 64
"""Of entries that may be stale, as many are kept before the first are dropped."""

Fit = tuple[BatchChoice, int]
"""A batch whose requests are feasible, and the index of its first request in the queue."""


def settings(*, max_batch: int = 8, expected_devices: int = 1) -> ControllerConfig:
    """The constants of the published code: a fixed buffer of 5 ms, 1 ms of assumed network, no rejection."""
    return ControllerConfig(
        policy="released", reject_infeasible=False, slack_ns=5 * NS_PER_MS, network_ns=NS_PER_MS,
        max_batch=max_batch, min_batch_gain=0.0, expected_devices=expected_devices, hang_ns=0,
    )  # fmt: skip


class InternalDeadlines(Base):
    """When requests expire: one that waits at its due time, one that was sent at its deadline."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self.timer = Timer(-1)
        """Fires at the first instant at which a request may expire."""
        self._near: list[tuple[int, str, Waiter]] = []
        """Heap of (instant, request id, request)."""
        self._known: dict[Waiter, None] = {}
        """All requests in the heap."""

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._known

    def add(self, waiter: Waiter) -> None:
        """Add a request that was admitted."""
        self._known[waiter] = None
        self._push(waiter, waiter.due_ns)

    def passed(self, now_ns: int) -> list[Waiter]:
        """Remove and return the requests that expire now, by expiry."""
        passed: list[Waiter] = []
        while self._near and self._near[0][0] <= now_ns:
            waiter = heappop(self._near)[2]
            deadline_ns = waiter.request.deadline_ns
            if waiter.state == SENT and deadline_ns > now_ns:
                self._push(waiter, deadline_ns)
                continue
            del self._known[waiter]
            if waiter.state <= SENT:
                passed.append(waiter)
        return passed

    def correct(self) -> None:
        """Drop requests that are over from the front, and set the timer again."""
        near = self._near
        while near and near[0][2].state > SENT:
            del self._known[heappop(near)[2]]
        at_ns = near[0][0] if near else NEVER_NS
        if at_ns != self.timer.at_ns:
            self._timers.set(self.timer, at_ns)

    def check(self, waiters: list[Waiter]) -> None:
        """Assert that each of these unanswered requests is here."""
        assert {id(waiter) for _, _, waiter in self._near} == {id(waiter) for waiter in self._known}
        for waiter in waiters:
            assert waiter in self, f"{waiter.request.request_id} has no deadline pending"

    def _push(self, waiter: Waiter, at_ns: int) -> None:
        heappush(self._near, (at_ns, waiter.request.request_id, waiter))


class Loads(Base):
    """Sends LOADs for every model that is asked for and is not everywhere, the most wanted first."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self._look_ahead_ns = belief.config.look_ahead_ns
        self._ranks = Candidates(belief)
        """Shares demand among devices, and says how much of it they cannot serve."""
        self._heap: list[tuple[int, int, ServedModel]] = []
        """(class less priority, order, model); stale where ``model.load_key`` differs."""
        self._full = STALE_MIN
        self._free: dict[Agenda, None] = {}
        """Devices whose load lanes had room when last checked."""
        self._dirty: list[Agenda] = []
        """Devices for which all candidates are to be tried; the others need to try new ones only."""
        self._fresh: list[ServedModel] = []
        """Candidates whose demand or residencies changed."""

    def mark(self, agenda: Agenda) -> None:
        """Have a load lane topped up."""
        agenda.load_blocked = agenda.room_blocked = False
        if not agenda.load_dirty:
            agenda.load_dirty = True
            self._dirty.append(agenda)

    def lost(self, agenda: Agenda) -> None:
        """A device is gone."""
        self._free.pop(agenda, None)

    def top_up(self, now_ns: int) -> None:
        """Send LOADs until none is possible on any free load lane; each one sent may change the others."""
        if not self._dirty and not (self._free and self._belief.dirty_models):
            return
        self._rank_dirty()
        while self._dirty or self._fresh:
            if self._dirty:
                awake, self._dirty = self._dirty, []
                for agenda in awake:
                    agenda.load_dirty = False
                    if agenda.device.up and self._has_room(agenda, now_ns) and self._load_one(agenda, now_ns):
                        self.mark(agenda)
                continue
            fresh, self._fresh = self._fresh, []
            fresh.sort(key=_wanted)
            for model in fresh:
                if model.load_key is not None:
                    self._offer(model, now_ns)

    def _rank_dirty(self) -> None:
        dirty = self._belief.dirty_models
        for model in dirty:
            model.dirty = False
            if model.sole is None and model.residencies:
                self._ranks.share(model)
            if self._enqueue(model):
                self._fresh.append(model)
                continue
            for residency in model.residencies.values():
                agenda = residency.device.agenda
                if agenda.in_vain and not residency.in_flight:
                    residency.loosen()
                if agenda.room_blocked and not model.waiting and agenda.may_load():
                    self.mark(agenda)
        dirty.clear()

    def _enqueue(self, model: ServedModel) -> bool:
        """Add a model to the heap, or update its key, if it is a candidate; true if it is."""
        able = self._belief.capable_devices(model.code.backend)
        if not model.waiting or model.removed or 0 < able <= len(model.residencies):
            model.load_key = None
            return False
        key = model.band_ns - self._ranks.priority(model)
        if key != model.load_key:
            model.load_key = key
            heappush(self._heap, (key, model.order, model))
            if len(self._heap) > self._full:
                live = {id(entry[2]): entry for entry in self._heap if entry[2].load_key == entry[0]}
                self._heap = list(live.values())
                heapify(self._heap)
                self._full = 2 * len(self._heap) + STALE_MIN
        return True

    def _pop(self) -> ServedModel | None:
        """Remove and return the first model; None if there is none."""
        while self._heap:
            key, _, model = heappop(self._heap)
            if model.load_key == key:
                model.load_key = None
                return model
        return None

    def _has_room(self, agenda: Agenda, now_ns: int) -> bool:
        """Whether a load lane has room for a LOAD; if not, its timer or next result has it tried again."""
        lane = agenda.device.load
        free_ns = lane.available_ns(now_ns)
        if free_ns < now_ns + self._look_ahead_ns:
            self._free[agenda] = None
            return True
        self._free.pop(agenda, None)
        if lane.overdue_ns(now_ns) <= 0:
            self._belief.timers.set(agenda.load_timer, free_ns - self._look_ahead_ns + 1)
        return False

    def _load_one(self, agenda: Agenda, now_ns: int) -> bool:
        """Send a LOAD of the first candidate for which there is room on a device; true if one was sent."""
        passed: list[ServedModel] = []
        sent = False
        while len(passed) < SURFACED_MAX and (model := self._pop()) is not None:
            passed.append(model)
            if self._load(agenda, model, now_ns):
                sent = True
                break
        for model in passed:
            self._enqueue(model)
        return sent

    def _offer(self, model: ServedModel, now_ns: int) -> None:
        """Send a LOAD of a model to the first device that has room."""
        for agenda in self._free:
            if self._load(agenda, model, now_ns):
                return

    def _load(self, agenda: Agenda, model: ServedModel, now_ns: int) -> bool:
        """Send a LOAD of a model to a device whose lane has room, if it has pages; true if it was sent."""
        device = agenda.device
        if device.name in model.residencies or model.code_id not in device.codes:
            return False
        start_ns = device.load.available_ns(now_ns)
        room = make_room(device, model, NEVER_NS)
        if room is None:
            agenda.room_blocked = agenda.room_blocked or not model.residencies
            return False
        for residency in room.evicted:
            self._belief.send_unload(residency, now_ns)
        self._belief.send_load(device, model, room.extent, start_ns, now_ns)
        widen_window(self._belief, start_ns)
        self._rank_dirty()
        self._has_room(agenda, now_ns)
        return True


def _wanted(model: ServedModel) -> tuple[int, int]:
    return (model.load_key or 0, model.order)


def _is_there(queue: Queue) -> bool:
    return bool(queue.dues) or (queue is queue.model.main and not queue.model.removed)


def widen_window(belief: Belief, start_ns: int) -> None:
    """Let the action that was just sent start until the look-ahead after its planned start."""
    action = belief.effects[-1]
    assert isinstance(action, Infer | Load)
    window = Window(action.window.earliest_ns, start_ns + belief.config.look_ahead_ns)
    belief.effects[-1] = belief.sent[action.action_id].action = replace(action, window=window)


class ReleasedScheduler(Scheduler, Base):
    """The published code's policy; see the module."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self._look_ahead_ns = belief.config.look_ahead_ns
        self._least_ns = belief.config.look_ahead_ns + belief.config.slack_ns
        """No request is planned to end sooner than this after its arrival."""
        self._loads = Loads(belief)
        self._deadlines = InternalDeadlines(belief.timers)
        self._changed: list[Agenda] = []
        """Devices whose exec lanes are to be topped up in the next ``schedule``, in order of change."""
        self._turn = 0
        self._counts: dict[Queue, dict[str, int]] = {}
        """By queue and device: the batch (requests) that the key of the strategy there is for."""
        self._floors: dict[Queue, dict[int, int]] = {}
        """By queue and batch (requests): those due before this are not run at that size."""
        self._full = STALE_MIN
        """The number of queues in these two above which those that are gone are dropped."""
        belief.keeps_deadlines = True
        belief.dirty_above_ns = -1

    # What changed

    def queued(self, queue: Queue) -> None:
        """A request was queued: add strategies where its queue has none."""
        waiters = self._belief.waiters
        newest = waiters[next(reversed(waiters))]
        if newest.state == WAITING and newest not in self._deadlines:  # else an older one was queued again
            self._plan(newest)
        if len(queue.dues) == 1:
            self._floors.pop(queue, None)
        for strategy in queue.strategies:
            if strategy.key_ns == NEVER_NS:
                self._add(strategy, ANY)
            self._mark_exec_dirty(strategy.agenda)

    def loaded(self, residency: Residency) -> None:
        """Weights became ready: add the new strategies."""
        if residency.model.removed:
            return
        for queue in residency.model.queues.values():
            strategy = queue.strategies[-1]
            if queue.waiters and strategy.residency is residency and strategy.key_ns == NEVER_NS:
                self._add(strategy, ANY)
        self._mark_exec_dirty(residency.device.agenda)

    def exec_changed(self, device: DeviceBelief) -> None:
        """Have the exec lane topped up, and the load lane, if a candidate was declined there."""
        agenda = device.agenda
        if agenda.may_load():
            self._loads.mark(agenda)
        if agenda.exec_full:
            timer_ns = agenda.exec_timer.at_ns
            if timer_ns != NEVER_NS and device.exec.free_ns - self._look_ahead_ns >= timer_ns - 1:
                return  # it is still full until the timer fires
            agenda.exec_full = False
        self._mark_exec_dirty(agenda)

    def load_changed(self, device: DeviceBelief) -> None:
        """Have the load lane topped up."""
        self._loads.mark(device.agenda)

    def device_changed(self, device: DeviceBelief) -> None:
        """Have both lanes topped up; nobody looks whether they move."""
        if device.stall_timer.at_ns:
            self._belief.timers.set(device.stall_timer, NEVER_NS)
            self._belief.timers.set(device.load_stall_timer, NEVER_NS)
            device.stall_timer = StallTimer(device, device.exec)
            device.load_stall_timer = StallTimer(device, device.load)
            device.stall_timer.at_ns = device.load_stall_timer.at_ns = 0  # they look set, so nobody sets them
        device.agenda.exec_full = False
        self._mark_exec_dirty(device.agenda)
        self._loads.mark(device.agenda)

    def device_lost(self, device: DeviceBelief) -> None:
        """Drop what is kept for the device."""
        agenda = device.agenda
        agenda.heap.clear()
        self._loads.lost(agenda)
        self._belief.timers.set(agenda.exec_timer, NEVER_NS)
        self._belief.timers.set(agenda.load_timer, NEVER_NS)

    def fired(self, timer: LaneTimer) -> None:
        """A lane that was full has room again."""
        if not timer.is_exec:
            self._loads.mark(timer.agenda)
            return
        timer.agenda.exec_full = False
        self._mark_exec_dirty(timer.agenda)

    def _mark_exec_dirty(self, agenda: Agenda) -> None:
        if not agenda.exec_full and not agenda.changed:
            agenda.changed = True
            self._changed.append(agenda)

    def _plan(self, waiter: Waiter) -> None:
        """Plan a request that was admitted by its internal deadline."""
        request, queue, model = waiter.request, waiter.queue, waiter.queue.model
        due_ns = max(waiter.due_ns, request.arrival_ns + self._least_ns)
        if due_ns != waiter.due_ns:
            queue.remove(waiter)
            waiter.due_ns = due_ns
            queue.add(waiter)
        wanted_ns = max(due_ns - request.arrival_ns, NS_PER_MS)
        base_ns = model.base_ns or NS_PER_MS
        demand_ns = base_ns * self._belief.config.capacity_ns // wanted_ns or 1
        model.demand_ns += demand_ns - waiter.demand_ns
        waiter.demand_ns = demand_ns
        if model.sole is not None:
            model.sole.assign(model.demand_ns)
        self._deadlines.add(waiter)

    def _add(self, strategy: Strategy, below: int) -> None:
        """Add the most urgent of a queue's strategies whose batches are below ``below`` requests."""
        dues, floors = strategy.queue.dues, self._floors.get(strategy.queue, {})
        urgent_ns = NEVER_NS
        count = 0
        for batch in strategy.batches:
            if batch.count >= below:
                break
            first = bisect_left(dues, floors.get(batch.count, 0))
            if first < len(dues) and dues[first] - batch.samples.estimate_ns < urgent_ns:
                urgent_ns = dues[first] - batch.samples.estimate_ns
                count = batch.count
        if urgent_ns != NEVER_NS:
            strategy.agenda.push(strategy, urgent_ns)
            self._counts.setdefault(strategy.queue, {})[strategy.device.name] = count
            if len(self._counts) + len(self._floors) > self._full:
                self._forget_gone()

    def _forget_gone(self) -> None:
        """Drop what is kept for queues that are gone."""
        self._counts = {one: counts for one, counts in self._counts.items() if _is_there(one)}
        self._floors = {one: floors for one, floors in self._floors.items() if _is_there(one)}
        self._full = 2 * (len(self._counts) + len(self._floors)) + STALE_MIN

    # Choices

    def schedule(self, now_ns: int) -> None:
        """Answer those that expire; top up the lanes of every device that changed, in turns."""
        for waiter in self._deadlines.passed(now_ns):
            reason = Reason.LATE if waiter.state == SENT else Reason.NONE
            self._belief.answer(waiter, Outcome.EXPIRED, reason, message="no answer by the deadline")
            self._belief.recheck(waiter.queue)
        changed = self._changed
        if changed:
            self._turn += 1
            at = self._turn % len(changed)
            agendas, self._changed = changed[at:] + changed[:at], []
            for agenda in agendas:
                agenda.changed = False
            while agendas:
                agendas = [agenda for agenda in agendas if self._send_one(agenda, now_ns)]
        self._loads.top_up(now_ns)
        self._deadlines.correct()

    def _send_one(self, agenda: Agenda, now_ns: int) -> bool:
        """Send an INFER to a device if its lane has room; true if one was sent."""
        lane, heap = agenda.device.exec, agenda.heap
        start_ns = lane.available_ns(now_ns)
        late_ns = now_ns - lane.head_end_ns
        full = start_ns >= now_ns + self._look_ahead_ns or (
            late_ns > self._belief.config.lag_ns and len(lane.outstanding) > 1
        )
        while agenda.top() is not None:
            if full:
                agenda.exec_full = True
                if late_ns <= 0:  # else its next result says when there is room again
                    self._belief.timers.set(agenda.exec_timer, start_ns - self._look_ahead_ns + 1)
                return False
            strategy = heappop(heap)[2]
            strategy.key_ns = NEVER_NS
            count = self._counts.get(strategy.queue, {}).get(strategy.device.name, 0)
            fit = self._choose(strategy, count, start_ns)
            if fit is not None:
                self._send(strategy, fit, start_ns, now_ns)
                return True
            self._add(strategy, count)
        return False

    def _send(self, strategy: Strategy, fit: Fit, start_ns: int, now_ns: int) -> None:
        """Send a batch; the requests before it are given up at all sizes."""
        queue = strategy.queue
        batch, first = fit
        if first:
            floors = self._floors.setdefault(queue, {})
            gone_ns = queue.dues[first - 1] + 1
            for count, _ in queue.sizes:
                if floors.get(count, 0) < gone_ns:
                    floors[count] = gone_ns
        self._belief.send_infer(strategy, batch, first, start_ns, now_ns)
        widen_window(self._belief, start_ns)
        self._add(strategy, ANY)

    def _choose(self, strategy: Strategy, count: int, start_ns: int) -> Fit | None:
        """The largest batch that can be filled, trying sizes upwards; None if it is below ``count``."""
        dues = strategy.queue.dues
        floors = self._floors.setdefault(strategy.queue, {})
        chosen: BatchChoice | None = None
        place = 0
        filled = True
        for batch in strategy.batches:
            first = bisect_left(dues, start_ns + batch.samples.estimate_ns)
            if first and floors.get(batch.count, 0) <= dues[first - 1]:
                floors[batch.count] = dues[first - 1] + 1
            first = bisect_left(dues, floors.get(batch.count, 0))
            filled = filled and len(dues) - first >= batch.count
            if filled:
                chosen, place = batch, first
        if chosen is None or chosen.count < count:
            return None
        return chosen, place

    def check(self) -> None:
        """Assert the invariants."""
        waiting: list[Waiter] = []
        for model in self._belief.models.values():
            for queue in model.queues.values():
                waiting += queue.waiters
                for strategy in queue.strategies:
                    strategy.agenda.check(strategy)
        self._deadlines.check(waiting)
