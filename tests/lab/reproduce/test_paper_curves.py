"""The published numbers that come with the package."""

from __future__ import annotations

import pytest

from clockwork_lab.reproduce.figure import Role, curve, value


def test_curves_are_as_published():
    goodput = curve("fig5", "Clockwork", "goodput_rps")

    assert goodput.role is Role.PAPER
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
