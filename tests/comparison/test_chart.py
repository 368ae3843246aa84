"""Pictures are well-formed, and what they show is where it belongs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

from comparison.chart import LABEL_PX, Chart, Spread, picture, round_step


def test_a_picture_can_be_read_and_follows_the_reader_s_colours() -> None:
    chart = Chart(100, 200)

    text = picture(
        "p", [*chart.axes("title", "words", "across"), *chart.curve("triton", "T", [(0, 0), (9, 9)])]
    )

    words = [one.text for one in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert {"title", "words", "across", "T"} <= set(words)
    assert "prefers-color-scheme: dark" in text


def test_panels_do_not_overlap() -> None:
    upper, lower = Chart(10, 10, top=50, bottom=100), Chart(10, 10, top=200, bottom=300)

    assert upper.at(0, 0)[1] == 100
    assert upper.at(0, 10)[1] == 50
    assert lower.at(10, 10)[1] == 200


def test_a_spread_has_a_bar_from_the_least_to_the_most_and_a_disturbed_one_a_hollow_mark() -> None:
    chart = Chart(10, 100, top=0, bottom=100)

    text = "\n".join(chart.spreads("triton", [Spread(1, 10, 20, 30), Spread(2, 40, 40, 40, hollow=True)]))

    assert 'y1="90.0"' in text
    assert 'y2="70.0"' in text
    assert text.count('class="triton-fill"') == 1
    assert text.count("hollow") == 1


def test_names_of_curves_that_end_at_one_height_stand_below_each_other() -> None:
    text = "\n".join(Chart(10, 100).labels([("a", "A", 50.0), ("b", "B", 50.0), ("c", "C", 90.0)]))

    heights = sorted(float(y) for y in re.findall(r' y="([\d.]+)"', text))
    assert all(after - before >= LABEL_PX for before, after in pairwise(heights))


def test_an_axis_has_few_ticks() -> None:
    assert [round_step(most) for most in (7, 130, 260, 5000)] == [1, 20, 50, 1000]
