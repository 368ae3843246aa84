"""A figure as Markdown."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clockwork_lab.reproduce.write import number, to_markdown
from tests.lab.reproduce.figures import figure

FIGURES = Path(__file__).resolve().parents[3] / "docs" / "figures"


def test_the_page_has_the_question_the_claims_and_how_it_was_made():
    lines = to_markdown(figure().record()).splitlines()

    assert lines[:5] == ["# fig5: a title", "", "a question?", "", "![a title](fig5.svg)"]
    assert "Met: 1 of 2." in lines
    assert "| goodput | 140 | 650 | >= 600 | yes |" in lines
    assert "| agreement | 801 | 700 | 801 ± 80.1 | **no** |" in lines
    assert "- something to know" in lines
    assert lines[-3].startswith("By `clockwork reproduce fig5`. [fig5.json](fig5.json) holds every point")
    assert lines[-1] == "- seed: 1"


@pytest.mark.parametrize("kept", sorted(FIGURES.glob("fig*.json")), ids=lambda path: path.stem)
def test_a_kept_page_is_what_its_data_gives(kept: Path):
    record = msgspec.json.decode(kept.read_bytes())

    assert kept.with_suffix(".md").read_text(encoding="utf-8") == to_markdown(record)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (140.0, "140"), (103387.0, "103,387"), (1234.56, "1,235"), (0.9051, "0.905"),
     (0.0131, "0.0131"), (12.345, "12.35"), (2e-7, "2e-07")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str):
    assert number(value) == text
