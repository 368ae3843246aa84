"""Which right an RPC needs, checked before its message is read, and the answer to one that lacks it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

import grpc
import grpc.aio

from clockwork_serve.oip.protobuf import HEALTH_SERVICE, INFERENCE_SERVICE
from clockwork_serve.serve.gateway_keys import Denied, KeyRing, Right

IDENTITY: Final[ContextVar[str]] = ContextVar("identity", default="")
"""Whose RPC it is that runs now; empty where no keys are asked for."""

_OPEN: Final = ("ServerLive", "ServerReady", "ModelReady")
_INFER: Final = (
    "ModelInfer", "ModelStreamInfer", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics",
    "RepositoryIndex", "SystemSharedMemoryStatus", "CudaSharedMemoryStatus",
)  # fmt: skip
_RIGHTS: Final[dict[str, Right | None]] = {
    **{f"/{INFERENCE_SERVICE}/{name}": None for name in _OPEN},
    **{f"/{INFERENCE_SERVICE}/{name}": Right.INFER for name in _INFER},
    **{f"/{HEALTH_SERVICE}/{name}": None for name in ("Check", "Watch")},
    **{f"/grpc.reflection.{v}.ServerReflection/ServerReflectionInfo": Right.INFER for v in ("v1", "v1alpha")},
}


def right_of(method: str) -> Right | None:
    """None: anybody may. What is not known to read or infer is taken to change something."""
    return _RIGHTS.get(method, Right.ADMIN)


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc publishes no types
    """Lets RPCs through to their services, under the name of the key's holder."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """The RPC's own handler, or one that denies."""
        right = right_of(handler_call_details.method)
        if right is not None:
            found = dict(handler_call_details.invocation_metadata or ())
            try:
                holder = self._keys.admit(right, _bytes(found, "authorization"), _bytes(found, "x-api-key"))
            except Denied as denied:
                return _denying(denied)
            IDENTITY.set(holder.name)
        return await continuation(handler_call_details)


def _bytes(metadata: dict[str, Any], name: str) -> bytes | None:
    value = metadata.get(name)
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _denying(denied: Denied) -> Any:
    code = grpc.StatusCode.PERMISSION_DENIED if denied.known else grpc.StatusCode.UNAUTHENTICATED

    async def deny(requests: Any, context: Any) -> None:
        await context.abort(code, str(denied))

    # Of this kind whatever the RPC's own is: it reads no message.
    return grpc.stream_stream_rpc_method_handler(deny)
