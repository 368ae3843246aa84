"""A prediction held against what was measured: counts, quantiles, single requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_right.check import (
    Ends,
    check_report,
    predicted_ends,
)
from clockwork_serve.apps.plan.demand import kinds_of
from clockwork_serve.apps.plan.report import PlanQuestion
from clockwork_serve.apps.simulate import ask, play, read_with_zoo
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.units import ms
from tests.apps.scenarios import STEADY, written


def asked(file: str) -> PlanQuestion:
    scenario, zoo = read_with_zoo(file)
    return PlanQuestion(
        scenario=scenario, zoo=zoo, kinds=kinds_of(scenario), target=0.99, seeds=(1,),
        config=ControllerConfig(),
    )  # fmt: skip


def test_every_request_is_predicted(tmp_path: Path) -> None:
    file = written(tmp_path, STEADY.replace("rate_rps = 100", "rate_rps = 500"))

    ends = predicted_ends(asked(file).simulated())

    total = play(ask(file, config=ControllerConfig()).simulation()).tally.total()
    counted = [good for (due_ns, _), (good, _) in ends.items() if due_ns >= ms(1000)]
    assert len(counted) == total.offered
    assert sum(counted) == total.ok < total.offered
    assert {model for _, model in ends} == {"s-0000", "s-0001"}


def test_both_sides_are_compared_by_model_and_by_request(tmp_path: Path) -> None:
    predicted: Ends = {(ms(2000 + at), "a"): (True, ms(5)) for at in range(100)}
    predicted |= {(ms(2000 + at), "b"): (at % 2 == 0, ms(7)) for at in range(100)}
    measured: Ends = {key: (good, took + ms(1)) for key, (good, took) in predicted.items()}
    for at in range(10):
        measured[ms(2000 + at), "b"] = (True, ms(9))
    predicted[ms(10), "a"] = measured[ms(10), "a"] = (False, ms(1))  # of the warm-up
    measured[ms(3500), "a"] = (True, ms(1))  # that nobody predicted, as of a closed load

    made = check_report(asked(written(tmp_path)), predicted, measured, url="http://127.0.0.1:1", invalid="")

    assert (made.both, made.neither, made.only_predicted, made.only_measured) == (150, 45, 0, 5)
    assert made.unmatched == 1
    a, b = made.models
    assert (a.requests, a.near, round(a.off, 3)) == (101, True, -0.01)
    assert (a.predicted_ms, a.measured_ms) == ((5, 5), (6, 6))
    assert (b.near, round(b.off, 3), b.predicted_rps) == (False, -0.091, pytest.approx(50 / 3))


def test_closed_loads_are_counted_on_each_side_by_themselves(tmp_path: Path) -> None:
    text = STEADY.replace('arrivals = "poisson"', 'arrivals = "closed"\nconcurrency = 3')
    file = written(tmp_path, text.replace("rate_rps = 100\n", ""))

    ends = predicted_ends(asked(file).simulated())

    total = play(ask(file, config=ControllerConfig()).simulation()).tally.total()
    assert sum(due_ns >= ms(1000) for due_ns, _ in ends) == total.offered > 100
    later: Ends = {(due_ns + 7, model): end for (due_ns, model), end in ends.items()}
    made = check_report(asked(file), ends, later, url="http://127.0.0.1:1", invalid="")
    assert made.total.requests > 100 and made.total.off == 0
