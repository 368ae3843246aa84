"""Watchdogs: workers that hang, and devices whose lanes stall."""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.belief import AdoptedAction, Belief, HungWorker, Sent
from clockwork_serve.controller.cluster import DeviceBelief, HangTimer, Residency, StallTimer, Waiter
from clockwork_serve.controller.fleet import Fleet, ReadinessTracker, Takeover
from clockwork_serve.controller.lanes import LaneBelief
from clockwork_serve.controller.life import LOADED, LOADING, READY, SPENT
from clockwork_serve.controller.policies.base import Scheduler
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.results import ResultHandler
from clockwork_serve.controller.timers import NEVER_NS, STALL_CHECK_NS
from clockwork_serve.messages import (
    Infer,
    Lane,
    Load,
    Result,
    Status,
    Unload,
    WorkerHeard,
    WorkerHung,
    WorkerSilent,
)
from clockwork_serve.units import MIB, NS_PER_S, ms

# ------------------------------------------------------------
# Hung workers.
#
# An action is *late* when it has not ended a timeout after the instant at which its lane was expected to
# finish it. Then its worker is *hung*: nothing more is planned on it, and the requests in flight there are
# planned elsewhere. The worker recovers, with its codes and weights, once it has returned all results that it
# owes. If it has not by the end of its grace, the supervisor is asked to kill it. A worker without work can
# hang, too: its process returns no heartbeats.
#
# Windows need no extra time: an action's window opens when it is sent, so it starts once its lane is free.
#
# Timeouts below are multiples of ``hang_ns``, the *floor*.


SLOWER: Final = 4
"""An action may be late by this many times its expected duration, if that is more than the floor."""
FIRST: Final = 5
"""An action that was never measured on a device may be late by this many floors: first runs import, compile,
allocate."""
FIRST_GRACE: Final = 5
"""Its grace is this many times longer, too, unless its model is suspected of having crashed a worker."""
SLOW_LOAD_BYTES: Final = 20 * MIB
"""A LOAD may be late by another floor for each of these: it may read from a cold disk or a network."""
PREPARE: Final = 150
"""This many floors for a code to be prepared, and for the LOADs queued behind it."""
NO_HEARTBEAT: Final = 15
"""A worker with work that returns no heartbeat for this many floors is hung, whatever the work's timeout."""
CONFIRM: Final = 8
"""A late action is checked again after a floor divided by this: the controller itself may have been stopped
until now."""


class Hangs(Record):
    """Detects hung workers, and handles their recovery or end."""

    def __init__(
        self, belief: Belief, fleet: Fleet, scheduler: Scheduler, result_handler: ResultHandler,
        quarantine: Quarantine, *, takeover: Takeover, readiness: ReadinessTracker,
    ) -> None:  # fmt: skip
        self._belief = belief
        self._fleet = fleet
        self.scheduler = scheduler
        self._result_handler = result_handler
        self._quarantine = quarantine
        self._takeover = takeover
        self._readiness = readiness
        self._hang_ns = belief.config.hang_ns
        self._grace_ns = belief.config.hang_grace_ns
        self.has_pending = False
        """Events were observed that the next ``decide`` has to process."""
        self._stalled: list[WorkerSilent] = []
        self._ended: list[Sent] = []
        """Actions of hung workers that are over: their requests' tensors are no longer in use there."""

    # Observe

    def observe(self, event: WorkerSilent | WorkerHeard) -> None:
        """A worker returns no heartbeats, or returns them again."""
        for device in self._belief.devices.values():
            if device.worker != event.worker:
                continue
            if isinstance(event, WorkerHeard):
                device.stall_timer.no_heartbeat = False
            elif not device.exec.outstanding or device.exec.stalled:
                # While an INFER runs that is not late, native code of a model may block the heartbeat.
                device.stall_timer.no_heartbeat = True
            self._readiness.may_change = True
        if isinstance(event, WorkerSilent):
            self._stalled.append(event)
        elif event.worker in self._belief.hung:
            self._belief.hung[event.worker].answered = True
        self._mark_pending()

    def progressed(self, hung: HungWorker) -> None:
        """A hung worker prepared a code."""
        hung.answered = True
        self._mark_pending()

    def of_device(self, name: str) -> tuple[HungWorker, DeviceBelief] | None:
        """The hung worker that has that device, and the device; None if there is none."""
        for hung in self._belief.hung.values():
            for device in hung.devices:
                if device.name == name:
                    return hung, device
        return None

    def observe_result(self, result: Result, now_ns: int) -> None:
        """Handle a result that a hung worker owed; any other result is ignored."""
        found = self.of_device(result.device)
        if found is None:
            return
        hung, good = found[0], result.status is Status.OK
        sent = hung.sent.pop(result.action_id, None)
        owed = sent or hung.adopted.pop((result.device, result.action_id), None)
        if owed is None:
            return
        residency = owed.residency
        if good and sent is not None and sent.samples is not None:
            sent.samples.learn(result.ended_ns - result.started_ns - result.once_ns, now_ns)
        if residency is not None and residency in hung.kept:
            if residency.state == LOADING and good:
                residency.step(LOADED)
            elif residency.state == LOADING:
                hung.kept.remove(residency)
        if result.held is not None:
            there = result.held.versions
            hung.kept = [
                one for one in hung.kept
                if one.device is not found[1] or one.state == LOADING or one.version in there
            ]  # fmt: skip
        hung.answered = True
        if sent is not None:
            self._ended.append(sent)
        self._mark_pending()

    def worker_lost(self, worker: str, running_ids: set[int]) -> None:
        """A hung worker is lost; ``running_ids`` are the actions that it was running."""
        hung = self._belief.hung.pop(worker, None)
        if hung is None:
            return
        self._belief.timers.set(hung, NEVER_NS)
        for device in hung.devices:
            self._belief.estimator.forget_device(device.name)
        for action_id, sent in hung.sent.items():
            if action_id in running_ids and action_id not in hung.heads:
                for waiter in sent.waiters:
                    waiter.retries += 1
            self._ended.append(sent)
        self._mark_pending()

    def _mark_pending(self) -> None:
        self.has_pending = self._belief.has_pending = True

    # Decide

    def process(self, now_ns: int) -> None:
        """Process all events that were observed."""
        self.has_pending = False
        for sent in self._ended:
            for waiter in sent.waiters:
                self._release_hold(waiter)
        self._ended.clear()
        for hung in list(self._belief.hung.values()):
            if hung.answered and not hung.sent and not hung.adopted and not hung.ended:
                self._reinstate(hung, now_ns)
        stalled, self._stalled = self._stalled, []
        for event in stalled:
            self._check_stalled(event, now_ns)

    def fired(self, timer: HangTimer | HungWorker, now_ns: int) -> None:
        """A device is to be checked, or a hung worker's grace has ended."""
        if isinstance(timer, HungWorker):
            timer.ended = True
            self._belief.effects.append(WorkerHung(worker=timer.name, why=timer.why, end=True))
            self._belief.timers.set(timer, now_ns + self._grace_ns)
            return
        device = timer.device
        due_ns = min(self._exec_due_ns(device), self._load_due_ns(device))
        if due_ns > now_ns:
            timer.confirming = False
            if due_ns != NEVER_NS:  # an action that is sent meanwhile may be late sooner
                due_ns = min(due_ns, now_ns + self._hang_ns)
            self._belief.timers.set(timer, due_ns)
        elif not timer.confirming:
            timer.confirming = True
            self._belief.timers.set(timer, now_ns + self._hang_ns // CONFIRM + 1)
        elif self._exec_due_ns(device) <= now_ns:
            self._declare_late(device, device.exec, now_ns)
        elif device.load.outstanding:
            self._declare_late(device, device.load, now_ns)
        else:
            codes = ", ".join(sorted(device.pending_codes))
            why = f"{device.name} has not prepared {codes} in {_seconds(now_ns - device.since_ns)}"
            self._declare_hung(device.worker, why, FIRST_GRACE * self._grace_ns, now_ns)

    def _declare_late(self, device: DeviceBelief, lane: LaneBelief, now_ns: int) -> None:
        """Declare a worker hung because of the running action of a lane."""
        head = self._head(device, lane)
        if isinstance(head, AdoptedAction):
            what = f"{'a LOAD' if head.lane is Lane.LOAD else 'an INFER'} of before it joined"
        else:
            kind = type(head.action).__name__.upper()
            what = f"{'a' if kind == 'LOAD' else 'an'} {kind} of {head.action.model}"
        late = _seconds(now_ns - lane.head_end_ns)
        why = f"{device.name} has not answered {what}, which is {late} late"
        grace_ns = FIRST_GRACE * self._grace_ns if self._is_first(head) else self._grace_ns
        self._declare_hung(device.worker, why, grace_ns, now_ns)

    def _check_stalled(self, event: WorkerSilent, now_ns: int) -> None:
        devices = [one for one in self._belief.devices.values() if one.worker == event.worker]
        busy = any(one.exec.outstanding or one.load.outstanding or one.pending_codes for one in devices)
        if self._hang_ns and devices and (not busy or event.for_ns >= NO_HEARTBEAT * self._hang_ns):
            why = f"it has returned no beat in {_seconds(event.for_ns)}"
            self._declare_hung(event.worker, why, self._grace_ns, now_ns)

    def _declare_hung(self, worker: str, why: str, grace_ns: int, now_ns: int) -> None:
        """Declare a worker hung: plan nothing on it, and plan the requests in flight there elsewhere."""
        belief = self._belief
        devices = [one for one in belief.devices.values() if one.worker == worker]
        hung = belief.hung[worker] = HungWorker(worker, why, devices, belief.next_id())
        belief.effects.append(WorkerHung(worker=worker, why=why))
        belief.timers.set(hung, now_ns + grace_ns)
        for device in devices:
            if device.exec.outstanding:
                hung.heads.add(device.exec.head_id)
            hung.kept += device.pages.holders()
            hung.adopted |= self._takeover.release_device(device)
            hung.sent.update((sent.action.action_id, sent) for sent in self._fleet.remove_device(device))
        for action_id, sent in hung.sent.items():
            self._result_handler.action_hung(sent, now_ns, ran=action_id in hung.heads)

    def _reinstate(self, hung: HungWorker, now_ns: int) -> None:
        """Recover a worker that owes nothing any more: add its devices again, with codes and weights."""
        belief = self._belief
        del belief.hung[hung.name]
        belief.timers.set(hung, NEVER_NS)
        belief.effects.append(WorkerHung(worker=hung.name))
        for before in hung.devices:
            device = DeviceBelief(before.spec, before.worker, belief.next_id(), belief.config)
            device.codes, device.failed_codes = before.codes, before.failed_codes
            device.failed_weights = before.failed_weights
            device.pending_codes, device.warm = before.pending_codes, before.warm
            self._fleet.add_device(device, now_ns)
            for residency in hung.kept:
                if residency.device is before:
                    self._restore(residency, device)
        self._fleet.changed()

    def _restore(self, kept: Residency, device: DeviceBelief) -> None:
        """Add weights again; those of models that are not served any more are unloaded."""
        model = kept.model
        residency = Residency(model, device, kept.code, kept.extent, kept.version)
        device.hold(residency)
        model.add_residency(residency)
        self._belief.loaded(residency)
        if model.removed or model.quarantined:
            self._result_handler.retire(model)
        else:
            self._belief.mark_dirty(model)
            self.scheduler.loaded(residency)

    def _release_hold(self, waiter: Waiter) -> None:
        """An action is over that held the tensors of a request."""
        if waiter.state == SPENT:
            self._belief.release(waiter)
        else:
            waiter.tensor_refs -= 1

    # Timeouts

    def _head(self, device: DeviceBelief, lane: LaneBelief) -> Sent | AdoptedAction:
        head = self._belief.sent.get(lane.head_id)
        return head if head is not None else self._takeover.running[device.name, lane.head_id]

    def _exec_due_ns(self, device: DeviceBelief) -> int:
        """When the timeout of its running INFER ends; ``NEVER_NS`` if there is none."""
        lane = device.exec
        if not lane.outstanding:
            return NEVER_NS
        timeout_ns = self._timeout_ns(self._head(device, lane))
        if device.pending_codes:  # preparing one may block the worker's interpreter
            timeout_ns = max(timeout_ns, FIRST * self._hang_ns)
        return lane.head_end_ns + timeout_ns

    def _load_due_ns(self, device: DeviceBelief) -> int:
        """When the timeout of its load lane's work ends; ``NEVER_NS`` if there is none."""
        lane = device.load
        due_ns = lane.head_end_ns + self._timeout_ns(self._head(device, lane)) if lane.outstanding else 0
        if device.pending_codes:
            due_ns = max(due_ns, device.since_ns + PREPARE * self._hang_ns)
        return due_ns or NEVER_NS

    def _timeout_ns(self, head: Sent | AdoptedAction) -> int:
        floor_ns = self._hang_ns
        if isinstance(head, AdoptedAction):
            expected_ns, load_bytes = head.expected_ns, head.load_bytes
        elif isinstance(head.action, Unload):
            return FIRST * floor_ns
        else:
            expected_ns = head.action.expected_ns
            load_bytes = head.action.weights.size if isinstance(head.action, Load) else 0
        timeout_ns = max(floor_ns, SLOWER * expected_ns)
        if self._is_first(head):
            timeout_ns = max(timeout_ns, FIRST * floor_ns)
        return timeout_ns + load_bytes * floor_ns // SLOW_LOAD_BYTES

    def _is_first(self, head: Sent | AdoptedAction) -> bool:
        """Whether it gets the timeout of a first run: never measured there, and its model is no suspect."""
        if isinstance(head, AdoptedAction):
            return True
        samples = head.samples
        return samples is not None and samples.unproven and head.action.model not in self._quarantine.watched

    def check(self) -> None:
        """Assert the invariants."""
        belief = self._belief
        for name, hung in belief.hung.items():
            assert hung.name == name and hung.at_ns != NEVER_NS, f"{name}: the end of its grace is not set"
            assert not any(device.worker == name for device in belief.devices.values())
            for sent in hung.sent.values():
                assert sent.action.action_id not in belief.sent
                assert isinstance(sent.action, Infer) == bool(sent.waiters)
            adopted = hung.adopted.values()
            for kept in hung.kept:
                loads = kept.version in hung.sent or any(one.residency is kept for one in adopted)
                loading = loads and kept.state == LOADING
                assert loading or kept.state == READY, (
                    f"{name}: {kept.model.key} is neither loading nor ready"
                )
        if self._hang_ns:
            for device in belief.devices.values():
                busy = device.exec.outstanding or device.load.outstanding or device.pending_codes
                assert not busy or device.hang_timer.at_ns != NEVER_NS, f"{device.name} is not guarded"


def _seconds(lasts_ns: int) -> str:
    return f"{lasts_ns / NS_PER_S:.1f} s"


# ------------------------------------------------------------
# Stalled devices: their models are loaded elsewhere before it is known whether the worker hangs.
#
# The timeout after which a worker counts as hung is seconds. Until then requests for its weights would miss
# their deadlines, though another device could load them. So a lane is *stalled* when its running action is
# late by its expected duration, and by ``STALL_CHECK_NS`` at least, in two checks. Until that action ends,
# the device is assumed to serve no demand (``placement.Candidates``): none at all if its exec lane is
# stalled; none for weights that it has yet to load if its load lane is. A disk may be slow while INFERs run
# well, so weights that are ready count still. After ``UNRESPONSIVE_NS`` a device whose exec lane is stalled
# does not count as warm, and without any other warm device the server is not ready.


UNRESPONSIVE_NS: Final = ms(1500)
"""At least this late, and by the action's expected duration: for slow models the limit is longer."""


class Stalls(Record):
    """Detects stalled lanes."""

    def __init__(self, belief: Belief, readiness: ReadinessTracker) -> None:
        self._belief = belief
        self._readiness = readiness

    def fired(self, timer: StallTimer, now_ns: int) -> None:
        """Check a lane that has work."""
        device, lane = timer.device, timer.lane
        overdue_ns = lane.overdue_ns(now_ns)
        unresponsive = (
            lane is device.exec and lane.stalled and overdue_ns >= max(UNRESPONSIVE_NS, lane.head_lasts_ns)
        )
        if unresponsive != timer.unresponsive:
            timer.unresponsive = unresponsive
            self._readiness.may_change = True
        if not lane.outstanding:
            return
        self._belief.timers.set(timer, now_ns + STALL_CHECK_NS)
        if lane.stalled or overdue_ns < STALL_CHECK_NS or overdue_ns < lane.head_lasts_ns:
            return
        if timer.late_id != lane.head_id:  # the controller itself may have been stopped until now
            timer.late_id = lane.head_id
            return
        lane.stalled = True
        for residency in device.pages.holders():
            if residency.model.waiting and residency.stalled:
                self._belief.mark_dirty(residency.model)
