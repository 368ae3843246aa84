"""Models that are a user's class, ``Model`` in ``model.py``; whatever they return is validated.

    class Model:
        def load(self, path: str) -> None: ...
        def infer(self, inputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]: ...
        def unload(self) -> None: ...

Arrays have the batch on axis 0 if the code is batched (the rows of the calls, not padded). Inputs are
read-only. Code of this kind holds the GIL while it runs Python, so durations vary with other threads.

A user's code is called by :func:`_call_user_code` only, which turns any exception into a :class:`ModelError`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from clockwork_serve.devices.arena import Arena
from clockwork_serve.devices.base import (
    NUMPY_DTYPES,
    Array,
    CallBuffers,
    DeviceConfig,
    Phases,
    PreparedCodes,
    fits,
    forget_outputs,
    full_shape,
    gather,
    rows_of,
    write_outputs,
)
from clockwork_serve.errors import DeviceError, ModelError, described
from clockwork_serve.messages import Code, Infer, Load, TensorSpec, Unload

_Found = TypeVar("_Found")


@dataclass(slots=True)
class PreparedPython:
    """A code whose module is imported."""

    code: Code
    module: ModuleType


class PythonBackend:
    """Runs codes of backend ``python``; their memory is accounted for in pages, which remain unused."""

    def __init__(self, config: DeviceConfig, arena: Arena) -> None:
        self._device = config.device
        self._arena = arena
        self._prepared = PreparedCodes[PreparedPython](config.device)
        self._model_by_page: dict[int, tuple[str, Any]] = {}

    def prepare(self, code: Code) -> None:
        """Import ``model.py``; DeviceError if that fails, or it has no usable ``Model``."""
        if code.code_id in self._prepared:
            return
        path = Path(code.path) / "model.py"
        module = _import(path, _module_name(code.code_id))
        try:
            _call_user_code(str(path), lambda: _check_class(module))
        except ModelError:
            sys.modules.pop(_module_name(code.code_id), None)
            raise
        self._prepared[code.code_id] = PreparedPython(code, module)

    def retire(self, code_id: str) -> None:
        """Delete the module and its models."""
        if self._prepared.pop(code_id, None) is None:
            return
        for page in [page for page, (owner, _) in self._model_by_page.items() if owner == code_id]:
            _unload(self._model_by_page.pop(page)[1])
        sys.modules.pop(_module_name(code_id), None)

    def load(self, action: Load) -> int:
        """Create a model and have it load its files, which are not verified."""
        prepared = self._prepared[action.code_id]
        self._arena.view(action.extent, 0)
        _, before = self._model_by_page.pop(action.extent.first, ("", None))
        if before is not None:
            _unload(before)

        def made() -> Any:
            model = prepared.module.Model()
            model.load(action.weights.path)
            return model

        model = _call_user_code(f"model {action.model}: load", made)
        self._model_by_page[action.extent.first] = (action.code_id, model)
        return 0

    def unload(self, action: Unload) -> None:
        """Unload and delete the model."""
        _, model = self._model_by_page.pop(action.extent.first, ("", None))
        if model is not None:
            _unload(model)

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch: all rows of the calls at once."""
        started = time.monotonic_ns()
        code = self._prepared[action.code_id].code
        rows = rows_of(code, action, calls)
        owner, model = self._model_by_page.get(action.extent.first, ("", None))
        if model is None or owner != action.code_id:
            raise DeviceError(
                f"model {action.model}: not loaded at page {action.extent.first} of {self._device}"
            )
        inputs = _inputs(code, calls, rows)
        gathered = time.monotonic_ns()
        found = _call_user_code(f"model {action.model}", lambda: model.infer(inputs))
        ran = time.monotonic_ns()
        _write(action.model, code, found, calls, rows)
        return Phases(gathered - started, ran - gathered, time.monotonic_ns() - ran)

    def close(self) -> None:
        """Unload every model."""
        for code_id in list(self._prepared):
            self.retire(code_id)


def _inputs(code: Code, calls: Sequence[CallBuffers], rows: Sequence[int]) -> dict[str, Array]:
    inputs = {}
    for spec in code.inputs:
        if spec.optional and all(spec.name not in call.inputs for call in calls):
            continue
        arrays = gather(code, spec, calls, rows)
        array = arrays[0].view() if len(arrays) == 1 else np.concatenate(arrays)
        array.flags.writeable = False  # it may be the client's memory
        inputs[spec.name] = array
    return inputs


def _write(model: str, code: Code, found: object, calls: Sequence[CallBuffers], rows: Sequence[int]) -> None:
    """Check what the model returned and copy it into the calls' rooms."""
    names = [spec.name for spec in code.outputs]
    returned, what = _call_user_code(f"model {model}", lambda: _returned(found, code.outputs))
    if returned is None:
        raise ModelError(f"model {model}: expected a dict with outputs {names}, found {what}")
    total = sum(rows)
    arrays = [_checked(model, code, spec, returned[spec.name], total) for spec in code.outputs]
    try:
        write_outputs(code, arrays, total, calls, rows)
    except DeviceError:
        forget_outputs(calls)
        raise


def _returned(found: object, specs: Sequence[TensorSpec]) -> tuple[dict[str, Array] | None, str]:
    """A model's results as plain arrays, strings as bytes; None and a description if they are invalid.

    Converting an object to an array calls its methods, so this may run user code.
    """
    if not isinstance(found, dict):
        return None, type(found).__name__
    if not {spec.name for spec in specs} <= found.keys():
        return None, str(sorted(map(str, found)))
    arrays = {spec.name: np.asarray(found[spec.name]) for spec in specs}
    return arrays | {spec.name: _plain(arrays[spec.name]) for spec in specs if spec.datatype == "BYTES"}, ""


def _plain(array: Array) -> Array:
    """Strings as bytes."""
    if array.dtype.kind not in "OU":
        return array
    elements = array.ravel().tolist()
    if set(map(type, elements)) <= {bytes}:
        return array
    strings = np.empty(array.size, dtype=object)
    strings[:] = [_bytes(element) for element in elements]
    return strings.reshape(array.shape)


def _bytes(element: object) -> bytes:
    if isinstance(element, str):
        return element.encode()
    if isinstance(element, bytes | bytearray | memoryview):
        return bytes(element)
    raise TypeError(f"expected bytes or str as elements, found {type(element).__name__}")


def _checked(model: str, code: Code, spec: TensorSpec, array: Array, rows: int) -> Array:
    expected = full_shape(code, spec, rows)
    strings = spec.datatype == "BYTES" and array.dtype.kind in "OS"
    if not strings and array.dtype != NUMPY_DTYPES[spec.datatype]:
        raise ModelError(
            f"model {model}: output {spec.name}: expected {NUMPY_DTYPES[spec.datatype]} ({spec.datatype}),"
            f" found {array.dtype}"
        )
    if not fits(expected, array.shape):
        raise ModelError(f"model {model}: output {spec.name}: expected shape {expected}, found {array.shape}")
    return array


def _import(path: Path, name: str) -> ModuleType:
    """Import a file under a private name, so that models cannot shadow each other or a library."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise DeviceError(f"{path}: expected a Python file, found none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _call_user_code(str(path), partial(spec.loader.exec_module, module))
    except ModelError:
        sys.modules.pop(name, None)
        raise
    return module


def _module_name(code_id: str) -> str:
    return f"_clockwork_model_{code_id}"


def _check_class(module: ModuleType) -> None:
    model = getattr(module, "Model", None)
    for name in ("load", "infer", "unload"):
        if not callable(getattr(model, name, None)):
            raise TypeError(f"expected a class Model with load, infer and unload, found no {name}")


def _unload(model: Any) -> None:
    """Call a model's ``unload``; errors are ignored, as the model is deleted anyway."""
    try:
        _call_user_code("unload raised", lambda: model.unload())  # noqa: PLW0108 - to look it up is foreign code, too
    except ModelError as error:
        logging.getLogger(__name__).warning("%s", error)


def _call_user_code(who: str, call: Callable[[], _Found]) -> _Found:
    """Call a user's code. Raises only :class:`ModelError`, with the text of what was raised."""
    pid = os.getpid()
    try:
        return call()
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a model is no reason to end a lane
        message = described(error)
    finally:
        if os.getpid() != pid:
            # It forked, and this is the child: it may not act as a second worker.
            os._exit(0)
    raise ModelError(f"{who}: {message}")
