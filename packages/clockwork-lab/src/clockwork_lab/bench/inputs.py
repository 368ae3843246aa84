"""The tensors of requests, generated to match a model's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import Struct

from clockwork_client.datatypes import encode_strings
from clockwork_client.tensors import DTYPES
from clockwork_serve.errors import ConfigError

Shape = tuple[int, ...]
WORD_BYTES: Final = 8
"""Length of each random element of BYTES."""
_SHAPE: Final = re.compile(r"(?:(?P<model>[^:]+):)?(?P<name>[^:]+):(?P<dims>\d+(?:,\d+)*)")


class TensorInfo(Struct, frozen=True):
    """An input as a server describes it; -1 is any size."""

    name: str
    datatype: str
    shape: Shape


class Tensor(Struct, frozen=True):
    """An input as it is sent."""

    name: str
    datatype: str
    shape: Shape
    data: bytes


def read_shapes(given: Sequence[str]) -> dict[tuple[str, str], Shape]:
    """``[MODEL:]INPUT:1,3,224,224`` by (model or "", input). Raises :class:`ConfigError`."""
    shapes = {}
    for text in given:
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise ConfigError(f"shape: expected [MODEL:]INPUT:1,3,224,224, found {text!r}; correct it")
        dims = tuple(int(size) for size in found["dims"].split(","))
        shapes[found["model"] or "", found["name"]] = dims
    return shapes


class Data:
    """The source of values: ``random``, ``zeros``, or a numpy file (.npy: the only input; .npz: by name).

    Raises :class:`ConfigError`.
    """

    def __init__(self, source: str, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._arrays: dict[str, np.ndarray] = {}
        self._made: dict[tuple[str, str, Shape], bytes] = {}
        if source not in ("random", "zeros"):
            self._read(Path(source))

    def _read(self, path: Path) -> None:
        wanted = "random, zeros, or a file that numpy.save or numpy.savez wrote"
        try:
            loaded = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"input_data: expected {wanted}, found {path} ({error})") from None
        if isinstance(loaded, np.ndarray):
            self._arrays = {"": loaded}
            return
        with loaded:
            self._arrays = {name: loaded[name] for name in loaded.files}

    def tensors(
        self, model: str, inputs: Sequence[TensorInfo], shapes: Mapping[tuple[str, str], Shape]
    ) -> tuple[Tensor, ...]:
        """One request's inputs. Raises :class:`ConfigError`."""
        if "" in self._arrays and len(inputs) != 1:
            names = ", ".join(each.name for each in inputs)
            raise ConfigError(
                f"input_data: expected arrays for the inputs {names} of model {model!r}, found one array "
                "without a name; write them with numpy.savez"
            )
        return tuple(self._tensor(model, each, shapes) for each in inputs)

    def _tensor(self, model: str, info: TensorInfo, shapes: Mapping[tuple[str, str], Shape]) -> Tensor:
        given = shapes.get((model, info.name), shapes.get(("", info.name)))
        if self._arrays:
            array = self._array(model, info)
            shape = given or array.shape
            _check_shape(model, info, shape, "the shape of the array in --input-data")
            return Tensor(info.name, info.datatype, shape, _bytes_of(model, info, array, shape))
        if given is not None:
            _check_shape(model, info, given, "--shape")
        shape = _closed(model, info) if given is None else given
        key = (info.name, info.datatype, shape)
        if key not in self._made:
            self._made[key] = self._drawn(*key)
        return Tensor(info.name, info.datatype, shape, self._made[key])

    def _array(self, model: str, info: TensorInfo) -> np.ndarray:
        array = self._arrays.get(info.name, self._arrays.get(""))
        if array is None:
            raise ConfigError(
                f"input_data: expected an array called {info.name!r}, an input of model {model!r}; found "
                f"{', '.join(self._arrays)}"
            )
        return array

    def _drawn(self, name: str, datatype: str, shape: Shape) -> bytes:
        count = int(np.prod(shape, dtype=np.int64))
        rng = np.random.default_rng([self._seed, *name.encode()])
        if datatype == "BYTES":
            letters = np.full(count * WORD_BYTES, ord("0"), np.uint8)
            if self._source == "random":
                letters = rng.integers(ord("a"), ord("z") + 1, count * WORD_BYTES, np.uint8)
            text = letters.tobytes()
            return encode_strings(text[at : at + WORD_BYTES] for at in range(0, len(text), WORD_BYTES))
        kind = DTYPES[datatype]
        if self._source == "zeros":
            return bytes(count * kind.itemsize)
        if datatype == "BF16":
            return (rng.random(count, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        if kind.kind == "f":
            return rng.random(count).astype(kind).tobytes()
        return rng.integers(0, 2 if kind.kind == "b" else 10, count).astype(kind).tobytes()


def _closed(model: str, info: TensorInfo) -> Shape:
    """The described shape; an open first dimension is a batch of one."""
    shape = (1, *info.shape[1:]) if info.shape[:1] == (-1,) else info.shape
    if -1 in shape:
        example = ",".join(str(size) if size > 0 else "N" for size in shape)
        raise ConfigError(
            f"shape: expected the sizes that are open in input {info.name!r} of model {model!r}, which is "
            f"{list(info.shape)}; give --shape {info.name}:{example} with numbers for N"
        )
    return shape


def _check_shape(model: str, info: TensorInfo, shape: Shape, where: str) -> None:
    fits = len(shape) == len(info.shape) and all(
        wanted in (-1, size) for wanted, size in zip(info.shape, shape, strict=True)
    )
    if not fits:
        raise ConfigError(
            f"shape: expected {list(info.shape)} for input {info.name!r} of model {model!r}, found "
            f"{list(shape)} in {where}; -1 stands for any size"
        )


def _bytes_of(model: str, info: TensorInfo, array: np.ndarray, shape: Shape) -> bytes:
    if array.size != int(np.prod(shape, dtype=np.int64)):
        raise ConfigError(
            f"input_data: expected {list(shape)} for input {info.name!r} of model {model!r}, found an "
            f"array of {list(array.shape)}"
        )
    if info.datatype == "BYTES":
        return encode_strings(
            element if isinstance(element, bytes) else str(element).encode()
            for element in array.reshape(-1).tolist()
        )
    kind: np.dtype[Any] = DTYPES[info.datatype]
    if array.dtype != kind:
        raise ConfigError(
            f"input_data: expected {info.datatype} for input {info.name!r} of model {model!r}, found "
            f"{array.dtype}; convert it with astype"
        )
    return np.ascontiguousarray(array).tobytes()
