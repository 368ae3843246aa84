"""Shared memory of clients: registration, reading of inputs, writing of outputs; it is never mapped.

Accessing a mapping after its owner shrank the object would kill the process. So tensors are copied by read
and write calls into and out of our own memory, and the copy is what is validated: the client cannot change
it.

Registrations are symbolic links in a private folder that all gateways share. Each is created and read
atomically, and is visible to whichever gateway the client reaches next. An object is opened for every use,
then closed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import (
    SHARED_MEMORY_OFF,
    Forbidden,
    InferCall,
    OutputTensor,
    RegionExists,
    Served,
    SharedRef,
    SharedRegion,
    TooLarge,
    UnknownRegion,
    Unsupported,
    object_name,
)
from clockwork_serve.serve.gateway.requests import Body, Slots

OBJECTS: Final = "/dev/shm"  # noqa: S108 - where POSIX shared memory is
REGIONS_MAX: Final = 4096
# O_NONBLOCK: do not wait for a lease on the file, or for the other end of a pipe.
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SharedRegion).decode


class Regions:
    """Registered regions, in ``table``.

    Keys must begin with ``prefix``; objects must belong to the user ``owner``.
    """

    def __init__(self, prefix: str, table: Path, owner: int | None = None) -> None:
        table.mkdir(mode=0o700, exist_ok=True)
        self._prefix = prefix
        self._table = table
        self._owner = os.geteuid() if owner is None else owner

    # Registrations

    def register(self, region: SharedRegion) -> None:
        """Register a region. Raises :class:`InvalidRequest`."""
        if len(list(self._table.iterdir())) >= REGIONS_MAX:
            raise TooLarge(
                f"failed to register shared memory region '{region.name}': expected at most {REGIONS_MAX} "
                "regions, found as many; unregister some"
            )
        with self._opened(region, os.O_RDONLY, region.offset + region.byte_size):
            pass
        try:
            self._entry(region.name).symlink_to(_encode(region).hex())
        except FileExistsError:
            raise RegionExists(
                f"shared memory region '{region.name}' already in manager; unregister it first"
            ) from None

    def unregister(self, name: str = "") -> None:
        """Remove one region, or all; none need exist. No tensor is copied to it after this returns."""
        for entry in [self._entry(name)] if name else self._table.iterdir():
            entry.unlink(missing_ok=True)

    def registered(self, name: str = "") -> list[SharedRegion]:
        """One region, or all sorted by name. Raises :class:`UnknownRegion`."""
        if name:
            found = self._find(self._entry(name))
            if found is None:
                raise UnknownRegion(f"Unable to find system shared memory region: '{name}'")
            return [found]
        every = [self._find(entry) for entry in self._table.iterdir()]
        return sorted((region for region in every if region is not None), key=lambda region: region.name)

    # Tensors

    def read_inputs(self, call: InferCall, slots: Slots, body: Body | None) -> Body | None:
        """Copy a call's inputs out of shared memory; the room they got in the slots' region, else ``body``.

        Raises :class:`InvalidRequest`, and then holds no room.
        """
        shared = [tensor for tensor in call.inputs if tensor.shared is not None]
        total = sum(tensor.shared.nbytes for tensor in shared if tensor.shared is not None)
        if total > slots.region.size:
            raise TooLarge(
                f"inputs in shared memory: expected at most {slots.region.size} bytes, found {total}; "
                "send fewer rows at once, or raise the server's gateway_memory"
            )
        # Only inputs in one piece, one after the other, can be used in place.
        own = slots.body(total, 0) if body is None and shared and len(shared) == len(call.inputs) else None
        view = memoryview(bytearray(total)) if own is None else own.view
        try:
            at = 0
            for tensor in shared:
                assert tensor.shared is not None
                part = view[at : at + tensor.shared.nbytes]
                self._read(tensor.shared, part)
                tensor.data = bytes(part) if own is None else part
                at += len(part)
        except BaseException:
            if own is not None:
                slots.drop(own)
            raise
        return body if own is None else own

    def check_outputs(self, call: InferCall, served: Served, rows: int) -> None:
        """Raise :class:`InvalidRequest` if an output is known not to fit where it is to be written."""
        for wish in call.outputs or ():
            if wish.shared is not None:
                needed = served.output_bytes(wish.name, rows)
                if needed is not None:
                    _check_room(wish.name, wish.shared, needed)
                with self._reached(wish.shared, os.O_WRONLY):
                    pass

    def write_outputs(self, call: InferCall, outputs: list[OutputTensor]) -> None:
        """Copy outputs to where the call wants them. Raises :class:`InvalidRequest`."""
        by_name = {tensor.name: tensor for tensor in outputs}
        for wish in call.outputs or ():
            if wish.shared is not None:
                tensor = by_name[wish.name]
                _check_room(wish.name, wish.shared, len(tensor.data))
                self._write(wish.shared, memoryview(tensor.data))

    def _read(self, ref: SharedRef, into: memoryview) -> None:
        with self._reached(ref, os.O_RDONLY) as (fd, start):
            at = start
            while into:
                count = os.preadv(fd, [into], at)
                if not count:
                    raise InvalidRequest(
                        f"shared memory region '{ref.region}' was truncated while it was read: "
                        f"{len(into)} bytes are missing"
                    )
                into, at = into[count:], at + count

    def _write(self, ref: SharedRef, data: memoryview) -> None:
        with self._reached(ref, os.O_WRONLY) as (fd, start):
            at = start
            while data:
                try:
                    count = os.pwritev(fd, [data], at)
                except OSError as error:
                    raise InvalidRequest(
                        f"shared memory region '{ref.region}' cannot be written: {error.strerror}"
                    ) from None
                data, at = data[count:], at + count

    # Objects

    @contextmanager
    def _reached(self, ref: SharedRef, how: int) -> Iterator[tuple[int, int]]:
        """The open file of a reference and the offset in it, large enough at this moment."""
        region = self._find(self._entry(ref.region))
        if region is None:
            raise UnknownRegion(f"Unable to find shared memory region: '{ref.region}'; register it first")
        start = region.start(ref)
        with self._opened(region, how, start + ref.nbytes) as fd:
            yield fd, start

    @contextmanager
    def _opened(self, region: SharedRegion, how: int, end: int) -> Iterator[int]:
        """The open object of a region, if it has at least ``end`` bytes. Raises :class:`InvalidRequest`."""
        key = region.key
        name = object_name(key, self._prefix)
        try:
            fd = os.open(f"{OBJECTS}/{name}", how | _FLAGS)
        except OSError as error:
            raise InvalidRequest(
                f"Unable to open shared memory region: '{key}': {error.strerror}; expected shared memory "
                f"that the server's user (id {self._owner}) may read and write"
            ) from None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != self._owner or found.st_nlink > 1:
                raise Forbidden(
                    f"Unable to open shared memory region: '{key}': expected shared memory of one name "
                    f"and of the server's user (id {self._owner}); found {stat.filemode(found.st_mode)} with "
                    f"{found.st_nlink} names of user {found.st_uid}"
                )
            if found.st_size < end:
                raise InvalidRequest(
                    f"shared memory region '{region.name}': invalid args: expected at least {end} bytes in "
                    f"'{key}', found {found.st_size}"
                )
            yield fd
        finally:
            os.close(fd)

    def _entry(self, name: str) -> Path:
        return self._table / hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()

    @staticmethod
    def _find(entry: Path) -> SharedRegion | None:
        try:
            return _decode(bytes.fromhex(os.readlink(entry)))
        except FileNotFoundError:
            return None


def allowed(regions: Regions | None, *, local: bool) -> Regions:
    """The regions, for a client that may use them. Raises :class:`InvalidRequest`."""
    if regions is None:
        raise Unsupported(SHARED_MEMORY_OFF)
    if not local:
        raise Forbidden(
            "shared memory is for clients on the server's loopback interface (127.0.0.1 or ::1) only; "
            "connect there, or send tensors in the request"
        )
    return regions


def is_loopback(host: str) -> bool:
    """Whether an address belongs to this host's own loopback interface."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _check_room(name: str, ref: SharedRef, needed: int) -> None:
    if needed > ref.nbytes:
        raise InvalidRequest(
            f"shared memory size specified with the request for output '{name}' ({ref.nbytes} bytes) "
            f"should be at least {needed} bytes to hold the results"
        )
