"""The file ``index.json`` of a torch code, which the store writes and a device reads; no logic, no torch."""

from __future__ import annotations

from msgspec import Struct


class TorchTensor(Struct, frozen=True, kw_only=True):
    """Where one constant of a program is in the blob: ``size`` bytes from ``offset``.

    ``name`` is what ``get_constant_fqns`` calls it. ``dtype`` is torch's name (``float32``). ``stride``
    counts elements; ``size`` is what they span, which for a dense tensor is its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size: int


class TorchIndex(Struct, frozen=True, kw_only=True):
    """How a blob is laid out, and what the packages were compiled by and for.

    ``target`` is ``cpu`` or ``cuda:sm_90``. ``inputs`` are names in calling order, ``outputs`` in the order
    they come back in.
    """

    tensors: tuple[TorchTensor, ...]
    blob_bytes: int
    torch_version: str
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
