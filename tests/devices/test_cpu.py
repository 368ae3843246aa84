"""The cpu device hands each code to the backend that can run it, and nothing heavy is imported for others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clockwork_serve.devices import DeviceConfig, build
from clockwork_serve.errors import ConfigError, DeviceError
from tests.devices import lifted


@pytest.fixture
def device():
    made = build(
        DeviceConfig(device="cpu:7", memory_bytes=1 << 20, page_bytes=65536, io_bytes=100, workspace_bytes=9)
    )
    yield made
    made.close()


def test_it_tells_what_it_offers(device):
    spec = device.spec
    assert (spec.device, spec.kind, spec.pages, spec.page_bytes) == ("cpu:7", "cpu", 16, 65536)
    assert (spec.io_bytes, spec.workspace_bytes) == (100, 9)


@pytest.mark.parametrize(
    ("cores", "threads", "share"), [(1, 1, True), (1.5, 1, True), (2, 1, False), (2, 2, True)]
)
def test_lanes_share_where_all_cores_are_an_infers(monkeypatch, cores, threads, share):
    monkeypatch.setattr("clockwork_serve.devices.base.cores", lambda: cores)
    made = build(DeviceConfig(device="cpu:0", memory_bytes=1 << 20, page_bytes=65536, threads=threads))
    assert made.spec.lanes_share is share
    made.close()


def test_emulated_codes_are_refused(device, tmp_path):
    code = lifted.code_of(tmp_path, [], [], backend="emulated")
    with pytest.raises(
        DeviceError, match=r"backend: expected one of \['onnx', 'python'\] on cpu:7, found 'emulated'"
    ):
        device.prepare(code)


def test_unknown_codes_are_refused_and_unknown_extents_forgotten(device, tmp_path):
    code = lifted.code_of(tmp_path, [], [])
    with pytest.raises(DeviceError, match="not prepared on cpu:7"):
        device.load(lifted.load(code, lifted.weights_file(tmp_path / "w", b"")))
    device.unload(lifted.unload(3))
    device.retire(code.code_id)


def test_there_are_no_other_kinds():
    with pytest.raises(
        ConfigError, match="kind: expected one of cpu, torch-cpu, cuda, emulated, found 'gpu'"
    ):
        build(DeviceConfig(device="gpu:0", kind="gpu"))


def test_an_emulated_device_does_without_the_runtime():
    source = (
        "import sys; from clockwork_serve.devices import build, DeviceConfig;"
        "build(DeviceConfig(device='e', kind='emulated')); sys.exit('onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False, timeout=60).returncode == 0
