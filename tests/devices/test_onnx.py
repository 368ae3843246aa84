"""Answers of the ONNX backend equal a plain session's, whatever shares a batch."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.devices import DeviceConfig, build
from tests.devices import lifted


@pytest.fixture
def device():
    device = build(DeviceConfig(device="cpu:0", memory_bytes=4 << 20, page_bytes=65536, io_bytes=1 << 20))
    yield device
    device.close()


def test_answers_equal_a_plain_session(device, tmp_path):
    proto = lifted.mlp(1)
    blob = lifted.lift(proto, tmp_path / "code")
    code = lifted.code_of(tmp_path / "code", [lifted.spec("x", 64)], [lifted.spec("y", 64)])
    device.prepare(code)
    device.load(lifted.load(code, lifted.weights_file(tmp_path / "a", blob), 3))
    plain = lifted.plain_session(proto)
    for rows, batch in (([1], 1), ([2], 2), ([1, 1], 2), ([1, 2], 4), ([1, 1, 1, 1], 4), ([3], 4)):
        xs = [
            np.random.default_rng(n).standard_normal((r, 64)).astype(np.float32) for n, r in enumerate(rows)
        ]
        calls = [lifted.call({"x": x}) for x in xs]
        phases = device.infer(lifted.infer(code, rows, batch, first=3), calls)
        assert phases.run_ns > 0
        for x, buffers in zip(xs, calls, strict=True):
            np.testing.assert_allclose(lifted.output(buffers, "y"), plain.run(None, {"x": x})[0], rtol=1e-5)
