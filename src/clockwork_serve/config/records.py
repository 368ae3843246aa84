"""From settings to the small record that each part takes. A part never sees a setting that is not its own."""

from __future__ import annotations

from clockwork_serve.config.reader import Settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices.base import DeviceConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import ms


def store_config(settings: Settings) -> StoreConfig:
    """What the store compiles for."""
    return StoreConfig(
        cache_dir=settings.cache,
        max_batch_size=settings.max_batch,
        largest_batch=max(settings.largest_batch, settings.max_batch),
        queue_limit=settings.queue_limit,
    )


def device_configs(settings: Settings) -> tuple[DeviceConfig, ...]:
    """The devices to build."""
    return tuple(
        DeviceConfig(
            device=choice.device,
            kind=choice.kind,
            profile=choice.profile,
            memory_bytes=settings.device_memory,
            page_bytes=settings.page_size,
            workspace_bytes=settings.workspace,
            io_bytes=settings.io_memory,
            threads=settings.threads,
            jitter=settings.jitter,
            seed=settings.seed + number,
        )
        for number, choice in enumerate(settings.device)
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
        expected_devices=len(settings.device),
    )
