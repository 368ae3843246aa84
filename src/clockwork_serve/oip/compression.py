"""Compressed request bodies, taken apart up to a limit and never beyond it."""

from __future__ import annotations

import zlib
from typing import Any, Final

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.errors import TooLarge, Unsupported
from clockwork_serve.oip.records import Buffer
from clockwork_serve.units import KIB

ENCODINGS: Final = ("gzip", "deflate")
_TAKEN_BYTES: Final = 64 * KIB
_GIVEN_BYTES: Final = 256 * KIB
_WINDOW_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def decompress(body: Buffer, encoding: str, limit: int) -> bytearray:
    """The body as it was before ``Content-Encoding``, at most ``limit`` bytes.

    Raises :class:`Unsupported` for an encoding other than gzip and deflate, :class:`TooLarge` beyond the
    limit, :class:`InvalidRequest` for bytes that are not of that encoding.
    """
    name = encoding.strip().lower()
    bits = _WINDOW_BITS.get(name)
    if bits is None:
        raise Unsupported(f"Content-Encoding: expected {' or '.join(ENCODINGS)}, found {encoding!r}")
    if name == "deflate" and not _has_zlib_header(body):
        bits = -zlib.MAX_WBITS  # what some clients call deflate
    stream = zlib.decompressobj(bits)
    found, taken = bytearray(), 0
    try:
        while taken < len(body) and not stream.eof:
            piece = body[taken : taken + _TAKEN_BYTES]
            taken += len(piece)
            _unpack(stream, piece, found, limit)
    except zlib.error as error:
        raise InvalidRequest(
            f"Content-Encoding: expected a {name} body, found other bytes ({error})"
        ) from None
    if not stream.eof:
        raise InvalidRequest(f"Content-Encoding: expected a whole {name} body, found its end missing")
    left = len(stream.unused_data) + len(body) - taken
    if left:
        raise InvalidRequest(
            f"Content-Encoding: expected one {name} stream, found {left} bytes after its end"
        )
    return found


def _unpack(stream: Any, piece: Buffer, found: bytearray, limit: int) -> None:
    """Append what a piece becomes, little at a time.

    All at once, zlib would join its parts while no other thread may run: 50 ms for 64 MiB.
    """
    while True:
        most = min(_GIVEN_BYTES, limit + 1 - len(found))
        given = stream.decompress(piece, most)
        found += given
        if len(found) > limit:
            raise TooLarge(
                f"body: expected at most {limit} bytes once decompressed, found more; send less at once"
            )
        piece = stream.unconsumed_tail
        if not piece and len(given) < most:
            return


def _has_zlib_header(body: Buffer) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
