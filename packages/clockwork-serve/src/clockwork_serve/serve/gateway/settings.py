"""What a gateway is told when it starts, and what its clients are told who are beyond a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.transport import SOCKET_NAME
from clockwork_serve.units import KIB, MIB

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


_BYTES_PER_S: Final = 128 * KIB
"""The slowest client that is served: a body or response has a second more for each of so many bytes."""


class GatewayConfig(Struct, frozen=True, kw_only=True):
    """All that a gateway's process is told, and each part of it.

    ``settings`` are the server's, with the ports that this process listens on. It is the one of ``number``
    among all ``settings.gateways``, from 0. ``reuse_port``: other processes of ours listen there too.
    ``elsewhere``: the server is the one at ``settings.controller``, on another machine.

    Times are kept to a second or two, and never cut short. A body may take ``body_s`` and a second for each
    ``bytes_per_s`` of it; so may the responses that a client has not read. A message of gRPC has
    ``max_message`` and no more than a body: its core copies it twice, with Python's lock, 8 MiB in 4 ms.
    ``max_connections`` are counted per port, and so are large bodies that are not whole yet, which have
    ``gateway_memory``; ``max_requests`` are all that have no answer, by whatever protocol.
    """

    run_dir: str
    name: str
    settings: Settings = Settings()
    number: int = 0
    reuse_port: bool = False
    elsewhere: bool = False
    bytes_per_s: int = _BYTES_PER_S

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for settings that do not fit together."""
        check_gateways(self.settings)

    @property
    def controller(self) -> Path:
        """The socket of the controller, if that is on this machine."""
        return Path(self.run_dir) / SOCKET_NAME


def check_gateways(settings: Settings) -> None:
    """Check what no part of a gateway checks for itself. Raises :class:`ConfigError`."""
    files = {"tls_certificate": settings.tls_certificate, "tls_key": settings.tls_key}
    missing = [name for name, path in files.items() if not path]
    if missing and (len(missing) == 1 or settings.tls_client_ca):
        raise ConfigError(
            f"{missing[0]}: expected a PEM file, as TLS needs a certificate and its key; found none; "
            "name both, or no file of TLS at all"
        )
    if not 1 <= settings.gateways <= 64:
        raise ConfigError(f"gateways: expected 1 to 64; found {settings.gateways}")
    if settings.gateway_memory < 2 * settings.max_body:
        raise ConfigError(
            f"gateway_memory: expected at least twice max_body ({settings.max_body}), for inputs and "
            f"outputs; found {settings.gateway_memory}"
        )
    if not 0 <= settings.drain_s <= 3600:
        raise ConfigError(f"drain_s: expected 0 to 3600; found {settings.drain_s}")
    if settings.stuck_s and not 1 <= settings.stuck_s <= 3600:
        raise ConfigError(f"stuck_s: expected 1 to 3600, or 0 for ever; found {settings.stuck_s}")


_WORDS: Final = {
    "max_head": ("header", "bytes", "send less in it"),
    "max_headers": ("header", "lines", "send fewer"),
    "max_body": ("body", "bytes", "send less at once"),
    "max_json": ("JSON", "bytes", "send tensors as binary data"),
    "gateway_memory": ("large bodies on their way", "bytes together", "come again later"),
    "max_connections": ("connections", "of this port at once", "come again later"),
}


def excess(limit: str, most: int, found: int | None = None) -> str:
    """What to tell a client who is beyond a ``limit``, the name of a setting."""
    what, unit, remedy = _WORDS[limit]
    return (
        f"{what}: expected at most {most} {unit}, found {'more' if found is None else found}; "
        f"{remedy}, or raise the server's {limit}"
    )


def json_excess(settings: Settings, length: int) -> str:
    """What to tell a client whose JSON is too long; "" if it is not."""
    return excess("max_json", settings.max_json, length) if length > settings.max_json else ""


def overdue(what: str, limit: str) -> str:
    """What to tell a client whose header or body came too slowly."""
    return f"the request's {what} did not arrive in time ({limit}); its connection is closed"


def grpc_options(settings: Settings) -> tuple[tuple[str, int], ...]:
    """The limits that gRPC keeps for us. No more of a message is decompressed than it may have."""
    return (
        ("grpc.max_receive_message_length", min(settings.max_body, settings.max_message) + _ENVELOPE_BYTES),
        ("grpc.max_metadata_size", settings.max_head),
        ("grpc.absolute_max_metadata_size", settings.max_head),
        ("grpc.max_concurrent_streams", settings.max_calls),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", int(settings.head_s * 1000)),
        ("grpc.max_connection_idle_ms", int(settings.idle_s * 1000)),
    )
