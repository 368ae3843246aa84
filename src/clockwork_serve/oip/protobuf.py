"""Message classes of ``inference.proto``, made at run time in a pool of their own.

Classes in protobuf's default pool would clash with those of any client library in the same process, which
define the same names. They are ``Any`` to the type checker: this module is the border.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INFERENCE_SERVICE: Final = "inference.GRPCInferenceService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = "grpc.reflection.v1.ServerReflection"
DESCRIPTORS: Final = Path(__file__).with_name("descriptors.binpb")


def _load() -> descriptor_pool.DescriptorPool:
    own = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    for file in files.file:
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


ModelInferRequest: Final = message("inference.ModelInferRequest")
ModelInferResponse: Final = message("inference.ModelInferResponse")
ModelStreamInferResponse: Final = message("inference.ModelStreamInferResponse")
