"""What this server's gRPC services look like, for clients that have no ``.proto``; it knows no channel."""

from __future__ import annotations

from typing import Any, Final

from clockwork_serve.oip.protobuf import (
    HEALTH_SERVICE,
    INFERENCE_SERVICE,
    REFLECTION_SERVICE,
    message,
    pool,
)

_NOT_FOUND: Final = 5
_INVALID_ARGUMENT: Final = 3
_SERVICES: Final = (HEALTH_SERVICE, REFLECTION_SERVICE, INFERENCE_SERVICE)
_Response: Final = message("grpc.reflection.v1.ServerReflectionResponse")


def reflect(request: Any) -> Any:
    """The ``ServerReflectionResponse`` to a ``ServerReflectionRequest``; what is missing is an error."""
    try:
        found = _found(request, request.WhichOneof("message_request"))
    except KeyError as error:
        found = _error(_NOT_FOUND, f"not found: {error.args[0]}")
    return _Response(valid_host=request.host, original_request=request, **found)


def _found(request: Any, what: str | None) -> dict[str, Any]:
    match what:
        case "list_services":
            return {"list_services_response": {"service": [{"name": name} for name in _SERVICES]}}
        case "file_by_filename":
            return _files(pool.FindFileByName(request.file_by_filename))
        case "file_containing_symbol":
            return _files(_file_of(request.file_containing_symbol))
        case "file_containing_extension":
            wanted = request.file_containing_extension
            raise KeyError(f"extension {wanted.extension_number} of {wanted.containing_type}")
        case "all_extension_numbers_of_type":
            # There are none: proto3 has no extensions. The type must be there all the same.
            name = pool.FindMessageTypeByName(request.all_extension_numbers_of_type).full_name
            return {"all_extension_numbers_response": {"base_type_name": name}}
        case _:
            return _error(_INVALID_ARGUMENT, "message_request: expected one of its fields, found none")


def _file_of(symbol: str) -> Any:
    service, _, method = symbol.rpartition(".")
    if service in _SERVICES:
        # The pool knows no methods as symbols.
        return pool.FindServiceByName(service).methods_by_name[method].containing_service.file
    return pool.FindFileContainingSymbol(symbol)


def _files(file: Any) -> dict[str, Any]:
    """A file and all that it imports, each once, imports first."""
    files: dict[str, bytes] = {}
    _collect(file, files)
    return {"file_descriptor_response": {"file_descriptor_proto": list(files.values())}}


def _collect(file: Any, files: dict[str, bytes]) -> None:
    for imported in file.dependencies:
        if imported.name not in files:
            _collect(imported, files)
    files[file.name] = file.serialized_pb


def _error(code: int, text: str) -> dict[str, Any]:
    return {"error_response": {"error_code": code, "error_message": text}}
