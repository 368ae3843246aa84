"""Tests by runs whether a model is row-independent: a check of ``row_rule`` and of what is declared.

It cannot prove it. A wrong declaration whose harm no run shows gives wrong answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.store.trial import (
    SAME_ROW,
    SEED,
    Array,
    Fill,
    Interface,
    RunError,
    Runs,
    Trial,
    difference,
    generate_inputs,
)

# ------------------------------------------------------------
# Runs of one batch size are compared bit for bit, for the same kernels sum in the same order: each row must
# stay the same, whatever the other rows become. Only where a row moves (to another position, or to a batch of
# its own) may the ends of vector loops round differently, so only then is there a tolerance. A run that fails
# because of a neighbour's values proves nothing: a device runs the other rows of such a batch again.


_KINDS = ("nan", "zero", "thousandfold", "other", "twin", "flipped", "extreme", "long")
"""What a neighbour is replaced by. ``twin``: a copy of the watched row, as padding may be."""
_SIZES = (3, 4, 5, 8)
_SIZES_SLOW = (3,)
_SLOW_S = 0.05
"""A model that takes longer for two rows is run at fewer sizes: 140 rows would take it 7 s and more."""
_ANY_ORDER = 1e-2  # tolerance for equal runs on a device that sums in any order
_LIVELY = (100, 9, 3)
"""Largest integers tried for rows that differ: small ones test little, large ones exceed lookup tables."""
_COARSE = {"FP16": 1e-2, "BF16": 5e-2}
"""Tolerance for results that are equal up to rounding, for element types of few bits."""
_SPREAD_FACTOR = 16
_INTEGERS_ROUND = 1e-2  # the same for models with integer inputs only, such as quantised ones

_FLOATS = ("FP16", "FP32", "FP64", "BF16")

Inputs = Mapping[str, Array]


class _RowsInteract(Exception):
    """A run showed that rows depend on each other; its text says which."""


def compare_rows(session: Runs, interface: Interface, trial: Trial) -> Trial:
    """Run the model on changed rows; ``mixed`` of the result says in which case rows were found to interact.

    Integers stay within what ran before: a declared graph may loop, or make tensors, as large as they are.
    """
    if trial.two is None or trial.outputs_of_two is None:
        return trial
    if any(not two.ndim or two.shape[0] != 2 for two in trial.outputs_of_two):
        return trial
    try:
        _Rows(session, interface, trial).compare()
    except _RowsInteract as seen:
        return msgspec.structs.replace(trial, mixed=str(seen))
    except RunError as error:
        return msgspec.structs.replace(trial, two_failed=str(error).strip().splitlines()[0])
    return trial


class _Rows:
    """The test runs of one model."""

    def __init__(self, session: Runs, interface: Interface, trial: Trial) -> None:
        self._session = session
        self._names = [tensor.name for tensor in interface.outputs]
        self._types = [tensor.datatype for tensor in interface.outputs]
        self._exact = True
        self._fills = self._least = trial.fills
        for high in _LIVELY:
            lively = tuple(_with_high(fill, high) for fill in trial.fills)
            most = [_with_high(fill, high, low=high) for fill in trial.fills]
            if lively != trial.fills and all(self._run(generate_inputs(f, rows=5)) for f in (most, lively)):
                self._fills = lively
                break
        self._kinds = [kind for kind in _KINDS if any(_has(kind, fill.datatype) for fill in trial.fills)]

    def compare(self) -> None:
        """Run all tests. Raises ``_RowsInteract``, and ``RunError`` if some number of rows does not run."""
        self._check_repeatable()
        slow = all(self._is_slow() for _ in range(3))  # three times, for the machine may have been busy once
        self._check_each_kind()
        for size in _SIZES_SLOW if slow else _SIZES:
            self._check_each_row(size)
        self._check_padded(3 if slow else 4)
        for size in (2, 3) if slow else (2, 3, 5):
            self._check_permuted(size)
        self._check_alone(3)

    def _is_slow(self) -> bool:
        started = time.monotonic()
        self._must_run(2)
        return time.monotonic() - started > _SLOW_S

    def _check_repeatable(self) -> None:
        """Check that equal runs give equal results; nearly equal ones on a device that sums in any order."""
        before, rows = self._must_run(2)
        after = self._session.run(rows)
        if all(_equal(a, b) for a, b in zip(before, after, strict=True)):
            return
        for number, name in enumerate(self._names):
            if _gap(after[number], before[number], self._types[number]) > _ANY_ORDER:
                raise _RowsInteract(f"output '{name}': repeated runs on the same rows differ")
        self._exact = False

    # Kinds of runs

    def _check_each_kind(self) -> None:
        """Two rows: replace the other one by each kind, in all inputs at once, and in one input alone."""
        before, rows = self._must_run(2)
        singles = [fill.name for fill in self._fills] if 1 < len(self._fills) <= 8 else []
        for watched in (0, 1):
            for kind in self._kinds:
                self._check_unchanged(before, rows, (watched,), {1 - watched: kind})
            for name in singles:
                for kind in ("other", "extreme"):
                    self._check_unchanged(before, rows, (watched,), {1 - watched: kind}, only=name)

    def _check_each_row(self, size: int) -> None:
        """Watch each row in turn beside others of several kinds; with many rows, every second one."""
        before, rows = self._must_run(size)
        groups = [tuple(range(part, size, 2)) for part in (0, 1)] if size > 5 else [(i,) for i in range(size)]
        for turn, watched in enumerate(groups):
            kinds = {
                row: self._kinds[(row + turn) % len(self._kinds)] for row in range(size) if row not in watched
            }
            self._check_unchanged(before, rows, watched, kinds)

    def _check_padded(self, size: int) -> None:
        """Fewer rows than the batch has: the last is repeated, as devices pad."""
        before, rows = self._must_run(size)
        for taken in range(1, size):
            order = [min(row, taken - 1) for row in range(size)]
            after = self._run({name: array[order] for name, array in rows.items()})
            if after is not None:
                self._check_same(before, after, range(taken), f"{size - taken} of {size} rows are padding")

    def _check_permuted(self, size: int) -> None:
        before, rows = self._must_run(size)
        for order in ([*range(1, size), 0], list(reversed(range(size)))):
            after = self._run({name: array[order] for name, array in rows.items()})
            if after is None:
                continue
            for number, name in enumerate(self._names):
                moved = before[number][order]
                if _equal(moved, after[number]):
                    continue
                if not self._rounds(after[number], moved, rows, before, number):
                    raise _RowsInteract(f"output '{name}': results change if {size} rows are permuted")

    def _check_alone(self, size: int) -> None:
        """Run every row alone."""
        together, rows = self._must_run(size)
        for row in range(size):
            alone = self._run({name: array[row : row + 1] for name, array in rows.items()})
            if alone is None:
                continue
            for number, name in enumerate(self._names):
                one, many = alone[number], together[number][row : row + 1]
                if one.size != many.size:
                    continue
                if not self._rounds(one.reshape(many.shape), many, rows, together, number):
                    raise _RowsInteract(f"output '{name}': row {row} of {size} differs when it runs alone")

    def _rounds(self, got: Array, wanted: Array, rows: Inputs, before: Sequence[Array], number: int) -> bool:
        """Whether a difference may be rounding: changing inputs' last bits changes the results as much."""
        datatype = self._types[number]
        gap = _gap(got, wanted, datatype)
        if gap <= _COARSE.get(datatype, SAME_ROW):
            return True
        if any(fill.datatype in _FLOATS for fill in self._fills):
            return gap <= _SPREAD_FACTOR * self._spread(rows, before, number)
        return gap <= _INTEGERS_ROUND

    def _spread(self, rows: Inputs, before: Sequence[Array], number: int) -> float:
        """How far a result changes if its inputs change by their last bit."""
        worst = 0.0
        for up in (True, False):
            nudged = {
                fill.name: _nudged(rows[fill.name], fill.datatype, up=up)
                if fill.datatype in _FLOATS
                else rows[fill.name]
                for fill in self._fills
            }
            after = self._run(nudged)
            if after is not None:
                worst = max(worst, _gap(after[number], before[number], self._types[number]))
        return worst

    # One run and its check

    def _check_unchanged(
        self, before: Sequence[Array], rows: Inputs, watched: tuple[int, ...], kinds: Mapping[int, str],
        only: str = "",
    ) -> None:  # fmt: skip
        changed = {name: array.copy() for name, array in rows.items()}
        for fill in self._fills:
            if only in ("", fill.name):
                for row, kind in kinds.items():
                    changed[fill.name][row : row + 1] = _replacement(
                        fill, kind, rows[fill.name], row, watched[0]
                    )
        after = self._run(changed)
        if after is not None:
            circumstances = ", ".join(f"row {row} is {kind}" for row, kind in kinds.items())
            self._check_same(before, after, watched, circumstances)

    def _check_same(
        self, before: Sequence[Array], after: Sequence[Array], watched: Sequence[int], circumstances: str
    ) -> None:
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            name = self._names[number]
            if a.shape != b.shape or a.dtype != b.dtype:
                raise _RowsInteract(f"output '{name}': its shape changes if {circumstances}")
            for row in watched:
                one, other = a[row : row + 1], b[row : row + 1]
                close = not self._exact and _gap(other, one, self._types[number]) <= SAME_ROW
                if not close and not _equal(one, other):
                    raise _RowsInteract(f"output '{name}': row {row} of {len(a)} changes if {circumstances}")

    def _must_run(self, size: int) -> tuple[list[Array], Inputs]:
        rows = generate_inputs(self._fills, rows=size, seed=SEED + size)
        try:
            outputs = self._session.run(rows)
        except RunError:
            if self._fills == self._least:
                raise
            self._fills = self._least  # the larger integers do not work for all values
            return self._must_run(size)
        for name, output in zip(self._names, outputs, strict=True):
            if not output.ndim or output.shape[0] != size:
                raise _RowsInteract(f"output '{name}' has shape {list(output.shape)} for {size} rows")
        return outputs, rows

    def _run(self, inputs: Inputs) -> list[Array] | None:
        """The results; None if the values are refused, which proves nothing: a device retries the others."""
        try:
            return self._session.run(inputs)
        except RunError:
            return None


def _gap(got: Array, wanted: Array, datatype: str) -> float:
    if datatype == "BF16" and got.dtype == wanted.dtype:
        got, wanted = ((bits.astype("u4") << 16).view("f4") for bits in (got, wanted))
    return difference([got], [wanted])


def _nudged(array: Array, datatype: str, *, up: bool) -> Array:
    """Every number changed by its last bit."""
    if datatype == "BF16":
        return np.bitwise_xor(array, np.uint16(1 if up else 2))
    moved: Array = np.nextafter(array, array.dtype.type(np.inf if up else -np.inf))
    return moved


def _equal(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=True) if a.dtype.kind in "fc" else np.array_equal(a, b)


def _with_high(fill: Fill, high: int, low: int = 0) -> Fill:
    if "INT" not in fill.datatype or fill.low == fill.high:
        return fill
    return msgspec.structs.replace(fill, low=low, high=high)


def _has(kind: str, datatype: str) -> bool:
    if kind == "nan":
        return datatype in ("FP16", "FP32", "FP64", "BF16")
    if kind == "long":
        return datatype == "BYTES"
    if kind == "flipped":
        return datatype != "BYTES"
    return True


def _replacement(fill: Fill, kind: str, rows: Array, row: int, watched: int) -> Array:
    """What a row is replaced by."""
    own: Array = rows[row : row + 1]
    other: Array = generate_inputs([fill], rows=len(rows), seed=SEED + 1000 + row)[fill.name][row : row + 1]
    twin: Array = rows[watched : watched + 1]
    if kind == "twin":
        return twin
    if kind == "other":
        return other
    if rows.dtype.kind == "f":
        return _replaced_floats(own, kind)
    if fill.datatype == "BF16":
        bits = {"nan": 0x7FC0, "zero": 0, "thousandfold": 0x4480, "extreme": 0xFF80}
        return np.full_like(own, bits[kind]) if kind in bits else np.bitwise_xor(own, np.uint16(0x8000))
    if rows.dtype.kind == "b":
        return np.full_like(own, fill_value=False) if kind == "zero" else np.logical_not(own)
    if rows.dtype.kind == "O":
        text = {"zero": "", "long": "z" * 300, "extreme": "\u00e9\u4e2d " * 9, "thousandfold": "a" * 40}
        return np.full_like(own, text.get(kind, "q"))
    ends = {"zero": fill.low, "extreme": fill.high}
    return np.full_like(own, ends[kind]) if kind in ends else other


def _replaced_floats(own: Array, kind: str) -> Array:
    if kind in ("nan", "zero", "extreme"):
        filled = {"nan": np.nan, "zero": 0.0, "extreme": -float(np.finfo(own.dtype).max) / 2}
        return np.full_like(own, filled[kind])
    with np.errstate(over="ignore"):
        factor = {"thousandfold": 1000, "flipped": -1}.get(kind, 2)
        return np.asarray(np.multiply(own, own.dtype.type(factor)))


# ------------------------------------------------------------
# Evaluates a trial: whether axis 0 is a batch.


class BatchingVerdict(Struct, frozen=True):
    """Why there is no batch (``lost``), a ``warning``, and which outputs are squeezed at batch 1."""

    lost: str = ""
    warning: str = ""
    squeezed: dict[str, tuple[int, ...]] = {}


def batching_verdict(
    session: Runs, interface: Interface, trial: Trial | str, *, asked: bool, objection: str = ""
) -> BatchingVerdict:
    """Whether the model is batched: it is declared or there is no ``objection``, and no run shows otherwise.

    ``asked``: the configuration declares a ``max_batch_size`` above 0, which overrules an objection, but not
    a run. ``trial`` may say why the model could not be run.
    """
    if objection and not asked:
        return BatchingVerdict(undeclared(f"nothing shows that its rows are independent ({objection})"))
    if isinstance(trial, str):
        unchecked = f"max_batch_size is believed without a check, for the model could not be run ({trial})"
        return BatchingVerdict(warning=unchecked if asked else "")
    trial = compare_rows(session, interface, trial)
    if trial.outputs_of_two is None or trial.two_failed:
        return BatchingVerdict(_unbatched(f"it does not run on several rows ({trial.two_failed})"))
    static = all(isinstance(dim, int) for tensor in interface.inputs for dim in (tensor.dims or ())[1:])
    squeezed = {}
    for tensor, one, two in zip(interface.outputs, trial.outputs, trial.outputs_of_two, strict=True):
        shapes = f"has shape {list(one.shape)} for one row and {list(two.shape)} for two"
        if not two.ndim or two.shape[0] != 2:
            return BatchingVerdict(_unbatched(f"output '{tensor.name}' {shapes}"))
        row = two.shape[1:]
        if one.shape != (1, *row):
            if one.size != two.size // 2 or not (static or not row):
                return BatchingVerdict(_unbatched(f"output '{tensor.name}' {shapes}"))
            squeezed[tensor.name] = tuple(row)
    if trial.mixed:
        wish = "max_batch_size was asked for, but " if asked else ""
        return BatchingVerdict(_unbatched(f"{wish}an answer depends on the rows beside it ({trial.mixed})"))
    return BatchingVerdict(squeezed=squeezed)


_UNBATCHED = "served with max_batch_size 0 (requests give full shapes), one request per run"


def undeclared(reason: str) -> str:
    """The warning for a model that is batched only if its configuration declares it."""
    return (
        f"{reason}: {_UNBATCHED}; if you know that its rows are independent, declare it with "
        "max_batch_size = 16 in clockwork.toml"
    )


def _unbatched(reason: str) -> str:
    return (
        f"{reason}: {_UNBATCHED}; to batch, export it with rows that are computed independently along axis 0"
    )
