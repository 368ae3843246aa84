"""Weights of lifted codes, bound to device memory: where each tensor lies, and the bindings that say so."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.devices.arena import Bytes
from clockwork_serve.devices.base import NUMPY_DTYPES, Array
from clockwork_serve.devices.code_files import read_file
from clockwork_serve.devices.onnx_session import Session, Value, value_of
from clockwork_serve.devices.tensors import nbytes_of
from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Code

BOUND_TENSORS_MAX: Final = 100_000
"""Weights bound at once, over all bindings: each takes about 1 kB; binding it again takes 2 us."""


class Tensor(Struct, frozen=True, kw_only=True):
    """One lifted weight: ``nbytes`` from ``offset`` in the blob. ``dtype`` is OIP's or numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class Index(Struct, frozen=True, kw_only=True):
    """How the blob of every model of one code is laid out."""

    tensors: tuple[Tensor, ...]
    blob_bytes: int


def read_index(code: Code) -> Index:
    """The code's ``index.json``; DeviceError if it is not there or contradicts itself."""
    path = Path(code.path) / "index.json"
    try:
        index = msgspec.json.decode(read_file(code, "index.json"), type=Index)
    except (ValueError, RecursionError, msgspec.DecodeError) as error:
        raise DeviceError(f"code {path}: cannot be read ({error}); compile the model again") from error
    for tensor in index.tensors:
        _, dtype = element_type(tensor.dtype)
        if tensor.offset < 0 or tensor.offset + tensor.nbytes > index.blob_bytes:
            raise DeviceError(
                f"code {path}: {tensor.name}: expected to end by {index.blob_bytes}, found beyond"
            )
        if nbytes_of(tensor.shape, dtype) != tensor.nbytes:
            raise DeviceError(
                f"code {path}: {tensor.name}: expected {nbytes_of(tensor.shape, dtype)} bytes for"
                f" {tensor.shape} {tensor.dtype}, found {tensor.nbytes}"
            )
    return index


def element_type(name: str) -> tuple[str, np.dtype[Any]]:
    """OIP's name and numpy's element type for either's name of it."""
    if name in NUMPY_DTYPES:
        return name, NUMPY_DTYPES[name]
    if name == "bfloat16":
        return "BF16", NUMPY_DTYPES["BF16"]
    try:
        return "", np.dtype(name)
    except TypeError as error:
        raise DeviceError(f"dtype: expected an element type such as FP32, found {name!r}") from error


@dataclass(slots=True)
class Bound:
    """A session with one set of weights bound. ``bound_by`` is who bound the inputs and outputs, to keep."""

    session: Session
    binding: Any
    weights: dict[str, Value]
    arrays: list[Array]  # what the values point to
    bound_by: object = None

    def anew(self) -> Bound:
        """The same weights in a binding of its own, with no input bound."""
        binding = self.session.io_binding()
        for name, value in self.weights.items():
            binding.bind_ortvalue_input(name, value)
        return Bound(self.session, binding, self.weights, self.arrays)


def bind(session: Session, index: Index, memory: Bytes) -> Bound:
    """Bind every weight of the index to its place in ``memory`` (``blob_bytes`` long); nothing is copied."""
    bound = Bound(session, session.io_binding(), {}, [])
    for tensor in index.tensors:
        datatype, dtype = element_type(tensor.dtype)
        array = memory[tensor.offset : tensor.offset + tensor.nbytes].view(dtype).reshape(tensor.shape)
        value = value_of(array, datatype)
        bound.binding.bind_ortvalue_input(tensor.name, value)
        bound.weights[tensor.name] = value
        bound.arrays.append(array)
    return bound


class Bindings:
    """Bindings by (code, first page), the least recently used dropped first. Used by both lanes."""

    def __init__(self, tensors_max: int = BOUND_TENSORS_MAX) -> None:
        self._tensors_max = tensors_max
        self._tensors = 0  # the weights in all bindings held
        self._bound_by_place: OrderedDict[tuple[str, int], Bound] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, code_id: str, page: int) -> Bound | None:
        """The binding of a code at a page, if it is held."""
        with self._lock:
            bound = self._bound_by_place.get((code_id, page))
            if bound is not None:
                self._bound_by_place.move_to_end((code_id, page))
            return bound

    def put(self, code_id: str, page: int, bound: Bound) -> None:
        """Hold a binding."""
        with self._lock:
            self._forget((code_id, page))
            self._bound_by_place[code_id, page] = bound
            self._tensors += len(bound.arrays)
            while self._tensors > self._tensors_max and len(self._bound_by_place) > 1:
                self._forget(next(iter(self._bound_by_place)))

    def retire(self, code_id: str) -> None:
        """Forget every binding of a code."""
        with self._lock:
            for place in [place for place in self._bound_by_place if place[0] == code_id]:
                self._forget(place)

    def __len__(self) -> int:
        return len(self._bound_by_place)

    def _forget(self, place: tuple[str, int]) -> None:
        bound = self._bound_by_place.pop(place, None)
        if bound is not None:
            self._tensors -= len(bound.arrays)
