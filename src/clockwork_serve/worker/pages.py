"""Who holds which pages of a device. It knows no action and no time.

*Weights* claim their extent when their LOAD starts, are ready when it ends well, and leave when it fails or
an UNLOAD ends (well or not: to unload is to forget).

    LOADING --loaded--> READY --unload--> UNLOADING --forgotten--> EMPTY
       +-----------------failed-----------------------------------> EMPTY
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from dataclasses import dataclass

from clockwork_serve.messages import Extent


class WeightsState(enum.Enum):
    """Where the weights of an extent are."""

    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    EMPTY = "empty"


class WeightsStep(enum.Enum):
    """What happens to weights."""

    LOADED = "loaded"
    FAILED = "failed"
    UNLOAD = "unload"
    FORGOTTEN = "forgotten"


WEIGHTS_LIFE: dict[WeightsState, dict[WeightsStep, WeightsState]] = {
    WeightsState.LOADING: {
        WeightsStep.LOADED: WeightsState.READY,
        WeightsStep.FAILED: WeightsState.EMPTY,
    },
    WeightsState.READY: {WeightsStep.UNLOAD: WeightsState.UNLOADING},
    WeightsState.UNLOADING: {WeightsStep.FORGOTTEN: WeightsState.EMPTY},
    WeightsState.EMPTY: {},
}


@dataclass(slots=True)
class Held:
    """An extent that is not empty, and whose weights it holds.

    ``stale`` weights were loaded for a controller that is gone; they are forgotten once nothing reads them.
    """

    extent: Extent
    version: int
    model: str
    code_id: str
    state: WeightsState = WeightsState.LOADING
    stale: bool = False

    def step(self, step: WeightsStep) -> None:
        """Move along the life cycle."""
        following = WEIGHTS_LIFE[self.state].get(step)
        assert following is not None, f"{self.model} in {self.extent}: {step} while {self.state}"
        self.state = following


class Pages:
    """The held extents of ``count`` pages. They never overlap and lie inside ``0 .. count``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._firsts: list[int] = []  # first pages of all held extents, ascending
        self._held: list[Held] = []  # parallel to _firsts

    def at(self, extent: Extent, version: int) -> Held | None:
        """The weights of that version in exactly that extent."""
        at = bisect_left(self._firsts, extent.first)
        if at < len(self._held):
            held = self._held[at]
            if held.extent == extent and held.version == version:
                return held
        return None

    def overlapping(self, extent: Extent) -> list[Held]:
        """All weights that hold a page of ``extent``, by address."""
        at = bisect_left(self._firsts, extent.first)
        if at > 0 and self._held[at - 1].extent.overlaps(extent):
            at -= 1
        found: list[Held] = []
        while at < len(self._held) and self._held[at].extent.overlaps(extent):
            found.append(self._held[at])
            at += 1
        return found

    def claim(self, held: Held) -> None:
        """Give weights an extent of pages that nobody holds."""
        at = bisect_left(self._firsts, held.extent.first)
        self._firsts.insert(at, held.extent.first)
        self._held.insert(at, held)

    def leave(self, held: Held) -> None:
        """Make the extent of weights that are no more empty."""
        assert held.state is WeightsState.EMPTY, f"{held.model} leaves while {held.state}"
        at = bisect_left(self._firsts, held.extent.first)
        assert self._held[at] is held, f"{held.model} does not hold {held.extent}"
        del self._firsts[at]
        del self._held[at]

    def all(self) -> list[Held]:
        """All held extents, by address."""
        return list(self._held)

    def check(self) -> None:
        """Assert that extents are sorted, disjoint and inside the device."""
        assert self._firsts == [held.extent.first for held in self._held]
        end = 0
        for held in self._held:
            assert held.extent.first >= end and held.extent.count > 0, f"{held} overlaps the one before it"
            assert held.state is not WeightsState.EMPTY, f"{held} is empty, and held"
            end = held.extent.first + held.extent.count
        assert end <= self.count, f"{self._held[-1]} ends at page {end} of {self.count}"
