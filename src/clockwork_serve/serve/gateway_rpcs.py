"""What stands between gRPC and its answers: handlers of services, health, reflection. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from clockwork_serve.oip import UnknownModel, grpc_of_http
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, Rpc, message, rpcs
from clockwork_serve.oip.reflection import reflect
from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_endpoints import Refused

Context = Any
"""``grpc.aio.ServicerContext``; grpc publishes no types."""

OLD_REFLECTION_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
"""Same messages under an older name, which most clients ask for."""
_LIVE_SERVICES: Final = ("", INFERENCE_SERVICE)
_HealthResponse: Final = message("grpc.health.v1.HealthCheckResponse")


def handlers(service: str, answers: dict[str, Callable[..., Any]], name: str = "") -> Any:
    """Handlers of a service, which may be asked for under another ``name``."""
    methods = {
        rpc.name: _handler(rpc, answers.get(rpc.name, _unimplemented(rpc))) for rpc in rpcs(service).values()
    }
    return grpc.method_handlers_generic_handler(name or service, methods)


def _handler(rpc: Rpc, answer: Callable[..., Any]) -> Any:
    make = getattr(
        grpc,
        f"{'stream' if rpc.client_streaming else 'unary'}_{'stream' if rpc.server_streaming else 'unary'}"
        "_rpc_method_handler",
    )
    return make(
        answer,
        request_deserializer=rpc.request.FromString,
        response_serializer=rpc.response.SerializeToString,
    )


def checked(answer: Callable[[Any], Awaitable[dict[str, Any]]], response: Any) -> Callable[..., Any]:
    """An RPC from a coroutine that gives its response's fields."""

    async def answered(request: Any, context: Context) -> Any:
        try:
            return response(**await answer(request))
        except UnknownModel as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except Refused as error:
            await context.abort(grpc.StatusCode[grpc_of_http(error.code)], str(error))

    return answered


def _unimplemented(rpc: Rpc) -> Callable[..., Any]:
    async def answered(request: Any, context: Context) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{rpc.name} is not supported by this server")

    return answered


class Health:
    """The standard health service, of the server as a whole."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._changed = asyncio.Event()
        gateway.readiness_listeners.append(self._on_readiness)

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Its RPCs by name."""
        return {"Check": self._check, "Watch": self._watch}

    async def _check(self, request: Any, context: Context) -> Any:
        if request.service not in _LIVE_SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service '{request.service}'")
        return _HealthResponse(status=self._serving)

    async def _watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        if request.service not in _LIVE_SERVICES:
            yield _HealthResponse(status="SERVICE_UNKNOWN")
        told = ""
        while True:
            changed = self._changed
            if request.service in _LIVE_SERVICES and self._serving != told:
                told = self._serving
                yield _HealthResponse(status=told)
            await changed.wait()

    @property
    def _serving(self) -> str:
        return "SERVING" if self._gateway.link.ready else "NOT_SERVING"

    def _on_readiness(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _reflect(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    async for request in requests:
        yield reflect(request)


REFLECTION: Final[dict[str, Callable[..., Any]]] = {"ServerReflectionInfo": _reflect}
