"""How reality is measured and held against simulations: on hand-made journals, runs and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.simulate_reality.__main__ import (
    DEPTHS,
    INPUTS,
    MOST,
    Pair,
    Run,
    agrees,
    capacity_rps,
    compare,
    scenario_text,
    shots_of,
)
from benchmarks.simulate_reality.calibration import (
    Delays,
    Execution,
    calibrate,
    delays_of,
    story_of,
    truth_of,
    write_zoo,
)
from clockwork_serve.apps.simulate import ask
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import CodeAdded, Profile, Status
from clockwork_serve.sim import read_constants
from clockwork_serve.telemetry.journal import Step
from clockwork_serve.units import ms, us
from clockwork_serve.workload.zoo import Zoo
from harness.http_load import Sample
from harness.machine import Disturbance
from harness.report import Outcome
from tests.telemetry import stories

PROFILE = Profile(
    code_id="code", device_kind="cpu", infer_ns={1: ms(4), 2: ms(7)}, load_base_ns=0, load_ns_per_mib=ms(1)
)
CODE = Zoo.read("v100").code("resnet50_v2")


def ran(batch: int, started_ms: float, ended_ms: float, *, alone: bool = False) -> Execution:
    return Execution(
        "code", batch, ms(started_ms - 2), 0, ms(started_ms), ms(ended_ms), ms(ended_ms + 0.2), alone
    )


def run_of(goodput: float, p99: float) -> Run:
    return Run(goodput_rps=goodput, p50_ms=1, p99_ms=p99, late=0, refused=0, offered=10)


def test_a_journal_tells_who_ran_when() -> None:
    steps = [
        Step(0, (stories.worker_joined(), stories.model_added()), ()),
        Step(ms(1), (stories.request("a"),), (stories.infer(1, "a"), stories.infer(2, "b"))),
        Step(ms(20), (stories.result(1), stories.result(2, status=Status.TOO_LATE)), (stories.answer("a"),)),
    ]

    story = story_of(steps)

    (only,) = story.executions
    assert (only.batch, only.sent_ns, only.heard_ns, only.alone) == (1, ms(1), ms(20), True)
    assert story.heard_ns == {"a": ms(1)}
    assert story.answered_ns == {"a": ms(20)}
    assert list(story.models) == ["net"]
    assert story.between(0, ms(1)) == []
    assert story.between(ms(1), ms(2)) == [only]


def test_delays_are_what_lies_outside_the_lane() -> None:
    story = story_of([Step(ms(5), (stories.request("a"),), ()), Step(ms(30), (), (stories.answer("a"),))])
    sample = Sample("", ms(4), ms(4.5), ms(31), 200, b"Clockwork-Request-Id: a")
    lone, then, later = ran(1, 10, 14, alone=True), ran(1, 14.1, 18.1), ran(1, 30, 34)
    then.sent_ns = ms(11)

    found = delays_of([sample], story, [lone, then, later])

    assert (found.up, found.down) == ([us(500)], [ms(1)])
    assert (found.there, found.back) == ([ms(2)], [us(200)] * 3)
    assert found.turn == [us(100)]


def test_calibration_says_what_load_does_to_durations() -> None:
    delays = Delays([us(100)], [us(300)], [us(50), us(90), us(90)], [us(50), us(70), us(70)], [us(80)])
    executions = [ran(1, 0, 5) for _ in range(19)] + [ran(1, 0, 6) for _ in range(6)] + [ran(2, 0, 50)]

    found = calibrate({"code": PROFILE}, delays, executions)

    assert found.slowness == {"code": 1.25}
    assert found.infer_ns == {"code": {1: ms(5) + us(80), 2: ms(8.75) + us(80)}}
    network = found.constants.network
    assert (network.gateway_ns, network.worker_ns, network.jitter_ns) == (us(200), us(50), us(60))
    quantiles = dict(found.constants.noise.infer_us)
    assert (quantiles[0.5], quantiles[1.0]) == (0, 1000)  # one batch of 2 is too few to be believed
    assert found.constants.noise.load_us == read_constants().noise.load_us


def test_the_table_of_models_is_one_that_simulate_reads(tmp_path: Path) -> None:
    model = stories.model_added().model
    profile = structs.replace(PROFILE, infer_ns={1: ms(4), 2: 7, 4: 9})
    write_zoo(tmp_path / "measured.csv", {"net": model}, {"code": profile})

    row = Zoo.read(tmp_path / "measured.csv")["net"]

    assert row.infer_ns == profile.infer_ns
    assert row.weights_bytes == model.weights.size
    assert row.load_ns == ms(3)


def test_the_truth_is_what_was_measured_under_load() -> None:
    story = story_of([Step(0, (stories.model_added(), CodeAdded(code=CODE, profiles=(PROFILE,))), ())])
    delays = Delays([1], [1], [1], [1], [us(80)])

    truth = truth_of(story, calibrate(story.profiles, delays, [ran(1, 0, 5)]))

    assert truth["net"].infer_ns[1] == ms(5) + us(80)
    assert truth["net"].load_ns(3 << 20) == PROFILE.load_ns(3 << 20)


def test_both_get_the_same_requests(tmp_path: Path) -> None:
    (tmp_path / "measured.csv").write_text(
        "model,weights_mb,load_ms,infer_b1_ms\n" + "".join(f"{name},1,1,4\n" for name in DEPTHS)
    )
    file = tmp_path / "s.toml"
    file.write_text(scenario_text("s", 100, 3, 1, 50))
    question = ask(file, config=ControllerConfig(), seed=3)

    shots = shots_of(question.workload, "http://127.0.0.1:1", INPUTS["cpu"])

    tally = question.simulation().run()
    first = sum(shot.at_ns < question.workload.warmup_ns for shot in shots)
    assert tally.loads[0].offered == len(shots) - first > 150
    assert {shot.name for shot in shots} == set(DEPTHS)
    assert all(b"x-slo-ms: 50\r\n" in shot.message for shot in shots)


def test_capacity_is_of_the_best_batch() -> None:
    story = story_of([Step(0, (stories.model_added(),), ())])

    assert capacity_rps(story, {"code": {1: ms(5), 2: ms(8), 4: ms(20)}}) == pytest.approx(250)


@pytest.mark.parametrize(
    ("ours", "good"), [([104.0], True), ([106.0], False), ([85.0], False), ([90.0], True)]
)
def test_near_enough_or_within_the_real_runs(ours: list[float], good: bool) -> None:
    assert agrees([89.0, 100.0, 101.0], ours, 0.05) is good


def test_differences_are_judged_by_share() -> None:
    outcome = Outcome("x")

    rows = compare(outcome, Pair(0.8, [run_of(100, 20), run_of(102, 21)], [run_of(100, 30)]))

    assert [one.good for one in outcome.verdicts] == [True, False]
    assert rows[1] == ["0.8", "p99 ms", "20.5", "20.0 to 21.0", "30.0", "30.0 to 30.0", "+46.3%"]


def test_a_busy_machine_proves_nothing() -> None:
    quiet = Disturbance(seconds=10, stolen_s=0.01, others_s=0.1, involuntary=0, waited_s=0)
    busy = Disturbance(seconds=10, stolen_s=0.2, others_s=9, involuntary=0, waited_s=0)

    assert quiet.too_much(**MOST) == []
    assert busy.too_much(**MOST) == ["90.00% of a core used by others", "2.00% of a core stolen"]
