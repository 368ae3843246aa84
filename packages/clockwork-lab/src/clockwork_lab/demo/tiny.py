"""Three tiny models that need no download: the repository in ``examples/models``, and their requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.graphs import Graph
from clockwork_lab.demo.judgement import Judgement, Send
from clockwork_lab.demo.zoo import DemoModel

WORDS_SOURCE = '''"""Counts the words of a text and turns the text round: a model that is a Python class."""

import numpy as np


class Model:
    """Called by one thread: load once, infer for every batch, unload at the end."""

    def load(self, path: str) -> None:
        """Read what is needed from the folder ``path``; this model needs nothing."""

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``text`` [batch, 1] of bytes to ``words`` [batch, 1] and ``reversed`` [batch, 1]."""
        texts = [text.decode() for text in inputs["text"].reshape(-1)]
        return {
            "words": np.array([[len(text.split())] for text in texts], np.int32),
            "reversed": np.array([[text[::-1].encode()] for text in texts], object),
        }

    def unload(self) -> None:
        """Let go of what load took; here, nothing."""
'''

WORDS_SETTINGS = """backend = "python"
max_batch_size = 8
memory_bytes = 65536
inputs = [{name = "text", dims = [1], datatype = "BYTES"}]
outputs = [
  {name = "words", dims = [1], datatype = "INT32"},
  {name = "reversed", dims = [1], datatype = "BYTES"},
]
"""

MLP_SETTINGS = """max_batch_size = 16
slo_ms = 50

[labels]
probability = ["equal", "different"]
"""


def add_sub() -> bytes:
    """``INPUT0`` and ``INPUT1``, i32 [batch, 16], to their sum ``OUTPUT0`` and difference ``OUTPUT1``."""
    graph = Graph("add_sub")
    graph.node("Add", "INPUT0", "INPUT1", output="OUTPUT0")
    graph.node("Sub", "INPUT0", "INPUT1", output="OUTPUT1")

    def tensors(role: str) -> list[onnx.ValueInfoProto]:
        shape: list[str | int | None] = ["batch", 16]
        return [helper.make_tensor_value_info(f"{role}{i}", TensorProto.INT32, shape) for i in (0, 1)]

    return graph.model(tensors("INPUT"), tensors("OUTPUT")).SerializeToString()


def mlp() -> bytes:
    """``bits`` f32 [batch, 2] to ``probability`` f32 [batch, 2] that they are equal or different.

    Two layers suffice: with h1 = relu(a + b) and h2 = relu(a + b - 1), h1 - 2 h2 is a xor b.
    """
    graph = Graph("mlp")
    hidden = graph.node("Gemm", "bits", graph.constant([[1.0, 1.0], [1.0, 1.0]]), graph.constant([0.0, -1.0]))
    weights, bias = graph.constant([[-4.0, 4.0], [8.0, -8.0]]), graph.constant([2.0, -2.0])
    scores = graph.node("Gemm", graph.node("Relu", hidden), weights, bias)
    graph.node("Softmax", scores, axis=-1, output="probability")
    inputs = helper.make_tensor_value_info("bits", TensorProto.FLOAT, ["batch", 2])
    outputs = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 2])
    return graph.model([inputs], [outputs]).SerializeToString()


def write(root: Path) -> None:
    """Write the repository; existing files are replaced."""
    contents = {
        "add_sub/1/model.onnx": add_sub(),
        "mlp/1/model.onnx": mlp(),
        "mlp/clockwork.toml": MLP_SETTINGS.encode(),
        "words/1/model.py": WORDS_SOURCE.encode(),
        "words/clockwork.toml": WORDS_SETTINGS.encode(),
    }
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def ask_add_sub(_: Files, send: Send) -> Judgement:
    """Whether 40 + 2 and 40 - 2 are right."""
    first, second = np.full((1, 16), 40, np.int32), np.full((1, 16), 2, np.int32)
    outputs = send({"INPUT0": first, "INPUT1": second})
    total, gap = int(outputs["OUTPUT0"][0, 0]), int(outputs["OUTPUT1"][0, 0])
    return Judgement(f"40 + 2 = {total}, 40 - 2 = {gap}", (total, gap) == (42, 38))


def ask_mlp(_: Files, send: Send) -> Judgement:
    """Which pairs of bits differ."""
    pairs = ((0, 0), (0, 1), (1, 0), (1, 1))
    found = [int(send({"bits": np.array([pair], np.float32)})["probability"][0].argmax()) for pair in pairs]
    answer = ", ".join(f"{a} xor {b} = {c}" for (a, b), c in zip(pairs, found, strict=True))
    return Judgement(answer, found == [a ^ b for a, b in pairs])


def ask_words(_: Files, send: Send) -> Judgement:
    """The number of words in a sentence, and the sentence backwards."""
    outputs = send({"text": np.array([[b"never odd or even"]], object)})
    count, text = int(outputs["words"][0, 0]), bytes(outputs["reversed"][0, 0]).decode()
    return Judgement(f'{count} words, "{text}"', (count, text) == (4, "neve ro ddo reven"))


def _unbuilt(_: Files) -> bytes:
    raise AssertionError("the tiny repository is written as a whole, by write()")


def _model(name: str, kind: str, ask: Callable[[Files, Send], Judgement]) -> DemoModel:
    return DemoModel(name, kind, (), _unbuilt, ask, 1, 8, {})


MODELS = (
    _model("add_sub", "arithmetic", ask_add_sub),
    _model("mlp", "a network of two layers", ask_mlp),
    _model("words", "a Python class", ask_words),
)
"""The models of the demo without a network."""
