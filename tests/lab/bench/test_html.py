"""The page of a load test: what can be seen in it, of runs of every length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clockwork_lab.bench.html import page
from clockwork_serve.units import NS_PER_MS
from tests.lab.bench.loads import STEADY
from tests.lab.bench.reports import ALL, ANSWERED, records, report

LONG = STEADY.replace("seconds = 1", "seconds = 1000\nwarmup_s = 0.5")
POINTS = re.compile(r'<polyline points="([^"]*)"')


def answers(last_ms: int) -> object:
    return records(*[(at, at + 0.1, at + 5, ANSWERED) for at in range(0, last_ms, 10)])


def test_one_second_is_a_point_of_each_curve(tmp_path: Path) -> None:
    assert page(report(tmp_path, ALL)).count("<circle") >= 5


def test_the_time_of_a_run_that_was_cut_ends_there(tmp_path: Path) -> None:
    text = page(report(tmp_path, answers(4500), cut_ms=4500, text=LONG))
    places = [
        [float(pair.split(",")[0]) for pair in line.split()]
        for line in POINTS.findall(text.split("</svg>")[0])
    ]
    assert max(max(place) for place in places) > 400  # and not in the first of a thousand seconds


def test_a_last_part_of_a_second_is_a_rate_too(tmp_path: Path) -> None:
    text = page(report(tmp_path, answers(4500), cut_ms=4500, text=LONG))
    offered = [float(pair.split(",")[1]) for pair in POINTS.findall(text)[0].split()]
    assert len(offered) == 5
    assert max(offered) - min(offered) < 1


def test_the_warm_up_is_grey_and_named(tmp_path: Path) -> None:
    assert page(report(tmp_path, answers(4500), text=LONG)).count("<rect") == 2
    assert "warm-up, not counted" in page(report(tmp_path, answers(4500), text=LONG))
    assert "<rect" not in page(report(tmp_path, ALL))


@pytest.mark.parametrize("slos_ms", [(25,), (25, 50, 100, 250, 500), (100, 101, 102, 103, 104, 105)])
def test_every_slo_is_a_line_whose_name_covers_no_other(tmp_path: Path, slos_ms: tuple[int, ...]) -> None:
    found = answers(900)
    for at, slo_ms in enumerate(slos_ms):
        found.table["slo_ns"][at :: len(slos_ms)] = slo_ms * NS_PER_MS
    text = page(report(tmp_path, found))
    latencies = text.split("<svg")[2]
    named = re.findall(r'<text x="(\d+)" y="([\d.]+)" fill="#c0392b"[^>]*>SLO (\d+) ms', latencies)
    assert {int(slo_ms) for _, _, slo_ms in named} == set(slos_ms)
    places = [(int(x), float(y)) for x, y, _ in named]
    assert all(
        abs(one[1] - other[1]) >= 11 or abs(one[0] - other[0]) >= 60
        for at, one in enumerate(places)
        for other in places[:at]
    )


def test_it_fits_a_telephone_and_explains_itself(tmp_path: Path) -> None:
    text = page(report(tmp_path, ALL))
    assert '<meta name="viewport"' in text
    assert text.count("<table") == text.count('<div class="wide"><table')
    for term in ("answered in time", "late", "refused", "failed, lost", "SLO line", "warm-up"):
        assert f"<dt>{term}</dt>" in text
