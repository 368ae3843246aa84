"""What a client may ask of a gateway's connections, and which setting says so; nothing is enforced here."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from clockwork_serve.units import KIB, MIB

SETTING: Final = {
    "header_bytes": "max_head",
    "headers": "max_headers",
    "body_bytes": "max_body",
    "connections": "max_connections",
    "unsent_bytes": "max_unsent",
    "header_s": "head_s",
    "body_s": "body_s",
    "idle_s": "idle_s",
    "send_s": "send_s",
}
"""The setting behind each limit, to be named where it is reached."""


class HttpLimits(Struct, frozen=True, kw_only=True):
    """Times are kept to a second or two, and never cut short.

    A request's head (its line and headers) has at most ``header_bytes`` and ``headers`` of them, and arrives
    within ``header_s``. A body may take ``body_s`` and a second for each ``bytes_per_s`` of it; so may the
    responses that a client has not read. ``connections`` are counted per port.
    """

    header_bytes: int = 32 * KIB
    headers: int = 100
    body_bytes: int = 64 * MIB
    header_s: float = 10.0
    body_s: float = 30.0
    bytes_per_s: int = 128 * KIB
    idle_s: float = 600.0
    send_s: float = 30.0
    unsent_bytes: int = 256 * MIB
    connections: int = 10_000


_WORDS: Final = {
    "header_bytes": ("header", "bytes", "send less in it"),
    "headers": ("header", "lines", "send fewer"),
    "body_bytes": ("body", "bytes", "send less at once"),
    "connections": ("connections", "of this port at once", "come again later"),
}


def excess(limit: str, most: int, found: int | None = None) -> str:
    """What to tell a client who is beyond a limit."""
    what, unit, remedy = _WORDS[limit]
    return (
        f"{what}: expected at most {most} {unit}, found {'more' if found is None else found}; "
        f"{remedy}, or raise the server's {SETTING[limit]}"
    )
