"""Settings become the configurations of the parts, and no default is defined twice in two ways."""

from __future__ import annotations

import msgspec
import pytest

from clockwork_serve.config import Settings, read_settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig, emulated_config, kinds
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.config import (
    ServerConfig,
    controller_config,
    device_configs,
    server_config,
    share_of_memory,
    store_config,
)
from clockwork_serve.store import StoreConfig


def test_the_defaults_are_the_parts_own() -> None:
    settings = read_settings({}, {}, None)

    by_default = msgspec.structs.replace(ControllerConfig(), max_batch=64)  # models say how much less
    assert controller_config(settings) == by_default
    assert store_config(settings) == StoreConfig(cache_dir=settings.cache)
    assert device_configs(settings) == (DeviceConfig(device="cpu:0", memory_bytes=10**9),)
    assert server_config(settings) == ServerConfig(
        settings=settings, store=StoreConfig(cache_dir=settings.cache), devices=device_configs(settings),
        controller=by_default,
    )  # fmt: skip


def test_every_field_of_the_brain_s_record_is_a_setting_or_is_known_not_to_be() -> None:
    others = {
        "network_ns", "max_exec_ns", "min_batch_gain", "estimate_window", "estimate_quantile", "lag_ns",
        "capacity_ns", "first_id", "reject_infeasible", "expected_devices", "look_ahead_ns", "retries",
    }  # fmt: skip
    for name in ControllerConfig.__struct_fields__:
        stem = name.removesuffix("_ns")
        is_setting = any(hasattr(Settings(), each) for each in (name, f"{stem}_ms", f"{stem}_s"))
        assert is_setting is (name not in others), name
    flags = {"quarantine_after": "5", "watchdog_s": "1.5", "policy": "paper"}
    found = controller_config(read_settings(flags, {}, None))
    assert (found.quarantine_after, found.policy) == (5, "paper")
    assert (found.hang_ns, found.hang_grace_ns) == (1_500_000_000, 7_500_000_000)


def test_what_is_set_arrives_in_the_parts_units() -> None:
    flags = {
        "device": ["cpu", "emulated:v100?jitter=0.1&seed=7"], "device_memory": "64MiB", "slack_ms": "0.25",
        "scratch_memory": "50MiB", "max_batch": "4", "cache": "/c", "store": "s3://b/c",
    }  # fmt: skip
    settings = read_settings(flags, {}, None)

    cpu, emulated = device_configs(settings)
    controller = controller_config(settings)
    store = store_config(settings)

    assert (cpu.memory_bytes, cpu.page_bytes, emulated.seed) == (64 << 20, 256 << 10, 8)
    assert emulated.memory_bytes == 64 << 20
    for each in (cpu, emulated):
        assert (each.workspace_bytes, each.io_bytes) == (40 << 20, 10 << 20)
    assert (emulated.device, emulated.kind, emulated.profile, emulated.jitter) == (
        "emulated:0", "emulated", "v100", 0.1,
    )  # fmt: skip
    assert (controller.slack_ns, controller.max_batch) == (250_000, 4)
    assert (store.cache_dir, store.shared) == ("/c", "s3://b/c")
    assert (store.max_batch_size, store.largest_batch) == (4, 4)


def test_an_emulated_device_has_its_profile_s_memory_unless_a_size_was_set() -> None:
    bare = read_settings({"device": ["emulated:v100"]}, {}, None)
    sized = read_settings({"device": ["emulated:v100"], "device_memory": "1GiB"}, {}, None)

    assert device_configs(bare) == (emulated_config("emulated:0", "v100"),)
    assert device_configs(sized)[0].memory_bytes == 1 << 30
    assert device_configs(sized)[0].page_bytes == device_configs(bare)[0].page_bytes


def test_a_gpu_has_most_of_its_memory_and_large_pages_by_default() -> None:
    cpu, gpu = device_configs(read_settings({"device": ["cpu", "cuda:1"], "host_memory": "2GiB"}, {}, None))
    assert (gpu.device, gpu.kind, gpu.memory_share, gpu.page_bytes) == ("cuda:1", "cuda", 0.8, 16 << 20)
    assert (gpu.pool_bytes, gpu.graphs) == (2 << 30, 256)
    assert (cpu.memory_bytes, cpu.memory_share, cpu.page_bytes, cpu.pool_bytes) == (10**9, 0.0, 256 << 10, 0)

    flags = {"device_memory": "50%"}
    cpu, gpu = device_configs(read_settings({"device": ["cpu", "cuda"], **flags}, {}, None))
    assert gpu.memory_share == 0.5
    assert (cpu.memory_bytes, cpu.memory_share) == (10**9, 0.0), "a share is of a GPU"

    flags = {"device_memory": "3GiB"}
    cpu, gpu = device_configs(read_settings({"device": ["torch-cpu", "cuda"], **flags}, {}, None))
    assert (gpu.memory_bytes, gpu.memory_share) == (3 << 30, 0.0)
    assert (cpu.device, cpu.kind, cpu.memory_bytes) == ("torch-cpu:0", "torch-cpu", 3 << 30)


def test_a_share_does_not_apply_to_emulated_memory() -> None:
    settings = read_settings({"device": ["emulated:v100"], "device_memory": "50%"}, {}, None)
    assert device_configs(settings) == (emulated_config("emulated:0", "v100"),)


def test_torch_models_are_compiled_for_the_devices_that_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "check_torch", lambda device: None)
    monkeypatch.setattr(kinds, "gpus", lambda: (kinds.Gpu(name="G", capability="sm_90"),))
    for device, target in (("cpu", "cpu"), ("torch-cpu", "cpu"), ("cuda", "cuda:sm_90")):
        settings = read_settings({"device": ["cpu:5", device]}, {}, None)
        assert server_config(settings).store.torch_target == target


def test_a_profile_that_is_not_there_is_an_error_with_its_name() -> None:
    settings = read_settings({"device": ["emulated:nothing"]}, {}, None)

    with pytest.raises(ConfigError, match="nothing"):
        device_configs(settings)


def test_a_share_of_memory_is_at_most_the_machine_s() -> None:
    assert share_of_memory(1000) == 1000
    assert 0 < share_of_memory(0.5) <= share_of_memory(1.0)


def test_gateways_get_the_settings_themselves() -> None:
    flags = {"slo_ms": "2.5", "grpc_port": "off", "triton": True, "max_body": "1MiB"}
    settings = read_settings(flags, {"CLOCKWORK_SHARED_MEMORY": "/clockwork-"}, None)
    config = server_config(settings)
    assert config.settings is settings
    assert (settings.default_slo_ns, settings.ports["grpc_port"]) == (2_500_000, None)
    assert (settings.triton, settings.shared_memory) == (True, "/clockwork-")
    assert Settings().default_slo_ns is None
