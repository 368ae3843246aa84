"""Workers that join or are lost, adoption of a worker's state after a failover, and readiness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from clockwork_serve.controller.belief import AdoptedAction, Belief, Sent
from clockwork_serve.controller.cluster import DeviceBelief, Residency, ServedModel
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.controller.life import FAILED, READY, UNLOAD
from clockwork_serve.controller.policies.base import Scheduler
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.results import ResultHandler
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import (
    Code,
    CodeReady,
    DeviceState,
    Held,
    Lane,
    MeasuredDurations,
    Readiness,
    Resident,
    Result,
    RetainWeights,
    Running,
    Status,
    Unservable,
    WeightsReady,
    WorkerJoined,
    WorkerLost,
)

# ------------------------------------------------------------
# Failover: adoption of the state of a worker that had another controller before (codes, weights, measured
# durations, running actions).
#
# What is loaded or prepared stays so. Actions of the earlier controller that still run keep their lanes and
# weights busy until their results arrive, and answer no request: gateways send those requests again. Weights
# of models that are not served are dropped: the worker is first sent the list of those to retain.


GOOD: Final = Status.OK


class Takeover(Record):
    """Adopts the state of workers, and tracks the adopted actions until their results arrive."""

    def __init__(self, belief: Belief, scheduler: Scheduler, feasibility: Feasibility) -> None:
        self._belief = belief
        self.scheduler = scheduler
        self._feasibility = feasibility
        self.running: dict[tuple[str, int], AdoptedAction] = {}
        """All and only adopted actions on devices in ``Belief.devices``, by device and action id."""
        self.retained: list[RetainWeights] = []
        """To be sent in the next decision."""

    def adopt(self, states: Iterable[DeviceState], now_ns: int) -> None:
        """Adopt the state of devices that have just been added."""
        for state in states:
            device = self._belief.devices[state.device]
            self._adopt_device(device, state, now_ns)
            device.warm = not device.pending_codes

    def _adopt_device(self, device: DeviceBelief, state: DeviceState, now_ns: int) -> None:
        for code_id in state.codes:
            if code_id in device.pending_codes and not self._belief.prepare(device, code_id):
                device.pending_codes.discard(code_id)
        self._learn(device, state.measured, now_ns)
        self.scheduler.device_changed(device)
        loading = {one.version: one for one in state.running if one.lane is Lane.LOAD}
        found = [self._adopt_weights(device, one, loading) for one in state.weights]
        kept = {residency.version: residency for residency in found if residency is not None}
        sizes = {one.version: one.weights.size for one in state.weights if one.version in loading}
        for running in state.running:
            residency = kept.get(running.version)
            adopted = AdoptedAction(device, running, residency, sizes.get(running.version, 0))
            self._adopt_action(running, adopted, now_ns)
        self.retained.append(RetainWeights(device=device.name, versions=tuple(kept)))
        self._belief.has_pending = True
        for residency in kept.values():
            if residency.version not in loading:
                self._ready(residency)

    def _learn(self, device: DeviceBelief, measured: tuple[MeasuredDurations, ...], now_ns: int) -> None:
        sizes = {model.code_id: model.model.weights.size for model in self._belief.models.values()}
        for one in measured:
            code = device.codes.get(one.code_id)
            if code is None or one.code_id not in sizes:
                continue
            timings = code.timings
            samples = (
                timings.infer(one.batch, one.signature) if one.batch else timings.load(sizes[one.code_id])
            )
            for lasted_ns in one.lasted_ns:
                samples.learn(lasted_ns, now_ns)

    def _adopt_weights(
        self, device: DeviceBelief, found: Resident, loading: dict[int, Running]
    ) -> Residency | None:
        """Adopt weights if they are those of a served model; returns None if they are to be dropped."""
        model, code = self._belief.models.get(found.model), device.codes.get(found.code_id)
        if model is None or model.quarantined or code is None or model.code_id != found.code_id:
            return None
        if device.name in model.residencies:
            return None
        wanted = model.model.weights
        if (wanted.weights_id, wanted.size) != (found.weights.weights_id, found.weights.size):
            return None
        if not found.ready and found.version not in loading:
            return None
        residency = Residency(model, device, code, found.extent, found.version)
        device.hold(residency)
        model.add_residency(residency)
        self._belief.mark_dirty(model)
        return residency

    def _adopt_action(self, running: Running, one: AdoptedAction, now_ns: int) -> None:
        """Adopt a running action: its lane is busy until its result arrives."""
        device, residency = one.device, one.residency
        lane = device.load if one.lane is Lane.LOAD else device.exec
        self._belief.arm_checks(device, now_ns)
        lane.send(running.action_id, running.left_ns, now_ns)
        if lane is device.load:
            self._belief.watch_load(device, now_ns)
        if residency is not None:
            if one.lane is Lane.LOAD:
                residency.ready_ns = lane.free_ns
            else:
                residency.in_flight += 1
        self.running[device.name, running.action_id] = one

    def _ready(self, residency: Residency) -> None:
        self._belief.loaded(residency)
        self.scheduler.loaded(residency)

    def observe_result(self, result: Result, now_ns: int) -> None:
        """Handle the result of an adopted action; any other result is ignored."""
        one = self.running.pop((result.device, result.action_id), None)
        if one is None:
            return
        device, residency = one.device, one.residency
        if one.lane is Lane.LOAD:
            device.load.end(result.action_id, result.ended_ns)
            self._belief.watch_load(device, now_ns)
            if self._belief.config.reject_infeasible:
                self._feasibility.load_ended(device, now_ns)
            if residency is not None:
                self._loaded(residency, good=result.status is GOOD)
            self.scheduler.load_changed(device)
            return
        device.exec.end(result.action_id, result.ended_ns)
        if residency is not None:
            residency.in_flight -= 1
            residency.loosen()
            self._belief.has_pending = True  # its model may have been removed, and its weights wait for this
        self.scheduler.exec_changed(device)

    def correct(self, device: DeviceBelief, held: Held, now_ns: int) -> None:
        """Have belief agree with what a worker holds on a device, as it says with an action it refused.

        Weights that it lacks are dropped, unless INFERs for them are in flight: each of those is refused,
        too. Weights that it has, and that are not believed to be there, are unloaded by the worker.
        """
        belief, there = self._belief, set(held.versions)
        kept = [one.version for one in device.pages.holders()]
        for residency in device.pages.holders():
            if residency.state == READY and not residency.in_flight and residency.version not in there:
                residency.step(UNLOAD)
                belief.drop(residency)
        if not there.issubset(kept):
            kept += [sent.action.version for sent in belief.sent.values() if sent.device is device]
            if not there.issubset(kept):
                self.retained.append(RetainWeights(device=device.name, versions=tuple(kept)))
                belief.has_pending = True
        for code_id in held.unprepared:
            if device.codes.pop(code_id, None) is not None:
                device.pending_codes.add(code_id)
                device.since_ns = now_ns
                belief.arm_checks(device, now_ns)

    def _loaded(self, residency: Residency, *, good: bool) -> None:
        if good:
            self._ready(residency)
            self._belief.has_pending = True
            return
        residency.step(FAILED)
        self._belief.drop(residency)
        self._belief.recheck_model(residency.model)

    def release_device(self, device: DeviceBelief) -> dict[tuple[str, int], AdoptedAction]:
        """Forget the adopted actions of a device that is lost or whose worker hung; returns them."""
        found = {key: one for key, one in self.running.items() if one.device is device}
        for key in found:
            del self.running[key]
        self.retained = [keep for keep in self.retained if keep.device != device.name]
        return found

    def running_of(self, event: WorkerLost) -> set[int]:
        """Ids of the adopted actions that a lost worker was running; their models are not suspects."""
        running = event.running or ()
        return {
            action_id
            for (_, action_id), one in self.running.items()
            if action_id in running and one.device.worker == event.worker
        }

    def check(self) -> None:
        """Assert the invariants."""
        for (name, _), one in self.running.items():
            assert self._belief.devices[name] is one.device
            if one.residency is not None and one.lane is Lane.EXEC:
                assert one.residency.state == READY and one.residency.in_flight > 0


# ------------------------------------------------------------
# Readiness of the server, and models that no device can ever run.


class ReadinessTracker(Record):
    """Sends ``Readiness`` whenever it changed, and ``Unservable`` models."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self.may_change = True
        """Something that readiness depends on changed: ``update`` is to be called."""
        self._was_ready = False
        self._last_sent: Readiness | None = None
        self._unproven: dict[str, ServedModel] = {}
        """By key: models that no device so far can run. A device that can, and is lost, may come back."""

    def model_added(self, model: ServedModel) -> None:
        """A model is served: it is to be seen whether a device can run it."""
        self._unproven[model.key] = model
        self.may_change = True

    def model_removed(self, model: ServedModel) -> None:
        """A model is no longer served."""
        if self._unproven.pop(model.key, None) is not None and model.unservable:
            self._belief.effects.append(Unservable(model=model.key))

    def take_over(self) -> None:
        """After a failover, the server was ready before."""
        self._was_ready = True

    def update(self, *, draining: bool) -> None:
        """Send the readiness if it changed; once the server was ready, one warm device is enough."""
        self.may_change = False
        devices = self._belief.devices.values()
        # A device stops counting long before its worker can be declared hung.
        unresponsive = [device.name for device in devices if device.warm and not device.stall_timer.serves]
        warm = sum(device.warm for device in devices) - len(unresponsive)
        wanted = 1 if self._was_ready else self._belief.config.expected_devices
        if draining:
            readiness = Readiness(ready=False, why="draining")
        elif warm >= wanted:
            readiness, self._was_ready = Readiness(ready=True), True
        else:
            pending = sum(len(device.pending_codes) for device in devices)
            why = f"{warm} of {wanted} devices are warm"
            if pending:
                why = f"{why}; {pending} codes are being prepared"
            late = [f"{name} does not answer" for name in unresponsive]
            hung = [f"{one.name} hung: {one.why}" for one in self._belief.hung.values()]
            readiness = Readiness(ready=False, why="; ".join([why, *late, *hung]))
        self._find_unservable()
        if self._last_sent is None or readiness.ready != self._last_sent.ready:
            self._last_sent = readiness
            self._belief.effects.append(readiness)

    def _find_unservable(self) -> None:
        """Send what is now known of models that no device could run before."""
        devices = list(self._belief.devices.values())
        if not self._was_ready or len(devices) < max(1, self._belief.config.expected_devices):
            return  # one that is still to come, or to come back after a failover, may run it
        for key, model in list(self._unproven.items()):
            whys = [self._belief.why_never(device, model) for device in devices]
            why = ""
            if "" in whys:
                del self._unproven[key]
            else:
                able = [device.spec.runs(model.code.backend) for device in devices]
                why = f"no device can run it: {whys[able.index(True) if True in able else 0]}"
            if why != model.unservable:
                model.unservable = why
                self._belief.effects.append(Unservable(model=key, why=why))


# ------------------------------------------------------------
# Workers that join, prepare codes, and are lost.


class Fleet(Record):
    """Adds and removes devices and codes in belief."""

    def __init__(
        self,
        belief: Belief,
        scheduler: Scheduler,
        feasibility: Feasibility,
        quarantine: Quarantine,
        result_handler: ResultHandler,
        *,
        takeover: Takeover,
        readiness: ReadinessTracker,
    ) -> None:
        self._belief = belief
        self.scheduler = scheduler
        self._feasibility = feasibility
        self._quarantine = quarantine
        self._result_handler = result_handler
        self._takeover = takeover
        self._readiness = readiness
        self._reject = belief.config.reject_infeasible

    def joined(self, event: WorkerJoined, now_ns: int) -> None:
        """Add a worker's devices and adopt their state; an earlier worker of that name is removed already."""
        belief = self._belief
        for spec in event.devices:
            assert spec.device not in belief.devices, f"device {spec.device} joined twice"
            device = DeviceBelief(spec, event.worker, belief.next_id(), belief.config)
            for code in belief.codes.values():
                device.add_code(code)
            self.add_device(device, now_ns)
            device.warm = not device.pending_codes
        self.changed()
        if event.states:
            self._takeover.adopt(event.states, now_ns)
            self._readiness.take_over()

    def add_device(self, device: DeviceBelief, now_ns: int) -> None:
        """Add a device to belief, and arm its checks."""
        belief = self._belief
        self._quarantine.joined(device)
        belief.devices[device.name] = device
        if device.pending_codes:
            device.since_ns = now_ns
            belief.arm_checks(device, now_ns)
        if self._reject:
            self._feasibility.device_joined(device)
        self.scheduler.device_changed(device)

    def changed(self) -> None:
        """Devices were added: have all waiting requests rechecked."""
        for model in self._belief.models.values():
            if model.waiting:
                self._belief.recheck_model(model)
        self._belief.reset_bases()
        self._readiness.may_change = True

    def prepare_code(self, code: Code, now_ns: int) -> None:
        """A code was added: all devices will prepare it."""
        for device in self._all():
            self._add_code(device, code, now_ns)

    def retry_code(self, code: Code, now_ns: int) -> None:
        """A code was remade: devices that failed to prepare it will try again."""
        for device in self._all():
            if device.failed_codes.pop(code.code_id, None) is not None:
                self._add_code(device, code, now_ns)

    def _add_code(self, device: DeviceBelief, code: Code, now_ns: int) -> None:
        device.add_code(code)
        if device.up and device.pending_codes:
            device.since_ns = now_ns
            self._belief.arm_checks(device, now_ns)

    def forget(self, code_id: str) -> None:
        """A code was removed: forget it on all devices."""
        for device in self._all():
            device.codes.pop(code_id, None)
            device.failed_codes.pop(code_id, None)
            device.pending_codes.discard(code_id)

    def prepared(self, device: DeviceBelief, event: CodeReady, now_ns: int) -> None:
        """Record that a device prepared a code, or failed to."""
        belief = self._belief
        if event.code_id not in belief.codes or self._quarantine.code_prepared(event):
            return
        device.pending_codes.discard(event.code_id)
        device.since_ns = now_ns
        if not event.ok:
            device.failed_codes[event.code_id] = event.message
        elif why := belief.prepare(device, event.code_id):
            device.failed_codes[event.code_id] = why
        if not device.pending_codes:
            device.warm = True
            self._readiness.may_change = True
        if not device.up:
            return
        self.scheduler.device_changed(device)
        for model in belief.models.values():
            if model.waiting and model.code_id == event.code_id:
                belief.recheck_model(model)

    def weights_found(self, device: DeviceBelief, event: WeightsReady) -> None:
        """Record that the worker of a device has a valid file of a model's weights, or that it has none."""
        weights_id = event.weights_id
        models = [one for one in self._belief.models.values() if one.model.weights.weights_id == weights_id]
        if event.ok:
            device.failed_weights.pop(weights_id, None)
        elif models:
            device.failed_weights[weights_id] = event.message
        if not device.up:
            return
        self.scheduler.device_changed(device)
        for model in models:
            if model.waiting:
                self._belief.recheck_model(model)

    def remove_device(self, device: DeviceBelief) -> list[Sent]:
        """Remove a device and its weights from belief; returns the actions in flight there."""
        belief = self._belief
        del belief.devices[device.name]
        device.up = False
        self._readiness.may_change = True
        found = [sent for sent in belief.sent.values() if sent.device is device]
        for sent in found:
            del belief.sent[sent.action.action_id]
        for residency in list(device.pages.holders()):
            belief.drop(residency)
        self._takeover.release_device(device)
        self.scheduler.device_lost(device)
        for timer in (device.hang_timer, device.stall_timer, device.load_stall_timer):
            if timer.entry_ns != NEVER_NS:
                belief.timers.set(timer, NEVER_NS)
        if self._reject:
            self._feasibility.device_lost(device)
        belief.reset_bases()
        return found

    def worker_lost(self, worker: str, running: set[int]) -> None:
        """Remove a lost worker's devices; ``running`` are the actions it was running (empty: unknown)."""
        belief = self._belief
        for device in [one for one in belief.devices.values() if one.worker == worker]:
            belief.estimator.forget_device(device.name)
            for sent in self.remove_device(device):
                self._result_handler.action_lost(sent, ran=not running or sent.action.action_id in running)

    def _all(self) -> list[DeviceBelief]:
        """All devices, those of hung workers included."""
        hung = [device for one in self._belief.hung.values() for device in one.devices]
        return [*self._belief.devices.values(), *hung]
