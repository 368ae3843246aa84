"""Artefacts of ONNX codes: opened, refused with a reason, retired, bound again."""

from __future__ import annotations

import json

import pytest

from clockwork_serve.devices import DeviceConfig, base, build
from clockwork_serve.errors import DamageError, DeviceError
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import Weights
from tests.devices import lifted
from tests.devices.lifted import close, dense, numbers, spec

PAGE = 65536


@pytest.fixture
def device():
    made = build(DeviceConfig(device="cpu:0", memory_bytes=32 * PAGE, page_bytes=PAGE, io_bytes=4 << 20))
    yield made
    made.close()


def whole(folder, seed):
    """A model whose weights are not lifted."""
    proto = lifted.mlp(seed)
    folder.mkdir(exist_ok=True)
    lifted.optimised(proto, folder)
    code = lifted.code_of(folder, [spec("x", 64)], [spec("y", 64)], lifted=False)
    return (
        lifted.plain_session(proto),
        code,
        Weights(
            weights_id=hash_of((folder / "optimised.onnx").read_bytes()),
            path=str(folder / "optimised.onnx"),
            size=70_000,
        ),
    )


def test_a_model_that_is_not_lifted_is_opened_by_load_and_dropped_by_unload(device, tmp_path):
    plain, code, weights = whole(tmp_path / "a", 5)
    device.prepare(code)
    with pytest.raises(DeviceError, match="not loaded at page 2"):
        device.infer(lifted.infer(code, [1], first=2, count=2), [lifted.call({"x": numbers(1)})])
    device.load(lifted.load(code, weights, 2, 2))
    calls = [lifted.call({"x": numbers(1)}), lifted.call({"x": numbers(2)})]
    device.infer(lifted.infer(code, [1, 2], 4, first=2, count=2), calls)
    for rows, call in zip((1, 2), calls, strict=True):
        assert close(lifted.output(call, "y"), plain.run(None, {"x": numbers(rows)})[0])
    device.unload(lifted.unload(2, 2))
    with pytest.raises(DeviceError, match="not loaded"):
        device.infer(lifted.infer(code, [1], first=2, count=2), [lifted.call({"x": numbers(1)})])


def test_a_corrupt_graph_is_refused(device, tmp_path):
    _, code, _ = dense(tmp_path)
    (tmp_path / "dense" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DamageError, match=r"expected what was stored in .*model.onnx, found other content"):
        device.prepare(code)
    with pytest.raises(DeviceError, match=r"model .*model.onnx: cannot be opened: .*compile the model again"):
        device.prepare(lifted.vouched(code))
    with pytest.raises(DeviceError, match="not prepared"):
        device.infer(lifted.infer(code, [1]), [lifted.call({"x": numbers(1)})])


INDEXES = [
    ("not json", "cannot be read"),
    ({"tensors": []}, "blob_bytes"),
    ({"tensors": [], "blob_bytes": 0}, "not described .*'b0'"),
    (
        {
            "tensors": [{"name": "n", "shape": [2], "dtype": "float32", "offset": 8, "nbytes": 8}],
            "blob_bytes": 8,
        },
        "n: ",
    ),
    (
        {
            "tensors": [{"name": "n", "shape": [2], "dtype": "float32", "offset": 0, "nbytes": 4}],
            "blob_bytes": 8,
        },
        "n: ",
    ),
    (
        {
            "tensors": [{"name": "n", "shape": [1], "dtype": "what", "offset": 0, "nbytes": 4}],
            "blob_bytes": 8,
        },
        "dtype",
    ),
]


@pytest.mark.parametrize(("index", "message"), INDEXES)
def test_an_index_that_contradicts_itself_or_the_graph_is_refused(device, tmp_path, index, message):
    _, code, _ = dense(tmp_path)
    (tmp_path / "dense" / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(DeviceError, match=message):
        device.prepare(lifted.vouched(code))


def test_weights_of_another_size_are_refused(device, tmp_path):
    _, code, weights = dense(tmp_path)
    device.prepare(code)
    other = lifted.weights_file(tmp_path / "other", b"\0" * (weights.size - 64))
    with pytest.raises(DeviceError, match=f"weights {other.weights_id}: expected {weights.size} bytes"):
        device.load(lifted.load(code, other))
    with pytest.raises(DeviceError, match=r"extent: expected pages within 0..31, found 32..32"):
        device.load(lifted.load(code, weights, 32))


def test_a_retired_code_is_gone_and_can_come_back(device, tmp_path):
    plain, code, weights = dense(tmp_path)
    device.retire("never heard of")
    for _ in range(2):
        device.prepare(code)
        device.prepare(code)
        device.load(lifted.load(code, weights))
        call = lifted.call({"x": numbers(1)})
        device.infer(lifted.infer(code, [1]), [call])
        assert close(lifted.output(call, "y"), plain.run(None, {"x": numbers(1)})[0])
        device.retire(code.code_id)
        with pytest.raises(DeviceError, match="not prepared"):
            device.infer(lifted.infer(code, [1]), [call])


def test_bindings_are_bounded_and_made_again(device, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BOUND_TENSORS_MAX", 8)
    plain, code, weights = dense(tmp_path)
    device.prepare(code)
    for page in range(10):
        device.load(lifted.load(code, weights, page))
    assert len(device._backends["onnx"]._bindings) == 2
    call = lifted.call({"x": numbers(1)})
    device.infer(lifted.infer(code, [1], first=0), [call])
    assert close(lifted.output(call, "y"), plain.run(None, {"x": numbers(1)})[0])
