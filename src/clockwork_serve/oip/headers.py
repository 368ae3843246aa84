"""JSON headers of requests that were read before: clients send the same one again and again.

A header whose inputs are all binary says everything about a request but the values of its tensors. What it
says, and that it fits the model, is worked out once and remembered by its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from clockwork_serve.oip.records import InferCall, InputTensor, OutputWish, Parameter

HEADER_BYTES_MAX: Final = 1024
HEADERS_MAX: Final = 64
"""Of one version of a model; beyond that all are forgotten."""
_ID: Final = re.compile(rb'\{ ?"id": ?"([\x20-\x21\x23-\x5b\x5d-\x7e]+)", ?')


class Known(Struct):
    """What a header says. ``tensors``: name, datatype, shape and bytes of each input, in the body's order.

    ``slo_ns`` is what its parameters ask for. ``outputs_in_order``: their names, where all are to be sent as
    they are, in binary; then ``around_parameters`` is what a response's JSON has before and after its
    parameters, by the outputs' shapes and bytes.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int
    outputs: list[OutputWish] | None
    parameters: dict[str, Parameter]
    binary: bool
    rows: int
    signature: str
    slo_ns: int | None
    priority: int
    outputs_in_order: tuple[str, ...] | None = None
    around_parameters: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}

    def keep(self, key: tuple[Any, ...], around: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        """Remember that; returns it."""
        if len(self.around_parameters) >= HEADERS_MAX:
            self.around_parameters.clear()
        self.around_parameters[key] = around
        return around

    def call(self, body: memoryview, at: int, request_id: str) -> InferCall | None:
        """The request whose tensors are in ``body`` from ``at`` on; None if they are too long or short."""
        if len(body) - at != self.nbytes:
            return None
        inputs = []
        for name, datatype, shape, size in self.tensors:
            inputs.append(InputTensor(name, datatype, shape, body[at : at + size]))
            at += size
        return InferCall(inputs, self.outputs, request_id, self.parameters, self.binary, known=self)


class Headers:
    """Of one version of a model."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, body: memoryview, length: int) -> InferCall | None:
        """The request whose header is the first ``length`` bytes, if one like it was here."""
        if length > HEADER_BYTES_MAX or length >= len(body):
            return None
        header = bytes(body[:length])
        known, request_id = self._known.get(header), ""
        if known is None:
            header, request_id = _without_id(header)
            known = self._known.get(header) if request_id else None
        return None if known is None else known.call(body, length, request_id)

    def remember(
        self,
        call: InferCall,
        wanted: Sequence[OutputWish],
        rows: int,
        signature: str,
        slo_ns: int | None,
        priority: int,
    ) -> Known:
        """What a good request's header says but for its id. It is kept unless values must be looked at."""
        header, _ = _without_id(call.header)
        if not header or b'"id"' in header or call.shared or not all(map(_plain, call.inputs)):
            return Known((), 0, None, {}, call.binary, rows, signature, slo_ns, priority)
        if len(self._known) >= HEADERS_MAX:
            self._known.clear()
        tensors = tuple(
            (tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in call.inputs
        )
        known = self._known[header] = Known(
            tensors, sum(tensor[3] for tensor in tensors), call.outputs, call.parameters, call.binary, rows,
            signature, slo_ns, priority, _in_order(wanted),
        )  # fmt: skip
        return known


def _without_id(header: bytes) -> tuple[bytes, str]:
    """The header without the id that it begins with, as stock clients write it, and that id; "" if none."""
    found = _ID.match(header)
    return (header, "") if found is None else (b"{" + header[found.end() :], found[1].decode())


def _in_order(wanted: Sequence[OutputWish]) -> tuple[str, ...] | None:
    if any(wish.classes or wish.shared is not None or not wish.binary for wish in wanted):
        return None
    return tuple(wish.name for wish in wanted)


def _plain(tensor: InputTensor) -> bool:
    """Whether its size is all that can be wrong with its bytes."""
    return type(tensor.data) is memoryview and tensor.datatype not in ("BOOL", "BYTES")
