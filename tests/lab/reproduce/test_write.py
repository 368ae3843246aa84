"""A figure as Markdown."""

from __future__ import annotations

import pytest

from clockwork_lab.reproduce.write import number, to_markdown
from tests.lab.reproduce.figures import figure


def test_the_page_has_claims_values_and_how_it_was_made():
    lines = to_markdown(figure()).splitlines()

    assert lines[0] == "# fig5: a title"
    assert "![a title](fig5.svg)" in lines
    assert "| goodput | 140 | 650 | >= 600 | yes |" in lines
    assert "| agreement | 801 | 700 | 801 ± 80.1 | **no** |" in lines
    assert "| SLO (ms) | published | default | limit |" in lines
    assert "| 10 | 140 | 0.333 | 681.4 |" in lines
    assert "| 25 | 742 | - | - |" in lines
    assert "| 50 | - | - | - |" in lines
    assert "- something to know" in lines
    assert lines[-3:] == ["- seed: 1", "- workload:", "  - a note"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (140.0, "140"), (103387.0, "103,387"), (1234.56, "1,235"), (0.9051, "0.905"),
     (0.0131, "0.0131"), (12.345, "12.35"), (2e-7, "2e-07")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str):
    assert number(value) == text
