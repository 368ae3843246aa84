"""Traces of single calls: how times are written, and that they come in order whatever the file's order."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload import trace_files as timestamps
from clockwork_serve.workload.trace_files import columns_of, rows_timestamps, survey

LLM = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


def written(tmp_path, text):
    file = tmp_path / "t.csv"
    file.write_text(text)
    return file


def test_the_azure_llm_format_is_read_to_its_last_decimal(tmp_path) -> None:
    (_, first, *_), (_, second, *_) = rows_timestamps(written(tmp_path, LLM.replace("\n", "\r\n")))

    assert second - first == 4_314_579_000


@pytest.mark.parametrize(
    "text",
    [
        "seconds\n1.5\n2\n", "1.5\n2\n", "TIMESTAMP\n1.5\n2\n", "x,Seconds\n0,1.5\n0,2\n", "time\n1.5\n2\n",
        "timestamp\n1970-01-01T00:00:01.5\n1970-01-01 00:00:02Z\n",
        "timestamp\n1970-01-01 01:00:01.500+01:00\n1969-12-31 23:30:02.0-0030\n",
    ],
)  # fmt: skip
def test_times_are_written_in_many_ways(tmp_path, text) -> None:
    assert [at for _, at, *_ in rows_timestamps(written(tmp_path, text))] == [1_500_000_000, 2 * NS_PER_S]


def test_mooncakes_lines_are_read_as_they_come(tmp_path) -> None:
    file = written(
        tmp_path, '{"timestamp": 1500, "input_length": 6, "hash_ids": [1]}\n{"timestamp": 2000.5}\n'
    )

    assert list(rows_timestamps(file)) == [(1, 1_500_000_000, b"", 0), (2, 2_000_500_000, b"", 0)]
    assert columns_of(file) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"timestamp": 1}\n{"time": 2}\n', ':2: row: expected {"timestamp": MS, ...}'),
        ('{"timestamp": 1}\n{"timestamp": -2}\n', ":2: timestamp: expected ms, less than 4000000000000"),
        ("version https://git-lfs.github.com/spec/v1\n", ":1: file: expected a trace, found 'a pointer"),
        ("seconds,slo_ms\n1,0\n", ":2: slo_ms: expected milliseconds, 0.001 to 86400000, found '0'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_other_forms_is_named(tmp_path, text, said) -> None:
    file = written(tmp_path, text)

    with pytest.raises(ConfigError) as caught:
        list(rows_timestamps(file))

    assert f"{file}{said}" in str(caught.value)


def test_a_call_may_have_an_slo_of_its_own(tmp_path) -> None:
    file = written(tmp_path, 'time,model,SLO_ms\n1,"f",2.5\n2,g,\n')

    assert list(rows_timestamps(file)) == [(2, NS_PER_S, b"f", 2_500_000), (3, 2 * NS_PER_S, b"g", 0)]


def test_a_column_of_functions_is_found(tmp_path) -> None:
    file = written(tmp_path, "Function,timestamp\nf,1\ng,2\n")

    assert columns_of(file).function == 0
    assert [name for _, _, name, _ in rows_timestamps(file)] == [b"f", b"g"]
    assert columns_of(written(tmp_path, LLM)).function is None


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("when,x\n1,2\n", 1, "header: expected a column TIMESTAMP, time or seconds, found 'when,x'"),
        ("seconds,x\n1,2\n3\n", 3, "row: expected 2 fields, as the first line has, found 1"),
        ("seconds\n1\nnan\n", 3, "time: expected seconds, of less than 4000000000, found 'nan'"),
        ("seconds\n1\n1e10\n", 3, "time: expected seconds, of less than 4000000000, found '1e10'"),
        ("TIMESTAMP\n2023-13-16 18:15:46.6805900\n", 2, "TIMESTAMP: expected a time such as 2023-11-16"),
        ("TIMESTAMP\n2023-11-16 18:15\n", 2, "TIMESTAMP: expected a time such as 2023-11-16"),
        ("1\ntwo\n", 2, "time: expected seconds, of less than 4000000000, found 'two'"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_field(tmp_path, text, line, message) -> None:
    file = written(tmp_path, text)

    with pytest.raises(ConfigError, match=re.escape(f"{file}:{line}: {message}")):
        list(rows_timestamps(file))


@settings(max_examples=50)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 5_000), st.sampled_from([b"f", b"g", b"h"])), min_size=1, max_size=300
    ),
    chunk=st.integers(1, 50),
    first=st.integers(0, 3),
    minutes=st.none() | st.integers(1, 40),
)
def test_calls_come_in_order_whatever_the_order_of_the_file(calls, chunk, first, minutes) -> None:
    rows = [(line, at * NS_PER_S // 2, name, line) for line, (at, name) in enumerate(calls, start=2)]
    origin = min(at for _, at, *_ in rows) + first * 60 * NS_PER_S
    until = 1 << 62 if minutes is None else origin + minutes * 60 * NS_PER_S
    inside = [(at - origin, name, slo) for _, at, name, slo in rows if origin <= at < until]
    if not inside:
        with pytest.raises(ConfigError, match="first_minute: expected calls after minute"):
            survey(None, lambda: iter(rows), first, minutes)
        return
    trace = survey(None, lambda: iter(rows), first, minutes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timestamps, "_CHUNK", chunk)
        parts = list(trace.chunks())

    read = [
        (at, trace.names[who], slo)
        for _, times, whose, slos in parts
        for at, who, slo in zip(times.tolist(), whose, slos.tolist(), strict=True)
    ]
    assert read == sorted(inside, key=lambda call: call[0])
    done = 0
    for until_ns, times, *_ in parts:
        assert times.size == 0 or times[-1] < until_ns
        done += times.size
        assert all(at >= until_ns for at, *_ in read[done:])
    assert trace.volumes.sum() == len(inside)
    assert (np.diff(trace.volumes) <= 0).all()


def test_what_is_held_is_as_long_as_the_files_disorder(monkeypatch) -> None:
    rows = [
        (line, line * 1_000_000 - (500_000_000 if line % 7 == 0 else 0), b"f", 0)
        for line in range(600, 100_000)
    ]
    trace = survey(None, lambda: iter(rows), 0, None)
    monkeypatch.setattr(timestamps, "_CHUNK", 100)

    assert trace.disorder_ns == 499_000_000
    assert max(times.size for _, times, *_ in trace.chunks()) < 2_500


def test_an_order_of_another_day_is_refused(tmp_path) -> None:
    file = written(tmp_path, "seconds\n100000\n1\n")

    with pytest.raises(
        ConfigError, match=r"t.csv:3: time: expected at most 86400 s less than in a row before"
    ):
        survey(file, lambda: rows_timestamps(file), 0, None)


def test_a_header_alone_is_no_trace(tmp_path) -> None:
    file = written(tmp_path, "seconds\n")

    with pytest.raises(ConfigError, match=r"t.csv:2: row: expected at least one call, found none"):
        survey(file, lambda: rows_timestamps(file), 0, None)
