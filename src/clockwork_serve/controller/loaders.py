"""Devices by when their load lanes are free, soonest first; it sends no LOAD."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from clockwork_serve.controller.cluster import DeviceBelief
from clockwork_serve.controller.timers import NEVER_NS

LOOK_MIN: Final = 4
"""So many are looked for at least, once one is asked for."""


class Loaders:
    """All devices that are up; each has one live entry, never later than true, corrected as it surfaces."""

    __slots__ = ("_count", "_heap", "_soonest", "_until_ns")

    def __init__(self) -> None:
        self._count = 0
        self._heap: list[tuple[int, int, DeviceBelief]] = []
        """(instant, index, device); stale where the device's ``load_key_ns`` is another."""
        self._soonest: list[DeviceBelief] = []
        """The first of them, as far as was asked for since lanes changed."""
        self._until_ns = 0
        """Until then, time alone does not change their order: none of them is late."""

    def joined(self, device: DeviceBelief) -> None:
        """A device came."""
        self._count += 1
        self.forget()
        self.sooner(device, 0)

    def lost(self, device: DeviceBelief) -> None:
        """A device is gone."""
        self._count -= 1
        self.forget()
        device.load_key_ns = NEVER_NS

    def sooner(self, device: DeviceBelief, free_ns: int) -> None:
        """A load lane may be free sooner than was believed."""
        if free_ns < device.load_key_ns:
            device.load_key_ns = free_ns
            heappush(self._heap, (free_ns, device.index, device))

    def forget(self) -> None:
        """Lanes were given work, or finished some."""
        self._until_ns = -1

    def __len__(self) -> int:
        return self._count

    def get(self, at: int, now_ns: int) -> DeviceBelief | None:
        """The device whose load lane is the ``at``-th to be free; None if there are not so many."""
        if at >= self._count:
            return None
        if at >= len(self._soonest) or now_ns > self._until_ns:
            self._soonest = self._look(min(self._count, max(at + 1, LOOK_MIN)), now_ns)
        return self._soonest[at]

    def _look(self, count: int, now_ns: int) -> list[DeviceBelief]:
        heap = self._heap
        found: list[tuple[int, int, DeviceBelief]] = []
        while len(found) < count:
            entry = heappop(heap)
            free_ns, index, device = entry
            if device.load_key_ns != free_ns:
                continue
            truth_ns = device.load.available_ns(now_ns)
            if truth_ns > free_ns and device.load.busy(now_ns):
                device.load_key_ns = truth_ns
                heappush(heap, (truth_ns, index, device))
                continue
            device.load_key_ns = NEVER_NS
            found.append(entry)
        for entry in found:
            entry[2].load_key_ns = entry[0]
            heappush(heap, entry)
        self._until_ns = NEVER_NS
        for entry in found:
            self._until_ns = min(self._until_ns, entry[2].load.head_end_ns)
        return [device for _, _, device in found]
