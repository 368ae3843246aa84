"""Models whose memory or durations nobody knows beforehand: tried or refused, and others never suffer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from clockwork_serve.units import KIB, MIB
from harness import repositories
from harness.serving import Serving
from tests.end_to_end.conftest import PATIENT_SLO_MS, call, x_json

Start = Callable[..., AbstractContextManager[Serving]]
ONE_PAGE = 256 * KIB


def sequence(rows: int) -> np.ndarray:
    """As many rows of eight numbers."""
    return np.sin(np.arange(8.0 * rows)).reshape(rows, 8)


def attended(x: np.ndarray) -> np.ndarray:
    """What self-attention over a sequence answers."""
    scores = np.exp(x @ x.T)
    return scores / scores.sum(axis=1, keepdims=True) @ (x / (1 + np.exp(-x)))


def asked(serving: Serving, model: str, rows: int, slo_ms: float = PATIENT_SLO_MS):  # type: ignore[no-untyped-def]
    """A model's answer to a sequence."""
    body = x_json(sequence(rows).ravel().tolist(), [rows, 8])
    return call(serving.http_url, f"/v2/models/{model}/infer", body, {"x-slo-ms": f"{slo_ms:g}"})


def test_a_short_sequence_is_answered_within_its_deadline(tmp_path: Path, start: Start):
    repositories.self_attention(tmp_path / "models", "attention")
    repositories.layers(tmp_path / "models", "innocent", width=8, depth=1)
    with start(tmp_path / "models", memory_bytes=ONE_PAGE) as serving:
        for rows in (2, 3, 300, 2):
            answer = asked(serving, "attention", rows, slo_ms=4000)
            assert answer.status == 200, answer.json
            found = np.reshape(answer.json["outputs"][0]["data"], (rows, 8))
            np.testing.assert_allclose(found, attended(sequence(rows)), rtol=1e-3, atol=1e-5)
            assert asked(serving, "innocent", 1).status == 200


def test_a_model_without_room_is_refused_with_what_to_set_and_others_are_served(tmp_path: Path, start: Start):
    repositories.self_attention(tmp_path / "models", "greedy", scratch=4096)
    for name in ("innocent", "harmless"):
        repositories.layers(tmp_path / "models", name, width=8, depth=1)
    with start(tmp_path / "models", memory_bytes=ONE_PAGE, workspace=32 * MIB) as serving:
        for _ in range(3):
            answer = asked(serving, "greedy", 2)
            assert (answer.status, answer.json["reason"]) == (500, "unservable"), answer.json
            assert "set scratch_memory to at least" in answer.json["error"]
            assert call(serving.http_url, "/v2/models/greedy/ready").status == 503
            assert [asked(serving, name, 1).status for name in ("innocent", "harmless")] == [200, 200]
