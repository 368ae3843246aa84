"""What the benchmark of the simulator's speed plans: a load that takes several devices."""

from __future__ import annotations

from benchmarks.simulator_speed import PLAN_MOST, plan_question
from clockwork_serve.apps.plan.demand import demand_of


def test_the_plan_is_of_several_devices() -> None:
    asked = plan_question(3)

    demand = demand_of(asked.simulated(), asked.kinds, asked.target)

    assert 0 < demand.least_speed < demand.likely_speed
    assert 1 < demand.likely_speed / asked.kinds[0].speed < PLAN_MOST
    assert len(demand.offered) == 2
    assert all(abs(offered - 18_000) < 600 for offered in demand.offered)
