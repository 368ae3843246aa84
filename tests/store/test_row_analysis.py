"""Which graphs the analysis proves to keep rows apart, and which operator it names for the others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clockwork_serve.store.onnx.graph import interface_of
from clockwork_serve.store.onnx.row_analysis import veto
from clockwork_serve.store.trial import Fill, GraphTensor, Interface

SIZES = (1, 2, 4, 8, 16)


def model_of(text: str, *, opset: int = 17) -> onnx.ModelProto:
    """A model from the text of its graph (and of functions after it); weights without values are ones."""
    imports = f'["" : {opset}, "com.microsoft" : 1, "own" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {imports}>\n{text}")
    made = {name for node in model.graph.node for name in node.output}
    for value in model.graph.value_info:
        if value.name not in made:
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            model.graph.initializer.append(numpy_helper.from_array(np.ones(dims, np.float32), value.name))
    return model


def verdict(text: str, *, opset: int = 17, free: int = 4) -> str:
    """The analysis of a model; dimensions that requests choose are ``free`` in its trial."""
    model = model_of(text, opset=opset)
    interface = interface_of(model)
    fills = [
        Fill(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=(1, *(dim if isinstance(dim, int) else free for dim in (tensor.dims or ())[1:])),
        )
        for tensor in interface.inputs
    ]
    return veto(model, interface, fills, SIZES)


APART = {
    "a classifier": """g (float[n,3] x) => (float[n,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}>
        { m = Gemm(x, w, b) r = Relu(m) y = Softmax<axis=-1>(r) }""",
    "heads by shapes of the input": """g (float[n,4,6] x) => (float[n,t,6] y)
        <int64[1] minus = {-1}, int64[1] two = {2}, int64[1] three = {3}, int64 zero = {0}, int64 one = {1},
         int64[1] axis = {0}, float[6,6] w>
        { q = MatMul(x, w) s = Shape(x) n0 = Gather(s, zero) t0 = Gather(s, one)
          n = Unsqueeze(n0, axis) t = Unsqueeze(t0, axis)
          split = Concat<axis=0>(n, t, two, three) h = Reshape(q, split) p = Transpose<perm=[0,2,1,3]>(h)
          k = Transpose<perm=[0,1,3,2]>(p) a = MatMul(p, k) b = Softmax<axis=-1>(a) c = MatMul(b, p)
          d = Transpose<perm=[0,2,1,3]>(c) join = Concat<axis=0>(n, t, minus) y = Reshape(d, join) }""",
    "rows merged with heads and taken out again": """g (float[n,4,6] x) => (float[n,t,6] y)
        <int64[3] flat = {4, -1, 3}, int64[3] back = {4, -1, 6}>
        { t = Transpose<perm=[1,0,2]>(x) f = Reshape(t, flat) u = Transpose<perm=[1,0,2]>(f)
          v = Transpose<perm=[0,2,1]>(u) s = MatMul(u, v) e = Softmax<axis=-1>(s) o = MatMul(e, u)
          p = Transpose<perm=[1,0,2]>(o) q = Reshape(p, back) y = Transpose<perm=[1,0,2]>(q) }""",
    "a convolution": """g (float[n,3,8,8] x) => (float[n,m] y) <float[4,3,3,3] w>
        { c = Conv<kernel_shape=[3,3]>(x, w) p = MaxPool<kernel_shape=[2,2]>(c) g = GlobalAveragePool(p)
          y = Flatten(g) }""",
    "an LSTM whose batch is axis 1": """g (float[n,5,6] x) => (float[n,h] y)
        <float[1,8,6] w, float[1,8,2] r, int64[1] a = {0}, int64 one = {1}, int64[1] d = {1},
         int64[1] hid = {2}>
        { t = Transpose<perm=[1,0,2]>(x) s = Shape(t) n0 = Gather(s, one) n = Unsqueeze(n0, a)
          shape = Concat<axis=0>(d, n, hid) zeros = ConstantOfShape(shape)
          o, h, c = LSTM<hidden_size=2>(t, w, r, , , zeros, zeros) y = Squeeze(h, a) }""",
    "an embedding and a mask": """g (int64[n,t] ids, int64[n,t] mask) => (float[n,d] y)
        <float[9,4] table, float one = {1}, float big = {-10000}, int64[1] axis = {2}>
        { e = Gather(table, ids) f = Cast<to=1>(mask) m = Unsqueeze(f, axis) k = Mul(e, m)
          o = Sub(one, m) p = Mul(o, big) q = Add(k, p) y = ReduceMean<axes=[1], keepdims=0>(q) }""",
    "a class token for every row": """g (float[n,4,6] x) => (float[n,t,6] y)
        <float[1,1,6] token, int64 zero = {0}, int64[1] axis = {0}, int64[2] rest = {1, 6}>
        { s = Shape(x) n0 = Gather(s, zero) n = Unsqueeze(n0, axis) shape = Concat<axis=0>(n, rest)
          e = Expand(token, shape) y = Concat<axis=1>(e, x) }""",
    "a branch on a size that is no batch": """g (float[n,1,6] x) => (float[n,6] y)
        <int64 one = {1}, int64[1] axis = {1}>
        { s = Shape(x) t = Gather(s, one) c = Equal(t, one)
          y = If(c) <then_branch = a () => (float[n,6] u) { u = Squeeze(x, axis) },
                     else_branch = b () => (float[n,1,6] v) { v = Identity(x) }> }""",
    "a loop of constant length": """g (float[n,3] x) => (float[n,3] y) <int64 times = {5}, bool go = {1}>
        { y = Loop(times, go, x) <body = b (int64 i, bool c, float[n,3] h) => (bool d, float[n,3] k)
          { d = Identity(c) k = Tanh(h) }> }""",
    "a scan along a sequence behind the rows": """g (float[n,5,3] x, float[n,3] h) => (float[n,3] y)
        { y = Scan<num_scan_inputs=1, scan_input_axes=[1],
                   body = b (float[n,3] s, float[n,3] e) => (float[n,3] o)
          { o = Add(s, e) }>(h, x) }""",
    "a function": """g (float[n,3] x) => (float[n,3] y) { y = own.Twice(x) }
        <domain: "own", opset_import: ["" : 17]> Twice (a) => (b) { c = Add(a, a) b = Softmax<axis=1>(c) }""",
    "scales of each row": """g (float[n,4] x) => (float[n,4] y)
        { m = ReduceMax<axes=[1]>(x) y = Div(x, m) }""",
    "indices that nobody reads": """g (float[n,1,4] x) => (float[n,1,3] y)
        { y, unused = MaxPool<kernel_shape=[2]>(x) }""",
    "parts of a sequence": """g (float[n,6] x) => (float[n,6] y) <int64 two = {2}, int64 one = {1}>
        { s = SplitToSequence<axis=1>(x, two) p = SequenceAt(s, one) t = SequenceConstruct(p, p, p)
          y = ConcatFromSequence<axis=1>(t) }""",
    "a sum by letters": """g (float[n,2,4] x, float[n,4,3] z) => (float[n,2,3] y)
        { y = Einsum<equation="bij,bjk->bik">(x, z) }""",
}  # fmt: skip


@pytest.mark.parametrize("kind", APART)
def test_rows_that_are_apart_are_proved_to_be(kind):
    assert verdict(APART[kind]) == ""


MIXED = {
    "CumSum": "g (float[n,3] x) => (float[n,3] y) <int64 a = {0}> { y = CumSum(x, a) }",
    "LSTM": """g (float[n,1,6] x) => (float[n,1,1,2] y) <float[1,8,6] w, float[1,8,2] r>
        { y = LSTM<hidden_size=2>(x, w, r) }""",
    "MaxPool": """g (float[n,1,4] x) => (float[n,1,3] y, int64[n,1,3] i)
        { y, i = MaxPool<kernel_shape=[2]>(x) }""",
    "Trilu": "g (float[n,4] x) => (float[n,4] y) { y = Trilu<upper=0>(x) }",
    "EyeLike": "g (float[n,4] x) => (float[n,4] y) { y = EyeLike(x) }",
    "Unique": """g (int64[n] x) => (int64[n] y)
        { u, i, y, c = Unique(x) }""",
    "DynamicQuantizeLinear": """g (float[n,4] x) => (float[n,4] y)
        { q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z) }""",
    "RandomUniformLike": "g (float[n,4] x) => (float[n,4] y) { r = RandomUniformLike(x) y = Add(x, r) }",
    "Bernoulli": "g (float[n,4] x) => (float[n,4] y) { y = Bernoulli(x) }",
    "Dropout": """g (float[n,4] x) => (float[n,4] y) <float p = {0.5}, bool t = {1}>
        { y = Dropout(x, p, t) }""",
    "If": """g (float[n,4] x, bool[n] c) => (float[n,4] y)
        { y = If(c) <then_branch = a () => (float[n,4] u) { u = Neg(x) },
                     else_branch = b () => (float[n,4] v) { v = Identity(x) }> }""",
    "Loop": """g (float[n,4] x, int64[n] t) => (float[n,4] y) <bool go = {1}>
        { y = Loop(t, go, x) <body = b (int64 i, bool c, float[n,4] h) => (bool d, float[n,4] k)
          { d = Identity(c) k = Neg(h) }> }""",
    "Scan": """g (float[n,3] x) => (float[n,3] y) <float[3] zero = {0,0,0}>
        { last, y = Scan<num_scan_inputs=1, body = b (float[3] s, float[3] e) => (float[3] o, float[3] p)
          { o = Add(s, e) p = Identity(o) }>(zero, x) }""",
    "GatherND": """g (float[n,3] x, int64[n,1] i) => (float[n,3] y) { y = GatherND(x, i) }""",
    "Gather": """g (float[n,3] x) => (float[n,3] y) <int64[1] zero = {0}>
        { f = Gather(x, zero) y = Sub(x, f) }""",
    "ScatterND": """g (float[n,3] x, int64[n,1] i) => (float[n,3] y) { y = ScatterND(x, i, x) }""",
    "ReduceMean": "g (float[n,3] x) => (float[n,3] y) { m = ReduceMean<axes=[0]>(x) y = Sub(x, m) }",
    "TopK": """g (float[n,3] x) => (float[k,3] y) <int64[1] k = {1}>
        { v, i = TopK<axis=0>(x, k) y = Add(x, v) }""",
    "ArgMax": "g (float[n,3] x) => (bool[n,3] y) { a = ArgMax<axis=0>(x) y = Equal(a, a) }",
    "MatMul": "g (float[n,3] x) => (float[n,n] y) { t = Transpose(x) y = MatMul(x, t) }",
    "Einsum": 'g (float[n,3] x) => (float[n,3] y) { s = Einsum<equation="ij->j">(x) y = Add(x, s) }',
    "BatchNormalization": """g (float[n,3] x) => (float[n,3] y)
        <float[3] s = {1,1,1}, float[3] b = {0,0,0}>
        { y, m, v = BatchNormalization<training_mode=1>(x, s, b, b, s) }""",
    "Reshape": """g (float[n,4] x) => (float[n,4] y) <int64[2] two = {2, -1}>
        { r = Reshape(x, two) s = Softmax<axis=1>(r) h = Shape(x) y = Reshape(s, h) }""",
    "ReverseSequence": """g (float[n,2,3] x) => (float[n,2,3] y) <int64[2] l = {1, 2}>
        { y = ReverseSequence<time_axis=0, batch_axis=1>(x, l) }""",
    "NonZero": "g (float[n,3] x) => (int64[2,m] y) { y = NonZero(x) }",
    "Compress": "g (float[n,3] x, bool[n] c) => (float[m,3] y) { y = Compress<axis=0>(x, c) }",
    "Add": """g (float[n,3] x) => (float[n,3] y) <int64 zero = {0}>
        { s = Shape(x) n = Gather(s, zero) f = Cast<to=1>(n) y = Add(x, f) }""",
    "Sub": """g (float[n,1] x) => (float[n,1] y) <int64 zero = {0}, int64 one = {1}, int64[1] a = {1}>
        { s = Shape(x) n = Gather(s, zero) r = Range(zero, n, one) f = Cast<to=1>(r) u = Unsqueeze(f, a)
          y = Sub(x, u) }""",
    "Slice": """g (float[n,4] x) => (float[n,4] y)
        <int64[1] zero = {0}, int64[1] one = {1}>
        { f = Slice(x, zero, one, zero) y = Mul(x, f) }""",
    "SplitToSequence": """g (float[n,6] x) => (float[n,6] y) <int64 zero = {0}, int64[1] a = {0}>
        { s = SplitToSequence<axis=0>(x) f = SequenceAt(s, zero) y = Sub(x, f) }""",
    "Inverse": "g (float[n,3] x) => (float[n,3] y) { y = com.microsoft.Inverse(x) }",
    "OneOfItsOwn": "g (float[n,3] x) => (float[n,3] y) { y = own.OneOfItsOwn(x) }",
}  # fmt: skip


@pytest.mark.parametrize("operator", MIXED)
def test_what_may_mix_rows_is_vetoed_and_its_operator_is_named(operator):
    assert operator in verdict(MIXED[operator]).split(" ")[0]


def test_what_a_function_does_inside_is_looked_at():
    text = """g (float[n,3] x) => (float[n,3] y) { y = own.Centred(x) }
        <domain: "own", opset_import: ["" : 17]>
        Centred (a) => (b) { m = ReduceMean<axes=[0]>(a) b = Sub(a, m) }"""
    assert verdict(text).startswith("ReduceMean")


def test_a_branch_that_reads_a_mixed_value_of_the_graph_around_it_is_vetoed():
    text = """g (float[n,3] x) => (float[n,3] y) <bool yes = {1}>
        { m = ReduceMean<axes=[0]>(x)
          y = If(yes) <then_branch = a () => (float[n,3] u) { u = Sub(x, m) },
                       else_branch = b () => (float[n,3] v) { v = Identity(x) }> }"""
    assert verdict(text).startswith("ReduceMean")


def test_a_causal_network_on_one_sequence_is_no_batch_of_tokens():
    text = """g (int64[seq] ids) => (float[seq,4] y) <float[9,4] table, float big = {-10000}>
        { e = Gather(table, ids) t = Transpose(e) s = MatMul(e, t) w = Softmax<axis=-1>(s)
          y = MatMul(w, e) }"""
    assert verdict(text).startswith("MatMul")


def test_old_softmax_runs_over_all_axes_behind_its_own():
    text = "g (float[n,3,4] x) => (float[n,3,4] y) { y = Softmax<axis=AXIS>(x) }"
    assert verdict(text.replace("AXIS", "1"), opset=11) == ""
    assert verdict(text.replace("AXIS", "0"), opset=11).startswith("Softmax")


def test_a_sequence_does_not_hide_where_its_rows_are():
    text = """g (float[n,6] x) => (float[n,6] y) <int64 zero = {0}, float[6] w = {1,2,3,4,5,6}>
        { s = SequenceConstruct(x) t = Identity(s) f = SequenceAt(t, zero) m = ReduceMean<axes=[0]>(f)
          y = Add(x, m) }"""
    assert verdict(text).startswith("Identity")


def test_loops_in_loops_without_end_are_given_up():
    inner = "k = Tanh(h)"
    for depth in range(4):
        inner = (
            f"k = Loop(times, go, h) <body = b{depth} (int64 i, bool c, float[n,3] h)"
            f" => (bool d, float[n,3] k) {{ d = Identity(c) {inner} }}>"
        )
    text = f"""g (float[n,3] h) => (float[n,3] k) <int64 times = {{60}}, bool go = {{1}}> {{ {inner} }}"""
    assert "steps" in verdict(text)


def test_what_nobody_reads_is_no_obstacle():
    assert verdict("g (float[n,3] x) => (float[n,3] y) { m = NonZero(x) y = Relu(x) }") == ""


def test_a_reshape_that_fits_the_sizes_of_a_trial_by_chance_is_seen_through():
    text = """g (float[n,t] x) => (float[n,t] y) <int64[2] part = {-1, 4}>
        { r = Reshape(x, part) s = Softmax<axis=1>(r) h = Shape(x) y = Reshape(s, h) }"""
    assert verdict(text, free=4).startswith("Reshape")


def test_weights_have_no_say_in_what_holds_for_all_copies():
    model = model_of(
        "g (float[n,16] x) => (float[n,k] y) <int64 last = {15}, float[16] w>"
        "{ i = Cast<to=7>(w) v = Gather(i, last) z = Sub(v, last) a = CumSum(x, z) y = Relu(a) }"
    )
    interface = Interface((GraphTensor("x", "FP32", ("n", 16)),), (GraphTensor("y", "FP32", ("n", 16)),))
    fills = [Fill(name="x", datatype="FP32", shape=(1, 16))]
    assert "not constant" in veto(model, interface, fills, SIZES)


@pytest.mark.parametrize(
    "moved",
    [
        "u = Unsqueeze(x, a) y = Gather(u, i)",
        "u = Unsqueeze(x, a) t = Concat<axis=0>(u, u) b, c = Split<axis=0>(t) y = Squeeze(b, a)",
    ],
)
def test_strings_that_a_kernel_copies_one_of_each_block_are_not_trusted_with_rows(moved):
    assert "strings" in verdict(
        f"g (string[n] x) => (string[n] y) <int64 i = {{0}}, int64[1] a = {{0}}> {{ {moved} }}"
    )


def test_strings_whose_blocks_lie_within_a_row_are_like_any_other():
    assert not verdict("g (string[n,3,2] x) => (string[n,2] y) <int64 i = {1}> { y = Gather<axis=1>(x, i) }")
