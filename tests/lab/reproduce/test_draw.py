"""The picture: the same bytes each time, with every curve in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.reproduce.figures import figure

pytest.importorskip(
    "matplotlib", reason="pictures need matplotlib: pip install './packages/clockwork-lab[figures]'"
)


def test_a_picture_is_the_same_each_time(tmp_path: Path):
    from clockwork_lab.reproduce.draw import COLOURS, draw
    from clockwork_lab.reproduce.figure import SeriesRole

    draw(figure(), tmp_path / "one.svg")
    draw(figure(), tmp_path / "two.svg")

    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    assert picture.lstrip().startswith("<?xml")
    assert COLOURS[SeriesRole.PAPER] in picture
    assert COLOURS[SeriesRole.DEFAULT] in picture
    assert "stroke-dasharray" in picture  # the limit
    assert "<dc:date>" not in picture
