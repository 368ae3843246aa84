"""Compressed request bodies, taken apart up to a limit and never beyond it."""

from __future__ import annotations

import zlib
from typing import Final

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.errors import TooLarge, Unsupported
from clockwork_serve.oip.records import Buffer

ENCODINGS: Final = ("gzip", "deflate")
_WINDOW_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def decompress(body: Buffer, encoding: str, limit: int) -> bytes:
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
    try:
        found = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(
            f"Content-Encoding: expected a {name} body, found other bytes ({error})"
        ) from None
    if len(found) > limit:
        raise TooLarge(
            f"body: expected at most {limit} bytes once decompressed, found more; send less at once"
        )
    if not stream.eof:
        raise InvalidRequest(f"Content-Encoding: expected a whole {name} body, found its end missing")
    if stream.unused_data:
        raise InvalidRequest(
            f"Content-Encoding: expected one {name} stream, "
            f"found {len(stream.unused_data)} bytes after its end"
        )
    return found


def _has_zlib_header(body: Buffer) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
