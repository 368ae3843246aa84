"""Compressed bodies: requests are decompressed up to a limit, responses compressed.

Which response is compressed is told here too, by what its client said; nothing else is known of a client.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final, NamedTuple

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.status import TooLarge, Unsupported
from clockwork_serve.units import KIB, MIB

ENCODINGS: Final = ("gzip", "deflate")
_PART_BYTES: Final = 64 * KIB  # less than what the C library asks the system for, and gives back, each time
_PACKED_BYTES: Final = MIB
_RATIO_MAX: Final = 1032  # deflate makes nothing smaller than that
_RATIO_ODD: Final = 64  # what becomes larger is counted before it is kept
_RATIO_TRUSTED: Final = 100
BELIEVED_BYTES: Final = 8 * MIB
"""What becomes more than that, and a hundred times as large, is not believed: it would cost 40 ms to see that
80 kB are a bomb, on a core that others need."""
_WINDOW_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

_LEVEL: Final = 1
"""Floats shrink no further at a higher one, and text costs five times as much for a tenth less."""
_WEIGHT: Final = re.compile(r"q=([01](?:\.[0-9]{0,3})?)")


class Coding(NamedTuple):
    """How to compress a response: gzip or deflate. ``must``: the client cannot read it otherwise."""

    name: str
    must: bool


@lru_cache(maxsize=64)
def wanted_coding(accept_encoding: str) -> Coding | None:
    """How a client wants its response compressed, by its header; None: not at all.

    It costs a core milliseconds, so it is done for who asks: names one coding, or says by weights which it
    likes better. A list of all that a library can read, which many send with every request, is no wish.
    """
    weights = _weights(accept_encoding)
    rest = weights.get("*", 0.0)
    forbidden = not weights.get("identity", weights.get("*", 1.0))
    if forbidden:
        liked = {name: weights.get(name, rest) for name in ENCODINGS}
    else:
        named = {name: weight for name, weight in weights.items() if name not in ("*", "identity") and weight}
        if len(named) > 1 and len(set(named.values())) == 1:
            return None
        plain = weights.get("identity", 0.0)
        liked = {name: named[name] for name in ENCODINGS if named.get(name, 0.0) > plain}
    best = max(liked, key=lambda name: liked[name], default="")
    return Coding(best, must=forbidden) if best and liked[best] else None


def compress(parts: Iterable[Buffer], coding: Coding) -> list[bytes]:
    """The parts as one body of that coding, little at a time. A megabyte takes a core 1 to 25 ms.

    All at once, zlib would join what it makes while no other thread may run.
    """
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding.name])
    found = [
        stream.compress(part[at : at + _PACKED_BYTES])
        for part in parts
        for at in range(0, len(part), _PACKED_BYTES)
    ]
    return [*filter(None, found), stream.flush()]


def _weights(accept_encoding: str) -> dict[str, float]:
    """Codings by name; what cannot be read counts as not said."""
    found: dict[str, float] = {}
    for item in accept_encoding.lower().split(","):
        name, _, parameter = (part.strip() for part in item.partition(";"))
        weight = _WEIGHT.fullmatch(parameter.replace(" ", ""))
        if name and (weight or not parameter):
            found[name.removeprefix("x-")] = min(1.0, float(weight[1])) if weight else 1.0
    return found


def decompress(body: Buffer, encoding: str, limit: int) -> bytearray:
    """The body as it was before ``Content-Encoding``, at most ``limit`` bytes; less of what was very small.

    Raises :class:`Unsupported` for an encoding other than gzip and deflate, :class:`TooLarge` beyond the
    limit, :class:`InvalidRequest` for bytes that are not of that encoding.
    """
    name = encoding.strip().lower()
    bits = _WINDOW_BITS.get(name)
    if bits is None:
        raise Unsupported(f"Content-Encoding: expected {' or '.join(ENCODINGS)}, found {encoding!r}")
    limit, asked = min(limit, max(BELIEVED_BYTES, _RATIO_TRUSTED * len(body))), limit
    remedy = (
        "send less at once" if limit == asked else f"{len(body)} bytes are too few for it: send it as it is"
    )
    if name == "deflate" and not _has_zlib_header(body):
        bits = -zlib.MAX_WBITS  # what some clients call deflate
    try:
        if limit // _RATIO_MAX < len(body) <= limit // _RATIO_ODD:
            # It may be a bomb: memory that is filled for it would be in everybody's way.
            _check_size(
                sum(len(given) for _, given in _parts(zlib.decompressobj(bits), body, limit)), limit, remedy
            )
        stream = zlib.decompressobj(bits)
        found, taken = bytearray(), 0
        for taken, given in _parts(stream, body, limit):  # noqa: B007 - the last one counts
            found += given
    except zlib.error as error:
        raise InvalidRequest(
            f"Content-Encoding: expected a {name} body, found other bytes ({error})"
        ) from None
    _check_size(len(found), limit, remedy)
    if not stream.eof:
        raise InvalidRequest(f"Content-Encoding: expected a whole {name} body, found its end missing")
    left = len(stream.unused_data) + len(body) - taken
    if left:
        raise InvalidRequest(
            f"Content-Encoding: expected one {name} stream, found {left} bytes after its end"
        )
    return found


def _check_size(size: int, limit: int, remedy: str) -> None:
    if size > limit:
        raise TooLarge(f"body: expected at most {limit} bytes once decompressed, found more; {remedy}")


def _parts(stream: Any, body: Buffer, limit: int) -> Iterator[tuple[int, bytes]]:
    """What a body becomes, little at a time, until it is more than ``limit``; and how much of it was taken.

    All at once, zlib would join its parts while no other thread may run: 37 ms for 64 MiB.
    """
    taken = size = 0
    while taken < len(body) and not stream.eof:
        piece = body[taken : taken + _PART_BYTES]
        taken += len(piece)
        while True:
            given = stream.decompress(piece, _PART_BYTES)
            yield taken, given
            size += len(given)
            if size > limit:
                return
            piece = stream.unconsumed_tail
            # At its end zlib keeps what it did not consume, and would be given the same for ever.
            if stream.eof or (not piece and len(given) < _PART_BYTES):
                break


def _has_zlib_header(body: Buffer) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
