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

from benchmarks.rows.judge import Arrays
from qa.cases.case import Case, freed


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
        given = _tensors(made)
        if given is None:
            continue
        graph = made.model.graph
        sharing = {value.name for value in graph.input if given[value.name].shape[:1] == _first(graph, given)}
        yield from _cases(made, given, sharing)
        if len(sharing) > 1 and _first(graph, given) == (1,):
            # Sizes of one are alike by chance, as those of a picture and a filter.
            yield from _cases(made, given, {graph.input[0].name}, "first alone")


def _tensors(made: Any) -> Arrays | None:
    """Its inputs by name; None where one is no tensor, or the first has no axis."""
    graph = made.model.graph
    if any(value.type.WhichOneof("value") != "tensor_type" for value in (*graph.input, *graph.output)):
        return None
    given, _ = next(iter(made.data_sets))
    if not given or any(each is None for each in given) or len(given) != len(graph.input):
        return None
    arrays = {value.name: np.asarray(each) for value, each in zip(graph.input, given, strict=True)}
    first = next(iter(arrays.values()))
    return arrays if first.ndim and len(first) else None


def _first(graph: onnx.GraphProto, given: Arrays) -> tuple[int, ...]:
    return given[graph.input[0].name].shape[:1]


def _cases(made: Any, given: Arrays, sharing: set[str], how: str = "others constant") -> Iterator[Case]:
    """With axis 0 of those that share it free; the others, as weights and axes, become constants."""
    constants = []
    for value in made.model.graph.input:
        if value.name in sharing and not value.type.tensor_type.shape.dim:
            return
        if value.name not in sharing:
            if given[value.name].dtype.kind not in "fiub":
                return
            if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
                return
            constants.append(numpy_helper.from_array(given[value.name], value.name))
    name = f"{made.name}, {how}" if constants else made.name
    sample = {each: array for each, array in given.items() if each in sharing}
    yield Case(name, freed(made.model, _first(made.model.graph, given)[0], constants), (sample,))
