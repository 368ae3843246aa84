"""Settings become the records of the parts, and no default is said twice in two ways."""

from __future__ import annotations

from clockwork_serve.config import read_settings
from clockwork_serve.config.records import controller_config, device_configs, store_config
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices.base import DeviceConfig
from clockwork_serve.store import StoreConfig


def test_the_defaults_are_the_parts_own() -> None:
    settings = read_settings({}, {}, None)

    assert controller_config(settings) == ControllerConfig()
    assert store_config(settings) == StoreConfig(cache_dir=settings.cache)
    assert device_configs(settings) == (DeviceConfig(device="cpu:0", memory_bytes=10**9),)


def test_what_is_set_arrives_in_the_parts_units() -> None:
    flags = {
        "device": ["cpu", "emulated:v100"], "device_memory": "64MiB", "page_size": "64KiB", "jitter": "0.1",
        "seed": "7", "look_ahead_ms": "2.5", "slack_ms": "0.25", "reject": False,
        "max_batch": "4", "largest_batch": "2", "cache": "/c",
    }  # fmt: skip
    settings = read_settings(flags, {}, None)

    cpu, emulated = device_configs(settings)
    controller = controller_config(settings)
    store = store_config(settings)

    assert (cpu.memory_bytes, cpu.page_bytes, cpu.seed, emulated.seed) == (64 << 20, 64 << 10, 7, 8)
    assert (emulated.device, emulated.kind, emulated.profile, emulated.jitter) == (
        "emulated:0", "emulated", "v100", 0.1,
    )  # fmt: skip
    assert (controller.look_ahead_ns, controller.slack_ns) == (2_500_000, 250_000)
    assert (controller.reject_infeasible, controller.max_batch, controller.expected_devices) == (False, 4, 2)
    assert (store.cache_dir, store.max_batch_size, store.largest_batch) == ("/c", 4, 4)
