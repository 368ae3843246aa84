"""Errors that end a call without a result: one class for each outcome.

    ServingError
    ├── Rejected       the server rejected the request: it would be late, or a limit is reached (429)
    ├── Expired        no response by the deadline, or within the caller's timeout (504)
    ├── Failed         the model or its device failed, or the response cannot be understood (500)
    ├── Invalid        the request is invalid; found here (status 0) or by the server (400, 404, 413, 501)
    ├── Denied         the API key is missing or does not permit this (401, 403)
    ├── NotServing     the server is draining, starting, or not reachable (503)
    └── Disconnected   the connection broke before the response; the request may have run

A call that its caller cancels ends with the caller's own ``asyncio.CancelledError``.
"""

from __future__ import annotations

import re
from typing import Any, Final

_NAMED: Final = (
    re.compile(r"\b(input|output|parameter|header) '([^']*)'"),
    re.compile(r"\bmissing required (input)\(s\) \['([^']*)'"),
    re.compile(r"\b(model):? '([^']*)'"),
)
"""How the server's messages name the invalid field; the most specific first."""


def encodable(text: str) -> str:
    """The text with lone surrogates escaped, so that it can be encoded as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


class ClockworkError(Exception):
    """The base of all errors raised on purpose. Its text can always be encoded."""

    def __str__(self) -> str:
        """The message."""
        return encodable(super().__str__())


class ServingError(ClockworkError):
    """A call that ended without a result. The text says why, in the server's words if there are any.

    ``status`` is HTTP's, 0 if there was no response. ``reason`` is one of the reasons in the documentation of
    outcomes, or "". ``request_id`` is the server's id of the request, in its logs and journal, else the
    caller's own. ``retry_after_s`` is when to retry, None if the server gave no advice. ``parameters`` is
    what the server measured before the request ended.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        reason: str = "",
        request_id: str = "",
        retry_after_s: float | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.parameters = parameters or {}


class Rejected(ServingError):
    """The server rejected the request; ``reason`` says why, ``retry_after_s`` when to retry."""


class Expired(ServingError):
    """No response in time; status 0 if the client's own timeout ended the call."""


class Failed(ServingError):
    """The model raised or is in quarantine, its device failed, or the response cannot be understood."""


class Denied(ServingError):
    """The server requires an API key, or this one does not permit the call."""


class NotServing(ServingError):
    """The server accepts no requests now; reason ``unreachable`` if no connection could be made."""


class Disconnected(ServingError):
    """The connection broke after the request was sent. It may have run, so it is not sent again."""


class Invalid(ServingError):
    """The request is invalid; status 0 if that was found before anything was sent."""

    @property
    def field(self) -> str:
        """The invalid field, as ``input 'x'``, ``parameter 'slo_ms'`` or ``model 'm'``; "" if not named."""
        found = next(filter(None, (pattern.search(str(self)) for pattern in _NAMED)), None)
        return f"{found[1]} '{found[2]}'" if found else ""


_BY_STATUS: Final[dict[int, type[ServingError]]] = {
    401: Denied, 403: Denied, 429: Rejected, 502: NotServing, 503: NotServing, 501: Invalid, 504: Expired,
}  # fmt: skip


_BY_OUTCOME: Final[dict[str, type[ServingError]]] = {"rejected": Rejected, "expired": Expired}
_NOT_SERVING: Final = frozenset({"draining", "not_serving"})


def error_class(status: int, outcome: str = "", reason: str = "") -> type[ServingError]:
    """The error class for an HTTP status, and for the server's outcome and reason if it gave them.

    A server with ``triton`` sends 503 for all that it refuses; outcome and reason tell the cases apart.
    """
    if status == 503 and outcome in _BY_OUTCOME and reason not in _NOT_SERVING:
        return _BY_OUTCOME[outcome]
    known = _BY_STATUS.get(status)
    if known is not None:
        return known
    return Invalid if 400 <= status < 500 else Failed
