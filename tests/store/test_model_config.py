"""The configuration has the field names that Triton's clients read, as captured from a real server."""

from __future__ import annotations

import msgspec
import pytest

from tests.store import graphs

CAPTURED = {
    "name", "platform", "backend", "runtime", "version_policy", "max_batch_size", "input", "output",
    "batch_input", "batch_output", "optimization", "dynamic_batching", "instance_group",
    "default_model_filename", "cc_model_filenames", "metric_tags", "parameters", "model_warmup",
}  # fmt: skip


def config_of(served) -> dict:
    return msgspec.json.decode(served.model.config)


def test_fields_are_those_of_triton(shop):
    config = config_of(shop.served("m", graphs.convnet()))
    assert set(config) == CAPTURED
    assert config["name"] == "m"
    assert config["platform"] == "onnxruntime_onnx"
    assert config["backend"] == "onnxruntime"
    assert config["max_batch_size"] == 16
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["default_model_filename"] == "model.onnx"
    (tensor,) = config["input"]
    assert (tensor["name"], tensor["data_type"], tensor["dims"]) == ("x", "TYPE_FP32", [3, 8, 8])
    assert set(tensor) == {
        "name", "data_type", "format", "dims", "is_shape_tensor", "allow_ragged_batch", "optional",
        "is_non_linear_format_io",
    }  # fmt: skip
    assert config["output"] == [
        {
            "name": "y", "data_type": "TYPE_FP32", "dims": [10], "label_filename": "",
            "is_shape_tensor": False, "is_non_linear_format_io": False,
        }
    ]  # fmt: skip


def test_a_model_without_batch_shows_full_shapes_and_no_batching(shop):
    config = config_of(shop.served("m", graphs.mlp(), toml='max_batch_size = 0\nversion_policy = "all"'))
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [-1, 8]
    assert "dynamic_batching" not in config
    assert config["version_policy"] == {"all": {}}


def test_what_was_declared_is_shown(shop):
    pbtxt = (
        'output { name: "y" label_filename: "l.txt" } max_batch_size: 4 '
        "version_policy { specific { versions: 1 } }"
    )
    shop.add("m", graphs.mlp(), pbtxt=pbtxt)
    (shop.root / "m" / "l.txt").write_text("a\nb\nc")
    config = config_of(shop.compile()[0]["m/1"])
    assert config["output"][0]["label_filename"] == "l.txt"
    assert config["max_batch_size"] == 4
    assert config["version_policy"] == {"specific": {"versions": [1]}}


def test_what_only_clients_read_is_shown_as_it_was_declared(shop):
    """An image client orders pixels by ``format``; parameters are a model's word to its clients."""
    pbtxt = (
        'max_batch_size: 4 input { name: "x" dims: [3, 8, 8] format: FORMAT_NCHW } '
        'parameters [ { key: "mean" value { string_value: "123.7" } }, { key: "empty" value {} } ] '
        'parameters { key: "mean" value { string_value: "124" } } '
        'metric_tags { key: "team" value: "vision" }'
    )
    config = config_of(shop.served("m", graphs.convnet(), pbtxt=pbtxt))
    assert config["input"][0]["format"] == "FORMAT_NCHW"
    assert config["parameters"] == {"mean": {"string_value": "124"}, "empty": {"string_value": ""}}
    assert config["metric_tags"] == {"team": "vision"}


def test_what_only_clients_read_compiles_nothing_again(shop):
    before = shop.served("m", graphs.convnet(), pbtxt="max_batch_size: 4")
    (shop.root / "m" / "config.pbtxt").write_text(
        'max_batch_size: 4 parameters { key: "a" value { string_value: "b" } }'
    )
    runs = shop.compiler.optimiser.runs
    after = shop.compile()[0]["m/1"]
    assert (after.code, shop.compiler.optimiser.runs) == (before.code, runs)
    assert config_of(after)["parameters"] == {"a": {"string_value": "b"}}


def test_a_reshape_is_shown_with_the_dims_that_clients_see(shop):
    pbtxt = (
        'max_batch_size: 4 input { name: "x" dims: [192] reshape { shape: [3, 8, 8] } } '
        'output { name: "y" dims: [2, 5] reshape { shape: [10] } }'
    )
    served = shop.served("m", graphs.convnet(), pbtxt=pbtxt)
    config = config_of(served)
    ((x,), (y,)) = config["input"], config["output"]
    assert (x["dims"], x["reshape"]) == ([192], {"shape": [3, 8, 8]})
    assert (y["dims"], y["reshape"]) == ([2, 5], {"shape": [10]})
    assert (served.code.inputs[0].shape, served.code.outputs[0].shape) == ((3, 8, 8), (10,))


@pytest.mark.parametrize("dims", ["[191]", "[-1]", "[]"])
def test_a_reshape_to_other_elements_is_refused(shop, dims):
    pbtxt = f'max_batch_size: 4 input {{ name: "x" dims: {dims} reshape {{ shape: [3, 8, 8] }} }}'
    shop.add("m", graphs.convnet(), pbtxt=pbtxt)
    served, (problem,) = shop.compile()
    assert served == {}
    assert (problem.field, "[3, 8, 8]" in problem.expected) == ("input 'x' reshape", True)
