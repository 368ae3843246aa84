"""Frames to bytes and back: a 4-byte little-endian length, then msgpack. It knows no socket."""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from clockwork_serve.errors import TransportError, encodable
from clockwork_serve.messages import Frame
from clockwork_serve.units import KIB, MIB

FRAME_BYTES_MAX: Final = 64 * MIB
"""Tensors never travel in frames; the largest are statistics of all models, about 1 kB each."""

_READ_BYTES: Final = 256 * KIB
_LENGTH: Final = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class FrameWriter:
    """Collects frames until they are taken as one buffer."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def add(self, frame: Frame) -> None:
        """Append one frame; raises :class:`TransportError`, and appends nothing, if it is too large.

        Text that is no Unicode is sent with escapes: no string may end the process that passes it on.
        """
        pending = self._pending
        start = len(pending)
        pending += b"\0\0\0\0"
        try:
            _encoder.encode_into(frame, pending, -1)
        except UnicodeEncodeError:
            del pending[start + _LENGTH.size :]
            pending += escaped(frame)
        length = len(pending) - start - _LENGTH.size
        if length > FRAME_BYTES_MAX:
            del pending[start:]
            raise TransportError(_too_large(f"the {type(frame).__name__} to send", length))
        _LENGTH.pack_into(pending, start, length)

    def take(self) -> bytearray:
        """All bytes so far, which belong to the caller from now on."""
        pending, self._pending = self._pending, bytearray()
        return pending


class FrameReader:
    """Turns bytes, however they were cut, into frames. One buffer is reused; it grows for large frames."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(_READ_BYTES))
        # Bytes [start, end) were received and are not decoded yet.
        self._start = 0
        self._end = 0

    def room(self) -> memoryview:
        """Where to put what is read next; never empty."""
        return self._view[self._end :]

    def received(self, nbytes: int, frames: list[Frame]) -> None:
        """Append to ``frames`` all that ``nbytes`` more bytes complete.

        Raises :class:`TransportError` at the first malformed frame; those before it were appended.
        """
        self._end += nbytes
        view, start, end = self._view, self._start, self._end
        needed = _LENGTH.size
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, start)
            if length > FRAME_BYTES_MAX:
                raise TransportError(_too_large("a frame received", length))
            needed = _LENGTH.size + length
            if end - start < needed:
                break
            frames.append(_decode(view[start + _LENGTH.size : start + needed]))
            start += needed
            needed = _LENGTH.size
        self._start = start
        self._make_room(needed)

    def _make_room(self, needed: int) -> None:
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._view) > _READ_BYTES:
                self._view = memoryview(bytearray(_READ_BYTES))
            return
        if self._start + max(needed, _READ_BYTES // 2) <= len(self._view) and self._end < len(self._view):
            return
        rest = bytes(self._view[self._start : self._end])
        if needed > len(self._view):
            self._view = memoryview(bytearray(needed))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)


def escaped(record: object) -> bytes:
    """A record as msgpack, escapes in its text where it is no Unicode."""
    return _encoder.encode(_escaped(msgspec.to_builtins(record, builtin_types=(bytes,))))


def _escaped(found: Any) -> Any:
    """Plain data with all its text encodable."""
    match found:
        case str():
            return encodable(found)
        case dict():
            return {_escaped(key): _escaped(value) for key, value in found.items()}
        case list() | tuple():
            return [_escaped(each) for each in found]
        case _:
            return found


def _decode(payload: memoryview) -> Frame:
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise TransportError(f"malformed frame of {len(payload)} bytes: {error}") from None


def _too_large(what: str, length: int) -> str:
    return f"{what} has {length} bytes, more than the {FRAME_BYTES_MAX} that a frame may have"
