"""Access control: API keys and their rights, tenants and their limits, other sites' pages, TLS settings."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from enum import StrEnum
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from clockwork_serve.config import Settings
from clockwork_serve.errors import ClockworkError, ConfigError, printable
from clockwork_serve.messages import LEAST_PRIORITY, USUAL_PRIORITY, Quota
from clockwork_serve.serve.gateway.client_shm import is_loopback
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.gateway.tls import REFRESH_S, Tls, TlsFiles, Watched, server_context, warn_of_mode
from clockwork_serve.units import NS_PER_MS, NS_PER_S, ms

# ------------------------------------------------------------
# Tenants, as tables of the key file: what each may use, and what it may request.


NAME: Final = re.compile("[A-Za-z0-9._:@/-]{1,64}")  # the names that tenants and holders of keys may have


class Tenant(Struct, frozen=True, kw_only=True):
    """What one tenant may use (None: no limit) and request.

    A request with an SLO below ``min_slo_ns`` gets that SLO; one with a priority above ``max_priority`` gets
    that priority. ``decide_ns``: how long the yes or no may take for requests that do not say; -1: as their
    models say.
    """

    name: str
    device_ms_per_s: float | None = None
    loaded_bytes_per_s: int | None = None
    burst_s: float = 1.0
    min_slo_ns: int = 0
    max_priority: int = 1
    decide_ns: int = -1

    @property
    def quota(self) -> Quota | None:
        """What the controller enforces; None if there is no limit."""
        device_ms, loaded_bytes = self.device_ms_per_s, self.loaded_bytes_per_s
        if device_ms is None and loaded_bytes is None:
            return None
        return Quota(
            tenant=self.name, burst_ns=round(self.burst_s * NS_PER_S), loaded_bytes_per_s=loaded_bytes,
            device_ns_per_s=None if device_ms is None else ms(device_ms),
        )  # fmt: skip


class Caps:
    """The limits on what tenants may request, as the key file says now."""

    def __init__(self, known: Callable[[], Mapping[str, Tenant]] = dict) -> None:
        self._known = known

    def of(self, tenant: str, slo_ns: int, priority: int = 0) -> tuple[int, int]:
        """The SLO and the priority that a request gets; priority 0 stands for the default."""
        if not tenant:
            return slo_ns, priority
        found = self._known().get(tenant)
        if found is None:
            return slo_ns, priority
        if (priority or USUAL_PRIORITY) < found.max_priority:
            priority = found.max_priority
        return max(slo_ns, found.min_slo_ns), priority

    def decide_ns(self, tenant: str, wanted_ns: int, model_ns: int) -> int:
        """How long a request's yes or no may take; -1: as the server's setting says."""
        if wanted_ns >= 0:
            return wanted_ns
        found = self._known().get(tenant) if tenant else None
        return model_ns if found is None or found.decide_ns < 0 else found.decide_ns


_LIMITS: Final[dict[str, tuple[str, float, float]]] = {
    "device_ms_per_s": ("a number", 0.001, 1e9),
    "loaded_bytes_per_s": ("a whole number", 1, 1 << 50),
    "burst_s": ("a number", 0.001, 3600),
    "min_slo_ms": ("a number", 0.001, 24 * 3600 * 1000),
    "max_priority": ("a whole number", 1, LEAST_PRIORITY),
    "decide_ms": ("a number", 0, 3600 * 1000),
}
FIELDS: Final = ("name", *_LIMITS)  # the fields of a table ``[[tenants]]``
"""The fields of a table ``[[tenants]]``."""


def _tenants(tables: Sequence[Mapping[str, object]], path: str) -> dict[str, Tenant]:
    """Tenants by name. Raises :class:`ConfigError`."""
    found: dict[str, Tenant] = {}
    for index, table in enumerate(tables):
        place = f"tenants[{index}]"
        for field in table:
            if field not in FIELDS:
                near = get_close_matches(field, FIELDS, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(FIELDS)}"
                raise _wrong(f"a known field in {place}", repr(field), path, remedy)
        name = table.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            shown = "none" if name is None else repr(name)
            expected = f"a name of 1 to 64 letters, digits or ._:@/- in {place}"
            raise _wrong(expected, shown, path, "correct it")
        if name in found:
            raise _wrong("each tenant once", f"{name!r} again in {place}", path, "make it one table")
        numbers = {
            field: _number(f"{place}.{field}", _LIMITS[field], table[field], path)
            for field in _LIMITS
            if field in table
        }
        for field in ("min_slo_ms", "decide_ms"):
            if field in numbers:
                numbers[field.replace("_ms", "_ns")] = round(numbers.pop(field) * NS_PER_MS)
        found[name] = Tenant(name=name, **numbers)  # type: ignore[arg-type]
    return found


def _number(where: str, limits: tuple[str, float, float], value: object, path: str) -> float:
    kind, least, most = limits
    types = (int,) if kind == "a whole number" else (int, float)
    if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
        right = False
    else:
        right = least <= value <= most
    if not right:
        expected = f"{where} to be {kind} from {least:.15g} to {most:.15g}"
        raise _wrong(expected, repr(value), path, "correct it")
    assert isinstance(value, int | float)
    return value


# ------------------------------------------------------------
# API keys and their rights, from one file, which holds only the SHA-256 of each key.
#
# A key is 256 random bits, so its hash can be neither reversed nor guessed. Looking the hash up leaks nothing
# by its timing, for an attacker cannot choose what a key hashes to.


_LARGEST_FILE: Final = 16 << 20
_REMEDY: Final = "a table [[keys]] has name, sha256 and may; `clockwork key NAME` makes one"

_log = logging.getLogger(__name__)


class Right(StrEnum):
    """What a key allows."""

    INFER = "infer"  # to infer, and to read what is served
    METRICS = "metrics"  # to read the metrics
    ADMIN = "admin"  # to change anything: load, unload, register memory, set what is logged


class Holder(Struct, frozen=True):
    """The owner of a key, its rights, and the tenant whose quota it uses."""

    name: str
    rights: frozenset[Right]
    tenant: str


class AccessDenied(ClockworkError):
    """Access is denied. ``known``: not for want of a known key, but what it asks is not allowed."""

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
    """The content of a key file: holders by the SHA-256 of their key, tenants by name."""

    holders: dict[bytes, Holder]
    tenants: dict[str, Tenant]


class KeyRing:
    """The keys of one file, which is read again when it changes. :meth:`authorize` is for any thread."""

    def __init__(self, path: str) -> None:
        """Raises :class:`ConfigError`."""
        self._path = path
        self._file = Watched((path,), lambda: read_keys(path))
        self._denied: Counter[bool] = Counter()  # by whether the key was known; since the last log line
        self._denials = Lock()

    def authorize(self, right: Right, authorization: bytes | None, api_key: bytes | None) -> Holder:
        """The holder of the key in a request's headers. Raises :class:`AccessDenied`."""
        key = api_key
        if authorization is not None and authorization[:7].lower() == b"bearer ":
            key = authorization[7:].strip()
        holder = self._file.content.holders.get(sha256(key).digest()) if key is not None else None
        if holder is None:
            self._count(known=False)
            found = "none" if key is None else "one that is unknown"
            raise AccessDenied(
                f"API key: expected one in 'Authorization: Bearer KEY' or 'x-api-key: KEY', found {found}",
                known=False,
            )
        if right not in holder.rights:
            self._count(known=True)
            raise AccessDenied(
                f"API key of {holder.name}: expected the right '{right}', found only "
                f"{', '.join(sorted(holder.rights))}",
                known=True,
            )
        return holder

    def tenants(self) -> dict[str, Tenant]:
        """All tenants of the file, by name."""
        return self._file.content.tenants

    def refresh(self) -> None:
        """Log the denials since the last call, and read the file again if it changed."""
        self._log_denials()
        if self._file.refresh():
            _log.info("api_keys: read %d keys again from %s", len(self._file.content.holders), self._path)

    def _count(self, *, known: bool) -> None:
        with self._denials:
            self._denied[known] += 1

    def _log_denials(self) -> None:
        with self._denials:
            denied, self._denied = self._denied, Counter()
        if denied:
            _log.warning(
                "api_keys: denied %d requests without a known key and %d without the right",
                denied[False], denied[True],
            )  # fmt: skip


def check_keys(path: str) -> None:
    """Raise :class:`ConfigError` if the file is invalid; warn if every user of this host may read it."""
    read_keys(path)
    warn_of_mode("api_keys", path)


def read_keys(path: str) -> Keys:
    """The content of the file. Raises :class:`ConfigError`."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise _wrong("a readable file", error.strerror or str(error), path) from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        # A user with write access could grant any right.
        found = f"mode {stat.S_IMODE(mode):04o}"
        raise _wrong("a file that only its owner may write", found, path, "chmod 600 it")
    if len(content) > _LARGEST_FILE:
        raise _wrong(f"at most {_LARGEST_FILE} bytes", "more", path)
    try:
        file_ = msgspec.toml.decode(content, type=_File)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _wrong("keys as TOML", str(error), path) from None
    tenants = _tenants(file_.tenants, path)
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


# ------------------------------------------------------------
# Pages of other sites, which may change nothing where no API keys are asked for.
#
# A page may have its reader's browser send requests to any address, also to ones that only the browser can
# reach. The browser then says in Origin whose page it is. With DNS rebinding the page's own name leads to us,
# so that to the browser we are its origin; but Host is that name. Programs send no Origin, and as Host what
# they were given: an address, or a name of this server.


_PRIVATE: Final = (".localhost", ".local", ".internal")  # ends of names that no public site can have
HOSTS: Final = "/etc/hosts"
_WARNED_MAX: Final = 16
_HTTP_PORTS: Final = (None, 80, 443)


class Sites:
    """Which sites' requests may change something: those of this server's own names, and trusted ones.

    :meth:`check` is for any thread.
    """

    def __init__(self, settings: Settings) -> None:
        self._trusted = frozenset(settings.trusted_hosts)
        self._own = {settings.host.lower(), *_names_of_this_host(), *self._trusted}
        # With TLS a browser has compared the name with our certificate, so that no other name leads here.
        self._any_host = bool(settings.tls_certificate)
        self._warned: set[str] = set()

    def check(self, host: bytes | None, origin: bytes | None) -> None:
        """Raise :class:`AccessDenied` if ``Host`` and ``Origin`` are those of another site's page."""
        name, port = _authority(b"" if host is None else b"//" + host)
        if host is not None and not self._is_own(name):
            self._deny("Host", host, "a name of this server")
        if origin is not None:
            page, page_port = _authority(origin)
            same_port = port == page_port or (port in _HTTP_PORTS and page_port in _HTTP_PORTS)
            if page not in self._trusted and not (page and page == name and same_port):
                self._deny("Origin", origin, "none, or this server's own")

    def _is_own(self, name: str) -> bool:
        if self._any_host or name in self._own or name.endswith(_PRIVATE):
            return True
        try:
            # A name is resolved, and may be made to lead here; an address is where the client meant to go.
            ip_address(name.partition("%")[0])
        except ValueError:
            return bool(name) and "." not in name
        return True

    def _deny(self, header: str, found: bytes, expected: str) -> None:
        shown = printable(found.decode("latin-1"), 100)
        if len(self._warned) < _WARNED_MAX and shown not in self._warned:
            self._warned.add(shown)
            _log.warning(
                "trusted_hosts: refused a request to change something, with %s '%s'; add that if it is a "
                "name of this server", header, shown,
            )  # fmt: skip
        raise AccessDenied(
            f"header '{header}': expected {expected}, since a page of another site might ask this through a "
            f"browser, and there are no API keys here; found '{shown}'; ask by an address of this server, or "
            "add the name to its trusted_hosts, or give it api_keys",
            known=True,
        )


def _names_of_this_host() -> set[str]:
    """Its name, and those beside it in the file of hosts: a resolver may be anybody's, and is not asked."""
    own = socket.gethostname().lower()
    names = {own}
    with suppress(OSError):
        for line in Path(HOSTS).read_text(errors="replace").splitlines():
            beside = line.partition("#")[0].lower().split()[1:]
            if own in beside:
                names.update(beside)
    return names


def _authority(url: bytes) -> tuple[str, int | None]:
    """The name and port in a URL; the name is empty if there is none."""
    try:
        found = urlsplit(url.strip().decode("ascii"))
        return (found.hostname or "").removesuffix("."), found.port
    except ValueError:
        return "", None


# ------------------------------------------------------------
# TLS and API keys of a gateway, from its settings.


def tls_files(settings: Settings) -> TlsFiles | None:
    """The TLS files; None if TLS is off."""
    if not settings.tls_certificate:
        return None
    return TlsFiles(
        certificate=settings.tls_certificate, key=settings.tls_key, client_ca=settings.tls_client_ca
    )


class AccessControl:
    """Access control of one gateway, shared by its servers.

    Without ``keys`` everything is allowed, but to the pages of other ``sites``.
    """

    def __init__(self, config: GatewayConfig) -> None:
        """Raises :class:`ConfigError` for a file that will not do."""
        self.config = config
        api_keys, files = config.settings.api_keys, tls_files(config.settings)
        self.keys = KeyRing(api_keys) if api_keys else None
        self.sites = Sites(config.settings)
        self.tls = None if files is None else Tls(files)

    async def keep_fresh(self) -> None:
        """Read files again when they change; until cancelled."""
        while self.keys is not None or self.tls is not None:
            await asyncio.sleep(REFRESH_S)
            if self.keys is not None:
                self.keys.refresh()
            if self.tls is not None:
                self.tls.refresh()


def check_access_files(settings: Settings) -> None:
    """Check all access files before any process is started, and warn of what is open to everyone.

    Raises :class:`ConfigError`.
    """
    files, host = tls_files(settings), settings.host
    if files is not None:
        server_context(files)
        warn_of_mode("tls_key", files.key)
    if settings.api_keys:
        check_keys(settings.api_keys)
    if host == "localhost" or is_loopback(host):
        return
    if not settings.api_keys and not settings.tls_client_ca:
        _log.warning(
            "host: listening on %s, and everyone who can connect may do everything; "
            "name a file of API keys with api_keys", host,
        )  # fmt: skip
    elif files is None:
        _log.warning(
            "host: listening on %s without TLS, so API keys can be read in transit; set tls_certificate "
            "and tls_key, or let a proxy in front of it encrypt", host,
        )  # fmt: skip
