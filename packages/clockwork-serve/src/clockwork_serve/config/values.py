"""Readers of written values, which know of no setting.

A reader accepts both typed values (from TOML) and text (from the environment or the command line). It
raises :class:`Unfit`, to which the caller adds the field and the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from clockwork_serve.errors import did_you_mean, encodable
from clockwork_serve.units import GIB, KIB, MIB, plain

Value = TypeVar("Value")
Read = Callable[[object], Value]

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": GIB << 10,
}  # fmt: skip


class Unfit(Exception):
    """A value is invalid; ``expected`` completes "expected ...", ``remedy`` says what to write instead."""

    def __init__(self, expected: str, remedy: str) -> None:
        super().__init__(expected)
        self.expected = expected
        self.remedy = remedy


def text(value: object) -> str:
    """A non-empty string. It must be UTF-8: other bytes are valid in file names, but not in messages."""
    if not isinstance(value, str) or not value.strip():
        raise Unfit("text that is not empty", "write it in quotes")
    if "\0" in value or encodable(value) != value:
        raise Unfit("text in UTF-8 without NUL", "rename the file, or link to it under another name")
    return value.strip()


def path(value: object) -> str:
    """A path, with ``~`` resolved."""
    try:
        return str(Path(text(value)).expanduser())
    except RuntimeError:  # no such user, or one without a home
        raise Unfit("a path whose ~ is the home of a user", "write the whole path, or set HOME") from None


def folder_or_url(value: object) -> str:
    """A path, with ``~`` resolved, or a URL: ``s3://bucket/models``."""
    found = text(value)
    return found if URL.match(found) else path(found)


def switch(value: object) -> bool:
    """True or false; as text also yes/no, on/off, 1/0."""
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise Unfit("true or false", "write true or false")


def one_of(*choices: str) -> Read[str]:
    """A reader of one word out of ``choices``."""

    def read(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise Unfit(f"one of {', '.join(choices)}", did_you_mean(str(value), choices))

    return read


def read_policy(value: object) -> str:
    """The name of a scheduling policy, of this package or of an installed one."""
    from clockwork_serve.controller.policies import advice_on, is_policy, known_policies

    if isinstance(value, str) and is_policy(value):
        return value
    known = known_policies()
    name = str(value)
    raise Unfit(f"one of {known}", advice_on(name) or did_you_mean(name, known.split(", ")))


def integer(least: int, most: int, what: str = "a whole number") -> Read[int]:
    """A reader of whole numbers in ``least..most``."""
    expected = f"{what} from {least} to {most}"

    def read(value: object) -> int:
        found = value
        if isinstance(found, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", found):
            found = int(found)
        if isinstance(found, int) and not isinstance(found, bool) and least <= found <= most:
            return found
        raise Unfit(expected, f"write {what} in that range")

    return read


def span(least: int, most: int) -> Read[tuple[int, int]]:
    """A reader of two whole numbers in ``least..most``, the first not above the second: ``2..16``."""
    expected = f"two whole numbers from {least} to {most} such as 2..16, the smaller first"

    def read(value: object) -> tuple[int, int]:
        found = re.fullmatch(r"\s*(\d{1,9})\s*\.\.\s*(\d{1,9})\s*", value) if isinstance(value, str) else None
        if found is None or not least <= int(found[1]) <= int(found[2]) <= most:
            raise Unfit(expected, "write it like 2..16")
        return int(found[1]), int(found[2])

    return read


def number(least: float, most: float, *, above: bool = False) -> Read[float]:
    """A reader of finite numbers from ``least`` (or only above it) to ``most``."""
    first, second = ("above", "and up to") if above else ("from", "to")
    expected = f"a number {first} {plain(least)} {second} {plain(most)}"

    def read(value: object) -> float:
        try:
            found = float(value) if isinstance(value, str | int | float) else math.nan
        except (ValueError, OverflowError):
            found = math.nan
        if isinstance(value, bool) or not least <= found <= most or (above and found == least):
            raise Unfit(expected, "write a number in that range")
        return found

    return read


def port(value: object) -> int:
    """A TCP port; 0 lets the system choose one."""
    try:
        return integer(0, 65535, "a port")(value)
    except Unfit as unfit:
        raise Unfit("a port from 0 to 65535", "choose a free port; 0 lets the system choose") from unfit


def or_off(read: Read[Value]) -> Read[Value | None]:
    """A reader of the same, or None for ``off``."""
    return _or_word(read, _is_off, "off")


def or_none(read: Read[Value]) -> Read[Value | None]:
    """A reader of the same, or None for ``none``."""
    return _or_word(read, lambda value: isinstance(value, str) and value.strip().lower() == "none", "none")


def _or_word(read: Read[Value], is_word: Callable[[object], bool], word: str) -> Read[Value | None]:
    def read_or_word(value: object) -> Value | None:
        if is_word(value):
            return None
        try:
            return read(value)
        except Unfit as unfit:
            raise Unfit(f"{unfit.expected}, or {word}", unfit.remedy) from unfit

    return read_or_word


def _is_off(value: object) -> bool:
    return value is False or (isinstance(value, str) and value.strip().lower() in {"off", "none"})


def address(value: object) -> str:
    """An address and a port: ``10.0.0.1:7000``, ``[::1]:7000``, ``server:7000``."""
    found = value.strip() if isinstance(value, str) else ""
    if (match := _ADDRESS.fullmatch(found)) and 1 <= int(match[2]) <= 65535:
        return found
    raise Unfit("an address and a port", "write it like 10.0.0.1:7000")


def addresses(value: object) -> str:
    """One address and port, or several with commas between: ``10.0.0.1:7000,10.0.0.2:7000``."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [""]
    try:
        return ",".join(map(address, parts))
    except Unfit as unfit:
        raise Unfit(f"{unfit.expected}, or several with commas between", unfit.remedy) from None


def split_address(found: str) -> tuple[str, int]:
    """The two parts of an :func:`address`."""
    host, _, number = found.rpartition(":")
    return host.strip("[]"), int(number)


def split_addresses(found: str) -> list[tuple[str, int]]:
    """The parts of each of some :func:`addresses`, in their order."""
    return [split_address(one) for one in found.split(",")]


def http_url(value: object) -> str:
    """The URL of a server: ``http://127.0.0.1:4318``."""
    found = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+(/[!-~]*)?", found):
        return found
    raise Unfit("a URL", "write it like http://127.0.0.1:4318")


def machine_name(value: object) -> str:
    """A short name of letters, digits, dashes, dots and underscores."""
    found = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found):
        return found
    raise Unfit(
        "up to 64 letters, digits, dashes, dots and underscores, a letter or a digit first",
        "choose a name of those",
    )


def lease_name(value: object) -> str:
    """A :func:`machine_name`."""
    if isinstance(value, str) and value.strip().startswith("etcd:"):
        raise Unfit(
            "a name, as leases are in the shared store and no longer in etcd",
            "write a name such as main, and the place of the lease as --store FOLDER|s3://...",
        )
    return machine_name(value)


def host_name(value: object) -> str:
    """The name of one host, in small letters; no address: a certificate has those in another place."""
    found = value.strip().lower() if isinstance(value, str) else ""
    if _HOST_NAME.fullmatch(found) and not found.rpartition(".")[2].isdigit():
        return found
    raise Unfit("the name of a host", "write it like clockwork.example.com")


def host_names(value: object) -> tuple[str, ...]:
    """Names of hosts, without ports, in a list or in text with commas between; in small letters."""
    found = value.split(",") if isinstance(value, str) else value
    names = (
        [each.strip() if isinstance(each, str) else "" for each in found] if isinstance(found, list) else []
    )
    if names and all(_HOST_NAME.fullmatch(name) for name in names):
        return tuple([name.lower() for name in names])
    raise Unfit("names of hosts, without ports", "write them like models.example.com,models.example.net")


def prefix_or_off(value: object) -> str | None:
    """The prefix of shared-memory keys, or None for ``off``."""
    if _is_off(value):
        return None
    found = value.strip() if isinstance(value, str) else ""
    if not found.startswith("/") or "/" in found[1:] or not found.isprintable() or len(found) > 128:
        raise Unfit(
            "a slash and the first letters of keys, or off",
            "write it like /clockwork-; / alone allows every key",
        )
    return found


def size(least: int) -> Read[int]:
    """A reader of memory sizes from ``least`` bytes: ``1GB`` (decimal), ``512MiB`` (binary), ``4096``."""
    expected = f"a memory size of at least {least} bytes" if least > 1 else "a memory size"
    remedy = "write it like 1GB, 512MiB or a number of bytes"

    def read(value: object) -> int:
        match = _SIZE.fullmatch(str(value)) if isinstance(value, str | int | float) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        if isinstance(value, bool) or match is None or unit is None:
            raise Unfit(expected, remedy)
        found = float(match[1]) * unit
        if not least <= found <= 1 << 50:
            raise Unfit(expected, remedy)
        return round(found)

    return read


def size_or_share(least: int) -> Read[int | float]:
    """A reader of memory sizes (an int, in bytes) or shares of free memory: ``80%`` (a float, 0.8)."""
    read_size = size(least)

    def read(value: object) -> int | float:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return number(0, 100, above=True)(value.strip().removesuffix("%")) / 100
            except Unfit:
                raise Unfit("a share above 0% and up to 100%", "write it like 80%") from None
        try:
            return read_size(value)
        except Unfit as unfit:
            raise Unfit(f"{unfit.expected}, or a share", f"{unfit.remedy}; or 80% for GPUs") from None

    return read


# ------------------------------------------------------------
# Values of ``--device``.
#
# ``cpu`` (the next free number), ``cpu:1`` (that number); ``torch-cpu`` and ``cuda`` likewise (``cuda:1``
# is the GPU of that number); ``emulated:PROFILE`` (a built-in profile or a file).


_KNOWN = "cpu, torch-cpu, cuda (each also with :N) or emulated:PROFILE"
_NUMBERED = ("cpu", "torch-cpu", "cuda")
_VARIED: Final[dict[str, Read[Any]]] = {"jitter": number(0, 1), "seed": integer(0, 1 << 31)}
_EXAMPLE: Final = "'emulated:v100?jitter=0.1&seed=7', with the quotes"
_NUMBER = re.compile(r"[0-9]{1,9}")  # of a device; int() refuses thousands of digits in words of its own


class DeviceChoice(Struct, frozen=True):
    """A configured device: its unique name (``cpu:0``), its kind, and for ``emulated`` its profile.

    ``jitter``: the share by which emulated durations vary; ``seed``: of that.
    """

    device: str
    kind: str
    profile: str = ""
    jitter: float = 0.0
    seed: int = 0

    @property
    def written(self) -> str:
        """As ``--device`` takes it."""
        if not self.profile:
            return self.device
        varied = f"?jitter={self.jitter:g}&seed={self.seed}" if self.jitter else ""
        return f"{self.kind}:{self.profile}{varied}"


def read_devices(value: object) -> tuple[DeviceChoice, ...]:
    """The devices in a list of specs, or in text with commas between. Raises :class:`Unfit`."""
    specs = value.split(",") if isinstance(value, str) else value
    if not isinstance(specs, list | tuple) or not specs or not all(isinstance(spec, str) for spec in specs):
        raise Unfit(f"{_KNOWN}, one or more", 'write device = ["cpu"] or --device cpu')
    parsed = [_split(spec.strip()) for spec in specs]
    taken = {name for name, _, _ in parsed if name}
    if len(taken) < sum(1 for name, _, _ in parsed if name):
        raise Unfit("each device once", "leave one of the equal ones out, or write cpu without a number")
    return tuple(
        DeviceChoice(name or _next_name(kind, taken), kind, *_varied(profile))
        for name, kind, profile in parsed
    )


def _varied(profile: str) -> tuple[str, float, int]:
    """The parts of ``PROFILE?jitter=SHARE&seed=N``, of which only the first one must be there."""
    name, _, rest = profile.partition("?")
    found: dict[str, Any] = {}
    for part in rest.split("&") if rest else ():
        field, _, value = part.partition("=")
        if field not in _VARIED:
            raise Unfit(f"emulated:{name} with jitter and seed at most", f"write it like {_EXAMPLE}")
        found[field] = _VARIED[field](value)
    return name, found.get("jitter", 0.0), found.get("seed", 0)


def _split(spec: str) -> tuple[str, str, str]:
    """Name (empty: to be chosen), kind and profile of one spec."""
    kind, colon, rest = spec.partition(":")
    if kind in _NUMBERED and not colon:
        return "", kind, ""
    if kind in _NUMBERED and _NUMBER.fullmatch(rest):
        return f"{kind}:{int(rest)}", kind, ""
    if kind == "emulated" and rest:
        return "", "emulated", rest
    if kind == "emulated":
        raise Unfit(_KNOWN, "name a profile after the colon: emulated:PROFILE")
    raise Unfit(_KNOWN, f"{spec!r} is none of these")


def _next_name(kind: str, taken: set[str]) -> str:
    number = 0
    while f"{kind}:{number}" in taken:
        number += 1
    taken.add(f"{kind}:{number}")
    return f"{kind}:{number}"
