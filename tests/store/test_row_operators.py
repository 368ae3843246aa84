"""Every operator on the list, where it keeps rows apart; and its twin with what makes it mix them."""

from __future__ import annotations

import pytest

from benchmarks.rows.judge import Refused, judge, session_of
from clockwork_serve.store.onnx.row_operators import RULES
from tests.store.row_graphs import model_of, verdict

ONE = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf",
    "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Neg", "Reciprocal", "Relu",
    "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan",
    "Tanh", "ThresholdedRelu", "Mish",
)  # fmt: skip
"""Elementwise in one float, which nothing makes mix."""
TWO = ("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum")
COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
REDUCED = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSumSquare",
)  # fmt: skip


def of(body: str, x: str = "float[n,3,4]", y: str = "float", weights: str = "") -> str:
    """A graph of one input."""
    return f"g ({x} x) => ({y}[] y) {f'<{weights}>' if weights else ''} {{ {body} }}"


def two(op: str, y: str = "float", dtype: str = "float") -> tuple[str, str]:
    """With a constant for all rows, and with one for each of five."""
    body = f"y = {op}(x, c)"
    return tuple(of(body, f"{dtype}[n,4]", y, f"{dtype}[{c}] c") for c in ("4", "5,4"))


def along(op: str, apart: str = "axis=1", mixing: str = "axis=0", **more) -> tuple[str, str]:
    """With an attribute that keeps rows apart, and one that mixes them."""
    return of(f"y = {op}<{apart}>(x)", **more), of(f"y = {op}<{mixing}>(x)", **more)


def given(op: str, apart: str, mixing: str, *, rest: str = "", x: str = "float[n,3,4]", y: str = "float"):
    """The same with a constant input."""
    body = f"y = {op}(x, c{rest})"
    return of(body, x, y, apart), of(body, x, y, mixing)


ROW_AXIS, OTHER_AXIS = "int64[1] c = {0}", "int64[1] c = {1}"
TABLE = "float[n,3]"
FEATURES = "coefficients=[1.0, 2.0, 3.0], intercepts=[0.0]"
TREE = (
    'nodes_treeids=[0], nodes_nodeids=[0], nodes_featureids=[0], nodes_values=[0.0], nodes_modes=["LEAF"], '
    "nodes_truenodeids=[0], nodes_falsenodeids=[0], "
)
REGRESSOR = TREE + "n_targets=1, target_treeids=[0], target_nodeids=[0], target_ids=[0], target_weights=[1.0]"
CLASSIFIER = (
    TREE
    + "classlabels_int64s=[0,1], class_treeids=[0], class_nodeids=[0], class_ids=[0], class_weights=[1.0]"
)
SVM = 'kernel_type="LINEAR", kernel_params=[1.0, 0.0, 1.0], coefficients=[1.0, 2.0, 3.0], rho=[0.0]'


def features(op: str, attributes: str, y: str = "float") -> tuple[str, str]:
    """Of a table of features; and of one row of them, which has as many as there are requests."""
    body = f"y = ai.onnx.ml.{op}<{attributes}>(x)"
    if y == "int64":
        body = body.replace("y =", "y, scores =")
    return of(body, TABLE, y), of(body, "float[n]", y)


TWINS: dict[str, tuple[str, ...]] = {
    **{op: (of(f"y = {op}(x)"),) for op in ONE},
    **{op: two(op) for op in TWO},
    **{op: two(op, "bool") for op in COMPARED},
    **{op: two(op, "bool", "bool") for op in ("And", "Or", "Xor")},
    **{op: two(op, "int64", "int64") for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod")},
    **{op: along(op, "axes=[1]", "axes=[0]") for op in REDUCED},
    **{op: along(op) for op in ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")},
    **{op: along(op, y="int64") for op in ("ArgMax", "ArgMin")},
    **{op: given(op, OTHER_AXIS, ROW_AXIS) for op in ("CumSum", "ReduceSum")},
    **{op: tuple(of(f"y = {op}<kernel_shape=[2]>(x)", x) for x in ("float[n,3,4]", "float[n,4]"))
       for op in ("AveragePool", "LpPool")},
    "MaxPool": (of("y = MaxPool<kernel_shape=[2]>(x)"), of("p, y = MaxPool<kernel_shape=[2]>(x)", y="int64")),
    **{op: (of(f"y = {op}(x)"), of(f"y = {op}(x)", "float[n,3]")) for op in (
        "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool")},
    "BitShift": (of('y = BitShift<direction="LEFT">(x, x)', "uint8[n,3]", "uint8"),),
    "BitwiseNot": (of("y = BitwiseNot(x)", "int64[n,3]", "int64"),),
    "Not": (of("y = Not(x)", "bool[n,3]", "bool"),),
    "IsInf": (of("y = IsInf(x)", y="bool"),),
    "IsNaN": (of("y = IsNaN(x)", y="bool"),),
    "Cast": (of("y = Cast<to=7>(x)", y="int64"),),
    "Gelu": (of("y = Gelu(x)"),),
    "Where": (of("y = Where(c, x, x)", weights="bool[4] c"),
              of("y = Where(c, x, x)", weights="bool[5,1,1] c")),
    "Binarizer": (of("y = ai.onnx.ml.Binarizer<threshold=0.5>(x)"),),
    "LabelEncoder": (
        of("y = ai.onnx.ml.LabelEncoder<keys_int64s=[0,1], values_int64s=[5,6]>(x)", "int64[n]", "int64"),),
    "CastLike": (of("y = CastLike(x, c)", y="int64", weights="int64 c"),
                 of("y = CastLike(c, x)", weights="int64[5] c")),
    "Clip": (of("y = Clip(x, c)", weights="float c"),
             "g (float[n] x, float[n] z) => (float[] y) { y = Clip(x, z) }"),
    "Dropout": (of("y = Dropout(x)"), of("y = Dropout(x, r, c)", weights="float r, bool c")),
    "Concat": (of("y = Concat<axis=1>(x, x)"), of("y = Concat<axis=0>(x, x)")),
    "Einsum": along("Einsum", 'equation="nij->ni"', 'equation="nij->ij"'),
    "Flatten": along("Flatten", "axis=1", "axis=0"),
    "Gather": tuple(of(f"y = Gather<axis={axis}>(x, c)", weights="int64[1] c = {0}") for axis in (1, 0)),
    "Gemm": (of("y = Gemm(x, c)", "float[n,4]", weights="float[4,2] c"),
             of("y = Gemm<transA=1>(x, c)", "float[n,4]", weights="float[5,2] c")),
    "MatMul": (of("y = MatMul(x, c)", weights="float[4,2] c"),
               of("y = MatMul(c, x)", "float[n,4]", weights="float[2,5] c")),
    "MatMulInteger": (
        of("y = MatMulInteger(x, c, z)", "uint8[n,4]", "int32", "uint8[4,2] c, uint8 z"),
        of("y = MatMulInteger(x, c, z)", "uint8[n,4]", "int32", "uint8[4,2] c, uint8[5] z")),
    "QLinearMatMul": (
        of("y = QLinearMatMul(x, s, z, c, s, z, s, z)", "uint8[n,4]", "uint8",
           "float s, uint8 z, uint8[4,2] c"),
        of("y = QLinearMatMul(x, t, u, c, s, z, s, z)", "uint8[n,4]", "uint8",
           "float s, uint8 z, uint8[4,2] c, float[5] t, uint8[5] u")),
    "QuantizeLinear": (
        of("y = QuantizeLinear(x, s, z)", y="uint8", weights="float[3] s, uint8[3] z"),
        of("y = QuantizeLinear<axis=0>(x, s, z)", y="uint8", weights="float[5] s, uint8[5] z")),
    "DequantizeLinear": (
        of("y = DequantizeLinear(x, s)", "int8[n,3,4]", weights="float s"),
        of("y = DequantizeLinear<axis=0>(x, s)", "int8[n,3,4]", weights="float[5] s")),
    "LayerNormalization": (
        of("y = LayerNormalization(x, c)", weights="float[4] c"),
        of("y = LayerNormalization<axis=0>(x, c)", weights="float[5,3,4] c")),
    "MeanVarianceNormalization": along("MeanVarianceNormalization", "axes=[1,2]", "axes=[0,2]"),
    "BatchNormalization": (
        of("y = BatchNormalization(x, c, c, c, c)", weights="float[3] c"),
        of("y, m, v = BatchNormalization<training_mode=1>(x, c, c, c, c)", weights="float[3] c")),
    "InstanceNormalization": (
        of("y = InstanceNormalization(x, c, c)", weights="float[3] c"),
        of("y = InstanceNormalization(x, c, c)", "float[n,4]", weights="float[4] c")),
    "GroupNormalization": (
        of("y = GroupNormalization<num_groups=3>(x, c, c)", weights="float[3] c"),
        of("y = GroupNormalization<num_groups=1>(x, c, c)", "float[n,4]", weights="float[4] c")),
    "LRN": (of("y = LRN<size=3>(x)", "float[n,3,4,4]"), of("y = LRN<size=3>(x)", "float[n]")),
    "Conv": (of("y = Conv(x, c)", weights="float[2,3,2] c"), of("y = Conv(c, x)", weights="float[5,3,4] c")),
    "ConvInteger": (of("y = ConvInteger(x, c)", "uint8[n,3,4]", "int32", "uint8[2,3,2] c"),
                    of("y = ConvInteger(c, x)", "uint8[n,3,4]", "int32", "uint8[5,3,4] c")),
    "ConvTranspose": (of("y = ConvTranspose(x, c)", weights="float[3,2,2] c"),
                      of("y = ConvTranspose(c, x)", weights="float[5,3,4] c")),
    "QLinearConv": (
        of("y = QLinearConv(x, s, z, c, s, z, s, z)", "uint8[n,3,4]", "uint8",
           "float s, uint8 z, uint8[2,3,2] c"),
        of("y = QLinearConv(c, s, z, x, s, z, s, z)", "uint8[n,3,4]", "uint8",
           "float s, uint8 z, uint8[2,3,4] c")),
    "DepthToSpace": (of("y = DepthToSpace<blocksize=2>(x)", "float[n,4,2,2]"),
                     of("y = DepthToSpace<blocksize=2>(x)", "float[n,4]")),
    "SpaceToDepth": (of("y = SpaceToDepth<blocksize=2>(x)", "float[n,1,2,2]"),
                     of("y = SpaceToDepth<blocksize=2>(x)", "float[n,4]")),
    "OneHot": (of("y = OneHot(x, d, v)", "int64[n,3]", "float", "int64 d = {4}, float[2] v"),
               of("y = OneHot<axis=0>(x, d, v)", "int64[n,3]", "float", "int64 d = {4}, float[2] v")),
    "Pad": given("Pad", "int64[4] c = {0,1,0,1}", "int64[4] c = {1,0,0,0}", x="float[n,3]"),
    "Reshape": given("Reshape", "int64[2] c = {-1,12}", "int64[2] c = {-1,6}"),
    "Resize": (of("y = Resize(x, , c)", weights="float[3] c = {1,1,2}"),
               of("y = Resize(x, , c)", weights="float[3] c = {2,1,1}")),
    "Upsample": (of("y = Upsample(x, c)", weights="float[3] c = {1,1,2}"),
                 of("y = Upsample(x, c)", weights="float[3] c = {2,1,1}")),
    "Slice": given("Slice", "int64[1] c = {0}, int64[1] d = {9223372036854775807}, int64[1] a = {0}",
                   "int64[1] c = {0}, int64[1] d = {11}, int64[1] a = {0}", rest=", d, a"),
    "Split": along("Split", "axis=1", "axis=0", x="float[n,1,4]"),
    "Squeeze": given("Squeeze", OTHER_AXIS, ROW_AXIS, x="float[n,1,4]"),
    "Unsqueeze": given("Unsqueeze", OTHER_AXIS, ROW_AXIS),
    "TopK": (of("y, i = TopK<axis=1>(x, k)", weights="int64[1] k = {2}"),
             of("y, i = TopK<axis=0>(x, k)", weights="int64[1] k = {2}")),
    "Transpose": along("Transpose", "perm=[0,2,1]", "perm=[1,0,2]"),
    "Trilu": (of("y = Trilu(x)"), of("y = Trilu(x)", "float[n,4]")),
    "Imputer": features("Imputer", "imputed_value_floats=[1.0]"),
    "Normalizer": features("Normalizer", 'norm="L2"'),
    "Scaler": features("Scaler", "offset=[1.0], scale=[2.0]"),
    "LinearRegressor": features("LinearRegressor", FEATURES),
    "LinearClassifier": features("LinearClassifier", FEATURES + ", classlabels_ints=[0,1]", "int64"),
    "SVMRegressor": features("SVMRegressor", SVM),
    "SVMClassifier": features("SVMClassifier", SVM + ", classlabels_ints=[0,1]", "int64"),
    "TfIdfVectorizer": tuple(
        of('y = TfIdfVectorizer<mode="TF", min_gram_length=1, max_gram_length=1, max_skip_count=0, '
           "ngram_counts=[0], ngram_indexes=[0], pool_int64s=[1]>(x)", x)
        for x in ("int64[n,3]", "int64[n]")),
    "TreeEnsembleRegressor": features("TreeEnsembleRegressor", REGRESSOR),
    "TreeEnsembleClassifier": features("TreeEnsembleClassifier", CLASSIFIER, "int64"),
}  # fmt: skip
LATER = {
    "GroupNormalization": 21, "Gelu": 20, "BitwiseAnd": 18, "BitwiseNot": 18, "BitwiseOr": 18,
    "BitwiseXor": 18, "Mish": 18, "Upsample": 9,
}  # fmt: skip
"""Operators that opset 17 does not have, or no more."""


def test_every_operator_on_the_list_has_a_line_in_the_table():
    assert TWINS.keys() == RULES.keys()


@pytest.mark.parametrize("op", sorted(TWINS))
def test_an_operator_is_told_from_its_twin_that_mixes(op):
    apart, *mixing = TWINS[op]
    opset = LATER.get(op, 17)
    assert verdict(apart, opset=opset) == ""
    for text in mixing:
        assert op in verdict(text, opset=opset)


@pytest.mark.parametrize("op", sorted(TWINS))
def test_plain_onnx_runtime_agrees_that_it_keeps_rows_apart(op):
    model = model_of(TWINS[op][0], opset=LATER.get(op, 17))
    try:
        assert judge(session_of(model.SerializeToString())).mixes == ""
    except Refused as error:
        pytest.skip(f"this ONNX Runtime does not run it: {error}")
