"""The configuration of a gateway's process, its limits, and the texts for clients that exceed one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from clockwork_serve.config import Settings, setting
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.transport import SOCKET_NAME
from clockwork_serve.units import KIB, MIB

PIPELINED_MAX: Final = 128
"""Requests of one connection without a response, above which no more is read from it."""
DISCARDED_MAX: Final = 8 * MIB
"""Up to this much of a body that is not needed is read and discarded, to keep the connection usable."""
SMALL_READ_BYTES: Final = 4 * KIB
"""Size of a read that may hold many requests, or chunks of a body: 680 of the smallest, 1 to 3 ms."""
LINGER_S: Final = 2.0
"""How long the rest of a rejected request is read and discarded, so that its client sees the response."""
_ENVELOPE_BYTES: Final = 64 * KIB  # allowance for what a gRPC message has beside its tensors


FIXED: Final = {
    "max_json": ("JSON", "bytes", "send tensors as binary data"),
    "max_head": ("header", "bytes", "send less in it"),
    "max_headers": ("header", "lines", "send fewer"),
}
"""Of limits that are no settings: what a client exceeds, its unit, and what the client may do instead."""

_BYTES_PER_S: Final = 128 * KIB
"""The slowest client that is served: time limits for a body or response grow by a second for this many
bytes."""


class GatewayConfig(Struct, frozen=True, kw_only=True):
    """The configuration of one gateway process.

    ``settings`` are the server's, with the ports that this process listens on. ``number`` is its index among
    all ``settings.gateways``, from 0. ``reuse_port``: other processes of this server listen there too.
    ``elsewhere``: the server runs on another machine, at ``settings.controller``. ``metrics_only``: it has no
    port for clients.

    Time limits are kept to a second or two, and never cut short. A body may take ``body_s``, and a second for
    each ``bytes_per_s`` of it; so may the responses that a client has not read. gRPC's core copies a message
    twice while it holds Python's lock: 8 MiB in 4 ms, 60 MiB in 85 ms. ``max_connections`` is per port; so is
    ``gateway_memory`` for large bodies that are incomplete. ``max_requests`` limits all requests without a
    response, over every protocol.
    """

    run_dir: str
    name: str
    settings: Settings = Settings()
    number: int = 0
    reuse_port: bool = False
    elsewhere: bool = False
    metrics_only: bool = False
    bytes_per_s: int = _BYTES_PER_S

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for settings that do not fit together."""
        check_gateways(self.settings)

    @property
    def controller(self) -> Path:
        """The socket of a controller on this machine."""
        return Path(self.run_dir) / SOCKET_NAME


def check_gateways(settings: Settings) -> None:
    """Check the settings that depend on each other. Raises :class:`ConfigError`."""
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


def excess(limit: str, most: int, found: int | None = None) -> str:
    """The text for a client that exceeds a ``limit``: one of ``FIXED``, or a setting."""
    what, unit, remedy = FIXED.get(limit) or setting(limit).excess
    raised = "" if limit in FIXED else f", or raise the server's {limit}"
    more = "more" if found is None else found
    return f"{what}: expected at most {most} {unit}, found {more}; {remedy}{raised}"


def json_excess(settings: Settings, length: int) -> str:
    """The text for a client whose JSON is too long; "" if it is not."""
    return excess("max_json", settings.max_json, length) if length > settings.max_json else ""


def overdue(what: str, limit: str) -> str:
    """The text for a client whose header or body was too slow."""
    return f"the request's {what} did not arrive in time ({limit}); its connection is closed"


def grpc_options(settings: Settings) -> tuple[tuple[str, int], ...]:
    """The limits that gRPC itself enforces. A message is decompressed up to its limit only."""
    return (
        ("grpc.max_receive_message_length", settings.max_body + _ENVELOPE_BYTES),
        ("grpc.max_metadata_size", settings.max_head),
        ("grpc.absolute_max_metadata_size", settings.max_head),
        ("grpc.max_concurrent_streams", settings.max_calls),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", int(settings.head_s * 1000)),
        ("grpc.max_connection_idle_ms", int(settings.idle_s * 1000)),
    )
