"""What a policy keeps for a device: its strategies by urgency and what it waits for; it sends nothing.

Strategies are kept lazily: at most one live entry each, whose key is never above the true urgency and is
corrected when it surfaces. Pushing each batch size to each replica costs 500 us a request at 256 devices,
lazy keys 9 to 22 us (measured on a prototype).
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.timers import NEVER_NS, Timer

if TYPE_CHECKING:
    from clockwork_serve.controller.cluster import DeviceBelief, Strategy

STALE_MIN: Final = 64
"""A heap of twice as many entries as after its last clearing, and this many more, is cleared again."""


class LaneTimer(Timer):
    """When a policy wants to look at a lane again."""

    __slots__ = ("is_exec", "plan")

    def __init__(self, plan: Plan, order: int, *, is_exec: bool) -> None:
        super().__init__(order)
        self.plan = plan
        self.is_exec = is_exec


class Plan:
    """See the module. The heap keeps itself in order; flags and timers are the policy's to use."""

    __slots__ = (
        "changed", "device", "exec_rests", "exec_timer", "full", "heap", "load_awake", "load_timer",
        "starved",
    )  # fmt: skip

    def __init__(self, device: DeviceBelief) -> None:
        self.device = device
        self.heap: list[tuple[int, int, Strategy]] = []
        """(key, queue order, strategy); stale where the strategy's ``key_ns`` is another."""
        self.full = STALE_MIN
        """With so many entries, the heap is cleared of stale ones."""
        self.changed = False
        """The exec lane is to be looked at."""
        self.exec_rests = False
        """The exec lane is full: its timer or its next result says when to look again."""
        self.exec_timer = LaneTimer(self, 2 * device.index, is_exec=True)
        self.load_awake = False
        """The load lane is to be offered all candidates, not only new ones."""
        self.starved = False
        """A candidate found no room or no time here; when that may have changed, it is offered again."""
        self.load_timer = LaneTimer(self, 2 * device.index + 1, is_exec=False)

    def push(self, strategy: Strategy, key_ns: int) -> None:
        """Enter a strategy with a key below the one it has, if it has one."""
        strategy.key_ns = key_ns
        heap = self.heap
        heappush(heap, (key_ns, strategy.queue.order, strategy))
        if len(heap) > self.full:
            entries = {id(entry[2]): entry for entry in heap if entry[2].key_ns == entry[0]}
            heap[:] = entries.values()
            heapify(heap)
            self.full = 2 * len(heap) + STALE_MIN

    def top(self) -> Strategy | None:
        """The strategy of the lowest live key."""
        heap = self.heap
        while heap:
            key_ns, _, strategy = heap[0]
            if strategy.key_ns == key_ns:
                return strategy
            heappop(heap)
        return None

    def pop(self) -> None:
        """Take out the strategy that ``top`` just returned."""
        heappop(self.heap)[2].key_ns = NEVER_NS

    def remove(self, strategy: Strategy) -> None:
        """Its weights are going: its entries are stale."""
        strategy.key_ns = NEVER_NS

    def check(self, strategy: Strategy) -> None:
        """Assert that a strategy did not fall out of the heap."""
        entry = (strategy.key_ns, strategy.queue.order, strategy)
        assert strategy.key_ns == NEVER_NS or entry in self.heap, f"{self.device.name}: a strategy fell out"
