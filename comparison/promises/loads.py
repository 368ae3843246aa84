"""Scenarios of the questions as text, and what their records say; it plays none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from comparison.peers import served
from harness.report import quantile

MOBILENET: Final = "mobilenet_v3_small"
EMULATED: Final = served.DEVICE
SLO_MS: Final = {MOBILENET: 100, EMULATED: 200}
NS_PER_MS: Final = 1e6
Table = npt.NDArray[Any]
Models = Sequence[tuple[str, str, int]]
"""Sets of models: name, kind, copies."""


@dataclass(frozen=True, slots=True)
class Played:
    """The record of a load, and what the generator says of itself."""

    head: dict[str, Any]
    table: Table
    ends: Sequence[str]
    generator: dict[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> Table:
        """Requests that were due after the warm-up."""
        found: Table = self.table[self.table["scheduled_ns"] >= self.head["warmup_ns"]]
        return found

    @property
    def seconds(self) -> float:
        """In which they were due."""
        return float(self.head["end_ns"] - self.head["warmup_ns"]) / 1e9

    def of(self, load: str) -> Table:
        """Those of one load."""
        counted = self.counted
        found: Table = counted[counted["load"] == self.head["loads"].index(load)]
        return found

    def is_end(self, rows: Table, end: str) -> Table:
        """Which of them ended so: ``ok``, ``rejected``, ``expired``, ``failed``, ``none``."""
        found: Table = (np.array(self.ends, object) == end)[rows["end"]]
        return found

    def in_time(self, rows: Table) -> Table:
        """Which of them were answered within their SLOs, by the client's clock."""
        found: Table = self.is_end(rows, "ok") & (rows["last_ns"] - rows["scheduled_ns"] <= rows["slo_ns"])
        return found

    def count(self, end: str) -> int:
        """So many of all, those of the warm-up too."""
        return int(np.count_nonzero(self.is_end(self.table, end)))

    @property
    def good_per_s(self) -> float:
        """Goodput."""
        return float(np.count_nonzero(self.in_time(self.counted))) / self.seconds

    @property
    def sent_late_p99_ms(self) -> float | None:
        """How long after they were due requests were sent."""
        sent = self.counted[self.counted["sent_ns"] > 0]
        return quantile_ms(sent["sent_ns"] - sent["scheduled_ns"], 0.99)


def ages_ns(rows: Table) -> Table:
    """From when they were due to the last byte of what came."""
    found: Table = rows["last_ns"] - rows["scheduled_ns"]
    return found


def quantile_ms(values_ns: Iterable[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    values = list(values_ns)
    return float(quantile(values, share)) / NS_PER_MS if values else None


def scenario(
    name: str, models: Models, loads: Iterable[Mapping[str, Any]], *, seconds: float, warmup_s: float
) -> str:
    """A scenario's text."""
    parts = [_table("", {"name": name, "seconds": seconds, "warmup_s": warmup_s})]
    parts += [
        _table("[[models]]", {"name": one, "kind": kind, "copies": copies}) for one, kind, copies in models
    ]
    parts += [_table("[[loads]]", one) for one in loads]
    return "\n".join(parts)


def _table(head: str, values: Mapping[str, Any]) -> str:
    # JSON's strings, numbers and lists are TOML's.
    return "\n".join([head, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


def poisson(models: Sequence[str], rate_rps: float, slo_ms: float, **more: Any) -> dict[str, Any]:
    """One load by chance."""
    return {
        "name": "requests", "models": list(models), "arrivals": "poisson", "rate_rps": round(rate_rps, 3),
        "slo_ms": slo_ms, **more,
    }  # fmt: skip


def steady(
    kind: str, copies: int, rate_rps: float, *, seconds: float, warmup_s: float = 4, **more: Any
) -> str:
    """Copies of one kind, asked at one rate."""
    load = poisson(["m"], rate_rps, SLO_MS[kind], **more)
    return scenario(
        f"{copies} of {kind}, {rate_rps:.0f} r/s", [("m", kind, copies)], [load], seconds=seconds + warmup_s,
        warmup_s=warmup_s,
    )  # fmt: skip


def names(copies: int) -> list[str]:
    """As the scenario's copies are called."""
    return [f"m-{number:04d}" for number in range(copies)] if copies > 1 else ["m"]
