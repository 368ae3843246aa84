"""Message classes of ``inference.proto``, made at run time in a pool of their own, and reflection on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# ------------------------------------------------------------
# Message classes of ``inference.proto``, made at run time in a pool of their own.
#
# Classes in protobuf's default pool would clash with those of any client library in the same process, which
# define the same names. They are ``Any`` to the type checker: this module is the border.


INFERENCE_SERVICE: Final = "inference.GRPCInferenceService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = "grpc.reflection.v1.ServerReflection"
DESCRIPTORS: Final = Path(__file__).with_name("descriptors.binpb")


def _load() -> descriptor_pool.DescriptorPool:
    own = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        own.AddSerializedFile(file.SerializeToString())
    return own


pool: Final = _load()


def message(name: str) -> Any:
    """The class of a message by its full name."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


class Rpc:
    """One RPC: its name, its message classes, and which sides stream."""

    def __init__(self, method: Any) -> None:
        self.name: str = method.name
        self.request: Any = message_factory.GetMessageClass(method.input_type)
        self.response: Any = message_factory.GetMessageClass(method.output_type)
        self.client_streaming: bool = method.client_streaming
        self.server_streaming: bool = method.server_streaming


def rpcs(service: str) -> dict[str, Rpc]:
    """The RPCs of a service by name."""
    return {method.name: Rpc(method) for method in pool.FindServiceByName(service).methods}


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, as Protocol Buffers and HPACK write integers."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


ModelInferRequest: Final = message("inference.ModelInferRequest")
ModelInferResponse: Final = message("inference.ModelInferResponse")
ModelStreamInferResponse: Final = message("inference.ModelStreamInferResponse")


# ------------------------------------------------------------
# What this server's gRPC services look like, for clients that have no ``.proto``; it knows no channel.


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
