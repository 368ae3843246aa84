"""What an experiment works with: simulations, and progress that only goes up."""

from __future__ import annotations

import re
from pathlib import Path

from clockwork_lab.reproduce.players import players
from clockwork_lab.reproduce.run import FigureRun, commit, provenance
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario

SCENARIO = Scenario(
    name="tiny",
    seconds=0.5,
    models=(ModelSet(name="m", kind="resnet18_v1"),),
    loads=(LoadTable(name="l", models=("m",), arrivals="poisson", rate_rps=200.0, slo_ms=100.0),),
)


def test_progress_ends_at_its_total_and_never_falls():
    told: list[tuple[int, int, str]] = []
    run = FigureRun(progress=lambda done, total, text: told.append((done, total, text)))
    run.plan(2)
    for player in players((16,))[:2]:
        run.simulate(SCENARIO, player, devices=1)

    done = [each for each, _, _ in told]
    assert done == sorted(done)
    assert told[-1][:2] == (200, 200)
    assert "tiny, paper" in told[-1][2]


def test_the_same_seed_gives_the_same_counts_and_another_does_not():
    def latencies(seed: int) -> dict[int, int]:
        tally = FigureRun(seed=seed).simulate(SCENARIO, players()[0], devices=1)
        assert tally.loads[0].ok > 50
        return tally.loads[0].answered.counts

    assert latencies(1) == latencies(1)
    assert latencies(1) != latencies(2)


def test_the_setup_names_seed_length_and_constants():
    setup = FigureRun(seed=7, short=True).setup(experiment="words")

    assert (setup["experiment"], setup["seed"], setup["length"]) == ("words", 7, "short")
    assert any("network" in line for line in setup["constants of the simulated world"])


def test_what_runs_on_real_devices_has_no_simulated_world():
    assert "constants of the simulated world" not in FigureRun().setup(simulated=False)


def test_it_names_machine_python_and_whether_the_brains_are_compiled():
    found = provenance()

    assert set(found) == {"version", "commit", "machine", "python", "brains"}
    assert re.search(r"\d+ cores, \d+ GiB", found["machine"])
    assert found["brains"] in {"compiled", "pure Python"}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path):
    assert commit(tmp_path) in {"unknown (not a checkout)", "unknown (no git)"}
