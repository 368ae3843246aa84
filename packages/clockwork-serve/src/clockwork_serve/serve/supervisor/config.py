"""The configuration of a server: its settings, and the records of its parts that are derived from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from clockwork_serve.config import Settings, setting
from clockwork_serve.config.values import DeviceChoice
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig, emulated_config, torch_target
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway.settings import check_gateways
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB, ms


class ServerConfig(Struct, frozen=True, kw_only=True):
    """The configuration of a server, for its supervisor.

    ``store``, ``devices`` and ``controller`` configure parts that do not read settings. Without devices it is
    a controller by itself: whatever executes or is asked joins it from other machines.
    ``run_dir``: where the private folder of sockets is made (empty: XDG_RUNTIME_DIR, the temporary folder or
    ``/dev/shm``).
    """

    settings: Settings
    store: StoreConfig
    devices: tuple[DeviceConfig, ...] = (DeviceConfig(device="cpu:0"),)
    controller: ControllerConfig = ControllerConfig()
    run_dir: str = ""

    def __post_init__(self) -> None:
        """Check what the parts do not check themselves. Raises :class:`ConfigError`."""
        names = [config.device for config in self.devices]
        joined = self.settings.listen_machines and self.settings.store
        if len(set(names)) < len(names) or not (names or joined):
            raise ConfigError(f"devices: expected at least one, each once; found {names}; correct --device")
        check_gateways(self.settings)


def server_config(settings: Settings) -> ServerConfig:
    """The configuration derived from settings.

    Raises :class:`ConfigError`, also where torch or a GPU is wanted and not installed.
    """
    devices, store = device_configs(settings), store_config(settings)
    target = torch_target(devices)
    return ServerConfig(
        settings=settings,
        store=store if target is None else msgspec.structs.replace(store, torch_target=target),
        devices=devices,
        controller=controller_config(settings),
    )


def controller_alone(settings: Settings) -> ServerConfig:
    """The configuration of a controller without devices and gateways, which may stand by for others.

    Raises :class:`ConfigError` if it has no shared store, or nobody could join it.
    """
    if not settings.store:
        raise ConfigError(
            "store: expected the shared store, for the lease of who leads and the catalogue of models; found "
            "none; fill it with clockwork profile REPO --store STORE, and give it with --store"
        )
    if not settings.listen_machines:
        raise ConfigError(
            "listen_machines: expected HOST:PORT where workers and gateways may join; found none; give it by "
            "--listen-machines"
        )
    settings = msgspec.structs.replace(heard_soon(settings), repository="", gateways=1, grpc_port=None)
    return ServerConfig(
        settings=settings, store=store_config(settings), devices=(), controller=controller_config(settings)
    )


STANDBY_SILENCE_S: Final = 0.75
"""``silence_s`` where controllers share a lease: less than the lease's time."""


def heard_soon(settings: Settings) -> Settings:
    """The settings of a process of a server with several controllers."""
    return msgspec.structs.replace(settings, silence_s=STANDBY_SILENCE_S)


GPU_SHARE: Final = 0.8  # of a GPU's free memory; the rest is for workspace, inputs and outputs
GPU_PAGE: Final = 16 * MIB
GPU_GRAPHS: Final = 256  # CUDA graphs kept
_SIZES = {
    "device_memory": "memory_bytes",
    "workspace": "workspace_bytes",
    "io_memory": "io_bytes",
}


def store_config(settings: Settings) -> StoreConfig:
    """The store's configuration."""
    usual, largest = settings.largest_batches
    return StoreConfig(
        cache_dir=settings.cache, shared=settings.store, max_batch_size=usual, largest_batch=largest
    )


def device_configs(settings: Settings) -> tuple[DeviceConfig, ...]:
    """The devices' configurations. An emulated device has the memory of its profile, unless one was set."""
    return tuple(_device(settings, choice, number) for number, choice in enumerate(settings.device))


def _device(settings: Settings, choice: DeviceChoice, number: int) -> DeviceConfig:
    if choice.kind == "emulated":
        chosen = {
            field: getattr(settings, name)
            for name, field in _SIZES.items()
            if settings.is_set(name if name == "device_memory" else "scratch_memory")
            and isinstance(getattr(settings, name), int)
        }
        return emulated_config(
            choice.device, choice.profile, **chosen, jitter=choice.jitter, seed=choice.seed + number
        )
    memory = settings.device_memory
    config = DeviceConfig(
        device=choice.device,
        kind=choice.kind,
        threads=settings.threads,
        # A share of the memory applies to GPUs only; other devices beside them keep the default size.
        memory_bytes=memory if isinstance(memory, int) else setting("device_memory").default,
        workspace_bytes=settings.workspace,
        io_bytes=settings.io_memory,
    )
    return _gpu(settings, config) if choice.kind == "cuda" else config


def _gpu(settings: Settings, config: DeviceConfig) -> DeviceConfig:
    """The configuration of a GPU: most of its memory, large pages, and weights cached in host memory."""
    memory = settings.device_memory
    default = 0.0 if settings.is_set("device_memory") else GPU_SHARE
    return msgspec.structs.replace(
        config, memory_share=default if isinstance(memory, int) else memory,
        page_bytes=GPU_PAGE, pool_bytes=settings.host_memory, graphs=GPU_GRAPHS,
    )  # fmt: skip


def controller_config(settings: Settings) -> ControllerConfig:
    """The brain's configuration.

    Each field is the setting of the same name; a field in ns is the setting in ms or s.
    """
    given: dict[str, Any] = {}
    for name in ControllerConfig.__struct_fields__:
        stem = name.removesuffix("_ns")
        if hasattr(settings, name):
            given[name] = getattr(settings, name)
        elif hasattr(settings, f"{stem}_ms"):
            value = getattr(settings, f"{stem}_ms")
            given[name] = -1 if value is None else ms(value)
        elif hasattr(settings, f"{stem}_s"):
            given[name] = ms(1000 * getattr(settings, f"{stem}_s"))
    return ControllerConfig(**given)


def share_of_memory(wanted: float) -> int:
    """A size in bytes: ``wanted`` itself if it is an int, else that share of the machine's memory.

    In a container with less memory than the machine it is the share of that.
    """
    if isinstance(wanted, int):
        return wanted
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
    except OSError:
        limit = ""
    return round(wanted * (min(memory, int(limit)) if limit.strip().isdecimal() else memory))
