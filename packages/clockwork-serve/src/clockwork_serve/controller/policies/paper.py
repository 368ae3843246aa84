"""The paper's policy (OSDI 2020, section 5.3; the authors' INFER5), with its bugs fixed.

A *strategy* is a queue with its urgency on one device: the least, over batch sizes that can be filled, of the
head's due time minus the estimate. Each device's exec lane is topped up to the look-ahead with the most
urgent strategy of the most urgent class, at the largest batch that still meets its head's due time. Each load
lane is topped up with the model of highest LOAD priority; least recently used weights make room.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop
from typing import Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import (
    Agenda,
    DeviceBelief,
    LaneTimer,
    Queue,
    Residency,
    ServedModel,
    Strategy,
)
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.estimates import VALID_NS, drop_outliers
from clockwork_serve.controller.placement import Candidates, make_room
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS

SURFACED_MAX: Final = 64
"""LOAD candidates tried for one device in one decision."""

Fit = tuple[BatchChoice, int, int]
"""A batch whose requests are feasible: (batch, index of its first request in the queue, latest start)."""


class PaperScheduler(Record):
    """The paper's policy; the base class of the others."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        config = belief.config
        self._look_ahead_ns = config.look_ahead_ns
        self._lag_ns = config.lag_ns
        self._by_popularity = False
        """Weights of the least popular models are evicted first, not those least recently used."""
        self._candidates = Candidates(belief)
        self._changed: list[Agenda] = []
        """Devices whose exec lanes are to be topped up in the next ``schedule``, in order of change."""
        self._free: dict[Agenda, None] = {}
        """Devices whose load lanes had room when last checked."""
        self._dirty_loads: list[Agenda] = []
        """Devices for which all candidates are to be tried; the others need to try new candidates only."""
        self._new_candidates: list[ServedModel] = []
        """Candidates whose demand or residencies changed."""
        self._left: list[Strategy] = []
        """What a subclass takes out of the agendas for the rest of a decision."""
        self._timers = belief.timers

    # What changed

    def queued(self, queue: Queue) -> None:
        """A request was queued: update the keys of its queue's strategies."""
        alone = len(queue.dues) == 1
        for strategy in queue.strategies:
            agenda = strategy.agenda
            if alone:
                key_ns = queue.dues[0] - strategy.batches[0].samples.estimate_ns + queue.band_ns
                if key_ns < strategy.key_ns:
                    agenda.push(strategy, key_ns)
            else:
                self._enqueue(strategy)
            if not agenda.exec_full and not agenda.changed:
                agenda.changed = True
                self._changed.append(agenda)

    def loaded(self, residency: Residency) -> None:
        """Weights became ready: add the new strategies."""
        if residency.model.removed:
            return
        for queue in residency.model.queues.values():
            strategy = queue.strategies[-1]
            if queue.waiters and strategy.residency is residency:
                self._enqueue(strategy)
        self._mark_exec_dirty(residency.device.agenda)

    def exec_changed(self, device: DeviceBelief) -> None:
        """Have the exec lane topped up, and the load lane, if a candidate was declined there."""
        agenda = device.agenda
        if agenda.may_load():
            self._mark_load_dirty(agenda)
        if agenda.exec_full:
            timer_ns = agenda.exec_timer.at_ns
            if timer_ns != NEVER_NS and device.exec.free_ns - self._look_ahead_ns >= timer_ns - 1:
                return  # it is still full until the timer fires
            agenda.exec_full = False
        if not agenda.changed:
            agenda.changed = True
            self._changed.append(agenda)

    def load_changed(self, device: DeviceBelief) -> None:
        """Have the load lane topped up."""
        self._mark_load_dirty(device.agenda)

    def device_changed(self, device: DeviceBelief) -> None:
        """Have both lanes topped up."""
        device.agenda.exec_full = False
        self._mark_exec_dirty(device.agenda)
        self._mark_load_dirty(device.agenda)

    def device_lost(self, device: DeviceBelief) -> None:
        """Drop what is kept for the device."""
        agenda = device.agenda
        agenda.heap.clear()
        self._free.pop(agenda, None)
        self._timers.set(agenda.exec_timer, NEVER_NS)
        self._timers.set(agenda.load_timer, NEVER_NS)

    def fired(self, timer: LaneTimer) -> None:
        """A lane that was full has room again."""
        agenda = timer.agenda
        if not timer.is_exec:
            self._mark_load_dirty(agenda)
            return
        agenda.exec_full = False
        if not agenda.changed:
            agenda.changed = True
            self._changed.append(agenda)

    def _mark_exec_dirty(self, agenda: Agenda) -> None:
        if not agenda.exec_full and not agenda.changed:
            agenda.changed = True
            self._changed.append(agenda)

    def _mark_load_dirty(self, agenda: Agenda) -> None:
        agenda.load_blocked = agenda.room_blocked = False
        if not agenda.load_dirty:
            agenda.load_dirty = True
            self._dirty_loads.append(agenda)

    def _enqueue(self, strategy: Strategy) -> None:
        """Add a strategy to the agenda, keyed by the latest start of its largest batch that can be filled."""
        dues, batches = strategy.queue.dues, strategy.batches
        waiting = len(dues)
        batch = batches[0]
        if waiting > 1:
            for other in batches:
                if other.count > waiting:
                    break
                batch = other
        key_ns = dues[0] - batch.samples.estimate_ns + strategy.queue.band_ns
        if key_ns < strategy.key_ns:
            strategy.agenda.push(strategy, key_ns)

    # Choices

    def schedule(self, now_ns: int) -> None:
        """Top up the lanes of every device that changed."""
        changed = self._changed
        if changed:
            for agenda in changed:
                agenda.changed = False
                if agenda.heap:
                    self._top_up_exec(agenda, now_ns)
            changed.clear()
        if self._dirty_loads or (self._free and self._belief.dirty_models):
            self._top_up_loads(now_ns)
        if self._left:
            for strategy in self._left:
                if (
                    strategy.queue.dues
                    and strategy.key_ns == NEVER_NS
                    and strategy in strategy.queue.strategies
                ):
                    self._enqueue(strategy)
            self._left.clear()

    def _top_up_exec(self, agenda: Agenda, now_ns: int) -> None:
        lane, heap = agenda.device.exec, agenda.heap
        late_ns, full_from_ns = now_ns - lane.head_end_ns, now_ns + self._look_ahead_ns
        while True:
            while heap and heap[0][2].key_ns != heap[0][0]:
                heappop(heap)
            if not heap:
                return
            start_ns = lane.available_ns(now_ns)
            if start_ns >= full_from_ns or (
                late_ns > self._lag_ns and (lane.stalled or len(lane.outstanding) > 1)
            ):
                agenda.exec_full = True
                if late_ns <= 0:  # else its next result says when there is room again
                    self._timers.set(agenda.exec_timer, start_ns - self._look_ahead_ns + 1)
                return
            strategy = heappop(heap)[2]
            top_ns, strategy.key_ns = strategy.key_ns, NEVER_NS
            fit = self._choose(strategy, start_ns)
            if fit is None:
                self._drop_outliers(strategy, start_ns, now_ns)
                continue
            batch, first, latest_ns = fit
            urgency_ns = latest_ns + strategy.queue.band_ns
            if urgency_ns > top_ns and (after := agenda.top()) is not None and urgency_ns > after.key_ns:
                agenda.push(strategy, urgency_ns)
                continue
            self._belief.send_infer(strategy, batch, first, start_ns, now_ns)
            if strategy.queue.dues:
                self._enqueue(strategy)

    def _drop_outliers(self, strategy: Strategy, start_ns: int, now_ns: int) -> None:
        """No waiting request is feasible: on a free lane, drop outliers that may be the cause."""
        dues = strategy.queue.dues
        if dues and not strategy.lane.outstanding and drop_outliers(
            strategy.batches[0].samples, dues[-1] - start_ns, now_ns
        ):  # fmt: skip
            self._enqueue(strategy)

    def _choose(self, strategy: Strategy, start_ns: int) -> Fit | None:
        """The largest feasible batch: sizes are tried upwards while they can be filled."""
        dues = strategy.queue.dues
        waiting = len(dues)
        if waiting == 1:
            batch = strategy.batches[0]
            urgency_ns = dues[0] - batch.samples.estimate_ns
            return (batch, 0, urgency_ns) if urgency_ns >= start_ns else None
        chosen: BatchChoice | None = None
        place = latest_ns = 0
        for batch in strategy.batches:
            if waiting < batch.count:
                break
            infer_ns = batch.samples.estimate_ns
            end_ns = start_ns + infer_ns
            first = 0 if dues[0] >= end_ns else bisect_left(dues, end_ns)
            if waiting - first < batch.count:
                break
            urgency_ns = dues[first] - infer_ns
            if chosen is None or urgency_ns < latest_ns:
                latest_ns = urgency_ns
            place = first
            chosen = batch
        return None if chosen is None else (chosen, place, latest_ns)

    # LOADs

    def _top_up_loads(self, now_ns: int) -> None:
        """Send LOADs until none is useful on any free load lane; each one sent may change the others."""
        self._rank_dirty()
        while self._dirty_loads or self._new_candidates:
            if self._dirty_loads:
                awake, self._dirty_loads = self._dirty_loads, []
                for agenda in awake:
                    agenda.load_dirty = False
                    if agenda.device.up and self._has_room(agenda, now_ns) and self._load_one(agenda, now_ns):
                        self._mark_load_dirty(agenda)
                continue
            fresh, self._new_candidates = self._new_candidates, []
            if len(fresh) > 1:
                fresh.sort(key=_wanted)
            for model in fresh:
                if model.load_key is not None:
                    self._offer(model, now_ns)

    def _rank_dirty(self) -> None:
        dirty = self._belief.dirty_models
        for model in dirty:
            model.dirty = False
            if self._candidates.rank(model):
                self._new_candidates.append(model)
                continue
            for residency in model.residencies.values():
                agenda = residency.device.agenda  # most have neither: calls that do nothing cost as much
                if agenda.in_vain and not residency.in_flight:
                    residency.loosen()
                if (agenda.load_blocked or agenda.room_blocked) and not model.waiting and agenda.may_load():
                    self._mark_load_dirty(agenda)
        dirty.clear()

    def _has_room(self, agenda: Agenda, now_ns: int) -> bool:
        """Whether a load lane has room for a LOAD; if not, its timer or next result has it tried again."""
        lane = agenda.device.load
        ahead_ns = self._load_ahead_ns(agenda)
        if lane.available_ns(now_ns) < now_ns + ahead_ns:
            self._free[agenda] = None
            return True
        self._free.pop(agenda, None)
        if lane.overdue_ns(now_ns) <= 0:
            self._timers.set(agenda.load_timer, lane.available_ns(now_ns) - ahead_ns + 1)
        return False

    def _load_ahead_ns(self, _: Agenda) -> int:
        """A load lane is topped up when it will be free in less than this."""
        return self._look_ahead_ns

    def _load_one(self, agenda: Agenda, now_ns: int) -> bool:
        """Send a LOAD of the first candidate for which it is useful on a device; true if one was sent."""
        passed: list[ServedModel] = []
        sent = False
        while len(passed) < SURFACED_MAX and (model := self._candidates.pop()) is not None:
            passed.append(model)
            if self._load(agenda, model, now_ns):
                sent = True
                break
        for model in passed:
            self._candidates.enqueue(model)
        return sent

    def _offer(self, model: ServedModel, now_ns: int) -> None:
        """Send a LOAD of a model to the first device with room for which it is useful."""
        for agenda in self._free:
            if self._load(agenda, model, now_ns):
                return

    def _load(self, agenda: Agenda, model: ServedModel, now_ns: int) -> bool:
        """Send a LOAD of a model to a device whose lane has room, if it is useful; true if it was sent."""
        device = agenda.device
        if device.load.stalled or device.name in model.residencies or device.code_of(model) is None:
            return False
        start_ns = device.load.available_ns(now_ns)
        if not self._timely(agenda, model, start_ns, now_ns) and not (
            self._reset_stale_load(device, model, start_ns, now_ns)
            and self._timely(agenda, model, start_ns, now_ns)
        ):
            return False
        wanted_ns = self._candidates.priority(model)
        room = make_room(device, model, wanted_ns, by_popularity=self._by_popularity)
        if room is None:
            agenda.room_blocked = agenda.room_blocked or not model.residencies
            return False
        for residency in room.evicted:
            self._belief.send_unload(residency, now_ns)
        self._belief.send_load(device, model, room.extent, start_ns, now_ns)
        self._rank_dirty()
        self._has_room(agenda, now_ns)
        return True

    def _reset_stale_load(self, device: DeviceBelief, model: ServedModel, start_ns: int, now_ns: int) -> bool:
        """Reset the estimate of a LOAD that would be too late, if it is stale; true if it is shorter now."""
        timings = device.codes[model.code_id].timings
        samples = timings.load(model.model.weights.size)
        old_estimate_ns = samples.estimate_ns
        if old_estimate_ns > samples.seed_ns and now_ns >= samples.measured_ns + VALID_NS:
            for queue in model.queues.values():
                if queue.dues:
                    ready_ns = queue.dues[-1] - timings.infer(queue.least, queue.signature).estimate_ns
                    timings.reset_stale(samples, ready_ns - start_ns, now_ns)
        return samples.estimate_ns < old_estimate_ns

    def _timely(self, agenda: Agenda, model: ServedModel, start_ns: int, now_ns: int) -> bool:
        """Whether a waiting request can be in time after a LOAD at ``start_ns``."""
        device = agenda.device
        timings = device.codes[model.code_id].timings
        ready_ns = start_ns + timings.load(model.model.weights.size).estimate_ns
        exec_free_ns = device.exec.available_ns(now_ns)
        soon = False
        for queue in model.queues.values():
            if queue.waiters:
                latest_ns = queue.dues[-1] - timings.infer(queue.least, queue.signature).estimate_ns
                if latest_ns >= ready_ns:
                    if latest_ns >= exec_free_ns:
                        return True
                    soon = True
        if soon:
            agenda.load_blocked = True
        return False

    def check(self) -> None:
        """Assert the invariants."""
        for model in self._belief.models.values():
            for queue in model.queues.values():
                for strategy in queue.strategies:
                    strategy.agenda.check(strategy)
        self._candidates.check()


def _wanted(model: ServedModel) -> tuple[int, int]:
    return (model.load_key or 0, model.order)
