"""An emulated device takes the durations of its profile and returns zeros."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import msgspec
import numpy as np
import pytest

from clockwork_serve.devices import DeviceConfig, build, emulated_config, emulated_profile
from clockwork_serve.devices.emulated import EmulatedDevice, interpolate, read_profile
from clockwork_serve.errors import ConfigError, DamageError, DeviceError
from clockwork_serve.messages import Weights
from clockwork_serve.units import MIB, ms
from tests.devices import lifted
from tests.devices.lifted import spec

CONFIG = DeviceConfig(device="emulated:0", kind="emulated", memory_bytes=4 * MIB, page_bytes=MIB)
WEIGHTS = Weights(weights_id="w", path="", size=2 * MIB)


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self):
        self.now = 1000
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(round(seconds * 1e9))
        self.now += round(seconds * 1e9)


def code_in(folder, infer_ns, load_ns=5000, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "profile.json").write_text(json.dumps({"infer_ns": infer_ns, "load_ns": load_ns}))
    outputs = [spec("y", 2), spec("z", -1, datatype="INT64"), spec("t", datatype="BYTES")]
    return lifted.code_of(folder, [spec("x", 2)], outputs, backend="emulated", **settings)


def test_it_sleeps_as_long_as_the_code_takes(tmp_path):
    clock = Clock()
    device = EmulatedDevice(CONFIG, clock, clock.sleep)
    code = code_in(tmp_path, {"1": 1000, "4": 2500})
    device.prepare(code)
    device.load(lifted.load(code, WEIGHTS, 0, 2))
    phases = device.infer(lifted.infer(code, [1, 1, 1], 4), [lifted.call({}) for _ in range(3)])
    assert clock.slept == [5000, 2500]
    assert (phases.input_ns, phases.run_ns, phases.output_ns) == (0, 2500, 0)


def test_real_time_passes_without_using_a_core(tmp_path):
    device = build(CONFIG)
    code = code_in(tmp_path, {"1": ms(60)})
    device.prepare(code)
    wall, cpu = time.monotonic_ns(), time.thread_time_ns()
    device.infer(lifted.infer(code, [1]), [lifted.call({})])
    assert time.monotonic_ns() - wall >= ms(60)
    assert time.thread_time_ns() - cpu < ms(30)


def test_answers_are_zeros_of_the_declared_shape(tmp_path):
    clock = Clock()
    device = EmulatedDevice(CONFIG, clock, clock.sleep)
    code = code_in(tmp_path, {"1": 1000})
    device.prepare(code)
    calls = [lifted.call({}), lifted.call({})]
    device.infer(lifted.infer(code, [1, 3], 4), calls)
    assert [(ref.name, ref.shape, ref.nbytes) for ref in calls[1].outputs] == [
        ("y", (3, 2), 24), ("z", (3, 1), 24), ("t", (3,), 12)
    ]  # fmt: skip
    assert not lifted.output(calls[1], "y").any()
    assert lifted.output(calls[1], "y").dtype == np.float32


def test_jitter_varies_durations_within_its_share_and_a_seed_repeats_it(tmp_path):
    code = code_in(tmp_path, {"1": 1_000_000})
    runs = []
    for seed in (1, 1, 2):
        clock = Clock()
        device = EmulatedDevice(msgspec.structs.replace(CONFIG, jitter=0.1, seed=seed), clock, clock.sleep)
        device.prepare(code)
        for _ in range(20):
            device.infer(lifted.infer(code, [1]), [lifted.call({})])
        runs.append(clock.slept)
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 10
    assert all(900_000 <= slept <= 1_100_000 for slept in runs[0])


def test_codes_of_other_backends_take_what_the_profile_file_says(tmp_path):
    (tmp_path / "slow.toml").write_text(
        "[load]\nbase_us = 10\ngb_per_s = 1\n[infer_ms]\n1 = 2\n[codes.special.infer_ms]\n1 = 7\n4 = 10\n"
    )
    config = msgspec.structs.replace(CONFIG, profile=str(tmp_path / "slow.toml"))
    code = lifted.code_of(tmp_path, [spec("x", 2)], [spec("y", 2)])
    profile = emulated_profile(config, code)
    assert profile.device_kind == build(config).spec.kind == "emulated:slow"
    assert profile.infer_ns == {1: ms(2), 2: ms(4), 4: ms(8)}
    assert abs(profile.load_ns(1_000_000) - 1_010_000) < 10
    assert profile.io_bytes == {1: 128, 2: 128, 4: 128}
    special = emulated_profile(config, msgspec.structs.replace(code, code_id="special"))
    assert special.infer_ns == {1: ms(7), 2: ms(8), 4: ms(10)}


def test_the_built_in_profile_gives_sizes_that_settings_override():
    config = emulated_config("emulated:0", "v100", memory_bytes=64 * MIB)
    assert (config.page_bytes, config.memory_bytes) == (16 * MIB, 64 * MIB)
    device = build(config)
    assert (device.spec.kind, device.spec.pages) == ("emulated:v100", 4)


@pytest.mark.parametrize(("size", "value"), [(1, 10), (2, 20), (3, 25), (4, 30), (8, 50), (16, 90)])
def test_durations_are_linear_between_and_beyond_what_is_given(size, value):
    assert interpolate({1: 10, 2: 20, 4: 30}, size) == value


BAD = [
    ("[infer_ms]\n1 = 2", "load"),
    ("[load]\ngb_per_s = 1\n[infer_ms]", "infer_ms: expected a duration"),
    ("[load]\ngb_per_s = 0\n[infer_ms]\n1 = 2", "gb_per_s > 0"),
    ("[load]\ngb_per_s = 1\n[infer_ms]\n1 = -2", "infer_ms"),
    ("[load]\ngb_per_s = 1\nspeed = 2\n[infer_ms]\n1 = 2", "speed"),
    ("[load", "end of document"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_profile_file_that_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "slow.toml").write_text(text)
    with pytest.raises(ConfigError, match=rf"slow\.toml.*{message}"):
        read_profile(str(tmp_path / "slow.toml"))


@pytest.mark.parametrize("name", ["v1000", "/nowhere/else.toml", "../secret"])
def test_a_profile_that_is_not_there_is_answered_with_those_that_are(name):
    with pytest.raises(ConfigError, match=r"expected a .toml file or one of: v100; found"):
        read_profile(name)


def test_codes_without_a_profile_and_unknown_codes_are_refused(tmp_path):
    device = build(CONFIG)
    code = code_in(tmp_path, {"1": 1})
    with pytest.raises(DeviceError, match="not prepared"):
        device.infer(lifted.infer(code, [1]), [lifted.call({})])
    (tmp_path / "profile.json").unlink()
    with pytest.raises(DamageError, match=r"profile.json, found No such file"):
        device.prepare(code)


def test_an_extent_outside_its_memory_is_refused(tmp_path):
    device = build(CONFIG)
    code = code_in(tmp_path, {"1": 1})
    device.prepare(code)
    with pytest.raises(DeviceError, match="extent"):
        device.load(lifted.load(code, WEIGHTS, 3, 2))
    device.retire(code.code_id)
    with pytest.raises(DeviceError, match="not prepared"):
        device.load(lifted.load(code, WEIGHTS, 0, 2))


def test_lanes_of_many_devices_may_be_the_first_to_read_profiles_at_once(tmp_path):
    # In a process of its own: what failed here once was a segmentation fault.
    (tmp_path / "profile.json").write_text('{"infer_ns": {"1": 1000}, "load_ns": 1}')
    script = f"""
        import importlib, sys, threading
        from pathlib import Path
        from clockwork_serve.devices import emulated
        from tests.devices import lifted

        code = lifted.code_of(Path({str(tmp_path)!r}), [], [], backend="emulated")

        def read(start):
            start.wait()
            emulated.read_profile("v100")
            emulated._read_code_profile(code)

        sys.setswitchinterval(5e-5)
        for _ in range(60):
            importlib.reload(emulated)  # new types, that nobody has used yet
            start = threading.Barrier(8)
            threads = [threading.Thread(target=read, args=(start,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False)

    assert (ended.returncode, ended.stderr.decode()) == (0, "")
