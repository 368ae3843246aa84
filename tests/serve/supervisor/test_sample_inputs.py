"""Inputs for profiling: those that worked before, dynamic dimensions at realistic sizes, all datatypes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from clockwork_serve.devices.base import NUMPY_DTYPES
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import DATATYPES, Code, CodeFile, TensorSpec
from clockwork_serve.serve.supervisor.profile_process import (
    ELEMENTS_MAX,
    SAMPLE_RATE,
    fills_to_try,
    inputs_of,
)
from clockwork_serve.store import Fill


def code(*inputs: TensorSpec, batched: bool = True, path: Path = Path("/nowhere")) -> Code:
    return Code(
        code_id="c", backend="onnx", path=str(path), inputs=inputs, outputs=(), batched=batched,
        batch_sizes=(1,), lifted=True,
        files=tuple(CodeFile(one.name, hash_of(one.read_bytes())) for one in path.glob("*")),
    )  # fmt: skip


def spec(name: str, datatype: str, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, optional=optional)


def shapes(of: Code) -> list[dict[str, tuple[int, ...]]]:
    return [{fill.name: fill.shape for fill in fills} for fills in fills_to_try(of)]


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("batched", [True, False])
def test_every_datatype_can_be_filled(datatype: str, *, batched: bool) -> None:
    (fills,) = fills_to_try(code(spec("x", datatype, 3, 4), batched=batched))
    array = inputs_of(fills)["x"]
    assert array.shape == ((1, 3, 4) if batched else (3, 4))
    assert array.dtype == NUMPY_DTYPES[datatype]


def test_ids_are_small_and_rates_are_rates() -> None:
    (fills,) = fills_to_try(code(spec("ids", "INT64", 100), spec("sr", "INT64", 1), spec("x", "FP32", 5)))
    arrays = inputs_of(fills)
    assert set(np.unique(arrays["ids"])) == {0, 1}
    assert arrays["sr"].tolist() == [[SAMPLE_RATE]]
    assert np.ptp(arrays["x"]) > 0


def test_dynamic_dimensions_are_realistic_first_and_small_last() -> None:
    image = code(spec("x", "FP32", 3, -1, -1))
    assert shapes(image)[0] == {"x": (1, 3, 320, 320)}
    assert shapes(image)[-1] == {"x": (1, 3, 1, 1)}
    assert shapes(code(spec("x", "FP32", -1)))[0] == {"x": (1, SAMPLE_RATE)}
    assert shapes(code(spec("ids", "INT64", -1), spec("mask", "INT64", -1)))[0] == {
        "ids": (1, 64), "mask": (1, 64),
    }  # fmt: skip


def test_no_input_is_absurdly_large() -> None:
    (first, *_) = fills_to_try(code(spec("x", "FP32", 1000, 1000, -1, -1)))
    assert np.prod(first[0].shape) <= ELEMENTS_MAX


def test_inputs_that_worked_when_it_was_compiled_are_used(tmp_path: Path) -> None:
    known = (
        Fill(name="x", datatype="FP32", shape=(1, 32)),
        Fill(name="state", datatype="INT64", shape=(1, 1), low=8000, high=8000),
    )
    (tmp_path / "probe.json").write_bytes(msgspec.json.encode(known))
    fixed = code(spec("x", "FP32", 32), spec("state", "INT64", 1), path=tmp_path)
    assert next(iter(fills_to_try(fixed))) == known
    dynamic = code(spec("x", "FP32", -1), spec("state", "INT64", 1), path=tmp_path)
    realistic, second, *_ = fills_to_try(dynamic)
    assert second == known
    assert [(fill.shape, fill.low) for fill in realistic] == [((1, SAMPLE_RATE), 0), ((1, 1), 8000)]


@pytest.mark.parametrize("found", [b"nonsense", b'[{"name": "other", "datatype": "FP32", "shape": [1]}]'])
def test_a_probe_that_does_not_fit_is_ignored(tmp_path: Path, found: bytes) -> None:
    (tmp_path / "probe.json").write_bytes(found)
    assert shapes(code(spec("x", "FP32", 7), path=tmp_path)) == [{"x": (1, 7)}]


def test_optional_inputs_are_left_out() -> None:
    assert shapes(code(spec("x", "FP32", 7), spec("y", "FP32", 7, optional=True))) == [{"x": (1, 7)}]


def test_elements_of_bytes_are_bytes_as_devices_expect_them() -> None:
    fill = Fill(name="t", datatype="BYTES", shape=(1, 2))
    assert all(isinstance(each, bytes) for each in inputs_of([fill])["t"].ravel())
