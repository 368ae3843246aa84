"""Trial runs: runs a graph on generated inputs to learn what it does not declare."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_client.tensors import DTYPES

# ------------------------------------------------------------
# Inputs and outputs of a graph, as records independent of ONNX.


Dim = int | str  # a fixed size, or the name of a free one ("" if it has none)


class GraphTensor(Struct, frozen=True):
    """One input or output of a graph with its full shape; ``dims`` is None if the rank is not known.

    ``optional``: an input that has a default, which the graph holds.
    """

    name: str
    datatype: str
    dims: tuple[Dim, ...] | None
    optional: bool = False


class Interface(Struct, frozen=True):
    """Inputs and outputs as the graph declares them, in its order."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]

    def required(self) -> Interface:
        """Without the inputs that may be left out."""
        return Interface(tuple(tensor for tensor in self.inputs if not tensor.optional), self.outputs)


# ------------------------------------------------------------
# Generated inputs, and what runs on them show.


Array = npt.NDArray[Any]

_SIZES = (32, 64, 16, 8, 128, 256, 48, 100, 320, 512, 576, 1024, 4096, 16000, 32000)
"""Sizes tried for dimensions that a request chooses: image sides, token counts, audio samples."""
_SCALARS = (16000, 8000, 1, 0, 2)
"""Values tried for single integers: sampling rates first, which select branches of audio models."""
_LARGEST_INPUT = _LARGEST_OUTPUTS = 64 << 20  # bytes of one input, and of all outputs
SEED = 20201104
SAME_ROW = 1e-5  # relative difference up to which two results count as equal up to rounding


class RunError(Exception):
    """The graph did not run on these inputs."""


class Runs(Protocol):
    """A graph that can be run."""

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs in order. Raises ``RunError``."""


class Fill(Struct, frozen=True, kw_only=True):
    """How an input was generated, so that others can generate valid inputs (``probe.json`` of a code).

    ``shape`` is the full shape for one row. Integers lie in ``low..high``, both included; floats are uniform
    in 0..1; ``high == low`` is that one number.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    low: int = 0
    high: int = 1


class Trial(Struct, frozen=True):
    """Valid inputs and their outputs: for one row, and for two if the graph is to be batched.

    ``mixed`` says which output's rows were found to depend on each other.
    """

    fills: tuple[Fill, ...]
    one: dict[str, Array]
    outputs: list[Array]
    two: dict[str, Array] | None = None
    outputs_of_two: list[Array] | None = None
    two_failed: str = ""
    mixed: str = ""

    @property
    def singles(self) -> tuple[Fill, ...]:
        """The inputs that are one integer."""
        return tuple(fill for fill in self.fills if _single(fill.datatype, fill.shape))


def find_trial(session: Runs, interface: Interface, *, batched: bool) -> Trial | str:
    """The first generated inputs that run, or why the last ones did not; optional ones are left out.

    A single integer may say how much is wanted: one that gives huge outputs is taken only if no other runs.
    """
    why, huge = "no inputs of a reasonable size", None
    for fills in _candidates(interface.required(), batched=batched):
        try:
            trial = run_trial(session, fills, batched=batched)
        except RunError as error:
            why = _first_line(error)
            continue
        if batched or not trial.singles or sum(each.nbytes for each in trial.outputs) <= _LARGEST_OUTPUTS:
            return trial
        huge = huge or trial
    return huge or why


def run_trial(session: Runs, fills: tuple[Fill, ...], *, batched: bool) -> Trial:
    """The trial on inputs generated for these fills. Raises ``RunError`` if they do not run as one row."""
    if not batched:
        inputs = generate_inputs(fills)
        return Trial(fills, inputs, session.run(inputs))
    two = generate_inputs(fills, rows=2)
    one = {name: array[:1] for name, array in two.items()}
    outputs = session.run(one)
    try:
        return Trial(fills, one, outputs, two, session.run(two))
    except RunError as error:
        return Trial(fills, one, outputs, two_failed=_first_line(error))


def _first_line(error: RunError) -> str:
    return str(error).strip().splitlines()[0]


def noise_of(session: Runs, fills: Sequence[Fill]) -> float:
    """How much a row's results change with the batch size alone: the model's sensitivity to rounding.

    Kernels sum in another order for another batch size.
    """
    noise = 0.0
    inputs = generate_inputs(fills, rows=2)
    try:
        together = session.run(inputs)
        for row in range(2):
            alone = session.run({name: array[row : row + 1] for name, array in inputs.items()})
            pairs = list(zip(alone, together, strict=True))
            if any(not two.ndim or two.shape[0] != 2 or one.size * 2 != two.size for one, two in pairs):
                return 0.0
            for one, two in pairs:
                own = two[row : row + 1]
                noise = max(noise, difference([one.reshape(own.shape)], [own]))
    except RunError:
        return 0.0
    return noise


def variants(trial: Trial) -> list[dict[str, Array]]:
    """Inputs to compare two graphs on: those of the trial, and with other values of its single integers.

    Not with values that were tried before its own, for they did not run, or gave huge outputs.
    """
    found = [trial.one] if trial.two is None else [trial.one, trial.two]
    values: tuple[int, ...] = _SCALARS if trial.singles else ()
    if trial.singles and (own := trial.singles[0]).low == own.high:
        values = values[values.index(own.low) :]
    for value in values:
        changed = dict(trial.one)
        for fill in trial.singles:
            array = changed[fill.name]
            changed[fill.name] = np.full_like(array, min(value, np.iinfo(array.dtype).max))
        found.append(changed)
    return found


def generate_inputs(fills: Sequence[Fill], rows: int = 1, seed: int = SEED) -> dict[str, Array]:
    """Arrays for the fills; with ``rows`` > 1 axis 0 is that long. Deterministic for a seed."""
    random = np.random.default_rng(seed)
    arrays = {}
    for fill in fills:
        arrays[fill.name] = _array(fill, (rows, *fill.shape[1:]) if rows > 1 else fill.shape, random)
    return arrays


def difference(got: Sequence[Array], wanted: Sequence[Array]) -> float:
    """The largest relative difference, ``max|a-b| / max|b|`` of an output; infinite if they do not match.

    NaN equals NaN, and an infinity equals itself.
    """
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.dtype.kind != "f":
            worst = worst if np.array_equal(a, b) else float("inf")
            continue
        finite = np.isfinite(b)
        if not np.isfinite(a[finite]).all() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        if finite.any():
            gap = float(np.abs(a[finite].astype("f8") - b[finite]).max())
            scale = float(np.abs(b[finite]).max())
            worst = max(worst, gap / scale if scale else (float("inf") if gap else 0.0))
    return worst


def _candidates(interface: Interface, *, batched: bool) -> Iterator[tuple[Fill, ...]]:
    free = any(isinstance(dim, str) for tensor in interface.inputs for dim in (tensor.dims or ())[1:])
    loose = any(isinstance(dim, str) for tensor in interface.inputs for dim in (tensor.dims or ())[:1])
    single = any(_single(tensor.datatype, tensor.dims) for tensor in interface.inputs)
    rows = ("batch",) if batched or not loose else ("batch", "states", "none")
    sizes = _SIZES if free or (loose and not batched) else _SIZES[:1]
    for one_row, scalar, size in itertools.product(rows, _SCALARS if single else (0,), sizes):
        fills = tuple(_fill(tensor, interface, size, scalar, one_row) for tensor in interface.inputs)
        if all(np.prod(fill.shape, dtype="f8") * 8 <= _LARGEST_INPUT for fill in fills):
            yield fills


def _fill(tensor: GraphTensor, interface: Interface, size: int, scalar: int, one_row: str) -> Fill:
    """One input; ``one_row`` says which free dimensions are a batch of one.

    ``batch``: those on axis 0, and others of their names; ``states``: also those of a tensor whose axis 0 is
    fixed, as recurrent states are; ``none``.
    """
    firsts = [other.dims[0] for other in interface.inputs if other.dims]
    rows = {name for name in firsts if isinstance(name, str) and name}
    dims = tensor.dims or ()
    state = one_row == "states" and bool(dims) and isinstance(dims[0], int)
    shape = []
    for axis, dim in enumerate(dims):
        if isinstance(dim, int):
            shape.append(dim)
        else:
            single = one_row != "none" and (axis == 0 or dim in rows or state)
            shape.append(1 if single else size)
    low, high = (scalar, scalar) if _single(tensor.datatype, tensor.dims) else (0, 1)
    return Fill(name=tensor.name, datatype=tensor.datatype, shape=tuple(shape), low=low, high=high)


def _single(datatype: str, dims: tuple[Dim, ...] | None) -> bool:
    """Whether it is one integer, which often is a setting."""
    return "INT" in datatype and dims in ((), (1,))


def _array(fill: Fill, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    if fill.datatype == "BYTES":
        letters = random.integers(ord("a"), ord("z") + 1, shape)
        return np.vectorize(chr, otypes=[object])(letters) if letters.size else np.empty(shape, object)
    if fill.datatype == "BF16":
        return (np.asarray(random.random(shape, np.float32)).view("u4") >> 16).astype("u2")
    dtype = DTYPES[fill.datatype]
    if dtype.kind == "f":
        return np.asarray(random.random(shape)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(random.integers(0, 2, shape)).astype(dtype)
    most = np.iinfo(dtype).max
    values = random.integers(min(fill.low, most), min(fill.high, most) + 1, shape)
    return np.asarray(values).astype(dtype)
