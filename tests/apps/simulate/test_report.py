"""The numbers of a report add up, and say when a run broke; the words say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.apps.simulate import words
from clockwork_serve.apps.simulate.play import play
from clockwork_serve.apps.simulate.question import ask
from clockwork_serve.apps.simulate.report import Report, report
from clockwork_serve.controller import ControllerConfig
from tests.apps.simulate.scenarios import STEADY, SURGE, written

FIELDS = {
    "version", "scenario", "setup", "seconds", "warmup_s", "measured_s", "reached_s", "cut", "took_s",
    "loads", "devices", "faults", "first_break", "stretch_s", "stretches",
}  # fmt: skip
LOAD_FIELDS = {
    "name", "arrivals", "slo_ms", "offered", "offered_rps", "in_time", "goodput_rps", "satisfaction", "late",
    "refused", "open", "cold", "mean_batch", "answers", "refusals",
}  # fmt: skip


def reported(folder: Path, text: str) -> Report:
    question = ask(written(folder, text), config=ControllerConfig())
    return report(question, play(question.simulation()))


@pytest.fixture(scope="module")
def surge(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return reported(tmp_path_factory.mktemp("surge"), SURGE)


def test_every_request_is_counted_once(surge: Report) -> None:
    for load in surge.loads:
        assert load.offered == load.in_time + load.late + sum(load.refused.values()) + load.open
        assert load.open == 0
        assert load.answers.count == load.in_time
        assert load.refusals.count == load.offered - load.in_time
    assert sum(row.offered for row in surge.stretches[1:]) == sum(load.offered for load in surge.loads)
    assert sum(row.in_time for row in surge.stretches[1:]) == sum(load.in_time for load in surge.loads)


def test_rates_are_over_the_time_that_a_load_was_on(surge: Report) -> None:
    web, other = surge.loads

    assert surge.measured_s == 3
    assert web.offered_rps == pytest.approx(web.offered / 3)
    assert other.offered_rps == pytest.approx(200)
    assert other.goodput_rps == pytest.approx(other.in_time / 1.5)
    assert 60 < other.goodput_rps < 100  # batch 1 in 10 ms, beside the other load


def test_it_breaks_when_the_surge_comes(surge: Report) -> None:
    first = surge.first_break

    assert first is not None
    assert (first.from_s, first.to_s) == (2, 3)
    assert first.load == "surge"
    assert first.load_satisfaction < first.satisfaction < 1


def test_devices_are_as_busy_as_their_actions(surge: Report) -> None:
    devices = surge.devices

    assert 0.5 < devices.exec_busy <= 1
    assert devices.load_busy == pytest.approx(0.008 / 3, rel=0.1)  # one LOAD of the large model
    assert devices.infers > 250
    assert (devices.loads, devices.refused) == (1, 0)


def test_a_load_that_is_carried_does_not_break(tmp_path: Path) -> None:
    made = reported(tmp_path, STEADY)

    (web,) = made.loads
    assert (web.satisfaction, made.first_break) == (1, None)
    assert web.answers.p50_ms is not None
    assert web.answers.max_ms is not None
    assert 4 <= web.answers.p50_ms <= web.answers.max_ms < 100
    assert web.refusals.max_ms is None
    assert words.closing_lines(made)[1] == "every second after the warm-up: all requests answered in time"


def test_json_has_the_documented_fields(surge: Report) -> None:
    found = json.loads(surge.to_json())

    assert set(found) == FIELDS
    assert set(found["loads"][0]) == LOAD_FIELDS
    assert found["loads"][1]["refused"]["rejected/would_miss_deadline"] > 0
    assert found["setup"]["seed"] == 1
    assert found["setup"]["memory_mib"] == 256
    guide = (Path(__file__).parents[3] / "docs" / "use" / "simulate.md").read_text(encoding="utf-8")
    assert [field for field in FIELDS | LOAD_FIELDS if f"`{field}`" not in guide] == []


def test_words_say_what_the_numbers_say(surge: Report) -> None:
    lines = "\n".join(words.setup_lines(surge) + words.closing_lines(surge))

    assert "1 device of" in lines
    assert "3 of 2 kinds, 92 MiB of weights" in lines
    assert "surge (fixed, SLO 50 ms)" in lines
    assert "network, each way: gateway 25 us" in lines
    assert "breaks first in second 3 (2 to 3 s)" in lines
    assert [len(row) for row in words.load_rows(surge)] == [len(words.LOAD_COLUMNS)] * 2
    assert {len(row) for row in words.latency_rows(surge)} == {len(words.LATENCY_COLUMNS)}


@pytest.mark.parametrize(("part", "text"), [(1.0, "100 %"), (0.9999999, "99.999 %"), (0.5, "50.000 %")])
def test_only_all_is_all(part: float, text: str) -> None:
    assert words.share(part) == text
