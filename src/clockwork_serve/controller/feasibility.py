"""Refuses a request the moment that no schedule can meet its deadline; a layer of its own, which can be off.

A request is hopeless when on no device the earliest start that is still free, plus the batch-1 estimate, lies
within its due time; weights that are not there add their LOAD. Only each queue's head is watched (the others
are due later), on the one device that promises the earliest end: a heap per device of latest starts, looked
at when that device is given work or when time reaches its top.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, LaneBelief
from clockwork_serve.controller.estimator import Samples
from clockwork_serve.controller.life import WeightsState
from clockwork_serve.controller.queues import Queue, ServedModel
from clockwork_serve.controller.timers import Timers
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.units import NS_PER_MS

LOADERS_MAX = 4
"""Of devices that lack the weights, so many are looked at, the soonest load lanes first."""

RECHECK_NS = 2 * NS_PER_MS
"""How often waiting requests are judged while the action before them is late against its estimate."""


class Hope:
    """The best that a queue's head can hope for.

    It ends at ``end_ns`` if it starts in ``lane`` of ``device`` when that is free; it may do so until the
    instant that leaves ``rest_ns`` before its due time. ``samples`` is the estimate that weighs most.
    """

    __slots__ = ("device", "end_ns", "lane", "rest_ns", "samples")

    def __init__(
        self, device: DeviceBelief, lane: LaneBelief, end_ns: int, rest_ns: int, samples: Samples
    ) -> None:
        self.device = device
        self.lane = lane
        self.end_ns = end_ns
        self.rest_ns = rest_ns
        self.samples = samples


class _Watch:
    """Queues that hope for one lane, by the latest start of their heads."""

    __slots__ = ("device", "heap", "lane")

    def __init__(self, device: DeviceBelief, lane: LaneBelief) -> None:
        self.device = device
        self.lane = lane
        self.heap: list[tuple[int, int, Queue]] = []
        """(latest start, queue order, queue); stale where ``Feasibility`` places the queue elsewhere."""


class Feasibility:
    """See the module. It reads belief; the answers are given by the caller."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self._watches: dict[str, _Watch] = {}
        """Two per device that is up, by ``name`` (exec lane) and ``name/load``."""
        self._places: dict[Queue, tuple[str, int]] = {}
        """Where each watched queue is: (watch, latest start)."""
        self._unjudged: dict[Queue, None] = {}
        """Queues whose head or hope changed."""
        self._timers = Timers()
        self._loaders: list[DeviceBelief] | None = None
        """Devices by when their load lanes are free, once that was asked in this instant."""

    def doubt(self, queue: Queue) -> None:
        """Judge this queue in the next ``hopeless``."""
        self._unjudged[queue] = None

    def doubt_model(self, model: ServedModel) -> None:
        """Judge all queues of a model."""
        for queue in model.queues.values():
            self._unjudged[queue] = None

    def device_joined(self, device: DeviceBelief) -> None:
        """Watch a device's lanes."""
        self._watches[device.name] = _Watch(device, device.exec)
        self._watches[f"{device.name}/load"] = _Watch(device, device.load)

    def device_lost(self, device: DeviceBelief) -> None:
        """Judge what hoped for a lost device anew."""
        for name in (device.name, f"{device.name}/load"):
            for queue in [queue for queue, place in self._places.items() if place[0] == name]:
                del self._places[queue]
                self._unjudged[queue] = None
            del self._watches[name]

    def reject(self, now_ns: int) -> list[ServedModel]:
        """Refuse every hopeless request; returns the models that lost one."""
        losers: dict[ServedModel, None] = {}
        self._loaders = None
        names = dict.fromkeys(self._timers.due(now_ns))
        for name in self._belief.moved:
            names[name] = names[f"{name}/load"] = None
        self._belief.moved.clear()
        for name in names:
            watch = self._watches.get(name)
            if watch is not None:
                self._surface(name, watch, now_ns)
        while self._unjudged:
            queue, _ = self._unjudged.popitem()
            names.update(self._judge(queue, now_ns, losers))
        for name in names:
            watch = self._watches.get(name)
            if watch is not None:
                self._set_timer(name, watch, now_ns)
        return list(losers)

    def _surface(self, name: str, watch: _Watch, now_ns: int) -> None:
        """Take out of a watch all queues whose heads can no longer start there in time."""
        start_ns = watch.lane.available_ns(now_ns)
        heap = watch.heap
        while heap and (heap[0][0] < start_ns or self._places.get(heap[0][2]) != (name, heap[0][0])):
            latest_ns, _, queue = heappop(heap)
            if self._places.get(queue) == (name, latest_ns):
                del self._places[queue]
                self._unjudged[queue] = None

    def _judge(self, queue: Queue, now_ns: int, losers: dict[ServedModel, None]) -> dict[str, None]:
        """Refuse a queue's heads until one has hope, and watch that one; returns where."""
        while queue.waiters:
            head = queue.waiters[0]
            hope = self._hope(queue, now_ns)
            if hope is None:
                losers[queue.model] = None
                self._belief.answer(
                    head, Outcome.REJECTED, Reason.NOT_SERVING, message=self._why(queue.model)
                )
                continue
            if hope.end_ns <= head.due_ns:
                return self._place(queue, hope, head.due_ns - hope.rest_ns)
            if (
                not hope.lane
                and now_ns + hope.rest_ns - hope.samples.estimate_ns + hope.samples.median_ns < head.due_ns
            ):
                hope.samples.doubt()
            shortage_ns = hope.end_ns - head.due_ns
            impossible = (
                hope.rest_ns + self._belief.config.slack_ns
                > head.request.deadline_ns - head.request.arrival_ns
            )
            losers[queue.model] = None
            self._belief.answer(
                head, Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE,
                retry_after_ns=0 if impossible else shortage_ns,
                message=_miss_message(shortage_ns, hope, impossible=impossible),
            )  # fmt: skip
        self._places.pop(queue, None)
        return {}

    def _place(self, queue: Queue, hope: Hope, latest_ns: int) -> dict[str, None]:
        name = hope.device.name if hope.lane is hope.device.exec else f"{hope.device.name}/load"
        if self._places.get(queue) == (name, latest_ns):
            return {}
        self._places[queue] = (name, latest_ns)
        heap = self._watches[name].heap
        heappush(heap, (latest_ns, queue.order, queue))
        if len(heap) > 4 * len(self._places) + 64:
            heap[:] = [entry for entry in heap if self._places.get(entry[2]) == (name, entry[0])]
            heapify(heap)
        return {name: None}

    def _set_timer(self, name: str, watch: _Watch, now_ns: int) -> None:
        """Look again when the top's latest start has come, or, if the lane runs late, soon."""
        self._surface_stale(name, watch)
        if not watch.heap:
            return
        at_ns = watch.heap[0][0] - self._belief.config.network_ns + 1
        if watch.lane:
            late_ns = watch.lane.head_end_ns() + 1
            at_ns = min(at_ns, late_ns if late_ns > now_ns else now_ns + RECHECK_NS)
        self._timers.set(name, max(at_ns, now_ns + 1))

    def _surface_stale(self, name: str, watch: _Watch) -> None:
        heap = watch.heap
        while heap and self._places.get(heap[0][2]) != (name, heap[0][0]):
            heappop(heap)

    def _hope(self, queue: Queue, now_ns: int) -> Hope | None:
        """The earliest end that any device promises; None where none can serve the model at all."""
        best: Hope | None = None
        residencies = queue.model.residencies
        for residency in residencies.values():
            device = residency.device
            start_ns = device.exec.available_ns(now_ns)
            if residency.state is WeightsState.LOADING:
                start_ns = max(start_ns, residency.ready_ns)
            hope = self._warm(queue, device, start_ns)
            if best is None or hope.end_ns < best.end_ns:
                best = hope
        if best is not None and best.end_ns <= queue.dues[0]:
            return best
        looked_at = 0
        for device in self._soonest_loaders(now_ns):
            if device.name in residencies:
                continue
            cold = self._cold(queue, device, now_ns)
            if cold is not None:
                looked_at += 1
                if best is None or cold.end_ns < best.end_ns:
                    best = cold
                if looked_at == LOADERS_MAX:
                    break
        return best

    def _soonest_loaders(self, now_ns: int) -> list[DeviceBelief]:
        """All devices, those first whose load lane is free first; lanes do not change while we judge."""
        if self._loaders is None:
            devices = self._belief.devices.values()
            self._loaders = sorted(devices, key=lambda device: device.load.available_ns(now_ns))
        return self._loaders

    def _warm(self, queue: Queue, device: DeviceBelief, start_ns: int) -> Hope:
        samples = self._samples(queue, device)
        return Hope(device, device.exec, start_ns + samples.estimate_ns, samples.estimate_ns, samples)

    def _cold(self, queue: Queue, device: DeviceBelief, now_ns: int) -> Hope | None:
        """What a device could do that lacks the weights; one still preparing the code gets the benefit."""
        model = queue.model
        code_id = model.code.code_id
        if device.spec.pages_of(model.model.weights.size) > device.spec.pages:
            return None
        if code_id in device.pending_codes and self._belief.estimator.profile(code_id, device.spec.kind):
            return self._warm(queue, device, now_ns)
        if code_id not in device.codes:
            return None
        samples = self._samples(queue, device)
        load = self._belief.load_samples(device, model)
        ready_ns = device.load.available_ns(now_ns) + load.estimate_ns
        end_ns = max(ready_ns, device.exec.available_ns(now_ns)) + samples.estimate_ns
        heavier = load if load.estimate_ns > samples.estimate_ns else samples
        return Hope(device, device.load, end_ns, load.estimate_ns + samples.estimate_ns, heavier)

    def _samples(self, queue: Queue, device: DeviceBelief) -> Samples:
        return self._belief.infer_samples(device, queue, queue.sizes[0][1])

    def _why(self, model: ServedModel) -> str:
        """Why no device can serve a model."""
        devices = self._belief.devices
        if not devices:
            return "no worker is up"
        size = model.model.weights.size
        for device in devices.values():
            failure = device.failed_codes.get(model.code.code_id)
            if failure is not None:
                return f"device {device.name} could not prepare the model: {failure}"
        largest = max(device.spec.pages * device.spec.page_bytes for device in devices.values())
        return f"the model's {size} bytes of weights fit no device; the largest has {largest}"

    def next_wakeup_ns(self) -> int | None:
        """When time alone may make a waiting request hopeless."""
        return self._timers.next_ns()

    def check(self) -> None:
        """Assert that every waiting queue is watched."""
        for model in self._belief.models.values():
            for queue in model.queues.values():
                assert not queue.waiters or queue in self._places or queue in self._unjudged


def _miss_message(shortage_ns: int, hope: Hope, *, impossible: bool) -> str:
    needs = f"it takes {hope.rest_ns / NS_PER_MS:.1f} ms"
    if impossible:
        return f"the deadline cannot be met: {needs}, more than the time allowed"
    short = f"{shortage_ns / NS_PER_MS:.1f} ms"
    return f"the deadline would be missed by {short}: {needs}, {hope.device.name} is busy"
