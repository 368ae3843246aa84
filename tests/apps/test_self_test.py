"""The self-test of a device: what passes, what it finds wrong, and what it says where it cannot run."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.apps import self_test as app
from clockwork_serve.apps.self_test import FAILED, NOT_RUN, OK, SelfTest, self_test
from clockwork_serve.devices import CallBuffers, DeviceConfig, emulated_config
from clockwork_serve.devices.base import Phases
from clockwork_serve.devices.onnx import CpuDevice
from clockwork_serve.messages import Infer, Load
from clockwork_serve.store.trial import difference

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
CPU = DeviceConfig(device="cpu:0")
TORCH = DeviceConfig(device="torch-cpu:0", kind="torch-cpu")


def results(found: SelfTest) -> dict[str, str]:
    return {step.name: step.result for step in found.steps}


def failures(found: SelfTest) -> dict[str, str]:
    """What failed, and what was found."""
    return {step.name: step.found for step in found.steps if step.result != OK}


class ZeroWeights(CpuDevice):
    """Its weights never come, and what is in their place is 0."""

    def load(self, action: Load) -> int:
        took_ns = super().load(action)
        self._arena.view(action.extent, action.weights.size)[:] = 0
        return took_ns


class Swaps(CpuDevice):
    """It gives the requests of a batch each other's answers."""

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        phases = super().infer(action, calls)
        calls[0].output, calls[-1].output = calls[-1].output, calls[0].output
        return phases


class CannotLoad(CpuDevice):
    """Its driver raises what is no error of ours."""

    def load(self, action: Load) -> int:
        raise RuntimeError("driver: out of handles")


def test_a_cpu_passes_every_step_and_its_durations_are_shown() -> None:
    found = self_test(CPU)

    assert failures(found) == {}
    assert found.ok
    assert found.infer_ms.keys() == {1, app.MAX_BATCH}
    assert found.load_ms
    assert {"name", "clockwork-serve", "onnxruntime", "memory"} <= found.facts.keys()


@needs_torch
@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torch_on_a_cpu_passes_every_step() -> None:
    found = self_test(TORCH)

    assert failures(found) == {}
    assert {"name", "clockwork-serve", "torch", "memory"} <= found.facts.keys()


@pytest.mark.parametrize(("device", "step"), [(ZeroWeights, "compare"), (Swaps, "batch")])
def test_a_device_that_answers_wrongly_fails_that_step_and_the_others_run(
    device: type[CpuDevice], step: str
) -> None:
    found = self_test(CPU, make=device)

    assert failures(found).keys() == {step}
    assert "outputs: expected those of " in failures(found)[step]
    assert not found.ok


def test_after_a_step_that_raises_no_other_runs() -> None:
    found = self_test(CPU, make=CannotLoad)

    assert list(results(found).values()) == [OK, OK, FAILED, NOT_RUN, NOT_RUN, NOT_RUN, NOT_RUN]
    assert "found RuntimeError: driver: out of handles; " in failures(found)["load"]


def test_a_device_that_cannot_be_compiled_for_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert failures(self_test(TORCH))["compile"].startswith("C++ compiler: expected g++")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (structs.replace(CPU, device="cuda:77", kind="cuda"), "device cuda:77: expected "),
        (emulated_config("emulated:0", "v100"), "expected one that computes"),
    ],
)
def test_a_device_that_is_not_there_or_computes_nothing_is_the_first_step_that_fails(
    config: DeviceConfig, said: str
) -> None:
    found = self_test(config)

    assert said in failures(found)["device"]
    assert list(results(found).values()) == [FAILED] + [NOT_RUN] * 6


@needs_torch
def test_rows_have_answers_that_no_tolerance_takes_for_each_other(tmp_path: Path) -> None:
    outputs = app.write_torch(tmp_path)(app.rows_of_inputs())
    assert difference([outputs[:1]], [outputs[1:]]) > 5 * app.tolerance("cuda")


@needs_torch
def test_both_forms_of_the_model_are_one_model(tmp_path: Path) -> None:
    rows = app.rows_of_inputs()
    assert difference([app.write_onnx(tmp_path)(rows)], [app.write_torch(tmp_path)(rows)]) < 1e-5


def test_the_driver_tells_its_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert app.driver_version(file) == "none"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n")
    assert app.driver_version(file) == "550.54.15"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n")
    assert app.driver_version(file) == "575.57.08"
