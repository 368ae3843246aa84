"""A cache damaged while it is served from: no wrong answer, and the model is served again without restart."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.units import MIB
from harness import repositories
from harness.serving import Serving, serve, until
from tests.end_to_end.conftest import call, x_json

WIDE, LONG = 256, 64
MODELS = 4
SLO = {"slo_ms": 20000}
REPAIR_S = 60.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four matrices, of which a device holds one or two at a time."""
    made = tmp_path / "models"
    for index in range(MODELS):
        repositories.one_matrix(made, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def serving(root: Path, cache: Path) -> Iterator[Serving]:
    with serve(root, cache=cache, memory_bytes=MIB // 2) as started:
        yield started


def right(serving: Serving, index: int) -> bool:
    """Ask a model; whether it answered well. A wrong answer fails the test."""
    x = np.linspace(-1.0, 1.0, WIDE, dtype=np.float32)
    response = call(
        serving.http_url, f"/v2/models/m{index}/infer", x_json([float(each) for each in x], parameters=SLO)
    )
    if response.status != 200:
        assert response.json["error"], response
        return False
    wanted = x @ repositories.matrix_of(index, WIDE, LONG)
    np.testing.assert_allclose(response.json["outputs"][0]["data"], wanted.ravel(), rtol=1e-4, atol=1e-5)
    return True


def all_right(serving: Serving) -> bool:
    """Whether all models answer well; each is asked."""
    answers = [right(serving, index) for index in range(MODELS)]
    return all(answers)


def blobs(cache: Path) -> list[Path]:
    return sorted(cache.glob("v*/weights/*/*.bin"))


def metric(serving: Serving, name: str) -> float:
    text = call(serving.server.metrics_url.removesuffix("/metrics"), "/metrics").json.decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_weights_damaged_while_others_are_resident_are_made_again(serving: Serving, cache: Path) -> None:
    assert all_right(serving)
    for path in blobs(cache):
        path.write_bytes(bytes(path.stat().st_size))
    until("all is right", lambda: all_right(serving), REPAIR_S)
    until("it is counted", lambda: metric(serving, "clockwork_cache_damaged_total") >= MODELS - 2)
    until("it is counted", lambda: metric(serving, "clockwork_cache_artefacts_remade_total") >= MODELS - 2)
    assert list(cache.glob("v*/damaged/*-weights-*"))


def test_damage_done_while_it_is_stopped_is_mended_by_a_start(root: Path, cache: Path) -> None:
    with serve(root, cache=cache, memory_bytes=MIB // 2) as first:
        assert all_right(first)
    for path in blobs(cache):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    for record in [*cache.glob("v*/compiled/*.json"), *cache.glob("v*/seen/*.json")]:
        record.write_bytes(record.read_bytes().replace(b"1", b"2"))
    for graph in cache.glob("v*/codes/*/model.onnx"):
        graph.write_bytes(graph.read_bytes()[:-10])
    with serve(root, cache=cache, memory_bytes=MIB // 2) as second:
        until("all is right", lambda: all_right(second), REPAIR_S)


def test_a_code_damaged_while_it_serves_is_made_again_for_a_worker_that_starts(
    serving: Serving, cache: Path
) -> None:
    assert all_right(serving)
    for graph in cache.glob("v*/codes/*/index.json"):
        graph.write_bytes(graph.read_bytes().replace(b"0", b"1"))
    pid = serving.worker_pid()
    os.kill(pid, signal.SIGKILL)
    until("all is right", lambda: all_right(serving), REPAIR_S)
    until("it is counted", lambda: metric(serving, 'clockwork_cache_damaged_total{what="code"}') == 1)


def test_what_cannot_be_made_again_is_a_named_problem_and_others_are_served(
    serving: Serving, root: Path, cache: Path
) -> None:
    assert all_right(serving)
    for index in (0, 1):
        shutil.move(root / f"m{index}", root.parent / f"kept{index}")
    for path in blobs(cache):
        path.write_bytes(b"torn")

    def mended() -> bool:
        for number in range(MODELS):
            right(serving, number)
        return right(serving, 2) and right(serving, 3) and metric(serving, "clockwork_cache_models_lost") > 0

    until("others are right", mended, REPAIR_S)
    index = {entry["name"]: entry for entry in call(serving.http_url, "/v2/repository/index", b"{}").json}
    lost = [name for name in ("m0", "m1") if index[name]["state"] == "UNAVAILABLE"]
    assert lost
    assert "none of that name" in index[lost[0]]["reason"]
    for number in (0, 1):
        shutil.move(root.parent / f"kept{number}", root / f"m{number}")
        assert call(serving.http_url, f"/v2/repository/models/m{number}/load", b"{}").status == 200
    until("all is right", lambda: all_right(serving), REPAIR_S)
