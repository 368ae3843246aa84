"""Shared memory of clients: references to regions, and the check of their bounds.

A *key* names a POSIX shared memory object, a *region* is a registered piece of one, and a *reference* is a
tensor's place in a region. Texts of errors begin as those that stock clients know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip.status import Forbidden

SHARED_MEMORY_OFF: Final = (
    "shared memory of clients is off; start the server with --shared-memory PREFIX (which keys must have, "
    "such as /clockwork-), or send tensors in the request"
)
CUDA_SHARED_MEMORY: Final = (
    "CUDA shared memory is not supported; use system shared memory, or send tensors in the request"
)
NAME_BYTES: Final = 255  # the longest name of a region or of an object, as file systems have it

_REGION: Final = "shared_memory_region"
_OFFSET: Final = "shared_memory_offset"
_BYTE_SIZE: Final = "shared_memory_byte_size"


class SharedRef(Struct, frozen=True):
    """Where a tensor is: ``nbytes`` from ``offset`` of the region of that name."""

    region: str
    offset: int
    nbytes: int

    def parameters(self, nbytes: int) -> dict[str, str | int]:
        """As parameters of a tensor that took so many bytes there."""
        found: dict[str, str | int] = {_REGION: self.region, _BYTE_SIZE: nbytes}
        if self.offset:
            found[_OFFSET] = self.offset
        return found


class SharedRegion(Struct, frozen=True):
    """A registered region: ``byte_size`` bytes from ``offset`` of the object that ``key`` names."""

    name: str
    key: str
    offset: int
    byte_size: int

    def start(self, ref: SharedRef) -> int:
        """Where in the object the reference begins. Raises :class:`InvalidRequest` if it is outside."""
        if ref.offset >= self.byte_size:
            raise InvalidRequest(
                f"Invalid offset for shared memory region: '{self.name}': expected less than its "
                f"{self.byte_size} bytes, found {ref.offset}"
            )
        if ref.offset + ref.nbytes > self.byte_size:
            raise InvalidRequest(
                f"Invalid offset + byte size for shared memory region: '{self.name}': expected at most its "
                f"{self.byte_size} bytes, found {ref.offset} + {ref.nbytes}"
            )
        return self.offset + ref.offset


def shared_ref(what: str, name: str, parameters: Mapping[str, Any]) -> SharedRef | None:
    """The reference in a tensor's parameters, if there is one. Raises :class:`InvalidRequest`."""
    region = parameters.get(_REGION)
    if region is None:
        for alone in (_BYTE_SIZE, _OFFSET):
            if alone in parameters:
                raise InvalidRequest(
                    f"inference {what} '{name}': parameter '{alone}': expected '{_REGION}' too, found none"
                )
        return None
    if not isinstance(region, str) or not region:
        raise InvalidRequest(
            f"inference {what} '{name}': parameter '{_REGION}': expected a region's name, found {region!r}"
        )
    where = f"inference {what} '{name}': parameter"
    return SharedRef(
        region,
        _whole(f"{where} '{_OFFSET}'", parameters.get(_OFFSET, 0)),
        _whole(f"{where} '{_BYTE_SIZE}'", parameters.get(_BYTE_SIZE)),
    )


def shared_region(name: str, fields: Mapping[str, Any]) -> SharedRegion:
    """What a client registers: ``key``, ``byte_size``, perhaps ``offset``. Raises :class:`InvalidRequest`."""
    where = f"failed to register shared memory region '{name}': "
    if not name or len(name.encode(errors="replace")) > NAME_BYTES:
        raise InvalidRequest(f"{where}name: expected 1 to {NAME_BYTES} bytes, found {len(name)}")
    key = fields.get("key")
    if not isinstance(key, str):
        raise InvalidRequest(f"{where}key: expected text such as /clockwork-0, found {key!r}")
    byte_size = _whole(f"{where}byte_size", fields.get("byte_size"))
    if not byte_size:
        raise InvalidRequest(f"{where}byte_size: expected at least 1, found 0")
    return SharedRegion(name, key, _whole(f"{where}offset", fields.get("offset", 0)), byte_size)


def object_name(key: str, prefix: str) -> str:
    """The file name of the object that a key means; ``prefix`` is what keys must begin with.

    Raises :class:`InvalidRequest` for what is no such name, :class:`Forbidden` for one without the prefix.
    """
    name = key.removeprefix("/")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= NAME_BYTES or name in (".", "..") or "/" in name or "\0" in name:
        raise InvalidRequest(
            f"Unable to open shared memory region: {key[:NAME_BYTES]!r}: expected a key of 1 to "
            f"{NAME_BYTES} bytes without a slash but the first"
        )
    if not name.startswith(prefix.removeprefix("/")):
        raise Forbidden(
            f"Unable to open shared memory region: '{key}': expected a key that begins with '{prefix}', "
            "as the server's setting shared_memory says"
        )
    return name


def _whole(where: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # to JSON 8.0 is a whole number too
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"{where}: expected a number of bytes, found {value!r}")
    return value
