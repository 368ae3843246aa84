"""API keys: who may do what, as one file says. It knows no transport, and no key, only their SHA-256.

A key is 256 random bits, so its hash can neither be reversed nor guessed, and looking the hash up tells an
attacker nothing by its timing: nobody can choose what a key hashes to.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.serve.gateway_tenants import NAME, Tenant, Unfit, read_tenants
from clockwork_serve.serve.gateway_watch import Watched

_LARGEST_FILE: Final = 16 << 20
_REMEDY: Final = "a table [[keys]] has name, sha256 and may; `clockwork key NAME` makes one"

_log = logging.getLogger(__name__)


class Right(StrEnum):
    """What a key may be good for."""

    INFER = "infer"
    """To infer, and to read what is served."""
    METRICS = "metrics"
    """To read the metrics."""
    ADMIN = "admin"
    """To change anything: load, unload, register memory, set what is logged."""


class Holder(Struct, frozen=True):
    """Whose key it is, what it is good for, and whose quota it uses."""

    name: str
    rights: frozenset[Right]
    tenant: str


class Denied(ClockworkError):
    """No: ``known`` tells whether the key was known and lacks a right, or was missing or unknown."""

    def __init__(self, message: str, *, known: bool) -> None:
        super().__init__(message)
        self.known = known


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=f"^{NAME.pattern}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}$")]
    may: Annotated[list[Right], Meta(min_length=1)]
    tenant: str | None = None


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[list[_Entry], Meta(min_length=1)]
    tenants: list[dict[str, Any]] = []


class Keys(Struct, frozen=True):
    """What a file holds: holders by the hash of their key, tenants by name."""

    holders: dict[bytes, Holder]
    tenants: dict[str, Tenant]


class KeyRing:
    """The keys of one file, looked at again when it changes. Any thread may ask :meth:`admit`."""

    def __init__(self, path: str) -> None:
        """Raises :class:`ConfigError`."""
        self._path = path
        self._file = Watched((path,), lambda: read_keys(path))
        self._denied: Counter[bool] = Counter()  # by whether the key was known, since it was last told
        self._denials = Lock()

    def admit(self, right: Right, authorization: bytes | None, api_key: bytes | None) -> Holder:
        """Whose request it is, by what its headers hold. Raises :class:`Denied`."""
        key = api_key
        if authorization is not None and authorization[:7].lower() == b"bearer ":
            key = authorization[7:].strip()
        holder = self._file.content.holders.get(sha256(key).digest()) if key is not None else None
        if holder is None:
            self._count(known=False)
            found = "none" if key is None else "one that is unknown"
            raise Denied(
                f"API key: expected one in 'Authorization: Bearer KEY' or 'x-api-key: KEY', found {found}",
                known=False,
            )
        if right not in holder.rights:
            self._count(known=True)
            raise Denied(
                f"API key of {holder.name}: expected the right '{right}', found only "
                f"{', '.join(sorted(holder.rights))}",
                known=True,
            )
        return holder

    def tenants(self) -> dict[str, Tenant]:
        """All tenants of the file, by name."""
        return self._file.content.tenants

    def refresh(self) -> None:
        """Read the file again if it changed, and tell who was denied since."""
        self._tell_denials()
        if self._file.refresh():
            _log.info("api_keys: read %d keys again from %s", len(self._file.content.holders), self._path)

    def _count(self, *, known: bool) -> None:
        with self._denials:
            self._denied[known] += 1

    def _tell_denials(self) -> None:
        with self._denials:
            denied, self._denied = self._denied, Counter()
        if denied:
            _log.warning(
                "api_keys: denied %d requests without a known key and %d without the right",
                denied[False], denied[True],
            )  # fmt: skip


def check_keys(path: str) -> None:
    """Raise :class:`ConfigError` if the file will not do, and warn if every user may read it."""
    read_keys(path)
    if Path(path).stat().st_mode & stat.S_IROTH:
        _log.warning("api_keys: every user of this host may read %s; chmod 600 it", path)


def read_keys(path: str) -> Keys:
    """What the file holds. Raises :class:`ConfigError`."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise _wrong("a readable file", error.strerror or str(error), path) from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        # Who may write there may grant himself anything.
        found = f"mode {stat.S_IMODE(mode):04o}"
        raise _wrong("a file that only its owner may write", found, path, "chmod 600 it")
    if len(content) > _LARGEST_FILE:
        raise _wrong(f"at most {_LARGEST_FILE} bytes", "more", path)
    try:
        file_ = msgspec.toml.decode(content, type=_File)
        tenants = read_tenants(file_.tenants)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _wrong("keys as TOML", str(error), path) from None
    except Unfit as unfit:
        raise _wrong(unfit.expected, unfit.found, path, unfit.remedy) from None
    return Keys(_holders(file_.keys, tenants, path), tenants)


def _holders(entries: list[_Entry], tenants: dict[str, Tenant], path: str) -> dict[bytes, Holder]:
    holders = {}
    for index, entry in enumerate(entries):
        if entry.tenant is not None and entry.tenant not in tenants:
            expected = f"keys[{index}].tenant to be the name of a table [[tenants]]"
            raise _wrong(expected, repr(entry.tenant), path, "add that table, or correct the name")
        holder = Holder(entry.name, frozenset(entry.may), entry.tenant or entry.name)
        holders[bytes.fromhex(entry.sha256)] = holder
    if len(holders) < len(entries):
        raise _wrong("each sha256 once", "one twice", path)
    return holders


def _wrong(expected: str, found: str, path: str, remedy: str = _REMEDY) -> ConfigError:
    return ConfigError(f"api_keys: expected {expected}; found {found} in {path}; {remedy}")
