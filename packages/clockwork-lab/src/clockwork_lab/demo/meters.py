"""Reads the server's counters from its metrics page, as monitoring would."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(slots=True)
class Meters:
    """Counters of the metrics page: ``cold_starts`` by model, ``rejected`` by model and reason."""

    loads: int = 0
    unloads: int = 0
    cold_starts: dict[str, int] = field(default_factory=dict)
    rejected: dict[tuple[str, str], int] = field(default_factory=dict)


def scrape(url: str) -> Meters:
    """The counters at ``url`` (an http address). OSError if there is no response."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
        return read(answer.read().decode())


def read(text: str) -> Meters:
    """The counters in a metrics page."""
    meters = Meters()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "clockwork_actions_total" and labels.get("status") == "ok":
                meters.loads += int(sample.value) if labels["action"] == "load" else 0
                meters.unloads += int(sample.value) if labels["action"] == "unload" else 0
            elif sample.name == "clockwork_model_cold_starts_total":
                meters.cold_starts[labels["model"]] = int(sample.value)
            elif sample.name == "clockwork_model_requests_total" and labels["outcome"] == "rejected":
                meters.rejected[labels["model"], labels["reason"]] = int(sample.value)
    return meters
