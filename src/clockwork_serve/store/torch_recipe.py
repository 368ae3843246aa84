"""How the constants of a program become the blob that its code reads; arithmetic on arrays, no torch.

Found once per architecture, when the graph is rewritten, and the same for every copy of it: most constants
are copied, and those of a convolution take in the normalisation that follows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve.messages import TorchTensor
from clockwork_serve.units import align

BLOB_ALIGN = 256
"""Where tensors start in a blob: what loads of a GPU want."""
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Source(Struct, frozen=True, kw_only=True):
    """One constant in the file: which entry, and how the tensor lies in it; strides in elements."""

    entry: str
    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def values(self, data: bytes) -> npt.NDArray[np.void]:
        """The elements, without a meaning, in order. Raises ``ValueError`` if the entry is too short."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        count = len(data) // self.item_bytes
        if not math.prod(self.shape):
            return np.empty(self.shape, f"V{self.item_bytes}")
        if self.offset < 0 or min(self.stride, default=0) < 0 or last >= count:
            raise ValueError(f"{self.entry} has {len(data)} bytes, too few for {self.shape} {self.dtype}")
        flat = np.frombuffer(data, f"V{self.item_bytes}", count)[self.offset :]
        steps = [step * self.item_bytes for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False))


class Norm(Struct, frozen=True, kw_only=True):
    """A normalisation with fixed statistics, by the numbers of its constants (None: it has none)."""

    mean: int
    variance: int
    scale: int | None
    shift: int | None
    epsilon: float


class Piece(Struct, frozen=True, kw_only=True):
    """How one tensor of the blob is made: copied from ``source``, or with ``norm`` folded in.

    ``bias`` tells that it is the bias of a convolution (whose own is ``source``, if it has one), not its
    weight.
    """

    source: int | None
    norm: Norm | None = None
    bias: bool = False


class Recipe(Struct, frozen=True, kw_only=True):
    """The file ``recipe.json`` of a code: a piece for every tensor of its index."""

    tensors: tuple[TorchTensor, ...]
    pieces: tuple[Piece, ...]
    blob_bytes: int

    def blob(self, values: Callable[[int], npt.NDArray[np.void]]) -> Bytes:
        """The blob for constants by number. ``ValueError`` if a constant is not what it was."""
        blob = np.zeros(self.blob_bytes, np.uint8)
        for tensor, piece in zip(self.tensors, self.pieces, strict=True):
            made = _made(piece, values)
            if made.nbytes != tensor.size:
                raise ValueError(f"{tensor.name}: expected {tensor.size} bytes, found {made.nbytes}")
            blob[tensor.offset : tensor.offset + tensor.size] = made.reshape(-1).view(np.uint8)
        return blob

    def entries(self, sources: Sequence[Source]) -> list[str]:
        """The entries of the file that are read, each once."""
        numbers = [number for piece in self.pieces for number in _numbers(piece)]
        return list(dict.fromkeys(sources[number].entry for number in numbers))


def laid_out(
    named: Sequence[tuple[str, str, tuple[int, ...], int]],
) -> tuple[tuple[TorchTensor, ...], int]:
    """Tensors (name, dtype, shape, bytes of an element) one after the other, and the length of the blob."""
    tensors = []
    offset = 0
    for name, dtype, shape, item_bytes in named:
        size = math.prod(shape) * item_bytes
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors.append(
            TorchTensor(name=name, dtype=dtype, shape=shape, stride=stride, offset=offset, size=size)
        )
        offset += align(size, BLOB_ALIGN)
    return tuple(tensors), offset


def _numbers(piece: Piece) -> list[int]:
    numbers = [piece.source]
    if piece.norm is not None:
        numbers += [piece.norm.mean, piece.norm.variance, piece.norm.scale, piece.norm.shift]
    return [number for number in numbers if number is not None]


def _made(piece: Piece, values: Callable[[int], npt.NDArray[np.void]]) -> npt.NDArray[np.generic]:
    norm = piece.norm
    if norm is None:
        assert piece.source is not None, "what is not folded is copied"
        return values(piece.source)

    def floats(number: int) -> Floats:
        return values(number).view(np.float32)

    # Per channel in double precision, so that folding rounds once.
    factor = 1 / np.sqrt(floats(norm.variance).astype(np.float64) + norm.epsilon)
    if norm.scale is not None:
        factor = factor * floats(norm.scale)
    if not piece.bias:
        assert piece.source is not None, "a convolution has a weight"
        weight = floats(piece.source)
        shape = (-1, *[1] * (weight.ndim - 1))
        folded: Floats = weight * factor.astype(np.float32).reshape(shape)
        return folded
    bias = 0.0 if piece.source is None else floats(piece.source).astype(np.float64)
    shifted = (bias - floats(norm.mean)) * factor
    if norm.shift is not None:
        shifted = shifted + floats(norm.shift)
    return np.asarray(shifted, np.float32)
