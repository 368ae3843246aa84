"""The GPU benchmark: its page, its records, what it says without a GPU; all of it in short form on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.copies import Copies, shift
from benchmarks.gpu.machine import Target, state
from benchmarks.gpu.page import Part, Results, page, record, write
from benchmarks.gpu.rig import SHORT, Rig, error_of
from benchmarks.gpu.steady import errors_of
from clockwork_serve.controller.estimates import Samples
from clockwork_serve.messages import Weights
from harness.report import Outcome

ROOT = Path(__file__).parents[2]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")


def results(*parts: Part, device: str = "cuda:0") -> Results:
    return Results("gpu", device, short=False, budget_s=540, facts={"gpu": "H100"}, parts=list(parts))


def part(name: str = "load", *, why_not: str = "") -> Part:
    return Part(name, name.upper(), Outcome(name), why_not=why_not)


def session(tmp_path: Path) -> gpu.Session:
    told: list[str] = []
    rig = Rig(Target("torch-cpu:0", "torch-cpu"), SHORT, tmp_path, tmp_path, 1, told.append)
    return gpu.Session(rig, time.monotonic() + 100)


def test_the_page_has_goals_what_was_measured_and_whether_they_were_met() -> None:
    one = part()
    one.outcome.judge("max|a|", asked="<= 1", found="2", good=False)
    one.outcome.judge("p50", asked="", found="3 ms", good=True)

    text = page(results(one))

    assert "| max\\|a\\| | <= 1 | 2 | **no** |" in text
    assert "| p50 | - | 3 ms | - |" in text
    assert "The torch device on H100" in text


def test_what_was_not_measured_is_said_and_judged_as_neither_met_nor_missed() -> None:
    one = part(why_not="the time is over")
    two = part("graphs")
    two.outcome.judge("ratio", asked="<= 1", found="2", good=False)
    two.outcome.invalid = "there are none"

    found = results(one, two)

    assert page(found).count("Not measured: ") == 2
    assert "ratio" not in page(found)
    assert found.missed == 0
    assert [each["verdict"] for each in record(found)["parts"]] == ["invalid", "invalid"]


def test_figures_of_a_cpu_are_never_taken_for_those_of_a_gpu() -> None:
    assert "This is the CPU" in page(results(device="torch-cpu:0"))
    assert "This is the CPU" not in page(results())


def test_what_there_was_none_of_is_null_in_json(tmp_path: Path) -> None:
    one = part()
    one.outcome.figures = {"latency_ms": {"p50": float("nan"), "p99": (1.0, float("inf"))}, 16: 2}

    write(results(one), tmp_path / "gpu.json", tmp_path / "gpu.md")

    found = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)
    assert found["parts"][0]["figures"] == {"latency_ms": {"p50": None, "p99": [1.0, None]}, "16": 2}


def test_a_part_that_fails_leaves_the_others_and_what_it_measured_before(tmp_path: Path) -> None:
    def work(given: gpu.Session, outcome: Outcome, seconds: float) -> None:
        outcome.judge("first", asked="<= 1", found="1", good=True)
        raise RuntimeError("CUDA error: an illegal memory access")

    found = results(part())
    here = session(tmp_path)
    here.rig.served["resnet50"] = None  # what it is does not matter to this part

    gpu._run(here, found, gpu.Planned("load", "LOAD", 1, work), [1])

    assert "illegal memory access" in found.parts[0].why_not
    assert found.parts[0].outcome.verdicts[0].good
    assert not found.complete


def test_no_part_begins_when_the_time_is_over_or_its_model_is_not_there(tmp_path: Path) -> None:
    def work(given: gpu.Session, outcome: Outcome, seconds: float) -> None:
        raise AssertionError("it began")

    found = results(part())
    here = session(tmp_path)
    planned = gpu.Planned("load", "LOAD", 1, work)

    gpu._run(here, found, planned, [1])
    assert "not compiled" in found.parts[0].why_not
    here.rig.served["resnet50"] = None
    here.ends_s = time.monotonic() - 1
    gpu._run(here, found, planned, [1])
    assert "time is over" in found.parts[0].why_not


def test_prediction_errors_are_those_of_a_window_that_was_told_the_durations_before() -> None:
    assert errors_of(Samples(100, 10, 0.99), [100, 100, 100]) == [0, 0, 0]
    errors = errors_of(Samples(100, 10, 0.99), [100] * 20 + [500] + [100] * 20)
    assert errors[20] == 400  # it could not be foreseen
    assert min(errors[21:31]) < -300  # and was expected again, for a window
    assert errors[31:] == [0] * 10


def test_a_copy_answers_as_its_base_with_a_last_bias_of_its_own() -> None:
    files = [Weights(weights_id=str(number), path=str(number), size=1) for number in range(3)]
    bases = [np.zeros((1, 4)), np.ones((1, 4))]
    copies = Copies(8, files, [0, 1, 2], np.zeros((1, 1), np.float32), bases, "few")

    assert error_of(copies.wanted(1), 1 + shift(1, 4)[None]) == 0
    assert error_of(copies.wanted(4), copies.wanted(1)) == 0  # one file, two models
    assert copies.weights(4) == copies.weights(1), "an id says what is in the file"
    assert copies.weights(4).path == "1"
    assert error_of(copies.wanted(2), copies.wanted(1)) > 0.1


@needs_torch
def test_states_of_a_gpu_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One name is unknown to this driver, so that each is asked for alone."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in *throttle*) echo "not a valid field"; exit 2;; *clocks.sm) echo 1755;;\n'
        '*gen.current) echo 4;; *power.draw) echo 71.25;; *) echo "[N/A]";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    found = state(Target("cuda:0", "cuda"))

    assert found["sm_mhz"] == 1755
    assert found["power_w"] == 71.25
    assert found["pcie"] == 4
    assert found["celsius"] == "[N/A]"
    assert "throttled" not in found


def test_without_the_gpu_it_says_what_it_found_and_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cuda:77"]) == 2
    said = capsys.readouterr().err
    assert "torch" in said
    if importlib.util.find_spec("torch"):
        assert "--device torch-cpu --short" in said


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "tpu:0"])
def test_a_device_that_is_none_is_named(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", device]) == 2
    assert device in capsys.readouterr().err


@needs_torch
@pytest.mark.slow
def test_the_networks_are_the_published_ones() -> None:
    from benchmarks.gpu import models as gpu_models

    counts = {"resnet50": 25_557_032, "mobilenet_v3": 5_483_032}
    kinds = gpu_models.kinds(short=False)
    assert counts == {name: sum(each.numel() for each in kinds[name].build().parameters()) for name in counts}


def start(tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "benchmarks.gpu", "--device", "torch-cpu", "--short"]
    files = ["--cache", "cache", "--json", "gpu.json", "--page", "gpu.md"]
    paths = ":".join((*map(str, (ROOT, *ROOT.glob("packages/*/src"))), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [*command, *files, *more], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


@needs_torch
@needs_compiler
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_interrupted_run_leaves_what_it_has(tmp_path: Path) -> None:
    with start(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "compiling" in line:
                break
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait() == 2, said
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["interrupted"]
    assert not written["complete"]
    assert "not reached yet" in written["parts"][-1]["not_measured"]
    assert "Not complete" in (tmp_path / "gpu.md").read_text()
    assert not list((tmp_path / "cache").glob("run-*"))


@needs_torch
@needs_compiler
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_runs_on_a_cpu_in_short_form(tmp_path: Path) -> None:
    """Durations of a busy CPU may miss any goal; answers, accounting and allocations may not."""
    with start(tmp_path, "--budget-s", "800") as process:
        said = process.communicate()[0]
    assert process.returncode in {0, 1}, said
    written = json.loads((tmp_path / "gpu.json").read_text())
    parts = {each["name"]: each for each in written["parts"]}

    assert written["complete"]
    assert [name for name, each in parts.items() if each["not_measured"]] == ["graphs"]
    answers = [name for name in parts if name.startswith("answers")]
    assert answers == ["answers", "answers_mobilenet_v3", "answers_encoder", "answers_lstm"]
    exact = [one for name in (*answers, "copies") for one in parts[name]["verdicts"]]
    assert [one for one in exact if one["met"] is False] == []
    thousand = parts["thousand"]["figures"]["thousand"]
    assert thousand["compared"] > 0
    assert parts["thousand"]["verdicts"][0]["met"]
    assert parts["steadiness"]["figures"]["infer_ms"]["count"] == 400
    for told in [thousand, *parts["goodput"]["figures"]["goodput"]["slos"]]:
        assert told["good"] > 0
        assert told["twice"] == told["unanswered"] == told["failed"] == 0
    assert "This is the CPU" in (tmp_path / "gpu.md").read_text()
