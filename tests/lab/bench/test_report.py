"""Numbers of a report from records that are known, its words, and its file of records."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest

from clockwork_lab.bench.records import FIRST_ENDS, End, Kind, Records, head_of, read_records, write_records
from clockwork_lab.bench.report import BenchReport, closing_lines, group_rows
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S
from tests.lab.bench.loads import STEADY
from tests.lab.bench.reports import ALL, ANSWERED, ENDS, records, report


def test_each_request_is_in_one_count(tmp_path: Path) -> None:
    total = report(tmp_path, ALL).total
    assert (total.offered, total.good, total.late, total.rejected, total.reset) == (9, 2, 2, 1, 1)
    assert (total.abandoned, total.unanswered, total.unsent) == (1, 1, 1)
    assert total.satisfaction == 2 / 9
    assert (total.offered_rps, total.goodput_rps) == (9.0, 2.0)
    assert total.answers.max_ms == 101.0
    assert total.refusals.max_ms == 2.0


def test_lateness_is_from_due_to_sent_and_never_sent_is_late_to_the_end(tmp_path: Path) -> None:
    found = report(tmp_path, ALL)
    assert found.lateness.count == 9
    assert found.lateness.p50_ms == 0.1
    assert found.lateness.max_ms == 1000 + 1000 - 90  # the run, what was waited for answers
    assert not found.valid
    assert "p99 1910.000 ms after they were due, at most 1 ms are allowed" in found.invalid


def test_a_server_that_takes_no_connection_is_not_the_generators_lateness(tmp_path: Path) -> None:
    ends = (*FIRST_ENDS, End(Kind.BROKEN, "no connection: ECONNREFUSED"))
    found = Records(records(*[(at, 0, at + 1, 3) for at in range(100)]).table, ends)
    made = report(tmp_path, found)
    assert (made.total.broken, made.valid, made.lateness.count) == (100, True, 0)


@pytest.mark.parametrize(("most_ms", "valid"), [(0.09, False), (0.11, True)])
def test_a_run_is_valid_if_the_generator_was_in_time(tmp_path: Path, most_ms: float, valid: bool) -> None:
    rows = records(*[(at, at + 0.1, at + 5, ANSWERED) for at in range(0, 900, 10)])
    assert report(tmp_path, rows, max_lateness_ms=most_ms).valid == valid


def test_the_warm_up_counts_nowhere_but_over_time(tmp_path: Path) -> None:
    text = STEADY.replace("seconds = 1", "seconds = 1\nwarmup_s = 0.045")
    found = report(tmp_path, ALL, text=text)
    assert found.total.offered == 5
    assert found.measured_s == pytest.approx(0.955)
    assert found.stretches[0].offered == 9


def test_what_was_cut_is_measured_until_then(tmp_path: Path) -> None:
    found = report(tmp_path, ALL, cut_ms=500)
    assert found.cut
    assert found.measured_s == 0.5
    assert found.total.goodput_rps == 4.0
    assert "CUT after 0.5 s of 1 s" in closing_lines(found)


def test_what_was_cut_in_the_warm_up_says_when_and_claims_nothing(tmp_path: Path) -> None:
    text = STEADY.replace("seconds = 1", "seconds = 1\nwarmup_s = 0.9")
    found = report(tmp_path, ALL, cut_ms=500, text=text)
    assert (found.warmup_s, found.measured_s) == (0.5, 0.0)
    said = closing_lines(found)
    assert "CUT after 0.5 s of 1 s" in said
    assert "100 %" not in "".join(said)


def test_a_run_without_a_request_is_still_a_report(tmp_path: Path) -> None:
    found = report(tmp_path, records())
    assert (found.total.offered, found.valid, found.answers_curve) == (0, True, None)
    group_rows(found.models)


def test_the_report_is_json(tmp_path: Path) -> None:
    found = report(tmp_path, ALL)
    again = msgspec.json.decode(found.to_json(), type=BenchReport)
    assert again.total == found.total


def test_a_record_is_read_as_the_page_says(tmp_path: Path) -> None:
    about = {
        "scenario": "s", "url": "u", "seed": 1, "warmup_ns": 0, "end_ns": NS_PER_S, "models": ("m",),
        "loads": ("l",),
    }  # fmt: skip
    file = tmp_path / "record"
    write_records(file, head_of(ALL, **about), ALL)

    content = file.read_bytes()
    magic, length = struct.unpack_from("<8sI", content)
    head = msgspec.json.decode(content[12 : 12 + length])
    table = np.frombuffer(
        content, np.dtype([tuple(column) for column in head["row"]]), head["rows"], 12 + length
    )

    assert magic == b"CWBENCH1"
    assert (12 + length) % 64 == 0
    assert (table == ALL.table).all()
    assert head["ends"][3] == ["rejected", "429 <b>queue_full</b>"]
    _, again = read_records(file)
    assert again.ends == ENDS
    for broken in (content[:-1], b"x" + content[1:], content[:20], b""):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match="expected a"):
            read_records(file)
