"""Allocation of a device's pages: one contiguous extent for each weights, and which to evict for others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from clockwork_serve.controller.record import Record
from clockwork_serve.messages import Extent

# ruff: noqa: PLR1730 - max() costs 100 ns more than a condition

Holder = TypeVar("Holder")

_NONE: Final = 1 << 64
"""Above every rank."""


class ExtentChoice(Generic[Holder]):
    """An extent for weights, and the holders to evict for it."""

    __slots__ = ("evicted", "extent")

    def __init__(self, extent: Extent, evicted: list[Holder]) -> None:
        self.extent = extent
        self.evicted = evicted


class PageMap(Record, Generic[Holder]):
    """Held extents by address. They never overlap and lie inside ``0 .. count``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.used = 0
        """The sum of all held extents, in pages."""
        self._sizes: dict[int, int] = {}
        """How many held extents there are of each size."""
        self._firsts: list[int] = []
        """First pages of all held extents, ascending."""
        self._held: list[tuple[Extent, Holder]] = []
        """Parallel to ``_firsts``."""
        self._widest = count
        """An upper bound of the widest free gap."""

    def __len__(self) -> int:
        return len(self._held)

    def add(self, count: int) -> None:
        """Add free pages at the end."""
        end = self._end(len(self._held) - 1) if self._held else 0
        self.count += count
        self._widest = max(self._widest, self.count - end)

    def hold(self, extent: Extent, holder: Holder) -> None:
        """Assign a free extent to a holder."""
        at = bisect_left(self._firsts, extent.first)
        self._firsts.insert(at, extent.first)
        self._held.insert(at, (extent, holder))
        self.used += extent.count
        self._sizes[extent.count] = self._sizes.get(extent.count, 0) + 1

    def release(self, extent: Extent) -> None:
        """Free a held extent."""
        at = bisect_left(self._firsts, extent.first)
        assert self._held[at][0] == extent, f"{extent} is not held; found {self._held[at][0]}"
        del self._firsts[at]
        del self._held[at]
        self.used -= extent.count
        if self._sizes[extent.count] == 1:
            del self._sizes[extent.count]
        else:
            self._sizes[extent.count] -= 1
        end = self._firsts[at] if at < len(self._firsts) else self.count
        gap = end - (self._end(at - 1) if at else 0)
        if gap > self._widest:
            self._widest = gap

    def holders(self) -> list[Holder]:
        """All holders, by address."""
        return [holder for _, holder in self._held]

    def gap(self, count: int) -> Extent | None:
        """``count`` pages at the front of the smallest free gap that is large enough; None without one."""
        if self._widest < count or self.count - self.used < count:
            return None
        if not self._held or self._end(len(self._held) - 1) == self.used:
            return Extent(self.used, count)
        best = self.count + 1
        best_first = end = widest = 0
        for extent, _ in self._held:
            gap = extent.first - end
            if gap > widest:
                widest = gap
            if count <= gap < best:
                best, best_first = gap, end
            end = extent.first + extent.count
        gap = self.count - end
        if count <= gap < best:
            best, best_first = gap, end
        if gap > widest:
            widest = gap
        self._widest = widest
        return None if best > self.count else Extent(best_first, count)

    def all_of(self, count: int) -> bool:
        """Whether all held extents have this size, so that evicting any one makes room for another."""
        return len(self._sizes) == 1 and count in self._sizes

    def instead(self, extent: Extent, count: int) -> Extent | None:
        """``count`` pages in place of a held extent and the gaps beside it; None if these are too few."""
        at = bisect_left(self._firsts, extent.first)
        start = self._end(at - 1) if at else 0
        end = self._firsts[at + 1] if at + 1 < len(self._firsts) else self.count
        return Extent(start, count) if end - start >= count else None

    def _end(self, at: int) -> int:
        extent = self._held[at][0]
        return extent.first + extent.count

    def room(self, count: int, rank: Callable[[Holder], int | None]) -> ExtentChoice[Holder] | None:
        """Choose ``count`` contiguous pages, where there is no such gap, and the holders to evict for them.

        ``rank`` is a holder's value, from 0; None if it may not be evicted. Of all contiguous ranges, the one
        whose most valuable holder has the lowest rank is chosen (with models of one size and ranks by use,
        that is plain least-recently-used order).
        """
        held = self._held
        ranks = [rank(holder) for _, holder in held]
        best_worst, best_victims, best_at, best_start = _NONE, 0, 0, 0
        for at, first_rank in enumerate(ranks):
            if first_rank is None or first_rank > best_worst:
                continue
            start = self._end(at - 1) if at else 0
            worst, last = first_rank, at
            while True:
                last += 1
                end = held[last][0].first if last < len(held) else self.count
                if end - start >= count:
                    if worst < best_worst or last - at < best_victims:
                        best_worst, best_victims, best_at, best_start = worst, last - at, at, start
                    break
                wanted = ranks[last] if last < len(held) else None
                if wanted is None or wanted > best_worst:
                    break
                if wanted > worst:
                    worst = wanted
        if best_victims == 0:
            return None
        evicted = [holder for _, holder in held[best_at : best_at + best_victims]]
        return ExtentChoice(Extent(best_start, count), evicted)

    def check(self) -> None:
        """Assert the invariants."""
        end = 0
        for (extent, _), first in zip(self._held, self._firsts, strict=True):
            assert extent.first == first
            assert 0 <= extent.first - end <= self._widest, f"{extent} after {end}; gap <= {self._widest}"
            assert extent.count > 0
            end = extent.first + extent.count
        assert 0 <= self.count - end <= self._widest
        assert self.used == sum(extent.count for extent, _ in self._held)
        sizes = [extent.count for extent, _ in self._held]
        assert self._sizes == {size: sizes.count(size) for size in sizes}
