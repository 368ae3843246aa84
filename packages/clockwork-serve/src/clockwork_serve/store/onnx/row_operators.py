"""The operators that keep the rows of a batch apart, with the attributes and inputs that make it so.

Here a value that depends on a request has the rows as axis 0 and on no other axis. A rule is called only for
operators that read such values; operators without a rule are not known to keep rows apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ROWS = "rows"
OPEN = ""
Size = Any  # of an axis: a number, ROWS (as many as there are rows) or OPEN (unknown)
Shape = tuple[Size, ...]
Elements = npt.NDArray[Any]
"""Elements of a small value, as objects: numbers, ``ROWS`` and ``OPEN``."""

NO_END = (1 << 31) - 1
"""The least end of a slice that means all: exporters write this, or a larger number."""


class Mixes(Exception):
    """An operator that is not known to keep rows apart; its text says why."""


def shown(sizes: Iterable[Size]) -> str:
    """Sizes as a text."""
    return f"[{', '.join(str(size) if size != OPEN else '?' for size in sizes)}]"


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph. ``shape`` is None if not even the rank is known.

    ``rows``: it depends on requests, and axis 0 is the rows. ``count``: it depends on the number of rows.
    ``fixed``: on neither. ``known``: the elements, if it is small and not a weight.
    """

    source: Literal["fixed", "rows", "count"]
    dtype: int
    shape: Shape | None
    known: Elements | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator that reads rows."""

    op: str
    version: int
    attributes: Mapping[str, Any]
    inputs: Sequence[Value | None]
    outputs: int

    @property
    def rank(self) -> int:
        """How many axes the rows have, in the first input that has them."""
        return len(self.shape(self.rows[0]))

    @property
    def rows(self) -> list[int]:
        """Which inputs have rows."""
        return [at for at, value in enumerate(self.inputs) if value is not None and value.source == "rows"]

    def shape(self, number: int) -> Shape:
        """The shape of an input. Raises ``Mixes`` if its rank is unknown."""
        value = self.inputs[number]
        if value is None or value.shape is None:
            raise Mixes(f"has an input ({number}) of unknown rank")
        return value.shape

    def has(self, number: int) -> bool:
        """Whether an input is given."""
        return len(self.inputs) > number and self.inputs[number] is not None

    def only(self, *numbers: int) -> None:
        """Check that these inputs have rows, and no others: those are weights or settings."""
        if self.rows != list(numbers):
            raise Mixes(f"depends on requests by inputs {self.rows}, not by {list(numbers)} alone")

    def setting(self, name: str, number: int) -> list[Any] | None:
        """An attribute in some versions, an input in others; None if it is left out."""
        if name in self.attributes:
            found = self.attributes[name]
            return list(found) if isinstance(found, list) else [found]
        if not self.has(number):
            return None
        value = self.inputs[number]
        assert value is not None
        if value.known is None:
            raise Mixes(f"has a setting (input {number}) that is not constant")
        return list(value.known.ravel())

    def apart(self, *axes: int, rank: int = 0) -> None:
        """Check that none of these axes is that of the rows."""
        if any(int(axis) % (rank or self.rank) == 0 for axis in axes):
            raise Mixes("computes along axis 0, which is the rows")

    def same_for_all(self, numbers: Iterable[int], rank: int) -> None:
        """Check that these inputs, broadcast to a rank, have no element of one row alone."""
        for number in numbers:
            if self.has(number) and number not in self.rows:
                shape = self.shape(number)
                if len(shape) > rank:
                    raise Mixes("moves the rows to another axis by broadcasting")
                if len(shape) == rank and shape[0] != 1:
                    raise Mixes("has a constant for each position in the batch")

    def one_number(self, *numbers: int) -> None:
        """Check that these inputs are one number, if they are given."""
        if any(self.has(number) and self.shape(number) not in ((), (1,)) for number in numbers):
            raise Mixes("has a scale or a zero point for each row")


# ------------------------------------------------------------
# The rules. A rule raises ``Mixes``, or returns shapes of outputs where it knows them better than onnx.

Rule = Callable[[Operation], Sequence[Shape]]


def _elementwise(call: Operation) -> Sequence[Shape]:
    """One element of each input, broadcast, for one of the output."""
    given = [number for number in range(len(call.inputs)) if call.has(number)]
    shapes = [call.shape(number) for number in given]
    rank = max(map(len, shapes))
    if any(len(call.shape(number)) != rank for number in call.rows):
        raise Mixes("aligns the rows with another axis")
    call.same_for_all(given, rank)
    found = []
    for axis in range(1, rank):
        sizes = [shape[axis - rank] for shape in shapes if len(shape) >= rank - axis]
        found.append(next((size for size in sizes if size not in (1, OPEN)), OPEN if OPEN in sizes else 1))
    return [(ROWS, *found)]


def _same(call: Operation) -> Sequence[Shape]:
    """One element out for one of input 0; the other inputs are settings."""
    call.only(0)
    return [call.shape(0)] * call.outputs


def _batch_first(least: int, most: int = 99, *, keeps_shape: bool = False) -> Rule:
    """Defined by the operator as a batch along axis 0 of input 0; the other inputs are weights."""

    def rule(call: Operation) -> Sequence[Shape]:
        call.only(0)
        if not least <= call.rank <= most:
            raise Mixes(f"has an input of {call.rank} axes, of which the first is no batch")
        if call.op == "BatchNormalization" and (call.attributes.get("training_mode") or call.outputs > 1):
            raise Mixes("normalises over the rows, for it trains")
        if call.op == "MaxPool" and call.outputs > 1:
            raise Mixes("returns indices into the whole batch")
        return [call.shape(0)] if keeps_shape else ()

    return rule


def _of_features(call: Operation) -> Sequence[Shape]:
    """An operator of ai.onnx.ml that takes a table, one row of features for each row."""
    _batch_first(2, 2)(call)
    return [(ROWS,), (ROWS, OPEN)] if call.op.endswith("Classifier") else [(ROWS, OPEN)]


def _quantise(call: Operation) -> Sequence[Shape]:
    call.only(0)
    for number in (1, 2):
        shape = call.shape(number) if call.has(number) else ()
        along = len(shape) == 1 and int(call.attributes.get("axis", 1)) % call.rank
        if shape not in ((), (1,)) and not along:
            raise Mixes("has a scale or a zero point for each row, or for blocks")
    return [call.shape(0)]


def _matmul(call: Operation, first: int = 0, second: int = 1) -> Sequence[Shape]:
    a, b = call.shape(first), call.shape(second)
    if call.rows == [first]:
        apart = len(a) >= 2 and (len(b) <= 2 or len(b) < len(a) or (len(b) == len(a) and b[0] == 1))
    elif call.rows == [second]:
        apart = len(b) >= 3 and (len(a) < len(b) or (len(a) == len(b) and a[0] == 1))
    else:
        apart = call.rows == [first, second] and len(a) == len(b) >= 3
    if not apart:
        raise Mixes("multiplies along the rows, or rows with each other")
    return ()


def _matmul_integer(call: Operation) -> Sequence[Shape]:
    call.one_number(2)
    call.same_for_all([3], 2)
    return _matmul(call)


def _qlinear_matmul(call: Operation) -> Sequence[Shape]:
    call.one_number(1, 2, 6, 7)
    call.same_for_all([4, 5], 2)
    return _matmul(call, 0, 3)


def _gemm(call: Operation) -> Sequence[Shape]:
    if call.rows not in ([0], [0, 2]) or call.attributes.get("transA"):
        raise Mixes("multiplies along the rows")
    if call.rows == [0, 2] and len(call.shape(2)) != 2:
        raise Mixes("aligns the rows with another axis")
    call.same_for_all([2], 2)
    return ()


def _einsum(call: Operation) -> Sequence[Shape]:
    left, arrow, right = call.attributes["equation"].decode().replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left + right or len(terms) != len(call.inputs):
        raise Mixes("has an equation without '->', or with '...'")
    first = right[:1]
    for number, term in enumerate(terms):
        if term.count(first) != (number in call.rows) or (number in call.rows and term[:1] != first):
            raise Mixes("combines rows")
    if not first or right.count(first) > 1:
        raise Mixes("combines rows")
    return ()


def _along(default: int | list[int], name: str = "axis") -> Rule:
    """Computes along one axis, or some; the other inputs are settings."""

    def rule(call: Operation) -> Sequence[Shape]:
        call.only(0)
        old_softmax = call.op in ("Softmax", "LogSoftmax", "Hardmax") and call.version < 13
        axes = call.attributes.get(name, 1 if old_softmax else default)  # the old one takes all axes behind
        call.apart(*np.ravel(axes))
        return [call.shape(0)] if call.op in _KEEP_SHAPE else ()

    return rule


_KEEP_SHAPE = ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "MeanVarianceNormalization")


def _layer_normalisation(call: Operation) -> Sequence[Shape]:
    call.only(0)
    call.apart(int(call.attributes.get("axis", -1)))
    call.same_for_all([1, 2], call.rank)
    return [call.shape(0)]


def _axes_given(call: Operation) -> Sequence[Shape]:
    """Computes along axes that an attribute or an input gives; without them along all."""
    call.only(0)
    axes = call.setting("axes", 1)
    if not axes:
        raise Mixes("computes along all axes, or along those whose size is 1")
    call.apart(*axes, rank=call.rank + (len(axes) if call.op == "Unsqueeze" else 0))
    return ()


def _concat(call: Operation) -> Sequence[Shape]:
    if len(call.rows) != len(call.inputs):
        raise Mixes("joins rows with a constant for each of them")
    call.apart(int(call.attributes["axis"]))
    return ()


def _gather(call: Operation) -> Sequence[Shape]:
    """Of a table by numbers of requests, or of every row by constants."""
    axis = int(call.attributes.get("axis", 0))
    if call.rows == [1]:
        if axis % len(call.shape(0)):
            raise Mixes("moves the rows to another axis")
        return ()
    call.only(0)
    call.apart(axis)
    return ()


def _transpose(call: Operation) -> Sequence[Shape]:
    if call.attributes.get("perm", list(range(call.rank))[::-1])[0] != 0:
        raise Mixes("moves the rows to another axis")
    return ()


def _slice(call: Operation) -> Sequence[Shape]:
    """Along other axes; or along that of the rows from the first to an end that no batch reaches."""
    call.only(0)
    count = len(call.attributes["starts"]) if "starts" in call.attributes else int(call.shape(1)[0])
    for place, axis in enumerate(call.setting("axes", 3) or range(count)):
        if int(axis) % call.rank == 0:
            start, end, step = (
                (call.setting(name, at) or {place: 1})[place]
                for name, at in (("starts", 1), ("ends", 2), ("steps", 4))
            )
            if start != 0 or step != 1 or not isinstance(end, int) or end < NO_END:
                raise Mixes("selects some of the rows")
    return ()


def _flatten(call: Operation) -> Sequence[Shape]:
    if call.attributes.get("axis", 1) not in (1, 1 - call.rank) or call.rank < 2:
        raise Mixes("joins the rows with other axes")
    return ()


def _reshape(call: Operation) -> Sequence[Shape]:
    """Elements keep their order, so rows stay whole if axis 0 is still as long as there are rows."""
    call.only(0)
    shape, target = call.shape(0), call.setting("shape", 1)
    if not target or (call.attributes.get("allowzero") and 0 in target):
        raise Mixes("reshapes to a shape without a first size")
    sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    inner, rest = shape[1:], sizes[1:]
    sized = all(isinstance(size, int) and size > 0 for size in (*inner, *rest))
    if sizes[0] == -1 and sized and math.prod(inner) == math.prod(rest):
        sizes[0] = ROWS
    if sizes[0] != ROWS or ROWS in rest:
        raise Mixes(f"reshapes {shown(shape)} to {shown(target)}, which may take rows apart")
    return [(ROWS, *(size if isinstance(size, int) and size >= 0 else OPEN for size in rest))]


def _pad(call: Operation) -> Sequence[Shape]:
    call.only(0)
    pads = call.setting("pads", 1) or []
    axes = call.setting("axes", 3) or range(call.rank)
    for place, axis in enumerate(axes):
        if int(axis) % call.rank == 0 and (pads[place] != 0 or pads[place + len(axes)] != 0):
            raise Mixes("pads the rows")
    return ()


def _resize(call: Operation) -> Sequence[Shape]:
    """By scales, of which that of the rows is 1; or along other ``axes``."""
    call.only(0)
    if call.attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise Mixes("may crop the rows")
    if "axes" in call.attributes:
        call.apart(*call.attributes["axes"])
        return ()
    scales = call.setting("scales", 1 if call.op == "Upsample" or call.version < 11 else 2)
    if not scales or scales[0] != 1 or call.has(3):
        raise Mixes("may resize the rows")
    return ()


def _one_hot(call: Operation) -> Sequence[Shape]:
    call.only(0)
    call.apart(int(call.attributes.get("axis", -1)), rank=call.rank + 1)
    return ()


def _cumulative(call: Operation) -> Sequence[Shape]:
    call.only(0)
    call.apart(*(call.setting("axis", 1) or [0]))
    return [call.shape(0)]


_ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Cos", "Cosh", "Div", "Elu", "Equal",
    "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul",
    "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu",
    "Where", "Xor", "Binarizer", "LabelEncoder",
)  # fmt: skip
_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
_SPATIAL = (
    "AveragePool", "Conv", "ConvInteger", "ConvTranspose", "DepthToSpace", "GlobalAveragePool",
    "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool", "QLinearConv", "SpaceToDepth",
)  # fmt: skip
_FEATURES = (
    "LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor", "TfIdfVectorizer",
    "TreeEnsembleClassifier", "TreeEnsembleRegressor",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise), **dict.fromkeys(_REDUCTIONS, _axes_given),
    **dict.fromkeys(_SPATIAL, _batch_first(3)), **dict.fromkeys(_FEATURES, _of_features),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "LpNormalization", "Softmax"), _along(-1)),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), _batch_first(3, keeps_shape=True)),
    **dict.fromkeys(("BatchNormalization", "LRN"), _batch_first(2, keeps_shape=True)),
    **dict.fromkeys(("Imputer", "Normalizer", "Scaler"), _batch_first(2, keeps_shape=True)),
    **dict.fromkeys(("ArgMax", "ArgMin", "Split"), _along(0)),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _axes_given),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantise),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("CastLike", "Clip", "Dropout"), _same),
    "Concat": _concat, "CumSum": _cumulative, "Einsum": _einsum, "Flatten": _flatten, "Gather": _gather,
    "Gemm": _gemm, "LayerNormalization": _layer_normalisation, "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "MeanVarianceNormalization": _along([0, 2, 3], "axes"), "OneHot": _one_hot, "Pad": _pad,
    "QLinearMatMul": _qlinear_matmul, "Reshape": _reshape, "Slice": _slice, "TopK": _along(-1),
    "Transpose": _transpose, "Trilu": _batch_first(3),
}  # fmt: skip
