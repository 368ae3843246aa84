"""Devices, and how much time plans leave before deadlines, by the delays lately measured on them."""

from __future__ import annotations

from clockwork_serve.controller.cluster import DeviceBelief, Sent
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.delays import LASTS_NS
from clockwork_serve.controller.estimator import Estimator
from clockwork_serve.controller.queues import ServedModel
from clockwork_serve.units import NS_PER_MS


class Measured:
    """The part of belief that delays correct; see the module."""

    def __init__(self, config: ControllerConfig) -> None:
        self.slack_ns = self._usual_slack_ns = config.slack_ns
        """Plans end so long before the deadline; a policy may correct it by what is measured."""
        self.measures = False
        """The policy plans with what delays are measured, and wants to know."""
        self._slack_until_ns = 0
        self.estimator = Estimator(config.estimate_window, config.estimate_quantile)
        self.devices: dict[str, DeviceBelief] = {}
        """Devices of all workers that are up."""
        self._able: dict[str, int] = {}
        """By backend: how many of them run its codes, once asked for."""

    def able(self, backend: str) -> int:
        """How many devices run codes of a backend."""
        count = self._able.get(backend)
        if count is None:
            count = sum([device.spec.runs(backend) for device in self.devices.values()])
            self._able[backend] = count
        return count

    def measure(self, sent: Sent, started_ns: int, now_ns: int) -> None:
        """The result of an INFER is heard: correct the delays to plan with (before its lane hears of it)."""
        device = sent.device
        reach_ns = started_ns - sent.idle_ns if sent.idle_ns >= 0 else -1
        delays = device.delays
        before_ns = delays.slack_ns
        delays.heard(now_ns - device.exec.head_end_ns, reach_ns, now_ns)
        device.exec.network_ns = delays.reach_ns
        self._slack_until_ns = now_ns + LASTS_NS
        if delays.slack_ns > self.slack_ns:
            self.slack_ns = delays.slack_ns
        elif delays.slack_ns < before_ns >= self.slack_ns:
            self._find_slack()

    def _find_slack(self) -> None:
        """The longest of any device's."""
        slacks_ns = [device.delays.slack_ns for device in self.devices.values()]
        self.slack_ns = max(slacks_ns, default=self._usual_slack_ns)

    def _forget_delays(self) -> None:
        """Nothing was measured for a while."""
        for device in self.devices.values():
            device.delays.forget()
            device.exec.network_ns = device.delays.reach_ns
        self._find_slack()

    def cost_ns(self, model: ServedModel, rows: int) -> int:
        """What a request of so many rows is expected to take of a device if it runs alone."""
        base_ns = model.base_ns or self._base_ns(model)
        if rows == 1:
            return base_ns
        for device in self.devices.values():
            profile = self.estimator.profile(model.code_id, device.spec.kind)
            if profile is not None:
                return min([ns for size, ns in profile.infer_ns.items() if size >= rows], default=base_ns)
        return base_ns

    def _base_ns(self, model: ServedModel) -> int:
        """Batch-1 time of a model, by the first profile known."""
        for device in self.devices.values():
            profile = self.estimator.profile(model.code_id, device.spec.kind)
            if profile is not None:
                model.base_ns = profile.infer_ns[1]
                return model.base_ns
        return NS_PER_MS
