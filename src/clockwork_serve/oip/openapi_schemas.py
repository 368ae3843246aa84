"""The bodies of the HTTP port as JSON Schemas; nothing is checked here."""

from __future__ import annotations

from typing import Any, Final

from clockwork_serve.messages import DATATYPES, Outcome, Reason

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
