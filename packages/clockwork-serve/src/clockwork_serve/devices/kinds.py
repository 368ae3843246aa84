"""Kinds of devices: the backends that they run, and how profiles and compiled torch models are selected.

It imports no runtime, for use in processes that only plan for a device.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from clockwork_serve.devices.base import DeviceConfig
from clockwork_serve.devices.emulated import BACKENDS as EMULATED
from clockwork_serve.devices.emulated import device_kind
from clockwork_serve.errors import ConfigError, install_advice

BACKENDS: Final[dict[str, tuple[str, ...]]] = {
    "cpu": ("onnx", "python"),
    "torch-cpu": ("torch",),
    "cuda": ("torch",),
    "emulated": EMULATED,
}
"""By kind of device: the backends of the codes that it runs."""

_MAJOR: Final = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; MINOR is the next


class Gpu(Struct, frozen=True, kw_only=True):
    """A GPU as reported by the driver: ``capability`` is ``sm_90``."""

    name: str
    capability: str


def runs(config: DeviceConfig, backend: str) -> bool:
    """Whether a device can run codes of a backend."""
    return backend in BACKENDS[config.kind]


def ordinal_of(device: str) -> int:
    """The number in a device's name."""
    return int(device.rpartition(":")[2])


def profile_kind(config: DeviceConfig) -> str:
    """What selects a device's profiles: ``cpu``, ``torch-cpu``, ``cuda:sm_90`` or ``emulated:NAME``."""
    if config.kind == "emulated":
        return device_kind(config)
    return f"cuda:{_gpu(config).capability}" if config.kind == "cuda" else config.kind


def torch_target(configs: Iterable[DeviceConfig]) -> str | None:
    """The target to compile torch models for (``cpu``, ``cuda:sm_90``); None if no device runs them.

    Raises :class:`ConfigError` if there is no torch, no such GPU, or more than one target.
    """
    devices_by_target: dict[str, str] = {}
    for config in configs:
        if config.kind in ("torch-cpu", "cuda"):
            check_torch(config.device)
            target = "cpu" if config.kind == "torch-cpu" else profile_kind(config)
            devices_by_target.setdefault(target, config.device)
    if len(devices_by_target) > 1:
        found = ", ".join(f"{device} ({target})" for target, device in devices_by_target.items())
        raise ConfigError(
            "device: torch models are compiled for one target, so all torch devices of a server must be"
            f" alike; found {found}; serve them by a server each"
        )
    return next(iter(devices_by_target), None)


def check_torch(device: str) -> None:
    """Raise :class:`ConfigError` unless torch is installed."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"device {device}: expected torch to be installed; found none; "
            f"{install_advice('clockwork-serve[torch]')}"
        )


def _gpu(config: DeviceConfig) -> Gpu:
    found, wanted = gpus(), ordinal_of(config.device)
    if wanted < len(found):
        return found[wanted]
    names = ", ".join(f"cuda:{number} ({gpu.name})" for number, gpu in enumerate(found))
    raise ConfigError(
        f"device {config.device}: expected a GPU that the NVIDIA driver lists; found {names or 'none'};"
        " correct --device, or use torch-cpu"
    )


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """All GPUs visible to this process, in CUDA's order; none without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_read_gpu(cuda, number) for number in range(count.value))


def _read_gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDeviceGetName(name, 256, number)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, number)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MAJOR + 1, number)
    return Gpu(name=name.value.decode(errors="replace"), capability=f"sm_{major.value}{minor.value}")
