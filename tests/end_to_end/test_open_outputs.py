"""Outputs whose size only a run tells: small ones take little room, and large ones arrive from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper, numpy_helper

from clockwork_serve.units import MIB
from harness.http_load import closed_loop, infer_message, run
from harness.ports import free_port
from harness.serving import Serving, total, until
from tests.end_to_end import machines
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.machines import FarGateway, far_gateway, far_worker, joined
from tests.serve.certificates import Certificates, certificates

Start = Callable[..., AbstractContextManager[Serving]]
CLASSES, SIDE = 21, 512
"""A picture of that side has 22 MiB of outputs."""

ECHOES = """class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        return {"y": inputs["x"].repeat(int(inputs["x"].flat[0]), axis=1)}

    def unload(self):
        pass
"""
"""Says its input as often as the first number tells."""


def segmenter(root: Path) -> Path:
    """Scores of each pixel, and of the whole picture; its weights are more than 256 KiB."""
    random = np.random.default_rng(3)
    shapes = {"pixel": (CLASSES, 3, 1, 1), "up": (3, 8192), "down": (8192, CLASSES)}
    nodes = [
        helper.make_node("Conv", ["x", "pixel"], ["each"]),
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "up"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["active"]),
        helper.make_node("MatMul", ["active", "down"], ["all"]),
        helper.make_node("Unsqueeze", ["all", "axes"], ["whole"]),
        helper.make_node("Add", ["each", "whole"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(random.standard_normal(shape, np.float32) / np.float32(32), name)
        for name, shape in shapes.items()
    ]
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, "h", "w"])
        for name, channels in (("x", 3), ("y", CLASSES))
    ]
    graph = helper.make_graph(nodes, "segmenter", tensors[:1], tensors[1:], [*weights, axes])
    (root / "segmenter" / "1").mkdir(parents=True)
    path = root / "segmenter" / "1" / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def echoes(root: Path, datatype: str, most_rows: int) -> None:
    (root / f"echo_{datatype}" / "1").mkdir(parents=True)
    (root / f"echo_{datatype}" / "1" / "model.py").write_text(ECHOES)
    (root / f"echo_{datatype}" / "clockwork.toml").write_text(
        f'backend = "python"\nmax_batch_size = {most_rows}\n'
        f'inputs = [{{name = "x", dims = [-1], datatype = "{datatype}"}}]\n'
        f'outputs = [{{name = "y", dims = [-1], datatype = "{datatype}"}}]\n'
    )


@dataclass
class Place:
    """A server that others may join, and a plain session of its model."""

    serving: Serving
    port: int
    certificates: Certificates
    plain: ort.InferenceSession

    def gateway(self) -> AbstractContextManager[FarGateway]:
        return far_gateway(self.port, self.certificates)

    def check(self, url: str, rows: int = 1, side: int = SIDE, **how: Any) -> None:
        """A stock client's answer is that of a plain session."""
        client = tritonclient.grpc if how.get("grpc") else tritonclient.http
        x = np.random.default_rng(rows).standard_normal((rows, 3, side, side), np.float32)
        given = client.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        asking = client.InferenceServerClient(url.removeprefix("http://"))
        try:
            answer = asking.infer("segmenter", [given], headers={"x-slo-ms": "60000"})
        finally:
            asking.close()
        found = answer.as_numpy("y")
        np.testing.assert_allclose(found, self.plain.run(["y"], {"x": x})[0], rtol=1e-3, atol=1e-4)


def settled(serving: Serving) -> None:
    """No memory is taken any more."""
    until(
        "its memory is free",
        lambda: total(serving.metrics(), "clockwork_gateway_region_bytes", state="taken") == 0,
    )


def a_place(root: Path, start: Start, **settings: Any) -> Iterator[Place]:
    plain = ort.InferenceSession(segmenter(root / "models"), providers=["CPUExecutionProvider"])
    echoes(root / "models", "FP32", 8)
    echoes(root / "models", "INT64", 1)
    files, port = certificates(root), free_port()
    with start(root / "models", **machines.settings(files, port), **settings) as serving:
        yield Place(serving, port, files, plain)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Place]:
    yield from a_place(tmp_path_factory.mktemp("home"), start)


@pytest.fixture(scope="module")
def abroad(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Place]:
    """A server whose own device has no room for the segmenter, and a worker elsewhere that has."""
    root = tmp_path_factory.mktemp("abroad")
    for place in a_place(root, start, memory_bytes=machines.PAGE):
        with far_worker(place.port, place.certificates, root / "far") as worker:
            joined(place.serving, worker)
            yield place


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_a_large_answer_arrives_the_first_time_and_again(home: Place, *, grpc: bool) -> None:
    url = home.serving.grpc_url if grpc else home.serving.http_url
    for rows, side in ((1, SIDE), (1, SIDE), (2, SIDE), (1, 16), (1, SIDE)):
        home.check(url, rows, side, grpc=grpc)
    settled(home.serving)


@pytest.mark.parametrize("place", ["home", "abroad"])
def test_a_large_answer_arrives_from_another_machine_and_at_another(
    place: str, request: pytest.FixtureRequest
) -> None:
    found: Place = request.getfixturevalue(place)
    with found.gateway() as gateway:
        until("it serves", lambda: gateway.ready, machines.PATIENCE_S)
        for url in (found.serving.http_url, gateway.url):
            for rows in (1, 1, 2):
                found.check(url, rows)
        until(
            "its memory is free",
            lambda: total(gateway.metrics(), "clockwork_gateway_region_bytes", state="taken") == 0,
        )
    settled(found.serving)


def test_twelve_clients_with_small_open_outputs_are_not_refused_for_room(home: Place) -> None:
    data = np.ones((8, 1), np.float32).tobytes()
    message = infer_message(home.serving.http_url, "echo_FP32", [("x", "FP32", (8, 1), data)])
    report = run(closed_loop(home.serving.http_url, lambda _: message, requests=2000, connections=12))
    assert report.ends() == {"200": 2000}
    settled(home.serving)


def test_answers_of_very_different_sizes_arrive_side_by_side(home: Place) -> None:
    url, sizes = home.serving.http_url, [1, 2, 10, 1000, 300_000]
    messages = [
        infer_message(url, "echo_INT64", [("x", "INT64", (1, 1), np.array([[size]]).tobytes())])
        for size in sizes
    ]
    report = run(closed_loop(url, lambda at: messages[at % len(sizes)], requests=150, connections=8))
    assert report.ends() == {"200": 150}
    for sample in report.samples:
        size = sizes[int(sample.name) % len(sizes)]
        assert sample.body.endswith(np.full(size, size).tobytes())
        assert f'"shape":[1,{size}]'.encode() in sample.body
    settled(home.serving)


def test_an_answer_larger_than_the_setting_is_refused_by_its_name(tmp_path: Path, start: Start) -> None:
    echoes(tmp_path / "models", "INT64", 1)
    with ExitStack() as stack:
        serving = stack.enter_context(start(tmp_path / "models", io_bytes=MIB))
        path = "/v2/models/echo_INT64/infer"
        bodies = [x_json([size]).replace(b"FP32", b"INT64") for size in (131_073, 131_072)]
        refused, good = (call(serving.http_url, path, body) for body in bodies)
        assert good.status == 200, good.json
        assert (refused.status, refused.json.get("reason")) == (500, "model_raised"), refused.json
        assert "outputs: expected at most 1048576 bytes, as are left of" in refused.json["error"]
        settled(serving)
