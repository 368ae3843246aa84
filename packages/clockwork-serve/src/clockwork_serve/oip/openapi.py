"""The HTTP port described as OpenAPI 3.1: every path, body, header and status."""

from __future__ import annotations

import re
from typing import Any, Final

from clockwork_serve.messages import DATATYPES, Outcome, Reason

# ------------------------------------------------------------
# The bodies of the HTTP port as JSON Schemas; nothing is checked here.


Json = dict[str, Any]

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_MS: Final = {"type": "number", "minimum": 0}
_SCALAR: Final = {"type": ["boolean", "number", "string"]}
_PARAMETERS: Final = {"type": "object", "additionalProperties": _SCALAR}
_DATATYPE: Final = {"enum": list(DATATYPES)}


def ref(name: str) -> Json:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Json, optional: Json | None = None, **more: Any) -> Json:
    """An object; a server or a client may say more than that."""
    return {
        "type": "object", "properties": {**required, **(optional or {})}, "required": list(required), **more,
    }  # fmt: skip


def _list(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


_DURATION: Final = _object({"count": _COUNT, "ns": _COUNT})
_TENSORS: Final = _list(_object({"name": _TEXT, "datatype": _DATATYPE, "shape": _list({"type": "integer"})}))
_PHASES: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip
_BATCH: Final = _object(
    {"batch_size": _COUNT, **dict.fromkeys(("compute_input", "compute_infer", "compute_output"), _DURATION)}
)
_INPUT: Final = _object(
    {"name": _TEXT, "shape": _list(_COUNT), "datatype": _DATATYPE},
    {
        "parameters": {
            "description": (
                "`binary_data_size`: bytes of it behind the JSON; `shared_memory_region`, "
                "`shared_memory_byte_size`, `shared_memory_offset`: where it is instead."
            ),
            "type": ["object", "null"], "additionalProperties": _SCALAR,
        },
        "data": {"description": "Its elements, flat or nested, row by row.", "type": "array"},
    },
)  # fmt: skip
_WISH: Final = _object(
    {"name": _TEXT},
    {
        "parameters": {
            "description": "`binary_data`, `classification`, or where in shared memory to put it.",
            "type": ["object", "null"], "additionalProperties": _SCALAR,
        }
    },
)  # fmt: skip
_MEASURED: Final = _object(
    {},
    {
        "queue_ms": _MS, "exec_ms": _MS, "expected_ms": _MS,
        "batch_size": {"type": "integer", "minimum": 1}, "cold_start": {"type": "boolean"}, "slo_ms": _MS,
    },
)  # fmt: skip
_TRACE: Final = {"trace_level": _list(_TEXT)}
_LOG: Final = {
    "log_file": _TEXT, "log_info": {"type": "boolean"}, "log_warning": {"type": "boolean"},
    "log_error": {"type": "boolean"}, "log_verbose_level": _COUNT,
}  # fmt: skip

SCHEMAS: Final[Json] = {
    "Error": _object({"error": _TEXT}),
    "Refusal": _object(
        {
            "error": _TEXT,
            "outcome": {"enum": [str(each) for each in Outcome if each is not Outcome.OK]},
            "reason": {"enum": [str(each) for each in Reason]},
        },
        {
            "id": _TEXT,
            "parameters": _MEASURED,
            "retry_after_ms": {
                "description": "When a like request could be served, exactly.",
                "type": "number",
                "exclusiveMinimum": 0,
            },
        },
    ),
    "Nothing": {"type": "object", "maxProperties": 0},
    "Document": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
    # Server and models
    "Live": _object({"live": {"const": True}}),
    "Ready": _object({"ready": {"const": True}}),
    "ModelReady": _object({"name": _TEXT, "ready": {"const": True}}),
    "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "ModelNames": _object({"models": _list(_TEXT)}),
    "ModelMetadata": _object(
        {"name": _TEXT, "versions": _list(_TEXT), "platform": _TEXT, "inputs": _TENSORS, "outputs": _TENSORS}
    ),
    "Config": _object({"name": _TEXT, "max_batch_size": _COUNT, "input": {"type": "array"}}),
    "Statistics": _object(
        {
            "model_stats": _list(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": {"description": "ms since 1970; 0: none yet", **_COUNT},
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _object(dict.fromkeys(_PHASES, _DURATION)),
                        "response_stats": {"type": "object"},
                        "batch_stats": _list(_BATCH),
                        "memory_usage": _list(_object({"type": _TEXT, "id": _COUNT, "byte_size": _COUNT})),
                    }
                )
            )
        }
    ),
    # Inference
    "InferRequest": _object(
        {"inputs": _list(_INPUT)},
        {
            "id": _TEXT,
            "outputs": {"description": "All, if none is named.", "type": ["array", "null"], "items": _WISH},
            "parameters": {
                "description": (
                    "`slo_ms` (milliseconds) and Triton's `timeout` (microseconds): deadlines; `priority`; "
                    "`binary_data_output`: all outputs binary."
                ),
                "type": ["object", "null"],
                "additionalProperties": _SCALAR,
            },
        },
    ),
    "InferResponse": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "outputs": _list(
                _object(
                    {"name": _TEXT, "datatype": _DATATYPE, "shape": _list(_COUNT)},
                    {"parameters": _object({"binary_data_size": _COUNT}), "data": {"type": "array"}},
                )
            ),
            "parameters": _MEASURED,
        },
        {"id": _TEXT},
    ),
    # Repository
    "IndexRequest": _object({}, {"ready": {"description": "Only those that are ready.", "type": "boolean"}}),
    "Index": _list(_object({"name": _TEXT}, {"version": _TEXT, "state": _TEXT, "reason": _TEXT})),
    "LoadRequest": _object(
        {},
        {"parameters": {"description": "None is known.", "type": "object", "maxProperties": 0}},
    ),
    "UnloadRequest": _object({}, {"parameters": {"type": "object"}}),
    # Shared memory
    "Regions": _list(_object({"name": _TEXT, "key": _TEXT, "offset": _COUNT, "byte_size": _COUNT})),
    "CudaRegions": _list(
        _object({"name": _TEXT, "device_id": _COUNT, "byte_size": _COUNT}), maxItems=0
    ),
    "RegisterRequest": _object(
        {"key": {"description": "A name in /dev/shm.", "type": "string", "minLength": 1},
         "byte_size": {"type": "integer", "minimum": 1}},
        {"offset": _COUNT},
    ),
    "RegisterCudaRequest": _object(
        {"raw_handle": _object({"b64": _TEXT}), "device_id": _COUNT, "byte_size": _COUNT}
    ),
    # Settings
    "TraceSettings": _object(_TRACE),
    "TraceSettingsRequest": _object({}, {"trace_level": {"enum": [["OFF"], "OFF", [], None]}}),
    "LogSettings": _object(_LOG),
    "LogSettingsRequest": _object(
        {}, {name: {"anyOf": [kind, {"type": "null"}]} for name, kind in _LOG.items()}
    ),
}  # fmt: skip


# ------------------------------------------------------------
# The HTTP port described as OpenAPI 3.1: every path, body, header and status. It answers nothing.
#
# Served at ``/v2/openapi.json``; tests ask a running server all of it and hold each answer against this.


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
