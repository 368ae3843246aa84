"""Asks plain ONNX Runtime, row by row, whether a graph mixes rows; knows nothing of how the store decides.

A row's answer is taken alone and in company: in every batch size, in other orders, beside padding, and at one
batch size and place beside neighbours replaced by NaN, infinity, zeros, values a thousand times larger, other
integers and texts. Beside other neighbours every bit must stay; between batch sizes and places, where kernels
sum in another order, a difference is allowed for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.rows.graph import Array

SIZES = (2, 3, 4, 8, 16)
OTHER_SIZES = (5, 7, 11, 13)
FIXED = (2, 5, 16)
"""Batch sizes at which neighbours are replaced."""
ALONE = 6
"""Rows whose answers alone are known."""
ROUNDING, COARSE_ROUNDING = 2e-4, 3e-2
"""Relative difference between places and batch sizes that is let pass; the second where float16 is."""
SHAKES = 8
"""Times that the last bits of a row are changed at random."""
POISONS = ("nan", "infinity", "zeros", "large", "larger", "other", "negative")

Arrays = dict[str, Array]
Run = Callable[[Arrays], list[Array]]


class Refused(Exception):
    """The graph does not run on these inputs."""


@dataclass(slots=True)
class Finding:
    """What was seen. ``refused``: not even one row runs. ``neighbours``, ``place``, ``shape``: the proof.

    ``faint``: neighbours changed bits, but no more than rounding does: a few kernels compute a whole vector
    in another way if one number in it is huge; or the answer changes as much with the last bits of its own
    input (:func:`unsettled`).
    """

    refused: str = ""
    neighbours: str = ""
    place: str = ""
    shape: str = ""
    faint: str = ""

    @property
    def mixes(self) -> str:
        """How it was seen to mix, if it was."""
        return self.neighbours or self.shape or self.place


def session_of(model: bytes, *, optimised: bool = False) -> ort.InferenceSession:
    """A plain session, nothing optimised unless it is asked for, on one thread. Raises ``Refused``."""
    options = ort.SessionOptions()
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever the runtime raises: its classes have no common base
        raise Refused(str(error)) from error


def runner(session: ort.InferenceSession) -> Run:
    """Runs it; raises ``Refused``."""

    def run(inputs: Arrays) -> list[Array]:
        try:
            return [np.asarray(each) for each in session.run(None, inputs)]
        except Exception as error:  # as above
            raise Refused(str(error)) from error

    return run


# Rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind for every input; ``take`` builds a batch out of them."""

    arrays: Arrays

    def take(self, chosen: Sequence[int]) -> Arrays:
        """These rows, in this order."""
        return {name: np.ascontiguousarray(array[list(chosen)]) for name, array in self.arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Inputs by name: numpy's kind, and the shape of a row."""


def specs_of(session: ort.InferenceSession, free: int = 4) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The inputs of a session, their free dimensions behind the first made ``free``."""
    kinds = {
        "tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2", "tensor(int64)": "i8",
        "tensor(int32)": "i4", "tensor(int16)": "i2", "tensor(int8)": "i1", "tensor(uint8)": "u1",
        "tensor(uint16)": "u2", "tensor(uint32)": "u4", "tensor(uint64)": "u8", "tensor(bool)": "?",
        "tensor(string)": "O",
    }  # fmt: skip
    found = {}
    for each in session.get_inputs():
        row = tuple(size if isinstance(size, int) else free for size in each.shape[1:])
        if each.type not in kinds:
            raise Refused(f"input {each.name} is a {each.type}")
        found[each.name] = (kinds[each.type], row)
    return found


WORDS = ("a", "b", "word", "", "other", "longer than all others", "0", "ä")


def plain_rows(
    specs: Specs, count: int, dice: np.random.Generator, lows: Mapping[str, int] | None = None
) -> Rows:
    """Rows as a client would send them; ``lows``: the least values of inputs that take no smaller ones."""
    arrays: Arrays = {}
    for name, (kind, row) in specs.items():
        shape = (count, *row)
        if kind == "O":
            arrays[name] = np.asarray(dice.choice(np.asarray(WORDS[:4], object), shape), object)
        elif kind == "?":
            arrays[name] = np.asarray(dice.integers(0, 2, shape)).astype("?")
        elif kind[0] in "iu":
            low = (lows or {}).get(name, 0)
            arrays[name] = np.asarray(dice.integers(low, low + 6, shape)).astype(kind)
        else:
            arrays[name] = np.asarray(dice.standard_normal(shape)).astype(kind)
    return Rows(arrays)


def poisoned(rows: Rows, poison: str, dice: np.random.Generator) -> Rows:
    """The same number of rows, none of which is like these."""
    arrays = {}
    for name, array in rows.arrays.items():
        kind = array.dtype.kind
        if kind == "f":
            arrays[name] = _poisoned_floats(array, poison, dice)
        elif kind == "O":
            word = {"zeros": "", "large": "longer than all others" * 3, "nan": "\x00"}.get(poison, "other")
            arrays[name] = np.full(array.shape, word, object)
        elif kind == "b":
            arrays[name] = ~array if poison != "zeros" else np.zeros_like(array)
        else:
            arrays[name] = _poisoned_integers(array, poison, dice)
    return Rows(arrays)


def _poisoned_floats(array: Array, poison: str, dice: np.random.Generator) -> Array:
    if poison in ("nan", "infinity", "zeros"):
        value = {"nan": np.nan, "infinity": np.inf, "zeros": 0.0}[poison]
        return np.full_like(array, value)
    factor = {"large": 1e3, "larger": 1e6 if array.dtype != np.float16 else 1e4, "negative": -30.0}.get(
        poison, 1.0
    )
    other = np.asarray(dice.standard_normal(array.shape)).astype(array.dtype)
    with np.errstate(over="ignore"):
        return np.asarray((array if factor < 0 else np.abs(other) + 0.5) * factor).astype(array.dtype)


def _poisoned_integers(array: Array, poison: str, dice: np.random.Generator) -> Array:
    signed = array.dtype.kind == "i"
    if poison in ("zeros", "nan"):
        return np.zeros_like(array)
    if poison == "infinity":
        return np.full_like(array, 1)
    if poison == "other":  # in another order at least, which is as valid as the rows are
        return np.asarray(dice.permuted(array.reshape(-1)).reshape(array.shape))
    if poison == "large":
        return np.full_like(array, min(5000, int(np.iinfo(array.dtype).max)))
    if poison == "larger":
        return np.full_like(array, 5)
    if poison == "negative" and signed:
        return np.full_like(array, -1)
    return np.asarray(dice.integers(0, 6, array.shape)).astype(array.dtype)


# Judging


LIGHT_SIZES, LIGHT_FIXED = (2, 4), (2,)


def judge(
    session: ort.InferenceSession,
    *,
    seed: int = 0,
    rows: Rows | None = None,
    thorough: bool = False,
    light: bool = False,
) -> Finding:
    """What a graph does to rows: to ``rows``, or to some by chance.

    ``thorough``: more of them, for one that is in doubt. ``light``: fewer batches, for one that takes long.
    """
    finding = Finding()
    dice = np.random.default_rng(seed)
    try:
        specs = specs_of(session)
    except Refused as error:
        finding.refused = str(error)
        return finding
    for attempt in range(8 if thorough else 1):
        trial = _Trial(runner(session), rows or plain_rows(specs, 24, dice), dice, finding, light=light)
        try:
            trial.alone_first()
        except Refused as error:
            finding.refused = "" if attempt else str(error)
            return finding
        if finding.mixes or trial.neighbours() or trial.places():
            return finding
    return finding


class _Trial:
    """Rows of one pool, asked in all ways; what is seen goes into the finding."""

    def __init__(
        self, run: Run, rows: Rows, dice: np.random.Generator, finding: Finding, *, light: bool
    ) -> None:
        self._run = run
        self._rows = rows
        self._dice = dice
        self._finding = finding
        self._light = light
        self._allowed = rounding_of(array.dtype for array in rows.arrays.values())
        self._alone: list[list[Array]] = []

    def alone_first(self) -> None:
        """The answers of single rows, one of them twice. Raises ``Refused``."""
        known = 2 if self._light else ALONE
        self._alone = [self._run(self._rows.take([number])) for number in range(known)]
        again = self._run(self._rows.take([0]))
        if not all(same(a, b) for a, b in zip(again, self._alone[0], strict=True)):
            self._finding.neighbours = "one row asked twice has two answers"

    def neighbours(self) -> bool:
        """At one batch size and place, every bit must stay whoever stands beside. Whether it mixes."""
        for size in LIGHT_FIXED if self._light else FIXED:
            batch = self._rows.take(range(size))
            try:
                whole = self._run(batch)
            except Refused as error:
                if not self._each_runs(range(size)):
                    continue
                self._finding.shape = f"{size} rows do not run: {error}"
                return True
            if not self._counts_fit(whole, size):
                return True
            for place in {0, size - 1, int(self._dice.integers(0, size))}:
                if self._beside(batch, whole, place, size):
                    return True
        return False

    def _each_runs(self, numbers: Sequence[int]) -> bool:
        """Whether it takes each of these rows alone: it may refuse a batch for the values of one row."""
        try:
            for number in set(numbers):
                self._run(self._rows.take([number]))
        except Refused:
            return False
        return True

    def _beside(self, batch: Arrays, whole: Sequence[Array], place: int, size: int) -> bool:
        for poison, other in _exchanged(batch, place, self._dice):
            try:
                answer = self._run(other)
            except Refused:
                continue
            for number, (a, b) in enumerate(zip(answer, whole, strict=True)):
                own, before = a[place : place + 1], b[place : place + 1]
                if a.shape == b.shape and same(own, before):
                    continue
                text = f"output {number}, row {place} of {size}: other bits beside {poison} neighbours"
                if a.shape == b.shape and gap_of(own.ravel(), before.ravel()) <= self._allowance(own):
                    self._finding.faint = text
                    continue
                self._finding.neighbours = text
                return True
        return False

    def _allowance(self, output: Array) -> float:
        return self._allowed if output.dtype.kind == "f" else 0.0

    def _counts_fit(self, whole: Sequence[Array], size: int) -> bool:
        for number, (output, single) in enumerate(zip(whole, self._alone[0], strict=True)):
            if not output.ndim or output.shape[0] != size or output.size != size * single.size:
                self._finding.shape = (
                    f"output {number} of {size} rows has the shape {output.shape}, of one {single.shape}"
                )
                return False
        return True

    def places(self) -> bool:
        """In any size, order and beside padding a row is answered as it is alone, but for rounding."""
        sizes = LIGHT_SIZES if self._light else (*SIZES, int(self._dice.choice(OTHER_SIZES)))
        for size in sizes:
            orders = [list(range(size)), [int(each) for each in self._dice.permutation(size)]]
            orders.append([0] + [1] * (size - 1))  # padding repeats the last row
            for order in orders:
                try:
                    answer = self._run(self._rows.take(order))
                except Refused as error:
                    if not self._each_runs(order):
                        continue
                    self._finding.shape = f"{size} rows do not run: {error}"
                    return True
                if not self._counts_fit(answer, size):
                    return True
                for place, number in enumerate(order):
                    if number < len(self._alone):
                        self._compare(answer, number, place, size)
            if self._finding.mixes:
                return True
        return False

    def _compare(self, answer: Sequence[Array], row: int, place: int, size: int) -> None:
        finding, single = self._finding, self._alone[row]
        for number, (whole, one) in enumerate(zip(answer, single, strict=True)):
            gap = gap_of(whole[place : place + 1].ravel(), one.ravel())
            allowed = self._allowance(whole)
            if gap > allowed and not finding.place:
                text = f"output {number}, row {place} of {size}: {gap:.1e} away from what it is alone"
                if allowed and unsettled(
                    self._run, self._rows.take([row]), single, self._allowed, self._dice
                ):
                    finding.faint = f"{text}; so it is beside itself, if the input's last bit changes"
                    continue
                finding.place = text


def unsettled(
    run: Run, row: Arrays, answer: Sequence[Array], allowed: float, dice: np.random.Generator
) -> bool:
    """Whether the answer to one row, alone, changes by more than rounding with the last bits of its input.

    A normalisation of what is equal but for rounding, say, gives numbers about one that are made of rounding
    alone. Another batch size rounds otherwise, so that they are other numbers; no row mixes with another.
    """
    for _ in range(SHAKES):
        other = {
            name: np.nextafter(array, np.asarray(dice.choice([-np.inf, np.inf], array.shape), array.dtype))
            if array.dtype.kind == "f"
            else array
            for name, array in row.items()
        }
        try:
            shaken = run(other)
        except Refused:
            continue
        gaps = [
            gap_of(a.ravel(), b.ravel()) for a, b in zip(shaken, answer, strict=True) if b.dtype.kind == "f"
        ]
        if max(gaps, default=0.0) > allowed:
            return True
    return False


def rounding_of(inputs: Iterable[np.dtype[Any]]) -> float:
    """How much answers may differ, by the coarsest of the inputs."""
    return COARSE_ROUNDING if np.dtype("f2") in inputs else ROUNDING


def _exchanged(batch: Arrays, place: int, dice: np.random.Generator) -> Iterator[tuple[str, Arrays]]:
    """The batch with every row but one replaced, in turns."""
    for poison in POISONS:
        other = poisoned(Rows(batch), poison, dice).arrays
        for name, array in batch.items():
            other[name][place] = array[place]
        yield poison, other


def same(a: Array, b: Array) -> bool:
    """Bit for bit, NaN for NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind == "f":
        return bool(np.array_equal(a, b, equal_nan=True))
    return bool(np.array_equal(a, b))


def gap_of(a: Array, b: Array) -> float:
    """The largest difference, in relation to the largest value; infinite if they are not alike."""
    if a.size != b.size or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind != "f":
        return 0.0 if np.array_equal(a, b) else float("inf")
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    gap = float(np.abs(a[finite].astype("f8") - b[finite].astype("f8")).max())
    scale = float(np.abs(b[finite].astype("f8")).max())
    return gap / max(scale, 1e-3)
