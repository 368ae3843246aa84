"""Sketches of policies that the cases are compared with: simple, clairvoyant about durations, and no product.

A sketch knows the true durations, leaves 0.1 ms of slack, and runs where there is no noise, no delay of a
message and no LOAD: its weights are where ``homes`` says for ever. Whenever a device is free it chooses:

- *edf*: the request that is due first of all that can still be met, in the largest batch that it allows.
- *yield-greedy*: the batch that serves most requests for its time, of those that still meet their deadlines.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Final, Literal

from clockwork_serve.sim import read_constants
from clockwork_serve.units import NS_PER_US
from clockwork_serve.workload.stream import ClosedLoad, Workload
from clockwork_serve.workload.zoo import Zoo

SLACK_NS: Final = 100 * NS_PER_US
FAR_NS: Final = 1 << 62
MAX_BATCH: Final = 16
ARRIVE, FREE = range(2)


@dataclass(slots=True)
class Served:
    """What a sketch did with the requests that came after the warm-up."""

    offered: int = 0
    good: int = 0
    seconds: float = 0.0

    @property
    def in_time(self) -> float:
        """The share of requests that were answered in time."""
        return self.good / self.offered if self.offered else 1.0

    @property
    def good_rps(self) -> float:
        """Answers in time per second."""
        return self.good / self.seconds


@dataclass(slots=True, order=True)
class Waiting:
    """A request that waits; of two, the one that is due first is less."""

    due_ns: int
    number: int
    arrival_ns: int = field(compare=False)
    closed: ClosedLoad | None = field(compare=False, default=None)
    """The load whose client waits for the answer and sends again."""
    model: int = field(compare=False, default=0)
    load: int = field(compare=False, default=0)


Pick = tuple[list[Waiting], int, int, int]
"""Of a queue: from this request on, so many, and how long their batch takes in ns."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """A sketch and its world.

    ``homes(model, devices)`` are the devices that have a model's weights; None: all. ``speeds``: how many
    times as long each device takes as the profile says. ``by_class``: a more urgent class always goes first.
    """

    name: Literal["edf", "yield-greedy"]
    homes: Callable[[int, int], Sequence[int]] | None = None
    speeds: tuple[float, ...] = ()
    by_class: bool = False

    def serve(self, workload: Workload, zoo: Zoo, devices: int) -> Served:
        """Serve a workload from the first to the last request."""
        return _World(self, workload, zoo, devices).run()


class _World:
    """One run of a sketch."""

    def __init__(self, sketch: Sketch, workload: Workload, zoo: Zoo, devices: int) -> None:
        self.sketch, self.workload = sketch, workload
        homes = sketch.homes or (lambda _, devices: range(devices))
        self.homes = [tuple(homes(at, devices)) for at in range(len(workload.models))]
        speeds = sketch.speeds or (1.0,) * devices
        self.durations = [self._durations(zoo, speed) for speed in speeds]
        self.free = dict.fromkeys(sorted(range(devices), key=lambda at: speeds[at]))
        """Devices that run nothing, the fastest first at the start."""
        self.queues: list[dict[tuple[int, int], list[Waiting]]] = [{} for _ in range(devices)]
        """By device: queues that are not empty, by class and model; one queue is of all that have it."""
        self.heap: list[tuple[int, int, int, Waiting | None]] = []
        """(instant, number, what happens, request or None); with the device's index instead of ARRIVE."""
        self.numbers = count()
        self.served = Served(seconds=(workload.duration_ns - workload.warmup_ns) / 1e9)
        self.retry_ns = read_constants().clients.retry_ns

    def _durations(self, zoo: Zoo, speed: float) -> list[list[tuple[int, int]]]:
        """By model: (batch, how long it takes on a device of that speed)."""
        by_kind = {
            kind: [(size, round(ns * speed)) for size, ns in zoo[kind].infer_ns.items() if size <= MAX_BATCH]
            for kind in {kind for _, kind in self.workload.models}
        }
        return [by_kind[kind] for _, kind in self.workload.models]

    def run(self) -> Served:
        """Everything that happens, in order."""
        for closed in self.workload.closed:
            for model in closed.models:
                for _ in range(closed.concurrency):
                    self._ask(closed.start_ns, closed, model)
        arrivals = self._arrivals()
        coming = next(arrivals, None)
        while coming is not None or self.heap:
            at_ns = coming.arrival_ns if coming is not None else FAR_NS
            if self.heap and self.heap[0][0] < at_ns:
                at_ns, _, device, request = heappop(self.heap)
                if request is not None:
                    self._arrive(request, at_ns)
                else:
                    self.free[device] = None
                    self._use([device], at_ns)
            else:
                assert coming is not None
                self._arrive(coming, at_ns)
                coming = next(arrivals, None)
        return self.served

    def _arrivals(self) -> Iterator[Waiting]:
        for chunk in self.workload.open():
            for at_ns, model, slo_ns, load in zip(
                chunk.times_ns, chunk.models, chunk.slos_ns, chunk.loads, strict=True
            ):
                yield Waiting(at_ns + slo_ns, next(self.numbers), at_ns, None, model, load)

    def _ask(self, at_ns: int, closed: ClosedLoad, model: int) -> None:
        """A client of a closed load sends a request at an instant, unless its time is over."""
        if at_ns < closed.stop_ns:
            due_ns = at_ns + closed.slo.at(at_ns)
            request = Waiting(due_ns, next(self.numbers), at_ns, closed, model, closed.load)
            heappush(self.heap, (at_ns, request.number, ARRIVE, request))

    def _arrive(self, request: Waiting, now_ns: int) -> None:
        level = self.workload.priorities[request.load] if self.sketch.by_class else 0
        key = (level, request.model)
        homes = self.homes[request.model]
        queue = self.queues[homes[0]].get(key)
        if queue is None:
            queue = []
            for device in homes:
                self.queues[device][key] = queue
        insort(queue, request)
        self._use([device for device in self.free if device in homes], now_ns)

    def _use(self, devices: list[int], now_ns: int) -> None:
        """Have free devices run what they choose."""
        for device in devices:
            found = self._choose(device, now_ns)
            if found is None:
                continue
            queue, first, many, lasts_ns = found
            batch = queue[first : first + many]
            del queue[first : first + many]
            if not queue:
                self._forget(batch[0])
            del self.free[device]
            heappush(self.heap, (now_ns + lasts_ns, next(self.numbers), device, None))
            for request in batch:
                self._end(request, now_ns + lasts_ns, good=True)

    def _forget(self, one: Waiting) -> None:
        """Drop the empty queue in which a request waited."""
        level = self.workload.priorities[one.load] if self.sketch.by_class else 0
        for device in self.homes[one.model]:
            self.queues[device].pop((level, one.model), None)

    def _end(self, request: Waiting, at_ns: int, *, good: bool) -> None:
        if request.arrival_ns >= self.workload.warmup_ns:
            self.served.offered += 1
            self.served.good += good
        closed = request.closed
        if closed is not None:
            retry_ns = self.retry_ns if closed.retry_ns is None else closed.retry_ns
            self._ask(at_ns if good else at_ns + retry_ns, closed, request.model)

    def _choose(self, device: int, now_ns: int) -> Pick | None:
        """What a device runs now; requests that cannot be met on any of their devices are refused."""
        best: Pick | None = None
        best_key: tuple[float, float] = (0.0, 0.0)
        for (level, model), queue in list(self.queues[device].items()):
            soonest_ns = min(self.durations[home][model][0][1] for home in self.homes[model])
            while queue and queue[0].due_ns < now_ns + soonest_ns + SLACK_NS:
                hopeless = queue.pop(0)
                self._end(hopeless, now_ns, good=False)
                if not queue:
                    self._forget(hopeless)
            fit = self._fit(queue, self.durations[device][model], now_ns)
            if fit is None:
                continue
            first, many, lasts_ns = fit
            key = (level, queue[first].due_ns if self.sketch.name == "edf" else -many / lasts_ns)
            if best is None or key < best_key:
                best, best_key = (queue, first, many, lasts_ns), key
        return best

    def _fit(
        self, queue: list[Waiting], durations: list[tuple[int, int]], now_ns: int
    ) -> tuple[int, int, int] | None:
        """The batch of a queue that the sketch prefers: first request, how many, how long; None without."""
        best: tuple[int, int, int] | None = None
        for size, lasts_ns in durations:
            if size > len(queue):
                break
            first = bisect_left(queue, Waiting(now_ns + lasts_ns + SLACK_NS, -1, 0))
            if len(queue) - first < size:
                break
            if best is None or (
                first == best[0] if self.sketch.name == "edf" else size * best[2] > best[1] * lasts_ns
            ):
                best = (first, size, lasts_ns)
        return best
