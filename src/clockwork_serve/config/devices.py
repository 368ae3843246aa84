"""What ``--device`` may say. It names devices and builds none.

``cpu`` (the next free number), ``cpu:1`` (that number); ``torch-cpu`` and ``cuda`` likewise (``cuda:1``
is the GPU of that number); ``emulated:PROFILE`` (a built-in profile or a file).
"""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.config.values import Unfit

_KNOWN = "cpu, torch-cpu, cuda (each also with :N) or emulated:PROFILE"
_NUMBERED = ("cpu", "torch-cpu", "cuda")


class DeviceChoice(Struct, frozen=True):
    """A device asked for: its unique name (``cpu:0``), its kind, and for ``emulated`` its profile."""

    device: str
    kind: str
    profile: str = ""


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
        DeviceChoice(name or _next_name(kind, taken), kind, profile) for name, kind, profile in parsed
    )


def _split(spec: str) -> tuple[str, str, str]:
    """Name (empty: to be chosen), kind and profile of one spec."""
    kind, colon, rest = spec.partition(":")
    if kind in _NUMBERED and not colon:
        return "", kind, ""
    if kind in _NUMBERED and rest.isascii() and rest.isdigit():
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
