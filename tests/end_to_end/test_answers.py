"""Answers of a real server through the public clients; every answer is the model's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from harness.serving import Serving, total, until
from tests.end_to_end.asking import ask
from tests.end_to_end.conftest import LONG, MATRICES, WIDE, call, product, x_json

EXACT = 1e-5


def http_client(server: Serving) -> tritonclient.http.InferenceServerClient:
    return tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://"))


def plain(repository: Path, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same from a plain session."""
    session = ort.InferenceSession(
        str(repository / model / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def random_inputs(repository: Path, model: str, rows: int, seed: int) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(
        str(repository / model / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(seed)
    made = {}
    for spec in session.get_inputs():
        shape = [rows, *[dim if isinstance(dim, int) else 1 for dim in spec.shape[1:]]]
        whole = "int" in spec.type
        made[spec.name] = (
            rng.integers(0, 9, shape).astype(np.int32) if whole else rng.random(shape, np.float32)
        )
    return made


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        assert np.max(np.abs(found[name] - wanted)) <= EXACT * max(1e-30, np.max(np.abs(wanted)))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(("model", "rows"), [("mlp", 1), ("mlp", 3), ("mlp", 16), ("m0", 1)])
def test_answers_equal_a_plain_session(
    server: Serving, repository: Path, protocol: str, model: str, rows: int
) -> None:
    if model == "m0":
        x = np.random.default_rng(rows).standard_normal((rows, WIDE), dtype=np.float32)
        assert_equal(ask(server, protocol, model, {"x": x}), {"y": product(0, x)})
        return
    inputs = random_inputs(repository, model, rows, seed=rows)
    assert_equal(ask(server, protocol, model, inputs), plain(repository, model, inputs))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_python_class_answers_text(server: Serving, protocol: str) -> None:
    text = np.array([[b"one two three"], [b"four"]], object)
    found = ask(server, protocol, "words", {"text": text})
    assert found["words"].tolist() == [[3], [1]]
    assert [bytes(one) for one in found["reversed"].reshape(-1)] == [b"eerht owt eno", b"ruof"]


def shared_batches(server: Serving) -> int:
    (record,) = call(server.http_url, "/v2/models/mlp/stats").json["model_stats"]
    return sum(one["compute_infer"]["count"] for one in record["batch_stats"] if one["batch_size"] > 1)


def test_requests_that_share_a_batch_get_their_own_answers(server: Serving, repository: Path) -> None:
    before = shared_batches(server)
    asked = [random_inputs(repository, "mlp", 1, seed=100 + index) for index in range(96)]
    protocols = ["http", "grpc"] * 48

    def shared() -> bool:
        found = list(pool.map(lambda *given: ask(server, given[0], "mlp", given[1]), protocols, asked))
        for inputs, outputs in zip(asked, found, strict=True):
            assert_equal(outputs, plain(repository, "mlp", inputs))
        return shared_batches(server) > before

    with ThreadPoolExecutor(24) as pool:
        until("two meet", shared)  # as a rule at once


def test_more_models_than_memory_each_answers_from_its_own_weights(server: Serving) -> None:
    before = total(server.metrics(), "clockwork_actions_total", action="load", status="ok")
    rng = np.random.default_rng(5)
    for index in [*range(MATRICES), *reversed(range(MATRICES))]:
        x = rng.standard_normal((1, WIDE), dtype=np.float32)
        assert_equal(ask(server, "http", f"m{index}", {"x": x}), {"y": product(index, x)})
    loads = total(server.metrics(), "clockwork_actions_total", action="load", status="ok") - before
    assert loads >= 1


def test_json_is_answered_in_json(server: Serving) -> None:
    response = call(server.http_url, "/v2/models/moody/infer", x_json([1.0, 2.0, 3.0, 4.0], id="mine"))
    assert response.status == 200
    assert response.json["id"] == "mine"
    (output,) = response.json["outputs"]
    assert output["data"] == [1.0, 2.0, 3.0, 4.0]


def ready(client: Any, model: str) -> bool:
    """Servers of this protocol say either that an unknown model is not ready, or that there is none."""
    try:
        return bool(client.is_model_ready(model))
    except InferenceServerException as error:
        if error.status() != "StatusCode.NOT_FOUND":
            raise
        return False


def test_health_metadata_config_and_index(server: Serving) -> None:
    with http_client(server) as client, tritonclient.grpc.InferenceServerClient(server.grpc_url) as stub:
        for one in (client, stub):
            assert one.is_server_live()
            assert one.is_server_ready()
            assert one.is_model_ready("mlp")
            assert not ready(one, "nosuch")
        metadata = client.get_model_metadata("m0")
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, WIDE]}]
        assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, LONG]}]
        assert stub.get_model_metadata("m0").inputs[0].shape == [-1, WIDE]
        assert client.get_model_config("mlp")["max_batch_size"] == 16
        assert stub.get_model_config("mlp").config.max_batch_size == 16
        states = {one["name"]: one for one in client.get_model_repository_index()}
    assert states["mlp"]["state"] == "READY"
    assert states["corrupt"]["state"] == states["badconfig"]["state"] == "UNAVAILABLE"
    assert "model.onnx" in states["corrupt"]["reason"]
    assert "max_batch_size" in states["badconfig"]["reason"]


def test_statistics_and_metrics_count_what_was_asked(server: Serving) -> None:
    def count() -> tuple[int, float]:
        with http_client(server) as client, tritonclient.grpc.InferenceServerClient(server.grpc_url) as stub:
            (record,) = client.get_inference_statistics("moody")["model_stats"]
            (same,) = stub.get_inference_statistics("moody").model_stats
        assert same.inference_stats.success.count == record["inference_stats"]["success"]["count"]
        ok = total(server.metrics(), "clockwork_model_requests_total", model="moody", outcome="ok")
        return record["inference_stats"]["success"]["count"], ok

    before = count()
    for _ in range(3):
        assert call(server.http_url, "/v2/models/moody/infer", x_json([1.0, 2.0, 3.0, 4.0])).status == 200
    assert count() == (before[0] + 3, before[1] + 3)


def test_a_model_can_be_unloaded_and_loaded(server: Serving) -> None:
    with http_client(server) as client:
        client.unload_model("m29")
        assert not client.is_model_ready("m29")
        assert call(server.http_url, "/v2/models/m29/infer", x_json([0.0] * WIDE)).status in (400, 404)
        client.load_model("m29")
        assert client.is_model_ready("m29")
    x = np.ones((1, WIDE), np.float32)
    assert_equal(ask(server, "grpc", "m29", {"x": x}), {"y": product(29, x)})
