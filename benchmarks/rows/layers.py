"""Layers that keep rows apart: products, convolutions, recurrent ones, attention, classical ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from benchmarks.rows.apart import either_sign, inexact, step
from benchmarks.rows.graph import FLOATS, LOCAL, ONNX_TYPES, ROWS, Scope, Value


@step(4, least_rank=2, dtypes=FLOATS)
def _product(g: Scope, x: Value) -> Value | None:
    if x.shape[-1] == ROWS:
        return None
    width = g.random.randint(1, 6)
    return inexact(x, g.op("MatMul", x, g.weights(x.dtype, x.shape[-1], width)), (*x.shape[:-1], width))


@step(1, least_rank=2, dtypes=FLOATS)
def _product_from_the_left(g: Scope, x: Value) -> Value | None:
    if x.shape[-2] == ROWS:
        return None
    width = g.random.randint(1, 5)
    name = g.op("MatMul", g.weights(x.dtype, width, x.shape[-2]), x)
    return inexact(x, name, (*x.shape[:-2], width, x.shape[-1]))


@step(2, ranks=(2,), dtypes=("f4", "f8"))
def _gemm(g: Scope, x: Value) -> Value | None:
    if x.axis is None:
        return None
    inputs, outputs = x.shape[1 - x.axis], g.random.randint(1, 6)
    flipped = g.random.randrange(2)
    weight = g.weights(x.dtype, *((outputs, inputs) if flipped else (inputs, outputs)))
    bias = [g.weights(x.dtype, outputs)] if g.chance(0.7) else []
    name = g.op("Gemm", x, weight, *bias, transA=x.axis, transB=flipped)
    return inexact(x, name, (ROWS, outputs))


@step(1, axis=0, ranks=(2, 3), dtypes=("f4", "f8"), since=12)
def _einsum(g: Scope, x: Value) -> Value | None:
    if x.rank == 2:
        width = g.random.randint(1, 4)
        name = g.op("Einsum", x, g.weights(x.dtype, x.shape[1], width), equation="bi,ij->bj")
        return inexact(x, name, (ROWS, width))
    name = g.op("Einsum", x, x, equation=g.random.choice(["bij,bkj->bik", "nij, nkj -> nik"]))
    return inexact(x, name, (ROWS, x.shape[1], x.shape[1]))


@step(1.5, axis=0, least_rank=3, dtypes=FLOATS)
def _product_of_rows(g: Scope, x: Value) -> Value | None:
    order = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    name = g.op("MatMul", x, g.transposed(x, order))
    return inexact(x, name, (*x.shape[:-1], x.shape[-2]))


@step(2, axis=0, least_rank=3, dtypes=("f4", "f8"))
def _merged(g: Scope, x: Value) -> Value | None:
    """Rows and tokens as one axis, a layer on the last one, and back again."""
    last = x.shape[-1]
    flat = g.op("Reshape", x, g.constant([-1, last]))
    kind = g.random.randrange(4)
    if kind == 0:
        flat = g.op("Softmax", flat, axis=1)
    elif kind == 1:
        flat = g.op("Relu", flat)
    else:
        width = g.random.randint(1, 5)
        flat = g.op("Gemm", flat, g.weights(x.dtype, last, width), g.weights(x.dtype, width))
        last = width
    shape = (*x.shape[:-1], last)
    back = g.constant(shape) if g.chance(0.4) else g.shape_with_rows(x, shape)
    return inexact(x, g.op("Reshape", flat, back), shape)


@step(2, axis=0, ranks=(3,), dtypes=("f4", "f8"))
def _attention(g: Scope, x: Value) -> Value | None:
    if x.shape[1] > 8:
        return None
    length, heads, width = x.shape[1], g.random.choice([1, 2]), g.random.choice([2, 3])
    merged, computed = g.chance(0.4), g.chance(0.5)

    def projected() -> str:
        flat = g.op("MatMul", x, g.weights(x.dtype, x.shape[2], heads * width))
        split = g.op("Reshape", flat, g.constant([0, length, heads, width]))
        turned = g.op("Transpose", split, perm=[0, 2, 1, 3])
        if not merged:
            return turned
        if computed:
            count = g.op("Mul", g.rows(x), g.constant([heads]))
            shape = g.op("Concat", count, g.constant([length]), g.constant([width]), axis=0)
            return g.op("Reshape", turned, shape)
        return g.op("Reshape", turned, g.constant([-1, length, width]))

    query, key, values = projected(), projected(), projected()
    perm = [0, 2, 1] if merged else [0, 1, 3, 2]
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=perm))
    scores = g.op("Div", scores, g.constant(math.sqrt(width), x.dtype))
    if g.chance(0.4):
        mask = np.triu(np.full((length, length), -1e4), 1)
        scores = g.op("Add", scores, g.constant(mask, x.dtype))
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=2 if merged else 3), values)
    if merged:
        mixed = g.op("Reshape", mixed, g.shape_with_rows(x, [ROWS, heads, length, width]))
    turned = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
    shape = (ROWS, length, heads * width)
    return inexact(x, g.op("Reshape", turned, g.shape_with_rows(x, shape)), shape)


# Pictures


@step(3, axis=0, ranks=(3, 4), dtypes=("f4",))
def _convolution(g: Scope, x: Value) -> Value | None:
    channels, outputs, sides = x.shape[1], g.random.randint(1, 4), x.rank - 2
    kernel = [min(3, size) for size in x.shape[2:]]
    depthwise = g.chance(0.2)
    outputs = channels if depthwise else outputs
    weight = g.weights("f4", outputs, 1 if depthwise else channels, *kernel)
    more: dict[str, Any] = {"group": channels} if depthwise else {}
    if g.chance(0.2):
        turned = g.weights("f4", channels, outputs if not depthwise else 1, *kernel)
        name = g.op("ConvTranspose", x, turned, kernel_shape=kernel, **more)
        sizes = [size + k - 1 for size, k in zip(x.shape[2:], kernel, strict=True)]
    else:
        pads = [1] * 2 * sides if all(size == 3 for size in kernel) else [0] * 2 * sides
        name = g.op("Conv", x, weight, kernel_shape=kernel, pads=pads, **more)
        sizes = [size + 2 * pads[0] - k + 1 for size, k in zip(x.shape[2:], kernel, strict=True)]
    return inexact(x, name, (ROWS, outputs, *sizes))


@step(2, axis=0, ranks=(3, 4), dtypes=("f4",))
def _pooled(g: Scope, x: Value) -> Value | None:
    kind = g.random.choice(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"])
    if kind.startswith("Global"):
        return inexact(x, g.op(kind, x), (*x.shape[:2], *[1] * (x.rank - 2)))
    kernel = [min(2, size) for size in x.shape[2:]]
    name = g.op(kind, x, kernel_shape=kernel)
    sizes = [size - k + 1 for size, k in zip(x.shape[2:], kernel, strict=True)]
    return inexact(x, name, (*x.shape[:2], *sizes))


@step(2, axis=0, least_rank=3, dtypes=("f4",))
def _channels_normalised(g: Scope, x: Value) -> Value | None:
    channels = x.shape[1]
    kind = g.random.choice(
        ["BatchNormalization", "InstanceNormalization", "LRN", "MeanVarianceNormalization"]
    )
    if kind == "LRN" and x.rank != 4:
        return None
    if kind == "LRN":
        return inexact(x, g.op("LRN", x, size=3))
    if kind == "MeanVarianceNormalization":
        return inexact(x, g.op(kind, x, axes=list(range(1, x.rank))))
    scale, bias = g.weights("f4", channels), g.weights("f4", channels)
    if kind == "InstanceNormalization":
        return inexact(x, g.op(kind, x, scale, bias, epsilon=0.1))
    spread = g.constant(np.linspace(0.5, 2, channels), "f4")
    return inexact(x, g.op(kind, x, scale, bias, g.weights("f4", channels), spread))


@step(1, axis=0, ranks=(4,), dtypes=("f4", "f8"))
def _blocks(g: Scope, x: Value) -> Value | None:
    _, channels, height, width = x.shape
    if height % 2 == 0 and width % 2 == 0 and g.chance(0.5):
        shape = (ROWS, channels * 4, height // 2, width // 2)
        return replace(x, name=g.op("SpaceToDepth", x, blocksize=2), shape=shape)
    if channels % 4 == 0:
        shape = (ROWS, channels // 4, height * 2, width * 2)
        return replace(x, name=g.op("DepthToSpace", x, blocksize=2), shape=shape)
    return None


@step(1, axis=0, ranks=(4,), dtypes=("f4",))
def _resized(g: Scope, x: Value) -> Value | None:
    if x.row_size > 128:
        return None
    _, channels, height, width = x.shape
    shape = (ROWS, channels, 2 * height, 2 * width)
    mode = g.random.choice(["nearest", "linear"])
    more = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    if g.chance(0.5):
        scales = g.constant([1, 1, 2, 2], "f4")
        return inexact(x, g.op("Resize", x, g.constant([], "f4"), scales, **more), shape)
    sizes = g.shape_with_rows(x, shape)
    nothing = g.constant([], "f4")
    return inexact(x, g.op("Resize", x, nothing, "" if g.opset >= 13 else nothing, sizes, **more), shape)


# Sequences


@step(2, axis=0, ranks=(3,), dtypes=("f4",))
def _recurrent(g: Scope, x: Value) -> Value | None:
    kind, gates = g.random.choice([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    hidden, length, width = g.random.randint(1, 4), x.shape[1], x.shape[2]
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    weights = [g.weights("f4", 1, gates * hidden, width), g.weights("f4", 1, gates * hidden, hidden)]
    more = []
    if g.chance(0.5):
        more = ["", "", g.op("ConstantOfShape", g.shape_with_rows(x, [1, ROWS, hidden]))]
    whole, last = g.ops(kind, turned, *weights, *more, outputs=2, hidden_size=hidden)
    if g.chance(0.5):
        return inexact(x, g.squeeze(last, 0), (ROWS, hidden))
    name = g.op("Transpose", g.squeeze(whole, 1), perm=[1, 0, 2])
    return inexact(x, name, (ROWS, length, hidden))


@step(0.7, least_rank=2, dtypes=("f4",))
def _reversed(g: Scope, x: Value) -> Value | None:
    if x.axis not in (0, 1):
        return None
    lengths = [v for v in g.values if v.dtype == "i8" and v.shape == (ROWS,) and v.exact]
    time = 1 - x.axis
    if lengths:
        chosen = g.random.choice(lengths)
        count = g.op("Max", g.op("Min", chosen, g.constant(x.shape[time])), g.constant(1))
        mixed = x.mixed or chosen.mixed
    else:
        count = g.op("Expand", g.constant(g.random.randint(1, x.shape[time])), g.shape_with_rows(x, [ROWS]))
        mixed = x.mixed
    name = g.op("ReverseSequence", x, count, batch_axis=x.axis, time_axis=time)
    return replace(x, name=name, mixed=mixed)


# Classical


@step(1, axis=0, ranks=(2,), dtypes=("f4",))
def _classical(g: Scope, x: Value) -> Value | None:
    width = x.shape[1]
    kind = g.random.choice(["Scaler", "Normalizer", "LinearRegressor", "Imputer"])
    if kind == "Scaler":
        more = {"offset": [0.5] * width, "scale": [2.0] * width}
        return inexact(x, g.op(kind, x, domain="ai.onnx.ml", **more))
    if kind == "Normalizer":
        return inexact(x, g.op(kind, x, domain="ai.onnx.ml", norm=g.random.choice(["MAX", "L1", "L2"])))
    if kind == "Imputer":
        new, old = [0.25] * width, math.nan
        name = g.op(kind, x, domain="ai.onnx.ml", imputed_value_floats=new, replaced_value_float=old)
        return replace(x, name=name)
    weights = [g.random.uniform(-1, 1) for _ in range(2 * width)]
    name = g.op(kind, x, domain="ai.onnx.ml", coefficients=weights, intercepts=[0.1, 0.2], targets=2)
    return inexact(x, name, (ROWS, 2))


@step(0.7, axis=0, ranks=(2,), dtypes=("f4",), exact=True)
def _trees(g: Scope, x: Value) -> Value | None:
    name = g.op(
        "TreeEnsembleRegressor", x, domain="ai.onnx.ml", n_targets=1, nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2], nodes_featureids=[g.random.randrange(x.shape[1]), 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_values=[0.4, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0], target_ids=[0, 0], target_nodeids=[1, 2],
        target_treeids=[0, 0], target_weights=[0.5, -1.5],
    )  # fmt: skip
    return inexact(x, name, (ROWS, 1))


@step(0.5, axis=0, ranks=(2,), dtypes=("f4",))
def _fourier(g: Scope, x: Value) -> Value | None:
    if not 17 <= g.opset < 20:
        return None
    wide = g.unsqueeze(x, 2)
    return inexact(x, g.op("DFT", wide, axis=1), (ROWS, x.shape[1], 2))


@step(0.7, least_rank=2, dtypes=("f4",), exact=True)
def _integer_product(g: Scope, x: Value) -> Value | None:
    if x.shape[-1] == ROWS:
        return None
    scale, zero = g.constant(0.05, "f4"), g.constant(128, "u1")
    quantised = g.op("QuantizeLinear", x, scale, zero)
    width = g.random.randint(1, 4)
    dice = np.random.default_rng(g.random.getrandbits(32))
    weight = g.constant(dice.integers(-100, 100, (x.shape[-1], width)), "i1")
    product = g.op("MatMulInteger", quantised, weight, zero)
    name = g.op("Mul", g.op("Cast", product, to=ONNX_TYPES["f4"]), g.constant(0.01, "f4"))
    return replace(x, name=name, shape=(*x.shape[:-1], width))


@step(0.7, axis=0, ranks=(3,), dtypes=("f4", "i8"), since=12)
def _gathered_by_row(g: Scope, x: Value) -> Value | None:
    ids = [v for v in g.values if v.dtype == "i8" and v.shape == (ROWS, 1) and v.exact]
    if not ids:
        return None
    index = g.random.choice(ids)
    within = g.op("Min", g.op("Max", index, g.constant(0)), g.constant(x.shape[1] - 1))
    name = g.op("GatherND", x, within, batch_dims=1)
    return replace(x, name=name, shape=(ROWS, x.shape[2]), mixed=x.mixed or index.mixed)


@step(0.5)
def _squeezed_scalar(g: Scope, x: Value) -> Value | None:
    if x.shape != (ROWS, 1):
        return None
    axis = either_sign(g, 1, 2)
    return replace(x, name=g.squeeze(x, axis), shape=(ROWS,))


@step(0.7, axis=0, ranks=(3,), dtypes=("f4", "f8"))
def _merged_behind(g: Scope, x: Value) -> Value | None:
    """Time first, time and rows as one axis, a layer, and back again: as recurrent networks are exported."""
    length, width, outputs = x.shape[1], x.shape[2], g.random.randint(1, 4)
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    flat = g.op("Reshape", turned, g.constant([-1, width]))
    made = g.op("Gemm", flat, g.weights(x.dtype, width, outputs), g.weights(x.dtype, outputs))
    shape = (
        g.constant([length, -1, outputs]) if g.chance(0.5) else g.shape_with_rows(x, [length, ROWS, outputs])
    )
    name = g.op("Transpose", g.op("Reshape", made, shape), perm=[1, 0, 2])
    return inexact(x, name, (ROWS, length, outputs))


@step(1, axis=0, ranks=(3,), dtypes=("f4",), since=14)
def _masked(g: Scope, x: Value) -> Value | None:
    """A causal mask as long as the rows are, computed from the shape."""
    if x.shape[1] != x.shape[2]:
        return None
    length = g.op("Gather", g.op("Shape", x), g.constant([1]), axis=0)
    square = g.op("ConstantOfShape", g.op("Concat", length, length, axis=0))
    mask = g.op("Trilu", g.op("Sub", square, g.constant(5, "f4")), g.constant(1), upper=1)
    return inexact(x, g.op("Softmax", g.op("Add", x, mask), axis=-1))


@step(0.3, dtypes=("f4",), others=True)
def _in_parts(g: Scope, x: Value) -> Value | None:
    axis = g.random.choice(x.others)
    parts = g.op("SplitToSequence", x, axis=axis, keepdims=1)
    if g.chance(0.5):
        name = g.op("SequenceAt", parts, g.constant(0))
        return replace(x, name=name, shape=x.sized(axis, 1))
    return replace(x, name=g.op("ConcatFromSequence", parts, axis=axis))


@step(0.7, least_rank=2, dtypes=("f4",))
def _of_the_runtime(g: Scope, x: Value) -> Value | None:
    """Operators of ONNX Runtime's own."""
    if x.shape[-1] == ROWS:
        return None
    domain, width = "com.microsoft", x.shape[-1]
    kind = g.random.choice(["Gelu", "QuickGelu", "BiasGelu", "FusedMatMul"])
    if kind == "BiasGelu":
        return inexact(x, g.op(kind, x, g.weights("f4", width), domain=domain))
    if kind == "FusedMatMul":
        more = {"transB": 1, "alpha": 0.5}
        return inexact(x, g.op(kind, x, g.weights("f4", 3, width), domain=domain, **more), (*x.shape[:-1], 3))
    return inexact(x, g.op(kind, x, domain=domain))


@step(1.5, axis=0, least_rank=2, dtypes=("f4", "f8"))
def _scaled_by_row(g: Scope, x: Value) -> Value | None:
    """One number for each row, broadcast over it."""
    found = [v for v in g.values if v.shape == (ROWS,) and v.dtype == x.dtype]
    if not found:
        return None
    factor = g.random.choice(found)
    column = g.unsqueeze(factor, *range(1, x.rank))
    return replace(x, name=g.op("Mul", x, column), mixed=x.mixed or factor.mixed, exact=False)


# Local functions, loops and scans


def told_axis(g: Scope, x: Value, axis: int) -> Value | None:
    """A softmax in a local function that takes its axis as an attribute."""
    if g.constants_as_nodes:
        return None
    node = helper.make_node("Softmax", ["x"], ["y"])
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "axis", "axis", onnx.AttributeProto.INT
    name = f"Function{len(g.functions)}"
    imports = [helper.make_opsetid("", g.opset)]
    g.functions.append(helper.make_function(LOCAL, name, ["x"], ["y"], [node], imports, ["axis"]))
    return replace(x, name=g.op(name, x, domain=LOCAL, axis=axis), exact=False)


@step(0.7, dtypes=FLOATS, since=13, others=True)
def _told(g: Scope, x: Value) -> Value | None:
    return told_axis(g, x, g.random.choice(x.others))


@step(1, axis=0, ranks=(3,), dtypes=("f4",))
def _loop_over_time(g: Scope, x: Value) -> Value | None:
    """A recurrent network written as a loop: turn by turn one token of each row."""
    if g.depth:
        return None
    width, length = x.shape[2], x.shape[1]
    inner = g.inner()
    given = number, going, state = inner.turn(replace(x, shape=(ROWS, width)))
    still = inner.op("Identity", going)
    token = inner.op("Gather", x, number, axis=1)
    fed = inner.op("Add", token, inner.op("MatMul", state, inner.weights("f4", width, width)))
    body = inner.body(given, still, replace(state, name=inner.op("Tanh", fed)))
    turns = g.constant(length) if g.chance(0.5) else g.op("Gather", g.op("Shape", x), g.constant(1), axis=0)
    start = g.op("ConstantOfShape", g.shape_with_rows(x, [ROWS, width]))
    name = g.op("Loop", turns, g.constant(1, "?"), start, body=body)
    return replace(x, name=name, shape=(ROWS, width), exact=False)


@step(1, axis=0, ranks=(3,), dtypes=("f4",))
def _scan_over_time(g: Scope, x: Value) -> Value | None:
    """The same as a scan along axis 1."""
    if g.depth:
        return None
    width = x.shape[2]
    inner = g.inner()
    state, token = inner.fresh(), inner.fresh()
    after = inner.op("Add", inner.op("Tanh", state), token)
    made = inner.op("Identity", after)
    held = Value(state, "f4", (ROWS, width))
    inputs = [inner.info(held), inner.info(replace(held, name=token))]
    outputs = [inner.info(replace(held, name=after)), inner.info(replace(held, name=made))]
    body = inner.graph("body", inputs, outputs)
    start = g.op("ConstantOfShape", g.shape_with_rows(x, [ROWS, width]))
    more: dict[str, Any] = {"num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1]}
    last, whole = g.ops("Scan", start, x, outputs=2, body=body, **more)
    if g.chance(0.5):
        return replace(x, name=last, shape=(ROWS, width), exact=False)
    return replace(x, name=whole, exact=False)
