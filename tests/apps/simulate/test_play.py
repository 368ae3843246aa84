"""A simulation can be watched, stopped and checked, and none of that changes its course."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.apps.simulate.play import CheckFailed, play
from clockwork_serve.apps.simulate.question import ask
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Simulation
from clockwork_serve.units import NS_PER_S
from tests.apps.simulate.scenarios import STEADY, written

LONG = STEADY.replace("seconds = 4", "seconds = 600")


def made(folder: Path, text: str = STEADY) -> Simulation:
    return ask(written(folder, text), config=ControllerConfig()).simulation()


def test_it_runs_to_the_end(tmp_path: Path) -> None:
    played = play(made(tmp_path))

    assert not played.cut
    assert played.reached_ns >= 3.9 * NS_PER_S
    assert played.tally.total().ended == played.tally.total().offered > 250


def test_it_can_be_stopped(tmp_path: Path) -> None:
    told: list[float] = []

    played = play(
        made(tmp_path, LONG), tell=lambda simulated_s, took_s: told.append(simulated_s), stopped=lambda: True
    )

    assert played.cut
    assert told == [played.reached_ns / NS_PER_S]
    assert 0 < played.reached_ns < 600 * NS_PER_S
    assert played.tally.total().ended > 0


def test_checks_see_every_step_and_change_nothing(tmp_path: Path) -> None:
    checked = ask(written(tmp_path), config=ControllerConfig()).simulation(checks=True)
    assert checked.checks is not None

    with_checks, without = play(checked), play(made(tmp_path))

    assert with_checks.reached_ns == without.reached_ns
    assert with_checks.tally.total().ok == without.tally.total().ok


def test_faults_are_counted_as_they_hit(tmp_path: Path) -> None:
    text = STEADY + '\n[[faults]]\nkind = "crash"\nat_s = 2\nworker = 0\n'

    played = play(ask(written(tmp_path, text), config=ControllerConfig()).simulation(checks=True))

    assert played.faults == {"crash": 1}
    assert played.tally.total().ok < played.tally.total().ended


def test_what_checks_find_is_told_with_the_time(tmp_path: Path) -> None:
    simulation = made(tmp_path)

    class Doubt:
        def on_step(self, now_ns, events, effects):
            assert now_ns < NS_PER_S, "a page is lost"

    simulation.watchers.append(Doubt())

    with pytest.raises(CheckFailed, match=r"contradicts itself at 1\.\d+ s: .*a page is lost"):
        play(simulation)
