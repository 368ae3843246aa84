"""Plans against an oracle that simulates every number of devices, and planted cases with a known answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from clockwork_serve.apps.plan.demand import (
    DeviceKind,
    PlanMinutes,
    demand_of,
    kinds_of,
    may_miss,
    read_kinds,
    with_devices,
    with_slack,
    with_slo,
)
from clockwork_serve.apps.plan.report import PlanQuestion, PlanReport, make_plan
from clockwork_serve.apps.plan.runs import PlanJob, PlanRun, PlanRuns, run_job
from clockwork_serve.apps.simulate import ask, play, question_of, read_with_zoo
from clockwork_serve.cli import plan as words
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.sim import Constants, read_constants
from clockwork_serve.sim.tally import COLD, COMPUTE, MEMORY
from tests.apps.scenarios import STEADY, SURGE, written

BUSY = STEADY.replace("rate_rps = 100", "rate_rps = 900")
"""A device does some 330 a second."""

TIGHT = """
name = "tight"
seconds = 8
warmup_s = 2

[cluster]
zoo = "two.csv"
memory_mib = 256

[[models]]
name = "l"
kind = "large"
copies = 12

[[loads]]
name = "web"
models = ["l"]
arrivals = "poisson"
rate_rps = 60
slo_ms = 17
"""
"""Four models fit on a device, and who has to wait for a LOAD is late: 8 + 10 ms."""


class Here(PlanRuns):
    """Simulates in this process, and remembers what."""

    def __init__(self, file: Path | None = None) -> None:
        super().__init__(file, 1)
        self.jobs: list[PlanJob] = []

    def play(self, jobs: Sequence[PlanJob]) -> list[PlanRun | None]:
        self.jobs += jobs
        self.made += len(jobs)
        return [run_job(job) for job in jobs]


def asked(file: str, **changes: object) -> PlanQuestion:
    scenario, zoo = read_with_zoo(file)
    given = {
        "scenario": scenario, "zoo": zoo, "kinds": kinds_of(scenario), "target": 0.99, "seeds": (1,),
        "config": ControllerConfig(), "most": 16,
    }  # fmt: skip
    return PlanQuestion(**given | changes)


def planned(folder: Path, text: str, **changes: object) -> PlanReport:
    return make_plan(asked(written(folder, text), **changes), Here())


def share_with(file: str, devices: int) -> float:
    """Share in time of a scenario shorter than a minute, by the simulator alone."""
    question = ask(file, config=ControllerConfig(), devices=devices)
    total = play(question.simulation()).tally.total()
    return total.ok / total.offered


@pytest.mark.parametrize(("text", "target"), [(BUSY, 0.999), (BUSY, 0.9), (STEADY, 0.99), (TIGHT, 0.9)])
def test_the_answer_is_the_oracles(tmp_path: Path, text: str, target: float) -> None:
    file = written(tmp_path, text)
    oracle = next(count for count in range(1, 17) if share_with(file, count) >= target)

    made = make_plan(asked(file, target=target), Here())

    assert made.answer is not None
    assert made.answer.devices == {"device": oracle}
    assert made.answer.in_time.mean == pytest.approx(share_with(file, oracle))
    assert made.simulations < 8
    if oracle > 1:
        assert made.fewer is not None and made.breaks is not None
        assert made.fewer.devices == {"device": oracle - 1}
        assert not made.fewer.met
        assert made.fewer.in_time.mean == pytest.approx(share_with(file, oracle - 1))


def test_too_little_time_is_called_so(tmp_path: Path) -> None:
    made = planned(tmp_path, BUSY)

    assert made.breaks is not None
    assert made.breaks.causes[0].cause == COMPUTE
    assert set(made.breaks.causes[0].models) == {"s-0000", "s-0001"}
    assert sum(cause.requests for cause in made.breaks.causes) == made.breaks.missed


def test_too_little_memory_is_called_so(tmp_path: Path) -> None:
    made = planned(tmp_path, TIGHT, target=0.9)

    assert made.answer is not None and made.breaks is not None
    assert made.answer.total == 3
    assert made.breaks.causes[0].cause == MEMORY
    assert made.slack_saves


def test_first_requests_are_told_apart_from_evictions(tmp_path: Path) -> None:
    made = planned(tmp_path, TIGHT.replace("warmup_s = 2", "warmup_s = 0"), target=0.9999, most=5)

    assert made.answer is None
    assert made.breaks is not None
    assert COLD in {cause.cause for cause in made.breaks.causes}
    assert "NO: not even 5 devices" in words.answer(made)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("slo_ms = 100", "slo_ms = 3", "scenario.toml:20: loads[0].slo_ms: no number of these devices does"),
        ("memory_mib = 256", "memory_mib = 15", "scenario.toml:8: cluster.memory_mib: no number of"),
        ("slo_ms = 100", "", "scenario.toml:15: loads[0].slo_ms: expected an SLO in at least one"),
        (
            'arrivals = "poisson"\nrate_rps = 100\nslo_ms = 100',
            'arrivals = "closed"\nconcurrency = 2\nslo_ms = 3',
            "loads[0].slo_ms: no number of these devices does",
        ),
    ],
)
def test_what_no_number_of_devices_can_do_is_said_before_any_simulation(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    runs = Here()
    question = asked(written(tmp_path, STEADY.replace(old, new)))

    with pytest.raises(ConfigError) as caught:
        make_plan(question, runs)

    assert said in str(caught.value)
    assert runs.jobs == []


def test_a_faster_kind_can_do_what_a_slow_one_cannot(tmp_path: Path) -> None:
    text = STEADY.replace("slo_ms = 100", "slo_ms = 6")
    slow, fast = DeviceKind(name="slow", speed=0.5, price=0.1), DeviceKind(name="fast", speed=2, price=5)

    with pytest.raises(ConfigError, match=r"1\.37 times as fast"):
        planned(tmp_path, text, kinds=(slow,))
    made = planned(tmp_path, text, kinds=(slow, fast))

    assert made.answer is not None
    assert made.answer.devices == {"fast": 1}


def test_the_cheapest_set_of_several_kinds(tmp_path: Path) -> None:
    kinds = (
        DeviceKind(name="small", speed=0.5, price=1.0),
        DeviceKind(name="large", speed=2.0, price=3.5, at_most=1),
    )
    file = written(tmp_path, BUSY)
    question = asked(file, kinds=kinds, most=8)
    prices = {
        (small, large): small + 3.5 * large for small in range(9) for large in range(2) if small or large
    }

    def meets(mix: tuple[int, int]) -> bool:
        run = run_job(
            PlanJob(
                scenario=with_devices(question.scenario, kinds, mix),
                zoo=question.zoo,
                config=question.config,
                seed=1,
            )
        )
        return run is not None and run.met(question.target)

    oracle = next(mix for mix in sorted(prices, key=prices.__getitem__) if meets(mix))

    made = make_plan(question, Here())

    assert made.answer is not None
    assert made.answer.price == prices[oracle]


def test_equal_seeds_equal_plans_whoever_simulates(tmp_path: Path) -> None:
    file = written(tmp_path, BUSY)
    kept = tmp_path / "kept" / "runs.jsonl"
    with PlanRuns(kept, 2) as runs:
        one = make_plan(asked(file, seeds=(3, 4)), runs)
        assert (runs.made, runs.reused) == (one.simulations, 0)
    two = make_plan(asked(file, seeds=(3, 4)), Here())
    with PlanRuns(kept, 1) as runs:
        again = make_plan(asked(file, seeds=(3, 4)), runs)
        assert (runs.made, runs.reused) == (0, one.simulations)

    same = [structs.replace(each, took_s=0, reused=0, simulations=0) for each in (one, two, again)]
    assert without_times(same[0]) == without_times(same[1]) == without_times(same[2])
    assert one.answer is not None
    assert one.answer.seeds == 2
    assert one.answer.in_time.least <= one.answer.in_time.mean <= one.answer.in_time.most


def slow_network() -> Constants:
    usual = read_constants()
    return structs.replace(usual, network=structs.replace(usual.network, worker_ns=2_000_000))


def test_every_simulation_of_a_plan_has_the_delays_that_were_asked_for(tmp_path: Path) -> None:
    runs, constants = Here(), slow_network()

    make_plan(asked(written(tmp_path), constants=constants), runs)

    assert {job.constants for job in runs.jobs} == {constants}


def without_times(made: PlanReport) -> object:
    return msgspec.to_builtins(made)


def test_a_kept_run_is_of_its_scenario_alone(tmp_path: Path) -> None:
    scenario, zoo = read_with_zoo(written(tmp_path))
    job = PlanJob(scenario=scenario, zoo=zoo, config=ControllerConfig(), seed=1)

    others = [
        structs.replace(job, seed=2),
        structs.replace(job, config=ControllerConfig(max_batch=4)),
        structs.replace(job, scenario=with_slo(scenario, 90)),
        structs.replace(job, scenario=with_devices(scenario, kinds_of(scenario), (3,))),
        structs.replace(job, allowed=(1,)),
        structs.replace(job, constants=slow_network()),
    ]

    before = job.key()
    assert len({before, *[each.key() for each in others]}) == 7
    (tmp_path / "two.csv").write_text(
        (tmp_path / "two.csv").read_text().replace("small,16,2,4,6", "small,16,2,4,7")
    )
    assert structs.replace(job, zoo=read_with_zoo(tmp_path / "scenario.toml")[1]).key() != before


def test_a_file_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = written(tmp_path)
    kept = tmp_path / "runs.jsonl"
    with PlanRuns(kept, 1) as runs:
        make_plan(asked(file), runs)
        made = runs.made
    kept.write_bytes(kept.read_bytes()[:-20])

    with PlanRuns(kept, 1) as runs:
        make_plan(asked(file), runs)
        assert (runs.made, runs.reused) == (1, made - 1)


def test_interrupted_it_tells_what_was_found(tmp_path: Path) -> None:
    class Impatient(Here):
        def play(self, jobs: Sequence[PlanJob]) -> list[PlanRun | None]:
            return [None] * len(jobs) if self.jobs else super().play(jobs)

    made = make_plan(asked(written(tmp_path, BUSY)), Impatient())

    assert made.cut
    assert made.mixes
    assert words.answer(made)[:8] in {"NO ANSWE", "AT MOST "}


def test_minutes_begin_after_the_warm_up_and_the_last_has_what_is_left(tmp_path: Path) -> None:
    scenario, _ = read_with_zoo(written(tmp_path, STEADY.replace("seconds = 4", "seconds = 191")))

    minutes = PlanMinutes.of(scenario)

    assert (minutes.count, minutes.seconds(0), minutes.seconds(2)) == (3, 60, 70)
    assert PlanMinutes.of(read_with_zoo(written(tmp_path))[0]).count == 1


def test_a_run_that_missed_beyond_repair_is_stopped_after_that_minute(tmp_path: Path) -> None:
    text = BUSY.replace("seconds = 4", "seconds = 241")
    scenario, zoo = read_with_zoo(written(tmp_path, text))
    job = PlanJob(scenario=scenario, zoo=zoo, config=ControllerConfig(), seed=1, allowed=(50,) * 4)

    run = run_job(job)

    assert run is not None
    assert run.stopped and not run.met(0.5)
    assert run.ended[0] > 50_000 and run.ended[1] < 20_000 and run.ended[2] == 0


def test_how_many_may_miss() -> None:
    assert [may_miss(0.999, count) for count in (999, 1000, 2000, 2999)] == [0, 1, 2, 2]
    assert may_miss(99.9 / 100, 1000) == 1
    assert may_miss(1.0, 10**9) == 0


def test_no_bound_excludes_what_does(tmp_path: Path) -> None:
    for text in (BUSY, TIGHT, SURGE):
        question = asked(written(tmp_path, text), target=0.9)
        made = make_plan(question, Here())
        zoo = read_with_zoo(str(tmp_path / "scenario.toml"))[1]
        demand = demand_of(
            question_of(question.scenario, zoo, config=question.config, seed=1), question.kinds, 0.9
        )

        assert made.answer is not None
        assert demand.able((made.answer.total,))
        assert demand.offered == (round(made.offered_rps * sum_of_seconds(question)),)


def sum_of_seconds(question: PlanQuestion) -> float:
    return question.scenario.seconds - question.scenario.warmup_s


def test_an_slo_for_those_who_have_one(tmp_path: Path) -> None:
    other = '\n[[loads]]\nname = "night"\nmodels = ["s"]\narrivals = "closed"\nconcurrency = 1\n'
    scenario, _ = read_with_zoo(written(tmp_path, STEADY + other))

    assert [load.slo_ms for load in with_slo(scenario, 50).loads] == [50, None]
    bare, _ = read_with_zoo(written(tmp_path, (STEADY + other).replace("slo_ms = 100", "")))
    assert [load.slo_ms for load in with_slo(bare, 50).loads] == [50, 50]
    assert [load.slo_ms for load in with_slack(scenario, 2).loads] == [200, None]


def test_requests_beyond_a_quota_are_left_out(tmp_path: Path) -> None:
    text = STEADY.replace('name = "web"', 'name = "web"\ntenant = "t"').replace(
        "rate_rps = 100", "rate_rps = 200"
    )
    made = planned(tmp_path, text + '\n[[tenants]]\nname = "t"\ndevice_ms_per_s = 200\nburst_s = 0.1\n')

    assert made.answer is not None
    assert made.answer.devices == {"device": 1}


def test_groups_of_a_scenario_are_kinds(tmp_path: Path) -> None:
    text = STEADY.replace("[cluster]", "[cluster]\ngroups = [{devices = 2}, {slower = 2, memory_mib = 512}]")
    scenario, _ = read_with_zoo(written(tmp_path, text))

    assert kinds_of(scenario) == (
        DeviceKind(name="group 1"), DeviceKind(name="group 2", speed=0.5, memory="512MiB"),
    )  # fmt: skip
    cluster = with_devices(scenario, kinds_of(scenario), (0, 3)).cluster
    assert (cluster.devices, [group.slower for group in cluster.groups]) == (3, [2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[kind]]\nname = 'a'\nspeed = 0\n", "kinds.toml:3: kind[0].speed: expected a number in"),
        ("[[kind]]\nname = 'a'\nmemory = 'much'\n", "kinds.toml:3: kind[0].memory: expected a memory size"),
        ("[[kind]]\nname = 'a'\nspead = 2\n", "kinds.toml:1: kind[0]: expected name, memory, speed, price"),
        ("[[kind]]\nspeed = 2\n", "kinds.toml:1: kind[0]: expected name, memory, speed, price"),
        (
            2 * "[[kind]]\nname = 'a'\n",
            "kinds.toml:4: kind[1].name: expected each name once, found 'a' again",
        ),
        (6 * "[[kind]]\nname = 'a'\n", "kinds.toml: kind: expected 1 to 5 tables [[kind]]"),
        ("[[kinds]]\nname = 'a'\n", "expected 1 to 5 tables [[kind]] alone, found kinds"),
        ("[[kind]\n", "kinds.toml: Expected ']]'"),
        ("", "tables [[kind]] alone, found nothing"),
    ],
)
def test_what_is_wrong_with_kinds_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "kinds.toml"
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        read_kinds(str(file))

    assert said in str(caught.value)


def test_what_gateways_refuse_while_no_controller_runs_is_missed_too(tmp_path: Path) -> None:
    text = STEADY + '\n[[faults]]\nkind = "controller"\nat_s = 2\n'
    question = asked(written(tmp_path, text))

    run = run_job(PlanJob(scenario=question.scenario, zoo=question.zoo, config=question.config, seed=1))

    assert run is not None
    (load,) = run.loads
    assert sum(run.ended) == load.offered
    assert sum(run.in_time) == load.in_time < load.offered
    assert sum(cause.requests for cause in run.causes) == load.offered - load.in_time


def test_a_load_that_ends_within_the_warm_up_is_no_question(tmp_path: Path) -> None:
    text = STEADY.replace("warmup_s = 1", "warmup_s = 3").replace("slo_ms = 100", "slo_ms = 100\nstop_s = 2")
    others = text[text.index("[[loads]]") :].replace("web", "others").partition("slo_ms")[0]

    with pytest.raises(ConfigError, match="warmup_s: expected requests with an SLO after it, found none"):
        planned(tmp_path, text + others)
