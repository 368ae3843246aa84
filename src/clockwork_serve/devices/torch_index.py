"""How a compiled torch model lies on disk: ``index.json`` beside its packages. It imports no torch.

CODE/code.json, CODE/index.json, CODE/B.pt2    one package without constants per batch size B
one blob of weights per model, laid out by the index
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import msgspec

from clockwork_serve.devices.code_files import read_file
from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Code, TorchIndex, TorchTensor

INDEX_FILE: Final = "index.json"
TENSOR_START: Final = 256
"""Each tensor starts at a multiple of so many bytes in the blob, as CUDA's allocators have it."""

ITEM_BYTES: dict[str, int] = {
    "bool": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "int8": 1, "int16": 2, "int32": 4,
    "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Element types of weights, by torch's names."""


_decoder: Final = msgspec.json.Decoder(TorchIndex)  # built before there are threads


def package_name(batch: int) -> str:
    """The file of a batch size's package."""
    return f"{batch}.pt2"


def read_index(code: Code) -> TorchIndex:
    """The code's index; DeviceError if it is not there or contradicts itself."""
    path = Path(code.path) / INDEX_FILE
    try:
        index = _decoder.decode(read_file(code, INDEX_FILE))
    except (ValueError, RecursionError, msgspec.DecodeError) as error:
        raise DeviceError(f"code {path}: cannot be read ({error}); compile the model again") from error
    for tensor in index.tensors:
        fault = _fault(tensor, index.blob_bytes)
        if fault:
            raise DeviceError(f"code {path}: {tensor.name}: {fault}; compile the model again")
    return index


def _fault(tensor: TorchTensor, blob_bytes: int) -> str:
    """What is wrong with one entry; empty if nothing is."""
    item = ITEM_BYTES.get(tensor.dtype)
    if item is None:
        return f"dtype: expected one of {', '.join(ITEM_BYTES)}; found {tensor.dtype!r}"
    if len(tensor.shape) != len(tensor.stride) or min((*tensor.shape, *tensor.stride), default=0) < 0:
        return f"expected a stride per dimension, none negative; found {tensor.shape} and {tensor.stride}"
    reach = sum((dim - 1) * step for dim, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
    needed = item * reach if math.prod(tensor.shape) else 0
    if needed > tensor.size:
        return f"expected {needed} bytes for {tensor.shape} {tensor.dtype}, found {tensor.size}"
    if tensor.offset % TENSOR_START:
        return f"expected to start at a multiple of {TENSOR_START}, found {tensor.offset}"
    if tensor.offset < 0 or tensor.offset + tensor.size > blob_bytes:
        return f"expected to end by {blob_bytes}, found {tensor.offset + tensor.size}"
    return ""
