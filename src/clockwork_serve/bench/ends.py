"""How a request ended, in few words that are the same for every server; it never counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import msgspec

from clockwork_serve.units import NS_PER_MS, NS_PER_S


class Kind(IntEnum):
    """What a client has of it. Whether an answer was in time is not told here."""

    OPEN = 0
    """Nothing came until the run was over."""
    ANSWERED = 1
    REJECTED = 2
    """The server said no."""
    EXPIRED = 3
    """The server said that time is up."""
    FAILED = 4
    """The server said that something is wrong, with itself or with the request."""
    RESET = 5
    """The connection ended under it."""
    BROKEN = 6
    """No connection, or what came is not the protocol."""
    ABANDONED = 7
    """We gave up at its deadline, as we were told to."""


class End(NamedTuple):
    """A kind, and the server's words."""

    kind: Kind
    reason: str


OPEN: Final = 0
ANSWERED: Final = 1
ABANDONED: Final = 2
FIRST_ENDS: Final = (End(Kind.OPEN, ""), End(Kind.ANSWERED, ""), End(Kind.ABANDONED, "at its deadline"))
"""The ends whose codes are known beforehand."""
REASONS_MAX: Final = 200
"""Different words; all others count as one."""
_REASON_CHARS: Final = 80
_BY_OUTCOME: Final = {
    "rejected": Kind.REJECTED, "expired": Kind.EXPIRED, "failed": Kind.FAILED, "invalid": Kind.FAILED,
    "cancelled": Kind.FAILED,
}  # fmt: skip
_BY_HTTP: Final = {429: Kind.REJECTED, 503: Kind.REJECTED, 408: Kind.EXPIRED, 504: Kind.EXPIRED}
_GRPC_NAMES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
    "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_BY_GRPC: Final = {
    "RESOURCE_EXHAUSTED": Kind.REJECTED, "UNAVAILABLE": Kind.REJECTED, "DEADLINE_EXCEEDED": Kind.EXPIRED,
}  # fmt: skip
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after[ \t]*:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)


class Ends:
    """Codes for ends, in the order in which they are met; ``tell`` hears of each before it is used."""

    def __init__(self, tell: Callable[[int, End], None]) -> None:
        self._tell = tell
        self._codes = {end: code for code, end in enumerate(FIRST_ENDS)}

    def code(self, kind: Kind, reason: str) -> int:
        """The code of an end."""
        end = End(kind, reason)
        code = self._codes.get(end)
        if code is None:
            if len(self._codes) >= REASONS_MAX:
                end = End(kind, "other")
            code = self._codes.get(end)
            if code is None:
                code = self._codes[end] = len(self._codes)
                self._tell(code, end)
        return code

    def http(self, status: int, head: bytes, body: bytes) -> tuple[int, int | None]:
        """The code of a response that is no answer, and how long to wait by what it says, in ns."""
        said = _json(body)
        kind = _BY_OUTCOME.get(str(said.get("outcome")), _BY_HTTP.get(status, Kind.FAILED))
        words = said.get("reason") or said.get("error") or said.get("detail") or ""
        wait = said.get("retry_after_ms")
        wait_ns = round(wait * NS_PER_MS) if isinstance(wait, int | float) and 0 <= wait < 1e8 else None
        if wait_ns is None and (found := _RETRY_AFTER.search(head)):
            wait_ns = min(int(found[1]), 100_000) * NS_PER_S
        return self.code(kind, f"{status} {_plain(str(words))}".strip()), wait_ns

    def grpc(self, trailers: Mapping[str, str]) -> tuple[int, int | None]:
        """The same of the trailing metadata of a call."""
        text = trailers.get("grpc-status", "")
        number = int(text) if text.isdecimal() and len(text) < 4 else -1
        if number == 0:
            return ANSWERED, None
        name = _GRPC_NAMES[number] if 0 < number < len(_GRPC_NAMES) else "no grpc-status"
        kind = _BY_OUTCOME.get(trailers.get("clockwork-outcome", ""), _BY_GRPC.get(name, Kind.FAILED))
        words = trailers.get("clockwork-reason") or unquote(trailers.get("grpc-message", ""))
        try:
            wait_ns: int | None = round(float(trailers["clockwork-retry-after-ms"]) * NS_PER_MS)
        except (KeyError, ValueError, OverflowError):
            wait_ns = None
        return self.code(kind, f"{name} {_plain(words)}".strip()), wait_ns


def _json(body: bytes) -> dict[str, Any]:
    try:
        said = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        said = None
    if isinstance(said, dict):
        return said
    return {"error": bytes(body[:_REASON_CHARS]).decode(errors="replace")}


def _plain(words: str) -> str:
    """Words without what differs from one request to the next."""
    return " ".join(_NUMBER.sub("#", words).split())[:_REASON_CHARS]
