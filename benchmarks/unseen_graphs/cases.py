"""The graphs by seed and number, with their truth, shown by plain ONNX Runtime."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.unseen_graphs.draft import Array, Draft
from benchmarks.unseen_graphs.mixing import FLOAT, INT64, Hint, hidden
from benchmarks.unseen_graphs.safe import VOCABULARY, picture_rows, row_steps, token_rows

HALF, BYTE = TensorProto.FLOAT16, TensorProto.UINT8
Feeds = dict[str, Array]
REDRAWS = 40
ort.set_default_logger_severity(4)


@dataclass(slots=True)
class Case:
    """A graph, what it takes, and whether it mixes rows."""

    seed: int
    number: int
    mixes: bool
    model: onnx.ModelProto
    inputs: dict[str, tuple[int, tuple[str | int, ...]]]
    hint: Hint
    rtol: float = 1e-4
    witness: tuple[Feeds, int] | None = None
    """Rows that show that it mixes, and one that is answered otherwise alone."""
    outputs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is, and how to have it again."""
        what = f"{self.hint.kind}, {self.hint.hidden}" if self.mixes else "safe"
        return f"--seed {self.seed} --only {self.number} ({what})"

    def feeds(self, dice: random.Random, rows: int, *, spiced: bool, length: int = 0) -> Feeds:
        """Inputs for some rows; ``spiced``: one of them has what the hint asks for."""
        rng = np.random.default_rng(dice.getrandbits(32))
        length = length or (self.hint.length if spiced and self.hint.length else int(rng.integers(6, 16)))
        found: Feeds = {}
        for name, (kind, dims) in self.inputs.items():
            shape = [rows, *(length if isinstance(dim, str) else dim for dim in dims[1:])]
            if kind in (INT64, BYTE):
                values = rng.integers(0, 10, shape).astype(np.float64)
            else:
                values = rng.standard_normal(shape) * 1.5
            if spiced and self.hint.values and name == "x":
                at = int(rng.integers(rows))
                low, high = self.hint.values
                flat = values.reshape(rows, -1)
                some = rng.integers(flat.shape[1], size=1 + flat.shape[1] // 4)
                flat[at, some] = low if kind in (INT64, BYTE) else rng.uniform(low, high, len(some))
            found[name] = values.astype(helper.tensor_dtype_to_np_dtype(kind))
        return found


def session(model: bytes, *, optimised: bool = False) -> ort.InferenceSession:
    """Plain ONNX Runtime, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def row_of(feeds: Mapping[str, Array], row: int) -> Feeds:
    """One row alone."""
    return {name: array[row : row + 1] for name, array in feeds.items()}


def far(found: npt.NDArray[Any], wanted: npt.NDArray[Any], rtol: float, *, floor: float = 1e-6) -> bool:
    """Whether two answers differ beyond rounding; equal NaN and infinities are equal.

    A difference up to ``floor`` is rounding, however small the answers are.
    """
    if found.shape != wanted.shape:
        return True
    one, other = found.astype(np.float64), wanted.astype(np.float64)
    odd = ~np.isfinite(one) | ~np.isfinite(other)
    if not np.array_equal(one[odd], other[odd], equal_nan=True):
        return True
    one, other = one[~odd], other[~odd]
    if found.dtype.kind != "f":
        return not np.array_equal(one, other)
    scale = float(np.max(np.abs(other), initial=0.0))
    return bool(np.any(np.abs(one - other) > rtol * scale + floor))


def shown(plain: ort.InferenceSession, feeds: Feeds, rtol: float) -> int | None:
    """A row whose answer in this company is not that which it has alone. ValueError if rows get lost."""
    together = plain.run(None, feeds)
    rows = len(next(iter(feeds.values())))
    for row in range(rows):
        alone = plain.run(None, row_of(feeds, row))
        for whole, one in zip(together, alone, strict=True):
            if whole.ndim == 0 or len(whole) != rows or len(one) != 1:
                raise ValueError("an output has no row for each input row")
            if far(whole[row : row + 1], one, rtol):
                return row
    return None


def drawn(seed: int, number: int, turn: int = 0) -> Case:
    """A graph whose truth nobody has checked; even numbers are safe."""
    dice = random.Random(f"{seed}/{number}/{turn}")
    mixes = number % 2 == 1
    d, hint = Draft(dice, dice.randrange(11, 22)), Hint()
    inputs, h, w, exact = _front(d)
    kind = inputs["x"][0]
    open_length = isinstance(inputs["x"][1][1], str)
    if mixes:
        gate = d.cast("x") if kind != FLOAT else "x"
        if len(inputs["x"][1]) > 2:
            gate = d.op("Flatten", gate)
        h, w = row_steps(d, h, w, dice.choice((0, 0, 1, 2)))
        h = hidden(d, h, w, hint, gate=gate, signed=kind in (FLOAT, HALF), open_length=open_length)
        h, w = row_steps(
            d, d.op("Add", h, d.constant(np.zeros((1, w), np.float32))), w, dice.choice((0, 0, 1, 2))
        )
    else:
        h, w = row_steps(d, h, w, dice.randrange(1, 7), exact=exact)
    outputs = {"y": FLOAT}
    last = d.op("Identity", h)
    if dice.random() < 0.2:
        outputs["z"] = FLOAT
        d.nodes.append(helper.make_node("Tanh", [h], ["z"]))
    if dice.random() < 0.15:
        outputs["y"], last = HALF, d.cast(last, HALF)
    d.nodes.append(helper.make_node("Identity", [last], ["y"]))
    rtol = 2e-2 if HALF in (kind, outputs["y"]) else 1e-4
    return Case(seed, number, mixes, d.model(inputs, outputs), inputs, hint, rtol, None, list(outputs))


def _front(d: Draft) -> tuple[dict[str, tuple[int, tuple[str | int, ...]]], str, int, bool]:
    """Inputs, and rows made of them, their width, and whether nothing was rounded."""
    kind = d.dice.choice((FLOAT, FLOAT, FLOAT, FLOAT, HALF, INT64, BYTE))
    h = "x" if kind == FLOAT else d.cast("x")
    w = d.dice.choice((4, 6, 8))
    match d.dice.choice(
        ("rows", "rows", "two", "length", "pictures", "tokens", "open tokens", "words", "half")
    ):
        case "two":
            h = d.op(d.dice.choice(("Add", "Mul", "Sub")), h, "x2")
            return {"x": (kind, ("N", w)), "x2": (FLOAT, ("N", w))}, h, w, True
        case "length":
            some = d.reduce(d.dice.choice(("ReduceMean", "ReduceMax")), h, [1])
            some = d.op("Concat", some, d.slice(h, 0, 3, 1), axis=1)
            return {"x": (kind, ("N", "L"))}, some, 4, False
        case "pictures":
            side = d.dice.choice((4, 6))
            return {"x": (kind, ("N", 4, side, side))}, *picture_rows(d, h, 4, side), False
        case "tokens":
            return {"x": (kind, ("N", 5, w))}, *token_rows(d, h, w), False
        case "open tokens":
            return {"x": (kind, ("N", "L", w))}, *token_rows(d, h, w), False
        case "words":
            length = d.dice.choice((5, "L"))
            words = d.op("Gather", d.random(VOCABULARY, w), "x")
            return {"x": (INT64, ("N", length))}, *token_rows(d, words, w), False
        case "half":
            weights = d.constant(
                np.random.default_rng(d.dice.getrandbits(32)).random((w, w)).astype(np.float16)
            )
            return {"x": (HALF, ("N", w))}, d.cast(d.op("MatMul", "x", weights)), w, False
        case _:
            return {"x": (kind, ("N", w))}, h, w, True


def made(seed: int, number: int, tries: int = 3) -> Case:
    """A graph whose truth is shown: a witness where it mixes, and none in some tries where it does not.

    What plain ONNX Runtime refuses is drawn anew, and so is what has no witness (a later step may have
    undone what was mixed). RuntimeError if a graph meant to be safe has a witness: the generator is wrong.
    """
    for turn in range(REDRAWS):
        case = drawn(seed, number, turn)
        dice = random.Random(f"{seed}/{number}/{turn}/inputs")
        try:
            plain = session(case.model.SerializeToString())
            if checked(case, plain, dice, 8 if case.mixes else tries):
                return case
        except (ort.capi.onnxruntime_pybind11_state.RuntimeException, ValueError):
            continue
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
    raise RuntimeError(f"--seed {seed} --only {number}: nothing in {REDRAWS} draws can be judged")


def checked(case: Case, plain: ort.InferenceSession, dice: random.Random, tries: int) -> bool:
    """Whether its truth was shown."""
    for attempt in range(tries):
        rows = case.hint.rows or dice.randrange(2, 6)
        feeds = case.feeds(dice, rows, spiced=attempt % 4 != 3)
        row = shown(plain, feeds, 10 * case.rtol if case.mixes else case.rtol)
        if row is not None and not case.mixes:
            raise RuntimeError(f"{case.name}: meant to be safe, but row {row} depends on others")
        if row is not None:
            case.witness = feeds, row
            return True
    return not case.mixes
