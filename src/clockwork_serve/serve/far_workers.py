"""``clockwork worker``: a worker process for each device of this machine, which join a server elsewhere.

It keeps them running, and serves nothing itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, profile_kind
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve import far_children
from clockwork_serve.serve.launches import pinned_cores
from clockwork_serve.serve.machine_config import FAR_NAME, MachineConfig
from clockwork_serve.serve.supervisor import Launch
from clockwork_serve.serve.worker_process import WorkerConfig

SILENCE_S: Final = 40.0
"""Who does not answer for so long is ended. The server, which knows what it is at, cannot reach a process
here; at home it gives one that has work 30 s and a grace of 10, unless told otherwise."""


class FarWorkersConfig(Struct, frozen=True, kw_only=True):
    """``devices`` are called as the server will call them; ``machine`` lacks their kinds."""

    devices: tuple[DeviceConfig, ...]
    machine: MachineConfig
    realtime: bool = False
    pin: bool = False
    drain_s: float = 10.0
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        """Check the names. Raises :class:`ConfigError`."""
        for device in self.devices:
            if not FAR_NAME.fullmatch(device.device):
                raise ConfigError(
                    f"machine_name: expected a name such that a device is called NAME.cpu:0; found "
                    f"{device.device}; give --machine-name"
                )


def launches(config: FarWorkersConfig, run_dir: Path) -> list[Launch]:
    """A process for each device. Raises :class:`ConfigError`."""
    pins = pinned_cores(len(config.devices), os.sched_getaffinity(0)) if config.pin else {}
    found = []
    for number, device in enumerate(config.devices):
        worker = WorkerConfig(
            run_dir=str(run_dir), name=device.device, devices=(device,), pin_cpus=pins.get(number, ()),
            realtime=config.realtime, log_level=config.log_level, log_format=config.log_format,
            machine=msgspec.structs.replace(config.machine, kinds=(profile_kind(device),)),
        )  # fmt: skip
        found.append(Launch.of(f"worker-{device.device}", "worker", worker, SILENCE_S))
    return found


def run(config: FarWorkersConfig) -> int:
    """As :func:`far_children.run`."""
    return far_children.run(lambda run_dir: launches(config, run_dir), config.drain_s)
