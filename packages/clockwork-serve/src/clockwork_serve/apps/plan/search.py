"""Which sets of devices to simulate next, until the cheapest that meets the target is known; it runs nothing.

What one set shows is used for others: where a set fails, so does every set that it covers; and none that is
dearer than one that meets the target is looked at. So the result is the cheapest of all candidates, as long
as more devices never do less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

Mix = tuple[int, ...]
"""How many devices of each kind."""

GALLOP: Final = 1.15
"""By what more is tried at least after everything failed; by more and more each time."""


class MixSearch:
    """The state of a search among candidates, which are in ascending order of price.

    ``guess(mix)`` is about 1 where a set probably just does, more where it has more than that. ``covers(one,
    other)``: ``one`` can do all that ``other`` can.
    """

    def __init__(
        self, candidates: Sequence[Mix], guess: Callable[[Mix], float], covers: Callable[[Mix, Mix], bool]
    ) -> None:
        self._order = {mix: at for at, mix in enumerate(candidates)}
        self._guess, self._covers = guess, covers
        self._met: dict[Mix, bool] = {}
        self._wanted = 1.0
        """What is probably just enough, by the guess."""
        self._rounds = 0

    def record(self, mix: Mix, *, met: bool, needed: float = 1.0) -> None:
        """A simulation's result; a later one of the same set replaces it.

        ``needed``: by how much more than that, or less, is probably needed.
        """
        self._met[mix] = met
        self._wanted = self._guess(mix) * needed

    @property
    def best(self) -> Mix | None:
        """The cheapest that met the target so far."""
        return min((mix for mix, met in self._met.items() if met), key=self._order.__getitem__, default=None)

    def undecided(self) -> list[Mix]:
        """Candidates that may still be the answer, cheapest first."""
        best = self.best
        end = len(self._order) if best is None else self._order[best]
        failed = [mix for mix, met in self._met.items() if not met]
        return [
            mix
            for mix, at in self._order.items()
            if at < end and mix not in self._met and not any(self._covers(each, mix) for each in failed)
        ]

    def next(self) -> tuple[Mix, ...]:
        """What to simulate next, however many can be simulated at once. Nothing: the search is over.

        First the set that is guessed to be just enough and the one before it by price, which often is all;
        then one at a time: what the last result suggests, later in turns with the middle of what is left.
        """
        left = self.undecided()
        if not left:
            return ()
        self._rounds += 1
        failed = [self._guess(mix) for mix, met in self._met.items() if not met]
        if self.best is not None and failed and self._rounds > 3 and self._rounds % 2 == 0:
            return (left[len(left) // 2],)
        wanted = self._wanted
        if failed and self.best is None:
            wanted = max(wanted, max(failed) * GALLOP ** (self._rounds - 1))
        at = next((at for at, mix in enumerate(left) if self._guess(mix) >= wanted), None)
        if at is None:
            at = max(range(len(left)), key=lambda at: (self._guess(left[at]), -at))
        return tuple(left[max(0, at - 1) if self._rounds == 1 else at : at + 1])
