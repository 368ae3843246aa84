"""Which right a request over HTTP needs, and the answer to one that lacks it. It reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from clockwork_serve.serve.gateway_exchange import Exchange
from clockwork_serve.serve.gateway_keys import Denied, KeyRing, Right
from clockwork_serve.serve.gateway_responses import Response, error_response
from clockwork_serve.serve.gateway_routes import METRICS_ENDPOINTS, OPEN_ENDPOINTS, READING_POSTS, Route

_READS: Final = (b"GET", b"HEAD")


def right_of(method: bytes, route: Route | None) -> Right | None:
    """None: anybody may. What only reads, and inference, is one right; all else is another, come what may."""
    if route is None:
        # Which paths there are is nobody's business.
        return Right.INFER
    endpoint = route.endpoint
    if endpoint is None:
        return Right.INFER
    if endpoint in OPEN_ENDPOINTS:
        return None
    if endpoint in METRICS_ENDPOINTS:
        return Right.METRICS
    return Right.INFER if method in _READS or endpoint in READING_POSTS else Right.ADMIN


def denial(keys: KeyRing, exchange: Exchange, headers: Mapping[bytes, bytes]) -> Response | None:
    """The answer to who may not; None for who may, whose tenant the exchange has from then on."""
    right = right_of(exchange.method, exchange.route)
    if right is None:
        return None
    try:
        holder = keys.admit(right, headers.get(b"authorization"), headers.get(b"x-api-key"))
    except Denied as denied:
        if denied.known:
            return error_response(403, str(denied))
        return error_response(401, str(denied), b"WWW-Authenticate: Bearer\r\n")
    exchange.identity = holder.tenant
    return None
