"""Files of models: ONNX with what they name beside them, torch programs."""

from __future__ import annotations

import json
import os

import onnx

from clockwork_serve.store import StoreConfig
from clockwork_serve.store.onnx.graph import GraphPlan, batching_of, declared, interface_of, prepared
from clockwork_serve.store.onnx.source import read_source
from clockwork_serve.store.optimiser import parse_model, readable_names
from clockwork_serve.store.settings import ModelSettings, ProblemError
from clockwork_serve.store.torch.archive import read_archive, write_archive
from clockwork_serve.store.torch.program import read_program
from tests.fuzz import mutators
from tests.fuzz.engine import Target, scratch

_FOLDER = scratch()
_MODEL = _FOLDER / "m" / "1" / "model.onnx"
_CONFIG = StoreConfig(cache_dir=str(_FOLDER / "cache"))


def _fill_folder() -> None:
    """What external data may lie in, and what it may not."""
    _MODEL.parent.mkdir(parents=True)
    (_MODEL.parent / "weights.bin").write_bytes(bytes(range(256)))
    (_FOLDER / "outside.bin").write_bytes(bytes(256))
    (_MODEL.parent / "link").symlink_to(_FOLDER / "outside.bin")
    (_MODEL.parent / "loop").symlink_to("loop")
    os.mkfifo(_MODEL.parent / "pipe")
    with (_MODEL.parent / "huge").open("wb") as huge:
        huge.truncate(1 << 40)


_fill_folder()


def _onnx(data: bytes) -> None:
    with readable_names():
        _read_onnx(data)


def _read_onnx(data: bytes) -> None:
    _MODEL.write_bytes(data)
    source = read_source(_MODEL, _MODEL.parent)
    model = parse_model(source.data)
    found = interface_of(model)
    settings = ModelSettings()
    batching = batching_of(found, settings, _CONFIG)
    interface = declared(found, settings, batched=batching.max_batch_size > 0)
    outputs = tuple(tensor.name for tensor in interface.outputs)
    prepared(model, GraphPlan(interface=interface, max_batch_size=batching.max_batch_size, stated=outputs))


def _onnx_external(data: bytes) -> None:
    """JSON: keys and values of external data, as a model's one weight has them."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(given, dict):
        return
    weight = onnx.TensorProto(name="w", data_type=1, dims=[64], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in given.items():
        text = str(value) if not isinstance(value, str) else value
        if not (key + text).isprintable() and "\0" not in text:
            continue
        weight.external_data.add(
            key=key.encode(errors="replace").decode(), value=text.encode(errors="replace").decode()
        )
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    sides = [onnx.helper.make_tensor_value_info(name, 1, [64]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", sides[:1], sides[1:], [weight])
    written = _MODEL.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    source = read_source(_MODEL, _MODEL.parent)
    # It may name itself: all that it wrote, once more.
    assert len(source.data) < 1000 + written, "it read something else"


def _torch_pt2(data: bytes) -> None:
    path = _FOLDER / "model.pt2"
    path.write_bytes(data)
    archive = read_archive(path)
    read_program(archive)
    write_archive(archive, _FOLDER / "again.pt2")


TARGETS = (
    Target("onnx", _onnx, (ProblemError,), mutators.protobuf, input_bytes=65_536),
    Target("onnx_external", _onnx_external, (ProblemError,), mutators.as_json),
    Target("torch_pt2", _torch_pt2, (ProblemError,), mutators.zipped(mutators.as_json), input_bytes=65_536),
)  # fmt: skip
