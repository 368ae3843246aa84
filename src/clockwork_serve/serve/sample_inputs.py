"""Inputs to measure a code with; it cannot know what a model means by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from clockwork_serve.devices.base import Array
from clockwork_serve.devices.code_files import has_file, read_file
from clockwork_serve.messages import Code, TensorSpec
from clockwork_serve.store import Fill, made_up

SAMPLE_RATE: Final = 16_000
"""What audio models are most often made for; many refuse any other number."""
ELEMENTS_MAX: Final = 1 << 24
"""No input is made larger, whatever its shape leaves open."""

_FLOATS: Final = ("FP16", "FP32", "FP64", "BF16")


def fills_to_try(code: Code) -> Iterator[tuple[Fill, ...]]:
    """Ways to fill one row of the inputs, the most realistic first; a model may refuse any of them.

    What worked when the code was compiled comes with it (``probe.json``), but there the dimensions that a
    request chooses are as small as the model allows, and would be measured too fast.
    """
    known = _known_fills(code)
    dynamic = any(dim < 0 for spec in code.inputs for dim in spec.shape)
    base = known or tuple(_fill(spec, code) for spec in code.inputs if not spec.optional)
    if dynamic:
        yield _sized(base, code, None)
    if known:
        yield known
    for size in (64, 16, 1) if dynamic else (None,):
        yield _sized(base, code, size)


def inputs_of(fills: Sequence[Fill]) -> dict[str, Array]:
    """One row of inputs by name, the same every time; elements of BYTES are ``bytes``, as devices want."""
    made = made_up(fills)
    return {name: _as_bytes(array) if array.dtype == object else array for name, array in made.items()}


def _as_bytes(array: Array) -> Array:
    elements = [each.encode() if isinstance(each, str) else each for each in array.ravel()]
    return np.array(elements, object).reshape(array.shape)


def _known_fills(code: Code) -> tuple[Fill, ...]:
    if not has_file(code, "probe.json"):
        return ()
    try:
        fills = msgspec.json.decode(read_file(code, "probe.json"), type=tuple[Fill, ...])
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return ()
    return fills if {spec.name for spec in code.inputs} >= {fill.name for fill in fills} else ()


def _fill(spec: TensorSpec, code: Code) -> Fill:
    shape = (1, *spec.shape) if code.batched else spec.shape
    name = spec.name.lower()
    is_rate = spec.datatype in ("INT32", "INT64") and ("rate" in name or name == "sr")
    low, high = (SAMPLE_RATE, SAMPLE_RATE) if is_rate else (0, 1)
    return Fill(name=spec.name, datatype=spec.datatype, shape=shape, low=low, high=high)


def _sized(fills: Sequence[Fill], code: Code, size: int | None) -> tuple[Fill, ...]:
    """The fills with every open dimension set to ``size``, or to a guess by the tensor's rank."""
    specs = {spec.name: spec for spec in code.inputs}
    return tuple(_with_shape(fill, _shape(specs[fill.name], code, size)) for fill in fills)


def _shape(spec: TensorSpec, code: Code, size: int | None) -> tuple[int, ...]:
    guess = _guess(spec) if size is None else size
    shape = tuple(guess if dim < 0 else dim for dim in spec.shape)
    while math.prod(shape) > ELEMENTS_MAX and guess > 1:
        guess //= 2
        shape = tuple(guess if dim < 0 else dim for dim in spec.shape)
    return (1, *shape) if code.batched else shape


def _guess(spec: TensorSpec) -> int:
    if len(spec.shape) >= 3 and sum(dim < 0 for dim in spec.shape) >= 2:
        return 320  # sides of an image: a multiple of 32, as strided networks want
    if spec.datatype in _FLOATS and len(spec.shape) <= 2:
        return SAMPLE_RATE  # a second of sound
    return 64  # tokens, or the open side of an image


def _with_shape(fill: Fill, shape: tuple[int, ...]) -> Fill:
    return msgspec.structs.replace(fill, shape=shape)
