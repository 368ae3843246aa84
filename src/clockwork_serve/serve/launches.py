"""Which processes a server is made of, and how each is configured; nothing is started here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from clockwork_serve.devices import DeviceConfig, profile_kind
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.controller_process import ControllerProcessConfig
from clockwork_serve.serve.machine_config import FarServer
from clockwork_serve.serve.server_config import GatewaysConfig, ServerConfig
from clockwork_serve.serve.supervisor import Launch


def launches(config: ServerConfig, run_dir: Path, port_by_name: Mapping[str, int]) -> list[Launch]:
    """All child processes that stay: the controller, workers, gateways, and a bridge to other machines.

    Workers are the controller's to watch, which knows what they are at.
    Raises :class:`ConfigError`.
    """
    logs = {"log_level": config.log_level, "log_format": config.log_format}
    controller = ControllerProcessConfig(
        run_dir=str(run_dir),
        controller=config.controller,
        devices=tuple(device.device for device in config.devices),
        journal=config.journal,
        **logs,
    )
    pins = pinned_cores(len(config.devices), os.sched_getaffinity(0)) if config.pin else {}
    workers = [
        Launch.of(
            name,
            "worker",
            {
                "run_dir": str(run_dir),
                "name": name,
                "devices": devices,
                "pin_cpus": pins.get(number, ()),
                "realtime": config.realtime,
                **logs,
            },
        )
        for number, (name, devices) in enumerate(workers_of(config.devices))
    ]
    bridges = []
    if config.machines is not None:
        kinds = tuple(dict.fromkeys(profile_kind(device) for device in config.devices))
        bridge = {"run_dir": str(run_dir), "settings": config.machines, "kinds": kinds, **logs}
        bridges.append(Launch.of("bridge", "bridge", bridge, config.stuck_s))
    gateways = gateway_launches(config, run_dir, port_by_name)
    watched = Launch.of("controller", "controller", controller, config.stuck_s)
    return [watched, *workers, *gateways, *bridges]


def workers_of(devices: tuple[DeviceConfig, ...]) -> list[tuple[str, list[DeviceConfig]]]:
    """Names of workers and their devices: a process each, but one for all emulated ones not set apart."""
    emulated = [device for device in devices if device.kind == "emulated" and not device.apart]
    workers = [(f"worker-{device.device}", [device]) for device in devices if device not in emulated]
    return [*workers, ("worker-emulated", emulated)] if emulated else workers


def pinned_cores(workers: int, cores: set[int]) -> dict[int, tuple[int, ...]]:
    """Cores for each worker, from the last one down; the first stays for everybody else."""
    if len(cores) <= workers:
        raise ConfigError(
            f"pin: expected more than {workers} cores for {workers} devices; found {len(cores)}; leave it out"
        )
    ordered, each = sorted(cores, reverse=True), (len(cores) - 1) // workers
    return {number: tuple(sorted(ordered[number * each : (number + 1) * each])) for number in range(workers)}


def gateway_launches(
    config: GatewaysConfig, run_dir: Path, port_by_name: Mapping[str, int], server: FarServer | None = None,
    prefix: str = "",
) -> list[Launch]:  # fmt: skip
    """The gateways of one machine, called ``gateway-0`` and so on after ``prefix``.

    ``server``: they are not the server's own, which is elsewhere.
    """
    return [
        Launch.of(
            f"{prefix}gateway-{number}",
            "gateway",
            {
                "run_dir": str(run_dir),
                "name": f"{prefix}gateway-{number}",
                "host": config.host,
                "http_port": port_by_name["http_port"],
                "grpc_port": port_by_name.get("grpc_port"),
                # Gateways count apart, so they cannot share one page of metrics.
                "metrics_port": port_by_name.get("metrics_port") if number == 0 else None,
                "default_slo_ns": config.default_slo_ns,
                "region_bytes": config.region_bytes,
                "max_body_bytes": config.max_body_bytes,
                "reuse_port": True,
                "gateways": config.gateways,
                "number": number,
                "model_control": config.model_control,
                "shared_memory": config.shared_memory,
                "triton_codes": config.triton_codes,
                "door": config.door,
                "server": server,
                # At home the keeper drains the whole server before it ends one.
                **({} if server is None else {"drain_s": config.drain_s}),
                "log_level": config.log_level,
                "log_format": config.log_format,
            },
            config.stuck_s,
        )
        for number in range(config.gateways)
    ]
