"""Limits of a gateway's connections, and what its core is told when it starts."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# What a client may ask of a gateway's connections, and which setting says so; nothing is enforced here.


SETTING: Final = {
    "header_bytes": "max_head",
    "headers": "max_headers",
    "body_bytes": "max_body",
    "message_bytes": "max_message",
    "json_bytes": "max_json",
    "arriving_bytes": "gateway_memory",
    "connections": "max_connections",
    "unsent_bytes": "max_unsent",
    "header_s": "head_s",
    "body_s": "body_s",
    "idle_s": "idle_s",
    "stream_s": "stream_s",
    "calls": "max_calls",
    "requests": "max_requests",
    "send_s": "send_s",
}
"""The setting behind each limit, to be named where it is reached."""
PIPELINED_MAX: Final = 128
"""Requests of one connection without an answer, before no more is read from it."""
UNWANTED_MAX: Final = 8 * MIB
"""So much of a body that is not wanted any more is read, so that the connection can be used again."""
SMALL_READ_BYTES: Final = 4 * KIB
"""Read at a time where it may be many requests, or chunks of a body: 680 of the smallest, 1 to 3 ms."""
LINGER_S: Final = 2.0
"""How long the rest of a request that was refused is read and thrown away, so that its client sees why."""
_ENVELOPE_BYTES: Final = 64 * KIB
"""What a message of gRPC may have beside its tensors."""


class HttpLimits(Struct, frozen=True, kw_only=True):
    """Times are kept to a second or two, and never cut short.

    A request's head (its line and headers) has at most ``header_bytes`` and ``headers`` of them, and arrives
    within ``header_s``. A body may take ``body_s`` and a second for each ``bytes_per_s`` of it; so may the
    responses that a client has not read. ``json_bytes`` of it may be JSON. A message of gRPC has
    ``message_bytes`` and no more than a body: its core copies it twice, with Python's lock, 8 MiB in 4 ms.
    ``connections`` are counted per port, and so are ``arriving_bytes`` of large bodies that are not whole
    yet; ``requests`` are all that have no answer, by whatever protocol. Over gRPC a connection may have
    ``calls`` open at once, and one whose client is to speak says something within ``stream_s``.
    """

    header_bytes: int = 32 * KIB
    headers: int = 100
    body_bytes: int = 64 * MIB
    message_bytes: int = 8 * MIB
    json_bytes: int = 16 * MIB
    arriving_bytes: int = 256 * MIB
    header_s: float = 10.0
    body_s: float = 30.0
    bytes_per_s: int = 128 * KIB
    idle_s: float = 600.0
    send_s: float = 30.0
    unsent_bytes: int = 256 * MIB
    connections: int = 10_000
    calls: int = 1000
    requests: int = 20_000
    stream_s: float = 600.0


_WORDS: Final = {
    "header_bytes": ("header", "bytes", "send less in it"),
    "headers": ("header", "lines", "send fewer"),
    "body_bytes": ("body", "bytes", "send less at once"),
    "json_bytes": ("JSON", "bytes", "send tensors as binary data"),
    "arriving_bytes": ("large bodies on their way", "bytes together", "come again later"),
    "connections": ("connections", "of this port at once", "come again later"),
}


def excess(limit: str, most: int, found: int | None = None) -> str:
    """What to tell a client who is beyond a limit."""
    what, unit, remedy = _WORDS[limit]
    return (
        f"{what}: expected at most {most} {unit}, found {'more' if found is None else found}; "
        f"{remedy}, or raise the server's {SETTING[limit]}"
    )


def json_excess(limits: HttpLimits, length: int) -> str:
    """What to tell a client whose JSON is too long; "" if it is not."""
    return excess("json_bytes", limits.json_bytes, length) if length > limits.json_bytes else ""


def overdue(what: str, limit: str) -> str:
    """What to tell a client whose header or body came too slowly."""
    return f"the request's {what} did not arrive in time ({SETTING[limit]}); its connection is closed"


def grpc_options(limits: HttpLimits) -> tuple[tuple[str, int], ...]:
    """The limits that gRPC keeps for us. No more of a message is decompressed than it may have."""
    return (
        ("grpc.max_receive_message_length", min(limits.body_bytes, limits.message_bytes) + _ENVELOPE_BYTES),
        ("grpc.max_metadata_size", limits.header_bytes),
        ("grpc.absolute_max_metadata_size", limits.header_bytes),
        ("grpc.max_concurrent_streams", limits.calls),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(limits.header_s * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.idle_s * 1000)),
    )


# ------------------------------------------------------------
# What the core of a gateway is told when it starts.


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """What the core of a gateway needs to know. ``controller`` is the path of the controller's socket.

    ``triton_codes``: what is refused or expired gets Triton's status. No more than ``requests`` may be open.
    """

    name: str
    controller: str
    region_bytes: int = 256 * MIB
    default_slo_ns: int | None = None
    triton_codes: bool = False
    requests: int = 20_000
