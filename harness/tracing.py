"""Sends the requests of a journal that grows to a collector of traces, as a process beside its server.

``python -m harness.tracing JOURNAL URL`` goes on until SIGINT, and prints what it did as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from clockwork_serve.telemetry import JournalFollower, numbered
from clockwork_serve.telemetry.otlp import OtlpExporter, otlp_target
from clockwork_serve.telemetry.spans import RequestTraces, Spans, host_offset_ns

POLL_S = 0.2


def follow(journal: Path, url: str) -> dict[str, float]:
    """Send what ends from now on, until SIGINT; returns counts."""
    stops: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))
    target = otlp_target(url, os.environ)
    exporter = OtlpExporter(target)
    spans = Spans(exporter.offer, 1.0, host_offset_ns(), time.time_ns())
    feed, follower = RequestTraces(journal, spans), JournalFollower(journal)
    ending = False
    while not ending:
        ending, now_ns = bool(stops), time.monotonic_ns()
        for _, record in numbered(follower):
            feed.on_record(record)
        feed.on_idle(now_ns)
        time.sleep(POLL_S)
    feed.close()
    follower.close()
    exporter.close(2 * target.timeout_s)
    return {
        "requests": spans.requests, "sent": exporter.sent, "failed": exporter.failed,
        "dropped": exporter.dropped, "cpu_s": time.process_time(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(follow(Path(sys.argv[1]), sys.argv[2])))
