"""The HTTP port described as OpenAPI 3.1: every path, body, header and status. It answers nothing.

Served at ``/v2/openapi.json``; tests ask a running server all of it and hold each answer against this.
"""

from __future__ import annotations

import re
from typing import Any, Final

from clockwork_serve.oip.openapi_schemas import SCHEMAS, ref

Json = dict[str, Any]

_INTRODUCTION: Final = """\
The Open Inference Protocol with deadlines: a request is answered within its deadline or refused at once.
Every GET also takes HEAD. A method that a path does not have is 405, and `Allow` says which it has; a path
that does not exist is 404. Where the operator has set API keys, each request but those about health needs
one.
A connection that has been told 408, 413, 417, 429 or 431 about its head or body may be closed."""

_TAGS: Final = ("server", "models", "inference", "repository", "memory", "settings")
_KEYS: Final[list[Json]] = [{}, {"bearer": []}, {"apiKey": []}]

_RETRY_AFTER: Final = {
    "Retry-After": {
        "description": "Whole seconds: rounded up, and spread so that not all come back at once.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_REQUEST_ID: Final = {
    "Clockwork-Request-Id": {
        "description": "The request's name in logs and journal; absent if it was refused at once.",
        "schema": {"type": "string"},
    }
}
_CODINGS: Final = {
    "Accept-Encoding": {"description": "What a body may be coded with.", "schema": {"type": "string"}}
}
_ANY_TIME: Final = {
    400: "Malformed, or a field is wrong: the message says which, what was expected and what found.",
    401: "An API key is missing or unknown.",
    403: "The API key lacks the right, or what was asked for is for others.",
    408: "The head or the body did not arrive in time.",
    413: "The body is too large, or becomes so when it is decompressed.",
    417: "An `Expect` other than 100-continue.",
    429: "Too many connections, or too much on its way at once.",
    431: "The head is too large.",
    501: "Something that the protocol has and this server has not, such as a `Content-Encoding`.",
}
"""What any path may answer, whatever is asked there."""
_HEADERS: Final[dict[int, Json]] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    429: _RETRY_AFTER,
    501: _CODINGS,
}
_UNKNOWN: Final = {404: "No model, or no version, of that name is served."}
_ASKED: Final = {
    503: "The controller cannot be asked now.",
    504: "The controller did not reply in time.",
}
_NOT_READY: Final = {503: "This server does not serve now; the message says why."}
_REGION_ERRORS: Final = {
    404: "No region of that name is registered.",
    409: "A region of that name is registered already.",
}
_INFER: Final = {
    **_UNKNOWN,
    429: "Refused: no schedule meets the deadline, or there is no room; or as above.",
    500: "Outcome `failed`: the model raised, or its device failed.",
    503: "Refused: this server does not serve now. With `triton_codes` also what is else 429 or 504.",
    504: "Outcome `expired`: no answer by the deadline.",
}
_MODEL: Final = {
    "name": "model",
    "in": "path",
    "required": True,
    "example": "mlp",
    "schema": {"type": "string", "minLength": 1},
}
_VERSION: Final = {
    "name": "version", "in": "path", "required": True, "example": "1",
    "schema": {"type": "string", "pattern": "^[0-9]{1,9}$"},
}  # fmt: skip
_REGION: Final = {
    "name": "region", "in": "path", "required": True,
    "schema": {"type": "string", "minLength": 1},
}  # fmt: skip
_EXAMPLE: Final = {
    "inputs": [{"name": "bits", "datatype": "FP32", "shape": [1, 2], "data": [0, 1]}],
    "parameters": {"slo_ms": 100},
}
_SLO: Final = {
    "name": "x-slo-ms", "in": "header", "required": False,
    "description": "Deadline from arrival, in milliseconds, above 0 and at most 24 hours.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400_000},
}  # fmt: skip
_HEADER_LENGTH: Final = {
    "name": "Inference-Header-Content-Length", "in": "header", "required": False,
    "description": (
        "Bytes of JSON at the body's start, behind which binary tensors follow in the order of the inputs; "
        "0: the whole body is the one input of the model. Without it the body is JSON alone."
    ),
    "schema": {"type": "integer", "minimum": 0},
}  # fmt: skip
_ACCEPT: Final = {
    "name": "Accept-Encoding", "in": "header", "required": False,
    "description": "gzip or deflate alone, or weighted, asks for a compressed response.",
    "schema": {"type": "string"},
}  # fmt: skip
_CODED: Final = {
    "name": "Content-Encoding", "in": "header", "required": False,
    "description": "How the request's body is compressed.",
    "schema": {"enum": ["identity", "gzip", "deflate"]},
}  # fmt: skip


def description(version: str) -> Json:
    """The whole document; ``version`` is the server's."""
    paths = {**_server(), **_models(), **_repository(), **_memory(), **_settings()}
    for path, operations in paths.items():
        words = [word.capitalize() for word in re.split(r"[\W_]+", path) if word not in ("", "v2")] or [
            "Server"
        ]
        for method in operations.keys() & {"get", "post"}:
            # Several paths share an operation.
            operations[method] = {"operationId": "".join((method, *words)), **operations[method]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Clockwork Serve",
            "version": version,
            "description": _INTRODUCTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": _KEYS,
        "tags": [{"name": name} for name in _TAGS],
        "paths": paths,
        "components": {
            "responses": {str(code): _error(code, text) for code, text in _ANY_TIME.items()},
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _server() -> Json:
    return {
        "/v2": {"get": _operation("server", "Who serves", "ServerMetadata")},
        "/v2/health/live": {"get": _open("server", "Whether it answers at all", "Live")},
        "/v2/health/ready": {"get": _open("server", "Whether it serves", "Ready", _NOT_READY)},
        "/v2/openapi.json": {"get": _operation("server", "This document", "Document")},
        "/metrics": {"get": _metrics()},
    }


def _models() -> Json:
    found: Json = {
        "/v2/models": {"get": _operation("models", "Names of all models", "ModelNames")},
        "/v2/models/stats": {"get": _operation("models", "Statistics of all models", "Statistics", _ASKED)},
    }
    for tail, operations in (
        ("", {"get": _operation("models", "Inputs and outputs", "ModelMetadata", _UNKNOWN)}),
        ("/ready", {"get": _open("models", "Whether it is served", "ModelReady", _UNKNOWN | _NOT_READY)}),
        ("/config", {"get": _operation("models", "Configuration, in Triton's names", "Config", _UNKNOWN)}),
        ("/stats", {"get": _operation("models", "Statistics", "Statistics", _UNKNOWN | _ASKED)}),
        ("/infer", {"post": _infer()}),
        ("/generate", {"post": _never("inference", "Not supported; use infer", _UNKNOWN)}),
        ("/generate_stream", {"post": _never("inference", "Not supported; use infer", _UNKNOWN)}),
        ("/trace/setting", _setting("Trace settings of a model", "TraceSettings", _UNKNOWN)),
    ):
        found[f"/v2/models/{{model}}{tail}"] = {"parameters": [_MODEL], **operations}
        found[f"/v2/models/{{model}}/versions/{{version}}{tail}"] = {
            "parameters": [_MODEL, _VERSION], **operations,
        }  # fmt: skip
    return found


def _repository() -> Json:
    index = _operation("repository", "Models of the repository and their states", "Index", _ASKED)
    control = {
        404: "There is none of that name.",
        503: "Loading by clients is off, or the keeper cannot be asked now.",
        504: _ASKED[504],
    }
    load = _operation("repository", "Serve a model of the repository, or serve it anew", "Nothing", control)
    unload = _operation("repository", "Serve a model no more", "Nothing", control)
    return {
        "/v2/repository/index": {"post": {**index, "requestBody": _body("IndexRequest")}},
        "/v2/repository/models/{model}/load": {
            "parameters": [_MODEL], "post": {**load, "requestBody": _body("LoadRequest")},
        },
        "/v2/repository/models/{model}/unload": {
            "parameters": [_MODEL], "post": {**unload, "requestBody": _body("UnloadRequest")},
        },
    }  # fmt: skip


def _memory() -> Json:
    found: Json = {}
    for kind, word, regions in (
        ("systemsharedmemory", "system", "Regions"),
        ("cudasharedmemory", "CUDA", "CudaRegions"),
    ):
        absent = {404: _REGION_ERRORS[404]}
        status = _operation("memory", f"Regions of {word} shared memory", regions)
        one = _operation("memory", f"One region of {word} shared memory", regions, absent)
        register = (
            _operation("memory", "Let requests name shared memory", "Nothing", _REGION_ERRORS)
            if word == "system"
            else _never("memory", "Not supported")
        )
        forget = _operation("memory", f"Forget {word} shared memory; it is fine if there is none", "Nothing")
        body = _body("RegisterRequest" if word == "system" else "RegisterCudaRequest", required=True)
        found |= {
            f"/v2/{kind}/status": {"get": status},
            f"/v2/{kind}/unregister": {"post": forget},
            f"/v2/{kind}/region/{{region}}/status": {"parameters": [_REGION], "get": one},
            f"/v2/{kind}/region/{{region}}/register": {
                "parameters": [_REGION], "post": {**register, "requestBody": body},
            },
            f"/v2/{kind}/region/{{region}}/unregister": {"parameters": [_REGION], "post": forget},
        }  # fmt: skip
    return found


def _settings() -> Json:
    return {
        "/v2/trace/setting": _setting("Trace settings", "TraceSettings"),
        "/v2/logging": _setting("Log settings", "LogSettings"),
    }


def _setting(summary: str, schema: str, more: dict[int, str] | None = None) -> Json:
    """What can be read, and written where that changes nothing."""
    change = _operation("settings", f"{summary}: what changes nothing is accepted", schema, more)
    return {
        "get": _operation("settings", summary, schema, more),
        "post": {**change, "requestBody": _body(f"{schema}Request")},
    }


def _infer() -> Json:
    found = _operation("inference", "Ask a model", "InferResponse", _ANY_TIME | _INFER)
    found["parameters"] = [_SLO, _HEADER_LENGTH, _ACCEPT, _CODED]
    found["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {"schema": ref("InferRequest"), "example": _EXAMPLE},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
    answered = found["responses"]["200"]
    answered["content"]["application/octet-stream"] = {}
    answered["headers"] = {
        **_REQUEST_ID,
        "Inference-Header-Content-Length": {
            "description": "Bytes of JSON before binary outputs, once decompressed; absent without them.",
            "schema": {"type": "integer", "minimum": 1},
        },
        "Content-Encoding": {"schema": {"enum": ["gzip", "deflate"]}},
    }
    for code, response in found["responses"].items():
        if code != "200":
            # What was wrong before it was a request has no outcome.
            schema = {"anyOf": [ref("Refusal"), ref("Error")]}
            response["content"] = {"application/json": {"schema": schema}}
            response["headers"] = {**response.get("headers", {}), **_REQUEST_ID}
            if code in {"503", "504"}:
                response["headers"] |= _RETRY_AFTER
    return found


def _metrics() -> Json:
    found = _operation("server", "Prometheus metrics, also on the port of their own", "Document", _ASKED)
    found["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return found


def _never(tag: str, summary: str, more: dict[int, str] | None = None) -> Json:
    found = _operation(tag, summary, "Nothing", more)
    del found["responses"]["200"]
    return found


def _open(tag: str, summary: str, schema: str, more: dict[int, str] | None = None) -> Json:
    """One that needs no key."""
    return {**_operation(tag, summary, schema, more), "security": [{}]}


def _operation(tag: str, summary: str, schema: str, more: dict[int, str] | None = None) -> Json:
    responses: Json = {
        "200": {"description": "Done.", "content": {"application/json": {"schema": ref(schema)}}}
    }
    responses |= {str(code): {"$ref": f"#/components/responses/{code}"} for code in _ANY_TIME}
    responses |= {str(code): _error(code, text) for code, text in (more or {}).items()}
    return {"tags": [tag], "summary": summary, "responses": dict(sorted(responses.items()))}


def _error(code: int, text: str) -> Json:
    found: Json = {"description": text, "content": {"application/json": {"schema": ref("Error")}}}
    if code in _HEADERS:
        found["headers"] = _HEADERS[code]
    return found


def _body(schema: str, *, required: bool = False) -> Json:
    return {"required": required, "content": {"application/json": {"schema": ref(schema)}}}
