"""Workers that come, prepare codes and go: what that changes in belief. It sends nothing."""

from __future__ import annotations

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Sent
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.controller.inheritance import Inheritance
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.readiness import Teller
from clockwork_serve.controller.scheduler import Scheduler
from clockwork_serve.controller.settle import Settler
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import Code, CodeReady, WorkerJoined


class Fleet:
    """See the module."""

    def __init__(
        self,
        belief: Belief,
        scheduler: Scheduler,
        feasibility: Feasibility,
        quarantine: Quarantine,
        settler: Settler,
        *,
        inheritance: Inheritance,
        readiness: Teller,
    ) -> None:
        self._belief = belief
        self._scheduler = scheduler
        self._feasibility = feasibility
        self._quarantine = quarantine
        self._settler = settler
        self._inheritance = inheritance
        self._readiness = readiness
        self._reject = belief.config.reject_infeasible

    def joined(self, event: WorkerJoined, now_ns: int) -> None:
        """A worker is up, with what its states tell; one of its name is forgotten already."""
        belief = self._belief
        for spec in event.devices:
            assert spec.device not in belief.devices, f"device {spec.device} joined twice"
            device = DeviceBelief(spec, event.worker, belief.fresh(), belief.config)
            for code in belief.codes.values():
                device.expect(code)
            self.enter(device, now_ns)
            device.warm = not device.pending_codes
        self.changed()
        if event.states:
            self._inheritance.joined(event.states, now_ns)
            self._readiness.take_over()

    def enter(self, device: DeviceBelief, now_ns: int) -> None:
        """Believe a device there."""
        belief = self._belief
        self._quarantine.joined(device)
        belief.devices[device.name] = device
        if device.pending_codes:
            device.since_ns = now_ns
            belief.guard(device, now_ns)
        if self._reject:
            self._feasibility.device_joined(device)
        self._scheduler.device_changed(device)

    def changed(self) -> None:
        """Devices came: who waits may hope."""
        for model in self._belief.models.values():
            if model.waiting:
                self._belief.doubt_model(model)
        self._belief.forget_bases()
        self._readiness.may_change = True

    def expect(self, code: Code, now_ns: int) -> None:
        """All devices will prepare a code."""
        for device in self._all():
            device.expect(code)
            if device.up and device.pending_codes:
                device.since_ns = now_ns
                self._belief.guard(device, now_ns)

    def expect_again(self, code: Code, now_ns: int) -> None:
        """Devices that could not prepare a code will try again."""
        for device in self._all():
            if device.failed_codes.pop(code.code_id, None) is not None:
                device.expect(code)
                if device.up and device.pending_codes:
                    device.since_ns = now_ns
                    self._belief.guard(device, now_ns)

    def forget(self, code_id: str) -> None:
        """No device will hold a code."""
        for device in self._all():
            device.codes.pop(code_id, None)
            device.failed_codes.pop(code_id, None)
            device.pending_codes.discard(code_id)

    def prepared(self, device: DeviceBelief, event: CodeReady, now_ns: int) -> None:
        """A device prepared a code, or could not."""
        belief = self._belief
        if event.code_id not in belief.codes or self._quarantine.has(event):
            return
        device.pending_codes.discard(event.code_id)
        device.since_ns = now_ns
        if not event.ok:
            device.failed_codes[event.code_id] = event.message
        elif not belief.prepare(device, event.code_id):
            device.failed_codes[event.code_id] = f"there is no profile for devices of kind {device.spec.kind}"
        if not device.pending_codes:
            device.warm = True
            self._readiness.may_change = True
        if not device.up:
            return
        self._scheduler.device_changed(device)
        for model in belief.models.values():
            if model.waiting and model.code_id == event.code_id:
                belief.doubt_model(model)

    def leave(self, device: DeviceBelief) -> list[Sent]:
        """Believe a device gone, and its weights with it; what was in flight there."""
        belief = self._belief
        del belief.devices[device.name]
        device.up = False
        self._readiness.may_change = True
        found = [sent for sent in belief.sent.values() if sent.device is device]
        for sent in found:
            del belief.sent[sent.action.action_id]
        for residency in list(device.pages.holders()):
            belief.drop(residency)
        self._inheritance.leave(device)
        self._scheduler.device_lost(device)
        if device.guard.entry_ns != NEVER_NS:
            belief.timers.set(device.guard, NEVER_NS)
        if device.look.entry_ns != NEVER_NS:
            belief.timers.set(device.look, NEVER_NS)
        if self._reject:
            self._feasibility.device_lost(device)
        belief.forget_bases()
        return found

    def lost(self, worker: str, at_work: set[int]) -> None:
        """A worker is gone; ``at_work`` are the actions that it was at (empty: that is not known)."""
        belief = self._belief
        for device in [one for one in belief.devices.values() if one.worker == worker]:
            belief.estimator.forget_device(device.name)
            for sent in self.leave(device):
                self._settler.lost(sent, ran=not at_work or sent.action.action_id in at_work)

    def _all(self) -> list[DeviceBelief]:
        """Those of workers that hung, too."""
        hung = [device for one in self._belief.hung.values() for device in one.devices]
        return [*self._belief.devices.values(), *hung]
