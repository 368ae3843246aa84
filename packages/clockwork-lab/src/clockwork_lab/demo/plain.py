"""Runs models without a server, in ordinary sessions on one thread, for results to compare with."""

from __future__ import annotations

import importlib.util
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from clockwork_lab.demo.judgement import Send, Tensors
from clockwork_serve.units import NS_PER_MS

RUNS = 7
"""Number of runs for the median of a duration."""


def open_plain(folder: Path) -> Send:
    """A model's version folder as a function: ``model.onnx`` in a session, or the class in ``model.py``."""
    path = folder / "model.onnx"
    return _session(path) if path.is_file() else _python(folder / "model.py")


def _session(path: Path) -> Send:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warnings about third-party files are not for the demo's user
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def send(inputs: Tensors) -> Tensors:
        return dict(zip(names, map(np.asarray, session.run(names, inputs)), strict=True))

    return send


def _python(path: Path) -> Send:
    spec = importlib.util.spec_from_file_location(f"_demo_{path.parent.parent.name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: Any = module.Model()
    model.load(str(path.parent))

    def send(inputs: Tensors) -> Tensors:
        return dict(model.infer(inputs))

    return send


@dataclass(slots=True)
class Recorder:
    """Forwards requests and records them: ``calls[i]`` is the i-th request and its outputs."""

    send: Send
    calls: list[tuple[Tensors, Tensors]] = field(default_factory=list)

    def __call__(self, inputs: Tensors) -> Tensors:
        """Send one request."""
        outputs = self.send(inputs)
        self.calls.append((inputs, outputs))
        return outputs

    def typical_ms(self) -> float:
        """The median duration of the first request, repeated a few times."""
        inputs, _ = self.calls[0]
        durations = []
        for _ in range(RUNS):
            started_ns = time.perf_counter_ns()
            self.send(inputs)
            durations.append((time.perf_counter_ns() - started_ns) / NS_PER_MS)
        return statistics.median(durations)
