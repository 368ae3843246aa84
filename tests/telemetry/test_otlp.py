"""Spans to a collector: as OpenTelemetry describes them; whatever it does, it costs counted spans alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from clockwork_serve.errors import ConfigError
from clockwork_serve.telemetry.otlp import (
    _SCHEMA,
    QUEUE_SPANS,
    ExportFailed,
    OtlpExporter,
    OtlpTarget,
    encode_spans,
    export,
    message,
    otlp_target,
)
from clockwork_serve.telemetry.spans import Span
from harness.collector import collecting
from tests.telemetry import collectors
from tests.telemetry.collectors import hostile
from tests.timing import Timing

THEIRS = {
    "OtlpSpan": trace_pb2.Span, "Link": trace_pb2.Span.Link, "SpanStatus": trace_pb2.Status,
    "Scope": common_pb2.InstrumentationScope, "PartialSuccess": trace_service_pb2.ExportTracePartialSuccess,
}  # fmt: skip
NUMBERS = count(1)


def span(name: str = "clockwork.request", **more) -> Span:
    number = next(NUMBERS)
    given = {
        "trace_id": number.to_bytes(16), "span_id": number.to_bytes(8), "parent_id": b"", "start_ns": 1,
        "end_ns": 2, "attributes": {},
    }  # fmt: skip
    return Span(name=name, **given | more)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("name", _SCHEMA)
def test_every_field_is_as_opentelemetry_describes_it(name: str) -> None:
    ours = message(name).DESCRIPTOR
    theirs = THEIRS.get(name)
    for module in (trace_service_pb2, trace_pb2, common_pb2, resource_pb2):
        theirs = theirs or getattr(module, name, None)

    assert ours.fields
    for field in ours.fields:
        other = theirs.DESCRIPTOR.fields_by_number[field.number]
        assert (field.name, field.is_repeated) == (other.name, other.is_repeated)
        assert field.type == (field.TYPE_INT32 if other.type == field.TYPE_ENUM else other.type)


def test_a_span_arrives_as_it_is() -> None:
    told = {"a": "text", "b": True, "c": -3, "d": 0.5, "huge": 1 << 70, "odd": "\x1b[2J\ud800"}
    one = span(
        parent_id=b"p" * 8,
        attributes=told,
        error="rejected: late",
        links=((b"t" * 16, b"s" * 8),),
        state="a=1",
    )

    found = trace_service_pb2.ExportTraceServiceRequest.FromString(
        encode_spans([one, span("clockwork.exec")])
    )

    (group,) = found.resource_spans
    named = {each.key: each.value.string_value for each in group.resource.attributes}
    assert named["service.name"] == "clockwork"
    first, second = group.scope_spans[0].spans
    assert (first.trace_id, first.span_id, first.parent_span_id) == (one.trace_id, one.span_id, b"p" * 8)
    assert (first.name, first.trace_state, first.kind, second.kind) == (
        "clockwork.request", "a=1", trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_INTERNAL,
    )  # fmt: skip
    assert (first.start_time_unix_nano, first.end_time_unix_nano) == (1, 2)
    assert (first.status.code, first.status.message) == (trace_pb2.Status.STATUS_CODE_ERROR, "rejected: late")
    assert (first.links[0].trace_id, first.links[0].span_id) == (b"t" * 16, b"s" * 8)
    values = {each.key: each.value for each in first.attributes}
    assert (values["a"].string_value, values["b"].bool_value, values["c"].int_value) == ("text", True, -3)
    assert (values["d"].double_value, values["huge"].int_value) == (0.5, (1 << 63) - 1)
    assert values["odd"].string_value.isprintable()


# Where to


def test_the_environment_is_heeded_as_specified() -> None:
    general = {
        "OTEL_EXPORTER_OTLP_HEADERS": "a=b%20c, d=e",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "500", "OTEL_EXPORTER_OTLP_CERTIFICATE": "ca.pem",
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "me.pem", "OTEL_EXPORTER_OTLP_CLIENT_KEY": "me.key",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_SERVICE_NAME": "mine",
    }  # fmt: skip

    assert otlp_target("http://one:4318/", general) == OtlpTarget(
        url="http://one:4318/v1/traces", headers={"a": "b c", "d": "e"}, timeout_s=0.5, gzip=True,
        ca="ca.pem", certificate="me.pem", key="me.key", service="mine",
    )  # fmt: skip
    of_traces = general | {"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "9"}
    assert otlp_target("http://one:4318/v1/traces", of_traces).timeout_s == 0.009


@pytest.mark.parametrize("url", ["collector:4318", "ftp://x", "http://", "http://x:99999", "http://a b/"])
def test_what_is_no_url_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        otlp_target(url, {})


@pytest.mark.parametrize("name", ["HEADERS", "TIMEOUT"])
def test_a_wrong_variable_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match=f"OTEL_EXPORTER_OTLP_{name}"):
        otlp_target("http://x", {f"OTEL_EXPORTER_OTLP_{name}": "=\x01"})


def test_headers_and_compression_are_sent() -> None:
    with collecting() as collector:
        assert export(OtlpTarget(url=f"{collector.url}/v1/traces?x=1", headers={"api-key": "k"}, gzip=True),
                      encode_spans([span()])) == 0  # fmt: skip

    (head,) = collector.heads
    assert (head["api-key"], head["Content-Type"]) == ("k", "application/x-protobuf")
    assert collector.paths == ["/v1/traces?x=1"]
    assert len(collector.spans) == 1


# Collectors that are down, slow or hostile


HOSTILE = [
    collectors.never_answers, collectors.never_reads, collectors.answers_garbage,
    collectors.answers_a_byte_at_a_time, collectors.answers_without_end, collectors.has_heads_without_end,
    collectors.hangs_up,
]  # fmt: skip


@pytest.mark.parametrize("behave", HOSTILE)
def test_a_hostile_collector_costs_no_more_than_the_time_limit(behave, timing: Timing) -> None:
    body = encode_spans([span(attributes={"long": "x" * 999}) for _ in range(5000)])
    with hostile(behave) as url:
        began = time.monotonic()
        try:
            export(OtlpTarget(url=url, timeout_s=0.5), body)
            taken = (
                behave is collectors.answers_without_end
            )  # who sends more than is read has said 200 before
        except ExportFailed:
            taken = True

        took_s = time.monotonic() - began

    assert taken
    with timing.judged():
        assert took_s < 2


def test_words_that_cannot_be_read_refuse_nothing() -> None:
    with hostile(collectors.answers_garbage_in_http) as url:
        assert export(OtlpTarget(url=url, timeout_s=5), encode_spans([span()])) == 0


def test_a_handshake_without_end_is_cut(tmp_path: Path, timing: Timing) -> None:
    with hostile(collectors.answers_a_byte_at_a_time) as url:
        began = time.monotonic()
        with pytest.raises(ExportFailed):
            export(OtlpTarget(url=url.replace("http:", "https:"), timeout_s=0.5), b"")
        took_s = time.monotonic() - began

    with timing.judged():
        assert took_s < 2


@pytest.mark.parametrize("status", [301, 307, 400, 404, 500])
def test_what_is_refused_is_not_sent_again_and_no_redirect_followed(status: int) -> None:
    with collecting(status) as collector:
        exporter = OtlpExporter(OtlpTarget(url=collector.url))
        exporter.offer([span(), span()])
        exporter.close()

    assert (exporter.sent, exporter.failed, exporter.dropped) == (0, 2, 0)
    assert len(collector.heads) == 1


def test_what_a_collector_refuses_in_part_is_counted() -> None:
    with collecting(refused=2) as collector:
        exporter = OtlpExporter(OtlpTarget(url=collector.url))
        exporter.offer([span() for _ in range(5)])
        exporter.close()

    assert (exporter.sent, exporter.failed) == (3, 2)


def test_what_is_busy_is_asked_again() -> None:
    with collecting(503) as collector:
        exporter = OtlpExporter(OtlpTarget(url=collector.url), pause_s=0.01)
        exporter.offer([span()])
        until(lambda: collector.heads)
        collector.status = 200
        until(lambda: exporter.sent)
        exporter.close()

    assert (exporter.sent, exporter.failed, exporter.why) == (1, 0, "")


def test_a_queue_that_is_full_drops_what_comes_and_waits_for_nobody(timing: Timing) -> None:
    with hostile(collectors.never_answers) as url:
        exporter = OtlpExporter(OtlpTarget(url=url, timeout_s=0.2), pause_s=30)
        slowest_s = 0.0
        for _ in range(QUEUE_SPANS // 1000 + 5):
            spans = [span() for _ in range(1000)]
            began = time.monotonic()
            exporter.offer(spans)
            slowest_s = max(slowest_s, time.monotonic() - began)
        began = time.monotonic()
        exporter.close(1.0)
        took_s = time.monotonic() - began

    with timing.judged():
        assert took_s < 3
        assert slowest_s < 0.1
    assert exporter.dropped == 5000
    assert exporter.sent == 0
    assert exporter.failed == QUEUE_SPANS


def test_who_is_down_costs_counted_spans() -> None:
    exporter = OtlpExporter(OtlpTarget(url="http://127.0.0.1:1"), pause_s=0.001)
    exporter.offer([span(), span(), span()])
    until(lambda: exporter.failed)
    exporter.close()

    assert (exporter.sent, exporter.failed) == (0, 3)
    assert exporter.why
