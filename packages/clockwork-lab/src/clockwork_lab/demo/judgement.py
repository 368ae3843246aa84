"""How the demo judges answers: by what is known to be right, and by sessions without a server."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from clockwork_serve.units import NS_PER_MS

Tensors = dict[str, npt.NDArray[Any]]
Send = Callable[[Tensors], Tensors]
"""Sends one request (batch axis included where the model has one) and returns its outputs by name."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A model's result in words, and whether it is the known right one."""

    answer: str
    ok: bool


def relative_error(found: Tensors, expected: Tensors) -> float:
    """The largest of max|a - b| / max|b| over the outputs; infinite if names, shapes or texts differ."""
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, wanted in expected.items():
        got = found[name]
        if wanted.dtype.kind not in "fiub":
            worst = worst if got.shape == wanted.shape and _texts(got) == _texts(wanted) else float("inf")
            continue
        if got.shape != wanted.shape or not np.all(np.isfinite(got)):
            return float("inf")
        scale = float(np.max(np.abs(wanted), initial=0.0))
        gap = float(np.max(np.abs(got.astype(np.float64) - wanted.astype(np.float64)), initial=0.0))
        worst = max(worst, gap / scale if scale > 0 else gap)
    return worst


def _texts(array: npt.NDArray[Any]) -> list[bytes]:
    return [text.encode() if isinstance(text, str) else bytes(text) for text in array.reshape(-1).tolist()]


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """The cosine between two vectors."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


# ------------------------------------------------------------
# Models without a server: ordinary sessions on one thread, for results to compare with.


RUNS = 7  # number of runs for the median of a duration


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
class RecordedSend:
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
