"""The cases of the benchmark of plans: each takes several devices, and misses its target with one less."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan import CASES, HOUR, SLOW, TARGET, Case, question
from clockwork_serve.apps.plan.demand import demand_of
from clockwork_serve.apps.plan.report import make_plan
from clockwork_serve.apps.plan.runs import PlanRuns
from clockwork_serve.apps.simulate import question_of, read_with_zoo


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_can_be_told_apart_from_one_device_less(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path, 20)

    with PlanRuns(None, 2) as runs:
        made = make_plan(question(path), runs)

    assert made.answer is not None and made.fewer is not None
    assert made.answer.total > 1
    assert made.answer.in_time.mean > TARGET > made.fewer.in_time.mean + 0.02
    assert len(list((tmp_path / case.name).iterdir())) == case.copies


def test_the_hour_takes_several_devices(tmp_path: Path) -> None:
    path = tmp_path / "hour.toml"
    path.write_text(HOUR.format(seconds=180))
    asked = question(path, kinds=(SLOW,))
    zoo = read_with_zoo(path)[1]

    demand = demand_of(question_of(asked.scenario, zoo, config=asked.config, seed=1), asked.kinds, 0.999)

    assert 0 < demand.least_speed < demand.likely_speed
    assert 1 < demand.likely_speed / SLOW.speed < 16
    assert len(demand.offered) == 2
    assert all(abs(offered - 18_000) < 600 for offered in demand.offered)
