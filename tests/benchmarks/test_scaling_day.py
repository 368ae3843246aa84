"""The fleet that follows the brain, and what is counted of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling_day as module
from benchmarks.scaling_day import SWING, Change, Fleet, Followed, day, fewest, question, write_minutes
from clockwork_serve.apps.simulate import SimulationQuestion
from clockwork_serve.units import NS_PER_S
from harness.report import Outcome


def test_a_day_swings_by_four_times() -> None:
    rates = day(1440, 27)
    assert max(rates) / min(rates) == pytest.approx(SWING, rel=0.01)
    assert sum(rates) / len(rates) == pytest.approx(27)


def test_changes_and_turns_are_counted() -> None:
    wanted = [(0, 5), (100, 6), (650, 5), (690, 4), (2000, 5)]
    found = Followed(
        requests=1, in_time=1.0, device_h=1.0, took_s=1.0,
        changes=tuple(Change(at_s, count, "") for at_s, count in wanted),
    )  # fmt: skip
    assert found.changes_most == 3
    assert found.turns == 2


def test_devices_join_after_their_time_and_leave_and_orders_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RULES", module.ScalingRules(lead_s=10))
    write_minutes(tmp_path / "some.csv", [6.0, 6.0])
    fleet = Fleet(question(tmp_path, "some", 120, "some.csv"), 2)
    fleet.want(4)
    assert (fleet.ordered, len(fleet.simulation.hosts)) == (4, 2)
    fleet.want(3)
    fleet.run(30 * NS_PER_S)
    assert len(fleet.simulation.hosts) == 3
    assert fleet.device_ns == 3 * 30 * NS_PER_S
    fleet.want(2)
    fleet.run(60 * NS_PER_S)
    assert len(fleet.simulation.hosts) == 2
    fleet.simulation.run()
    total = fleet.simulation.tally.total()
    assert total.ok == total.offered > 600
    assert fleet.likely() is not None
    assert fleet.now().loaded


def test_the_fewest_are_found_for_each_ten_minutes(tmp_path: Path) -> None:
    write_minutes(tmp_path / "some.csv", [3.0] * 10 + [9.0] * 10)
    few, more = fewest(question(tmp_path, "some", 1200, "some.csv"))
    assert few < more


@pytest.mark.parametrize("good", [True, False])
def test_what_is_promised_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool) -> None:
    def followed(asked: SimulationQuestion, devices: int) -> Followed:
        wanted = [(1830, 8), (3900, 2)] if good else [(1830, 4), (1900, 12), (2000, 8), (2100, 9), (3900, 2)]
        return Followed(
            requests=10, in_time=1.0 if good else 0.99, took_s=0.0,
            device_h=asked.scenario.seconds / 3600 * (8.2 if good else 12),
            changes=tuple(Change(at_s, count, "") for at_s, count in wanted),
        )  # fmt: skip

    monkeypatch.setattr(module, "followed", followed)
    monkeypatch.setattr(module, "fewest", lambda asked: [8] * round(asked.scenario.seconds / 600))
    monkeypatch.delenv("CLOCKWORK_TRACES", raising=False)
    outcome = Outcome("scaling")
    module.virtual(outcome, tmp_path, short=True)
    assert [one.good for one in outcome.verdicts] == [good] * 6
