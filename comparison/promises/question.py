"""What a question of the comparison is, and how its figures are worded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from comparison.peers.summary import spread

if TYPE_CHECKING:
    from comparison.promises.rig import Rig

Figures = dict[str, Any]
Runs = Mapping[str, Mapping[int, Figures]]
"""By variant and repeat."""
MET, MISSED, TOLD, NONE = "met", "missed", "", "nothing to judge"
HEAD: Final = ("question", "goal", "found", "", "others %")


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for the median of repeats, or for ``every`` one of them."""

    limit: float
    most: bool
    every: bool = False

    def met(self, values: Sequence[float]) -> bool:
        """Whether they keep to it."""
        worst = max(values) if self.most else min(values)
        value = worst if self.every else median(values)
        return value <= self.limit if self.most else value >= self.limit

    def words(self, form: str) -> str:
        """For a table."""
        return f"{'at most' if self.most else 'at least'} {form.format(self.limit)}"


def at_most(limit: float, *, every: bool = False) -> Goal:
    """No more than that is good."""
    return Goal(limit, most=True, every=every)


def at_least(limit: float) -> Goal:
    """No less than that is good."""
    return Goal(limit, most=False)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: one value a repeat, and what it should be, if anything."""

    text: str
    values: Sequence[float | None]
    form: str
    goal: Goal | None = None

    @property
    def there(self) -> list[float]:
        """What was measured."""
        return [value for value in self.values if value is not None and not math.isnan(value)]

    @property
    def verdict(self) -> str:
        """Whether the goal was met; "" where there is none."""
        if not self.there:
            return NONE
        if self.goal is None:
            return TOLD
        return MET if self.goal.met(self.there) else MISSED

    @property
    def found(self) -> str:
        """The median, and least and most."""
        found = spread(self.there)
        if found is None:
            return "-"
        middle, least, most = (self.form.format(found[key]) for key in ("median", "least", "most"))
        return middle if least == most else f"{middle} ({least} to {most})"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. ``variants`` are measured in turns, each on a server of its own."""

    name: str
    title: str
    variants: tuple[str, ...]
    measure: Callable[[Rig, str, int], Figures]
    rows: Callable[[Runs], list[Row]]


def column(runs: Runs, variant: str, key: str, scale: float = 1.0) -> list[float | None]:
    """A figure of all repeats of a variant."""
    found = [one.get(key) for _, one in sorted(runs.get(variant, {}).items())]
    return [None if value is None else scale * value for value in found]


def percent(runs: Runs, variant: str, key: str) -> list[float | None]:
    """A share of all repeats of a variant."""
    return column(runs, variant, key, 100.0)


def paired(runs: Runs, one: str, other: str, told: Callable[[Figures, Figures], float]) -> list[float | None]:
    """What is told of two variants of the same repeat, where both were measured."""
    there = sorted(set(runs.get(one, {})) & set(runs.get(other, {})))
    return [told(runs[one][repeat], runs[other][repeat]) for repeat in there]
