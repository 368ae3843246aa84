"""The table from a request's outcome to the status that a client gets, HTTP and gRPC."""

from __future__ import annotations

from typing import Final, NamedTuple

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Outcome, Reason

# ------------------------------------------------------------
# Errors of a client's request that have a status of their own.


class UnknownModel(InvalidRequest):
    """No model, or no version, of that name is served."""


class TooLarge(InvalidRequest):
    """The request has more bytes than this server takes."""


class Unsupported(InvalidRequest):
    """The protocol has it, this server does not."""


class Forbidden(InvalidRequest):
    """This client may not have it."""


class UnknownRegion(InvalidRequest):
    """No shared memory region of that name is registered."""


class RegionExists(InvalidRequest):
    """A shared memory region of that name is registered already."""


# ------------------------------------------------------------
# The table from a request's outcome to the status that a client gets, HTTP and gRPC.


class ClientStatus(NamedTuple):
    """An HTTP status, and a gRPC status by its name."""

    http: int
    grpc: str


# An answer that would come too late is 429 and never 503/UNAVAILABLE, which stock clients send again at once:
# three times the load, after the deadline. 503 says that this server does not serve.
_BY_OUTCOME: Final = {
    Outcome.OK: ClientStatus(200, "OK"),
    Outcome.REJECTED: ClientStatus(429, "RESOURCE_EXHAUSTED"),
    Outcome.EXPIRED: ClientStatus(504, "DEADLINE_EXCEEDED"),
    Outcome.CANCELLED: ClientStatus(499, "CANCELLED"),
    Outcome.FAILED: ClientStatus(500, "INTERNAL"),
    Outcome.INVALID: ClientStatus(400, "INVALID_ARGUMENT"),
}
_UNAVAILABLE: Final = ClientStatus(503, "UNAVAILABLE")
_TRITONS: Final = frozenset({Outcome.REJECTED, Outcome.EXPIRED})
"""What Triton calls unavailable: its queue is full, or a request's time in it is up."""
_BY_REASON: Final = {
    (Outcome.REJECTED, Reason.NOT_SERVING): _UNAVAILABLE,
    (Outcome.REJECTED, Reason.DRAINING): _UNAVAILABLE,
    (Outcome.INVALID, Reason.UNKNOWN_MODEL): ClientStatus(404, "NOT_FOUND"),
}
_BY_ERROR: Final[dict[type[InvalidRequest], ClientStatus]] = {
    InvalidRequest: _BY_OUTCOME[Outcome.INVALID],
    UnknownModel: ClientStatus(404, "NOT_FOUND"),
    TooLarge: ClientStatus(413, "RESOURCE_EXHAUSTED"),
    Unsupported: ClientStatus(501, "UNIMPLEMENTED"),
    Forbidden: ClientStatus(403, "PERMISSION_DENIED"),
    UnknownRegion: ClientStatus(404, "NOT_FOUND"),
    RegionExists: ClientStatus(409, "ALREADY_EXISTS"),
}
_GRPC_BY_HTTP: Final = {
    200: "OK", 400: "INVALID_ARGUMENT", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS",
    413: "RESOURCE_EXHAUSTED", 429: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 501: "UNIMPLEMENTED",
    503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip


OK: Final = _BY_OUTCOME[Outcome.OK]


def status_of(outcome: Outcome, reason: Reason, *, triton: bool = False) -> ClientStatus:
    """The status of a request that ended that way; ``triton``: for clients that insist on Triton's."""
    if triton and outcome in _TRITONS:
        return _UNAVAILABLE
    return _BY_REASON.get((outcome, reason)) or _BY_OUTCOME[outcome]


def status_of_error(error: InvalidRequest) -> ClientStatus:
    """The status of a request that is wrong in that way."""
    return _BY_ERROR[type(error)]


def reason_of_error(error: InvalidRequest) -> Reason:
    """How a request that is wrong in that way is counted."""
    return Reason.UNKNOWN_MODEL if isinstance(error, UnknownModel) else Reason.BAD_INPUT


def grpc_of_http(code: int) -> str:
    """The gRPC status of something that has an HTTP status already."""
    return _GRPC_BY_HTTP.get(code, "INTERNAL" if code >= 500 else "INVALID_ARGUMENT")
