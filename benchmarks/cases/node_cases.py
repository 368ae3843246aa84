"""The standard node cases that the onnx package makes, with axis 0 free."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case import node as standard

from benchmarks.cases.case import Case, freed


def node_cases(modules: Sequence[str] = ()) -> Iterator[Case]:
    """All of them, or those that some modules make (``cumsum`` makes ``test_cumsum_1d`` and others)."""
    names = [f"{standard.__name__}.{name}" for name in modules]
    if not names:
        names = [found.name for found in pkgutil.walk_packages(standard.__path__, f"{standard.__name__}.")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of divisions by zero and the like
        for name in names:
            importlib.import_module(name)
    for made in list(standard._NodeTestCases):  # noqa: SLF001 - what a module makes is kept nowhere else
        case = _case(made)
        if case is not None:
            yield case


def _case(made: Any) -> Case | None:
    """With axis 0 free; None where an input is no tensor, or the first has no axis.

    Inputs beside the first that do not share its axis 0, as weights and axes, become constants.
    """
    graph = made.model.graph
    if any(value.type.WhichOneof("value") != "tensor_type" for value in (*graph.input, *graph.output)):
        return None
    given, _ = next(iter(made.data_sets))
    if not given or any(each is None for each in given) or len(given) != len(graph.input):
        return None
    arrays = [np.asarray(each) for each in given]
    if not arrays[0].ndim or not len(arrays[0]):
        return None
    rows = len(arrays[0])
    sample, constants = {}, []
    for value, array in zip(graph.input, arrays, strict=True):
        if array.ndim and len(array) == rows and value.type.tensor_type.shape.dim:
            sample[value.name] = array
        elif array.dtype.kind in "fiub" and value.type.tensor_type.elem_type != onnx.TensorProto.BFLOAT16:
            constants.append(numpy_helper.from_array(array, value.name))
        else:
            return None
    name = f"{made.name}, others constant" if constants else made.name
    return Case(name, freed(made.model, rows, constants), (sample,))
