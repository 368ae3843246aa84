"""Reads weights from .safetensors and old .pt/.pth files without running code that a file contains."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

_SAFETENSORS = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8", "HalfStorage": "<f2", "DoubleStorage": "<f8"}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def read_safetensors(content: bytes) -> Arrays:
    """The tensors of a .safetensors file by name. ValueError if it is not one."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("not a safetensors file: its header does not fit into it")
    header = json.loads(content[8 : 8 + length])
    arrays: Arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(content[first:last], _SAFETENSORS[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


class _Storage:
    """A storage that the pickle refers to before its bytes follow."""

    def __init__(self, dtype: str, elements: int) -> None:
        self.dtype, self.elements = np.dtype(dtype), elements
        self.values: npt.NDArray[Any] | None = None


class _Tensor:
    """A view of a storage."""

    def __init__(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> npt.NDArray[Any]:
        values = self.storage.values
        reach = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        if values is None or not 0 < reach <= len(values):
            raise ValueError(f"tensor of shape {self.shape} reaches outside its storage")
        steps = tuple(s * values.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps).copy()


def _rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Builds tensors, ordered dicts and plain data; any other name in the file is an error."""

    def __init__(self, stream: BytesIO, storages: dict[str, _Storage]) -> None:
        super().__init__(stream)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        }
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(f"refused: the file asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, elements, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"refused: persistent id {pid!r}")
        return self._storages.setdefault(str(key), _Storage(dtype, int(elements)))


def read_torch(content: bytes) -> Arrays:
    """The state dict in a file that ``torch.save`` wrote before version 1.6 (a stream of pickles).

    ValueError if it is another format, ``pickle.UnpicklingError`` if it asks for anything but tensors.
    """
    stream, storages = BytesIO(content), dict[str, _Storage]()
    if not content.startswith(b"\x80") or _Unpickler(stream, storages).load() != _TORCH_MAGIC:
        raise ValueError("not a torch file of the stream format")
    _version, _system = (_Unpickler(stream, storages).load() for _ in range(2))
    state = _Unpickler(stream, storages).load()
    for key in _Unpickler(stream, storages).load():
        storage = storages[str(key)]
        elements = int.from_bytes(stream.read(8), "little")
        raw = stream.read(elements * storage.dtype.itemsize)
        if elements != storage.elements or len(raw) != elements * storage.dtype.itemsize:
            raise ValueError(f"torch file: storage {key} is cut short")
        storage.values = np.frombuffer(raw, storage.dtype)
    return {name: tensor.array() for name, tensor in state.items() if isinstance(tensor, _Tensor)}
