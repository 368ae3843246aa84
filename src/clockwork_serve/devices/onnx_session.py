"""ONNX Runtime as the devices use it: one shared allocator, one thread, no spinning, plain error texts."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from clockwork_serve.errors import DeviceError

BFLOAT16: Final = 16
"""ONNX's number for the element type that numpy lacks."""

_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"while running (\w+) node\. Name:'([^']*)'")
_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ [^\[]*?\) ")

Session = Any
Value = Any


@functools.cache
def share_allocator() -> None:
    """Register the process-wide arena that all sessions draw their workspace from; before any session exists.

    One arena for six codes needs a third of the memory of an arena each, at the same speed.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def open_session(path: Path, threads: int, graph: bytes | None = None) -> Session:
    """A session on a model file whose graph is optimised already; DeviceError in one line if it cannot be.

    ``graph`` is what is in the file, where that was read already.
    """
    share_allocator()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised and reported by us, once
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Weights that are not lifted go back to the system on UNLOAD, which the shared arena would not do.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        source = str(path) if graph is None else graph
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DeviceError(
            f"model {path}: cannot be opened: {one_line(error)}; compile the model again"
        ) from error


def one_line(error: Exception) -> str:
    """What ONNX Runtime complains about, without its own file names and codes."""
    text = " ".join(str(error).split())
    node = _NODE.search(text)
    text = text.rpartition("Status Message: ")[2]
    pieces = _PREFIX.split(text)
    text = _SOURCE.sub("", pieces[-1]).strip()
    return f"{node[1]} node {node[2]!r}: {text}" if node else text


def value_of(array: Any, datatype: str) -> Value:
    """An OrtValue on the memory of a contiguous array; the caller keeps the array alive while it is used."""
    if datatype == "BF16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Give the memory of dropped sessions back to the system, which the C library keeps otherwise."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)
