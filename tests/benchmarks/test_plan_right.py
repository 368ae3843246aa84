"""Predictions of plans: scenarios with a clear step, written down once, played once, and judged."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.plan_right import __main__ as plan_right
from benchmarks.plan_right.__main__ import (
    TARGET,
    Prediction,
    judge,
    planned,
    play_all,
    predict,
    predict_all,
    proves_nothing,
    question,
    read_predictions,
    same_refused,
)
from benchmarks.plan_right.check import CheckReport, check_report
from benchmarks.plan_right.scenarios import CASES, Case
from clockwork_serve.sim import read_constants
from clockwork_serve.sim.constants import Network
from harness.report import Outcome

USUAL = read_constants()
BUSY = structs.replace(
    USUAL,
    network=Network(
        gateway_ns=150_000, worker_ns=120_000, jitter_ns=0, reserve_ns=8_400_000,
        jitter_us=((0.0, 0.0), (0.5, 40.0), (0.9, 160.0), (0.99, 1900.0), (1.0, 6500.0)),
    ),
    noise=structs.replace(
        USUAL.noise,
        infer_us=((0.0, -40.0), (0.5, 0.0), (0.9, 70.0), (0.99, 1100.0), (0.999, 3500.0), (1.0, 12_900.0)),
    ),
)  # fmt: skip
"""About what was measured on a virtual machine of two cores."""
BY_NAME = {case.name: case for case in CASES}


def test_there_are_twenty_scenarios() -> None:
    assert len(BY_NAME) == len(CASES) == 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_has_its_models_in_a_repository(case: Case, tmp_path: Path) -> None:
    asked = question(case.write(tmp_path), case, devices=3).simulated()

    names = [name for name, _ in asked.workload.models]
    assert sorted(each.name for each in (tmp_path / case.name).iterdir()) == sorted(names)
    assert asked.cluster.devices == 3
    assert all(asked.zoo[kind].weights_bytes <= case.memory_mib << 20 for _, kind in asked.workload.models)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_has_a_clear_step(case: Case, tmp_path: Path) -> None:
    answer, fewer = planned(case, BUSY, tmp_path, 2)

    assert 2 <= answer.total <= 8
    assert answer.in_time.mean > TARGET + 0.002
    assert fewer.in_time.mean < TARGET - 0.02


@pytest.mark.slow
def test_a_prediction_says_what_becomes_of_each_request(tmp_path: Path) -> None:
    made = predict(BY_NAME["time"], BUSY, tmp_path, 2)

    def share(devices: int) -> float:
        ends = made.of(devices).values()
        return sum(good for good, _ in ends) / len(ends)

    assert share(made.devices) > TARGET > share(made.devices - 1)
    assert made.of(made.devices).keys() == made.of(made.devices - 1).keys()
    assert 0 < made.luck_same <= 1


def said(case: Case) -> Prediction:
    """Made up: of ten requests all are in time on two devices, and eight on one."""
    ends = {
        devices: [(int(4e9) + at, "net-0000", at < good, 5_000_000) for at in range(10)]
        for devices, good in ((2, 10), (1, 8))
    }
    return Prediction(
        name=case.name, asked=plan_right.asked_of(case), devices=2, in_time=1.0, in_time_fewer=0.8,
        constants=BUSY, luck_same=1.0, luck_spread=0.0, ends=ends,
    )  # fmt: skip


def as_said(case: Case, one: Prediction, devices: int, folder: Path) -> CheckReport:
    """Everything comes as predicted."""
    ends = one.of(devices)
    asked = question(folder / f"{case.name}.toml", case, one.constants, devices)
    return check_report(asked, ends, ends, url="", invalid="")


def test_what_was_predicted_or_played_is_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, file = BY_NAME["time"], tmp_path / "said.jsonl"
    done: list[object] = []
    monkeypatch.setattr(plan_right, "measured", lambda folder: done.append("measured") or BUSY)
    monkeypatch.setattr(plan_right, "predict", lambda case, *_: done.append(case.name) or said(case))
    monkeypatch.setattr(
        plan_right, "play", lambda case, one, devices, folder: (
            done.append(devices) or as_said(case, one, devices, folder)
        ),
    )  # fmt: skip

    for _ in range(2):
        predict_all(file, [case])
    predicted, runs = play_all(file, [case])
    assert done == ["measured", "time", 2, 1]
    assert play_all(file, [case]) == (predicted, runs)
    assert done == ["measured", "time", 2, 1]

    assert predicted == read_predictions(file) == [said(case)]
    other = structs.replace(said(case), luck_same=0.9)  # predicted anew: what was played is not about it
    file.write_bytes(plan_right.msgspec.json.encode(other))
    play_all(file, [case])
    assert done == ["measured", "time", 2, 1, 2, 1]


def test_a_play_that_proves_nothing_is_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, file = BY_NAME["time"], tmp_path / "said.jsonl"
    file.write_bytes(plan_right.msgspec.json.encode(said(case)) + b"\n")
    invalid = iter(["late", "", "late", "late", "late", ""])
    monkeypatch.setattr(
        plan_right, "play",
        lambda *given: structs.replace(as_said(*given), invalid=next(invalid)),
    )  # fmt: skip

    _, runs = play_all(file, [case])
    assert [run.invalid for run in runs.values()] == ["", "late"], "twice, and three times in vain"
    assert proves_nothing(runs) == "1 of 2 runs, 3 times each; of time with 1 devices: late"
    _, runs = play_all(file, [case])
    assert [run.invalid for run in runs.values()] == ["", ""]
    assert not proves_nothing(runs)


def test_delays_of_a_disturbed_machine_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invalid, read = iter(["late", "", *["late"] * 3]), list[str]()
    monkeypatch.setattr(plan_right, "served", lambda *_: nullcontext("http://x"))
    monkeypatch.setattr(plan_right, "measured_ends", lambda *_, **__: ((), next(invalid)))
    monkeypatch.setattr(plan_right, "read_delays", lambda file: read.append(Path(file).name) or BUSY)

    assert plan_right.measured(tmp_path) is BUSY
    assert read == ["calibration-1.journal"], "that of the one that was not disturbed"
    (again := tmp_path / "again").mkdir()
    with pytest.raises(SystemExit, match="never undisturbed"):
        plan_right.measured(again)


def test_predictions_are_judged(tmp_path: Path) -> None:
    case = BY_NAME["time"]
    case.write(tmp_path)
    one = said(case)
    runs = {(case.name, devices): as_said(case, one, devices, tmp_path) for devices in (2, 1)}
    outcome = Outcome("test")

    judge(outcome, [one], runs)

    assert [verdict.good for verdict in outcome.verdicts] == [True] * 5
    assert same_refused(runs["time", 1]) == 1
    worse = structs.replace(runs["time", 1], only_predicted=1)
    assert same_refused(worse) == pytest.approx(2 / 3)

    outcome = Outcome("test")
    judge(outcome, [one], {**runs, ("time", 1): structs.replace(worse, total=runs["time", 2].total)})
    assert [verdict.good for verdict in outcome.verdicts] == [False, True, True, True, False]
    assert outcome.verdicts[0].found == "0 (not time)"
