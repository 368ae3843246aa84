"""Damage is done as it is said, and judged by what is answered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.damage import KINDS, change, in_one_process, right
from harness import repositories


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_a_file(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"a" * 5000)
    other.write_bytes(b"b" * 3000)
    assert change(kind, path, [other], random.Random(1))
    assert path.read_bytes() != b"a" * 5000
    assert (other.read_bytes() == b"a" * 5000) == (kind == "swapped")


def test_other_numbers_are_no_answer() -> None:
    matrix = repositories.matrix_of(0, 256, 64)
    assert not right("m0", matrix[0])


def test_a_few_in_one_process_are_noticed_and_made_again(tmp_path: Path) -> None:
    tally = in_one_process(tmp_path, 12, random.Random(2))
    assert tally.done.total() == 12
    assert (tally.wrong, tally.unseen, tally.lost) == ([], [], [])
