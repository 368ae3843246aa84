"""clockwork.toml is read strictly: a wrong key or value is named with what was expected."""

from __future__ import annotations

import pytest

from clockwork_serve.store.settings import (
    EmulatedSettings,
    ModelSettings,
    ProblemError,
    TensorSettings,
    VersionPolicy,
    read_toml,
)
from clockwork_serve.units import MIB


def test_everything_that_may_be_said():
    text = """
    backend = "onnx"
    max_batch_size = 8
    slo_ms = 12.5
    queue_limit = 20
    output_bytes = 4096
    memory_bytes = 1024
    priority = 2
    decide_ms = 0
    version_policy = {latest = 2}
    inputs = [{name = "x", dims = [3, -1], datatype = "TYPE_FP32"}]
    [[outputs]]
    name = "y"
    optional = true
    [labels]
    y = ["cat", "dog"]
    z = "z.txt"
    """
    assert read_toml(text) == ModelSettings(
        backend="onnx",
        max_batch_size=8,
        slo_ms=12.5,
        queue_limit=20,
        output_bytes=4096,
        memory_bytes=1024,
        priority=2,
        decide_ms=0.0,
        version_policy=VersionPolicy(latest=2),
        inputs=(TensorSettings(name="x", dims=(3, -1), datatype="FP32"),),
        outputs=(TensorSettings(name="y", optional=True),),
        labels={"y": ("cat", "dog")},
        label_files={"z": "z.txt"},
    )


def test_an_emulated_profile():
    text = "[emulated]\nweights_mb = 97.5\ninfer_ms = {1 = 2.6, 16 = 17.3, 2 = 3.9}\nload_ms = 8.3"
    assert read_toml(text).emulated == EmulatedSettings(
        weights_bytes=round(97.5 * MIB),
        infer_ns={1: 2_600_000, 2: 3_900_000, 16: 17_300_000},
        load_ns=8_300_000,
    )


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ('version_policy = "all"', VersionPolicy(latest=None)),
        ('version_policy = "latest"', VersionPolicy(latest=1)),
        ("version_policy = {all = true}", VersionPolicy(latest=None)),
        ("version_policy = {specific = [3, 1]}", VersionPolicy(latest=None, specific=(1, 3))),
    ],
)
def test_version_policies(text, policy):
    assert read_toml(text).version_policy == policy


@pytest.mark.parametrize(
    ("text", "field", "advice"),
    [
        ("max_batchsize = 8", "clockwork.toml max_batchsize", "did you mean max_batch_size?"),
        ("max_batch_size = -1", "clockwork.toml max_batch_size", ""),
        ("max_batch_size = true", "clockwork.toml max_batch_size", ""),
        ("slo_ms = 0", "clockwork.toml slo_ms", ""),
        ("slo_ms = nan", "clockwork.toml slo_ms", ""),
        ('slo_ms = "100"', "clockwork.toml slo_ms", ""),
        ('backend = "onix"', "clockwork.toml backend", "did you mean onnx?"),
        ("inputs = 3", "clockwork.toml inputs", ""),
        ("inputs = [{dims = [3]}]", "inputs[0].name", ""),
        ('inputs = [{name = "x", dims = [0]}]', "inputs[0].dims", ""),
        ('inputs = [{name = "x", shape = [3]}]', "inputs[0].shape", ""),
        ('inputs = [{name = "x", datatype = "FP33"}]', "inputs[0].datatype", "did you mean FP32?"),
        ('inputs = [{name = "x"}, {name = "x"}]', "clockwork.toml inputs", ""),
        ('version_policy = "newest"', "clockwork.toml version_policy", ""),
        ("version_policy = {latest = 0}", "version_policy.latest", ""),
        ("labels = {y = 3}", "clockwork.toml labels.y", ""),
        ("emulated = {weights_mb = 1, load_ms = 1}", "emulated.infer_ms", ""),
        ("emulated = {weights_mb = 1, load_ms = 1, infer_ms = {2 = 1}}", "emulated.infer_ms", ""),
        ("emulated = {weights_mb = 1, load_ms = 1, infer_ms = {1 = 0}}", "emulated.infer_ms.1", ""),
        ("emulated = {infer_ms = {1 = 1}, load_ms = 1}", "emulated.weights_mb", ""),
        ("not toml", "clockwork.toml", ""),
    ],
)
def test_mistakes_are_named(text, field, advice):
    with pytest.raises(ProblemError) as caught:
        read_toml(text)
    assert caught.value.problem.field == field
    assert advice in caught.value.problem.advice


@pytest.mark.parametrize(
    "line", ['slo_ms = "50"', 'max_batch_size = "50"', 'inputs = "50"', 'version_policy = "50"']
)
def test_a_string_is_quoted_as_it_was_found(line: str) -> None:
    with pytest.raises(ProblemError, match="found the string '50'"):
        read_toml(line)
