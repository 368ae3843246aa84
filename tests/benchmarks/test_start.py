"""The benchmark of a start: what it takes for a right answer, and what it judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks import start
from harness import repositories


@pytest.mark.parametrize("kind", [0, start.WIDTHS - 1, 3 * start.WIDTHS + 5])
def test_the_right_answer_is_a_plain_session_s(tmp_path: Path, kind: int) -> None:
    width, depth = start.shape_of(kind)
    repositories.layers(tmp_path, "m7", width=width, depth=depth, seed=7)
    session = onnxruntime.InferenceSession(tmp_path / "m7" / "1" / "model.onnx")
    (found,) = session.run(None, {"x": np.ones((1, width), np.float32)})
    np.testing.assert_allclose(start.wanted(7, kind), found, rtol=1e-4, atol=1e-5)


def test_every_promise_can_be_missed() -> None:
    seen = start.Seen(live_s=2.0, ready_s=100.0, probes=9, steps=[(3.0, 0), (50.0, 4)])
    good = start.Found(seen, first_s=8.0, asked_s=[5.0], answered_s=110.0, wrong=[], profiles=3)
    assert start.judged(good, models=5, graphs=3).verdict == "passed"
    bad = [
        replace(good, seen=replace(seen, live_s=11.0)),
        replace(good, seen=replace(seen, failed=["503 after 0.01 s"])),
        replace(good, seen=replace(seen, ready_s=0.0)),
        replace(good, seen=replace(seen, steps=[(3.0, 4), (50.0, 0)])),
        replace(good, first_s=21.0),
        replace(good, asked_s=[5.0, 21.0]),
        replace(good, wrong=["m1: 404"]),
        replace(good, profiles=5),
    ]
    for one in bad:
        found = start.judged(one, models=5, graphs=3)
        assert [verdict.good for verdict in found.verdicts].count(False) == 1
