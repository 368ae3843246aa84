"""The figure, its page and the sentences of the README say what the runs found, where we lose included."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from comparison.headline import show
from harness.report import between_marks
from tests.comparison.headline.lines import line

WINS = [
    line("clockwork", 0.5, 50), line("clockwork", 2, 90, 80), line("fastapi", 0.5, 50),
    line("fastapi", 2, 40, 150, figures={"late": 200}),
]  # fmt: skip


def test_the_best_of_each_row_is_bold_whoever_it_is() -> None:
    lines = [*WINS, line("triton", 0.5, 60, cpu_ms_per_request=4.0), line("triton", 2, 80, 20)]
    rows = show.summary(lines).splitlines()

    assert rows[0] == "|  | Clockwork Serve | FastAPI with ONNX Runtime | Triton |"
    assert "| answers in time a second, load 0.5 | 50.0 | 50.0 | **60.0** |" in rows
    assert "| answers in time a second, load 2 | **90.0** | 40.0 | 80.0 |" in rows
    assert "| answers too late, of all requests, load 2 | **0.0%** | 20.0% | **0.0%** |" in rows
    assert "| age of a no, load 2 | 80 ms | 150 ms | **20 ms** |" in rows
    assert "| CPU of a request, load 0.5 | 5.0 ms | 5.0 ms | **4.0 ms** |" in rows


def test_the_words_say_what_a_load_of_1_is() -> None:
    assert "A load of 1 is 100 requests a second" in show.words(WINS)


def test_a_disturbed_run_is_marked_in_the_picture_the_table_and_the_sentence() -> None:
    lines = [*WINS, line("clockwork", 2, 91, 81, noise=["others used 9% of the two cores"])]

    assert "hollow" in show.drawing(lines).partition("</style>")[2]
    assert "| 2, 1 disturbed |" in show.table(lines)
    assert "Other programs disturbed 1 of 5 runs." in show.words(lines)


def test_the_picture_has_both_panels_and_each_server() -> None:
    words = [one.text for one in ET.fromstring(show.drawing(WINS)).iter("{http://www.w3.org/2000/svg}text")]

    assert {"Answers within 200 ms, a second", "Age of a no, ms", "SLO", "the model alone"} <= set(words)
    assert words.count("Clockwork Serve") == words.count("FastAPI + ORT") == 2


def test_the_page_says_how_each_server_is_configured() -> None:
    text = show.page(WINS)

    assert "load 1: 100 requests a second" in text
    assert "429 if more requests wait" in text


def test_readme_and_figure_are_those_of_the_runs_that_are_kept() -> None:
    lines, readme = show.read(), show.README.read_text()

    assert readme == between_marks(readme, show.block(lines), show.MARKS), f"{show.COMMAND} --draw"
    assert show.FIGURE.is_file() == show.PAGE.is_file() == bool(lines)
    if lines:
        assert show.FIGURE.read_text() == show.drawing(lines)
        assert show.PAGE.read_text() == show.page(lines)
