"""A gateway's part in tests: requests laid out in a region of its own, and answers read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from clockwork_serve.messages import Call, TensorRef, Tensors
from clockwork_serve.serve.shm import Region, write_epoch
from clockwork_serve.units import align

NAMES = {"f4": "FP32", "i8": "INT64", "O": "BYTES", "b1": "BOOL", "u1": "UINT8"}


@dataclass(frozen=True)
class Slot:
    """One request's tensors in a region."""

    region: Region
    tensors: Tensors

    def call(self, rows: int = 1, request_id: str = "r1") -> Call:
        return Call(request_id=request_id, rows=rows, tensors=msgspec.msgpack.encode(self.tensors))

    def take_back(self) -> None:
        """Give the slot to another request."""
        write_epoch(self.region.buffer, self.tensors.header_offset, self.tensors.epoch + 1)


def slot(region: Region, inputs: Mapping[str, np.ndarray[Any, Any]], room: int = 256, epoch: int = 7) -> Slot:
    """Lay a request out: header, inputs, room for outputs."""
    blobs = {name: wire(array) for name, array in inputs.items()}
    start = region.allocate(64 + sum(align(len(blob)) for blob in blobs.values()) + room)
    assert start is not None
    write_epoch(region.buffer, start, epoch)
    at, refs = start + 64, []
    for name, blob in blobs.items():
        region.buffer[at : at + len(blob)] = blob
        array = inputs[name]
        datatype = NAMES[array.dtype.str.lstrip("<|")]
        refs.append(TensorRef(name=name, datatype=datatype, shape=array.shape, offset=at, nbytes=len(blob)))
        at += align(len(blob))
    return Slot(
        region,
        Tensors(
            region=region.name, epoch=epoch, header_offset=start, refs=tuple(refs), output_offset=at,
            output_bytes=room,
        ),
    )  # fmt: skip


def wire(array: np.ndarray[Any, Any]) -> bytes:
    """A tensor in a slot."""
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(element).to_bytes(4, "little") + element for element in array.ravel())


def answer(region: Region, encoded: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs that a result describes."""
    kinds = {name: kind for kind, name in NAMES.items()}
    return {
        ref.name: np.frombuffer(
            bytes(region.buffer[ref.offset : ref.offset + ref.nbytes]), np.dtype(kinds[ref.datatype])
        ).reshape(ref.shape)
        for ref in msgspec.msgpack.decode(encoded, type=Tensors).refs
    }
