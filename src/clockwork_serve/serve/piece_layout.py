"""How the tensors of a call travel between machines: as one run of bytes, cut into pieces. It does no I/O.

References count from the start of that run on the way, and from the start of a region at either end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Piece, RequestPiece, TensorRef, Tensors
from clockwork_serve.serve.machine_link import PIECE_BYTES
from clockwork_serve.units import align

encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Tensors).decode


def decode(encoded: bytes) -> Tensors:
    """What :data:`encode` made. Raises :class:`TransportError` for anything else."""
    try:
        return _decode(encoded)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: a text that is no UTF-8
        raise TransportError(f"tensors cannot be read: {error}") from None


def packed(refs: Sequence[TensorRef]) -> tuple[TensorRef, ...]:
    """The same tensors, one after the other from 0, each aligned."""
    at, found = 0, []
    for ref in refs:
        found.append(moved(ref, at))
        at = align(at + ref.nbytes)
    return tuple(found)


def moved(ref: TensorRef, offset: int) -> TensorRef:
    """The same tensor elsewhere."""
    return TensorRef(name=ref.name, datatype=ref.datatype, shape=ref.shape, offset=offset, nbytes=ref.nbytes)


def run_bytes(refs: Sequence[TensorRef]) -> int:
    """How long a packed run is."""
    return max([align(ref.offset + ref.nbytes) for ref in refs], default=0)


def on_the_way(refs: tuple[TensorRef, ...], output_bytes: int = 0) -> bytes:
    """A description that names no region."""
    return encode(
        Tensors(region="", epoch=0, header_offset=0, refs=refs, output_offset=0, output_bytes=output_bytes)
    )


def pieces(
    action_id: int, call: int, refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview,
    wanted: Callable[[], bool],
) -> Iterator[Piece]:  # fmt: skip
    """What ``refs`` name in ``memory``, for where ``targets`` say; ends early once nobody wants it."""
    for at, data in cut(refs, targets, memory, wanted):
        yield Piece(action_id=action_id, call=call, at=at, data=data)


def request_pieces(
    request_id: str, refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview,
    wanted: Callable[[], bool],
) -> Iterator[RequestPiece]:  # fmt: skip
    """The same for the tensors of a request."""
    for at, data in cut(refs, targets, memory, wanted):
        yield RequestPiece(request_id=request_id, at=at, data=data)


def cut(
    refs: Sequence[TensorRef], targets: Sequence[TensorRef], memory: memoryview, wanted: Callable[[], bool]
) -> Iterator[tuple[int, bytes]]:
    """Where each piece goes, and its bytes, in order. All but the last of a tensor are whole."""
    for ref, target in zip(refs, targets, strict=True):
        for start in range(0, ref.nbytes, PIECE_BYTES):
            if not wanted():
                return
            end = min(ref.nbytes, start + PIECE_BYTES)
            yield target.offset + start, bytes(memory[ref.offset + start : ref.offset + end])
