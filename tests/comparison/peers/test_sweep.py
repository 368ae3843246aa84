"""The picture of goodput against load: from which load, which figures, and that it can be read."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from comparison.peers.loads import LOADS
from comparison.peers.sweep import FIGURE, KEPT, SECONDS, curves, drawing, kept, limit_rps, points


def line(server: str, rate: int, in_time: float) -> dict[str, Any]:
    figures = {"asked_per_s": rate + 0.5, "in_time_per_s": in_time}
    return {"server": server, "rate_rps": rate, "figures": figures}


def test_the_load_is_the_peers_own_at_another_rate() -> None:
    loads = [point.load for point in points([60, 120], 1) if point.server == "triton"]

    assert loads[0].text.replace(f"seconds = {SECONDS}", "seconds = 24") == LOADS["gpu_15_models"].text
    assert loads[0].text.replace("= 60\n", "= 120\n").replace("60 r/s", "120 r/s") == loads[1].text
    assert [load.name for load in loads] == ["gpu_15_models_060", "gpu_15_models_120"]


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
