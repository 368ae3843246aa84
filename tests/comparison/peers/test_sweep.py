"""The picture of goodput against load: from which load, which figures, and that it can be read."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.workload.scenario import read_scenario
from comparison.peers.sweep import FIGURE, KEPT, SECONDS, curves, drawing, kept, limit_rps, load_at


def line(server: str, rate: int, in_time: float) -> dict[str, Any]:
    figures = {"asked_per_s": rate + 0.5, "in_time_per_s": in_time}
    return {"server": server, "rate_rps": rate, "figures": figures}


def test_the_load_is_the_peers_own_at_another_rate(tmp_path: Path) -> None:
    scenario = read_scenario(load_at(120, tmp_path))

    assert [load.rate_rps for load in scenario.loads] == [120]
    assert (scenario.seconds, "120 r/s" in scenario.name) == (SECONDS, True)


def test_the_limit_is_full_batches_one_after_the_other() -> None:
    assert limit_rps() == pytest.approx(8 / 0.048)


def test_a_point_is_the_median_of_its_runs_in_the_order_of_rates() -> None:
    lines = [line("triton", 60, 20), line("triton", 30, 30), line("triton", 60, 40), line("triton", 60, 21)]

    assert curves(lines) == {"triton": [(30.5, 30), (60.5, 21)]}


def test_the_picture_is_drawn_from_what_is_kept() -> None:
    found = curves(kept())

    text = drawing(found)

    assert text == FIGURE.read_text(), f"{KEPT.name} is newer: python -m comparison.peers.sweep draw"
    words = [one.text for one in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Clockwork Serve", "Triton", "ideal: full batches"} <= set(words)
    assert "prefers-color-scheme: dark" in text
