"""The controller's belief: models, devices, requests and actions in flight, and what changes them.

Decisions are made elsewhere (``policies``, ``feasibility``, ``admission``).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from msgspec.structs import replace

from clockwork_serve.controller.cluster import (
    DeviceBelief,
    Queue,
    Reservation,
    Residency,
    ServedModel,
    Strategy,
    Waiter,
)
from clockwork_serve.controller.codes import BatchChoice, CodeOnDevice, misfit, useful_sizes
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.estimates import FIRST_SAMPLES, UNIT, VALID_NS, Estimator, Samples
from clockwork_serve.controller.lanes import LaneBelief
from clockwork_serve.controller.life import (
    ANSWER,
    ANSWER_EARLY,
    LOADED,
    READY,
    RELEASE,
    RETURN,
    SEND,
    SENT,
    UNLOAD,
    WAITING,
)
from clockwork_serve.controller.plans import leave
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.tenants import Tenants
from clockwork_serve.controller.timers import NEVER_NS, STALL_CHECK_NS, Timer, Timers
from clockwork_serve.messages import (
    Action,
    AdmissionQuery,
    Answer,
    Call,
    Cause,
    Code,
    ControllerEffect,
    Extent,
    Infer,
    Load,
    Outcome,
    Reason,
    Release,
    Request,
    Result,
    Running,
    Unload,
    Window,
)
from clockwork_serve.units import MIB, NS_PER_MS, align

# ------------------------------------------------------------
# Actions in flight.


class Sent(Record):
    """An action in flight."""

    __slots__ = ("action", "device", "idle_ns", "residency", "samples", "waiters")

    def __init__(
        self,
        action: Action,
        device: DeviceBelief,
        residency: Residency | None,
        samples: Samples | None,
        waiters: list[Waiter],
    ) -> None:
        self.action = action
        self.device = device
        self.residency = residency
        self.samples = samples
        """The window that its duration is added to; None for an UNLOAD."""
        self.waiters = waiters
        """The requests of an INFER, in the order of its calls."""
        self.idle_ns = -1
        """When it was sent, if its lane was idle then; else -1."""


class AdoptedAction(Record):
    """A running action that an earlier controller sent.

    ``residency`` are the weights it moves or reads, if they are retained. ``expected_ns`` is how long that
    controller expected it to take, ``load_bytes`` the size of a LOAD.
    """

    __slots__ = ("device", "expected_ns", "lane", "load_bytes", "residency")

    def __init__(
        self, device: DeviceBelief, running: Running, residency: Residency | None, load_bytes: int
    ) -> None:
        self.device = device
        self.lane = running.lane
        self.expected_ns = running.expected_ns
        self.load_bytes = load_bytes
        self.residency = residency


def sharers(queue: Queue) -> list[Queue]:
    """The queues of other classes whose requests may join a batch of this one, most urgent first."""
    queues = queue.model.queues
    if len(queues) == 1 or queue.alone or queue.rows != 1:
        return []
    others = [
        one
        for one in queues.values()
        if one.dues and one is not queue and one.rows == 1 and not one.alone
        and one.signature == queue.signature
    ]  # fmt: skip
    if len(others) > 1:
        others.sort(key=_level)
    return others


def _level(queue: Queue) -> int:
    return queue.level


def joining(queue: Queue, places: int, end_ns: int) -> list[Waiter]:
    """Requests of other classes that would take so many places of a batch of this queue that ends then."""
    found: list[Waiter] = []
    for other in sharers(queue):
        first = bisect_left(other.dues, end_ns)
        found += other.waiters[first : first + places - len(found)]
    return found


# ------------------------------------------------------------
# Measured durations and delays of devices, and the slack that plans leave before deadlines.


class Measured(Record):
    """The part of belief that is corrected by measured durations and delays."""

    def __init__(self, config: ControllerConfig) -> None:
        self.slack_ns = self._usual_slack_ns = config.slack_ns
        """How long before the deadline plans end; corrected by measured delays if ``measures``."""
        self.estimator = Estimator(config.estimate_window, config.estimate_quantile)
        self.measures = False
        """The policy plans with measured delays, so they are measured."""
        self.keeps_promises = False
        """The policy runs only what leaves all promises feasible, so they are made."""
        self.keeps_deadlines = False
        """The policy itself answers requests that expire, at an instant that it chooses for each."""
        self._slack_until_ns = 0
        """Until when the measured slack is valid."""
        self.devices: dict[str, DeviceBelief] = {}
        """Devices of all workers that are connected and not hung."""
        self._capable_devices: dict[str, int] = {}
        """By backend: how many of them run its codes; a cache."""

    def capable_devices(self, backend: str) -> int:
        """How many devices run codes of a backend."""
        count = self._capable_devices.get(backend)
        if count is None:
            count = sum([device.spec.runs(backend) for device in self.devices.values()])
            self._capable_devices[backend] = count
        return count

    def capacity(self, model: ServedModel) -> float:
        """How many devices of the kind that was profiled first serve as much as those that can run it."""
        capacity = 0.0
        for device in self.devices.values():
            if device.spec.runs(model.code.backend):
                code = device.codes.get(model.code_id)
                capacity += 1.0 if code is None else UNIT / code.timings.pace
        return capacity or 1.0

    def cost_ns(self, model: ServedModel, rows: int) -> int:
        """The device time that a request of ``rows`` rows is expected to take if it runs alone."""
        base_ns = model.base_ns or self._base_ns(model)
        if rows == 1:
            return base_ns
        for device in self.devices.values():
            profile = self.estimator.profile(model.code_id, device.spec.kind)
            if profile is not None:
                return min([ns for size, ns in profile.infer_ns.items() if size >= rows], default=base_ns)
        return base_ns

    def _base_ns(self, model: ServedModel) -> int:
        """The duration of batch 1 of a model, from the first profile known; 1 ms if there is none."""
        model.base_ns = self.estimator.base_ns(model.code_id)
        return model.base_ns or NS_PER_MS

    def rescale(self, sent: Sent, samples: Samples, now_ns: int) -> None:
        """Learn from an INFER whose duration was far from what was expected of it at first."""
        assert isinstance(sent.action, Infer)
        code = sent.device.codes.get(sent.action.code_id)
        if code is not None and not sent.action.signature:
            code.timings.rescale(samples, now_ns)

    def measure(self, sent: Sent, result: Result, now_ns: int) -> None:
        """Update the measured delays from an INFER's result; call it before its lane is updated.

        Not where a first estimate was too short: by how much says nothing of delays.
        """
        device = sent.device
        reach_ns = result.started_ns - sent.idle_ns if sent.idle_ns >= 0 else -1
        delays = device.delays
        assert sent.samples is not None
        error_ns = now_ns - device.exec.head_end_ns
        if error_ns > delays.slack_ns and len(sent.samples.samples) <= FIRST_SAMPLES:
            return
        old_slack_ns = delays.slack_ns
        delays.measured(error_ns, reach_ns, now_ns, result.transfer_in_ns, result.transfer_out_ns)
        device.exec.network_ns = delays.reach_ns
        self._slack_until_ns = now_ns + VALID_NS
        if delays.slack_ns != old_slack_ns:
            self._find_slack()

    def extra_ns(self, device: DeviceBelief, now_ns: int) -> int:
        """How much longer than ``slack_ns`` the slack is that this device needs, for a policy that measures.

        Forgets what was measured too long ago: with a long slack, it may be the reason that nothing is.
        """
        delays = device.delays
        if delays.extra_ns and now_ns > delays.measured_ns + VALID_NS:
            delays.forget()
            device.exec.network_ns = delays.reach_ns
            self._find_slack()
        return delays.extra_ns

    def _find_slack(self) -> None:
        """Set the slack to the shortest of any device's; the others plan with what they need beyond it."""
        slack_ns = NEVER_NS
        for device in self.devices.values():
            if device.delays.slack_ns < slack_ns:
                slack_ns = device.delays.slack_ns
        self.slack_ns = slack_ns if self.devices else self._usual_slack_ns
        for device in self.devices.values():
            device.delays.extra_ns = device.delays.slack_ns - slack_ns

    def forget_stale_delays(self, arrival_ns: int) -> None:
        """Reset all measured delays if they were stale when a request arrived."""
        if not self.measures or arrival_ns <= self._slack_until_ns:
            return
        for device in self.devices.values():
            device.delays.forget()
            device.exec.network_ns = device.delays.reach_ns
        self._find_slack()


# ------------------------------------------------------------
# A hung worker: what was in flight there when the controller stopped planning on it.


class HungWorker(Timer):
    """A worker that is connected and hung. The timer fires at the end of its grace: it is to be killed."""

    __slots__ = ("adopted", "answered", "devices", "ended", "heads", "kept", "name", "sent", "why")

    def __init__(self, name: str, why: str, devices: list[DeviceBelief], order: int) -> None:
        super().__init__(order)
        self.name = name
        self.why = why
        self.devices = devices
        """Its devices as believed before; when it recovers, new records replace them."""
        self.sent: dict[int, Sent] = {}
        """All and only actions in flight there, by id; their requests may be answered or run elsewhere."""
        self.adopted: dict[tuple[str, int], AdoptedAction] = {}
        """All and only adopted actions that run there, by device and id."""
        self.heads: set[int] = set()
        """INFERs that were first on their lanes, and so believed to be running."""
        self.kept: list[Residency] = []
        """Weights that are there or being loaded; of these records, only the state is kept up to date."""
        self.answered = False
        """It returned something since it hung: it recovers once it owes no result."""
        self.ended = False
        """It is to be killed, and does not recover any more."""


# ------------------------------------------------------------
# Belief. An operation that sends an action or a response also appends it to ``effects``, so that belief and
# what was sent cannot differ.


# ruff: noqa: PLR1730 - max() and min() cost 100 ns more than a condition


_CAUSES: Final = {
    Reason.NOT_SERVING: Cause.DEVICE_LOST, Reason.WORKER_LOST: Cause.DEVICE_LOST,
    Reason.DEVICE_FAULT: Cause.DEVICE_LOST, Reason.MODEL_RAISED: Cause.MODEL_FAILED,
    Reason.QUARANTINED: Cause.MODEL_FAILED,
}  # fmt: skip
"""Why a promise is broken by an answer with this reason; after others, it has to be found out."""


def _take_out(queue: Queue, waiters: list[Waiter]) -> list[Waiter]:
    """Remove these requests from a queue, where others may be between them."""
    for waiter in waiters:
        queue.remove(waiter)
    return waiters


class Belief(Measured):
    """All that the controller believes: models, devices, requests and actions in flight."""

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)
        self.config = config
        self._capacity_ns = config.capacity_ns
        self._hang_ns = config.hang_ns
        self._reject = config.reject_infeasible
        self.codes: dict[str, Code] = {}
        self.models: dict[str, ServedModel] = {}
        """All and only models that are served."""
        self.waiters: dict[str, Waiter] = {}
        """All and only requests that are not ANSWERED, by id."""
        self.sent: dict[int, Sent] = {}
        """All and only actions in flight, by id."""
        self.hung: dict[str, HungWorker] = {}
        """All and only hung workers, by name; their devices are not in ``devices``."""
        self.tenants = Tenants()
        self._charges = self.tenants.charges
        self.effects: list[ControllerEffect] = []
        """Decided and not yet handed to the driver."""
        self.dirty_models: list[ServedModel] = []
        """Models whose LOAD priority may have changed since the policy last ranked them (it clears the list
        and their flags); each once, removed ones too. A model that is on one device only is marked when its
        demand rises while that device has more demand than it can serve, or while it is a candidate.
        """
        self.dirty_above_ns = config.capacity_ns
        """Demand that one device can serve within the horizon; a policy that wants more models marked sets
        it lower."""
        self.dirty_lanes: list[LaneBelief] = []
        """Lanes that were given work since ``feasibility`` last checked them."""
        self.rechecks: list[Queue] = []
        """Queues whose feasibility is to be rechecked; each once."""
        self.now_ns = 0
        """The instant of the current decision, where requests are promised."""
        self.displaced: list[Waiter] = []
        """Promised requests that lost their place in a plan; ``promises`` finds them another."""
        self.waiting_by_class: dict[int, int] = {}
        """By ``Queue.level``: how many queues of that class have waiting requests; none has 0."""
        self.timers = Timers()
        """When time alone changes something: lane timers, heads that become infeasible, deadlines."""
        self.load_moves = 0
        """Changes of load lanes so far: actions sent or ended."""
        self.has_pending = False
        """Events were observed that the next ``decide`` has to process first."""
        self.busy_until_ns = 0
        """Until then the controller counts as short of time: few, large batches cost it least."""
        self._counter = config.first_id

    def next_id(self) -> int:
        """A new number, for ids, versions and orders."""
        self._counter += 1
        return self._counter

    def recheck(self, queue: Queue) -> None:
        """Have this queue's feasibility rechecked in this decision: something that it depends on changed."""
        if not queue.to_recheck and self._reject:
            queue.to_recheck = True
            self.rechecks.append(queue)

    def recheck_model(self, model: ServedModel) -> None:
        """Recheck all queues of a model."""
        for queue in model.queues.values():
            self.recheck(queue)

    def require(self, queue: Queue, size: int) -> None:
        """For policies: this queue runs at this batch size or above from now on, as admission is told."""
        queue.least = size
        for strategy in queue.strategies:
            strategy.least = strategy.residency.code.timings.infer(size, queue.signature)
        self.recheck(queue)

    def mark_dirty(self, model: ServedModel) -> None:
        """Have the policy rank the model's LOAD again in its next decision."""
        if not model.dirty:
            model.dirty = True
            self.dirty_models.append(model)

    # Estimates

    def why_never(self, device: DeviceBelief, model: ServedModel) -> str:
        """Why a device can never run a model, whatever else it holds; empty if it can."""
        if not device.spec.runs(model.code.backend):
            return device.spec.misfit(model.code.backend)
        size = model.model.weights.size
        if size > device.room_bytes:
            needed = align(size, device.spec.page_bytes)
            return (
                f"its weights have {size} bytes; {device.name} has {device.room_bytes}: "
                f"set device_memory to at least {-(-needed // MIB)}MiB"
            )
        return self._why_unfit(device, model.code)

    def _why_unfit(self, device: DeviceBelief, code: Code) -> str:
        kind = device.spec.kind
        profile = self.estimator.profile(code.code_id, kind)
        if profile is None:
            return f"there is no profile for devices of kind {kind}; measure it there: clockwork profile"
        return misfit(profile, device.spec, code.batch_sizes[0])

    def prepare(self, device: DeviceBelief, code_id: str) -> str:
        """Record that a device is ready for a code: which batch sizes are useful; or why it cannot run it."""
        kind, code = device.spec.kind, self.codes[code_id]
        profile = self.estimator.profile(code_id, kind)
        if why := self._why_unfit(device, code):
            return why
        assert profile is not None
        misfits = {size: why for size in code.batch_sizes if (why := misfit(profile, device.spec, size))}
        sizes = useful_sizes(code, profile, device.spec, self.config)
        timings = self.estimator.timings(device.name, kind, code_id)
        device.codes[code_id] = CodeOnDevice(profile, sizes, timings, misfits)
        return ""

    def reset_bases(self) -> None:
        """Drop what was derived from profiles and devices, which changed."""
        self._capable_devices.clear()
        for model in self.models.values():
            model.base_ns = 0
        if self.measures:
            self._find_slack()

    # Requests

    def due_ns(self, asked: Request | AdmissionQuery) -> int:
        """The instant by which its execution must end for the response to reach the client in time."""
        return asked.deadline_ns - asked.way_ns - self.slack_ns

    def admit(self, request: Request, model: ServedModel) -> Waiter:
        """Put a request into its queue."""
        if request.arrival_ns > self._slack_until_ns:
            self.forget_stale_delays(request.arrival_ns)
        due_ns, slo_ns = self.due_ns(request), request.deadline_ns - request.arrival_ns
        wanted_ns = slo_ns - self._usual_slack_ns
        if wanted_ns < NS_PER_MS:
            wanted_ns = NS_PER_MS
        demand_ns = (model.base_ns or self._base_ns(model)) * self._capacity_ns // wanted_ns or 1
        queue = model.main
        if queue is None or request.signature or request.rows != 1 or request.priority != model.priority:
            queue = self._queue(model, request, alone=False)
        waiter = Waiter(request, due_ns, slo_ns, demand_ns, queue)
        self.waiters[request.request_id] = waiter
        self._enqueue(waiter, queue, model)
        return waiter

    def readmit(self, waiter: Waiter, cause: Cause, *, alone: bool) -> None:
        """Put a request that was in flight back into a queue, for a cause.

        ``alone``: it may not share a batch again.
        """
        waiter.step(RETURN)
        if waiter.promised_ns >= 0:
            self.displaced.append(waiter)
            waiter.cause = cause
        waiter.alone = waiter.alone or alone
        model = waiter.queue.model
        waiter.queue = self._queue(model, waiter.request, alone=waiter.alone)
        if self._charges:
            self.tenants.returned(waiter, self.cost_ns(model, waiter.request.rows))
        self._enqueue(waiter, waiter.queue, model)

    def move(self, waiter: Waiter, model: ServedModel) -> Queue:
        """Move a waiting request to a queue of another version of its model."""
        queue = waiter.queue
        queue.remove(waiter)
        if waiter.place is not None:
            leave([waiter])
            self.displaced.append(waiter)
            waiter.cause = Cause.MODEL_REMOVED
        self._after_removal(queue, [waiter])
        waiter.queue = queue = self._queue(model, waiter.request, alone=waiter.alone)
        self._enqueue(waiter, queue, model)
        return queue

    def answer(
        self, waiter: Waiter, outcome: Outcome, reason: Reason, *, message: str = "", retry_after_ns: int = 0
    ) -> None:
        """End a request without a result; its tensors are released later if a worker still has them."""
        release = False
        cause = Cause.NONE
        if waiter.promised_ns >= 0 and outcome is not Outcome.CANCELLED:
            cause = self.break_promise(waiter, reason)
            if outcome is not Outcome.FAILED and reason is not Reason.LATE:
                outcome, reason = Outcome.EXPIRED, Reason.PROMISE_BROKEN
        if waiter.state == WAITING:
            waiter.queue.remove(waiter)
            if waiter.place is not None:
                leave([waiter])
            self._after_removal(waiter.queue, [waiter])
            release = self._end(waiter)
        else:
            waiter.tensor_refs += 1
            waiter.step(ANSWER_EARLY)
        self.effects.append(
            Answer(
                request_id=waiter.request.request_id, gateway=waiter.request.gateway, outcome=outcome,
                reason=reason, message=message, retry_after_ns=retry_after_ns, release=release,
                cold=waiter.cold, promised=waiter.promised_ns >= 0, cause=cause,
            )
        )  # fmt: skip

    def break_promise(self, waiter: Waiter, reason: Reason) -> Cause:
        """Why a promise is broken by an answer with this reason; its device keeps more time for the next."""
        device = waiter.device
        if device is None:  # it awaited failover, and has had no place here
            assert waiter.cause is Cause.CONTROLLER_LOST, f"{waiter.request.request_id} has no device"
            return waiter.cause
        cause = self._cause_of(waiter, device, reason)
        if cause is Cause.DEVICE_SLOWED or cause is Cause.UNEXPLAINED:
            device.delays.broke_promise()
        elif cause is Cause.OUTRANKED:
            device.delays.outranked_promise(waiter.queue.level)
        return cause

    def _cause_of(self, waiter: Waiter, device: DeviceBelief, reason: Reason) -> Cause:
        if waiter.queue.model.removed:
            return Cause.MODEL_REMOVED
        if reason in _CAUSES:
            return _CAUSES[reason]
        sent = waiter.state == SENT  # to end before its due time, whatever was before
        if not sent and waiter.cause is not Cause.NONE:
            return waiter.cause
        if device.exec.stalled or (not sent and device.load.stalled):
            return Cause.DEVICE_STALLED
        late = sent or device.exec.overdue_ns(self.now_ns) > 0 or device.load.overdue_ns(self.now_ns) > 0
        return Cause.DEVICE_SLOWED if late or device.slowed_ns > waiter.promised_ns else Cause.UNEXPLAINED

    def finish(self, waiter: Waiter, answer: Answer) -> None:
        """End a request with a response made from the result of its INFER."""
        if waiter.tensor_refs:
            self._end(waiter)
            self.effects.append(replace(answer, release=False))
            return
        waiter.step(ANSWER)
        del self.waiters[waiter.request.request_id]
        if self._charges:
            self.tenants.ended(waiter.request.request_id)
        self.effects.append(answer)

    def _end(self, waiter: Waiter) -> bool:
        """Step a request that is answered; returns whether no worker has its tensors."""
        free = not waiter.tensor_refs
        if free:
            waiter.step(ANSWER)
            del self.waiters[waiter.request.request_id]
        else:
            waiter.step(ANSWER_EARLY)
        if self._charges:
            self.tenants.ended(waiter.request.request_id)
        return free

    def release(self, waiter: Waiter) -> None:
        """An action of an answered request is over: release its tensors, unless other actions have them."""
        waiter.tensor_refs -= 1
        if waiter.tensor_refs:
            return
        waiter.step(RELEASE)
        del self.waiters[waiter.request.request_id]
        if self._charges:
            self.tenants.ended(waiter.request.request_id)
        self.effects.append(Release(request_id=waiter.request.request_id, gateway=waiter.request.gateway))

    def _queue(self, model: ServedModel, request: Request, *, alone: bool) -> Queue:
        """The queue for a request; created if needed, with a strategy for each device with the weights."""
        queue = model.find(request, alone=alone)
        if queue is None:
            queue = model.open(
                request.signature, request.rows, self.next_id(), alone=alone, priority=request.priority
            )
            for residency in model.residencies.values():
                if residency.state == READY:
                    queue.strategies = (*queue.strategies, Strategy(queue, residency))
        return queue

    def _enqueue(self, waiter: Waiter, queue: Queue, model: ServedModel) -> None:
        if (queue.add(waiter) or queue.watch is None) and not queue.to_recheck and self._reject:
            queue.to_recheck = True
            self.rechecks.append(queue)
        if len(queue.dues) == 1:
            self.waiting_by_class[queue.level] = self.waiting_by_class.get(queue.level, 0) + 1
            if not model.waiting or queue.band_ns < model.band_ns:
                model.band_ns = queue.band_ns
        model.waiting += 1
        model.demand_ns += waiter.demand_ns
        sole = model.sole
        if sole is not None:
            sole.assign(model.demand_ns)
            if sole.device.demand_ns <= self.dirty_above_ns and sole.serves:
                return
        self.mark_dirty(model)

    def _after_removal(self, queue: Queue, waiters: list[Waiter]) -> None:
        """Update counts and demand after requests were removed from a queue."""
        model = queue.model
        model.waiting -= len(waiters)
        for waiter in waiters:
            model.demand_ns -= waiter.demand_ns
        if not queue.waiters:
            waiting = self.waiting_by_class
            waiting[queue.level] -= 1
            if not waiting[queue.level]:
                del waiting[queue.level]
            model.band_ns = (
                min([one.band_ns for one in model.queues.values() if one.dues]) if model.waiting else 0
            )
            if queue is not model.main:
                model.queues.pop((queue.signature, queue.rows, queue.alone, queue.level), None)
                for strategy in queue.strategies:
                    strategy.device.agenda.remove(strategy)
        sole = model.sole
        if sole is not None:
            sole.assign(model.demand_ns)
            agenda = sole.device.agenda
            if model.load_key is None and not (agenda.load_blocked or agenda.room_blocked or agenda.in_vain):
                return
        self.mark_dirty(model)

    # Actions

    def send_infer(
        self, strategy: Strategy, batch: BatchChoice, first: int, start_ns: int, now_ns: int,
        planned: list[Waiter] | None = None,
    ) -> None:  # fmt: skip
        """Send ``batch.count`` requests, from index ``first`` of the strategy's queue, as an INFER.

        Or those that were planned together, between which others of the queue may be due. Requests of other
        classes that can be in time take the places that its own requests leave free.
        """
        residency, device, queue = strategy.residency, strategy.device, strategy.queue
        model, expected_ns = queue.model, batch.samples.estimate_ns
        others = sharers(queue) if len(model.queues) > 1 else []
        waiters = queue.take(first, batch.count) if planned is None else _take_out(queue, planned)
        self._after_removal(queue, waiters)
        if others:
            self._take_joining(waiters, others, batch.count, start_ns + expected_ns)
        calls: list[Call] = []
        least_ns = NEVER_NS
        for waiter in waiters:
            request = waiter.request
            calls.append(Call(request_id=request.request_id, rows=request.rows, tensors=request.tensors))
            if waiter.due_ns + request.deadline_ns < least_ns:
                least_ns = waiter.due_ns + request.deadline_ns
            waiter.step(SEND)
            if waiter.place is not None:
                leave(waiters)  # all of them at once
            waiter.device = device
        latest_ns = least_ns // 2 - expected_ns  # each still has half of the slack that it was admitted with
        if latest_ns < start_ns:
            latest_ns = start_ns
        self._counter = action_id = self._counter + 1
        action = Infer(
            action_id=action_id, device=device.name, model=model.key, code_id=model.code_id,
            extent=residency.extent, version=residency.version, batch=batch.size, expected_ns=expected_ns,
            calls=tuple(calls), window=Window(now_ns, latest_ns), signature=queue.signature,
        )  # fmt: skip
        if self._charges:
            self.tenants.sent(waiters, expected_ns)
        self.sent[action_id] = sent = Sent(action, device, residency, batch.samples, waiters)
        if not device.exec.outstanding:
            sent.idle_ns = now_ns
            self.arm_checks(device, now_ns)
        residency.in_flight, residency.slow = residency.in_flight + 1, False
        device.used = residency.used = device.used + 1
        self._occupy(device.exec, action_id, expected_ns, now_ns)
        self.effects.append(action)

    def _take_joining(self, waiters: list[Waiter], others: list[Queue], count: int, end_ns: int) -> None:
        """Fill a batch up to ``count`` with requests of other queues that are due after its end."""
        for queue in others:
            if len(waiters) < count:
                joined = queue.take(bisect_left(queue.dues, end_ns), count - len(waiters))
                self._after_removal(queue, joined)
                waiters += joined

    def send_load(
        self, device: DeviceBelief, model: ServedModel, extent: Extent, start_ns: int, now_ns: int
    ) -> None:
        """Send a LOAD into free pages, to a device that has prepared the model's code."""
        config = self.config
        code = device.codes[model.code_id]
        samples = code.timings.load(model.model.weights.size)
        expected_ns = samples.estimate_ns
        timeout_ns = max(config.look_ahead_ns, config.capacity_ns)
        action_id = self.next_id()
        residency = Residency(model, device, code, extent, version=action_id)
        residency.ready_ns = start_ns + expected_ns
        if self._charges:
            self.tenants.loading(model, action_id)
        device.hold(residency)
        model.add_residency(residency)
        self.mark_dirty(model)
        action = Load(
            action_id=action_id, device=device.name, model=model.key, code_id=model.code_id,
            weights=model.model.weights, extent=extent, version=residency.version, expected_ns=expected_ns,
            window=Window(now_ns, start_ns + timeout_ns),
        )  # fmt: skip
        self.sent[action_id] = Sent(action, device, residency, samples, [])
        self.arm_checks(device, now_ns)
        self._occupy(device.load, action_id, expected_ns, now_ns)
        self.watch_load(device, now_ns)
        self.load_moves += 1
        self.effects.append(action)

    def send_unload(self, residency: Residency, now_ns: int) -> None:
        """Send an UNLOAD of weights that are ready and not in use; their pages count as free at once."""
        assert residency.in_flight == 0, f"{residency.model.key} is in use"
        device = residency.device
        residency.step(UNLOAD)
        if residency.reserved:
            self._displace(residency, Cause.OUTRANKED)
        self.drop(residency)
        action_id = self.next_id()
        action = Unload(
            action_id=action_id, device=device.name, model=residency.model.key, extent=residency.extent,
            version=residency.version, window=Window(now_ns, NEVER_NS),
        )  # fmt: skip
        self.sent[action_id] = Sent(action, device, None, None, [])
        self.arm_checks(device, now_ns)
        device.load.send(action_id, 0, now_ns)
        self.watch_load(device, now_ns)
        self.load_moves += 1
        self.effects.append(action)

    def arm_checks(self, device: DeviceBelief, now_ns: int) -> None:
        """Set the timers that check whether a device hangs or stalls, unless they are set; it gets work."""
        if device.hang_timer.at_ns == NEVER_NS:
            self.timers.set(device.hang_timer, now_ns + self._hang_ns)
        if device.stall_timer.at_ns == NEVER_NS:
            self.timers.set(device.stall_timer, now_ns + STALL_CHECK_NS)

    def watch_load(self, device: DeviceBelief, now_ns: int) -> None:
        """Have a load lane checked once its running action is overdue; called when its actions changed."""
        lane, at_ns = device.load, NEVER_NS
        if not device.load_stall_timer.at_ns:
            return  # the policy has nobody look
        if lane.outstanding:
            overdue_ns = lane.head_end_ns + max(STALL_CHECK_NS, lane.head_lasts_ns)
            at_ns = max(overdue_ns, now_ns + STALL_CHECK_NS)
        self.timers.set(device.load_stall_timer, at_ns)

    def _occupy(self, lane: LaneBelief, action_id: int, expected_ns: int, now_ns: int) -> None:
        """Add an action to a lane; if that may make a watched head infeasible, have the lane rechecked."""
        lane.send(action_id, expected_ns, now_ns)
        watch = lane.watch
        if (
            watch is not None and not lane.dirty
            and (lane.free_ns > watch.first_ns or lane.behind_ns > watch.behind_ns)
        ):  # fmt: skip
            lane.dirty = True
            self.dirty_lanes.append(lane)

    # Weights

    def loaded(self, residency: Residency) -> None:
        """Record that weights are ready: every queue of the model gets a strategy there."""
        residency.step(LOADED)
        residency.loosen()
        for queue in residency.model.queues.values():
            queue.strategies = (*queue.strategies, Strategy(queue, residency))
            self.recheck(queue)

    def drop(self, residency: Residency) -> None:
        """Remove weights that have left a device."""
        device, model = residency.device, residency.model
        if residency.reserved:
            self._displace(residency, Cause.DEVICE_LOST)
        device.pages.release(residency.extent)
        device.agenda.in_vain.clear()
        model.remove_residency(residency)
        for queue in model.queues.values():
            for strategy in queue.strategies:
                if strategy.residency is residency:
                    device.agenda.remove(strategy)
                    queue.strategies = tuple([one for one in queue.strategies if one is not strategy])
                    break
            if queue.waiters:
                self.recheck(queue)
        self.mark_dirty(model)

    def _displace(self, residency: Residency, cause: Cause) -> None:
        self.displace([one for one in residency.device.reserved if one.residency is residency], cause)

    def displace(self, reservations: list[Reservation], cause: Cause) -> None:
        """End reservations for a cause; their requests stay promised, and want another place."""
        for one in reservations:
            self.displaced += one.waiters
            for waiter in one.waiters:
                waiter.cause = cause
            leave(one.waiters)
