"""Devices, which execute actions as they are given, and decide nothing."""

from __future__ import annotations

import importlib.util

from clockwork_serve.devices.base import CallBuffers, Device, DeviceConfig, io_bytes
from clockwork_serve.devices.emulated import emulated_config, emulated_profile
from clockwork_serve.devices.kinds import BACKENDS, check_torch, profile_kind, runs, torch_target
from clockwork_serve.errors import ConfigError

__all__ = [
    "CallBuffers", "Device", "DeviceConfig", "build", "emulated_config", "emulated_profile",
    "import_runtime", "io_bytes", "profile_kind", "runs", "torch_target",
]  # fmt: skip


def build(config: DeviceConfig) -> Device:
    """Build the device that ``config`` describes; ConfigError for an unknown kind.

    ONNX Runtime and torch are imported only for a device that runs them.
    """
    if config.kind == "cpu":
        from clockwork_serve.devices.onnx import CpuDevice

        return CpuDevice(config)
    if config.kind in ("torch-cpu", "cuda"):
        check_torch(config.device)
        from clockwork_serve.devices.torch import TorchDevice

        return TorchDevice(config)
    if config.kind == "emulated":
        from clockwork_serve.devices.emulated import EmulatedDevice

        return EmulatedDevice(config)
    raise ConfigError(
        f"device {config.device}: kind: expected one of {', '.join(BACKENDS)}, found {config.kind!r}"
    )


def import_runtime(config: DeviceConfig) -> None:
    """Import what :func:`build` would; nothing for a device that would be refused there."""
    if config.kind == "cpu":
        from clockwork_serve.devices import onnx  # noqa: F401
    elif config.kind in ("torch-cpu", "cuda") and importlib.util.find_spec("torch") is not None:
        from clockwork_serve.devices import torch  # noqa: F401
