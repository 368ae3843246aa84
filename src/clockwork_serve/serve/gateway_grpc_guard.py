"""Which right an RPC needs, checked before its message is read, and the answer to one that lacks it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final

import grpc

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


class KeyGuard(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc publishes no types
    """Takes RPCs that may not be, and leaves others to the handlers after it, under their holder's tenant.

    It must be the first one of a server. It costs 15 us a request, as gRPC takes long to hand over metadata.
    """

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def service(self, handler_call_details: Any) -> Any:
        """A handler that denies, or None."""
        right = right_of(handler_call_details.method)
        if right is None:
            return None
        authorization = api_key = None
        for name, value in handler_call_details.invocation_metadata:
            if name == "authorization":
                authorization = _bytes(value)
            elif name == "x-api-key":
                api_key = _bytes(value)
        try:
            holder = self._keys.admit(right, authorization, api_key)
        except Denied as denied:
            return _denying(denied)
        # The RPC's own task runs this.
        IDENTITY.set(holder.tenant)
        return None


def _bytes(value: str | bytes) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _denying(denied: Denied) -> Any:
    code = grpc.StatusCode.PERMISSION_DENIED if denied.known else grpc.StatusCode.UNAUTHENTICATED

    async def deny(requests: Any, context: Any) -> None:
        await context.abort(code, str(denied))

    # Of this kind whatever the RPC's own is: it reads no message.
    return grpc.stream_stream_rpc_method_handler(deny)
