"""Listeners of a driver's steps: counters, metrics, statistics, journal."""

from __future__ import annotations

from clockwork_serve.telemetry.counters import (
    Counters,
    GatewayCounters,
    Histogram,
    decode,
    encode,
    outcome_key,
)
from clockwork_serve.telemetry.following import (
    JournalFollower,
    gateway_answer,
    numbered,
    read_journal,
    read_records,
)
from clockwork_serve.telemetry.journal import Journal, JournalHead, Step, Torn, head_of, refusals_path
from clockwork_serve.telemetry.metrics import CONTENT_TYPE, OPENMETRICS_TYPE, render, render_standby
from clockwork_serve.telemetry.recorder import Recorder

__all__ = [
    "CONTENT_TYPE", "OPENMETRICS_TYPE", "Counters", "GatewayCounters", "Histogram", "Journal",
    "JournalFollower", "JournalHead", "Recorder", "Step", "Torn", "decode", "encode", "gateway_answer",
    "head_of", "numbered", "outcome_key", "read_journal", "read_records", "refusals_path", "render",
    "render_standby",
]  # fmt: skip
