"""Fields of config.pbtxt are used, named as ignored, or refused, but not silently dropped."""

from __future__ import annotations

import pytest

from clockwork_serve.store.pbtxt import read_pbtxt
from clockwork_serve.store.settings import ModelSettings, ProblemError, TensorSettings, VersionPolicy

FULL = """
name: "m"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 format: FORMAT_NHWC dims: [ 3, -1 ] } ]
output [
  { name: "y" data_type: TYPE_STRING dims: [ 2 ] label_filename: "labels.txt" }
]
version_policy: { specific { versions: [3, 1] } }
default_model_filename: "net.onnx"
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  default_queue_policy { max_queue_size: 50 timeout_action: REJECT }
}
instance_group [ { count: 2 kind: KIND_GPU } ]
optimization { cuda { graphs: true } }
parameters { key: "threads" value: { string_value: "4" } }
metric_tags [ { key: "team" value: "vision" } ]
"""


def test_what_has_a_meaning_is_used():
    settings, _ = read_pbtxt(FULL, "m")
    assert settings == ModelSettings(
        backend="onnx",
        max_batch_size=8,
        queue_limit=50,
        inputs=(TensorSettings(name="x", dims=(3, -1), datatype="FP32"),),
        outputs=(TensorSettings(name="y", dims=(2,), datatype="BYTES"),),
        version_policy=VersionPolicy(latest=None, specific=(1, 3)),
        label_files={"y": "labels.txt"},
        formats={"x": "FORMAT_NHWC"},
        parameters={"threads": "4"},
        metric_tags={"team": "vision"},
        file_name="net.onnx",
    )


def test_every_field_without_a_meaning_is_named():
    _, warnings = read_pbtxt(FULL, "m")
    assert [warning.split(": ")[1].split(" has")[0] for warning in warnings] == [
        "dynamic_batching.preferred_batch_size",
        "dynamic_batching.max_queue_delay_microseconds",
        "dynamic_batching.default_queue_policy.timeout_action",
        "instance_group.count",
        "instance_group.kind",
        "optimization.cuda.graphs",
        "parameters['threads']",
        "metric_tags['team']",
    ]
    assert [warning for warning in warnings if "clients are told it" in warning] == list(warnings[-2:])


def test_an_absent_batch_size_is_zero_if_tensors_are_declared_and_completed_if_not():
    assert read_pbtxt('input { name: "x" dims: 3 }', "m")[0].max_batch_size == 0
    assert read_pbtxt('backend: "onnxruntime"', "m")[0].max_batch_size is None


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("version_policy { all {} }", VersionPolicy(latest=None)),
        ("version_policy { latest { num_versions: 3 } }", VersionPolicy(latest=3)),
        ("version_policy { latest {} }", VersionPolicy(latest=1)),
    ],
)
def test_version_policies(text, policy):
    assert read_pbtxt(text, "m")[0].version_policy == policy


@pytest.mark.parametrize(
    ("text", "field", "found"),
    [
        ('platform: "ensemble"', "config.pbtxt platform", "'ensemble'"),
        ('backend: "tensorrt_llm"', "config.pbtxt backend", "'tensorrt_llm'"),
        ("ensemble_scheduling { }", "config.pbtxt ensemble_scheduling", "an ensemble"),
        ("sequence_batching { }", "config.pbtxt sequence_batching", "sequence batching"),
        (
            "model_transaction_policy { decoupled: true }",
            "config.pbtxt model_transaction_policy.decoupled",
            "true",
        ),
        ('name: "other"', "config.pbtxt name", "other"),
        ("max_batch_sizes: 8", "config.pbtxt line 1 max_batch_sizes", "max_batch_sizes"),
        ('input { name: "x" shape: 3 }', "config.pbtxt line 1 input.shape", "shape"),
        ('input { name: "x" dims: 0 }', "config.pbtxt input[0].dims", "[0]"),
        ('input { name: "x" data_type: TYPE_FP31 }', "config.pbtxt input[0].data_type", "TYPE_FP31"),
        ('input { name: "x" dims: 4 reshape { shape: [0] } }', "config.pbtxt input[0].reshape.shape", "[0]"),
        ("input { dims: 3 }", "config.pbtxt input[0].name", "nothing"),
        ('input { name: "x" format: FORMAT_CHW }', "config.pbtxt input[0].format", "FORMAT_CHW"),
        ("parameters { name: 'x' }", "config.pbtxt line 1 parameters.name", "name"),
        ("parameters { key: 'x' value: 'y' }", "config.pbtxt line 1 value", "the string 'y'"),
        ("metric_tags { key: 'x' value: 3 }", "config.pbtxt line 1 value", "3"),
        ("max_batch_size: -1", "config.pbtxt max_batch_size", "-1"),
        ("version_policy { newest {} }", "config.pbtxt version_policy", "['newest']"),
        ("name: m", "config.pbtxt line 1 name", "Word(text='m')"),
        ("dynamic_batching: 3", "config.pbtxt line 1 dynamic_batching", "3"),
    ],
)
def test_what_would_change_answers_or_makes_no_sense_is_refused_by_name(text, field, found):
    with pytest.raises(ProblemError) as caught:
        read_pbtxt(text, "m")
    assert (caught.value.problem.field, caught.value.problem.found) == (field, found)


def test_a_field_spelt_wrong_is_answered_with_the_right_one():
    with pytest.raises(ProblemError, match="did you mean max_batch_size"):
        read_pbtxt("max_batch_sizes: 8", "m")


def test_decoupled_false_is_what_is_done_anyway():
    assert read_pbtxt("model_transaction_policy { decoupled: false }", "m") == (ModelSettings(), ())


def test_a_reshape_has_the_shape_of_the_model_and_its_dims_are_for_clients():
    settings, warnings = read_pbtxt(
        'input { name: "x" dims: [3, 4] reshape { shape: [1, 3, 4] } } input { name: "n" dims: 2 } '
        'output { name: "y" dims: 1 reshape { } }',
        "m",
    )
    assert [tensor.dims for tensor in (*settings.inputs, *settings.outputs)] == [(1, 3, 4), (2,), ()]
    assert (settings.input_dims, settings.output_dims) == ({"x": (3, 4)}, {"y": (1,)})
    assert warnings == ()
