"""What verdicts at the door cost: which runs, how they are compared, and which value is found."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from comparison.peers.loads import LOADS
from comparison.peers.verdicts import (
    FIGURE,
    KEPT_FILE,
    NONE,
    Deciding,
    Variant,
    drawing,
    judge,
    kept,
    shares,
    smallest,
    variants,
)
from harness.report import Outcome


def line(
    decide_ms: float, in_time: float, load: str = "gpu_one", repeat: int = 1, no_ms: float = 9
) -> dict[str, Any]:
    figures = {"in_time_per_s": in_time, "no_p99_ms": no_ms}
    counted = {} if decide_ms == NONE else {"promised": 1000.0, "unexplained": 2.0}
    return {"load": load, "decide_ms": decide_ms, "repeat": repeat, "figures": figures, "counted": counted}


def test_values_take_turns_and_each_repeat_begins_with_another() -> None:
    found = variants([LOADS["gpu_one"]], [NONE, 0.0], 2)

    assert [(one.decide_ms, one.point.repeat) for one in found] == [(NONE, 1), (0.0, 1), (0.0, 2), (NONE, 2)]
    assert found[0].point.name == "gpu_one/decide-none-1"


def test_a_server_is_told_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comparison.peers.servers.Clockwork.command", lambda *_: ["serve"])

    assert Deciding(40.0).command(None) == ["serve", "--decide-ms", "40"]  # type: ignore[arg-type]
    assert Deciding(NONE).command(None) == ["serve", "--decide-ms", "off"]  # type: ignore[arg-type]
    assert Variant.of(LOADS["gpu_one"], 0.0, 1).point.server == "decide-0"


def test_goodput_is_compared_within_a_repeat_and_the_middle_one_counts() -> None:
    lines = [line(NONE, 100), line(40, 90), line(NONE, 50, repeat=2), line(40, 50, repeat=2), line(0, 80)]

    assert shares(lines) == {0: {"gpu_one": 0.8}, 40: {"gpu_one": 0.95}}


def test_the_smallest_is_that_from_which_on_all_loads_keep_what_is_asked() -> None:
    lines = [line(NONE, 100), line(0, 99), line(40, 90), line(80, 98), line(120, 97)]

    assert smallest(lines, ["gpu_one"]) == 80
    two = ["gpu_one", "gpu_bursts"]
    assert smallest(lines, two) is None, "not measured under all"
    assert smallest([*lines, line(NONE, 100, "gpu_bursts"), line(120, 90, "gpu_bursts")], two) is None
    assert smallest([*lines, line(NONE, 100, "gpu_bursts"), line(120, 99, "gpu_bursts")], two) == 120


def test_rows_say_goodput_refusals_and_promises() -> None:
    outcome = Outcome("x")
    judge([line(NONE, 100), line(0, 98, no_ms=14.6)], outcome)

    assert [(one.question.rpartition(": ")[2], one.good) for one in outcome.verdicts] == [
        ("goodput", True),
        ("refusals, p99", False),  # 9.5 + 5 ms
        ("kept", False),
        ("the smallest decide_ms that keeps it", False),  # of all loads only one was measured
    ]


def test_the_picture_is_drawn_from_what_is_kept_and_says_what_its_axis_is() -> None:
    text = drawing(kept())

    assert text == FIGURE.read_text(), f"{KEPT_FILE.name} is newer: python -m comparison.peers.verdicts draw"
    words = [one.text for one in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert {"the middle load", "the worst load", "decide_ms, how long a verdict may take"} <= set(words)
    assert "requests a second" not in words
