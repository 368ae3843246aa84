"""The official Azure Functions files, as written and broken."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.workload.trace_files import is_2021, read_minutes, rows_2021

HEADER = "HashOwner,HashApp,HashFunction,Trigger"


def written(tmp_path, text, name="d1.csv"):
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def day(rows: dict[str, list[int]], first: int = 1) -> str:
    minutes = len(next(iter(rows.values())))
    header = ",".join([HEADER, *map(str, range(first, first + minutes))])
    return (
        "\n".join([header, *(f"o,a,{name},http," + ",".join(map(str, row)) for name, row in rows.items())])
        + "\n"
    )


def test_functions_are_sorted_by_their_calls_and_idle_ones_left_out(tmp_path) -> None:
    file = written(tmp_path, day({"few": [0, 1, 0], "many": [9, 0, 9], "none": [0, 0, 0], "also": [1, 0, 0]}))
    trace = read_minutes([file], 0, None, 3)

    assert trace.names == (b"o,a,many", b"o,a,also", b"o,a,few")
    assert trace.volumes.tolist() == [18, 1, 1]
    assert trace.counts.tolist() == [[9, 1, 0], [0, 0, 1], [9, 0, 0]]
    assert trace.minute(2).tolist() == [9, 0, 0]
    assert trace.minute(3) is None


def test_days_follow_one_another_and_functions_are_the_same_ones(tmp_path) -> None:
    one = written(tmp_path, day({"x": [1, 2], "y": [3, 4]}))
    two = written(tmp_path, day({"y": [5, 6], "z": [7, 8]}), "d2.csv.gz")
    trace = read_minutes([one, two], 0, None, 99)

    assert dict(zip(trace.names, trace.counts.T.tolist(), strict=True)) == {
        b"o,a,x": [1, 2, 0, 0], b"o,a,y": [3, 4, 5, 6], b"o,a,z": [0, 0, 7, 8],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "minutes", "kept"), [(0, None, 2), (1, 2, 9), (2, None, 1), (3, 1, 1), (1, 3, 0)]
)
def test_a_part_is_chosen_and_only_what_is_needed_is_kept(tmp_path, first, minutes, kept) -> None:
    counts = [10, 20, 30, 40]
    files = [written(tmp_path, day({"x": counts[:2]})), written(tmp_path, day({"x": counts[2:]}), "d2.csv")]
    trace = read_minutes(files, first, minutes, kept)

    chosen = counts[first:] if minutes is None else counts[first : first + minutes]
    assert trace.volumes.tolist() == [sum(chosen)]
    assert trace.minutes == len(chosen)
    assert trace.counts[:, 0].tolist() == chosen[:kept]


def test_columns_may_begin_anywhere_and_line_ends_may_be_mixed(tmp_path) -> None:
    text = day({"x": [1, 2, 3], "y": [4, 5, 6]}, first=480)
    file = written(tmp_path, text.replace("\n", "\r\n", 1))

    assert read_minutes([file], 0, None, 3).counts.T.tolist() == [[4, 5, 6], [1, 2, 3]]


def test_a_function_named_twice_is_one(tmp_path) -> None:
    file = written(tmp_path, f"{HEADER},1,2\no,a,f,http,1,2\no,a,f,timer,3,4\n")

    assert read_minutes([file], 0, None, 2).counts.tolist() == [[4], [6]]


GOOD = f"{HEADER},5,6,7\no,a,f,http,1,2,3\no,a,g,http,4,5,6\n"
WRONG = [
    ("5,6,7", "5,7,8", 1, "column 7: expected minute 6, without a gap, found '7'"),
    ("5,6,7", "5,6,6", 1, "column 6: expected minute 7, without a gap, found '6'"),
    ("5,6,7", "5,six,7", 1, "column 6: expected the number of a minute, found 'six'"),
    ("Trigger,5,6,7", "Trigger", 1, "column 5: expected the number of a minute, found 'nothing'"),
    ("HashApp,", "", 1, "column 2: expected HashApp, found 'HashFunction'"),
    ("4,5,6", "4,5", 3, "row: expected 7 fields, as the header has, found 6"),
    ("4,5,6", "4,5,6,7", 3, "row: expected 7 fields, as the header has, found 8"),
    ("4,5,6", "4,-5,6", 3, "minute 6: expected a whole number of calls in 0..2147483647, found '-5'"),
    ("4,5,6", "4,5.5,6", 3, "minute 6: expected a whole number of calls in 0..2147483647, found '5.5'"),
    ("4,5,6", "4,,6", 3, "minute 6: expected a whole number of calls in 0..2147483647, found ''"),
    ("4,5,6", "4,5,", 3, "minute 7: expected a whole number of calls in 0..2147483647, found ''"),
    ("4,5,6", ",5,6", 3, "minute 5: expected a whole number of calls in 0..2147483647, found ''"),
    ("4,5,6", "4,5,99999999999", 3, "minute 7: expected a whole number of calls in 0..2147483647"),
    ("4,5,6", "4,5,9999999999999999999999", 3, "minute 7: expected a whole number of calls in 0..2147483647"),
    ("4,5,6", "4,nan,6", 3, "minute 6: expected a whole number of calls in 0..2147483647, found 'nan'"),
    ("o,a,g,http,4,5,6", "garbage", 3, "row: expected 7 fields, as the header has, found 1"),
    ("4,5,6", "4,5\r,6", 3, "line end: expected"),
]


@pytest.mark.parametrize(("old", "new", "line", "message"), WRONG, ids=[new for _, new, *_ in WRONG])
def test_what_is_wrong_is_named_by_file_line_and_field(tmp_path, old, new, line, message) -> None:
    assert old in GOOD
    file = written(tmp_path, GOOD.replace(old, new))

    with pytest.raises(ConfigError, match=re.escape(f"{file}:{line}: {message}")):
        read_minutes([file], 0, None, 3)


def test_a_trace_without_calls_or_too_short_is_refused(tmp_path) -> None:
    file = written(tmp_path, day({"x": [0, 0, 1]}))

    with pytest.raises(
        ConfigError, match=r"d1.csv: expected at least one call in minutes 0 to 2, found none"
    ):
        read_minutes([file], 0, 2, 2)
    with pytest.raises(
        ConfigError, match=r"d1.csv: first_minute: expected less than the trace's 3 minutes, found 3"
    ):
        read_minutes([file], 3, None, 2)


def test_a_row_of_2021_came_at_its_end_less_its_duration(tmp_path) -> None:
    file = written(tmp_path, "app,func,end_timestamp,duration\na,f,10.5,0.25\na,g,10.75,10\n")

    assert is_2021(file)
    assert list(rows_2021(file)) == [(2, 10_250_000_000, b"a,f", 0), (3, 750_000_000, b"a,g", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,f,10", "row: expected 4 fields (app,func,end_timestamp,duration), found 3"),
        ("a,f,ten,1", "end_timestamp: expected seconds, of less than 4000000000, found 'ten'"),
        ("a,f,nan,1", "end_timestamp: expected seconds, of less than 4000000000, found 'nan'"),
        ("a,f,10,-1", "duration: expected seconds >= 0, found '-1'"),
    ],
)
def test_a_wrong_row_of_2021_is_named(tmp_path, row, message) -> None:
    file = written(tmp_path, f"app,func,end_timestamp,duration\na,f,1,1\n{row}\n")

    with pytest.raises(ConfigError, match=re.escape(f"{file}:3: {message}")):
        list(rows_2021(file))


def test_a_file_of_2019_is_none_of_2021(tmp_path) -> None:
    assert not is_2021(written(tmp_path, GOOD))


def test_a_large_count_survives(tmp_path) -> None:
    file = written(tmp_path, day({"x": [2**31 - 1, 2**31 - 1]}))

    assert read_minutes([file], 0, None, 2).volumes.tolist() == [2.0**32 - 2]
    assert read_minutes([file], 0, None, 2).counts.dtype == np.int32
