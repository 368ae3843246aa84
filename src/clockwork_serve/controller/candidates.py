"""Models that may want a LOAD, by the paper's priority; it sends none.

Paper section 5.3: a model's demand d_m is shared among the devices that have its weights (a(m, g) inverse to
the load of g, 0 where m is not, summing to d_m); its priority is what these devices, loaded as they are,
cannot serve of it within the horizon. One that stalled (``stalls``), or became too slow, serves nothing.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.plan import STALE_MIN
from clockwork_serve.controller.queues import ServedModel
from clockwork_serve.units import NS_PER_MS


class Candidates:
    """See the module.

    More urgent classes of requests come first. Of models that want a LOAD equally, the one that was served
    first is first, or, ``by_due``, the one whose first request is due first.
    """

    def __init__(self, belief: Belief, *, by_due: bool = False) -> None:
        self._belief = belief
        self._by_due = by_due
        self._capacity_ns = belief.config.capacity_ns
        self._negative = belief.config.load_negative
        self._heap: list[tuple[int, int, int, ServedModel]] = []
        """(class less priority, due time or 0, order, model); stale where the ``load_key`` is another."""
        self._full = STALE_MIN
        """With so many entries, the heap is cleared of stale ones."""

    def __len__(self) -> int:
        return len(self._heap)

    def rank(self, model: ServedModel) -> bool:
        """A model's demand or residencies changed: share it anew, correct its place; true if it has one."""
        if model.sole is None and model.residencies:
            self._share(model)
        return self.enter(model)

    def enter(self, model: ServedModel) -> bool:
        """Give a model its place, if it is a candidate; true if it is."""
        if not model.waiting or model.removed:
            model.load_key = None
            return False
        priority = self.priority(model)
        able = self._belief.able(model.code.backend)
        everywhere = 0 < able <= len(model.residencies)
        if everywhere or (priority <= 0 and not self._negative):
            model.load_key = None
            return False
        key = model.band_ns() - priority
        if key != model.load_key:
            model.load_key = key
            heappush(self._heap, (key, self._due_ns(model), model.order, model))
            if len(self._heap) > self._full:
                live = {id(entry[3]): entry for entry in self._heap if entry[3].load_key == entry[0]}
                self._heap = list(live.values())
                heapify(self._heap)
                self._full = 2 * len(self._heap) + STALE_MIN
        return True

    def top(self) -> ServedModel | None:
        """The model that wanted a LOAD most, when they were entered."""
        heap = self._heap
        while heap and heap[0][3].load_key != heap[0][0]:
            heappop(heap)
        return heap[0][3] if heap else None

    def pop(self) -> ServedModel | None:
        """Take out the model that wants a LOAD most."""
        while self._heap:
            key, due_ns, _, model = heappop(self._heap)
            if model.load_key != key:
                continue
            model.load_key = None
            now = model.band_ns() - self.priority(model)
            if (now > key and not self._negative) or due_ns < self._due_ns(model):
                self.enter(model)
                continue
            return model
        return None

    def _due_ns(self, model: ServedModel) -> int:
        """When its first request is due, if that matters."""
        due_ns = 0
        if self._by_due:
            for queue in model.queues.values():
                if queue.dues and (not due_ns or queue.dues[0] < due_ns):
                    due_ns = queue.dues[0]
        return due_ns

    def priority(self, model: ServedModel) -> int:
        """Demand that devices which have the weights cannot serve within the horizon."""
        capacity_ns, served_ns = self._capacity_ns, 0
        if model.sole is not None:
            if not model.sole.serves:
                return model.demand_ns
            load_ns = model.sole.device.load_ns
            return model.demand_ns - model.demand_ns * capacity_ns // (load_ns if load_ns > 0 else 1)
        for residency in model.residencies.values():
            if not residency.serves:
                continue
            load_ns = residency.device.load_ns
            served_ns += residency.share_ns * capacity_ns // (load_ns if load_ns > 0 else 1)
        return model.demand_ns - served_ns

    def _share(self, model: ServedModel) -> None:
        """Count a model's demand for the devices that have, or are loading, its weights."""
        residencies = list(model.residencies.values())
        demand_ns = model.demand_ns
        for residency in residencies:
            residency.device.load_ns -= residency.share_ns
            residency.share_ns = 0
        if not demand_ns:
            return
        inverses = [1 / (residency.device.load_ns + NS_PER_MS) for residency in residencies]
        total = sum(inverses)
        for residency, inverse in zip(residencies, inverses, strict=True):
            residency.share_ns = share_ns = int(demand_ns * inverse / total)
            residency.device.load_ns += share_ns

    def check(self) -> None:
        """Assert the invariants."""
        entered = {id(model) for key, _, _, model in self._heap if model.load_key == key}
        for model in self._belief.models.values():
            assert model.load_key is None or id(model) in entered, f"{model.key} fell out"
            shares_ns = sum(model.share_ns(residency) for residency in model.residencies.values())
            low_ns = model.demand_ns - len(model.residencies) if model.residencies else 0
            assert model.stirred or low_ns <= shares_ns <= model.demand_ns, model.key
