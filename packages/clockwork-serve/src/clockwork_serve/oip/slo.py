"""The SLO and the priority of a request, from all the places where a client can give one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from clockwork_client.datatypes import SLO_MAX_MS, Parameter
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import LEAST_PRIORITY
from clockwork_serve.units import NS_PER_MS, NS_PER_S, NS_PER_US

SLO_MAX_NS: Final = SLO_MAX_MS * NS_PER_MS
FLOOR_NS: Final = 100 * NS_PER_MS
PROFILE_FACTOR: Final = 5
_GRPC_STEPS_MS: Final = ((1.002, 1), (10.02, 10), (100.2, 100), (1002.0, 1_000))
_GRPC_STEP_MAX_MS: Final = 10_000
"""gRPC's core sends a deadline rounded up: to milliseconds below a second, and so on (measured, 1.85: 1.5 s
arrives as 1.5095 s). An answer in that time would come too late for its client."""

PRIORITY_MAX: Final = 2**31 - 1
_PRIORITIES: Final = (
    f"a whole number from 0 to {PRIORITY_MAX} (1 is the most urgent, {LEAST_PRIORITY} and more the least, "
    "0 the model's own)"
)


def requested_slo_ns(parameters: Mapping[str, Parameter]) -> int | None:
    """The tightest SLO in a request's parameters, in ns, or None. Raises :class:`InvalidRequest`."""
    if not parameters:
        return None
    limits: list[int] = []
    if (slo_ms := parameters.get("slo_ms")) is not None:
        limits.append(_limit_ns("parameter 'slo_ms'", "milliseconds", slo_ms, NS_PER_MS))
    # Triton's own word for none is 0.
    if (timeout := parameters.get("timeout")) is not None and (timeout != 0 or timeout is False):
        if isinstance(timeout, float):
            raise _wrong_limit("parameter 'timeout'", "a whole number of microseconds", timeout)
        limits.append(_limit_ns("parameter 'timeout'", "microseconds", timeout, NS_PER_US))
    return min(limits, default=None)


def tightest(slo_ns: int | None, header: str | None, remaining_s: float | None) -> int | None:
    """The tightest of a request's parameters' SLO and of what the protocol says beside them, or None.

    ``header`` is the text of ``x-slo-ms``; ``remaining_s`` what is left of a gRPC deadline (limits beyond a
    day count as none there: clients set such for "never"). Raises :class:`InvalidRequest`.
    """
    if header is not None:
        header_ns = _header_ns(header)
        slo_ns = header_ns if slo_ns is None else min(slo_ns, header_ns)
    if remaining_s is not None and remaining_s * NS_PER_S < SLO_MAX_NS:
        remaining_ns = _remaining_ns(remaining_s)
        slo_ns = remaining_ns if slo_ns is None else min(slo_ns, remaining_ns)
    return slo_ns


def default_slo_ns(model_ns: int | None, server_ns: int | None, batch_1_ns: int | None) -> int:
    """The SLO of a request that carries none: the model's, else the server's, else from the profile.

    ``batch_1_ns`` is the model's batch-1 duration, where one is known.
    """
    if model_ns is not None:
        return model_ns
    return server_ns if server_ns is not None else max(FLOOR_NS, PROFILE_FACTOR * (batch_1_ns or 0))


def priority_of(parameters: Mapping[str, Parameter], default: int) -> int:
    """Triton's ``priority``, of which 1 is the most urgent; 0 or absent is the model's own.

    Raises :class:`InvalidRequest`.
    """
    priority = parameters.get("priority") if parameters else None
    if priority is None:
        return default
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= PRIORITY_MAX:
        raise _wrong_limit("parameter 'priority'", _PRIORITIES, priority)
    return priority or default


def decide_ns_of(parameters: Mapping[str, Parameter]) -> int:
    """How long the yes or no may take, by the parameter ``decide_ms``; -1 if there is none.

    Raises :class:`InvalidRequest`.
    """
    decide_ms = parameters.get("decide_ms") if parameters else None
    if decide_ms is None:
        return -1
    if decide_ms == 0 and not isinstance(decide_ms, bool | str):
        return 0
    return _limit_ns("parameter 'decide_ms'", "milliseconds", decide_ms, NS_PER_MS, least="from 0")


def _remaining_ns(remaining_s: float) -> int:
    """What a client's gRPC library leaves of its deadline, less what the wire may have added to it."""
    step_ms = next((step for limit_s, step in _GRPC_STEPS_MS if remaining_s < limit_s), _GRPC_STEP_MAX_MS)
    return max(1, int(remaining_s * NS_PER_S) - step_ms * NS_PER_MS)


def _header_ns(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        raise _wrong_limit("header 'x-slo-ms'", "a number of milliseconds", text) from None
    return _limit_ns("header 'x-slo-ms'", "milliseconds", value, NS_PER_MS)


def _limit_ns(field: str, unit: str, value: Parameter, unit_ns: int, *, least: str = "above 0 and") -> int:
    expected = f"a number of {unit} {least} up to {SLO_MAX_NS // unit_ns} (24 h)"
    # Compared before it is converted: a whole number may be larger than any float.
    if isinstance(value, bool | str) or not 0 < value <= SLO_MAX_NS:
        raise _wrong_limit(field, expected, value)
    limit_ns = round(value * unit_ns)
    if not 0 < limit_ns <= SLO_MAX_NS:
        raise _wrong_limit(field, expected, value)
    return limit_ns


def _wrong_limit(field: str, expected: str, found: object) -> InvalidRequest:
    return InvalidRequest(f"{field}: expected {expected}, found {found!r}")
