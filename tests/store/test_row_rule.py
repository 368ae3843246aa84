"""Which graphs are plainly row-independent, and which operator is named for the others."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from clockwork_serve.store.onnx.graph import interface_of
from clockwork_serve.store.onnx.row_rule import objection
from qa.cases.known import APART, DECLARED, EXAMPLES, MIXING, sixty
from tests.store.row_graphs import verdict

ROWS_APART = {
    "a classifier": """g (float[n,3] x) => (float[n,2] y) <float[3,2] w, float[2] b>
        { m = Gemm(x, w, b) r = Relu(m) y = Softmax<axis=-1>(r) }""",
    "heads by shapes of the input": """g (float[n,t,6] x) => (float[n,t,6] y)
        <int64[1] minus = {-1}, int64[1] two = {2}, int64[1] three = {3}, int64 zero = {0}, int64 one = {1},
         int64[1] axis = {0}, float[6,6] w>
        { q = MatMul(x, w) s = Shape(x) n0 = Gather(s, zero) t0 = Gather(s, one)
          n = Unsqueeze(n0, axis) t = Unsqueeze(t0, axis)
          split = Concat<axis=0>(n, t, two, three) h = Reshape(q, split) p = Transpose<perm=[0,2,1,3]>(h)
          k = Transpose<perm=[0,1,3,2]>(p) a = MatMul(p, k) b = Softmax<axis=-1>(a) c = MatMul(b, p)
          d = Transpose<perm=[0,2,1,3]>(c) join = Concat<axis=0>(n, t, minus) y = Reshape(d, join) }""",
    "the number of rows by a slice": """g (float[n,2,3] x) => (float[n,6] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] minus = {-1}>
        { s = Shape(x) n = Slice(s, zero, one, zero) t = Concat<axis=0>(n, minus) y = Reshape(x, t) }""",
    "a convolution": """g (float[n,3,8,8] x) => (float[n,m] y) <float[4,3,3,3] w>
        { c = Conv<kernel_shape=[3,3]>(x, w) p = MaxPool<kernel_shape=[2,2]>(c) g = GlobalAveragePool(p)
          y = Flatten(g) }""",
    "an embedding and a mask": """g (int64[n,t] ids, int64[n,t] mask) => (float[n,d] y)
        <float[9,4] table, float one = {1}, float big = {-10000}, int64[1] axis = {2}>
        { e = Gather(table, ids) f = Cast<to=1>(mask) m = Unsqueeze(f, axis) k = Mul(e, m)
          o = Sub(one, m) p = Mul(o, big) q = Add(k, p) y = ReduceMean<axes=[1], keepdims=0>(q) }""",
    "a function": """g (float[n,3] x) => (float[n,3] y) { y = own.Twice(x) }
        <domain: "own", opset_import: ["" : 17]> Twice (a) => (b) { c = Add(a, a) b = Softmax<axis=1>(c) }""",
    "rows with rows, by letters": """g (float[n,2,4] x, float[n,4,3] z) => (float[n,2,3] y)
        { y = Einsum<equation="bij,bjk->bik">(x, z) }""",
    "what mixes, and nobody reads": "g (float[n,3] x) => (float[n,3] y) { m = NonZero(x) y = Relu(x) }",
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS_APART)
def test_what_is_plainly_row_independent_is_found_to_be(kind):
    assert verdict(ROWS_APART[kind]) == ""


OBJECTIONS = {
    "If": """g (float[n,4] x) => (float[n,4] y) <bool c = {1}>
        { y = If(c) <then_branch = a () => (float[n,4] u) { u = Neg(x) },
                     else_branch = b () => (float[n,4] v) { v = Identity(x) }> }""",
    "LSTM": """g (float[n,1,6] x) => (float[n,1,1,2] y) <float[1,8,6] w, float[1,8,2] r>
        { y = LSTM<hidden_size=2>(x, w, r) }""",
    "EyeLike": "g (float[n,4] x) => (float[n,4] y) { y = EyeLike(x) }",
    "Unique": "g (int64[n] x) => (int64[n] y) { u, i, y, c = Unique(x) }",
    "DynamicQuantizeLinear": """g (float[n,4] x) => (float[n,4] y)
        { q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z) }""",
    "RandomUniformLike": "g (float[n,4] x) => (float[n,4] y) { r = RandomUniformLike(x) y = Add(x, r) }",
    "RandomNormal": "g (float[n,4] x) => (float[n,4] y) { r = RandomNormal<shape=[4]>() y = Add(x, r) }",
    "Dropout": """g (float[n,4] x) => (float[n,4] y) <float[4] c, float p = {0.5}, bool t = {1}>
        { r = Dropout(c, p, t) y = Add(x, r) }""",
    "Cast": """g (float[n,3] x) => (float[n,3] y) <int64 zero = {0}>
        { s = Shape(x) n = Gather(s, zero) f = Cast<to=1>(n) y = Add(x, f) }""",
    "Size": """g (float[n,3] x) => (float[n,3] y) { s = Size(x) f = Cast<to=1>(s) y = Add(x, f) }""",
    "Mul": """g (float[n,4] x) => (float[n,4] y) <int64[1] zero = {0}, int64[1] two = {2}>
        { s = Shape(x) n = Gather(s, zero) m = Mul(n, two) t = Concat<axis=0>(m, two) r = Reshape(x, t)
          y = Reshape(r, s) }""",
    "Range": """g (float[n,1] x) => (float[n,1] y) <int64 zero = {0}, int64 one = {1}, int64[1] a = {1}>
        { s = Shape(x) n = Gather(s, zero) r = Range(zero, n, one) f = Cast<to=1>(r) u = Unsqueeze(f, a)
          y = Sub(x, u) }""",
    "Expand": """g (float[n,3] x) => (float[n,3] y) <float[1,3] c>
        { s = Shape(x) e = Expand(c, s) y = Add(x, e) }""",
    "Inverse": "g (float[n,3,3] x) => (float[n,3,3] y) { y = com.microsoft.Inverse(x) }",
    "OneOfItsOwn": "g (float[n,3] x) => (float[n,3] y) { y = own.OneOfItsOwn(x) }",
    "Reshape": """g (float[n,t] x) => (float[n,t] y) <int64[2] part = {-1, 4}>
        { r = Reshape(x, part) s = Softmax<axis=1>(r) h = Shape(x) y = Reshape(s, h) }""",
    "MatMul": """g (int64[n] ids) => (float[n,4] y) <float[9,4] table>
        { e = Gather(table, ids) t = Identity(e) s = MatMul(e, t) y = Identity(s) }""",
    "Squeeze": "g (float[n,1] x) => (float[n] y) { y = Squeeze(x) }",
    "SequenceConstruct": """g (float[n,6] x) => (float[n,6] y) <int64 zero = {0}>
        { s = SequenceConstruct(x) t = Identity(s) y = SequenceAt(t, zero) }""",
}  # fmt: skip


@pytest.mark.parametrize("operator", OBJECTIONS)
def test_the_operator_that_is_in_the_way_is_named(operator):
    assert verdict(OBJECTIONS[operator]).startswith(f"{operator} ")


HIDDEN = {
    "a scan whose first state is the batch's mean": """g (float[n,3,4] x) => (float[n,3,4] y)
        { m = ReduceMean<axes=[0,1], keepdims=0>(x) last, y = Scan<num_scan_inputs=1, scan_input_axes=[1],
            scan_output_axes=[1], body = b (float[4] s, float[n,4] e) => (float[4] o, float[n,4] p)
            { p = Add(e, s) o = Sub(s, s) }>(m, x) }""",
    "a scan of one step": """g (float[n,1,4] x) => (float[n,4] y) <float[4] zero>
        { y, all = Scan<num_scan_inputs=1, scan_input_axes=[1],
            body = b (float[4] s, float[n,4] e) => (float[n,4] o, float[n,4] p)
            { m = ReduceMean<axes=[0]>(e) o = Sub(e, m) p = Identity(e) }>(zero, x) }""",
    "ones of a size that grows with the rows": """g (float[n,3] x) => (float[n,3] y)
        <int64[1] zero = {0}, int64[1] four = {4}, int64[1] five = {5}, int64[1] minus = {-1},
         int64[1] one = {1}>
        { s = Shape(x) n = Gather(s, zero) more = Greater(n, five) k = Cast<to=7>(more) f = Add(four, k)
          size = Mul(n, f) ones = ConstantOfShape(size) t = Concat<axis=0>(n, minus) r = Reshape(ones, t)
          u = ReduceSum(r, one) y = Add(x, u) }""",
    "a branch for long sequences": """g (float[n,t] x) => (float[n,t] y) <int64 one = {1}, int64 most = {50}>
        { s = Shape(x) t = Gather(s, one) c = Greater(t, most)
          y = If(c) <then_branch = a () => (float[n,t] u) { m = ReduceMean<axes=[0]>(x) u = Sub(x, m) },
                     else_branch = b () => (float[n,t] v) { v = Identity(x) }> }""",
    "a loop that branches on its step": """g (float[n,3] x) => (float[n,3] y)
        <int64 times = {9}, bool go = {1}, int64 seven = {7}>
        { y = Loop(times, go, x) <body = b (int64 i, bool c, float[n,3] h) => (bool d, float[n,3] k)
          { d = Identity(c) late = Greater(i, seven) m = ReduceMean<axes=[0]>(h) z = Sub(h, m)
            k = Where(late, z, h) }> }""",
    "a choice by a length": """g (float[n,t] x) => (float[n,t] y) <int64 one = {1}, int64 most = {50}>
        { s = Shape(x) t = Gather(s, one) c = Greater(t, most) m = ReduceMean<axes=[0]>(x) z = Sub(x, m)
          y = Where(c, z, x) }""",
    "sizes of some axes": """g (float[n,3,8] x) => (float[n,3,8] y) <int64[1] z = {8}>
        { y = Resize<axes=[0]>(x, , , z) }""",
    "a crop of the rows": """g (float[n,3,8] x) => (float[n,3,8] y)
        <float[6] roi = {0,0,0,0.5,1,1}, float[3] s = {1,1,1}>
        { y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, roi, s) }""",
    "an end as a number that wraps": """g (float[n,3] x) => (float[n,3] y)
        <int64[1] s = {0}, int64[1] e = {9223372036854775807}>
        { f = Cast<to=6>(e) h = Cast<to=7>(f) y = Slice(x, s, h, s) }""",
    "rows that a larger weight moves to axis 1": """g (float[n,4] x) => (float[1,n,4] y) <float[1,4,4] w>
        { y = MatMul(x, w) }""",
}  # fmt: skip


LATER = {"sizes of some axes"}  # which opset 17 does not have


@pytest.mark.parametrize("how", HIDDEN)
def test_what_mixes_rows_where_few_requests_show_it_is_not_batched(how):
    assert verdict(HIDDEN[how], opset=18 if how in LATER else 17)


def test_what_a_function_does_inside_is_looked_at():
    text = """g (float[n,3] x) => (float[n,3] y) { y = own.Centred(x) }
        <domain: "own", opset_import: ["" : OPSET]>
        Centred (a) => (b) { m = ReduceMean<axes=[0]>(a) b = Sub(a, m) }"""
    assert verdict(text.replace("OPSET", "17")).startswith("ReduceMean")
    assert "another opset" in verdict(text.replace("OPSET", "11"))


def test_a_function_that_has_the_name_of_an_operator_is_looked_at_too():
    text = """g (float[n,3] x) => (float[n,3] y) { y = ai.onnx.ml.Normalizer(x) }
        <domain: "ai.onnx.ml", opset_import: ["" : 17]>
        Normalizer (a) => (b) { b = Softmax<axis=0>(a) }"""
    assert verdict(text).startswith("Softmax")


def test_old_softmax_runs_over_all_axes_behind_its_own():
    text = "g (float[n,3,4] x) => (float[n,3,4] y) { y = Softmax(x) }"
    assert verdict(text, opset=11) == ""
    assert verdict(text.replace("(x)", "<axis=0>(x)"), opset=11)


def test_an_opset_that_broadcasts_in_its_own_way_is_not_followed():
    assert "opset is 6" in verdict("g (float[n,3] x) => (float[n,3] y) { y = Relu(x) }", opset=6)


def test_an_output_that_is_the_same_for_all_requests_has_no_rows():
    assert "output 'y'" in verdict("g (float[n] x) => (float[3] y) <float[3] c> { y = Identity(c) }")


def test_a_value_of_a_weight_decides_nothing_for_it_differs_between_copies():
    text = """g (float[n,16] x) => (float[n,16] y) <int64 last = {15}, float[16] w>
        { i = Cast<to=7>(w) v = Gather(i, last) z = Sub(v, last) y = CumSum(x, z) }"""
    assert "not constant" in verdict(text) or "cannot be followed" in verdict(text)


# ------------------------------------------------------------
# Which models are batched that declare nothing.

ZOO = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def for_any_batch(path: Path) -> onnx.ModelProto:
    """A net of the zoo, exported for one picture, as it is for any number of them."""
    model = onnx.load(path)
    given = {tensor.name: tensor for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        if value.name not in given:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in given:
            sizes = numpy_helper.to_array(given[node.input[1]]).tolist()
            if len(sizes) > 1:
                tensor = onnx.helper.make_tensor(
                    node.input[1], onnx.TensorProto.INT64, [len(sizes)], [0, *sizes[1:]]
                )
                given[node.input[1]].CopyFrom(tensor)
    return model


def test_all_nets_of_the_zoo_and_both_examples_are_batched_undeclared():
    nets = {path.stem: for_any_batch(path) for path in sorted(ZOO.glob("*.onnx"))}
    examples = {path.parts[-3]: onnx.load(path) for path in EXAMPLES.glob("*/*/model.onnx")}
    assert (len(nets), len(examples)) == (9, 2)
    found = {name: objection(model, interface_of(model)) for name, model in (nets | examples).items()}
    assert found == dict.fromkeys(found, "")


def test_the_known_graphs_that_are_batched_undeclared_are_these():
    cases = list(sixty())
    batched = {case.name for case in cases if not objection(case.model, interface_of(case.model))}
    assert batched == {*APART}
    assert (len(APART), len(DECLARED), len(MIXING)) == (16, 8, 36)
