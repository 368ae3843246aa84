"""Routes by path, and every endpoint beside inference: health, metadata, statistics, control."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import httptools
import msgspec
from msgspec import Struct

from clockwork_serve.errors import ClockworkError, InvalidRequest, printable
from clockwork_serve.messages import Question, Reply
from clockwork_serve.oip import (
    CUDA_SHARED_MEMORY,
    Served,
    UnknownModel,
    http_description,
    model_metadata,
    server_metadata,
    shared_region,
    status_of_error,
)
from clockwork_serve.serve.gateway.client_shm import allowed
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.http.responses import (
    HttpResponse,
    error_response,
    internal_error_response,
    json_response,
)
from clockwork_serve.telemetry import CONTENT_TYPE, OPENMETRICS_TYPE, decode, render, render_standby
from clockwork_serve.units import KIB

# ------------------------------------------------------------
# Endpoints beside inference, for any protocol: health, metadata, statistics, control. Stateless.


LOAD_TIMEOUT_S = 600.0  # a model may have to be compiled first


class RouteRefused(ClockworkError):
    """An endpoint has no good answer; ``code`` is the HTTP status, ``more`` are fields beside the message."""

    def __init__(self, code: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.code = code
        self.more = more


@dataclass(slots=True, frozen=True)
class Endpoints:
    """The endpoints, with results as plain data. All raise :class:`UnknownModel` or :class:`RouteRefused`."""

    gateway: Gateway
    version: str

    def server(self) -> dict[str, Any]:
        """The server's metadata."""
        more = () if self.gateway.regions is None else ("system_shared_memory",)
        return server_metadata(self.version, *more)

    def check_ready(self) -> None:
        """Raise :class:`RouteRefused` unless the server is ready."""
        link = self.gateway.link
        if not link.ready:
            preparing = link.preparing
            more = {"models_prepared": preparing.done, "models": preparing.total} if preparing.waiting else {}
            raise RouteRefused(503, f"not ready: {link.why_not_ready}", **more)

    def check_model_ready(self, name: str, version: str) -> None:
        """Raise unless the model is served now."""
        if not self.gateway.link.serves:
            self.check_ready()
        key = self._find(name, version).model.key
        if why := self.gateway.link.why_waiting(name):
            raise RouteRefused(503, why)
        if why := self.gateway.models.quarantines.why(key):
            raise RouteRefused(503, f"model {key} is not ready: {why}")

    def models(self) -> list[str]:
        """The names of all models."""
        return self.gateway.models.names()

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        """A model's inputs and outputs."""
        return model_metadata(self._find(name, version), self.gateway.models.versions(name))

    def config(self, name: str, version: str) -> bytes:
        """A model's configuration as JSON with Triton's field names."""
        return self._find(name, version).model.config

    async def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Triton's ``{"model_stats": [...]}`` of one version, of all versions of a name, or of all models."""
        if name:
            self._find(name, version)
        asked = (f"{name}/{version}" if version else name) or None
        body = msgspec.json.encode({"model": asked})
        found: dict[str, Any] = msgspec.json.decode(_body(await self.gateway.ask(Question.STATISTICS, body)))
        invalid = self.gateway.counters().invalid  # these never reached the controller
        for record in found["model_stats"]:
            wrong = invalid.get(f"{record['name']}/{record['version']}", 0)
            record["inference_stats"]["fail"]["count"] += wrong
        return found

    async def metrics(self, *, openmetrics: bool = False) -> bytes:
        """All metrics in Prometheus' text format, or as OpenMetrics; of a controller that stands by, that."""
        link = self.gateway.link
        if not link.is_open and link.read_standby():
            return render_standby(openmetrics=openmetrics)
        counters = decode(_body(await self.gateway.ask(Question.METRICS)))
        triton = self.gateway.settings.triton
        return render(counters, self.gateway.counters(), triton=triton, openmetrics=openmetrics)

    async def index(self, *, ready: bool) -> list[dict[str, Any]]:
        """The models of the repository and their states."""
        body = msgspec.json.encode({"ready": ready})
        found = msgspec.json.decode(_body(await self.gateway.ask(Question.INDEX, body)))
        assert isinstance(found, list)
        return found

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Load a model of the repository, or reload it."""
        self._check_control("load")
        for parameter in parameters:
            why = "a load has no parameter of that name; leave it out"
            if parameter == "config" or parameter.startswith("file:"):
                why = "a load takes files and configuration from the repository only; put them there"
            raise RouteRefused(400, f"failed to load '{name}', parameter '{parameter}': {why}")
        body = msgspec.json.encode({"model": name})
        _body(await self.gateway.ask(Question.LOAD, body, LOAD_TIMEOUT_S))

    async def unload(self, name: str) -> None:
        """Stop serving a model."""
        self._check_control("unload")
        body = msgspec.json.encode({"model": name})
        _body(await self.gateway.ask(Question.UNLOAD, body, LOAD_TIMEOUT_S))

    # Shared memory of clients; ``local``: the client is on this host

    def regions(self, name: str, *, local: bool) -> list[dict[str, Any]]:
        """One registered region, or all."""
        with _refusals():
            found = allowed(self.gateway.regions, local=local).registered(name)
        return [msgspec.structs.asdict(region) for region in found]

    def register(self, name: str, fields: Mapping[str, Any], *, local: bool) -> None:
        """Register a region."""
        with _refusals():
            allowed(self.gateway.regions, local=local).register(shared_region(name, fields))

    def unregister(self, name: str, *, local: bool) -> None:
        """Unregister one region, or all."""
        with _refusals():
            allowed(self.gateway.regions, local=local).unregister(name)

    def cuda_regions(self, name: str) -> list[dict[str, Any]]:
        """All regions of CUDA shared memory: none."""
        if name:
            raise RouteRefused(
                404, f"Unable to find cuda shared memory region: '{name}'; {CUDA_SHARED_MEMORY}"
            )
        return []

    def register_cuda(self) -> None:
        """CUDA shared memory is not supported. Unregistering what does not exist is allowed, as elsewhere."""
        raise RouteRefused(501, CUDA_SHARED_MEMORY)

    def _find(self, name: str, version: str) -> Served:
        try:
            return self.gateway.models.find(name, version)
        except UnknownModel:
            if why := self.gateway.link.why_waiting(name):
                raise RouteRefused(503, why) from None
            raise

    def _check_control(self, what: str) -> None:
        if not self.gateway.settings.model_control:
            raise RouteRefused(
                503, f"explicit model {what} is not allowed: this server was started without it"
            )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn :class:`InvalidRequest` into :class:`RouteRefused`."""
    try:
        yield
    except InvalidRequest as error:
        raise RouteRefused(status_of_error(error).http, str(error)) from None


def _body(reply: Reply) -> bytes:
    if reply.ok:
        return reply.body
    try:
        message = str(msgspec.json.decode(reply.body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, RecursionError):
        message = reply.body.decode(errors="replace")
    raise RouteRefused(reply.code, message)


# ------------------------------------------------------------
# Trace and log settings of the protocol: they can be read, but not changed.


_TRACE: Final = {"trace_level": ["OFF"]}
_NO_TRACES: Final = "no traces are kept; `clockwork serve --journal FILE` keeps every decision"
_NO_LEVELS: Final = "start the server with another --log-level"


def trace_settings(
    endpoints: Endpoints, model: str, changes: Mapping[str, Any], version: str = ""
) -> dict[str, list[str]]:
    """The trace settings of a model or (``""``) of all models.

    Raises :class:`UnknownModel`, and :class:`RouteRefused` if ``changes`` would change them.
    """
    if model:
        endpoints.gateway.models.find(model, version)
    # In Triton, null clears a model's own setting. There are none here.
    listed = {
        name: value if isinstance(value, list) else [value]
        for name, value in changes.items()
        if value is not None and value != []
    }
    _check_unchanged("trace", _TRACE, listed, _NO_TRACES)
    return _TRACE


def log_settings(changes: Mapping[str, Any]) -> dict[str, bool | int | str]:
    """The log settings of all processes. Raises :class:`RouteRefused` if ``changes`` would change them."""
    level = logging.getLogger().getEffectiveLevel()
    found: dict[str, bool | int | str] = {
        "log_file": "",
        "log_info": level <= logging.INFO,
        "log_warning": level <= logging.WARNING,
        "log_error": level <= logging.ERROR,
        "log_verbose_level": int(level <= logging.DEBUG),
    }
    _check_unchanged(
        "log", found, {name: value for name, value in changes.items() if value is not None}, _NO_LEVELS
    )
    return found


def _check_unchanged(what: str, current: Mapping[str, Any], changes: Mapping[str, Any], instead: str) -> None:
    for name, value in changes.items():
        if name not in current:
            raise RouteRefused(501, f"{what} setting '{name}' is not supported: {instead}")
        # In Python False == 0.
        if value != current[name] or isinstance(value, bool) != isinstance(current[name], bool):
            raise RouteRefused(
                501,
                f"{what} setting '{name}' cannot be changed from {current[name]!r} to {value!r}: {instead}",
            )


# ------------------------------------------------------------
# Routes by path.


Endpoint = Callable[[Endpoints, "Route", bytes], Any]
"""Gives, at once or later, a response, or what is to be JSON in one; None stands for ``{}``."""


class Route(Struct, frozen=True):
    """A path's ``endpoint`` (None: inference), its ``method``, and the model in the path, if any.

    For shared memory ``model`` is a region's name. ``local``: the client is on this host. ``method`` may be
    several, separated by ", ", or empty for any. ``target``: what was asked for, where it is passed on whole.
    ``openmetrics``: the client asked for metrics of that form.
    """

    method: bytes
    endpoint: Endpoint | None
    model: str = ""
    version: str = ""
    local: bool = False
    target: bytes = b""
    openmetrics: bool = False

    def takes(self, method: bytes) -> bool:
        """Whether the endpoint allows that method."""
        methods = self.method.split(b", ")
        return not self.method or method in methods or (method == b"HEAD" and b"GET" in methods)


def find_route(url: bytes) -> Route | None:
    """The route of a request target; None if there is none."""
    # Long ones are not cached: clients could fill the memory with them.
    return _remembered(url) if len(url) <= 256 else _find(url)


def _find(url: bytes) -> Route | None:
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserInvalidURLError:
        return None
    if not path or len(path) > _PATH_MAX:
        return None
    # Each segment is decoded by itself, so that a name may contain a slash.
    match [unquote(part) for part in path.decode("latin-1").strip("/").split("/")]:
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


_TARGET: Final = re.compile(rb"[!-~]{1,2048}")  # what is passed on: nothing that could be the end of a line
_SHOWN: Final = 100  # characters of a path in a message
_PATH_MAX: Final = 4 * KIB  # more than any names need; decoding 30 KiB of percent signs takes milliseconds
_remembered: Final = lru_cache(maxsize=4096)(_find)


def no_such_path(url: bytes, *, metrics_port: bool = False) -> HttpResponse:
    """The response to a request target that has no route on its port: what there is instead."""
    path = printable(url.partition(b"?")[0].decode("latin-1"), _SHOWN)
    there = "the protocol is under /v2, and GET /v2/openapi.json describes every path"
    if metrics_port:
        there = (
            "this port has /metrics, /v2/health/live and /v2/health/ready; the protocol is on the HTTP port"
        )
    return error_response(404, f"no such path: '{path}'; {there}")


def find_metrics_route(url: bytes) -> Route | None:
    """The route on the metrics port, which has only metrics, health and the live page."""
    path = url.partition(b"?")[0]
    if path == b"/" or path.startswith(b"/live/"):
        return Route(b"GET", live_page, target=url) if _TARGET.fullmatch(url) else None
    route = find_route(url)
    return route if route is not None and route.endpoint in (_metrics, _live, _ready) else None


def live_page(endpoints: Endpoints, route: Route, body: bytes) -> HttpResponse:
    """The live page: its server relays what is asked, where the setting says so."""
    return error_response(404, "Not Found: the setting live_page is off")


def answer(
    endpoints: Endpoints, route: Route, body: bytes, *, local: bool = False
) -> HttpResponse | Awaitable[Any]:
    """Call a route's endpoint; its response, at once or later. ``local``: the client is on this host."""
    assert route.endpoint is not None
    try:
        found = route.endpoint(endpoints, msgspec.structs.replace(route, local=local), body)
        return found if isinstance(found, Awaitable) else _responded(found)
    except (UnknownModel, RouteRefused) as error:
        return refusal(error)
    except Exception:  # noqa: BLE001 - as settled
        return internal_error_response()


async def resolved(found: Awaitable[Any]) -> HttpResponse:
    """Wait for a response; errors become responses as well."""
    try:
        return _responded(await found)
    except (UnknownModel, RouteRefused) as error:
        return refusal(error)
    except Exception:  # noqa: BLE001 - a bug that one request triggers must not end all others
        return internal_error_response()


def _responded(found: Any) -> HttpResponse:
    return found if isinstance(found, HttpResponse) else json_response({} if found is None else found)


def refusal(error: UnknownModel | RouteRefused) -> HttpResponse:
    """The response to an error."""
    if isinstance(error, RouteRefused):
        return error_response(error.code, str(error), **error.more)
    return error_response(404, str(error))


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


def _live(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    return {"live": True}


def _ready(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    endpoints.check_ready()
    return {"ready": True}


@lru_cache(maxsize=1)
def _described(version: str) -> bytes:
    return msgspec.json.encode(http_description(version))


def _model_ready(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    endpoints.check_model_ready(route.model, route.version)
    return {"name": route.model, "ready": True}


async def _metrics(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    kind = OPENMETRICS_TYPE if route.openmetrics else CONTENT_TYPE
    return HttpResponse(200, (await endpoints.metrics(openmetrics=route.openmetrics),), kind.encode())


def _index(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    ready = _object(body).get("ready", False)
    if not isinstance(ready, bool):
        raise RouteRefused(400, f"ready: expected true or false, found {ready!r}")
    return endpoints.index(ready=ready)


def _unload(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    _parameters(body)
    return endpoints.unload(route.model)


def _generate(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    return error_response(501, "the generate extension is not supported; use infer")


def _stats(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    return endpoints.statistics(route.model, route.version)


def _trace(endpoints: Endpoints, route: Route, body: bytes) -> Any:
    return trace_settings(endpoints, route.model, _object(body), route.version)


def _parameters(body: bytes) -> dict[str, Any]:
    parameters = _object(body).get("parameters", {})
    if not isinstance(parameters, dict):
        raise RouteRefused(400, f"parameters: expected an object, found {type(parameters).__name__}")
    return parameters


def _object(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RouteRefused(400, f"body: expected a JSON object, found other: {error}") from None


_FIXED: Final[dict[str, tuple[bytes, Endpoint]]] = {
    "v2": (b"GET", lambda at, route, body: at.server()),
    "v2/openapi.json": (b"GET", lambda at, route, body: HttpResponse(200, (_described(at.version),))),
    "v2/health/live": (b"GET", _live),
    "v2/health/ready": (b"GET", _ready),
    "v2/models": (b"GET", lambda at, route, body: {"models": at.models()}),
    "v2/models/stats": (b"GET", _stats),
    "v2/repository/index": (b"POST", _index),
    "v2/trace/setting": (b"GET, POST", _trace),
    "v2/logging": (b"GET, POST", lambda at, route, body: log_settings(_object(body))),
    "metrics": (b"GET", _metrics),
}
_MODEL: Final[dict[str, tuple[bytes, Endpoint]]] = {
    "": (b"GET", lambda at, route, body: at.metadata(route.model, route.version)),
    "ready": (b"GET", _model_ready),
    "config": (b"GET", lambda at, route, body: HttpResponse(200, (at.config(route.model, route.version),))),
    "stats": (b"GET", _stats),
    "trace/setting": (b"GET, POST", _trace),
    "generate": (b"POST", _generate),
    "generate_stream": (b"POST", _generate),
}
_REGIONS: Final[dict[str, dict[str, tuple[bytes, Endpoint]]]] = {
    "systemsharedmemory": {
        "status": (b"GET", lambda at, route, body: at.regions(route.model, local=route.local)),
        "register": (
            b"POST", lambda at, route, body: at.register(route.model, _object(body), local=route.local),
        ),
        "unregister": (b"POST", lambda at, route, body: at.unregister(route.model, local=route.local)),
    },
    "cudasharedmemory": {
        "status": (b"GET", lambda at, route, body: at.cuda_regions(route.model)),
        "register": (b"POST", lambda at, route, body: at.register_cuda()),
        "unregister": (b"POST", lambda at, route, body: None),
    },
}  # fmt: skip
_REPOSITORY: Final[dict[str, Endpoint]] = {
    "load": lambda at, route, body: at.load(route.model, _parameters(body)), "unload": _unload,
}  # fmt: skip

# The rights that endpoints need; for all others see right_of in http/exchange.py.
OPEN_ENDPOINTS: Final = frozenset({_live, _ready, _model_ready})
METRICS_ENDPOINTS: Final = frozenset({_metrics})
READING_POSTS: Final = frozenset({_index, _generate})
