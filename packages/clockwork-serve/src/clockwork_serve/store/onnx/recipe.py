"""Recipes that gather a model's blob from its file, derived once per architecture.

Optimising a graph moves weights (blocked layouts, padding, transposes) or computes with them (folding a
normalisation into a convolution). Two probes, whose weights are numbers that encode their own position, show
which. If every element of the blob is a copy of one element of the file, or the same for all weights, further
copies of the architecture are made by a gather. If not, there is no recipe and each copy is optimised
separately.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clockwork_serve.units import TENSOR_ALIGN

Bits = npt.NDArray[np.uint32]

# From 1/32: of the magnitude of weights, so that no sum absorbs them and then appears constant.
_LEAST = 0x3D000000
_MOST = 0x7F000000
_SIGN = np.uint32(0x80000000)
_NOWHERE = np.uint32(0xFFFFFFFF)
PROBES = (0, 1)


def probe_elements(count: int, probe: int) -> Bits | None:
    """``count`` bit patterns of distinct normal floats and a zero; None if there are not that many.

    The two probes run in opposite directions with opposite signs, so that what depends on a weight's sign or
    order differs between them.
    """
    if count > _MOST - _LEAST:
        return None
    places = np.arange(count, dtype=np.uint32)
    # An odd multiplier and a high bit: a pattern of signs that no layout follows.
    signs = (places * np.uint32(2654435769) >> np.uint32(31)).astype(np.uint32)
    flat = np.zeros(count + 1, np.uint32)
    if probe == 0:
        flat[:count] = np.uint32(_LEAST) + places | signs << np.uint32(31)
    else:
        flat[:count] = np.uint32(_LEAST + count - 1) - places | (signs ^ np.uint32(1)) << np.uint32(31)
    return flat


def learnt(blobs: Sequence[npt.NDArray[np.uint8]], count: int) -> Recipe | None:
    """The recipe derived from the blobs of both probes; None if an element is neither moved nor constant."""
    first, second = (blob.view(np.uint32) for blob in blobs)
    if len(first) != len(second):
        return None
    places = _places(first, count, 0)
    moved = (places != _NOWHERE) & (places == _places(second, count, 1))
    fixed = ~moved & (first == second)
    if not (moved | fixed).all():
        return None
    constants, order = np.unique(first[fixed], return_inverse=True)
    places[fixed] = count + 1 + order
    return Recipe(places, constants)


def _places(bits: Bits, count: int, probe: int) -> Bits:
    """The position in the file of each element of a probe's blob; ``count``: padding."""
    numbers = bits & ~_SIGN
    first = np.uint32(_LEAST if probe == 0 else _LEAST + count - 1)
    places = numbers - first if probe == 0 else first - numbers
    places[bits == 0] = count
    places[places > count] = _NOWHERE
    wanted = probe_elements(count, probe)
    assert wanted is not None, "there was a probe"
    known = places != _NOWHERE
    places[known] = np.where(wanted[places[known]] == bits[known], places[known], _NOWHERE)
    return places


class Recipe:
    """A gather: element i of the blob is element ``places[i]`` of the file's weights.

    ``constants``, which do not depend on weights, follow after the weights and their final zero.
    """

    def __init__(self, places: Bits, constants: Bits) -> None:
        self._places = places
        self._constants = constants
        self._runs = _runs(places)

    @property
    def blob_bytes(self) -> int:
        """Bytes of a blob."""
        return self._places.nbytes

    def blob(self, flat: Bits) -> npt.NDArray[np.uint8]:
        """The blob for a file's elements (which end with one zero)."""
        if len(self._constants):
            flat = np.concatenate([flat, self._constants])
        out = np.empty(len(self._places), np.uint32)
        for start, stop, source in self._runs:
            if source is None:
                np.take(flat, self._places[start:stop], out=out[start:stop], mode="clip")
            else:
                out[start:stop] = flat[source : source + stop - start]
        return out.view(np.uint8)

    def to_bytes(self) -> bytes:
        """The recipe as a file: runs of consecutive elements are encoded as such, the rest is compressed."""
        steps = np.diff(self._places.astype(np.int64), prepend=0).astype(np.int32)
        file = io.BytesIO()
        np.savez_compressed(file, steps=steps, constants=self._constants)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Recipe:
        """The reverse of ``to_bytes``. Raises ``ValueError``."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                steps, constants = _row(file["steps"], np.int32), _row(file["constants"], np.uint32)
            return cls(np.cumsum(steps.astype(np.int64)).astype(np.uint32), constants)
        except Exception as error:  # numpy's reader of archives raises many kinds of errors
            raise ValueError(f"expected a recipe, found {error}") from error


def _row(found: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """One row of that type. Raises ``ValueError``."""
    if found.dtype != dtype or found.ndim != 1:
        raise ValueError(f"an array of {found.ndim} axes of {found.dtype}")
    return found


def _runs(places: Bits) -> list[tuple[int, int, int | None]]:
    """Stretches of the blob: (start, stop, position of the first) if consecutive in the file, else None."""
    breaks = np.flatnonzero(np.diff(places.astype(np.int64)) != 1) + 1
    edges = np.concatenate(([0], breaks, [len(places)])).astype(np.int64)
    lengths = np.diff(edges)
    runs: list[tuple[int, int, int | None]] = []
    for number in np.flatnonzero(lengths >= 64 * TENSOR_ALIGN):
        start, stop = int(edges[number]), int(edges[number + 1])
        done = runs[-1][1] if runs else 0
        if done < start:
            runs.append((done, start, None))
        runs.append((start, stop, int(places[start])))
    done = runs[-1][1] if runs else 0
    if done < len(places):
        runs.append((done, len(places), None))
    return runs
