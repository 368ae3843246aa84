"""Reads the server's own counts from its metrics page, as monitoring would; adds nothing of its own."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(slots=True)
class Meters:
    """What the metrics page says. ``errors_ms`` are (upper end of a bucket, count) of |measured - expected|.

    ``lane_ms`` is the same for the time on the execution lane. ``cold_starts`` is by model name.
    """

    loads: int = 0
    unloads: int = 0
    cold_starts: dict[str, int] = field(default_factory=dict)
    errors_ms: list[tuple[float, float]] = field(default_factory=list)
    lane_ms: list[tuple[float, float]] = field(default_factory=list)
    resident: int = 0


def scrape(url: str) -> Meters:
    """The counts at ``url`` (an http address). OSError if there is no answer."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
        return read(answer.read().decode())


def read(text: str) -> Meters:
    """The counts in a metrics page."""
    meters = Meters()
    errors: dict[float, float] = {}
    lane: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "clockwork_actions_total" and labels.get("status") == "ok":
                meters.loads += int(sample.value) if labels["action"] == "load" else 0
                meters.unloads += int(sample.value) if labels["action"] == "unload" else 0
            elif sample.name == "clockwork_model_cold_starts_total":
                meters.cold_starts[labels["model"]] = int(sample.value)
            elif sample.name == "clockwork_models_resident":
                meters.resident = int(sample.value)
            elif sample.name == "clockwork_prediction_error_seconds_bucket" and labels["action"] == "infer":
                end = float(labels["le"])
                errors[end] = errors.get(end, 0.0) + sample.value
            elif sample.name == "clockwork_execution_seconds_bucket":
                lane[float(labels["le"])] = sample.value
    meters.errors_ms = [(1000 * end, count) for end, count in sorted(errors.items())]
    meters.lane_ms = [(1000 * end, count) for end, count in sorted(lane.items())]
    return meters


def quantile(cumulative: Iterable[tuple[float, float]], share: float) -> float | None:
    """The upper end of the bucket that holds the ``share`` quantile; None without any samples."""
    buckets = list(cumulative)
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return None
    return next(end for end, count in buckets if count >= share * total)
