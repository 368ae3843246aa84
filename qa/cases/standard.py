"""The standard node cases that the onnx package makes, as they are: is each served, and answered right.

What is right is asked of plain ONNX Runtime: for the case's own inputs, and for others of the same shapes,
whose values may give the outputs other shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.rows import asking
from benchmarks.rows.graph import Array
from benchmarks.rows.judge import Arrays, Refused, gap_of, rounding_of, runner, same, session_of
from clockwork_serve.devices import Device
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.store import ServedVersion
from clockwork_serve.store.onnx.graph import OIP_TYPES

SHORT = (
    "test_top_k", "test_constantofshape_float_ones", "test_constantofshape_int_shape_zero", "test_tile",
    "test_range_float_type_positive_delta", "test_slice", "test_resize_upsample_sizes_nearest",
    "test_nonmaxsuppression_suppress_by_IOU", "test_reduce_sum_keepdims_random", "test_unsqueeze_axis_1",
    "test_reshape_extended_dims", "test_onehot_without_axis", "test_compress_0",
    "test_strnormalizer_export_monday_casesensintive_nochangecase", "test_qlinearmatmul_2D_uint8_float32",
    "test_matmulinteger", "test_constant",
)  # fmt: skip
"""Cases that are tests, too, and the modules that make them."""
SHORT_MODULES = (
    "topk", "constantofshape", "tile", "rangeop", "slice", "resize", "nonmaxsuppression", "reducesum",
    "unsqueeze", "reshape", "onehot", "compress", "stringnormalizer", "qlinearmatmul", "matmulinteger",
    "constant",
)  # fmt: skip
_OTHERS = 4
"""Other values that are asked for, of each case."""


@dataclass(slots=True)
class Answered:
    """How a case is served. ``unusable``: ONNX Runtime itself does not run it, and nothing follows.

    ``refused``: why it is not served; ``outside``: what of it nothing can serve that speaks the protocol.
    ``wrong``: the first answer that is not ONNX Runtime's; ``answers`` were compared.
    """

    name: str
    unusable: str = ""
    outside: str = ""
    refused: str = ""
    batched: bool = False
    answers: int = 0
    wrong: str = ""

    @property
    def served(self) -> bool:
        """Whether it is, whatever its answers."""
        return not (self.unusable or self.refused)


def answer(made: Any, store: asking.Store, on: Device) -> Answered:
    """Serve one case, and compare its answers."""
    found = Answered(made.name, outside=_outside(made.model.graph))
    data = made.model.SerializeToString()
    try:
        plain = runner(session_of(data))
        given = {} if found.outside else _given(made)
        wanted = [] if found.outside else plain(given)
    except Refused as error:
        found.unusable = str(error)
        return found
    said = store.ask(data)
    found.batched, found.refused = said.batched, "" if said.served else said.why
    if said.served is not None:
        try:
            asking.load(on, said.served)
        except DeviceError as error:
            found.refused = str(error)
    if any(0 in array.shape for array in given.values()):
        found.refused = found.outside = "a dimension of 0"  # as gateways have it
    if not found.refused:
        assert said.served is not None
        _compare(found, on, said.served, given, wanted)
        for other in _others(given):
            with contextlib.suppress(Refused):
                _compare(found, on, said.served, other, plain(other))
        on.retire(said.served.code.code_id)
    return found


def _compare(
    found: Answered, on: Device, served: ServedVersion, given: Arrays, wanted: Sequence[Array]
) -> None:
    """Ask the device for one answer."""
    if found.wrong:
        return
    found.answers += 1
    try:
        got = asking.alone(on, served, given)
    except (DeviceError, ModelError) as error:
        found.wrong = f"{ {name: list(array.shape) for name, array in given.items()} }: {error}"
        return
    allowed = rounding_of(array.dtype for array in given.values())
    for spec, a, b in zip(served.code.outputs, got, map(asking.as_served, wanted), strict=True):
        gap = 0.0 if same(a, b) else gap_of(a.ravel(), b.ravel())
        if a.shape != b.shape:
            found.wrong = f"output {spec.name} has the shape {a.shape}, not {b.shape}"
        elif gap > (allowed if b.dtype.kind == "f" else 0.0):
            found.wrong = f"output {spec.name} is {gap:.1e} off"


def _outside(graph: onnx.GraphProto) -> str:
    """What of a graph the Open Inference Protocol has no word for."""
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            return f"{str(kind).removesuffix('_type')}s"
        if value.type.tensor_type.elem_type not in OIP_TYPES:
            return f"the type {onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)}"
    return ""


def _given(made: Any) -> Arrays:
    """The inputs of a case by name, but for those left out. Raises ``Refused`` for types that numpy lacks."""
    given, _ = next(iter(made.data_sets))
    arrays = {}
    for value, each in zip(made.model.graph.input, given, strict=True):
        if each is not None:
            array = numpy_helper.to_array(each) if isinstance(each, onnx.TensorProto) else np.asarray(each)
            if array.dtype.kind == "V" or array.dtype.name not in np.sctypeDict:
                raise Refused(f"input {value.name} is of {array.dtype.name}")
            arrays[value.name] = array.astype(object) if array.dtype.kind in "SUT" else array
    return arrays


def _others(given: Arrays) -> Iterator[Arrays]:
    """The same inputs with other values: integers by one larger or smaller, the others in another order."""
    dice = np.random.default_rng(3)
    for step in range(_OTHERS):
        other = {}
        for name, array in given.items():
            if array.dtype.kind in "iu":
                other[name] = array + array.dtype.type(1) if step % 2 == 0 else array - array.dtype.type(1)
            else:
                other[name] = dice.permuted(array.reshape(-1)).reshape(array.shape)
            if step > 1 and dice.integers(2):
                other[name] = array
        yield other
