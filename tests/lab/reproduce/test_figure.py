"""A figure as a record: its JSON, and what makes a claim met."""

from __future__ import annotations

import json

import pytest

from clockwork_lab.reproduce.figure import PaperClaim, SeriesRole, curve, value
from tests.lab.reproduce.figures import OURS, figure


def test_the_json_has_the_series_of_all_panels_and_the_claims():
    record = json.loads(figure().to_json())

    assert list(record) == ["figure", "setup", "series", "claims"]
    assert record["setup"] == {
        "title": "a title", "question": "a question?",
        "seed": 1, "workload": ["a note"], "notes": ["something to know"],
    }  # fmt: skip
    assert [series["name"] for series in record["series"]] == [
        "goodput: published", "goodput: default", "goodput: limit", "latency: default",
    ]  # fmt: skip
    assert record["series"][0]["points"] == [{"x": 10, "y": 140}, {"x": 25, "y": 742}]
    assert record["claims"][1] == {
        "name": "agreement", "paper": 801, "ours": 700, "target": 801, "met": False, "sense": "+-",
        "tolerance": 80.1,
    }  # fmt: skip


def test_series_of_a_lone_panel_keep_their_names():
    record = json.loads(figure(panels=1).to_json())

    assert [series["name"] for series in record["series"]] == ["published", "default", "limit"]


def test_numbers_are_rounded_to_six_digits_and_none_stays():
    points = json.loads(figure(panels=1).to_json())["series"][1]["points"]

    assert points == [{"x": 10, "y": 0.333333}, {"x": 50, "y": None}]


@pytest.mark.parametrize(
    ("sense", "ours", "met"),
    [
        (">=", 10.0, True), (">=", 9.9, False), ("<=", 10.0, True), ("<=", 10.1, False),
        ("+-", 11.0, True), ("+-", 9.0, True), ("+-", 8.9, False), ("+-", 11.1, False),
        (">=", None, False), ("<=", None, False), ("+-", None, False),
    ],
)  # fmt: skip
def test_a_claim_is_met_as_its_sense_says(sense: str, ours: float | None, met: bool):
    assert PaperClaim(name="", paper=None, ours=ours, sense=sense, target=10.0, tolerance=1.0).met is met


def test_a_series_tells_its_value_where_it_has_one():
    assert OURS.at(10) == 1 / 3
    assert OURS.at(50) is None
    assert OURS.at(25) is None


def test_curves_are_as_published():
    goodput = curve("fig5", "Clockwork", "goodput_rps")

    assert goodput.role is SeriesRole.PAPER
    assert [(point.x, point.y) for point in goodput.points] == [
        (10, 140), (25, 742), (50, 801), (100, 801), (250, 785), (500, 801),
    ]  # fmt: skip
    assert value("fig11", "Clockwork", "goodput_rps", 110) == 103_387
    assert value("fig9", "failed", "failed", 0) == 58


@pytest.mark.parametrize(
    ("figure", "series", "y_name", "count"),
    [
        ("fig2", "median", "latency_ms", 5), ("fig6", "Major goodput", "goodput_rps", 16),
        ("fig7", "N=48 R=2400", "satisfaction", 8), ("fig8", "LS + 12 big-batch", "satisfaction", 8),
        ("fig10", "INFER duration over", "error_ms", 5), ("fig11", "Clockwork", "goodput_rps", 15),
    ],
)  # fmt: skip
def test_every_figure_has_its_points(figure: str, series: str, y_name: str, count: int):
    found = curve(figure, series, y_name).points

    assert len(found) == count
    assert sorted(point.x for point in found) == [point.x for point in found]


def test_a_curve_that_was_not_published_is_an_error():
    with pytest.raises(KeyError):
        curve("fig5", "nobody", "goodput_rps")
    with pytest.raises(KeyError):
        value("fig5", "Clockwork", "goodput_rps", 11)
