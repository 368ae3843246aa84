"""All that the controller believes, and the moves that change it; choices are made elsewhere.

A move that sends an action or an answer also appends it to ``effects``, so belief and deed cannot differ.
"""

from __future__ import annotations

from clockwork_serve.controller.cluster import CodeOnDevice, DeviceBelief, Residency, Sent
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.estimator import Estimator, Samples
from clockwork_serve.controller.life import RequestState, RequestStep, WeightsState, WeightsStep
from clockwork_serve.controller.queues import Queue, ServedModel, Waiter
from clockwork_serve.messages import (
    Answer,
    Call,
    Code,
    ControllerEffect,
    Extent,
    Infer,
    Load,
    Outcome,
    Profile,
    Reason,
    Release,
    Request,
    Unload,
    Window,
)
from clockwork_serve.units import NS_PER_MS

FAR_NS = 1 << 62
"""A time that never comes."""


class Choice:
    """A batch to send: ``count`` requests from place ``first`` of a queue, run at size ``batch``.

    ``urgency_ns`` is when it must start at the latest.
    """

    __slots__ = ("batch", "count", "first", "urgency_ns")

    def __init__(self, first: int, count: int, batch: int, urgency_ns: int) -> None:
        self.first = first
        self.count = count
        self.batch = batch
        self.urgency_ns = urgency_ns


class Belief:
    """Models, devices, requests and actions in flight."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.estimator = Estimator(config.estimate_window, config.estimate_quantile)
        self.devices: dict[str, DeviceBelief] = {}
        """Devices of all workers that are up."""
        self.codes: dict[str, Code] = {}
        self.models: dict[str, ServedModel] = {}
        """All and only models that are served."""
        self.waiters: dict[str, Waiter] = {}
        """All and only requests that are not ANSWERED, by id."""
        self.sent: dict[int, Sent] = {}
        """All and only actions in flight, by id."""
        self.effects: list[ControllerEffect] = []
        """Decided and not yet handed to the driver."""
        self.moved: dict[str, None] = {}
        """Devices whose lanes were given work since the rejecting layer last looked."""
        self._counter = 0

    def fresh(self) -> int:
        """A number never given before: ids, versions, orders."""
        self._counter += 1
        return self._counter

    # Estimates

    def infer_samples(self, device: DeviceBelief, queue: Queue, batch: int) -> Samples:
        """The samples of an INFER of this batch on a device."""
        spec = device.spec
        code_id = queue.model.code.code_id
        return self.estimator.infer_samples(spec.device, spec.kind, code_id, batch, queue.signature)

    def infer_ns(self, device: DeviceBelief, queue: Queue, batch: int) -> int:
        """How long an INFER of this batch will take on a device."""
        return self.infer_samples(device, queue, batch).estimate_ns

    def load_samples(self, device: DeviceBelief, model: ServedModel) -> Samples:
        """The samples of a LOAD of this model on a device."""
        spec = device.spec
        size = model.model.weights.size
        return self.estimator.load_samples(spec.device, spec.kind, model.code.code_id, size)

    def prepare(self, device: DeviceBelief, code_id: str) -> bool:
        """A device is ready for a code: see which batch sizes fit and pay. False if no profile is known."""
        profile = self.estimator.profile(code_id, device.spec.kind)
        if profile is None:
            return False
        sizes = _useful_sizes(self.codes[code_id], profile, device, self.config)
        device.codes[code_id] = CodeOnDevice(profile, sizes)
        return True

    # Requests

    def admit(self, request: Request, model: ServedModel, now_ns: int) -> Waiter:
        """Put a request into its queue."""
        config = self.config
        due_ns = max(request.deadline_ns - config.slack_ns, request.arrival_ns + config.floor_ns)
        queue = model.queue(request.signature, request.rows, alone=False, order=self.fresh())
        slo_ns = max(due_ns - request.arrival_ns, NS_PER_MS)
        demand_ns = max(1, self._base_ns(model) * config.capacity_ns // slo_ns)
        waiter = Waiter(request, due_ns, demand_ns, queue)
        waiter.cold = not model.residencies
        self.waiters[request.request_id] = waiter
        self._wait(waiter)
        return waiter

    def readmit(self, waiter: Waiter, *, alone: bool) -> None:
        """Put a request that was sent back into a queue."""
        waiter.step(RequestStep.RETURN)
        waiter.action_id = None
        waiter.alone = waiter.alone or alone
        request = waiter.request
        waiter.queue = waiter.queue.model.queue(
            request.signature, request.rows, alone=waiter.alone, order=self.fresh()
        )
        self._wait(waiter)

    def answer(
        self, waiter: Waiter, outcome: Outcome, reason: Reason, *, message: str = "", retry_after_ns: int = 0
    ) -> None:
        """Answer a request that has no result; its tensors are released later if a worker still has them."""
        if waiter.state is RequestState.WAITING:
            waiter.queue.remove(waiter)
            self._left(waiter)
            waiter.step(RequestStep.ANSWER)
            del self.waiters[waiter.request.request_id]
            release = True
        else:
            waiter.step(RequestStep.ANSWER_EARLY)
            release = False
        self.effects.append(
            Answer(
                request_id=waiter.request.request_id, gateway=waiter.request.gateway, outcome=outcome,
                reason=reason, message=message, retry_after_ns=retry_after_ns, release=release,
                cold=waiter.cold,
            )
        )  # fmt: skip

    def finish(self, waiter: Waiter, answer: Answer) -> None:
        """Answer a request from the result of its INFER, which ends it."""
        waiter.step(RequestStep.ANSWER)
        del self.waiters[waiter.request.request_id]
        self.effects.append(answer)

    def release(self, waiter: Waiter) -> None:
        """The result of a request that was answered before: its tensors are free."""
        waiter.step(RequestStep.RELEASE)
        del self.waiters[waiter.request.request_id]
        self.effects.append(Release(request_id=waiter.request.request_id, gateway=waiter.request.gateway))

    def _wait(self, waiter: Waiter) -> None:
        waiter.queue.add(waiter)
        model = waiter.queue.model
        model.waiting += 1
        self._set_demand(model, model.demand_ns + waiter.demand_ns)

    def _left(self, waiter: Waiter) -> None:
        model = waiter.queue.model
        model.waiting -= 1
        if not waiter.queue.waiters and (waiter.alone or waiter.request.signature or waiter.request.rows > 1):
            model.queues.pop((waiter.request.signature, waiter.request.rows, waiter.alone), None)
        self._set_demand(model, model.demand_ns - waiter.demand_ns)

    def _base_ns(self, model: ServedModel) -> int:
        """Batch-1 time of a model, by the first profile known."""
        for device in self.devices.values():
            profile = self.estimator.profile(model.code.code_id, device.spec.kind)
            if profile is not None:
                return profile.infer_ns[1]
        return NS_PER_MS

    # Demand

    def _set_demand(self, model: ServedModel, demand_ns: int) -> None:
        """Set a model's demand and count it for the devices that have its weights, the less loaded more.

        Paper section 5.3: a(m, g) is inverse to g's load, 0 where m is not, and sums to d_m.
        """
        model.demand_ns = demand_ns
        self.share(model)

    def share(self, model: ServedModel) -> None:
        """Count a model's demand anew for the devices that have, or are loading, its weights."""
        for name, share in model.shares.items():
            device = self.devices.get(name)
            if device is not None:
                device.load_ns -= share
        model.shares.clear()
        devices = [residency.device for residency in model.residencies.values()]
        if not devices or not model.demand_ns:
            return
        inverses = [1 / (device.load_ns + NS_PER_MS) for device in devices]
        total = sum(inverses)
        for device, inverse in zip(devices, inverses, strict=True):
            share = int(model.demand_ns * inverse / total)
            model.shares[device.name] = share
            device.load_ns += share

    # Actions

    def send_infer(
        self, residency: Residency, queue: Queue, choice: Choice, start_ns: int, now_ns: int
    ) -> None:
        """Send ``choice.count`` waiting requests, from place ``choice.first`` of a queue, as one batch."""
        device, config, batch = residency.device, self.config, choice.batch
        waiters = queue.take(choice.first, choice.count)
        expected_ns = self.infer_ns(device, queue, batch)
        latest_ns = start_ns + config.look_ahead_ns
        if not config.open_window:
            latest_ns = max(start_ns, waiters[0].due_ns + config.slack_ns // 2 - expected_ns)
        action_id = self.fresh()
        action = Infer(
            action_id=action_id, device=device.name, model=queue.model.model.key,
            code_id=queue.model.code.code_id,
            extent=residency.extent, version=residency.version, batch=batch, expected_ns=expected_ns,
            calls=tuple([_call(waiter.request) for waiter in waiters]),
            window=Window(now_ns, latest_ns), send_by_ns=max(now_ns + config.network_ns, latest_ns),
        )  # fmt: skip
        for waiter in waiters:
            waiter.step(RequestStep.SEND)
            waiter.action_id = action_id
            self._left(waiter)
        sent = Sent(action, expected_ns, now_ns, residency)
        sent.queue = queue
        sent.waiters = waiters
        self.sent[action_id] = sent
        residency.in_flight += 1
        device.touch(residency)
        device.exec.send(action_id, expected_ns, now_ns)
        self.moved[device.name] = None
        self.effects.append(action)

    def send_load(
        self, device: DeviceBelief, model: ServedModel, extent: Extent, start_ns: int, now_ns: int
    ) -> None:
        """Send a LOAD into pages that are free."""
        config = self.config
        expected_ns = self.load_samples(device, model).estimate_ns
        patience_ns = (
            config.look_ahead_ns if config.open_window else max(config.look_ahead_ns, config.capacity_ns)
        )
        action_id = self.fresh()
        residency = Residency(model, device, extent, version=action_id)
        residency.ready_ns = start_ns + expected_ns
        device.touch(residency)
        device.pages.hold(extent, residency)
        model.residencies[device.name] = residency
        self.share(model)
        action = Load(
            action_id=action_id, device=device.name, model=model.model.key, code_id=model.code.code_id,
            weights=model.model.weights, extent=extent, version=residency.version, expected_ns=expected_ns,
            window=Window(now_ns, start_ns + patience_ns), send_by_ns=start_ns + patience_ns,
        )  # fmt: skip
        self.sent[action_id] = Sent(action, expected_ns, now_ns, residency)
        device.load.send(action_id, expected_ns, now_ns)
        self.moved[device.name] = None
        self.effects.append(action)

    def send_unload(self, residency: Residency, now_ns: int) -> None:
        """Send an UNLOAD of weights that are ready and not in use; their pages are free at once."""
        assert residency.in_flight == 0, f"{residency.model.model.key} is in use"
        device = residency.device
        residency.step(WeightsStep.UNLOAD)
        self.drop(residency)
        action_id = self.fresh()
        action = Unload(
            action_id=action_id, device=device.name, model=residency.model.model.key, extent=residency.extent,
            version=residency.version, window=Window(now_ns, FAR_NS),
        )  # fmt: skip
        self.sent[action_id] = Sent(action, 0, now_ns, None)
        device.load.send(action_id, 0, now_ns)
        self.effects.append(action)

    def drop(self, residency: Residency) -> None:
        """Forget weights that are gone."""
        residency.device.pages.release(residency.extent)
        del residency.model.residencies[residency.device.name]
        self.share(residency.model)

    def check(self) -> None:
        """Assert every invariant that relates the parts."""
        for model in self.models.values():
            waiters = [waiter for queue in model.queues.values() for waiter in queue.waiters]
            assert model.waiting == len(waiters)
            assert model.demand_ns == sum(waiter.demand_ns for waiter in waiters)
            for queue in model.queues.values():
                queue.check()
        waiting = sum(model.waiting for model in self.models.values())
        states = [waiter.state for waiter in self.waiters.values()]
        assert states.count(RequestState.WAITING) == waiting
        assert RequestState.ANSWERED not in states
        flying = [waiter for sent in self.sent.values() for waiter in sent.waiters]
        assert {id(waiter) for waiter in flying} == {
            id(waiter) for waiter in self.waiters.values() if waiter.state is not RequestState.WAITING
        }
        for device in self.devices.values():
            device.check()
            shares = sum(model.shares.get(device.name, 0) for model in self.models.values())
            assert device.load_ns >= shares
        for sent in self.sent.values():
            if sent.residency is not None and sent.waiters:
                assert sent.residency.state is WeightsState.READY
                assert sent.residency.in_flight > 0


def _call(request: Request) -> Call:
    return Call(request_id=request.request_id, rows=request.rows, tensors=request.tensors)


def _useful_sizes(
    code: Code, profile: Profile, device: DeviceBelief, config: ControllerConfig
) -> frozenset[int]:
    """Batch sizes that fit the device and the limits, and that save time per request."""
    spec = device.spec
    useful = {code.batch_sizes[0]}
    best_ns = profile.infer_ns.get(code.batch_sizes[0], 0) / code.batch_sizes[0]
    for size in code.batch_sizes[1:]:
        infer_ns = profile.infer_ns.get(size)
        if infer_ns is None or size > config.max_batch or infer_ns > config.max_exec_ns:
            continue
        if profile.workspace_bytes.get(size, 0) > spec.workspace_bytes:
            continue
        if profile.io_bytes.get(size, 0) > spec.io_bytes:
            continue
        if infer_ns / size <= best_ns * (1 - config.min_batch_gain):
            best_ns = infer_ns / size
            useful.add(size)
    return frozenset(useful)
