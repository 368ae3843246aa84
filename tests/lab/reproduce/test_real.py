"""The figures that run on this machine's CPU device, in their short forms. No duration is asserted."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from clockwork_lab.reproduce.fig2 import (
    CLASSES,
    INPUT_SHAPE,
    THREADS,
    ModelLane,
    compile_models,
    fig2,
    write_model,
)
from clockwork_lab.reproduce.fig10 import KINDS, fig10
from clockwork_lab.reproduce.figure import Figure, SeriesRole
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.devices import DeviceConfig, build
from clockwork_serve.units import MIB


def ours(figure: Figure, panel: str) -> list[float | None]:
    found = next(each for each in figure.panels if each.name == panel)
    series = next(each for each in found.series if each.role is SeriesRole.REAL)
    return [point.y for point in series.points]


def test_models_share_a_code_and_run_on_the_device(tmp_path: Path):
    path = write_model(tmp_path / "models", "a", 1)
    write_model(tmp_path / "models", "b", 2)
    first, second = compile_models(tmp_path / "models", tmp_path / "cache")

    assert first.code.code_id == second.code.code_id
    assert first.code.lifted
    assert first.model.weights.weights_id != second.model.weights.weights_id
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.ones((2, *INPUT_SHAPE), np.float32)})
    assert answer.shape == (2, CLASSES)
    device = build(DeviceConfig(device="cpu:0", memory_bytes=64 * MIB))
    try:
        lane = ModelLane(device, first)
        lane.infer()
        lane.infer()
    finally:
        device.close()


@pytest.mark.slow
def test_fig2_measures_alone_and_in_a_crowd():
    before = os.sched_getaffinity(0)
    figure = fig2(FigureRun(short=True))

    assert os.sched_getaffinity(0) == before
    assert ours(figure, "isolated runs")[0] == pytest.approx(1.0)
    throughput = ours(figure, "throughput, threads at once")
    assert len(throughput) == len(THREADS)
    assert throughput[0] == 1.0
    assert "constants of the simulated world" not in figure.setup


@pytest.mark.system
def test_fig10_reads_errors_from_a_real_servers_journal():
    figure = fig10(FigureRun(short=True))

    for kind in KINDS:
        assert f" {kind}s" in figure.setup["experiment"]
        assert f" 0 {kind}s" not in figure.setup["experiment"]
        assert ours(figure, f"{kind} duration")
        assert ours(figure, f"{kind} completion")
    infers = re.search(r"([\d,]+) INFERs", figure.setup["experiment"])
    assert infers is not None
    enough = int(infers[1].replace(",", "")) >= 100  # a busy machine runs fewer, of which there is no p99
    for claim in figure.claims:
        if claim.name.startswith("INFER"):
            assert (claim.ours is not None) == enough
