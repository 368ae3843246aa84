"""Lines of trace files: line ends, compression, what is broken."""

from __future__ import annotations

import gzip
import re

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.workload.trace_files import header_of, lines


def test_line_ends_may_be_mixed_and_blank_lines_are_passed_over(tmp_path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\n\n3,4\r\n  \n5,6")

    assert list(lines(file)) == [(1, b"a,b"), (2, b"1,2"), (4, b"3,4"), (6, b"5,6")]


@pytest.mark.parametrize("data", [b"a\n1,2\r3,4\n", b"a\n1\r\r\n", b"a\n1\r"[:-1] + b"\r2"])
def test_a_lone_carriage_return_is_refused_with_its_line(tmp_path, data) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(data)

    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(file))}:2: line end: expected .*found 'a lone \\\\r'"
    ):
        list(lines(file))


def test_a_file_of_another_age_is_told_by_its_one_long_line(tmp_path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"1,2\r" * (1 << 19))

    with pytest.raises(ConfigError, match=r"t.csv:1: line: expected at most 1048576 bytes, found .*lone"):
        list(lines(file))


def test_gzip_is_unpacked_by_its_name(tmp_path) -> None:
    file = tmp_path / "t.csv.gz"
    file.write_bytes(gzip.compress(b"a\n1\n"))

    assert list(lines(file)) == [(1, b"a"), (2, b"1")]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"a,b\n" + data, lambda data: data[:20] + b"zzzz"]
)
def test_broken_gzip_is_named(tmp_path, damage) -> None:
    file = tmp_path / "t.csv.gz"
    file.write_bytes(damage(gzip.compress(bytes(range(200)).replace(b"\r", b"") * 50)))

    with pytest.raises(ConfigError, match=r"t.csv.gz:\d+: file: expected whole gzip data, found"):
        list(lines(file))


def test_an_empty_file_has_no_header(tmp_path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"")

    with pytest.raises(ConfigError, match=r"t.csv:1: header: expected .* found an empty file"):
        header_of(file)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"t.csv: expected a readable trace file, found: No such file"):
        list(lines(tmp_path / "t.csv"))
