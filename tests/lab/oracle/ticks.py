"""The most requests that can be answered in time, by trying everything that can start at every millisecond.

Exact where all times are whole milliseconds: then some best schedule starts everything at whole milliseconds.
It shares nothing with the code it judges.
"""

from __future__ import annotations

from itertools import combinations, product

from clockwork_lab.oracle.costs import ModelCosts
from clockwork_serve.units import NS_PER_MS

Device = tuple[int, int, tuple[tuple[int, int], ...]]
"""Ticks until exec lane and load lane are free; (model, ticks until it is neither loading nor in use)."""


class Ticks:
    """``requests``: (released, last end, model) by ticks of 1 ms. Memory is empty at tick 0."""

    def __init__(self, requests: list[tuple[int, int, int]], models: list[ModelCosts], pages: int) -> None:
        self.requests = requests
        self.infer = [{size: ns // NS_PER_MS for size, ns in model.infer_ns.items()} for model in models]
        self.load = [model.load_ns // NS_PER_MS for model in models]
        self.weights = [model.pages for model in models]
        self.pages = pages
        self.memory: dict[object, int] = {}

    def most(self, devices: int) -> int:
        """The answer."""
        return self.after(0, frozenset(range(len(self.requests))), ((0, 0, ()),) * devices)

    def after(self, tick: int, left: frozenset[int], devices: tuple[Device, ...]) -> int:
        """The most that can still be served from this tick on."""
        left = frozenset(one for one in left if self.requests[one][1] > tick)
        if not left:
            return 0
        key = (tick, left, tuple(sorted(devices)))
        if key not in self.memory:
            self.memory[key] = self.first(tick, left, devices, ())
        return self.memory[key]

    def first(
        self, tick: int, left: frozenset[int], devices: tuple[Device, ...], done: tuple[Device, ...]
    ) -> int:
        """The same, where the devices in ``done`` have already started what they start at this tick."""
        if not devices:
            return self.after(tick + 1, left, tuple(self.later(device) for device in done))
        device, *rest = devices
        best = 0
        for batch, running in self.batches(tick, left, device):
            for after in self.loads(running):
                gained = self.first(tick, left - batch, tuple(rest), (*done, after))
                best = max(best, len(batch) + gained)
        return best

    @staticmethod
    def later(device: Device) -> Device:
        """One tick later."""
        exec_free, load_free, there = device
        stays = tuple((model, max(0, busy - 1)) for model, busy in there)
        return max(0, exec_free - 1), max(0, load_free - 1), stays

    def batches(self, tick: int, left: frozenset[int], device: Device):
        """No run, or any batch that can start now and end in time."""
        yield frozenset(), device
        exec_free, load_free, there = device
        if exec_free:
            return
        for model, busy in there:
            if busy:
                continue
            mine = [one for one in left if self.requests[one][2] == model and self.requests[one][0] <= tick]
            for size, count in product(self.infer[model], range(1, len(mine) + 1)):
                lasts = self.infer[model][size]
                for batch in combinations(mine, count) if count <= size else ():
                    if all(tick + lasts <= self.requests[one][1] for one in batch):
                        stays = ((one, lasts if one == model else wait) for one, wait in there)
                        yield frozenset(batch), (lasts, load_free, tuple(sorted(stays)))

    def loads(self, device: Device):
        """No LOAD, or any that can start now, in place of any weights that rest."""
        yield device
        exec_free, load_free, there = device
        if load_free:
            return
        present = {model for model, _ in there}
        idle = [stay for stay in there if not stay[1]]
        for model in range(len(self.load)):
            if model in present:
                continue
            for count in range(len(idle) + 1):
                for out in combinations(idle, count):
                    kept = [stay for stay in there if stay not in out]
                    if sum(self.weights[one] for one, _ in kept) + self.weights[model] <= self.pages:
                        stays = tuple(sorted((*kept, (model, self.load[model]))))
                        yield exec_free, self.load[model], stays
