"""The controller's brain: observes requests, results and workers, and decides what to send.

Also here: its snapshot for screens, and the invariants that relate its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, assert_never

from msgspec.structs import replace

from clockwork_serve.controller import state
from clockwork_serve.controller.admission import Admission
from clockwork_serve.controller.belief import Belief, HungWorker
from clockwork_serve.controller.cluster import (
    DeviceBelief,
    HangTimer,
    LaneTimer,
    Residency,
    ServedModel,
    StallTimer,
    Waiter,
)
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.deadlines import Deadlines
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.controller.fleet import Fleet, ReadinessTracker, Takeover
from clockwork_serve.controller.hangs import Hangs, Stalls
from clockwork_serve.controller.lanes import Watch
from clockwork_serve.controller.life import ANSWERED, READY, SENT, SPENT, WAITING
from clockwork_serve.controller.outlook import Outlook, outlooks
from clockwork_serve.controller.policies import scheduler_for, successor_for
from clockwork_serve.controller.promises import Promises
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.results import ResultHandler
from clockwork_serve.controller.timers import NEVER_NS, Timer
from clockwork_serve.messages import (
    Action,
    AdmissionQuery,
    AdmissionReply,
    Answer,
    Cancel,
    Cause,
    Code,
    CodeAdded,
    CodeReady,
    CodeRemade,
    CodeRemoved,
    ControllerBusy,
    ControllerEffect,
    ControllerEvent,
    DeviceState,
    Drain,
    GatewayLost,
    Infer,
    Model,
    ModelAdded,
    ModelRemoved,
    Outcome,
    QuotasSet,
    Reason,
    ReleaseFromQuarantine,
    Request,
    Resident,
    Result,
    SoonestEnd,
    Status,
    WeightsReady,
    WorkerCrashed,
    WorkerHeard,
    WorkerJoined,
    WorkerLost,
    WorkerSilent,
)

# ------------------------------------------------------------
# What the controller believes, as plain data that encodes as JSON, for screens.


def snapshot(belief: Belief, quarantined: dict[str, str]) -> dict[str, object]:
    """Queues, devices, resident models and tenants; and why models are ``quarantined``, by key."""
    return {
        "in_flight": len(belief.waiters),
        "waiting": {key: model.waiting for key, model in belief.models.items() if model.waiting},
        "models": len(belief.models),
        "quarantined": quarantined,
        "unservable": {key: model.unservable for key, model in belief.models.items() if model.unservable},
        "hung": {name: one.why for name, one in belief.hung.items()},
        "devices": [_device(device) for device in belief.devices.values()],
        "tenants": belief.tenants.snapshot(),
    }


def _device(device: DeviceBelief) -> dict[str, object]:
    ready: list[Residency] = [one for one in device.pages.holders() if one.state == READY]
    return {
        "device": device.name, "kind": device.spec.kind, "worker": device.worker, "warm": device.warm,
        "pages": device.spec.pages, "page_bytes": device.spec.page_bytes, "pages_used": device.pages.used,
        "resident": [residency.model.key for residency in ready],
        "codes": len(device.codes), "failed_codes": device.failed_codes,
        "failed_weights": device.failed_weights, "pending_codes": len(device.pending_codes),
        "exec_outstanding": len(device.exec.outstanding), "load_outstanding": len(device.load.outstanding),
    }  # fmt: skip


def _state(device: DeviceBelief) -> DeviceState:
    """What is believed to be on a device, but for what runs there."""
    return DeviceState(
        device=device.name, codes=tuple(device.codes),
        weights=tuple(
            [
                Resident(
                    model=one.model.key, code_id=one.model.code_id, weights=one.model.model.weights,
                    extent=one.extent, version=one.version,
                )
                for one in device.pages.holders()
                if one.state == READY
            ]
        ),
    )  # fmt: skip


# ------------------------------------------------------------
# Invariants of belief as a whole.


def check_belief(belief: Belief) -> None:
    """Assert every invariant that relates parts of belief."""
    for model in belief.models.values():
        waiters = [waiter for queue in model.queues.values() for waiter in queue.waiters]
        assert model.waiting == len(waiters)
        assert model.demand_ns == sum(waiter.demand_ns for waiter in waiters)
        assert model.band_ns == min([waiter.queue.band_ns for waiter in waiters], default=0)
        ready = sum(residency.state == READY for residency in model.residencies.values())
        for queue in model.queues.values():
            queue.check()
            assert model.queues[queue.signature, queue.rows, queue.alone, queue.level] is queue
            assert len(queue.strategies) == ready
    by_class = Counter(
        queue.level for model in belief.models.values() for queue in model.queues.values() if queue.dues
    )
    assert belief.waiting_by_class == by_class, f"{belief.waiting_by_class} is not {by_class}"
    waiting = sum(model.waiting for model in belief.models.values())
    states = [waiter.state for waiter in belief.waiters.values()]
    assert states.count(WAITING) == waiting
    assert ANSWERED not in states
    flying = Counter([id(waiter) for sent in belief.sent.values() for waiter in sent.waiters])
    owed = Counter(
        [id(one) for hung in belief.hung.values() for sent in hung.sent.values() for one in sent.waiters]
    )
    for waiter in belief.waiters.values():
        flies = flying.pop(id(waiter), 0)
        assert flies == (waiter.state == SENT) or (flies <= 1 and waiter.state == SPENT)
        held = owed.pop(id(waiter), 0) + (flies if waiter.state == SPENT else 0)
        assert waiter.tensor_refs == held, f"{waiter.request.request_id}: {waiter.tensor_refs} is not {held}"
        assert waiter.state != SPENT or waiter.tensor_refs
    assert not flying and not owed, "requests that are over are in flight"
    for device in belief.devices.values():
        device.check()
        shares_ns = sum(one.demand_ns for one in device.pages.holders())
        assert device.demand_ns == shares_ns, f"{device.name}: {device.demand_ns} is not {shares_ns}"
    for sent in belief.sent.values():
        assert belief.devices[sent.action.device] is sent.device
        assert isinstance(sent.action, Infer) == bool(sent.waiters)
        if sent.residency is not None and sent.waiters:
            assert sent.residency.state == READY
            assert sent.residency.in_flight > 0
    assert all(model.dirty for model in belief.dirty_models)
    assert all(queue.to_recheck for queue in belief.rechecks)
    belief.tenants.check(set(belief.waiters))


# ------------------------------------------------------------
# The brain.
#
# ``decide`` handles one instant in order: events are taken in as they were observed, arrivals get their
# verdicts, results and losses are processed, expired requests are answered, the policy tops up lanes,
# requests that became infeasible are rejected, admission queries are answered, a change of readiness is sent.


GOOD: Final = Status.OK


class Controller(Record):
    """The controller's brain: a ``machine.Machine`` of ``ControllerEvent`` and ``ControllerEffect``.

    ``observe`` notes events, ``decide`` makes every choice; the work is in the parts made here.
    """

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self._belief = Belief(config)
        self._promises = Promises(self._belief)
        self._scheduler = scheduler_for(self._belief)
        self._feasibility = Feasibility(self._belief)
        self._counts = config.reject_infeasible and self._belief.measures
        self._quarantine = Quarantine(self._belief)
        self._admission = Admission(self._belief, self._feasibility, self._quarantine, self._promises)
        self._result_handler = ResultHandler(self._belief, self._scheduler, self._quarantine)
        self._results = self._result_handler.results
        self._takeover = Takeover(self._belief, self._scheduler, self._feasibility)
        self._noted: list[ControllerEvent] = []
        """All and only events observed since the last ``decide``, in order."""
        self._queries: list[AdmissionQuery] = []
        """Admission queries of this instant: answered last, by what was decided before."""
        self._ending: list[tuple[Waiter, Outcome, Reason, str]] = []
        """Admitted requests that an event of this instant ends (cancelled, model removed)."""
        self._timers = self._belief.timers
        self._tenants = self._belief.tenants
        self._accounts, self._charges = self._tenants.accounts, self._tenants.charges
        self._deadlines = Deadlines(self._timers)
        self._reject = config.reject_infeasible
        self._readiness = ReadinessTracker(self._belief)
        self._fleet = Fleet(
            self._belief, self._scheduler, self._feasibility, self._quarantine, self._result_handler,
            takeover=self._takeover, readiness=self._readiness,
        )  # fmt: skip
        self._stalls = Stalls(self._belief, self._readiness)
        self._hangs = Hangs(
            self._belief, self._fleet, self._scheduler, self._result_handler, self._quarantine,
            takeover=self._takeover, readiness=self._readiness,
        )  # fmt: skip

    # Events

    def observe(self, event: ControllerEvent, now_ns: int) -> None:
        """Note an event. Belief changes, and choices are made, in the ``decide`` of this instant."""
        self._noted.append(event)

    def _take_in(self, event: ControllerEvent, now_ns: int) -> None:
        """Change belief by one event."""
        match event:
            case Request():
                self._on_request(event, now_ns)
            case Result():
                self._on_result(event, now_ns)
            case Cancel():
                gone = self._belief.waiters.get(event.request_id)
                if gone is not None:
                    self._end_early(gone, Outcome.CANCELLED, Reason.NONE, "the client went away")
            case CodeReady() | WeightsReady():
                self._on_ready(event, now_ns)
            case WorkerJoined() | WorkerLost():
                self._on_worker(event, now_ns)
            case ControllerBusy():
                self._belief.busy_until_ns = now_ns + event.for_ns
            case WorkerSilent() | WorkerHeard():
                self._hangs.observe(event)
            case ReleaseFromQuarantine() | WorkerCrashed():
                self._quarantine.observe(event)
            case CodeAdded() | CodeRemade() | CodeRemoved():
                self._on_code(event, now_ns)
            case ModelAdded():
                self._on_model(event)
            case ModelRemoved():
                self._on_model_removed(event.model)
            case GatewayLost():
                self._on_gateway_lost(event.gateway)
            case Drain():
                self._admission.draining = self._readiness.may_change = True
            case AdmissionQuery():
                self._queries.append(event)
            case QuotasSet():
                self._tenants.set_quotas(event, now_ns)
            case _:
                assert_never(event)

    def _on_request(self, request: Request, now_ns: int) -> None:
        belief = self._belief
        assert request.request_id not in belief.waiters, f"{request.request_id} came twice"
        model = belief.models.get(request.model)
        no = self._admission.verdict(request, model, now_ns)
        if no is not None:
            answer = Answer(
                request_id=request.request_id, gateway=request.gateway, outcome=no.outcome,
                reason=no.reason, message=no.message, retry_after_ns=no.retry_after_ns,
            )  # fmt: skip
            if no.outcome is Outcome.REJECTED and self._promises.broken(request, now_ns):
                answer = replace(
                    answer, outcome=Outcome.EXPIRED, reason=Reason.PROMISE_BROKEN, promised=True,
                    cause=Cause.CONTROLLER_LOST,
                )  # fmt: skip
            belief.effects.append(answer)
            return
        assert model is not None
        if self._accounts:
            account = self._accounts.get(request.tenant)
            if account is not None:
                self._tenants.admit(request, account, model, belief.cost_ns(model, request.rows))
        waiter = belief.admit(request, model)
        if waiter.queue is not model.main and self._reject:
            self._feasibility.try_unmeasured(waiter.queue, request.deadline_ns - request.way_ns - now_ns)
        # Most servers promise nothing, and a call for each request costs.
        if self._promises.active or request.decide_ns >= 0 or self.config.decide_ns >= 0:
            self._promises.arrived(waiter, now_ns)
        self._scheduler.queued(waiter.queue)
        if not belief.keeps_deadlines:
            self._deadlines.add(waiter)

    def _reply(self, query: AdmissionQuery, now_ns: int) -> None:
        """Answer an admission query: with the verdict if its request would be rejected, else without.

        Requests that would be INVALID or FAILED are told so when they are complete.
        """
        no = self._admission.verdict(query, self._belief.models.get(query.model), now_ns)
        if no is None or no.outcome is not Outcome.REJECTED:
            reply = AdmissionReply(announced_id=query.announced_id, gateway=query.gateway)
        else:
            reply = AdmissionReply(
                announced_id=query.announced_id, gateway=query.gateway, reason=no.reason, message=no.message,
                retry_after_ns=no.retry_after_ns,
            )  # fmt: skip
        self._belief.effects.append(reply)

    def _end_early(self, waiter: Waiter, outcome: Outcome, reason: Reason, message: str) -> None:
        self._ending.append((waiter, outcome, reason, message))
        self._belief.has_pending = True

    def _on_gateway_lost(self, gateway: str) -> None:
        for waiter in self._belief.waiters.values():
            if waiter.request.gateway == gateway:
                self._end_early(waiter, Outcome.CANCELLED, Reason.NONE, "its gateway is gone")

    def _on_result(self, result: Result, now_ns: int) -> None:
        self._end_action(result, now_ns)
        if result.held is not None and (device := self._belief.devices.get(result.device)) is not None:
            self._takeover.correct(device, result.held, now_ns)

    def _end_action(self, result: Result, now_ns: int) -> None:
        sent = self._belief.sent.pop(result.action_id, None)
        if sent is None:
            self._takeover.observe_result(result, now_ns)
            self._hangs.observe_result(result, now_ns)
            return
        device, samples = sent.device, sent.samples
        good = result.status is GOOD
        if self._promises.active:
            self._promises.ended(sent, result, now_ns)
        if good and samples is not None:
            lasted_ns = result.ended_ns - result.started_ns - result.once_ns
            if samples.learn(lasted_ns, now_ns) and sent.waiters:
                self._belief.rescale(sent, samples, now_ns)
        if sent.waiters:
            if self._charges:
                self._tenants.measured(sent.waiters, result.ended_ns - result.started_ns, now_ns)
            if good and self._belief.measures:
                self._belief.measure(sent, result, now_ns)
            device.exec.end(result.action_id, result.ended_ns)
            assert sent.residency is not None
            sent.residency.in_flight -= 1
            sent.residency.loosen()
            self._scheduler.exec_changed(device)
        else:
            if self._tenants.loads:
                self._tenants.loaded(result.action_id, now_ns, good=good)
            device.load.end(result.action_id, result.ended_ns)
            self._belief.watch_load(device, now_ns)
            if self._reject:
                self._feasibility.load_ended(device, now_ns)
            if good and sent.residency is not None:
                self._belief.loaded(sent.residency)
                if self._counts:
                    self._admission.find_pace(sent.residency.model, now_ns)
                self._scheduler.loaded(sent.residency)
            self._scheduler.load_changed(device)
        self._results.append((sent, result))
        self._belief.has_pending = True

    # Workers

    def _on_ready(self, event: CodeReady | WeightsReady, now_ns: int) -> None:
        device = self._belief.devices.get(event.device)
        hung = None if device is not None else self._hangs.of_device(event.device)
        if hung is not None:
            device = hung[1]
            self._hangs.progressed(hung[0])
        if device is None:
            return
        if isinstance(event, CodeReady):
            self._fleet.prepared(device, event, now_ns)
        else:
            self._fleet.weights_found(device, event)

    def _on_worker(self, event: WorkerJoined | WorkerLost, now_ns: int) -> None:
        lost = event if isinstance(event, WorkerLost) else WorkerLost(worker=event.worker)
        running_ids = self._quarantine.worker_lost(lost) | self._takeover.running_of(lost)
        self._hangs.worker_lost(lost.worker, running_ids)
        self._fleet.worker_lost(lost.worker, running_ids)
        if isinstance(event, WorkerJoined):
            self._fleet.joined(event, now_ns)

    # Models

    def _on_code(self, event: CodeAdded | CodeRemade | CodeRemoved, now_ns: int) -> None:
        if isinstance(event, CodeRemade):
            self._on_code_remade(event.code_id, now_ns)
            return
        if isinstance(event, CodeRemoved):
            self._on_code_removed(event.code_id)
            return
        code_id = event.code.code_id
        for profile in event.profiles:
            self._belief.estimator.learn_profile(profile)
        self._belief.reset_bases()
        self._readiness.may_change = True
        if code_id in self._belief.codes:
            return
        self._belief.codes[code_id] = event.code
        self._fleet.prepare_code(event.code, now_ns)

    def _on_code_remade(self, code_id: str, now_ns: int) -> None:
        code = self._belief.codes.get(code_id)
        if code is not None and not self._quarantine.holds(code_id):
            self._fleet.retry_code(code, now_ns)

    def _on_code_removed(self, code_id: str) -> None:
        self._belief.codes.pop(code_id, None)
        self._quarantine.forget(code_id)
        self._fleet.forget(code_id)

    def _on_model(self, event: ModelAdded) -> None:
        key = event.model.key
        if (known := self._belief.models.get(key)) is not None and known.model == event.model:
            return
        self._on_model_removed(key)
        code = self._belief.codes.get(event.model.code_id)
        assert code is not None, f"model {key} was added before its code {event.model.code_id}"
        model = self._belief.models[key] = ServedModel(event.model, code, self._belief.next_id())
        self._quarantine.added(model)
        self._readiness.model_added(model)
        self._result_handler.move_waiters(model, self._ending)

    def _on_model_removed(self, key: str) -> None:
        model = self._belief.models.pop(key, None)
        if model is None:
            return
        model.removed = True
        model.load_key = None
        self._quarantine.removed(model)
        self._readiness.model_removed(model)
        for queue in model.queues.values():
            for waiter in queue.waiters:
                self._end_early(waiter, Outcome.REJECTED, Reason.NOT_SERVING, "the model was unloaded")
        self._result_handler.retire(model)

    # Choices

    def decide(self, now_ns: int) -> list[ControllerEffect]:
        """Make every decision that is due; returns all effects of this instant."""
        belief, scheduler = self._belief, self._scheduler
        belief.now_ns = now_ns
        noted = self._noted
        if noted:
            for event in noted:
                if type(event) is Request:
                    self._on_request(event, now_ns)
                elif type(event) is Result:
                    self._on_result(event, now_ns)
                else:
                    self._take_in(event, now_ns)
            noted.clear()
        if belief.has_pending:
            belief.has_pending = False
            if self._takeover.retained:  # what workers keep is said before all else
                belief.effects[:0] = self._takeover.retained
                self._takeover.retained.clear()
            if self._ending:
                self._answer_ending()
            if self._hangs.has_pending:
                self._hangs.process(now_ns)
            self._result_handler.process(now_ns)
        timers = self._timers.heap
        while timers and timers[0][0] <= now_ns:
            timer = self._timers.due(now_ns)
            if isinstance(timer, LaneTimer):
                scheduler.fired(timer)
            elif timer is not None:
                self._fire(timer, now_ns)
        scheduler.schedule(now_ns)
        if self._promises.active and self._admission.judge(now_ns):
            scheduler.schedule(now_ns)
        while (belief.rechecks or belief.dirty_lanes) and self._admission.recheck(now_ns):
            scheduler.schedule(now_ns)
        while self._queries:
            self._reply(self._queries.pop(0), now_ns)
        if self._readiness.may_change:
            self._readiness.update(draining=self._admission.draining)
        effects, belief.effects = belief.effects, []
        return effects

    def _answer_ending(self) -> None:
        for waiter, outcome, reason, message in self._ending:
            if waiter.state <= SENT:
                self._belief.answer(waiter, outcome, reason, message=message)
                self._belief.recheck(waiter.queue)
        self._ending.clear()

    def _fire(self, timer: Timer, now_ns: int) -> None:
        """Handle a timer that fired: a watched lane, a device to check, a hung worker, or deadlines."""
        if timer is self._promises:
            return  # verdicts are given after the policy has chosen
        if isinstance(timer, Watch):
            self._feasibility.check_watch(timer, now_ns)
            return
        if isinstance(timer, StallTimer):
            self._stalls.fired(timer, now_ns)
            return
        if isinstance(timer, HangTimer | HungWorker):
            self._hangs.fired(timer, now_ns)
            return
        if timer is not self._deadlines:
            return  # the policy's own: it is asked next
        for waiter in self._deadlines.passed(now_ns):
            reason = Reason.LATE if waiter.state == SENT else Reason.NONE
            self._belief.answer(waiter, Outcome.EXPIRED, reason, message="no answer by the deadline")
            self._belief.recheck(waiter.queue)
        self._deadlines.correct()

    def next_wakeup_ns(self) -> int | None:
        """The earliest timer: a lane with room again, a head about to be infeasible, a check, a deadline."""
        timers, deadlines = self._timers, self._deadlines
        if not timers.heap:
            return None
        at_ns, _, timer = timers.heap[0]
        if timer.at_ns == at_ns and timer is not deadlines:
            return at_ns
        at_ns = timers.next_ns()
        while at_ns == deadlines.at_ns and at_ns != NEVER_NS:
            deadlines.correct()
            if deadlines.at_ns == at_ns:
                break
            at_ns = timers.next_ns()
        return None if at_ns == NEVER_NS else at_ns

    def snapshot(self) -> dict[str, object]:
        """Queues, devices and resident models, for screens; plain data that encodes as JSON."""
        return snapshot(self._belief, self._quarantine.snapshot())

    def soonest_ends(self, keys: Iterable[str], now_ns: int) -> dict[str, SoonestEnd]:
        """What gateways may reject requests by; see ``Admission.soonest_ends``."""
        return self._admission.soonest_ends(keys, now_ns)

    # Copies of the whole state

    def fork(self) -> Controller:
        """A second controller that continues from here exactly like this one; neither disturbs the other.

        It is for whoever asks what this one would do: explanations, plans, autoscaling. It takes a few
        milliseconds for 1,000 models, and costs requests nothing. A fork that nobody needs any more is full
        of cycles: where the garbage collector is off, call ``gc.collect()`` now and then. Brains that are
        compiled raise ``StateError``, here, in ``save`` and in ``restore``.
        """
        return state.fork(self)

    def save(self) -> bytes:
        """The whole state as bytes, for a controller in another process, such as a warm standby.

        Only the same version restores it. It holds no tensors, and nothing that is secret.
        """
        return state.save(self)

    @classmethod
    def restore(cls, saved: bytes) -> Controller:
        """The controller that was saved, to continue exactly like it.

        Raises ``StateError`` for what another version saved, and for bytes that are no saved state.
        """
        return state.restore(saved, cls)

    # For whoever goes on from here on virtual time

    @property
    def codes(self) -> dict[str, Code]:
        """All codes, by id."""
        return self._belief.codes

    def model(self, key: str) -> Model | None:
        """The model of that key, if it is served."""
        model = self._belief.models.get(key)
        return None if model is None else model.model

    def seed_ns(self, code_id: str, kind: str, batch: int) -> int:
        """What a profile says that an INFER takes; 0 if none does."""
        profile = self._belief.estimator.profile(code_id, kind)
        return 0 if profile is None else profile.infer_ns.get(batch, 0)

    def workers(self) -> list[WorkerJoined]:
        """The workers as believed, hung ones too: devices, prepared codes and weights that are ready."""
        devices: dict[str, list[DeviceBelief]] = {}
        hung = [device for one in self._belief.hung.values() for device in one.devices]
        for device in (*self._belief.devices.values(), *hung):
            devices.setdefault(device.worker, []).append(device)
        return [
            WorkerJoined(
                worker=worker, devices=tuple([one.spec for one in each]),
                states=tuple([_state(one) for one in each]),
            )
            for worker, each in devices.items()
        ]  # fmt: skip

    def in_flight(self) -> list[Action]:
        """All actions without a result, in the order in which they were sent."""
        return [sent.action for sent in self._belief.sent.values()]

    def due_ns(self, request: Request) -> int:
        """When its execution has to end, as believed now, for its answer to be in time."""
        return self._belief.due_ns(request)

    def outlooks(self, request: Request, now_ns: int) -> list[Outlook]:
        """When a request could end on each device, as believed now, and what it would wait for."""
        return outlooks(self._belief, request, now_ns)

    def add_pages(self, pages: int, device: str = "") -> None:
        """Believe that a device, or each, has so many more pages for weights, from the next ``decide`` on."""
        for one in self._belief.devices.values():
            if device in {"", one.name}:
                one.add_pages(pages)
                self._scheduler.device_changed(one)
        for model in self._belief.models.values():
            if model.waiting:
                self._belief.mark_dirty(model)

    def use_policy(self, policy: str) -> None:
        """Go on with another policy; what waits and what is in flight stays.

        Raises ``ConfigError`` as ``policies.successor_for`` does; this controller is of no use then.
        """
        if policy == self.config.policy:
            return
        belief = self._belief
        promised = belief.keeps_promises
        scheduler = successor_for(belief, policy)
        self._scheduler = self._result_handler.scheduler = scheduler
        self._takeover.scheduler = self._fleet.scheduler = self._hangs.scheduler = scheduler
        self.config = belief.config
        self._counts = self.config.reject_infeasible and belief.measures
        for model in belief.models.values():
            model.pace_ns = 0
            if self._counts:
                self._admission.find_pace(model, belief.now_ns)
        if promised != belief.keeps_promises:
            self._promises.policy_changed()

    def accounts(self) -> dict[str, dict[str, int]]:
        """What tenants with a quota may use and were charged, by name."""
        return self._belief.tenants.snapshot()

    def check(self) -> None:
        """Assert every invariant of the state."""
        check_belief(self._belief)
        self._quarantine.check()
        self._hangs.check()
        self._takeover.check()
        self._scheduler.check()
        if self._reject:
            self._feasibility.check()
        self._promises.check()
        if not self._belief.keeps_deadlines:
            self._deadlines.check([one for one in self._belief.waiters.values() if one.state != SPENT])
