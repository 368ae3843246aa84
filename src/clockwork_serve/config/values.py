"""Turns what was written into values, or says what was expected; it knows no setting by name.

A reader takes what TOML gives (typed) and what the environment or the command line gives (text) alike. It
raises :class:`Unfit`, to which the caller adds the field and the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from clockwork_serve.errors import encodable
from clockwork_serve.units import GIB, KIB, MIB

Value = TypeVar("Value")
Read = Callable[[object], Value]

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": GIB << 10,
}  # fmt: skip


class Unfit(Exception):
    """A value does not fit; ``expected`` completes "expected ...", ``remedy`` says what to write instead."""

    def __init__(self, expected: str, remedy: str) -> None:
        super().__init__(expected)
        self.expected = expected
        self.remedy = remedy


def text(value: object) -> str:
    """A string that is not empty. Other bytes than UTF-8 can be a file's name, but not be told."""
    if not isinstance(value, str) or not value.strip():
        raise Unfit("text that is not empty", "write it in quotes")
    if "\0" in value or encodable(value) != value:
        raise Unfit("text in UTF-8 without NUL", "rename the file, or link to it under another name")
    return value.strip()


def path(value: object) -> str:
    """A path, with ``~`` resolved."""
    return str(Path(text(value)).expanduser())


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


def number(least: float, most: float, *, above: bool = False) -> Read[float]:
    """A reader of finite numbers from ``least`` (or only above it) to ``most``."""
    expected = f"a number {'above' if above else 'from'} {least:g} {'and up to' if above else 'to'} {most:g}"

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


def port_or_off(value: object) -> int | None:
    """A TCP port, or None for ``off``."""
    if value is False or (isinstance(value, str) and value.strip().lower() in {"off", "none"}):
        return None
    try:
        return port(value)
    except Unfit as unfit:
        raise Unfit(f"{unfit.expected}, or off", unfit.remedy) from unfit


def address(value: object) -> str:
    """An address and a port: ``10.0.0.1:7000``, ``[::1]:7000``, ``server:7000``."""
    found = value.strip() if isinstance(value, str) else ""
    if (match := _ADDRESS.fullmatch(found)) and 1 <= int(match[2]) <= 65535:
        return found
    raise Unfit("an address and a port", "write it like 10.0.0.1:7000")


def split_address(found: str) -> tuple[str, int]:
    """The two parts of an :func:`address`."""
    host, _, number = found.rpartition(":")
    return host.strip("[]"), int(number)


def machine_name(value: object) -> str:
    """A short name of letters, digits, dashes, dots and underscores."""
    found = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found):
        return found
    raise Unfit(
        "up to 64 letters, digits, dashes, dots and underscores, a letter or a digit first",
        "choose a name of those",
    )


def prefix_or_off(value: object) -> str | None:
    """What keys of shared memory begin with, or None for ``off``."""
    if value is False or (isinstance(value, str) and value.strip().lower() in {"off", "none"}):
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
    """A reader of memory sizes (an int, of bytes) or shares of what is free: ``80%`` (a float, 0.8)."""
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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Advice for a word that is not known: the nearest one, or all of them."""
    names = sorted(known)
    near = get_close_matches(word.lower().replace("-", "_"), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
