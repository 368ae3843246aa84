"""The exact number of requests that can be served in time, for few requests; gives up on too many states.

Depth-first search over what each device does next: a batch of any remaining requests, or a LOAD that replaces
any weights. Everything starts as soon as it can: starting something earlier, in the same order, never
makes anything else later, so some best schedule is among these. ``requests`` are (release, end, model) in ns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from clockwork_lab.oracle.costs import ModelCosts

FEW = 8
"""The most requests of an exact search."""
MOST_STATES = 100_000

Request = tuple[float, float, int]


class Stay(NamedTuple):
    """Weights on a device: usable from ``ready_ns``, last used until ``used_ns``."""

    model: int
    ready_ns: float
    used_ns: float


class Lanes(NamedTuple):
    """One device: the instants from which its lanes are free, and its resident weights."""

    exec_free_ns: float
    load_free_ns: float
    stays: tuple[Stay, ...]


class Search:
    """``best`` after ``run()``; None if there were too many states."""

    def __init__(
        self, requests: Sequence[Request], models: Sequence[ModelCosts], pages: int, enough: int
    ) -> None:
        """``enough``: a known bound; the search ends when it is reached."""
        self.requests = requests
        self.models = models
        self.pages = pages
        self.enough = enough
        self.best = 0
        self._seen: set[tuple[int, frozenset[int], tuple[Lanes, ...]]] = set()

    def run(self, devices: int, loads_from_ns: float) -> int | None:
        """Search from empty devices on which no LOAD starts before ``loads_from_ns``."""
        self._go(0, frozenset(range(len(self.requests))), (Lanes(0.0, loads_from_ns, ()),) * devices)
        return self.best if self.best == self.enough or len(self._seen) < MOST_STATES else None

    def _go(self, served: int, left: frozenset[int], devices: tuple[Lanes, ...]) -> None:
        self.best = max(self.best, served)
        now_ns = min(device.exec_free_ns for device in devices)
        left = frozenset(one for one in left if self.requests[one][1] > now_ns)
        state = (served, left, tuple(sorted(devices)))
        if self.best >= self.enough or served + len(left) <= self.best or state in self._seen:
            return
        if len(self._seen) >= MOST_STATES:
            return
        self._seen.add(state)
        for at, device in enumerate(devices):
            if device in devices[:at]:
                continue
            for batch, after in (*self._batches(left, device), *self._loads(left, device)):
                self._go(
                    served + len(batch), left.difference(batch), (*devices[:at], after, *devices[at + 1 :])
                )

    def _batches(self, left: frozenset[int], device: Lanes) -> Iterator[tuple[tuple[int, ...], Lanes]]:
        for stay in device.stays:
            mine = [one for one in left if self.requests[one][2] == stay.model]
            infer_ns = self.models[stay.model].infer_ns
            for size in range(min(len(mine), max(infer_ns)), 0, -1):
                lasts_ns = min(lasts for most, lasts in infer_ns.items() if most >= size)
                for batch in combinations(mine, size):
                    start_ns = max(
                        device.exec_free_ns, stay.ready_ns, *(self.requests[one][0] for one in batch)
                    )
                    end_ns = start_ns + lasts_ns
                    if end_ns <= min(self.requests[one][1] for one in batch):
                        used = stay._replace(used_ns=end_ns)
                        stays = tuple(used if other is stay else other for other in device.stays)
                        yield batch, Lanes(end_ns, device.load_free_ns, stays)

    def _loads(self, left: frozenset[int], device: Lanes) -> Iterator[tuple[tuple[int, ...], Lanes]]:
        there = {stay.model for stay in device.stays}
        for model in sorted({self.requests[one][2] for one in left} - there):
            costs = self.models[model]
            for count in range(len(device.stays), -1, -1):
                for kept in combinations(device.stays, count):
                    if sum(self.models[stay.model].pages for stay in kept) + costs.pages > self.pages:
                        continue
                    given_up = (stay.used_ns for stay in device.stays if stay not in kept)
                    ready_ns = max(device.load_free_ns, *given_up, 0.0) + costs.load_ns
                    if self._in_time(left, model, max(ready_ns, device.exec_free_ns)):
                        stays = tuple(sorted((*kept, Stay(model, ready_ns, ready_ns))))
                        yield (), Lanes(device.exec_free_ns, ready_ns, stays)

    def _in_time(self, left: frozenset[int], model: int, start_ns: float) -> bool:
        """Whether a remaining request of this model can end in time if it does not start earlier."""
        end_ns = start_ns + min(self.models[model].infer_ns.values())
        return any(self.requests[one][1] >= end_ns for one in left if self.requests[one][2] == model)
