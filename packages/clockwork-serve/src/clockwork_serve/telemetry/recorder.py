"""A listener that counts the events and effects of a driver's steps.

The driver tells it each step: the events observed and the effects decided at one instant. Every event costs a
constant time, whatever is served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from clockwork_serve.messages import (
    Answer,
    Cause,
    ControllerEffect,
    ControllerEvent,
    Delivered,
    DeviceState,
    GatewayLost,
    Infer,
    Lane,
    Load,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Quarantined,
    QuotasSet,
    Readiness,
    Reason,
    Request,
    Resident,
    Result,
    RetainWeights,
    Status,
    Unload,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry.counters import (
    BatchCounters,
    Counters,
    DeviceCounters,
    Exemplar,
    Histogram,
    ModelCounters,
    TenantCounters,
    bucket_of,
    encode,
    model_statistics,
    outcome_key,
)
from clockwork_serve.telemetry.spans import is_kept, trace_ids
from clockwork_serve.units import NS_PER_S


@dataclass(slots=True)
class _Open:
    """A request without an answer; ``sent`` while an INFER without a result holds it.

    Or with one: ``answer`` was given at ``answered_ns``, but not to the client yet, as far as is known here.
    """

    model: ModelCounters
    gateway: str
    arrival_ns: int
    deadline_ns: int
    trace: str = ""
    tenant: TenantCounters | None = None
    sent: bool = False
    answer: Answer | None = None
    answered_ns: int = 0


EXEMPLAR_NS: Final = NS_PER_S  # how long a bucket keeps its exemplar at least: one a scrape is enough
RECENT_NS: Final = 300 * NS_PER_S  # how much older than the newest one an exemplar may be, to be shown


class Recorder:
    """Adds up :class:`Counters` from the steps of a controller's driver.

    Where requests are traced, ``trace_share`` is the share of them: then latencies have exemplars.
    """

    def __init__(self, trace_share: float | None = None) -> None:
        self.counters = Counters()
        self._trace_share = trace_share
        self._open: dict[str, _Open] = {}  # all and only requests received and not counted by their end
        self._telling: set[str] = set()  # gateways that tell what becomes of answers
        self._early: dict[str, bool] = {}  # told before the step that answered: by request, whether in time
        self._actions: dict[int, Load | Unload | Infer] = {}  # all and only actions without a result
        self._found: dict[str, DeviceState] = {}  # by device, what a worker brought of an earlier controller
        self._brought: dict[int, Resident] = {}  # by action id, weights whose LOAD ran then
        self._lost_gateways: list[str] = []  # those of this step
        self._unknown = ModelCounters(name="", version="")  # of models that are not served: shown nowhere
        self._keys = {
            (outcome, reason): outcome_key(outcome, reason) for outcome in Outcome for reason in Reason
        }
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Request: self._on_request, Result: self._on_result, Answer: self._on_answer,
            Infer: self._on_infer, Load: self._on_load, Unload: self._on_unload,
            ModelAdded: self._on_model_added, ModelRemoved: self._on_model_removed,
            WorkerJoined: self._on_worker_joined, WorkerLost: self._on_worker_lost,
            GatewayLost: self._on_gateway_lost, Readiness: self._on_readiness,
            QuotasSet: self._on_quotas, Quarantined: self._on_quarantined, WorkerHung: self._on_worker_hung,
            RetainWeights: self._on_keep,
        }  # fmt: skip

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Count one step; events come before effects, as the driver saw them."""
        handlers = self._handlers
        for event in events:
            if (handler := handlers.get(type(event))) is not None:
                handler(event, now_ns)
        for effect in effects:
            if (handler := handlers.get(type(effect))) is not None:
                handler(effect, now_ns)
        if self._lost_gateways:
            self._close_orphans(now_ns)
        self._early.clear()

    def encoded(self, accounts: Mapping[str, Mapping[str, int]] | None = None) -> bytes:
        """The counters as JSON, for another process to render, with the controller's accounts of tenants."""
        for name, account in (accounts or {}).items():
            tenant = self.counters.tenants.setdefault(name, TenantCounters())
            tenant.device_ns, tenant.device_ns_per_s = account["device_ns"], account["device_ns_per_s"]
            tenant.loaded_bytes = account["loaded_bytes"]
            tenant.loaded_bytes_per_s = account["loaded_bytes_per_s"]
        self._forget_old_exemplars()
        return encode(self.counters)

    def statistics(self, model: str | None = None, wall_offset_ns: int | None = None) -> bytes:
        """Triton's ``{"model_stats": [...]}`` as JSON, of one model key, name, or all.

        ``wall_offset_ns`` is wall clock less the controller's axis; None: as on this host now.
        """
        if wall_offset_ns is None:
            wall_offset_ns = time.time_ns() - time.monotonic_ns()
        return msgspec.json.encode(model_statistics(self.counters, model, wall_offset_ns))

    # Requests

    def _on_request(self, request: Request, now_ns: int) -> None:
        counters = self.counters
        model = counters.models.get(request.model, self._unknown)
        self._open[request.request_id] = _Open(
            model, request.gateway, request.arrival_ns, request.deadline_ns, request.trace
        )
        if counters.tenants and (tenant := counters.tenants.get(request.tenant)) is not None:
            self._open[request.request_id].tenant = tenant
            tenant.received += 1
        counters.received += 1
        counters.open += 1
        counters.queued += 1
        model.received += 1
        model.open += 1
        model.queued += 1

    def _on_answer(self, answer: Answer, now_ns: int) -> None:
        opened = self._open.get(answer.request_id)
        if opened is None or opened.answer is not None:
            self.counters.unmatched += 1
        elif opened.gateway not in self._telling:
            self._settle(opened, answer, now_ns)
        else:
            opened.answer, opened.answered_ns = answer, now_ns
            self._is_sent(opened)
            if (in_time := self._early.pop(answer.request_id, None)) is not None:
                self._count_delivered(opened, answer, now_ns, in_time=in_time)

    def on_delivered(self, gateway: str, delivered: Delivered, now_ns: int) -> None:
        """A gateway tells what became of answers; from its first word on, they count when it does."""
        self._telling.add(gateway)
        for ids, in_time in ((delivered.in_time, True), (delivered.late, False)):
            for request_id in ids:
                opened = self._open.get(request_id)
                if opened is None or opened.answer is None:
                    self._early[request_id] = in_time
                else:
                    self._count_delivered(opened, opened.answer, now_ns, in_time=in_time)

    def _count_delivered(self, opened: _Open, answer: Answer, now_ns: int, *, in_time: bool) -> None:
        if in_time:
            self._settle(opened, answer, opened.answered_ns)
            return
        reason = Reason.LATE if answer.outcome is Outcome.OK else Reason.NONE
        self._settle(opened, msgspec.structs.replace(answer, outcome=Outcome.EXPIRED, reason=reason), now_ns)

    def _is_sent(self, opened: _Open) -> None:
        """A request is over: it waits for no device any more."""
        if not opened.sent:
            opened.sent = True
            self.counters.queued -= 1
            opened.model.queued -= 1

    def _settle(self, opened: _Open, answer: Answer, now_ns: int) -> None:
        del self._open[answer.request_id]
        if answer.promised:
            self._promised(opened.model, answer, late=now_ns > opened.deadline_ns)
        late = answer.reason is Reason.LATE or (answer.outcome is Outcome.OK and now_ns > opened.deadline_ns)
        self._close(opened, answer.outcome, answer.reason, now_ns, late=late)
        if self._trace_share is not None:
            self._note_exemplar(opened, answer, now_ns, self._trace_share)
        if answer.outcome is not Outcome.OK:
            return
        self.counters.queue.add(answer.queue_ns)
        self.counters.execution.add(answer.exec_ns)
        model = opened.model
        model.queue.add(answer.queue_ns)
        model.cold_starts += answer.cold
        model.last_ns = now_ns

    def _note_exemplar(self, opened: _Open, answer: Answer, now_ns: int, share: float) -> None:
        """Remember a request whose trace is kept, if its bucket has had no other for a moment."""
        duration_ns = now_ns - opened.arrival_ns
        found = self.counters.exemplars.setdefault(str(answer.outcome), {})
        bucket = bucket_of(duration_ns)
        known = found.get(bucket)
        if known is not None and now_ns - known.ended_ns < EXEMPLAR_NS:
            return
        ids = trace_ids(answer.request_id, opened.trace)
        if is_kept(ids, answer, share):
            found[bucket] = Exemplar(ids.trace_id.hex(), duration_ns, now_ns)

    def _forget_old_exemplars(self) -> None:
        exemplars = self.counters.exemplars
        latest_ns = max((one.ended_ns for found in exemplars.values() for one in found.values()), default=0)
        for outcome, found in exemplars.items():
            recent = {at: one for at, one in found.items() if latest_ns - one.ended_ns <= RECENT_NS}
            exemplars[outcome] = recent

    def _promised(self, model: ModelCounters, answer: Answer, *, late: bool) -> None:
        """Count a promise that is over."""
        if answer.outcome is Outcome.CANCELLED:
            return
        model.promises += 1
        cause = answer.cause
        if cause is Cause.NONE and (late or answer.outcome is not Outcome.OK):
            cause = Cause.DELIVERY_LATE
        if cause is not Cause.NONE:
            model.broken[cause] = model.broken.get(cause, 0) + 1

    def _close(self, opened: _Open, outcome: Outcome, reason: Reason, now_ns: int, *, late: bool) -> None:
        counters, model = self.counters, opened.model
        key = self._keys[outcome, reason]
        latency_ns = now_ns - opened.arrival_ns
        counters.outcomes[key] = counters.outcomes.get(key, 0) + 1
        counters.late += late
        counters.open -= 1
        counters.queued -= not opened.sent
        histogram = counters.latency.get(outcome)
        if histogram is None:
            histogram = counters.latency.setdefault(str(outcome), Histogram())
        histogram.add(latency_ns)
        if opened.tenant is not None:
            opened.tenant.outcomes[key] = opened.tenant.outcomes.get(key, 0) + 1
            opened.tenant.late += late
        model.outcomes[key] = model.outcomes.get(key, 0) + 1
        model.late += late
        model.open -= 1
        model.queued -= not opened.sent
        (model.success if outcome is Outcome.OK else model.fail).add(latency_ns)

    def _mark(self, action: Infer, *, sent: bool) -> None:
        """Note for all requests of an INFER that are still open whether they are in it."""
        for call in action.calls:
            opened = self._open.get(call.request_id)
            if opened is None or opened.sent is sent or opened.answer is not None:
                continue
            opened.sent = sent
            step = -1 if sent else 1
            self.counters.queued += step
            opened.model.queued += step

    # Actions and their results

    def _on_infer(self, action: Infer, now_ns: int) -> None:
        self._actions[action.action_id] = action
        self._mark(action, sent=True)

    def _on_load(self, action: Load, now_ns: int) -> None:
        self._actions[action.action_id] = action
        if (device := self.counters.devices.get(action.device)) is not None:
            device.pages_used += action.extent.count

    def _on_unload(self, action: Unload, now_ns: int) -> None:
        self._actions[action.action_id] = action
        if (device := self.counters.devices.get(action.device)) is not None:
            device.pages_used -= action.extent.count
        if (model := self.counters.models.get(action.model)) is not None:
            model.resident.pop(action.device, None)

    def _on_result(self, result: Result, now_ns: int) -> None:
        action = self._actions.pop(result.action_id, None)
        device = self.counters.devices.get(result.device)
        if action is None or device is None:
            self._on_late_result(result)
            return
        kind = "infer" if type(action) is Infer else "load" if type(action) is Load else "unload"
        key = f"{kind}:{result.status}"
        device.actions[key] = device.actions.get(key, 0) + 1
        if type(action) is Infer:
            self._mark(action, sent=False)
            device.exec_busy_ns += result.lane_ns
            if result.status is Status.OK:
                self._count_execution(action, result)
        else:
            device.load_busy_ns += result.lane_ns
            if type(action) is Load:
                self._count_load(action, result, device)

    def _count_execution(self, action: Infer, result: Result) -> None:
        counters, calls = self.counters, len(action.calls)
        counters.batches[action.batch] = counters.batches.get(action.batch, 0) + 1
        self._count_error("infer", result.lane_ns - action.expected_ns)
        model = counters.models.get(action.model, self._unknown)
        for call in action.calls:
            model.rows += call.rows
        model.compute_input.add(result.input_ns, calls)
        model.compute_infer.add(result.run_ns, calls)
        model.compute_output.add(result.output_ns, calls)
        batch = model.batches.get(action.batch)
        if batch is None:
            batch = model.batches[action.batch] = BatchCounters()
        batch.executions += 1
        model.overruns += result.lane_ns > action.expected_ns
        batch.input_ns += result.input_ns
        batch.run_ns += result.run_ns
        batch.output_ns += result.output_ns

    def _count_load(self, action: Load, result: Result, device: DeviceCounters) -> None:
        if result.status is not Status.OK:
            device.pages_used -= action.extent.count
            return
        self.counters.load.add(result.lane_ns)
        self._count_error("load", result.lane_ns - action.expected_ns)
        if (model := self.counters.models.get(action.model)) is not None:
            model.loads += 1
            model.resident[action.device] = action.weights.size

    def _count_error(self, kind: str, error_ns: int) -> None:
        errors = self.counters.prediction[kind]
        if error_ns > 0:
            errors.under.add(error_ns)
        else:
            errors.over.add(-error_ns)

    # Comings and goings

    def _on_model_added(self, event: ModelAdded, now_ns: int) -> None:
        model = event.model
        if model.key not in self.counters.models:
            self.counters.models[model.key] = ModelCounters(name=model.name, version=model.version)

    def _on_quotas(self, event: QuotasSet, now_ns: int) -> None:
        known = self.counters.tenants
        names = [quota.tenant for quota in event.quotas]
        self.counters.tenants = {name: known.get(name) or TenantCounters() for name in names}

    def _on_model_removed(self, event: ModelRemoved, now_ns: int) -> None:
        self.counters.models.pop(event.model, None)

    def _on_worker_joined(self, event: WorkerJoined, now_ns: int) -> None:
        for spec in event.devices:
            known = self.counters.devices.setdefault(spec.device, DeviceCounters(worker=event.worker))
            known.worker, known.kind, known.up = event.worker, spec.kind, True
            known.pages, known.page_bytes, known.pages_used = spec.pages, spec.page_bytes, 0
        self._found.update((state.device, state) for state in event.states)

    def _on_keep(self, effect: RetainWeights, now_ns: int) -> None:
        """Of what a worker brought, this stays."""
        state = self._found.pop(effect.device, None)
        device = self.counters.devices.get(effect.device)
        if state is None or device is None:
            return
        loads = {one.version: one.action_id for one in state.running if one.lane is Lane.LOAD}
        for weights in state.weights:
            if weights.version in effect.versions:
                device.pages_used += weights.extent.count
                if weights.ready:
                    self._is_resident(effect.device, weights)
                else:
                    self._brought[loads[weights.version]] = weights

    def _is_resident(self, device: str, weights: Resident) -> None:
        if (model := self.counters.models.get(weights.model)) is not None:
            model.resident[device] = weights.weights.size

    def _on_late_result(self, result: Result) -> None:
        """Of what this controller did not send."""
        weights = self._brought.pop(result.action_id, None)
        if weights is None:
            return
        if result.status is Status.OK:
            self._is_resident(result.device, weights)
        elif (device := self.counters.devices.get(result.device)) is not None:
            device.pages_used -= weights.extent.count

    def _on_worker_lost(self, event: WorkerLost, now_ns: int) -> None:
        self.counters.workers_lost += 1
        gone = {name for name, device in self.counters.devices.items() if device.worker == event.worker}
        for name in gone:
            self.counters.devices[name].up = False
            self.counters.devices[name].pages_used = 0
        for action in [action for action in self._actions.values() if action.device in gone]:
            del self._actions[action.action_id]
            self.counters.devices[action.device].lost_actions += 1
            if type(action) is Infer:
                self._mark(action, sent=False)
        for model in self.counters.models.values():
            for name in gone:
                model.resident.pop(name, None)

    def _on_gateway_lost(self, event: GatewayLost, now_ns: int) -> None:
        self.counters.gateways_lost += 1
        self._lost_gateways.append(event.gateway)

    def _close_orphans(self, now_ns: int) -> None:
        """Requests of a lost gateway that got no answer, for there was nobody to tell, are cancelled."""
        lost = set(self._lost_gateways)
        self._telling -= lost
        self._lost_gateways.clear()
        for request_id in [key for key, opened in self._open.items() if opened.gateway in lost]:
            opened = self._open[request_id]
            if opened.answer is not None and opened.answer.outcome is not Outcome.OK:
                self._settle(opened, opened.answer, opened.answered_ns)
            else:
                # Whether a good answer still reached its client, nobody knows.
                del self._open[request_id]
                self._close(opened, Outcome.CANCELLED, Reason.NONE, now_ns, late=False)

    def _on_quarantined(self, effect: Quarantined, now_ns: int) -> None:
        self.counters.quarantines += bool(effect.why)
        if (model := self.counters.models.get(effect.model)) is not None:
            model.quarantined = bool(effect.why)

    def _on_worker_hung(self, effect: WorkerHung, now_ns: int) -> None:
        self.counters.workers_ended += effect.end
        if effect.end:
            return
        self.counters.workers_hung += bool(effect.why)
        for device in self.counters.devices.values():
            if device.worker == effect.worker:
                device.up = not effect.why

    def _on_readiness(self, effect: Readiness, now_ns: int) -> None:
        self.counters.ready = effect.ready
