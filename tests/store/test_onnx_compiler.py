"""Lifted models answer as ordinary sessions do; what cannot be lifted or batched is served all the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from clockwork_serve.messages import OnnxIndex, TensorSpec
from clockwork_serve.store import Compiler
from clockwork_serve.store.optimiser import Optimiser
from clockwork_serve.store.trial import difference
from clockwork_serve.units import KIB, TENSOR_ALIGN
from tests.store import graphs


def rows(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "row", "tolerance"),
    [
        (graphs.convnet, (3, 8, 8), 1e-5),
        (graphs.normalised, (3, 8, 8), 1e-5),
        (graphs.mlp, (8,), 1e-5),
        (graphs.constants_as_nodes, (8,), 1e-5),
        (graphs.quantised, (8,), 1e-5),
        (graphs.recurrent, (5, 6), 5e-4),
    ],
)
def test_lifted_answers_equal_an_ordinary_session_at_every_batch_size(shop, make, row, tolerance):
    model = make()
    served = shop.served("m", model, toml="max_batch_size = 16")
    assert served.code.lifted
    assert served.code.batched
    assert served.code.batch_sizes == (1, 2, 4, 8, 16)
    for size in served.code.batch_sizes:
        x = rows(size, *row, seed=size)
        assert difference(shop.run(served, {"x": x}), graphs.answers(model, {"x": x})) <= tolerance


def operators(served) -> set[str]:
    return {node.op_type for node in onnx.load(f"{served.code.path}/model.onnx").graph.node}


def test_copies_of_products_rewritten_as_convolutions_share_a_code(shop):
    models = {name: graphs.dense(seed) for seed, name in enumerate("abc")}
    for name, model in models.items():
        shop.add(name, model)
    served, _ = shop.compile()
    assert len({each.code.code_id for each in served.values()}) == 1
    rewritten = "ReorderInput" in operators(served["a/1"])
    assert rewritten == bool(shop.compiler.optimiser.block)
    for name, model in models.items():
        for size in (1, 5, 16):
            x = rows(size, 400, seed=size)
            got = shop.run(served[f"{name}/1"], {"x": x})
            assert difference(got, graphs.answers(model, {"x": x})) <= 1e-5


class WrongBlock(Optimiser):
    """Takes this CPU for one with another layout."""

    def __init__(self):
        super().__init__()
        self.block = 24 - self.block if self.block else 8


def test_products_are_left_as_they_are_if_rewriting_them_changes_answers_and_copies_follow(shop):
    shop.compiler = Compiler(shop.cache, shop.config, WrongBlock())
    models = {name: graphs.dense(seed) for seed, name in enumerate("abc")}
    for name, model in models.items():
        shop.add(name, model)
    served, _ = shop.compile()
    x = rows(3, 400)
    for name, model in models.items():
        each = served[f"{name}/1"]
        assert each.code.lifted
        assert "ReorderInput" not in operators(each)
        assert difference(shop.run(each, {"x": x}), graphs.answers(model, {"x": x})) <= 1e-5
    assert len({each.code.code_id for each in served.values()}) == 1


def test_every_float_weight_is_in_the_blob_on_an_aligned_place_and_none_in_the_code(shop):
    served = shop.served("m", graphs.convnet())
    folder = served.code.path
    index = msgspec.json.decode(Path(folder, "index.json").read_bytes(), type=OnnxIndex)
    assert all(tensor.offset % TENSOR_ALIGN == 0 for tensor in index.tensors)
    ends = [tensor.offset + tensor.nbytes for tensor in index.tensors]
    assert all(end <= other.offset for end, other in zip(ends, index.tensors[1:], strict=False))
    assert {tensor.dtype for tensor in index.tensors} == {"float32"}
    graph = onnx.load(f"{folder}/model.onnx").graph
    assert not [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert [value.name for value in graph.input[1:]] == [tensor.name for tensor in index.tensors]


def test_only_float32_is_lifted_out_of_a_quantised_model(shop):
    served = shop.served("m", graphs.quantised())
    index = msgspec.json.decode(Path(served.code.path, "index.json").read_bytes(), type=OnnxIndex)
    assert [tensor.shape for tensor in index.tensors] == [(32,)]
    graph = onnx.load(f"{served.code.path}/model.onnx").graph
    kept = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    assert "INT8" in kept


def test_copies_of_a_quantised_model_share_a_code_only_if_their_integers_are_equal(shop):
    shop.add("a", graphs.quantised(seed=1))
    shop.add("b", graphs.quantised(seed=2))
    shop.add("c", graphs.quantised(seed=1, weights_seed=3))
    served, _ = shop.compile()
    assert served["a/1"].code == served["b/1"].code
    assert served["a/1"].code.code_id != served["c/1"].code.code_id


def test_large_integer_weights_that_stay_in_the_code_are_said_so(shop):
    served = shop.served("m", graphs.quantised(inputs=40_000))
    assert any("only float32 is lifted" in warning for warning in served.model.warnings)


def test_each_copy_is_optimised_once_and_answers_with_its_own_weights(shop):
    for number in range(6):
        shop.add(f"m{number}", graphs.convnet(number))
    served, problems = shop.compile()
    assert not problems
    assert shop.compiler.optimiser.runs == 6
    assert len({each.code.code_id for each in served.values()}) == 1
    assert len({each.model.weights.weights_id for each in served.values()}) == 6
    x = rows(2, 3, 8, 8)
    for number in range(6):
        wanted = graphs.answers(graphs.convnet(number), {"x": x})
        assert difference(shop.run(served[f"m{number}/1"], {"x": x}), wanted) <= 1e-5


def test_copies_whose_rows_mix_are_optimised_once_too(shop):
    for number in range(3):
        copy = hidden()
        copy.producer_name = f"copy {number}"
        shop.add(f"m{number}", copy)
    served, _ = shop.compile()
    assert [each.model.max_batch_size for each in served.values()] == [0, 0, 0]
    assert shop.compiler.optimiser.runs == 3


def test_whether_rows_mix_is_determined_once_for_equal_graphs(shop):
    for number in range(4):
        shop.add(f"m{number}", graphs.convnet(number))
    shop.compile()
    assert len(list(shop.cache.root.glob("architectures/*"))) == 1


COMPUTED = {
    "clamped": graphs.clamped_weights, "pruned": graphs.pruned_weights, "bounded": graphs.bounded_factors,
    "normalised": graphs.normalised, "rectified": graphs.rectified_weights,
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPUTED)
def test_copies_whose_graph_computes_with_its_weights_answer_as_plain_sessions_do(shop, kind):
    """Weights of the third and the fourth copy lie beyond the bounds that those of the others keep."""
    make = COMPUTED[kind]
    models = {f"m{number}": make(number) for number in range(4)}
    for number in (2, 3):
        change_weights(models[f"m{number}"], lambda flat: np.where(np.arange(flat.size) % 3, flat, 20 * flat))
    served_as_plain_sessions_do(shop, models, (3, 8, 8) if kind == "normalised" else (16,))


MAGNITUDES = (0.0, *(sign * 10.0**power for power in range(-30, 31, 10) for sign in (1, -1)), 1e-42)


@pytest.mark.parametrize("kind", ["clamped", "pruned", "bounded"])
def test_weights_of_any_magnitude_and_sign_answer_as_plain_sessions_do(shop, kind):
    models = {}
    for number, least in enumerate((1.0, -1.0, *MAGNITUDES)):
        model = models[f"m{number:02d}"] = COMPUTED[kind](number)
        change_weights(model, lambda flat, least=least: flat * np.float32(least))
    mixed = models["mixed"] = COMPUTED[kind](99)
    change_weights(mixed, lambda flat: np.resize(np.array(MAGNITUDES, np.float32), flat.size))
    served_as_plain_sessions_do(shop, models, (16,))


def change_weights(model, change) -> None:
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    values = onnx.numpy_helper.to_array(weight)
    weight.raw_data = change(values.ravel()).astype(np.float32).tobytes()


def served_as_plain_sessions_do(shop, models, row) -> None:
    for name, model in models.items():
        shop.add(name, model)
    served, problems = shop.compile()
    assert not problems
    x = rows(3, *row)
    for name, model in models.items():
        each = served[f"{name}/1"]
        assert each.code.lifted
        assert difference(shop.run(each, {"x": x}), graphs.answers(model, {"x": x})) <= 1e-5, name
    assert len({each.code.code_id for each in served.values()}) == 1


def test_equal_graphs_share_a_code_whoever_exported_them_and_whatever_they_named(shop):
    shop.add("a", graphs.mlp(1))
    other = graphs.mlp(2, prefix="torch::", batch="batch_size")
    other.producer_name, other.doc_string, other.graph.name = "another", "words", "main_graph"
    shop.add("b", other)
    served, _ = shop.compile()
    assert served["a/1"].code == served["b/1"].code
    x = rows(3, 8)
    assert difference(shop.run(served["b/1"], {"x": x}), graphs.answers(other, {"x": x})) <= 1e-5


def test_equal_weights_are_stored_once(shop):
    shop.add("a", graphs.mlp(1))
    shop.add("b", graphs.mlp(1, prefix="other_"))
    served, _ = shop.compile()
    assert served["a/1"].model.weights == served["b/1"].model.weights
    assert len(list(shop.cache.root.glob("weights/*/*.bin"))) == 1


def test_a_state_with_its_batch_on_axis_one_is_served_one_by_one_and_the_warning_says_why(shop):
    model = graphs.batch_on_axis_one()
    served = shop.served("m", model)
    assert served.model.max_batch_size == 0
    assert not served.code.batched
    assert served.code.batch_sizes == (1,)
    assert [spec.shape for spec in served.code.inputs] == [(-1, 8), (2, -1, 16)]
    assert (
        "axis 0 of input 'state' is fixed to 2 and its batch dimension 'N' is axis 1"
        in served.model.warnings[0]
    )
    inputs = {"x": rows(1, 8), "state": rows(2, 1, 16)}
    assert difference(shop.run(served, inputs), graphs.answers(model, inputs)) <= 1e-5


def test_weights_of_branches_are_lifted_and_both_branches_answer_as_before(shop):
    model = graphs.scalar_input()
    served = shop.served("m", model)
    assert served.code.lifted
    assert served.model.weights.size == 2 * 8 * 16 * 4
    for rate in (16000, 8000):
        inputs = {"x": rows(1, 8), "rate": np.array(rate, np.int64)}
        assert difference(shop.run(served, inputs), graphs.answers(model, inputs)) <= 1e-5


def test_a_fixed_batch_is_served_as_full_shapes(shop):
    served = shop.served("m", graphs.mlp(batch=1), toml="max_batch_size = 8")
    assert served.model.max_batch_size == 0
    assert served.code.inputs[0].shape == (1, 8)
    assert "max_batch_size 8 was asked for, but axis 0 of input 'x' is fixed to 1" in served.model.warnings[0]


def test_rows_that_read_each_other_are_not_batched(shop):
    served = shop.served("m", graphs.mixing_rows(), toml="max_batch_size = 16")
    assert served.model.max_batch_size == 0
    assert "depends on the rows beside it (output 'y': row 0 of 2" in served.model.warnings[0]


def test_no_setting_enforces_a_batch_where_a_trial_showed_that_rows_mix(shop):
    served = shop.served("m", graphs.quantised(dynamic=True), toml="max_batch_size = 4")
    assert served.model.max_batch_size == 0
    (warning, *_) = served.model.warnings
    assert "max_batch_size was asked for, but an answer depends on the rows beside it" in warning


def of_rows(nodes, dims=(3,), weights=None):
    t = onnx.TensorProto
    return graphs.model(nodes, [("x", t.FLOAT, ["n", *dims])], [("y", t.FLOAT, ["n", *dims])], weights)


def test_what_is_not_plainly_row_independent_is_named_with_the_line_that_would_declare_it(shop):
    node = onnx.helper.make_node("CumSum", ["x", "axis"], ["y"], name="sums")
    served = shop.served("m", of_rows([node], weights={"axis": np.array(0, np.int64)}))
    assert served.model.max_batch_size == 0
    (warning, *_) = served.model.warnings
    assert "CumSum 'sums' computes along axis 0" in warning
    assert warning.endswith("declare it with max_batch_size = 16 in clockwork.toml")


def hidden():
    """A graph that no trial sees mix: where a constant is true, an answer is the largest row's sign."""
    h = onnx.helper
    nodes = [
        h.make_node("ReduceMax", ["x"], ["m"], name="largest", axes=[0]),
        h.make_node("Sub", ["m", "m"], ["z"]),
        h.make_node("Sign", ["z"], ["s"]),
        h.make_node("Where", ["no", "s", "x"], ["y"]),
    ]
    return of_rows(nodes, weights={"no": np.array([False])})


def test_each_copy_of_what_is_only_declared_is_tried_for_its_weights_may_mix_its_rows(shop):
    h = onnx.helper
    nodes = [
        h.make_node("ReduceMax", ["x"], ["m"], axes=[0]),
        h.make_node("Greater", ["m", "t"], ["above"]),
        h.make_node("Where", ["above", "m", "x"], ["y"]),
    ]
    for name, threshold in (("a", 1e30), ("b", -1e30), ("c", 1e29)):
        weights = {"t": np.full(16, threshold, np.float32)}
        shop.add(name, of_rows(nodes, (16,), weights), toml="max_batch_size = 4")
    served, _ = shop.compile()
    assert [served[f"{name}/1"].model.max_batch_size for name in "abc"] == [4, 0, 4]
    assert served["a/1"].code == served["c/1"].code


@pytest.mark.parametrize("settings", [{"toml": "max_batch_size = 4"}, {"pbtxt": "max_batch_size: 4"}])
def test_what_is_declared_is_batched_if_no_trial_shows_rows_that_mix(shop, settings):
    assert shop.served("n", hidden()).model.max_batch_size == 0
    served = shop.served("m", hidden(), **settings)
    assert served.model.max_batch_size == 4
    assert served.model.warnings == ()
    x = rows(4, 3)
    assert difference(shop.run(served, {"x": x}), [x]) == 0


def test_an_axis_named_as_a_sequence_is_a_batch_only_if_a_setting_says_so(shop):
    h, t = onnx.helper, onnx.TensorProto
    weights = {"table": graphs.floats(np.random.default_rng(0), 9, 4)}
    node = h.make_node("Gather", ["table", "ids"], ["y"])
    model = graphs.model([node], [("ids", t.INT64, ["seq"])], [("y", t.FLOAT, ["seq", 4])], weights)
    served = shop.served("m", model)
    assert served.model.max_batch_size == 0
    assert "axis 0 of input 'ids' is 'seq', by its name a sequence" in served.model.warnings[0]
    assert shop.served("n", model, toml="max_batch_size = 8").model.max_batch_size == 8


def test_rounding_that_spreads_is_not_taken_for_rows_that_read_each_other(shop):
    served = shop.served("m", graphs.sharp_rounding())
    assert served.model.max_batch_size == 16
    assert served.model.warnings == ()


def test_an_output_squeezed_at_batch_one_gets_its_batch_axis_back(shop):
    model = graphs.squeezed()
    served = shop.served("m", model, toml="max_batch_size = 16")
    assert served.model.max_batch_size == 16
    assert served.code.outputs == (TensorSpec(name="y", datatype="FP32", shape=()),)
    for size in (1, 2, 5):
        x = rows(size, 8)
        (got,) = shop.run(served, {"x": x})
        assert got.shape == (size,)
        assert difference([got], [graphs.answers(model, {"x": x})[0].reshape(size)]) <= 1e-5


def test_an_undeclared_output_shape_is_learnt_by_running(shop):
    served = shop.served("m", graphs.unknown_output_shape())
    assert served.code.outputs[0].shape == (3,)
    assert served.model.output_bytes == 64


def test_a_declared_output_shape_that_is_not_the_models_is_refused(shop):
    shop.add("m", graphs.unknown_output_shape(), toml='outputs = [{name = "y", dims = [4]}]')
    _, (problem,) = shop.compile()
    assert (problem.field, problem.found) == ("output 'y' dims", "[4]")
    assert problem.expected.startswith("[3]")


def test_an_output_whose_size_depends_on_values_stays_open(shop):
    served = shop.served("m", graphs.selecting())
    assert served.code.outputs[0].shape == (1, -1)
    assert served.code.outputs_open
    assert served.model.output_bytes == 64 * KIB


def test_free_dimensions_are_served_with_a_warning(shop):
    model = graphs.image_to_image()
    served = shop.served("m", model)
    assert served.code.inputs[0].shape == (3, -1, -1)
    assert served.code.outputs[0].shape == (2, -1, -1)
    assert served.code.outputs_open
    assert served.model.output_bytes >= 64 * KIB
    (warning,) = (each for each in served.model.warnings if "leaves dimensions open [3, -1, -1]" in each)
    assert warning.endswith("declare dims to fix them")
    x = rows(2, 3, 5, 7)
    assert difference(shop.run(served, {"x": x}), graphs.answers(model, {"x": x})) <= 1e-5


def test_declared_dims_are_compiled_in(shop):
    toml = 'inputs = [{name = "x", dims = [3, 6, 10]}]'
    served = shop.served("m", graphs.image_to_image(), toml=toml)
    assert served.code.inputs[0].shape == (3, 6, 10)
    assert served.code.outputs[0].shape == (2, 6, 10)
    assert not served.code.outputs_open
    assert served.model.output_bytes == 512  # 2 x 6 x 10 floats, aligned
    assert served.model.warnings == ()
    dims = onnx.load(f"{served.code.path}/model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims[1:]] == [3, 6, 10]


def test_the_advice_to_declare_dims_of_a_model_that_is_not_batched_can_be_followed(shop):
    nodes = [onnx.helper.make_node("CumSum", ["x", "axis"], ["y"])]
    shapes = [("x", onnx.TensorProto.FLOAT, ["N", "M"])], [("y", onnx.TensorProto.FLOAT, ["N", "M"])]
    mixing = graphs.model(nodes, *shapes, {"axis": np.array(0)})
    assert any(
        "declare dims to fix them, and max_batch_size = 0" in w
        for w in shop.served("a", mixing).model.warnings
    )
    advised = shop.served("b", mixing, toml='max_batch_size = 0\ninputs = [{name = "x", dims = [3, 4]}]')
    assert (advised.code.inputs[0].shape, advised.model.warnings) == ((3, 4), ())
    shop.add("c", mixing, toml='inputs = [{name = "x", dims = [3, 4]}]')
    assert "without the batch axis; with max_batch_size = 0 the full shape" in shop.compile()[1][0].expected


def test_dims_are_full_shapes_if_max_batch_size_is_zero(shop):
    toml = 'max_batch_size = 0\ninputs = [{name = "x", dims = [2, 3, 6, 10]}]'
    served = shop.served("m", graphs.image_to_image(), toml=toml)
    assert served.code.inputs[0].shape == (2, 3, 6, 10)
    assert not served.code.batched


def test_a_batch_size_that_is_no_power_of_two_is_one_of_the_sizes(shop):
    served = shop.served("m", graphs.mlp(), toml="max_batch_size = 6")
    assert served.model.batch_sizes == (1, 2, 4, 6)
    assert served.code.batch_sizes == (1, 2, 4, 6)


def test_a_batch_size_beyond_what_is_compiled_is_lowered_and_said_so(shop):
    served = shop.served("m", graphs.mlp(), toml="max_batch_size = 200")
    assert served.model.max_batch_size == 64
    assert "max_batch_size 200 was asked for" in served.model.warnings[0]


def test_a_graph_that_does_not_run_on_generated_inputs_is_served_unlifted(shop):
    h, t = onnx.helper, onnx.TensorProto
    # No size of the free dimension fits the reshape but 7.
    nodes = [h.make_node("Reshape", ["x", "shape"], ["r"]), h.make_node("MatMul", ["r", "w"], ["y"])]
    weights = {"shape": np.array([1, 7], np.int64), "w": graphs.floats(np.random.default_rng(0), 7, 4)}
    model = graphs.model(nodes, [("x", t.FLOAT, ["T"])], [("y", t.FLOAT, [1, 4])], weights)
    served = shop.served("m", model, toml="max_batch_size = 0")
    assert not served.code.lifted
    assert "weights are not lifted: it could not be run on generated inputs" in served.model.warnings[0]
    assert served.model.weights.size > 7 * 4 * 4
    x = rows(1, 7)[0]
    assert difference(shop.run(served, {"x": x}), graphs.answers(model, {"x": x})) <= 1e-6


class TamperingOptimiser(Optimiser):
    """Saves another model than the one it opened, as an optimiser with a fault would."""

    def optimise(self, model):
        session, _ = super().optimise(model)
        return session, super().optimise(graphs.mlp(seed=99).SerializeToString())[1]


def test_a_lifted_graph_with_different_results_is_not_used(shop):
    shop.compiler = Compiler(shop.cache, shop.config, TamperingOptimiser())
    served = shop.served("m", graphs.mlp())
    assert not served.code.lifted
    assert "with its weights as inputs its answers differ" in served.model.warnings[0]


class SpoilsOne(Optimiser):
    """Saves the model that has ``marked`` as a weight with other weights, and opens it as it is."""

    def __init__(self, marked: onnx.ModelProto):
        super().__init__()
        self.marked = marked.graph.initializer[0].raw_data

    def optimise(self, model):
        session, optimised = super().optimise(model)
        spoilt = self.marked in model
        return session, super().optimise(graphs.mlp(seed=99).SerializeToString())[1] if spoilt else optimised


@pytest.mark.parametrize("at", [0, 2])
def test_a_copy_whose_optimised_answers_differ_is_noticed_and_served_as_it_is(shop, at):
    models = [graphs.mlp(seed) for seed in range(4)]
    shop.compiler = Compiler(shop.cache, shop.config, SpoilsOne(models[at]))
    for number, model in enumerate(models):
        shop.add(f"m{number}", model)
    served, problems = shop.compile()
    assert not problems
    x = rows(3, 8)
    for number, model in enumerate(models):
        each = served[f"m{number}/1"]
        assert difference(shop.run(each, {"x": x}), graphs.answers(model, {"x": x})) <= 1e-5
        assert each.code.lifted == (number != at)
        assert any("its answers differ" in warning for warning in each.model.warnings) == (number == at)


def test_a_file_that_declares_wrong_shapes_of_what_it_computes_is_served_though_no_session_opens_it(shop):
    model = graphs.mlp()
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [32]))
    served = shop.served("m", model)
    assert served.code.lifted
    x = rows(3, 8)
    assert difference(shop.run(served, {"x": x}), graphs.answers(graphs.mlp(), {"x": x})) <= 1e-5


def test_overridable_defaults_of_old_models_are_constants(shop):
    model = graphs.mlp()
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    model.ir_version = 3
    served = shop.served("m", model)
    assert [spec.name for spec in served.code.inputs] == ["x"]
    assert served.code.lifted
    x = rows(2, 8)
    assert difference(shop.run(served, {"x": x}), graphs.answers(graphs.mlp(), {"x": x})) <= 1e-5


@pytest.mark.parametrize("ir_version", [3, 9])
def test_an_initialiser_that_is_an_optional_input_is_a_default(shop, ir_version):
    pbtxt = 'input { name: "k" data_type: TYPE_FP32 dims: 32 optional: true }\nmax_batch_size: 0'
    served = shop.served("m", graphs.scaled(ir_version=ir_version), pbtxt=pbtxt)
    assert [(spec.name, spec.optional) for spec in served.code.inputs] == [("x", False), ("k", True)]
    assert served.code.lifted  # but for the default
    assert not any("no meaning" in warning for warning in served.model.warnings)
    x = np.arange(32, dtype=np.float32)
    np.testing.assert_array_equal(shop.run(served, {"x": x})[0], x * 3 + 5)
    np.testing.assert_array_equal(shop.run(served, {"x": x, "k": x})[0], x * x + 5)


def test_a_copy_with_another_default_answers_with_its_own(shop):
    toml = 'inputs = [{name = "k", optional = true}]'
    x = np.arange(32, dtype=np.float32)
    for number in range(4):
        copy = graphs.scaled()
        copy.graph.initializer[0].raw_data = np.full(32, number, np.float32).tobytes()
        copy.graph.initializer[1].raw_data = np.full(32, 10 * number, np.float32).tobytes()
        served = shop.served(f"m{number}", copy, toml=toml)
        np.testing.assert_array_equal(shop.run(served, {"x": x})[0], x * number + 10 * number)


def test_a_model_with_an_optional_input_is_not_batched(shop):
    model = graphs.scaled()
    for value in (model.graph.input[0], model.graph.input[1], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    served = shop.served("m", model, toml='inputs = [{name = "k", optional = true}]')
    assert served.model.max_batch_size == 0
    assert "input 'k' is optional" in served.model.warnings[0]


@pytest.mark.parametrize("count", [4, 40])
def test_a_graph_that_folds_to_constants_is_served(shop, count):
    constant = onnx.numpy_helper.from_array(np.arange(count, dtype=np.float32))
    node = onnx.helper.make_node("Constant", [], ["y"], value=constant)
    float32 = onnx.TensorProto.FLOAT
    served = shop.served("m", graphs.model([node], [("x", float32, [2])], [("y", float32, [count])]))
    (answer,) = shop.run(served, {"x": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(answer, np.arange(count))


def test_the_probe_file_holds_inputs_that_work(shop):
    from clockwork_serve.store import Fill, generate_inputs

    served = shop.served("m", graphs.image_to_image())
    fills = msgspec.json.decode(Path(served.code.path, "probe.json").read_bytes(), type=list[Fill])
    assert shop.run(served, generate_inputs(fills))[0].shape == (1, 2, 32, 32)
    assert shop.run(served, generate_inputs(fills, rows=4))[0].shape == (4, 2, 32, 32)
