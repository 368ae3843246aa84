"""The greatest rate of the CPU device: searched, played, and held against what was predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_right import cpu
from benchmarks.plan_right.__main__ import TARGET
from benchmarks.plan_right.check import Ends
from benchmarks.plan_right.cpu import MODEL, Rate, counted, crossing, greatest, judge, slowness
from clockwork_serve.sim import read_constants
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.zoo import Zoo
from harness.report import Outcome

HEAD = "model,weights_mb,load_ms,infer_b1_ms,infer_b2_ms,infer_b4_ms\n"


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    file = tmp_path / "profile.csv"
    file.write_text(f"{HEAD}{MODEL},3,5,10,20,40\n")
    return Zoo.read(file)


def rates(*measured: float) -> list[Rate]:
    return [
        Rate(rate_rps=80.0 + 10 * at, predicted=1.0, measured=share, predicted_ms=20.0, measured_ms=21.0)
        for at, share in enumerate(measured)
    ]


def test_the_greatest_rate_is_found_by_halves(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "predicted", lambda folder, rate, _: (1.0 if rate <= 91 else 0.98, 0.0))

    assert greatest(tmp_path, zoo, TARGET) == pytest.approx(91, rel=2 * cpu.FINE)


def test_a_rate_is_predicted_by_the_profile(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "PROFILE", "profile.csv")
        few, many = (cpu.predicted(tmp_path, rate) for rate in (20.0, 200.0))

    assert few[0] == 1.0
    assert 0.4 < many[0] < 0.6
    assert 10 < few[1] < cpu.SLO_MS


def test_or_by_what_a_server_has_learned(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "slower.csv").write_text(f"{HEAD}{MODEL},3,5,20,40,80\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "PROFILE", "profile.csv")
        patched.setattr(cpu, "JOURNAL", "slower.csv")
        by_profile, by_server = (
            cpu.predicted(tmp_path, 80.0, constants) for constants in (None, read_constants())
        )

    assert by_profile[0] > 0.9
    assert 0.5 < by_server[0] < 0.7


def test_requests_of_the_warm_up_do_not_count() -> None:
    early, late = NS_PER_S, 10 * NS_PER_S
    ends: Ends = {
        (early, MODEL): (False, 0),
        (late, MODEL): (True, 7 * NS_PER_MS),
        (late + 1, MODEL): (False, 1),
    }

    assert counted([ends, ends]) == (0.5, 7.0)


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ((1.0, 0.992, 0.982), 92.0),
        ((1.0, 1.0, 1.0), None),
        ((0.9, 0.9, 0.8), None),
        ((0.99, 0.98, 0.99), 80.0),
    ],
)
def test_the_measured_rate_lies_between_those_played(
    measured: tuple[float, ...], found: float | None
) -> None:
    assert crossing(rates(*measured), TARGET) == (None if found is None else pytest.approx(found))


@pytest.mark.parametrize(
    ("said_rps", "measured", "good", "found"),
    [
        (92.0, (1.0, 0.992, 0.982), True, "92.0 r/s, predicted 92.0: +0.0%"),
        (100.0, (1.0, 0.992, 0.982), False, "92.0 r/s, predicted 100.0: +8.7%"),
        (90.0, (1.0, 1.0, 1.0), False, "all of 80.0 to 100.0 r/s; predicted 90.0"),
        (90.0, (0.5, 0.5, 0.5), False, "none of 80.0 to 100.0 r/s; predicted 90.0"),
    ],
)
def test_it_is_judged_by_how_near_it_is(
    said_rps: float, measured: tuple[float, ...], found: str, *, good: bool
) -> None:
    outcome = Outcome("test")

    judge(outcome, said_rps, rates(*measured), TARGET, {"slowness": 1.0})

    assert [(one.good, one.found) for one in outcome.verdicts] == [(good, found)]
    assert len(outcome.figures["cpu"]["rates"]) == 3


def test_slowness_is_of_the_sizes_that_ran(zoo: Zoo) -> None:
    metrics = {
        ("clockwork_executions_total", frozenset({("batch", "1")})): 3.0,
        (
            "clockwork_executions_total",
            frozenset({("batch", "3")}),
        ): 1.0,  # as the next size that was profiled
        ("clockwork_model_run_seconds_total", frozenset({("model", MODEL)})): 0.077,
    }

    assert slowness(metrics, zoo) == pytest.approx(1.1)
    assert slowness({}, zoo) == 0
