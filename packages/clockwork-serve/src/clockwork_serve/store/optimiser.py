"""Opens ONNX Runtime sessions and optimises graphs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from clockwork_serve.store.settings import problem
from clockwork_serve.store.trial import RunError

Array = npt.NDArray[Any]
LARGEST_MODEL = (1 << 31) - 1  # bytes that one protobuf message may have

_SLOWER = ["SkipLayerNormFusion"]
"""Fusions that are slower on the CPU than the operators they replace (231 us, not 53, for 128 x 384)."""
_PLACE = re.compile(r"/\S+\.(?:cc|h):\d+ .*?\) (?=[A-Z])")  # file, line and signature
_SILENT = 4  # only fatal messages: what fails is reported by us, in words an operator can use


class Session:
    """A graph ready to run on the CPU, on one thread."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs in the graph's order. Raises ``RunError``."""
        try:
            return [np.asarray(output) for output in self._session.run(None, dict(inputs))]
        except Exception as error:  # ONNX Runtime has no common base class for what its kernels raise
            raise RunError(str(error)) from error

    def output_shapes(self) -> list[list[int | str | None]]:
        """The output shapes as far as shape inference knows them."""
        return [list(output.shape) for output in self._session.get_outputs()]


class Optimiser:
    """Optimises graphs for this CPU. ``runs`` counts the optimisations.

    ``block``: channels in a block of the runtime's layout for convolutions, 0 if unknown.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.block = channel_block()
        self._lock = threading.Lock()

    def optimise(self, model: bytes) -> tuple[Session, bytes]:
        """The session of ``model`` at the highest level, and the optimised model. Raises ``ProblemError``."""
        with self._lock:
            self.runs += 1
        descriptor = os.memfd_create("optimised", os.MFD_CLOEXEC)
        try:
            options = _options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
            options.optimized_model_filepath = f"/proc/self/fd/{descriptor}"
            session = _open(model, options, disabled=_SLOWER)
            size = os.fstat(descriptor).st_size
            optimised = b""
            while len(optimised) < size:
                optimised += os.pread(descriptor, size - len(optimised), len(optimised))
        finally:
            os.close(descriptor)
        return Session(session), optimised


def open_plain(model: bytes) -> Session:
    """A session as anyone opens a model's file, with all that ONNX Runtime does by default."""
    return Session(_open(model, _options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)))


def open_optimised(model: bytes) -> Session:
    """A session of an already optimised model, as a device opens it. Raises ``ProblemError``."""
    return Session(_open(model, _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)))


def _options(level: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = level
    options.log_severity_level = _SILENT
    return options


def _open(model: bytes, options: Any, *, disabled: Sequence[str] = ()) -> Any:
    try:
        return ort.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except Exception as error:  # see Session.run
        raise problem(
            "model.onnx", expected="a model that ONNX Runtime opens", found=_first_line(error),
            advice=f"check it with onnx.checker and ONNX Runtime {ort.__version__}",
        ) from error  # fmt: skip


def _first_line(error: Exception) -> str:
    """What the runtime says, without the place in its source code, which would fill the message."""
    lines = str(error).strip().splitlines()
    return _PLACE.sub("", lines[0]) if lines else type(error).__name__


@contextlib.contextmanager
def readable_names() -> Iterator[None]:
    """Around code that reads a model's names: names that are not UTF-8 become a problem."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise problem(
            "model.onnx", expected="names in UTF-8", found=f"a name of other bytes ({error})",
            advice="the file is corrupt: copy it again",
        ) from None  # fmt: skip


def parse_model(data: bytes | memoryview) -> onnx.ModelProto:
    """A model from its bytes. Raises ``ProblemError`` if they are not a model."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(data))
    except Exception as error:  # protobuf's DecodeError; its module differs between implementations
        raise problem(
            "model.onnx", expected="an ONNX model", found=f"{len(data)} bytes that are not one ({error})",
            advice="the file is truncated or corrupt: copy it again",
        ) from error  # fmt: skip
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise problem(
            "model.onnx", expected="an ONNX model", found=f"{len(data)} bytes without a graph",
            advice="the file is empty, truncated or of another kind: copy it again",
        )  # fmt: skip
    return model


def runtime_fingerprint() -> dict[str, str]:
    """What artefacts depend on beside their model: the runtime's build and the CPU's instruction sets."""
    return {
        "onnxruntime": ort.__version__,
        "build": ort.get_build_info(),
        "machine": platform.machine(),
        "cpu_flags": hashlib.sha256(_cpu_flags().encode()).hexdigest(),
    }


def channel_block(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """Channels in a block of the runtime's layout for convolutions; 0 on CPUs where it is unknown."""
    words = set(_cpu_flags(cpuinfo).replace("'", " ").split())
    return 16 if "avx512f" in words else 8 if "avx2" in words else 0


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model and flags; the layout of convolution weights depends on the vector width."""
    wanted = ("flags", "Features", "model name", "vendor_id", "CPU part")
    lines: Sequence[str] = ()
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found.setdefault(key.strip(), " ".join(sorted(value.split())))
    return repr(sorted(found.items()))
