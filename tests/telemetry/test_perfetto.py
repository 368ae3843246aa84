"""The trace format: it is described as by Perfetto, and foreign text does not break a file."""

from __future__ import annotations

import io

import pytest

from clockwork_serve.telemetry.perfetto import _SCHEMA, SliceRows, StateTrack, TraceFile, message_classes
from tests.telemetry.traces import Trace, format_, read_trace

HOSTILE = [
    "\x1b[2J\x00\r\n", "<script>alert(1)</script>", "x" * 10_000, "\ud800", "\u202egnp.exe",
    "'; drop table slice;--", "", "äöü 模型 🚀",
]  # fmt: skip


def written(draw) -> Trace:
    out = io.BytesIO()
    file = TraceFile(out)
    draw(file)
    file.flush()
    return read_trace(out.getvalue())


@pytest.mark.parametrize("name", message_classes(_SCHEMA))
def test_every_field_is_as_perfetto_describes_it(name: str) -> None:
    """Texts that are written once are bytes in one of their tables; on the wire that is the same."""
    ours = message_classes(_SCHEMA)[name].DESCRIPTOR
    theirs = {
        "Clock": format_.ClockSnapshot.Clock, "Interned": format_.EventName,
    }.get(name) or getattr(format_, name)  # fmt: skip

    assert ours.fields
    for field in ours.fields:
        other = theirs.DESCRIPTOR.fields_by_number[field.number]
        assert (field.name, field.is_repeated) == (other.name, other.is_repeated)
        assert field.type in {other.type, field.TYPE_INT32 if other.type == field.TYPE_ENUM else other.type}
    for interned in (format_.EventCategory, format_.DebugAnnotationName, format_.InternedString):
        iid, text = (interned.DESCRIPTOR.fields_by_number[number] for number in (1, 2))
        assert (iid.name, iid.type) == ("iid", iid.TYPE_UINT64)
        assert text.type in {text.TYPE_STRING, text.TYPE_BYTES}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_foreign_text_is_made_printable(text: str) -> None:
    def draw(file: TraceFile) -> None:
        track = file.track(text)
        file.begin(track, text, "request", 1, {"model": text, "message": text})
        file.end(track, 2)

    (one,) = written(draw).drawn

    for found in (*one.track, one.name, one.args["model"], one.args["message"]):
        assert found.isprintable()
        assert len(found) <= 1000
        assert text.isprintable() == (
            found == text or found == text[:197] + "..." or found == text[:997] + "..."
        )


def test_values_keep_their_types() -> None:
    args = {"flag": True, "count": -3, "ms": 0.25, "text": "t", "huge": 1 << 70, "model": "m"}

    def draw(file: TraceFile) -> None:
        file.instant(file.track("t"), "n", "k", 5, args)

    (one,) = written(draw).drawn
    assert one.args == {**args, "huge": (1 << 63) - 1}
    assert type(one.args["flag"]) is bool


def test_a_text_is_written_once() -> None:
    out = io.BytesIO()
    file = TraceFile(out)
    track = file.track("t")
    for at_ns in range(2000):
        file.instant(
            track, "a name of some length", "a kind", at_ns, {"model": "resnet50/1", "an argument": 1.5}
        )
    file.flush()

    assert out.getvalue().count(b"a name of some length") == 1
    assert out.getvalue().count(b"resnet50/1") == 1
    assert len(out.getvalue()) < 2000 * 60
    assert len(read_trace(out.getvalue()).drawn) == 2000


def test_slices_of_a_row_do_not_overlap() -> None:
    def draw(file: TraceFile) -> None:
        rows = SliceRows(file, "row", 0)
        for begin_ns, end_ns in [(0, 10), (5, 15), (10, 20), (15, 15), (15, 18), (3, 30), (40, 35)]:
            rows.slice("s", "k", begin_ns, end_ns, {})

    trace = written(draw)

    assert {one.depth for one in trace.drawn} == {0}
    assert len(trace.tracks) == 3
    assert (trace.drawn[-1].begin_ns, trace.drawn[-1].end_ns) == (40, 40)


def test_a_state_lasts_until_the_next() -> None:
    def draw(file: TraceFile) -> None:
        state = StateTrack(file, "state", 0)
        file.since_ns, file.until_ns = 15, 45
        for name, at_ns in [("a", 0), ("b", 10), ("c", 20), ("", 30), ("d", 40), ("e", 50), ("", 60)]:
            state.become(name, at_ns)

    assert [(one.name, one.begin_ns, one.end_ns) for one in written(draw).drawn] == [
        ("b", 15, 20), ("c", 20, 30), ("d", 40, 45),
    ]  # fmt: skip
