"""Which path means what, and what is answered there; inference itself is not answered here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import httptools
import msgspec
from msgspec import Struct

from clockwork_serve.oip import UnknownModel
from clockwork_serve.serve.gateway_endpoints import Endpoints, Refused
from clockwork_serve.serve.gateway_responses import Response, error_response, json_response, tripped
from clockwork_serve.serve.gateway_settings import log_settings, trace_settings
from clockwork_serve.telemetry import CONTENT_TYPE
from clockwork_serve.units import KIB

Endpoint = Callable[[Endpoints, "Route", bytes], Response | Awaitable[Response]]


class Route(Struct, frozen=True):
    """A path: ``method`` it takes, and ``endpoint`` to call (None: inference), for a model or for none.

    For shared memory ``model`` is a region's name. ``local``: a client on this host asks.
    ``method`` may be several with ", " between, or nothing for any.
    """

    method: bytes
    endpoint: Endpoint | None
    model: str = ""
    version: str = ""
    local: bool = False

    def takes(self, method: bytes) -> bool:
        """Whether it answers that method."""
        methods = self.method.split(b", ")
        return not self.method or method in methods or (method == b"HEAD" and b"GET" in methods)


def find_route(url: bytes) -> Route | None:
    """The route of a request target; None if there is none."""
    # Long ones are not remembered: clients could fill memory with them.
    return _remembered(url) if len(url) <= 256 else _find(url)


def _find(url: bytes) -> Route | None:
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserInvalidURLError:
        return None
    if not path or len(path) > _PATH_MAX:
        return None
    match unquote_all(path):
        case ["v2", "models", name, *rest] if rest or name != "stats":
            return _model_route(name, rest)
        case ["v2", "repository", "models", name, verb] if verb in _REPOSITORY:
            return Route(b"POST", _REPOSITORY[verb], name)
        case ["v2", kind, "region", name, verb] if name and kind in _REGIONS and verb in _REGIONS[kind]:
            return Route(*_REGIONS[kind][verb], name)
        case ["v2", kind, "status" | "unregister" as verb] if kind in _REGIONS:
            return Route(*_REGIONS[kind][verb])
        case segments:
            method, endpoint = _FIXED.get("/".join(segments), (b"", None))
            return None if endpoint is None else Route(method, endpoint)


_PATH_MAX: Final = 4 * KIB
"""Longer than names can make one; decoding 30 KiB of percent signs takes milliseconds."""
_remembered: Final = lru_cache(maxsize=4096)(_find)


def find_metrics_route(url: bytes) -> Route | None:
    """The route on the port that is for metrics alone: those, and health."""
    route = find_route(url)
    return route if route is not None and route.endpoint in (_metrics, _live, _ready) else None


def answer(
    endpoints: Endpoints, route: Route, body: bytes, *, local: bool = False
) -> Response | Awaitable[Response]:
    """What is answered there, at once or soon; ``local``: to a client on this host."""
    assert route.endpoint is not None
    try:
        found = route.endpoint(endpoints, msgspec.structs.replace(route, local=local), body)
    except (UnknownModel, Refused) as error:
        return refusal(error)
    except Exception:  # noqa: BLE001 - as settled
        return tripped()
    return found


async def settled(found: Awaitable[Response]) -> Response:
    """The response, once it is there, whatever became of it."""
    try:
        return await found
    except (UnknownModel, Refused) as error:
        return refusal(error)
    except Exception:  # noqa: BLE001 - one request that our own code trips over must not end all others
        return tripped()


def refusal(error: UnknownModel | Refused) -> Response:
    """An error as a response."""
    return error_response(error.code if isinstance(error, Refused) else 404, str(error))


def unquote_all(path: bytes) -> list[str]:
    """The segments of a path, each decoded by itself, so that a name may hold a slash."""
    return [unquote(part) for part in path.decode("latin-1").strip("/").split("/")]


def _model_route(name: str, rest: list[str]) -> Route | None:
    version = ""
    if rest[:1] == ["versions"] and len(rest) > 1:
        version, rest = rest[1], rest[2:]
        if not version.isdecimal():
            return None
    tail = "/".join(rest)
    if tail == "infer":
        return Route(b"POST", None, name, version)
    method, endpoint = _MODEL.get(tail, (b"", None))
    return None if endpoint is None else Route(method, endpoint, name, version)


def _live(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response({"live": True})


def _ready(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    endpoints.check_ready()
    return json_response({"ready": True})


def _server(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(endpoints.server())


def _description(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return Response(200, (_described(endpoints.version),))


@lru_cache(maxsize=1)
def _described(version: str) -> bytes:
    # Imported when somebody wants it.
    from clockwork_serve.oip.openapi import description

    return msgspec.json.encode(description(version))


def _models(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response({"models": endpoints.models()})


def _metadata(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(endpoints.metadata(route.model, route.version))


def _model_ready(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    endpoints.check_model_ready(route.model, route.version)
    return json_response({"name": route.model, "ready": True})


def _config(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return Response(200, (endpoints.config(route.model, route.version),))


async def _stats(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(await endpoints.statistics(route.model, route.version))


async def _metrics(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return Response(200, (await endpoints.metrics(),), CONTENT_TYPE.encode())


async def _index(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    ready = _object(body).get("ready", False)
    if not isinstance(ready, bool):
        raise Refused(400, f"ready: expected true or false, found {ready!r}")
    return json_response(await endpoints.index(ready=ready))


async def _load(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    await endpoints.load(route.model, _parameters(body))
    return json_response({})


async def _unload(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    _parameters(body)
    await endpoints.unload(route.model)
    return json_response({})


def _regions(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(endpoints.regions(route.model, local=route.local))


def _register(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    endpoints.register(route.model, _object(body), local=route.local)
    return json_response({})


def _unregister(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    endpoints.unregister(route.model, local=route.local)
    return json_response({})


def _cuda_regions(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(endpoints.cuda_regions(route.model))


def _register_cuda(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    endpoints.register_cuda()
    return json_response({})


def _unregister_cuda(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response({})


def _trace(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(trace_settings(endpoints, route.model, _object(body), route.version))


def _logging(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return json_response(log_settings(_object(body)))


def _generate(endpoints: Endpoints, route: Route, body: bytes) -> Response:
    return error_response(501, "the generate extension is not supported; use infer")


def _parameters(body: bytes) -> dict[str, Any]:
    parameters = _object(body).get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refused(400, f"parameters: expected an object, found {type(parameters).__name__}")
    return parameters


def _object(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"body: expected a JSON object, found other: {error}") from None


_FIXED: Final[dict[str, tuple[bytes, Endpoint]]] = {
    "v2": (b"GET", _server),
    "v2/openapi.json": (b"GET", _description),
    "v2/health/live": (b"GET", _live),
    "v2/health/ready": (b"GET", _ready),
    "v2/models": (b"GET", _models),
    "v2/models/stats": (b"GET", _stats),
    "v2/repository/index": (b"POST", _index),
    "v2/trace/setting": (b"GET, POST", _trace),
    "v2/logging": (b"GET, POST", _logging),
    "metrics": (b"GET", _metrics),
}
_MODEL: Final[dict[str, tuple[bytes, Endpoint]]] = {
    "": (b"GET", _metadata),
    "ready": (b"GET", _model_ready),
    "config": (b"GET", _config),
    "stats": (b"GET", _stats),
    "trace/setting": (b"GET, POST", _trace),
    "generate": (b"POST", _generate),
    "generate_stream": (b"POST", _generate),
}
_REGIONS: Final[dict[str, dict[str, tuple[bytes, Endpoint]]]] = {
    "systemsharedmemory": {
        "status": (b"GET", _regions),
        "register": (b"POST", _register),
        "unregister": (b"POST", _unregister),
    },
    "cudasharedmemory": {
        "status": (b"GET", _cuda_regions),
        "register": (b"POST", _register_cuda),
        "unregister": (b"POST", _unregister_cuda),
    },
}
_REPOSITORY: Final[dict[str, Endpoint]] = {"load": _load, "unload": _unload}

# What API keys may be good for; see gateway_guard for the rest.
OPEN_ENDPOINTS: Final = frozenset({_live, _ready, _model_ready})
METRICS_ENDPOINTS: Final = frozenset({_metrics})
READING_POSTS: Final = frozenset({_index, _generate})
