"""Known graphs whose outputs have the shapes that values of a request give them, on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from benchmarks.rows.asking import as_served
from harness.serving import Serving
from qa.cases.known import standard_cases
from qa.cases.standard import SHORT, SHORT_MODULES
from tests.end_to_end.asking import ask
from tests.end_to_end.conftest import call
from tests.store import graphs

OPTIONAL = 'max_batch_size: 0\ninput { name: "k" data_type: TYPE_FP32 dims: 32 optional: true }\n'
Start = Callable[..., AbstractContextManager[Serving]]


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return {made.name: made for made in standard_cases(SHORT_MODULES) if made.name in SHORT}


@pytest.fixture(scope="module")
def server(
    cases: dict[str, Any], start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("standard") / "models"
    for name, made in cases.items():
        put(root / name, made.model)
    put(root / "scaled", graphs.scaled())
    (root / "scaled" / "config.pbtxt").write_text(OPTIONAL)
    with start(root) as serving:
        yield serving


def put(folder: Path, model: onnx.ModelProto) -> None:
    (folder / "1").mkdir(parents=True)
    onnx.save(model, folder / "1" / "model.onnx")


def plain(model: onnx.ModelProto, inputs: dict[str, Any]) -> dict[str, Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("name", SHORT)
def test_a_standard_case_is_answered_as_by_a_plain_session(
    server: Serving, cases: dict[str, Any], protocol: str, name: str
) -> None:
    (given, _), *_ = cases[name].data_sets
    inputs = {
        value.name: np.asarray(array)
        for value, array in zip(cases[name].model.graph.input, given, strict=True)
    }
    found = ask(server, protocol, name, inputs)
    for output, wanted in plain(cases[name].model, inputs).items():
        assert found[output].shape == wanted.shape
        if wanted.dtype == object:
            assert found[output].tolist() == as_served(wanted).tolist()
        else:
            np.testing.assert_allclose(found[output], wanted, rtol=1e-5)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_each_request_says_how_many_of_the_largest_it_wants(
    server: Serving, cases: dict[str, Any], protocol: str
) -> None:
    x = np.random.default_rng(1).random((3, 4), np.float32)
    for count in (1, 4, 2, 3):
        inputs = {"x": x, "k": np.array([count], np.int64)}
        found = ask(server, protocol, "test_top_k", inputs)
        wanted = plain(cases["test_top_k"].model, inputs)
        assert {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in wanted.items()
        }


def test_an_open_dimension_is_shown_as_one(server: Serving) -> None:
    metadata = call(server.http_url, "/v2/models/test_top_k").json
    assert [one["shape"] for one in metadata["outputs"]] == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_optional_input_of_a_graph_may_be_left_out(server: Serving, protocol: str) -> None:
    x = np.arange(32, dtype=np.float32)
    assert ask(server, protocol, "scaled", {"x": x})["y"].tolist() == (x * 3 + 5).tolist()
    assert ask(server, protocol, "scaled", {"x": x, "k": x})["y"].tolist() == (x * x + 5).tolist()
    assert ask(server, protocol, "scaled", {"x": x})["y"].tolist() == (x * 3 + 5).tolist()
