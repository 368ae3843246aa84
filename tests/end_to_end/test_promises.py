"""A promise at the door, over real sockets and processes, by a client's clock."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clockwork_serve.units import ms
from harness import repositories
from harness.http_load import Sample, Shot, infer_message, open_loop, poisson, reason_of, run
from harness.serving import Serving, total
from tests.end_to_end.conftest import call, x_json
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]
X = [("x", "FP32", (1, 4), bytes(16))]
MODELS = ("a", "b", "c")
INFER_MS = {size: 16 + 4 * size for size in (1, 2, 4, 8)}
SLO_MS, SECONDS, RATE_RPS = 1500, 7.0, 300
"""Three models on one device answer 100 to 166 of these requests a second."""
AT_ONCE_MS = 9.5 + 240
"""The verdict, and what a busy machine may add: a sixth of the SLO, at the end of which the no would come."""


def played(serving: Serving, **parameters: float) -> list[Sample]:
    """The answers to more than the device can do."""
    url, rng = serving.http_url, random.Random(7)
    shots = [
        Shot(at_ns, infer_message(url, rng.choice(MODELS), X, slo_ms=SLO_MS, parameters=dict(parameters)))
        for at_ns in poisson(RATE_RPS, SECONDS, rng)
    ]
    return run(open_loop(url, shots)).samples


@pytest.mark.slow
def test_in_overload_the_no_comes_at_once_and_every_yes_is_kept(
    tmp_path: Path, start: Start, timing: Timing
) -> None:
    for name in MODELS:
        repositories.emulated(tmp_path / "models", name, INFER_MS)
    with start(tmp_path / "models", device="emulated") as serving:
        for name in MODELS:
            assert call(serving.http_url, f"/v2/models/{name}/infer", x_json([0.0] * 4), {}).status == 200
        before = [sample for sample in played(serving) if sample.status == 429]
        samples = played(serving, decide_ms=0)
        metrics = serving.metrics()

    refused = sorted(
        sample.done_ns - sample.sent_ns for sample in samples if reason_of(sample) == "would_miss_deadline"
    )
    good = sum(sample.status == 200 for sample in samples)
    others = {(sample.status, reason_of(sample)) for sample in samples if sample.status not in (200, 429)}
    promised = total(metrics, "clockwork_model_promises_total")
    broken = total(metrics, "clockwork_model_promises_broken_total")
    waited = sorted(sample.done_ns - sample.sent_ns for sample in before)
    # Without a reason it expired before its verdict: a yes that is not kept has one.
    assert others <= {(504, "promise_broken"), (504, "late"), (504, "")}
    assert promised - good <= broken, "and each is counted"
    with timing.judged():
        assert (504, "") not in others
        assert len(refused) > 300 and good > 300
        assert refused[int(0.99 * len(refused))] <= ms(AT_ONCE_MS)
        assert waited[int(0.9 * len(waited))] > 4 * refused[int(0.9 * len(refused))], "half come by a summary"
        assert broken <= promised / 50, "benchmarks.promises asks for a thousandth, on a quiet machine"


def test_a_wrong_time_to_decide_is_named(tmp_path: Path, start: Start) -> None:
    repositories.emulated(tmp_path / "models", "a", INFER_MS)
    with start(tmp_path / "models", device="emulated") as serving:
        body = json.loads(x_json([0.0] * 4))
        for wrong in (-1, "soon", True):
            body["parameters"] = {"decide_ms": wrong}
            answer = call(serving.http_url, "/v2/models/a/infer", json.dumps(body).encode(), {})
            assert answer.status == 400 and "'decide_ms'" in answer.json["error"]
