"""What kinds of devices run, and what torch models are compiled for, without a runtime in sight."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from clockwork_serve.devices import DeviceConfig, build, kinds, profile_kind, runs, torch_target
from clockwork_serve.errors import ConfigError

CPU = DeviceConfig(device="cpu:0")
TORCH = DeviceConfig(device="torch-cpu:0", kind="torch-cpu")
EMULATED = DeviceConfig(device="emulated:0", kind="emulated", profile="v100")


def gpu(number: int) -> DeviceConfig:
    return DeviceConfig(device=f"cuda:{number}", kind="cuda")


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were installed."""
    monkeypatch.setattr(kinds, "check_torch", lambda device: None)


def have(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """As if the driver listed these GPUs."""
    found = tuple(kinds.Gpu(name=f"G{number}", capability=one) for number, one in enumerate(capabilities))
    monkeypatch.setattr(kinds, "gpus", lambda: found)


@pytest.mark.parametrize(
    ("config", "able"),
    [
        (CPU, {"onnx", "python"}),
        (TORCH, {"torch"}),
        (gpu(0), {"torch"}),
        (EMULATED, {"onnx", "torch", "emulated"}),
    ],
)
def test_a_device_runs_the_backends_of_its_kind(config: DeviceConfig, able: set[str]) -> None:
    assert {name for name in ("onnx", "python", "torch", "emulated") if runs(config, name)} == able


def test_profiles_of_different_gpus_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, "sm_90", "sm_75")
    configs = (CPU, TORCH, EMULATED, gpu(0), gpu(1))
    assert [profile_kind(config) for config in configs] == [
        "cpu", "torch-cpu", "emulated:v100", "cuda:sm_90", "cuda:sm_75",
    ]  # fmt: skip


@pytest.mark.usefixtures("with_torch")
def test_a_server_has_the_target_of_its_torch_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, "sm_90", "sm_90", "sm_75")
    assert torch_target((CPU, EMULATED)) is None
    assert torch_target((CPU, TORCH)) == "cpu"
    assert torch_target((CPU, gpu(0), gpu(1))) == "cuda:sm_90"
    for mixed in ((TORCH, gpu(0)), (gpu(1), gpu(2))):
        with pytest.raises(ConfigError, match=r"all torch devices of a server must be alike; found .*cuda:"):
            torch_target(mixed)


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize(("capabilities", "found"), [((), "none"), (("sm_90",), r"cuda:0 \(G0\)")])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capabilities: tuple[str, ...], found: str
) -> None:
    have(monkeypatch, *capabilities)
    with pytest.raises(
        ConfigError, match=f"device cuda:1: expected a GPU .*; found {found}; correct --device"
    ):
        torch_target((gpu(1),))


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
@pytest.mark.parametrize("config", [TORCH, gpu(0)])
def test_without_torch_it_is_said_what_to_install(config: DeviceConfig) -> None:
    for act in (lambda: torch_target((config,)), lambda: build(config)):
        with pytest.raises(ConfigError, match=r"found none; in a clone .*clockwork-serve\[torch\]"):
            act()


def test_a_host_without_the_driver_has_no_gpus() -> None:
    assert isinstance(kinds.gpus(), tuple)


def test_nobody_imports_torch_who_does_not_run_it() -> None:
    source = (
        "import sys; from clockwork_serve.devices import build, DeviceConfig, torch_target;"
        "build(DeviceConfig(device='cpu:0', memory_bytes=1 << 20)); torch_target(());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False, timeout=60).returncode == 0
