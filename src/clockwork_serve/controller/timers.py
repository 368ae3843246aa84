"""A few pending instants, each with its subject; the earliest per subject counts."""

from __future__ import annotations

from heapq import heappop, heappush


class Timers:
    """Instants by name. Setting a later one than is pending changes nothing."""

    __slots__ = ("_heap", "_pending")

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []
        self._pending: dict[str, int] = {}
        """The earliest pending instant of each subject; heap entries with another are stale."""

    def set(self, name: str, at_ns: int) -> None:
        """Fire for ``name`` at ``at_ns`` at the latest."""
        pending_ns = self._pending.get(name)
        if pending_ns is None or at_ns < pending_ns:
            self._pending[name] = at_ns
            heappush(self._heap, (at_ns, name))

    def due(self, now_ns: int) -> list[str]:
        """Take out all names whose instant has come, in order."""
        names: list[str] = []
        while self._heap and self._heap[0][0] <= now_ns:
            at_ns, name = heappop(self._heap)
            if self._pending.get(name) == at_ns:
                del self._pending[name]
                names.append(name)
        return names

    def next_ns(self) -> int | None:
        """The earliest instant pending."""
        while self._heap and self._pending.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None
