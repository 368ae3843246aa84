"""The results of a demo, as records that are also its JSON."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from clockwork_lab.demo.client import Hit
from clockwork_lab.demo.judgement import Judgement
from clockwork_lab.demo.zoo import DemoModel


class ModelRow(Struct, frozen=True, kw_only=True):
    """One model with all its instances. ``requests`` = ``ok`` + ``rejected`` + ``late`` + ``failed``.

    ``ok`` results came within their SLO by the client's clock; ``late`` ones did not, or the server dropped
    them at the deadline. ``p50_ms`` and ``p99_ms`` are of the ``ok`` ones (None without any). ``worst_error``
    is the largest relative error against plain sessions, of all ``checked`` results.
    """

    name: str
    kind: str
    answer: str
    answer_ok: bool
    requests: int
    ok: int
    rejected: int
    late: int
    failed: int
    reasons: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None
    cold_starts: int
    instances: int
    checked: int
    worst_error: float
    tolerance: float


class PredictionError(Struct, frozen=True, kw_only=True):
    """|measured - predicted| lane time over good results, in ms, and the measured lane time."""

    p50: float | None
    p99: float | None
    lane_p50: float | None
    lane_p99: float | None
    unit: str = "ms"


class DemoReport(Struct, frozen=True, kw_only=True):
    """All results. ``client_lag_p99_ms`` is how late the client itself sent requests.

    ``busy`` is the load average per core when the demo began, caused by other programs.
    """

    models: tuple[ModelRow, ...]
    instances: int
    loads: int
    unloads: int
    prediction_error: PredictionError
    duration_s: float
    device_bytes: int
    weights_bytes: int
    rate: float
    utilisation: float
    load_s: float
    slo_floor_ms: float
    client_lag_p99_ms: float
    busy: float
    offline: bool

    @property
    def good(self) -> bool:
        """Whether every model was right, every checked result agreed, and no request failed."""
        return all(
            row.answer_ok and row.worst_error <= row.tolerance and row.failed == 0 for row in self.models
        )

    def to_json(self) -> bytes:
        """As indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def model_row(
    model: DemoModel, judgement: Judgement, hits: Sequence[Hit], errors: Sequence[float], served: Counted
) -> ModelRow:
    """Add up one model's requests."""
    counts = Counter(hit.outcome for hit in hits)
    good = [hit.latency_ms for hit in hits if hit.outcome == "ok"]
    worst = max(errors, default=0.0)
    return ModelRow(
        name=model.name,
        kind=model.kind,
        answer=judgement.answer,
        answer_ok=judgement.ok,
        requests=len(hits),
        ok=counts["ok"],
        rejected=counts["rejected"],
        late=counts["late"],
        failed=counts["failed"],
        reasons=dict(served.rejected + Counter(hit.reason for hit in hits if hit.reason)),
        p50_ms=percentile(good, 50),
        p99_ms=percentile(good, 99),
        cold_starts=served.cold_starts,
        instances=model.instances,
        checked=len(errors),
        # JSON has no infinity.
        worst_error=min(worst, 1e9),
        tolerance=model.tolerance,
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """The ``share`` percentile, rounded to 0.01; None without any values."""
    return round(float(np.percentile(values, share)), 2) if values else None


def prediction_error(lanes: Sequence[tuple[float, float]]) -> PredictionError:
    """From (measured, expected) lane times in ms."""
    gaps = [abs(measured - expected) for measured, expected in lanes]
    times = [measured for measured, _ in lanes]
    return PredictionError(
        p50=percentile(gaps, 50), p99=percentile(gaps, 99),
        lane_p50=percentile(times, 50), lane_p99=percentile(times, 99),
    )  # fmt: skip


# ------------------------------------------------------------
# The server's counters, from its metrics page, as monitoring would read them.


@dataclass(slots=True)
class Counted:
    """The counters of one model and its copies."""

    cold_starts: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Meters:
    """Counters of the server, and those by base model."""

    by_base: dict[str, Counted]
    loads: int = 0
    unloads: int = 0


def scrape(url: str, base_of: Mapping[str, str]) -> Meters:
    """The counters at ``url`` (an http address). OSError if there is no response."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
        return read(answer.read().decode(), base_of)


def read(text: str, base_of: Mapping[str, str]) -> Meters:
    """The counters in a metrics page; ``base_of`` names the base of every instance."""
    meters = Meters({base: Counted() for base in base_of.values()})
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels, value = sample.labels, int(sample.value)
            if sample.name == "clockwork_actions_total" and labels.get("status") == "ok":
                meters.loads += value if labels["action"] == "load" else 0
                meters.unloads += value if labels["action"] == "unload" else 0
            elif sample.name == "clockwork_model_cold_starts_total":
                meters.by_base[base_of[labels["model"]]].cold_starts += value
            elif sample.name == "clockwork_model_requests_total" and labels["outcome"] == "rejected":
                meters.by_base[base_of[labels["model"]]].rejected[labels["reason"]] += value
    return meters
