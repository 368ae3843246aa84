"""The paper's policy (OSDI 2020, section 5.3; the authors' INFER5), fairly mended where it had bugs.

A *strategy* is a queue with its urgency on one device: the least, over batch sizes that can be filled, of the
head's due time minus the estimate. Each device's exec lane is topped up to the look-ahead with the most
urgent strategy, at the largest batch that still meets its head's due time. Each load lane is topped up with
the model of highest LOAD priority; least recently used weights make room.

Strategies are kept lazily: at most one heap entry per (queue, device), whose key is never above the true
urgency and is corrected when it surfaces. Pushing each batch size to each replica costs 500 us a request at
256 devices, lazy keys 9 to 22 us (measured on a prototype).
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush

from clockwork_serve.controller.belief import FAR_NS, Belief, Choice
from clockwork_serve.controller.cluster import DeviceBelief, LaneBelief, Residency
from clockwork_serve.controller.life import WeightsState
from clockwork_serve.controller.pages import Room
from clockwork_serve.controller.queues import Queue, ServedModel
from clockwork_serve.controller.timers import Timers

SURFACED_MAX = 64
"""LOAD candidates looked at for one device in one decision."""

STALE_FACTOR, STALE_MIN = 4, 64
"""A heap is rebuilt without its stale entries when it has this many more entries than live ones."""


class _Strategies:
    """The strategies of one device."""

    __slots__ = ("heap", "keys")

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Queue]] = []
        """(key, queue order, queue); stale where ``keys`` has another key."""
        self.keys: dict[Queue, int] = {}
        """The live key of each queue."""

    def push(self, queue: Queue, key: int) -> None:
        """Enter a queue, unless it is there with a key as low."""
        known = self.keys.get(queue)
        if known is None or key < known:
            self.keys[queue] = key
            heappush(self.heap, (key, queue.order, queue))
            if len(self.heap) > STALE_FACTOR * len(self.keys) + STALE_MIN:
                self.heap = [(key, queue.order, queue) for queue, key in self.keys.items()]
                heapify(self.heap)

    def top(self) -> int | None:
        """The lowest live key."""
        while self.heap and self.keys.get(self.heap[0][2]) != self.heap[0][0]:
            heappop(self.heap)
        return self.heap[0][0] if self.heap else None

    def pop(self) -> Queue:
        """Take out the queue of the lowest live key; ``top`` was called just before."""
        queue = heappop(self.heap)[2]
        del self.keys[queue]
        return queue


class PaperScheduler:
    """See the module."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self._config = belief.config
        self._strategies: dict[str, _Strategies] = {}
        """Strategies of all and only devices that are up."""
        self._candidates: list[tuple[int, int, ServedModel]] = []
        """Heap of (minus priority, order, model) of models that may want a LOAD; ``load_key`` tells the live
        ones.
        """
        self._live = 0
        """Never below the number of live entries among ``_candidates``; exact after each rebuild."""
        self._changed: dict[str, None] = {}
        """Devices to look at in the next ``schedule``, in order of change."""
        self._loaders: dict[str, None] = {}
        """Devices whose load lane may take a LOAD, as far as was last seen."""
        self._timers = Timers()

    # What changed

    def queued(self, queue: Queue) -> None:
        """A request joined: its queue may be more urgent now, and its model want a LOAD more."""
        for residency in queue.model.residencies.values():
            if residency.state is WeightsState.READY:
                self._enter(residency.device, queue)
                self._changed[residency.device.name] = None
        self._rank(queue.model)

    def left(self, model: ServedModel) -> None:
        """Requests left: strategies correct themselves when they surface."""
        self._rank(model)

    def loaded(self, residency: Residency) -> None:
        """Weights are ready: all queues of the model may run there."""
        for queue in residency.model.queues.values():
            if queue.waiters and not residency.model.removed:
                self._enter(residency.device, queue)
        self._changed[residency.device.name] = None

    def device_changed(self, device: DeviceBelief) -> None:
        """Look at this device next time."""
        self._strategies.setdefault(device.name, _Strategies())
        self._changed[device.name] = None
        self._loaders[device.name] = None

    def device_lost(self, device: DeviceBelief) -> None:
        """Forget the device; models that were only there want a LOAD again."""
        self._strategies.pop(device.name, None)
        self._changed.pop(device.name, None)
        self._loaders.pop(device.name, None)
        for model in self._belief.models.values():
            if model.waiting:
                self._rank(model)

    def _enter(self, device: DeviceBelief, queue: Queue) -> None:
        sizes = device.codes[queue.model.code.code_id].sizes
        waiting = len(queue.waiters)
        batch = max(
            (run for count, run in queue.sizes if count <= waiting and (run in sizes or count == 1)),
            default=0,
        )
        if batch:
            key = queue.dues[0] - self._belief.infer_ns(device, queue, batch)
            self._strategies[device.name].push(queue, key)

    # Choices

    def schedule(self, now_ns: int) -> None:
        """Top up the lanes of every device that changed."""
        devices = self._belief.devices
        for name in self._timers.due(now_ns):
            if name in devices:
                self._changed[name] = None
                self._loaders[name] = None
        changed, self._changed = self._changed, {}
        for name in changed:
            self._top_up_exec(devices[name], now_ns)
        if self._candidates:
            self._top_up_loads(now_ns)

    def _top_up_exec(self, device: DeviceBelief, now_ns: int) -> None:
        strategies = self._strategies[device.name]
        while (top := strategies.top()) is not None:
            start_ns = device.exec.available_ns(now_ns)
            if start_ns >= now_ns + self._config.look_ahead_ns or self._stuck(device, now_ns):
                self._wake(device, device.exec, now_ns)
                return
            queue = strategies.pop()
            residency = queue.model.residencies.get(device.name)
            if residency is None or residency.state is not WeightsState.READY:
                continue
            choice = self._choose(queue, device, start_ns)
            if choice is None:
                continue
            after = strategies.top()
            if after is not None and choice.urgency_ns > after and choice.urgency_ns > top:
                strategies.push(queue, choice.urgency_ns)
                continue
            self._belief.send_infer(residency, queue, choice, start_ns, now_ns)
            self._rank(queue.model)
            if queue.waiters:
                self._enter(device, queue)

    def _wake(self, device: DeviceBelief, lane: LaneBelief, now_ns: int) -> None:
        """Look again when a lane has room; if it is late by now, its next result will tell."""
        if lane.overdue_ns(now_ns) <= 0:
            room_ns = lane.available_ns(now_ns) - self._config.look_ahead_ns
            self._timers.set(device.name, max(now_ns, room_ns) + 1)

    def _stuck(self, device: DeviceBelief, now_ns: int) -> bool:
        """Whether the running action is so late that no more should be queued behind the next one."""
        return len(device.exec) > 1 and device.exec.overdue_ns(now_ns) > self._config.lag_ns

    def _choose(self, queue: Queue, device: DeviceBelief, start_ns: int) -> Choice | None:
        """The largest batch, walking up sizes that can be filled, whose requests can all be in time."""
        allowed = device.codes[queue.model.code.code_id].sizes
        dues, waiting = queue.dues, len(queue.dues)
        chosen: tuple[int, int, int] | None = None
        urgency_ns = FAR_NS
        for count, run in queue.sizes:
            if count > 1 and run not in allowed:
                continue
            infer_ns = self._belief.infer_ns(device, queue, run)
            first = bisect_left(dues, start_ns + infer_ns)
            if waiting - first < count:
                break
            chosen = (first, count, run)
            urgency_ns = min(urgency_ns, dues[first] - infer_ns)
        return None if chosen is None else Choice(*chosen, urgency_ns)

    # LOADs

    def _priority(self, model: ServedModel) -> int:
        """Demand that devices which have the weights cannot serve within the horizon (paper section 5.3)."""
        served = 0
        for name, share in model.shares.items():
            load_ns = self._belief.devices[name].load_ns
            served += share * self._config.capacity_ns // max(load_ns, 1)
        return model.demand_ns - served

    def _rank(self, model: ServedModel) -> None:
        """Enter a model among the LOAD candidates, or correct its place."""
        everywhere = 0 < len(self._belief.devices) <= len(model.residencies)
        if model.removed or not model.waiting or everywhere:
            model.load_key = None
            return
        priority = self._priority(model)
        if priority <= 0 and not self._config.load_negative:
            model.load_key = None
            return
        if -priority != model.load_key:
            if model.load_key is None:
                self._live += 1
            model.load_key = -priority
            heappush(self._candidates, (-priority, model.order, model))
            if len(self._candidates) > STALE_FACTOR * self._live + STALE_MIN:
                live = {id(entry[2]): entry for entry in self._candidates if entry[2].load_key == entry[0]}
                self._candidates = list(live.values())
                heapify(self._candidates)
                self._live = len(self._candidates)

    def _top_up_loads(self, now_ns: int) -> None:
        """Send LOADs until no free load lane finds one worth it; one sent may change what others find."""
        devices, limit_ns = self._belief.devices, now_ns + self._config.look_ahead_ns
        sent = True
        while sent and self._loaders:
            sent = False
            for name in list(self._loaders):
                device = devices[name]
                if device.load.available_ns(now_ns) < limit_ns:
                    sent = self._load_one(device, now_ns) or sent
                else:
                    del self._loaders[name]
                    self._wake(device, device.load, now_ns)

    def _load_one(self, device: DeviceBelief, now_ns: int) -> bool:
        """Send one LOAD to a device, if any candidate is worth it there."""
        passed: list[ServedModel] = []
        sent = False
        while self._candidates and len(passed) < SURFACED_MAX:
            key, _, model = heappop(self._candidates)
            if model.load_key != key:
                continue
            model.load_key = None
            priority = self._priority(model)
            if -priority > key and not self._config.load_negative:
                self._rank(model)
                continue
            room = self._room(device, model)
            if room is None or not self._timely(device, model, now_ns):
                passed.append(model)
                continue
            start_ns = device.load.available_ns(now_ns)
            for residency in room.displaced:
                self._belief.send_unload(residency, now_ns)
                self._rank(residency.model)
            self._belief.send_load(device, model, room.extent, start_ns, now_ns)
            self._rank(model)
            sent = True
            break
        for model in passed:
            self._rank(model)
        return sent

    def _timely(self, device: DeviceBelief, model: ServedModel, now_ns: int) -> bool:
        """Whether a LOAD could still save a waiting request; the released code did not ask."""
        if self._config.load_negative:
            return True
        ready_ns = device.load.available_ns(now_ns) + self._belief.load_samples(device, model).estimate_ns
        start_ns = max(ready_ns, device.exec.available_ns(now_ns))
        for queue in model.queues.values():
            if queue.waiters and queue.dues[-1] >= start_ns + self._belief.infer_ns(
                device, queue, queue.sizes[0][1]
            ):
                return True
        return False

    def _room(self, device: DeviceBelief, model: ServedModel) -> Room[Residency] | None:
        """Where the model's weights could go on this device; None if it has them, or cannot take them now."""
        if device.name in model.residencies or model.code.code_id not in device.codes:
            return None
        pages = device.spec.pages_of(model.model.weights.size)
        priority = self._priority(model)

        def rank(other: Residency) -> int | None:
            if other.state is not WeightsState.READY or other.in_flight:
                return None
            if not other.model.waiting:
                return other.used
            wanted_more = other.model.demand_ns >= priority and not self._config.load_negative
            return None if wanted_more else other.used + FAR_NS

        return device.pages.room(pages, rank)

    def next_wakeup_ns(self) -> int | None:
        """When a lane that is full now has room again."""
        return self._timers.next_ns()

    def check(self) -> None:
        """Assert the invariants."""
        assert self._strategies.keys() >= self._belief.devices.keys()
        for name, strategies in self._strategies.items():
            live = {(key, queue.order) for queue, key in strategies.keys.items()}
            assert live <= {(key, order) for key, order, _ in strategies.heap}, (
                f"{name}: a strategy fell out of its heap"
            )
        entered = {id(model) for key, _, model in self._candidates if model.load_key == key}
        for model in self._belief.models.values():
            assert model.load_key is None or id(model) in entered, (
                f"{model.model.key} fell out of the candidates"
            )
