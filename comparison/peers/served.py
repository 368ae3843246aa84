"""The models as every server of the comparison runs them, in that server's own Python: one thread.

It needs only numpy, and onnxruntime for networks. The models are listed in the JSON file that the environment
variable ``PEER_MODELS`` names.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

BASE_MS: Final = 16.0
EACH_MS: Final = 4.0
DEVICE: Final = "gpu_like"
WIDTH: Final = 4
Run = Callable[[Any], Any]
"""A batch in, a batch out."""


@cache
def plan() -> dict[str, Any]:
    """What this server serves: ``kind``, ``slo_ms``, ``batch``, ``lock``, ``log``, ``models``, ``more``."""
    found: dict[str, Any] = json.loads(Path(os.environ["PEER_MODELS"]).read_text())
    return found


def names() -> list[str]:
    """The models."""
    return list(plan()["models"])


def shape() -> tuple[int, ...]:
    """Of one input, without the batch."""
    return tuple(plan()["shape"])


def load(name: str) -> Run:
    """One model, ready."""
    found = plan()
    where = found["models"][name]
    return Device(found["lock"], found["log"], where) if found["kind"] == DEVICE else Network(where)


def array(body: bytes | bytearray | memoryview) -> Any:
    """A batch of the bytes of FP32 inputs."""
    return np.frombuffer(body, np.float32).reshape(-1, *shape())


class Network:
    """A session of ONNX Runtime on one thread, as the documentation of most servers shows it."""

    def __init__(self, path: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, batch: Any) -> Any:
        """Run it."""
        return self._session.run(None, {"x": np.ascontiguousarray(batch)})[0]


class Device:
    """A model on a device that all models share: it takes its time, uses no core, and adds ``offset``.

    The device is a lock on a file, so that it is one device for all threads and processes of a server. Every
    execution is written to ``log``: rows, and the milliseconds it should have taken and took.
    """

    def __init__(self, lock: str, log: str, offset: float) -> None:
        self._lock = lock
        self._offset = np.float32(offset)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, batch: Any) -> Any:
        """Run it."""
        wanted_ms = exec_ms(len(batch))
        # Each call opens the file: a lock belongs to what was opened, so threads exclude one another too.
        device = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(device, fcntl.LOCK_EX)
            began_s = time.monotonic()
            time.sleep(wanted_ms / 1e3)
            took_ms = (time.monotonic() - began_s) * 1e3
        finally:
            os.close(device)
        os.write(self._log, f"{len(batch)} {wanted_ms:g} {took_ms:.3f}\n".encode())
        return batch + self._offset


def exec_ms(rows: int) -> float:
    """What a batch takes on the device."""
    return BASE_MS + EACH_MS * rows
