"""Listeners of a driver's steps: counts, metrics, statistics, journal. They are never in the way."""

from __future__ import annotations

from clockwork_serve.telemetry.counters import (
    Counters,
    GatewayCounters,
    Histogram,
    decode,
    encode,
    outcome_key,
)
from clockwork_serve.telemetry.journal import Journal, Step, read_journal
from clockwork_serve.telemetry.metrics import CONTENT_TYPE, render
from clockwork_serve.telemetry.recorder import Listener, Recorder
from clockwork_serve.telemetry.statistics import model_statistics

__all__ = [
    "CONTENT_TYPE", "Counters", "GatewayCounters", "Histogram", "Journal", "Listener", "Recorder", "Step",
    "decode", "encode", "model_statistics", "outcome_key", "read_journal", "render",
]  # fmt: skip
