"""One known graph: what plain ONNX Runtime shows of its rows, the store's verdict, and how it is served."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from benchmarks.rows import asking
from benchmarks.rows.graph import Array
from benchmarks.rows.judge import Arrays, Refused, Rows, judge, plain_rows, session_of, specs_of
from clockwork_serve.devices import Device
from clockwork_serve.store.settings import ModelSettings

POOL = 24
"""Rows that batches are taken from."""


@dataclass(frozen=True, slots=True)
class Case:
    """A graph whose inputs share a free axis 0. ``samples``: inputs known to work, of one or more rows.

    ``light``: it takes long, so fewer batches are tried. ``mixes``: it is known to, even if nothing shows it.
    ``declared``: the ``max_batch_size`` of its configuration, if that has one.
    """

    name: str
    model: onnx.ModelProto
    samples: tuple[Arrays, ...] = ()
    light: bool = False
    mixes: bool = False
    declared: int | None = None


@dataclass(slots=True)
class Played:
    """What was found. ``refused``: not even one row runs, and nothing follows."""

    name: str
    refused: str = ""
    mixes: str = ""
    batched: bool = False
    why: str = ""
    company: asking.Company = field(default_factory=asking.Company)

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.refused:
            return "refused"
        if self.mixes:
            return "WRONGLY BATCHED" if self.batched else "mixes"
        return "batched" if self.batched else "not batched"


def play(case: Case, store: asking.Store, on: Device) -> Played:
    """Judge it, put it to the store, and serve it if that batches it."""
    played = Played(case.name)
    data = case.model.SerializeToString()
    try:
        session = session_of(data)
        specs = specs_of(session)
        pools = [
            *[pool_of(sample) for sample in case.samples],
            plain_rows(specs, POOL, np.random.default_rng(1)),
        ]
        findings = [judge(session, rows=rows, light=case.light) for rows in pools]
    except Refused as error:
        played.refused = str(error)
        return played
    good = [(finding, rows) for finding, rows in zip(findings, pools, strict=True) if not finding.refused]
    if not good:
        played.refused = findings[0].refused
        return played
    played.mixes = next((finding.mixes for finding, _ in good if finding.mixes), "")
    if case.mixes and not played.mixes:
        played.mixes = "by construction, though nothing showed it"
    said = store.ask(data, ModelSettings(max_batch_size=case.declared))
    played.batched, played.why = said.batched, said.why
    if said.batched and said.served is not None:
        for _, rows in good:
            found = asking.serve(on, said.served, data, rows, seed=len(case.name), light=case.light)
            company = played.company
            company.answers += found.answers
            company.refused += found.refused
            company.wrong += found.wrong
            company.first = company.first or found.first
    return played


def pool_of(sample: Arrays) -> Rows:
    """Rows like those of a sample: its own first, then the same with a little noise, or in another order."""
    dice = np.random.default_rng(7)
    arrays: Arrays = {}
    for name, array in sample.items():
        places = [number % len(array) for number in range(POOL)]
        rows = [array[place : place + 1] for place in places]
        varied = [_varied(row, dice) for row in rows[len(array) :]]
        arrays[name] = np.concatenate([*rows[: len(array)], *varied])
    return Rows(arrays)


def _varied(row: Array, dice: np.random.Generator) -> Array:
    if row.dtype.kind == "f":
        noise = dice.standard_normal(row.shape)
        return np.asarray(row + noise).astype(row.dtype)
    made = np.array(row)
    with contextlib.suppress(ValueError):
        dice.shuffle(made.reshape(-1))
    return made


def freed(model: onnx.ModelProto, rows: int, constants: Sequence[onnx.TensorProto] = ()) -> onnx.ModelProto:
    """A copy with axis 0 of all inputs free, but for those that become constants.

    Outputs, too, where axis 0 is as long; of others the shape is left unknown.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    names = {tensor.name for tensor in constants}
    kept = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(kept)
    graph.initializer.extend(constants)
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    for value in graph.output:
        shape = value.type.tensor_type.shape
        if shape.dim and shape.dim[0].dim_value == rows:
            shape.dim[0].dim_param = "N"
        else:
            value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    return made
