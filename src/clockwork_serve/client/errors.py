"""How a call can end without an answer: one class for each outcome of the project. Nothing is caught here.

    ServingError
    ├── Rejected       the server said no at once: it would be late, or there is no room (429)
    ├── Expired        no answer by the deadline, or none in the time that the caller gave (504)
    ├── Failed         the model or its device failed, or what came is no answer (500)
    ├── Invalid        the request does not fit; found here (status 0) or by the server (400, 404, 413, 501)
    ├── Denied         the key is missing or is not good for this (401, 403)
    ├── NotServing     nobody serves there: draining, starting, or not reachable (503)
    └── Disconnected   the connection broke before the answer; the request may have run

A call that its caller cancels ends with the caller's own ``asyncio.CancelledError``.
"""

from __future__ import annotations

import re
from typing import Any, Final

from clockwork_serve.errors import ClockworkError

_NAMED: Final = (
    re.compile(r"\b(input|output|parameter|header) '([^']*)'"),
    re.compile(r"\bmissing required (input)\(s\) \['([^']*)'"),
    re.compile(r"\b(model):? '([^']*)'"),
)
"""How the server's messages name what is wrong; the most telling first."""


class ServingError(ClockworkError):
    """A call that brought no answer. The text says why, in the server's words if it said any.

    ``status`` is HTTP's, 0 where none came. ``reason`` is a word of ``docs/use/outcomes.md`` or "".
    ``request_id`` is the server's name for the request, in its logs and journal, else the caller's own.
    ``retry_after_s`` is when it may be worth trying again, None if the server did not say.
    ``parameters`` is what the server measured before it ended.
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
    """The server said no at once; the reason says why, ``retry_after_s`` when to come back."""


class Expired(ServingError):
    """No answer in time; status 0 if it was the client that stopped waiting."""


class Failed(ServingError):
    """The model raised or is in quarantine, its device failed, or what came back cannot be understood."""


class Denied(ServingError):
    """The server wants a key, or another one."""


class NotServing(ServingError):
    """This server does not serve now; reason ``unreachable`` if there was no connection at all."""


class Disconnected(ServingError):
    """The connection broke after the request was sent. It may have run, so it is not sent again."""


class Invalid(ServingError):
    """The request does not fit; status 0 if that was found before anything was sent."""

    @property
    def field(self) -> str:
        """What is wrong, as ``input 'x'``, ``parameter 'slo_ms'`` or ``model 'm'``; "" if nobody said."""
        found = next(filter(None, (pattern.search(str(self)) for pattern in _NAMED)), None)
        return f"{found[1]} '{found[2]}'" if found else ""


_BY_STATUS: Final[dict[int, type[ServingError]]] = {
    401: Denied, 403: Denied, 429: Rejected, 502: NotServing, 503: NotServing, 501: Invalid, 504: Expired,
}  # fmt: skip


_BY_OUTCOME: Final[dict[str, type[ServingError]]] = {"rejected": Rejected, "expired": Expired}
_NOT_SERVING: Final = frozenset({"draining", "not_serving"})


def error_class(status: int, outcome: str = "", reason: str = "") -> type[ServingError]:
    """The class for a status that is no success, and for what the server called it.

    A server with ``triton_codes`` says 503 of all that it refuses; its words tell which is which.
    """
    if status == 503 and outcome in _BY_OUTCOME and reason not in _NOT_SERVING:
        return _BY_OUTCOME[outcome]
    known = _BY_STATUS.get(status)
    if known is not None:
        return known
    return Invalid if 400 <= status < 500 else Failed
