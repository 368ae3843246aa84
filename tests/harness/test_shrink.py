"""A failing seed becomes a case of a handful of requests that fails alike; bugs are planted for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.results import ResultHandler
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Outcome
from clockwork_serve.telemetry import head_of
from clockwork_serve.telemetry.journal import PYTHON
from harness.seeds import Digest, play_seed, random_scenario, simulation_of
from harness.shrink import case_of, play_case, read_case, shrink, write_case

REQUESTS = 400
ROOT = Path(__file__).parents[2]
pure = pytest.mark.skipif(
    head_of(ControllerConfig()).build != PYTHON, reason="compiled code cannot be patched"
)


def failing(first: int = 0) -> int:
    """The first seed that fails."""
    for seed in range(first, first + 60):
        try:
            play_seed(seed, REQUESTS)
        except AssertionError:
            return seed
    raise AssertionError("no seed fails")


def lost_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a lost worker are forgotten."""
    monkeypatch.setattr(ResultHandler, "action_lost", lambda self, sent, *, ran: None)


def never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What expires is said to be cancelled."""
    right = Belief.answer

    def wrong(self, waiter, outcome, *rest, **more):
        return right(
            self, waiter, Outcome.CANCELLED if outcome is Outcome.EXPIRED else outcome, *rest, **more
        )

    monkeypatch.setattr(Belief, "answer", wrong)


def weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a worker that is lost are still believed there."""
    monkeypatch.setattr(Belief, "drop", lambda self, residency: None)


def test_a_case_goes_as_its_seed_does():
    seed = next(seed for seed in range(100) if len(random_scenario(seed, REQUESTS).scenario.faults) > 4)
    one, other = Digest(), Digest()
    simulation_of(random_scenario(seed, REQUESTS), watchers=[one]).run()
    assert play_case(case_of(random_scenario(seed, REQUESTS))) is None
    simulation_of(random_scenario(seed, REQUESTS), watchers=[other]).run()
    assert one.hex() == other.hex()


@pure
@pytest.mark.parametrize("plant", [lost_forgotten, never_late, weights_stay])
def test_a_planted_bug_is_shown_by_a_handful_of_requests(monkeypatch, tmp_path, plant):
    plant(monkeypatch)
    case = case_of(random_scenario(failing(), REQUESTS))
    before = play_case(case)
    told: list[int] = []

    shrunk = shrink(case, seconds=60, tell=lambda case, attempts: told.append(attempts))

    assert before is not None
    assert shrunk.violation.kind == before.kind
    assert len(shrunk.case.requests) <= 5, shrunk.case.size()
    assert len(shrunk.case.faults) <= 2
    assert shrunk.case.cluster.devices <= 2
    assert not shrunk.case.closed or not shrunk.case.requests
    assert told == list(range(1, shrunk.attempts + 1))
    write_case(tmp_path / "case.json", shrunk.case)
    assert read_case(tmp_path / "case.json") == shrunk.case
    assert play_case(read_case(tmp_path / "case.json")) == shrunk.violation
    monkeypatch.undo()
    assert play_case(shrunk.case) is None, "it was the bug that failed"


def test_it_stops_when_its_time_is_over():
    with pytest.raises(ConfigError, match="found one that holds"):
        shrink(case_of(random_scenario(0, 100)), seconds=1)


def test_another_file_is_no_case(tmp_path):
    (tmp_path / "x").write_text("{}")
    with pytest.raises(ConfigError, match="case: expected a file that a shrinker wrote"):
        read_case(tmp_path / "x")


def test_one_command_plays_a_case(tmp_path):
    write_case(tmp_path / "case.json", case_of(random_scenario(1, 50)))
    command = [sys.executable, "-m", "qa.simulator_seeds", "--case", str(tmp_path / "case.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "it holds" in done.stdout
