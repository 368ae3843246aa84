"""Devices: the hands that execute actions and decide nothing."""

from __future__ import annotations

from clockwork_serve.devices.base import CallBuffers, Device, DeviceConfig, Phases
from clockwork_serve.devices.emulated import emulated_config, emulated_profile
from clockwork_serve.devices.tensors import io_bytes
from clockwork_serve.errors import ConfigError

__all__ = [
    "CallBuffers", "Device", "DeviceConfig", "Phases",
    "build", "emulated_config", "emulated_profile", "io_bytes",
]  # fmt: skip


def build(config: DeviceConfig) -> Device:
    """The device that ``config`` describes, ready to prepare codes; ConfigError if there is no such kind.

    ONNX Runtime is imported only for a device that can run it.
    """
    if config.kind == "cpu":
        from clockwork_serve.devices.cpu import CpuDevice

        return CpuDevice(config)
    if config.kind == "emulated":
        from clockwork_serve.devices.emulated import EmulatedDevice

        return EmulatedDevice(config)
    raise ConfigError(f"device {config.device}: kind: expected cpu or emulated, found {config.kind!r}")
