"""Limits of stretches of a workload, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from clockwork_lab.reproduce.fig7 import DEVICES, KIND
from clockwork_lab.reproduce.limits import LimitStretch, bound, satisfactions, stretches
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.units import NS_PER_S, ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import Arrivals

SCENARIO = Scenario(
    name="steps",
    seconds=6.0,
    models=(ModelSet(name="m", kind=KIND, copies=2),),
    loads=(
        LoadTable(name="loose", models=("m",), arrivals="fixed", rate_rps=100.0, slo_ms=100.0, stop_s=3.0),
        LoadTable(name="tight", models=("m",), arrivals="fixed", rate_rps=200.0, slo_ms=2.0, start_s=3.0),
    ),
)


def test_stretches_are_cut_out_of_the_stream():
    first, second = stretches(FigureRun(), SCENARIO, [LimitStretch(1.0, 1.0), LimitStretch(4.0, 0.5)])

    assert len(first.times_ns) == pytest.approx(100, abs=1)
    assert set(first.loads) == {0}
    assert set(first.slos_ns) == {ms(100)}
    assert all(NS_PER_S <= time_ns < 2 * NS_PER_S for time_ns in first.times_ns)
    assert len(second.times_ns) == pytest.approx(100, abs=1)
    assert set(second.loads) == {1}


def test_an_slo_below_the_duration_cannot_be_met_and_a_loose_one_can():
    found = stretches(FigureRun(), SCENARIO, [LimitStretch(0.0, 2.0), LimitStretch(4.0, 1.0)])

    assert satisfactions(FigureRun(), KIND, found, devices=DEVICES) == [1.0, 0.0]


def test_who_must_be_served_leaves_the_rest():
    requests = Arrivals([0] * 400, [0] * 200 + [1] * 200, [ms(100)] * 400, [0] * 200 + [1] * 200)
    limit = bound(FigureRun(), KIND, requests, devices=1, first_class=0)

    assert limit.offered == 400
    assert limit.goodput < 10 * 200
