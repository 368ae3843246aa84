"""Changes inputs so that they stay nearly right: bytes at random end at a parser's first check.

Each mutator takes an input and dice, and gives another input. All know what they change: tokens of a text, a
tree (JSON, msgpack), fields of protobuf, entries of a zip, frames with a length before them.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from clockwork_serve.oip.protobuf import varint

Mutator = Callable[[bytes, Random], bytes]

ODD_NUMBERS: list[Any] = [
    0, 1, -1, 127, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**400, 0.5, -0.0, 1e308, 5e-324, float("inf"), float("nan"),
]  # fmt: skip
ODD_TEXTS = [
    "", "\0", "a\0b", " ", "\n", "x" * 300, "9" * 5000, "-1", "1e999", "NaN", "..", "../x",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "a/b", "\ud800", "\u00b2", "\u0661", "%s%n", "${HOME}",
    "\u202e", "\x1b[2J",
    "1" * 20, "0x7f", "true", "FP32", "\u00e9" * 40, "(" * 300, "'", '"', "\\", "\\u0000", "1:2:3", "-" * 40,
]  # fmt: skip
ODD_BYTES = [
    b"", b"\0", b"\xff", b"\x80", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\xed\xa0\x80", b"\xc0\xaf",
    b"\xef\xbb\xbf", b"9" * 5000, b"-", b"(" * 300, b"[" * 3000, b"{" * 3000, b"0" * 400, b"\xff" * 10,
    b"1e400", b"../", b"nan", b"0x", b",", b":", b"=", b"'", b'"', b'"""', b"#", b"//", b"\\", b"\x1b",
    b"\xc2\xb2", b"\xd9\xa1", b"1e-400", b"_1", b"+1",
]  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[A-Za-z_][\w.-]*|[-+]?\d+(?:\.\d+)?|\s+|.', re.DOTALL)


def raw(data: bytes, dice: Random) -> bytes:
    """Bytes turned, lost, repeated, put in."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(len(changed) + 1)
        width = dice.choice((1, 1, 2, 4, 8, 40))
        match dice.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << dice.randrange(8)
            case 1 if at < len(changed):
                changed[at] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
            case 2:
                del changed[at : at + width]
            case 3:
                changed[at:at] = dice.choice(ODD_BYTES)
            case 4:
                changed[at:at] = changed[at : at + width]
            case _:
                changed[at : at + width] = dice.randbytes(width)
    return bytes(changed)


def cut(data: bytes, dice: Random) -> bytes:
    """The first part of it."""
    return data[: dice.randrange(len(data) + 1)]


def text(data: bytes, dice: Random) -> bytes:
    """Tokens and lines of a text changed: TOML, protobuf text, CSV, heads of HTTP."""
    tokens = _TOKEN.findall(data)
    lines = data.split(b"\n")
    if dice.random() < 0.3:
        at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
        match dice.randrange(4):
            case 0:
                lines.insert(other, lines[at])
            case 1:
                del lines[at]
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case _:
                lines[at] = text(lines[at], dice) if len(lines) > 1 else lines[at]
        return b"\n".join(lines)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        at = dice.randrange(len(tokens)) if tokens else 0
        match dice.randrange(6):
            case 0:
                tokens[at : at + 1] = [dice.choice(ODD_BYTES)]
            case 1:
                tokens[at : at + 1] = [dice.choice(ODD_TEXTS).encode(errors="surrogatepass")]
            case 2:
                tokens[at : at + 1] = [b"%d" % dice.choice((0, -1, 1, 2**31, 2**63, 2**64, 10**400))]
            case 3:
                del tokens[at : at + dice.choice((1, 2, 5))]
            case 4:
                tokens[at:at] = tokens[at : at + dice.choice((1, 2, 5))]
            case _ if tokens:
                tokens[at] = dice.choice(tokens)
    return b"".join(tokens)


def tree(value: Any, dice: Random) -> Any:
    """A tree of dicts and lists with something in it changed; ``value`` may be changed too."""
    places = list(_places(value))
    if not places or dice.random() < 0.03:
        return _odd(dice, value)
    holder, key = dice.choice(places)
    match dice.randrange(8):
        case 0 | 1:
            holder[key] = _odd(dice, holder[key])
        case 2:
            other, at = dice.choice(places)
            holder[key] = msgspec.to_builtins(other[at])
        case 3:
            del holder[key]
        case 4 if isinstance(holder, list):
            holder.insert(key, holder[key])
        case 4:
            _, at = dice.choice(places)
            holder[str(at) if dice.random() < 0.7 else dice.choice(ODD_TEXTS)] = holder[key]
        case 5:
            holder[key] = [holder[key]] * dice.choice((0, 1, 1, 2, 40))
        case 6 if isinstance(holder[key], int | float):
            holder[key] = holder[key] + dice.choice((-1, 1)) if abs(holder[key]) < 1e300 else 0
        case 6 if isinstance(holder[key], str):
            holder[key] = raw(holder[key].encode(errors="surrogatepass"), dice).decode(errors="replace")
        case _:
            holder[key] = str(holder[key])[:1000] if dice.random() < 0.5 else {"a": holder[key]}
    return value


def _places(value: Any) -> Sequence[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(found) < 2000:
        holder = stack.pop()
        if isinstance(holder, dict):
            found += [(holder, key) for key in holder]
            stack += holder.values()
        elif isinstance(holder, list):
            found += [(holder, at) for at in range(len(holder))]
            stack += holder
    return found


def _odd(dice: Random, old: Any) -> Any:
    match dice.randrange(7):
        case 0 | 1:
            return dice.choice(ODD_NUMBERS)
        case 2 | 3:
            return dice.choice(ODD_TEXTS)
        case 4:
            return dice.choice((None, True, False, [], {}, [[]], {"": None}))
        case 5:
            nested: Any = old
            for _ in range(dice.choice((3, 100, 600))):
                nested = [nested] if dice.random() < 0.9 else {"a": nested}
            return nested
        case _:
            return -old if isinstance(old, int | float) else old


def as_json(data: bytes, dice: Random) -> bytes:
    """A JSON document with something in it changed."""
    try:
        value = json.loads(data)
        return json.dumps(tree(value, dice), ensure_ascii=dice.random() < 0.5).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return text(data, dice)


def as_msgpack(data: bytes, dice: Random) -> bytes:
    """A msgpack record with something in it changed, one that is held in it as bytes too."""
    try:
        value = tree(_inner(msgspec.msgpack.decode(data)), dice)
        return msgspec.msgpack.encode(_outer(value))
    except (ValueError, OverflowError, TypeError, RecursionError, UnicodeError, msgspec.MsgspecError):
        return raw(data, dice)


class _Packed(list[Any]):
    """Msgpack inside of msgpack, opened."""


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _inner(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_inner(each) for each in value]
    if isinstance(value, bytes) and len(value) > 2:
        try:
            return _Packed([msgspec.msgpack.decode(value)])
        except (msgspec.MsgspecError, UnicodeError):
            return value
    return value


def _outer(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _outer(each) for key, each in value.items()}
    if isinstance(value, _Packed):
        return msgspec.msgpack.encode(value[0]) if value else b""
    return [_outer(each) for each in value] if isinstance(value, list) else value


def framed(inner: Mutator) -> Mutator:
    """Of frames (4 bytes of length, content) one is changed, lost, repeated; or its length lies."""

    def mutate(data: bytes, dice: Random) -> bytes:
        frames, at = [], 0
        while at + 4 <= len(data):
            (length,) = struct.unpack_from("<I", data, at)
            frames.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        if not frames or dice.random() < 0.1:
            return raw(data, dice)
        chosen = dice.randrange(len(frames))
        match dice.randrange(6):
            case 0:
                frames.insert(dice.randrange(len(frames)), frames[chosen])
            case 1 if len(frames) > 1:
                del frames[chosen]
                chosen = 0
            case _:
                frames[chosen] = inner(frames[chosen], dice)
        lengths = [len(frame) for frame in frames]
        if dice.random() < 0.1:
            lengths[chosen] = dice.choice((0, 1, lengths[chosen] + 1, 2**26, 2**31, 2**32 - 1))
        return b"".join(struct.pack("<I", size) + frame for size, frame in zip(lengths, frames, strict=True))

    return mutate


def protobuf(data: bytes, dice: Random) -> bytes:
    """A message with one of its fields, at any depth, changed."""
    fields = _fields(data)
    if not fields:
        return raw(data, dice)
    at = dice.randrange(len(fields))
    number, kind, value = fields[at]
    if kind == 2 and dice.random() < 0.75:
        inner = _fields(value)
        fields[at] = (number, kind, (protobuf if inner and dice.random() < 0.8 else raw)(value, dice))
    else:
        match dice.randrange(7):
            case 0:
                del fields[at]
            case 1:
                fields.insert(dice.randrange(len(fields)), fields[at])
            case 2:
                fields[at] = (dice.randrange(1, 30), kind, value)
            case 3 if kind == 2:
                for _ in range(dice.choice((1, 2, 60))):
                    value = _message([(number, 2, value)])
                fields[at] = (number, 2, value)
            case 4 if kind == 2:
                fields[at] = (number, 2, dice.choice(ODD_TEXTS).encode(errors="surrogatepass"))
            case 5:
                other = dice.choice(fields)
                fields[at] = (number, other[1], other[2])
            case _:
                odd = dice.choice((0, 1, 2, 7, 127, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
                fields[at] = (number, 0, varint(odd))
    return _message(fields)


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Fields of a message; nothing if it is none."""
    fields, at = [], 0
    try:
        while at < len(data):
            key, at = _read_varint(data, at)
            number, kind = key >> 3, key & 7
            start = at
            if kind == 0:
                _, at = _read_varint(data, at)
            elif kind == 2:
                size, start = _read_varint(data, at)
                at = start + size
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                return []
            if at > len(data) or not number:
                return []
            fields.append((number, kind, data[start:at]))
    except IndexError:
        return []
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError


def _message(fields: list[tuple[int, int, bytes]]) -> bytes:
    return b"".join(
        varint(number << 3 | kind) + (varint(len(value)) if kind == 2 else b"") + value
        for number, kind, value in fields
    )


def zipped(inner: Mutator) -> Mutator:
    """An archive with an entry changed (.json by ``inner``), renamed, lost, repeated, compressed."""

    def mutate(data: bytes, dice: Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                entries = [(name, file.read(name)) for name in file.namelist()]
        except Exception:  # noqa: BLE001 - whatever stumbles over what was changed before
            return raw(data, dice)
        if not entries or dice.random() < 0.15:
            return raw(data, dice)
        at = dice.randrange(len(entries))
        if dice.random() < 0.8:
            weights = [8 if name.endswith(".json") else 1 for name, _ in entries]
            at = dice.choices(range(len(entries)), weights)[0]
        name, content = entries[at]
        match dice.randrange(8):
            case 0:
                del entries[at]
            case 1:
                entries.append(
                    (dice.choice((name, "x/../../y", "/abs", f"{name}x", dice.choice(ODD_TEXTS))), content)
                )
            case 2:
                entries[at] = (name, cut(content, dice))
            case _:
                entries[at] = (name, (inner if name.endswith(".json") else raw)(content, dice))
        how = zipfile.ZIP_DEFLATED if dice.random() < 0.03 else zipfile.ZIP_STORED
        buffer = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", how) as file:
            warnings.simplefilter("ignore")
            for each, what in entries:
                file.writestr(zipfile.ZipInfo(each.encode(errors="replace").decode() or "x"), what)
        return buffer.getvalue()

    return mutate


def packed(data: bytes, dice: Random) -> bytes:
    """One byte that says how, then gzip or deflate: what is in it changed, or the stream."""
    if len(data) < 2 or dice.random() < 0.5:
        return raw(data, dice)
    try:
        content = zlib.decompressobj(wbits=47).decompress(data[1:], 1 << 16)
    except zlib.error:
        return raw(data, dice)
    content = raw(content, dice)
    if dice.random() < 0.2:
        content = content[:2000] * dice.choice((20, 300))
    again = zlib.compress(content) if dice.random() < 0.5 else gzip.compress(content, mtime=0)
    return data[:1] + again * dice.choice((1, 1, 1, 2))


def headed(head: int, inner: Mutator) -> Mutator:
    """The first ``head`` bytes are options of the target: turned at times; the rest is ``inner``'s."""

    def mutate(data: bytes, dice: Random) -> bytes:
        options, rest = bytearray(data[:head].ljust(head, b"\0")), data[head:]
        if head and dice.random() < 0.3:
            options[dice.randrange(head)] = dice.randrange(256)
        return bytes(options) + inner(rest, dice)

    return mutate


def mixed(inner: Mutator) -> Mutator:
    """Mostly ``inner``; at times bytes, or a cut."""

    def mutate(data: bytes, dice: Random) -> bytes:
        chance = dice.random()
        return (inner if chance < 0.8 else raw if chance < 0.95 else cut)(data, dice)

    return mutate


def http2(data: bytes, dice: Random) -> bytes:
    """Of frames of HTTP/2 one is changed: its type, flags, stream, content; or its length lies."""
    frames, at = [], 0
    while at + 9 <= len(data):
        end = at + 9 + int.from_bytes(data[at : at + 3], "big")
        frames.append((bytearray(data[at + 3 : at + 9]), data[at + 9 : end]))
        at = end
    if not frames or dice.random() < 0.1:
        return raw(data, dice)
    chosen = dice.randrange(len(frames))
    head, content = frames[chosen]
    match dice.randrange(7):
        case 0:
            head[0] = dice.randrange(11)
        case 1:
            head[1] ^= 1 << dice.randrange(8)
        case 2:
            head[2:] = dice.choice((0, 1, 3, 9, 2**31 - 1, 2**32 - 1)).to_bytes(4, "big")
        case 3:
            frames.insert(dice.randrange(len(frames)), (bytearray(head), content))
        case 4:
            del frames[chosen]
        case 5 if len(content) >= 6:
            odd = dice.choice((0, 1, 2**14, 2**24, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(4, "big")
            frames[chosen] = (head, content[:2] + odd + content[6:])
        case _:
            frames[chosen] = (
                head,
                raw(content, dice) if content else dice.randbytes(dice.choice((1, 4, 6, 8))),
            )
    return b"".join(len(what).to_bytes(3, "big") + bytes(about) + what for about, what in frames)
