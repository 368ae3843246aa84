"""From settings to the small record that each part takes. A part never sees a setting that is not its own."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_serve.config.reader import Settings
from clockwork_serve.config.table import DeviceChoice, machine_name, setting, split_address
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig, emulated_config, torch_target
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway.access import DoorConfig
from clockwork_serve.serve.gateway.settings import HttpLimits
from clockwork_serve.serve.remote.config import BridgeSettings, FarServer, MachineConfig
from clockwork_serve.serve.remote.tls import ClusterFiles
from clockwork_serve.serve.supervisor.children import FarGatewaysConfig, FarWorkersConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB, ms

GPU_SHARE: Final = 0.8
"""Of a GPU's free memory; the rest is for workspace, inputs and outputs."""
GPU_PAGE: Final = 16 * MIB
_SIZES = {
    "device_memory": "memory_bytes",
    "page_size": "page_bytes",
    "workspace": "workspace_bytes",
    "io_memory": "io_bytes",
}


def store_config(settings: Settings) -> StoreConfig:
    """What the store compiles for."""
    return StoreConfig(
        cache_dir=settings.cache,
        max_batch_size=settings.max_batch,
        largest_batch=max(settings.largest_batch, settings.max_batch),
        queue_limit=settings.queue_limit,
    )


def device_configs(settings: Settings) -> tuple[DeviceConfig, ...]:
    """The devices to build. An emulated one has the memory of its profile, unless a size was set."""
    return tuple(_device(settings, choice, number) for number, choice in enumerate(settings.device))


def _device(settings: Settings, choice: DeviceChoice, number: int) -> DeviceConfig:
    if choice.kind == "emulated":
        chosen = {
            field: getattr(settings, name)
            for name, field in _SIZES.items()
            if settings.sources[name] != "default" and isinstance(getattr(settings, name), int)
        }
        return emulated_config(
            choice.device, choice.profile, **chosen, jitter=settings.jitter, seed=settings.seed + number
        )
    memory = settings.device_memory
    config = DeviceConfig(
        device=choice.device,
        kind=choice.kind,
        threads=settings.threads,
        # A share is for the GPUs; what is not one keeps its default beside them.
        memory_bytes=memory if isinstance(memory, int) else setting("device_memory").default,
        page_bytes=settings.page_size,
        workspace_bytes=settings.workspace,
        io_bytes=settings.io_memory,
    )
    return _gpu(settings, config) if choice.kind == "cuda" else config


def _gpu(settings: Settings, config: DeviceConfig) -> DeviceConfig:
    """What is different of a GPU: most of its memory, large pages, weights kept ready in host memory."""
    memory, sources = settings.device_memory, settings.sources
    default = GPU_SHARE if sources["device_memory"] == "default" else 0.0
    return msgspec.structs.replace(
        config,
        memory_share=default if isinstance(memory, int) else memory,
        page_bytes=GPU_PAGE if sources["page_size"] == "default" else config.page_bytes,
        pool_bytes=settings.host_memory,
        graphs=settings.cuda_graphs,
    )


def controller_config(settings: Settings) -> ControllerConfig:
    """How requests are scheduled."""
    return ControllerConfig(
        policy=settings.policy,
        reject_infeasible=settings.reject,
        look_ahead_ns=ms(settings.look_ahead_ms),
        slack_ns=ms(settings.slack_ms),
        max_batch=settings.max_batch,
        retries=settings.retries,
        quarantine_after=settings.quarantine_after,
        hang_ns=ms(1000 * settings.hang_s),
        hang_grace_ns=ms(1000 * settings.hang_grace_s),
        expected_devices=len(settings.device),
    )


def door_config(settings: Settings) -> DoorConfig:
    """Who may come in, and how."""
    limits = HttpLimits(
        header_bytes=settings.max_head,
        headers=settings.max_headers,
        body_bytes=settings.max_body,
        message_bytes=settings.max_message,
        json_bytes=settings.max_json,
        arriving_bytes=settings.gateway_memory,
        header_s=settings.head_s,
        body_s=settings.body_s,
        idle_s=settings.idle_s,
        send_s=settings.send_s,
        unsent_bytes=settings.max_unsent,
        connections=settings.max_connections,
        calls=settings.max_calls,
        requests=settings.max_requests,
        stream_s=settings.stream_s,
    )
    return DoorConfig(
        tls_certificate=settings.tls_certificate,
        tls_key=settings.tls_key,
        tls_client_ca=settings.tls_client_ca,
        api_keys=settings.api_keys,
        limits=limits,
    )


def share_of_memory(wanted: float) -> int:
    """So many bytes, or that share of the machine's memory (of the container's, where it has less)."""
    if isinstance(wanted, int):
        return wanted
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
    except OSError:
        limit = ""
    return round(wanted * (min(memory, int(limit)) if limit.strip().isdecimal() else memory))


def cluster_files(settings: Settings) -> ClusterFiles:
    """What this machine shows to others, and wants of them."""
    return ClusterFiles(
        certificate=settings.cluster_certificate, key=settings.cluster_key, ca=settings.cluster_ca
    )


def bridge_settings(settings: Settings) -> BridgeSettings | None:
    """Where workers and gateways on other machines may join, if anywhere."""
    if not settings.listen_machines:
        return None
    host, port = split_address(settings.listen_machines)
    return BridgeSettings(
        host=host, port=port, files=cluster_files(settings), silence_s=settings.silence_s,
        region_bytes=settings.gateway_memory,
    )  # fmt: skip


def far_server(settings: Settings, joining: str) -> FarServer:
    """The server that ``joining``, such as a worker, wants to join. Raises :class:`ConfigError`."""
    if not settings.controller:
        raise ConfigError(
            "controller: expected HOST:PORT of a server that was started with --listen-machines; found none; "
            "give it with --controller"
        )
    files = cluster_files(settings)
    files.check(f"{joining} on another machine")
    host, port = split_address(settings.controller)
    return FarServer(host=host, port=port, files=files, silence_s=settings.silence_s)


def name_of_machine(settings: Settings) -> str:
    """What this machine is called at a server elsewhere."""
    return settings.machine_name or machine_name(socket.gethostname().partition(".")[0])


def far_workers_config(settings: Settings) -> FarWorkersConfig:
    """Workers that join a server on another machine. Raises :class:`ConfigError` for what is missing."""
    server, name = far_server(settings, "a worker"), name_of_machine(settings)
    devices = [
        msgspec.structs.replace(device, device=f"{name}.{device.device}")
        for device in device_configs(settings)
    ]
    machine = MachineConfig(
        host=server.host, port=server.port, files=server.files, silence_s=server.silence_s, kinds=(),
        cache_dir=settings.cache, region_bytes=2 * max(settings.io_memory, settings.gateway_memory),
    )  # fmt: skip
    return FarWorkersConfig(
        devices=tuple(devices), machine=machine, realtime=settings.realtime, pin=settings.pin,
        drain_s=settings.drain_s, log_level=settings.log_level, log_format=settings.log_format,
    )  # fmt: skip


def far_gateways_config(settings: Settings) -> FarGatewaysConfig:
    """Gateways for a server on another machine. Raises :class:`ConfigError` for what is missing."""
    return FarGatewaysConfig(
        server=far_server(settings, "a gateway"),
        machine=name_of_machine(settings),
        **gateway_fields(settings),
    )


def gateway_fields(settings: Settings) -> dict[str, Any]:
    """The fields of a :class:`GatewaysConfig`."""
    return {
        "host": settings.host,
        "http_port": settings.http_port,
        "grpc_port": settings.grpc_port,
        "metrics_port": settings.metrics_port,
        "default_slo_ns": None if settings.slo_ms is None else ms(settings.slo_ms),
        "gateways": settings.gateways,
        "region_bytes": settings.gateway_memory,
        "max_body_bytes": settings.max_body,
        "model_control": settings.model_control,
        "shared_memory": settings.shared_memory,
        "triton_codes": settings.triton_codes,
        "door": door_config(settings),
        "drain_s": settings.drain_s,
        "stuck_s": settings.stuck_s,
        "log_level": settings.log_level,
        "log_format": settings.log_format,
    }


def server_config(settings: Settings) -> ServerConfig:
    """A whole server. Raises :class:`ConfigError` also where torch or a GPU is asked for and not there."""
    devices, store = device_configs(settings), store_config(settings)
    target = torch_target(devices)
    return ServerConfig(
        repository=settings.repository,
        store=store if target is None else msgspec.structs.replace(store, torch_target=target),
        devices=devices,
        controller=controller_config(settings),
        compile_memory_bytes=share_of_memory(settings.compile_memory),
        compile_s=settings.compile_s,
        journal=settings.journal,
        pin=settings.pin,
        realtime=settings.realtime,
        machines=bridge_settings(settings),
        **gateway_fields(settings),
    )
