"""Writes the demo's model repository: every real model, and copies of it with different weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from msgspec import Struct
from onnx import TensorProto, numpy_helper

from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.zoo import DemoModel

FORMAT = 1
"""Incremented when the format of the repository changes."""

SPREAD = 0.005
"""Standard deviation of the factors near 1 that scale rows of weights: results change but stay plausible."""

LEAST_ELEMENTS = 16
LAYERS = frozenset(
    {"Add", "Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "LayerNormalization", "MatMul", "FusedConv"}
)
"""Operators whose float constants of at least ``LEAST_ELEMENTS`` are taken for weights."""

Progress = Callable[[int, int, str], None]
"""Called with (models written, models in all, name of the last)."""


class Instance(Struct, frozen=True, kw_only=True):
    """One registered model: ``base`` is the demo model whose copy it is (or which it is)."""

    name: str
    base: str


class Manifest(Struct, frozen=True, kw_only=True):
    """The content of a demo repository; written last, so that its presence means that it is complete."""

    instances: tuple[Instance, ...]


def build(
    files: Files, models: Sequence[DemoModel], progress: Progress | None = None
) -> tuple[Path, Manifest]:
    """The repository of ``models`` with all their instances, from the cache if it was written before.

    Older repositories with other contents are deleted, as they are large.
    """
    root = files.root / f"repository-{_key(models)}"
    listing = root.with_suffix(".json")
    if listing.is_file() and root.is_dir():
        return root, msgspec.json.decode(listing.read_bytes(), type=Manifest)
    for old in files.root.glob("repository-*"):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    draft = files.root / f"repository-draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    instances = []
    total = sum(model.instances for model in models)
    try:
        for model in models:
            for instance in _write_instances(files, model, draft):
                instances.append(instance)
                if progress is not None:
                    progress(len(instances), total, instance.name)
        draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    manifest = Manifest(instances=tuple(instances))
    listing.write_bytes(msgspec.json.encode(manifest))
    return root, manifest


def _write_instances(files: Files, model: DemoModel, root: Path) -> Iterator[Instance]:
    content = model.build(files)
    for number in range(model.instances):
        name = model.name if number == 0 else f"{model.name}_{number:02d}"
        mine = content if number == 0 else with_other_weights(content, zlib.crc32(name.encode()))
        folder = root / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(mine)
        (folder.parent / "clockwork.toml").write_text(settings(model))
        yield Instance(name=name, base=model.name)


def settings(model: DemoModel) -> str:
    """The model's ``clockwork.toml``."""
    lines = [f"max_batch_size = {model.max_batch_size}"]
    if model.dims:
        tensors = (f"{{name = {json.dumps(n)}, dims = {json.dumps(list(d))}}}" for n, d in model.dims.items())
        lines.append(f"inputs = [{', '.join(tensors)}]")
    return "\n".join(lines) + "\n"


def with_other_weights(content: bytes, seed: int) -> bytes:
    """The same ONNX graph with the rows of every layer's weights scaled by random factors near 1."""
    model = onnx.load_from_string(content)
    dice = np.random.default_rng(seed)
    for tensor in _weights(model.graph):
        values = numpy_helper.to_array(tensor)
        factors = np.asarray(1 + SPREAD * dice.standard_normal(values.shape[0]), np.float32)
        rows = factors.reshape(-1, *[1] * (values.ndim - 1))
        tensor.ClearField("float_data")
        tensor.raw_data = np.ascontiguousarray(values * rows).astype("<f4").tobytes()
    return model.SerializeToString()


def _weights(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Float constants that layers read, as initialisers or as Constant nodes, in a fixed order."""
    read = {name for node in graph.node if node.op_type in LAYERS for name in node.input}
    constants = [
        (node.output[0], attribute.t)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for name, tensor in [*((t.name, t) for t in graph.initializer), *constants]:
        elements = int(np.prod(tensor.dims)) if tensor.dims else 0
        if name in read and tensor.data_type == TensorProto.FLOAT and elements >= LEAST_ELEMENTS:
            yield tensor


def _key(models: Sequence[DemoModel]) -> str:
    parts = [(m.name, m.needs, m.instances, settings(m)) for m in models]
    return hashlib.sha256(json.dumps([FORMAT, SPREAD, parts]).encode()).hexdigest()[:12]
