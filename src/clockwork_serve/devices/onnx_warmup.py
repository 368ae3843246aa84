"""A first run of each batch size, so that its workspace is there when a request needs it; decides nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.devices.base import NUMPY_DTYPES
from clockwork_serve.devices.code_files import has_file, read_file
from clockwork_serve.devices.onnx_session import value_of
from clockwork_serve.devices.onnx_weights import Bound
from clockwork_serve.devices.tensors import full_shape
from clockwork_serve.messages import Code


class Fill(Struct, frozen=True, kw_only=True):
    """An input of one row that the graph runs on: ``low`` everywhere, for integers (``probe.json``)."""

    name: str
    shape: tuple[int, ...]
    low: int = 0


def warm_up(code: Code, bound: Bound, sizes: Sequence[int], limit_ns: int) -> None:
    """Run batch sizes in order, the first in any case, the others while the time allows.

    A graph may refuse made-up inputs (and weights that are all zero); that says nothing about real ones.
    """
    names = [spec.name for spec in code.outputs]
    fills = _fills(code)
    left_ns = limit_ns
    for size in sizes:
        began_ns = time.monotonic_ns()
        with contextlib.suppress(Exception):
            bound.session.run(names, {**bound.weights, **_made_up(code, size, fills)})
        took_ns = time.monotonic_ns() - began_ns
        left_ns -= took_ns
        if left_ns < 2 * took_ns:  # the next size takes about twice as long
            return


def _made_up(code: Code, size: int, fills: dict[str, Fill]) -> dict[str, Any]:
    """Inputs by name: of the probed shape where the code leaves it open."""
    inputs = {}
    for spec in code.inputs:
        fill = fills.get(spec.name)
        shape = full_shape(code, spec, size)
        if fill is not None and -1 in shape and len(fill.shape) == len(shape):
            shape = (size, *fill.shape[1:]) if code.batched else fill.shape
        shape = tuple(1 if dim < 0 else dim for dim in shape)
        if spec.datatype == "BYTES":
            inputs[spec.name] = np.full(shape, "", dtype=object)
            continue
        dtype = NUMPY_DTYPES[spec.datatype]
        value = fill.low if fill is not None and dtype.kind in "iu" and spec.datatype != "BF16" else 0
        array = np.full(shape, value, dtype)
        inputs[spec.name] = value_of(array, "BF16") if spec.datatype == "BF16" else array
    return inputs


def _fills(code: Code) -> dict[str, Fill]:
    """What compilation found out, if it left a note."""
    if not has_file(code, "probe.json"):
        return {}
    try:
        fills = msgspec.json.decode(read_file(code, "probe.json"), type=tuple[Fill, ...])
    except (ValueError, RecursionError, msgspec.DecodeError):
        return {}
    return {fill.name: fill for fill in fills}
