"""W3C Trace Context: the headers ``traceparent`` and ``tracestate`` of a request, read strictly."""

from __future__ import annotations

import re
from typing import Final

TRACE_HEADERS: Final = frozenset({b"traceparent", b"tracestate"})
STATE_CHARS: Final = 512
"""Longer ones are dropped: less need not be passed on, and each is kept as long as its request."""
_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_KEY: Final = r"[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}|[a-z][a-z0-9_*/-]{0,255}"
_VALUE: Final = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER: Final = re.compile(rf"({_KEY})={_VALUE}", re.ASCII)
_MEMBERS_MAX: Final = 32


def trace_context(parent: str, state: str = "") -> str:
    """What ``Request.trace`` carries of both headers; empty if the first is malformed, which ignores both.

    Where a header came several times, its values are joined with commas. A malformed ``tracestate`` is
    dropped.
    """
    found = _PARENT.fullmatch(parent.strip(" \t"))
    if found is None:
        return ""
    version, trace_id, parent_id, flags, more = found.groups()
    # Version ff is none, 00 has no more fields; ids of zeros alone are invalid.
    if version == "ff" or (more and version == "00") or not (trace_id.strip("0") and parent_id.strip("0")):
        return ""
    context = f"{trace_id}-{parent_id}-{flags}"
    return f"{context} {members}" if state and (members := _members(state)) else context


def _members(state: str) -> str:
    """The list in ``tracestate``, without what it need not have; empty if it is malformed, or too long."""
    if len(state) > STATE_CHARS:
        return ""
    members = [member for part in state.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(keys) < len(members) or len(members) > _MEMBERS_MAX:
        return ""
    return ",".join(members) if all(_MEMBER.fullmatch(member) for member in members) else ""
