"""``clockwork traces``: the requests of a journal as spans, to a collector."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from clockwork_serve.cli.options import json_flag
from clockwork_serve.cli.screen import INTERRUPTED, interruptible, note, say, show_json
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.units import counted

if TYPE_CHECKING:
    from clockwork_serve.telemetry.otlp import OtlpExporter
    from clockwork_serve.telemetry.spans import RequestTraces, Spans

POLL_S: Final = 0.2
_PATIENCE_S: Final = 0.01


@click.command(epilog="What is in them: clockwork docs traces (docs/operate/traces.md)")
@click.argument("journal", metavar="JOURNAL")
@click.option(
    "--endpoint", envvar="CLOCKWORK_OTLP_ENDPOINT", default="", metavar="URL",
    help="The collector, such as http://127.0.0.1:4318. [default: what OTEL_EXPORTER_OTLP_ENDPOINT says]",
)  # fmt: skip
@click.option(
    "--sample", type=click.FloatRange(0, 1), default=1.0, show_default=True, metavar="SHARE",
    help="Share of the requests that ended well; all others are always sent.",
)  # fmt: skip
@click.option("--follow", is_flag=True, help="Send what ends from now on, until Ctrl-C.")
@json_flag
def traces(journal: str, endpoint: str, sample: float, follow: bool, as_json: bool) -> int:  # noqa: FBT001
    """Send the requests of JOURNAL to a collector of traces, by OTLP over HTTP.

    JOURNAL is the --journal of a server or a simulation. The files beside it, in which gateways keep what
    they refused by themselves, are read as well. OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _CERTIFICATE and the
    like are heeded.
    """
    from clockwork_serve.telemetry.journal import journal_bytes
    from clockwork_serve.telemetry.otlp import OtlpExporter, otlp_target
    from clockwork_serve.telemetry.spans import RequestTraces, Spans, host_offset_ns

    target = otlp_target(endpoint, os.environ)
    if target is None:
        raise ConfigError("endpoint: expected the URL of a collector, found none; give --endpoint")
    if not follow:
        journal_bytes(Path(journal))
    exporter = OtlpExporter(target)
    spans = Spans(exporter.offer, sample, host_offset_ns(), time.time_ns() if follow else 0)
    feed = RequestTraces(Path(journal), spans)
    with interruptible() as stopped:
        if follow:
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # a service is stopped so
            _follow(Path(journal), feed, stopped)
        else:
            _send_all(Path(journal), feed, exporter, stopped)
        interrupted = stopped()
    exporter.close(2 * target.timeout_s)
    _tell(spans, exporter, as_json=as_json)
    if interrupted and not follow:
        return INTERRUPTED
    return 1 if exporter.failed + exporter.dropped else 0


def _send_all(path: Path, feed: RequestTraces, exporter: OtlpExporter, stopped: Callable[[], bool]) -> None:
    """Read as fast as they are taken: here nobody else waits."""
    from clockwork_serve.telemetry import read_records
    from clockwork_serve.telemetry.otlp import QUEUE_SPANS

    def wait_for(queued: int) -> None:
        while exporter.queued > queued and not stopped():
            if exporter.failed and not exporter.sent:
                raise ClockworkError(
                    f"endpoint: expected a collector that takes spans, found: {exporter.why}"
                )
            time.sleep(_PATIENCE_S)

    for _, record in read_records(path):
        feed.on_record(record)
        wait_for(QUEUE_SPANS // 2)
        if stopped():
            return
    feed.close()
    wait_for(0)


def _follow(path: Path, feed: RequestTraces, stopped: Callable[[], bool]) -> None:
    """Read what is written, at idle priority, for the server goes first."""
    from clockwork_serve.telemetry import JournalFollower, numbered

    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    follower = JournalFollower(path)
    while True:
        ending, now_ns = stopped(), time.monotonic_ns()
        for _, record in numbered(follower):
            feed.on_record(record)
        feed.on_idle(now_ns)
        if ending:
            feed.close()
            follower.close()
            return
        time.sleep(POLL_S)


def _tell(spans: Spans, exporter: OtlpExporter, *, as_json: bool) -> None:
    if as_json:
        counts = {
            "requests": spans.requests, "refused": spans.refused, "late": spans.late,
            "unanswered": spans.unanswered, "missing_steps": spans.missing_steps, "sent": exporter.sent,
            "failed": exporter.failed, "dropped": exporter.dropped, "cpu_s": time.process_time(),
        }  # fmt: skip
        show_json(counts)
        return
    ended = f"{spans.refused:,} of them refused or failed, {spans.late:,} late"
    say(f"sent {counted(exporter.sent, 'span')}; read {counted(spans.requests, 'request')}, {ended}")
    if spans.missing_steps:
        note(f"never written, for the disk was too slow: {counted(spans.missing_steps, 'step')}")
    if exporter.failed:
        note(f"not taken by the collector: {counted(exporter.failed, 'span')}; the last time: {exporter.why}")
    if exporter.dropped:
        note(f"dropped, for the collector was too slow: {counted(exporter.dropped, 'span')}")
