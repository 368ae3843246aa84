"""A scenario as what is sent when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clockwork_lab.bench.plan import clients, make_schedule, slo_steps
from clockwork_serve.errors import ConfigError
from clockwork_serve.workload.scenario import read_scenario
from clockwork_serve.workload.stream import build
from tests.lab.bench.loads import CLOSED, STEADY, written

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "examples" / "scenarios").glob("*.toml"))
BUSY = STEADY.replace('"fixed"', '"poisson"').replace("rate_rps = 100", "rate_rps = 2000")


def schedule(tmp_path: Path, text: str, **more):
    return make_schedule(read_scenario(written(tmp_path, text)), seed=more.pop("seed", 1), **more)


def test_it_is_what_a_simulation_of_the_same_seed_asks(tmp_path: Path) -> None:
    found = schedule(tmp_path, BUSY, seed=3)
    stream = build(read_scenario(written(tmp_path, BUSY)), seed=3)
    asked = [at for arrivals in stream.open() for at in arrivals.times_ns]
    assert found.times_ns.tolist() == asked


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_are_the_whole_and_share_nothing(tmp_path: Path, parts: int) -> None:
    whole = schedule(tmp_path, BUSY)
    cut = [whole.part(number, parts) for number in range(parts)]
    assert sorted(at for part in cut for at in part.times_ns.tolist()) == whole.times_ns.tolist()
    assert max(part.times_ns.size for part in cut) - min(part.times_ns.size for part in cut) <= 1


def test_a_rate_is_scaled_and_an_end_comes_earlier(tmp_path: Path) -> None:
    usual = schedule(tmp_path, BUSY).times_ns.size
    assert schedule(tmp_path, BUSY, rate_scale=3).times_ns.size == pytest.approx(3 * usual, rel=0.1)
    short = schedule(tmp_path, BUSY, seconds=0.25)
    assert short.times_ns.size == pytest.approx(usual / 4, rel=0.2)
    assert short.times_ns.max() < short.end_ns == 250_000_000


def test_ramps_of_the_rate_are_scaled_with_it(tmp_path: Path) -> None:
    ramped = BUSY + "rate_ramp = { every_s = 0.1, add = 1000, until = 6000 }\n"
    usual = schedule(tmp_path, ramped).times_ns.size
    assert schedule(tmp_path, ramped, rate_scale=0.5).times_ns.size == pytest.approx(usual / 2, rel=0.1)


def test_closed_loads_keep_their_clients_whatever_the_rate(tmp_path: Path) -> None:
    made = schedule(tmp_path, CLOSED + "start_jitter_s = 0.5\n", rate_scale=9)
    found = list(clients(made.workload, 1))
    assert len(found) == 2
    assert found == list(clients(made.workload, 1)) != list(clients(made.workload, 2))
    assert all(0 <= start_ns < 500_000_000 for _, _, start_ns in found)


def test_an_slo_that_changes_is_known_beforehand(tmp_path: Path) -> None:
    made = schedule(tmp_path, CLOSED + "slo_ramp = { every_s = 0.4, factor = 2 }\n")
    (load,) = made.workload.closed
    assert slo_steps(load, made.end_ns) == [
        (0, 2_000_000_000), (400_000_000, 4_000_000_000), (800_000_000, 8_000_000_000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        (STEADY.replace("seconds = 1", "seconds = 9\nwarmup_s = 5"), {"seconds": 4}, "duration: expected"),
        (STEADY, {"rate_scale": 1e6}, r"rate_scale: 1000000 makes loads\[0\].rate_rps: expected a number"),
        (STEADY, {"most": 99}, "expected at most 99 requests in one run, found more; give --duration"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(tmp_path: Path, text: str, more: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schedule(tmp_path, text, **more)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_scenario_that_is_shipped_can_be_sent(file: Path) -> None:
    scenario = read_scenario(file)
    if any(load.trace for load in scenario.loads):
        pytest.skip(f"{file.name} plays a real trace, which its publisher has to be asked for")
    made = make_schedule(scenario, seed=1, seconds=scenario.warmup_s + 2)
    assert made.models_asked()
    assert made.times_ns.size or made.workload.closed


def test_how_much_is_due_at_once(tmp_path: Path) -> None:
    made = schedule(tmp_path, STEADY)
    assert made.most_at_once(1) == 1
    assert made.most_at_once(95_000_000) == 10
    made.times_ns = np.zeros(0, np.int64)
    assert made.most_at_once(10**9) == 0
