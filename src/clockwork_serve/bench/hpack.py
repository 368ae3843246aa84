"""Headers of HTTP/2 as bytes and back, for a peer that was told to keep no table (RFC 7541). It has no state.

With a table of size 0 a header is an entry of the standard's fixed table or written out, so blocks can be
passed over unread and equal blocks mean equal headers.
"""

from __future__ import annotations

from typing import Final

_STATIC: Final[tuple[tuple[str, str], ...]] = (
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""),
    ("cache-control", ""), ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""),
    ("content-length", ""), ("content-location", ""), ("content-range", ""), ("content-type", ""),
    ("cookie", ""), ("date", ""), ("etag", ""), ("expect", ""), ("expires", ""), ("from", ""), ("host", ""),
    ("if-match", ""), ("if-modified-since", ""), ("if-none-match", ""), ("if-range", ""),
    ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""), ("location", ""), ("max-forwards", ""),
    ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""), ("referer", ""), ("refresh", ""),
    ("retry-after", ""), ("server", ""), ("set-cookie", ""), ("strict-transport-security", ""),
    ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""), ("www-authenticate", ""),
)  # fmt: skip
_BY_LENGTH: Final = {
    5: "012aceiost", 6: " %-./3456789=A_bdfghlmnpru", 7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz", 8: "&*,;XZ",
    10: '!"()?', 11: "'+|", 12: "#>", 13: "\0$@[]~", 14: "^}", 15: "<`{",
}  # fmt: skip
"""The standard's Huffman code, which is canonical: characters by the bits of their codes. What takes more
bits than these (a backslash, what is not ASCII) is in no header of gRPC."""


class Undecodable(ValueError):
    """Not a header block, or one that counts on a table."""


def _codes() -> dict[tuple[int, int], str]:
    codes, code, before = {}, 0, 5
    for bits, characters in _BY_LENGTH.items():
        code <<= bits - before
        before = bits
        for character in characters:
            codes[bits, code] = character
            code += 1
    return codes


_CODES: Final = _codes()
_BITS_MAX: Final = max(_BY_LENGTH)


def literal(name: str, value: str) -> bytes:
    """A header, written out."""
    return b"\0" + _text(name.encode()) + _text(value.encode())


def _text(content: bytes) -> bytes:
    head, left = bytearray(), len(content)
    if left < 127:
        return bytes([left]) + content
    head.append(127)
    left -= 127
    while left > 127:
        head.append(left & 127 | 128)
        left >>= 7
    head.append(left)
    return bytes(head) + content


def decode(block: bytes) -> dict[str, str]:
    """The headers of a block; of those that are given twice, the last. Raises :class:`Undecodable`."""
    found: dict[str, str] = {}
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = _integer(block, at, 7)
                name, value = _entry(index)
            elif first & 0xE0 == 0x20:
                size, at = _integer(block, at, 5)
                if size:
                    raise Undecodable("the peer keeps a table of headers although it was told not to")
                continue
            else:
                index, at = _integer(block, at, 6 if first & 0x40 else 4)
                if index:
                    name = _entry(index)[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
            found[name] = value
    except IndexError:
        raise Undecodable("a header block ends too early") from None
    return found


def _entry(index: int) -> tuple[str, str]:
    if not 0 < index <= len(_STATIC):
        raise Undecodable(f"entry {index} of a table that this side keeps empty")
    return _STATIC[index - 1]


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return value, at
        if shift > 28:
            raise Undecodable("a length beyond all reason")


def _string(block: bytes, at: int) -> tuple[str, int]:
    packed = block[at] & 0x80
    length, at = _integer(block, at, 7)
    content = block[at : at + length]
    if len(content) < length:
        raise Undecodable("a header block ends too early")
    return (_unpacked(content) if packed else content.decode("latin-1")), at + length


def _unpacked(content: bytes) -> str:
    """From Huffman's code. What is not in our part of it ends the text with a question mark."""
    found, code, bits = [], 0, 0
    for byte in content:
        for shift in range(7, -1, -1):
            code, bits = code << 1 | byte >> shift & 1, bits + 1
            character = _CODES.get((bits, code))
            if character is not None:
                found.append(character)
                code = bits = 0
            elif bits > _BITS_MAX:
                return "".join(found) + "?"
    return "".join(found)
