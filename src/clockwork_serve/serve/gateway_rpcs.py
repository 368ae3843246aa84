"""What stands between gRPC and its answers: methods of services, health, reflection. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from clockwork_serve.oip import UnknownModel, grpc_of_http
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, message, rpcs
from clockwork_serve.oip.reflection import reflect
from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_endpoints import Refused
from clockwork_serve.serve.grpc_call import Aborted, Call, Method
from clockwork_serve.serve.grpc_server import coroutine, stream
from clockwork_serve.units import KIB

OLD_REFLECTION_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
"""Same messages under an older name, which most clients ask for."""
MESSAGE_BYTES: Final = 16 * KIB
"""Of a message that asks for no inference: protobuf may make thousands of objects of it."""
_LIVE_SERVICES: Final = ("", INFERENCE_SERVICE)
_HealthResponse: Final = message("grpc.health.v1.HealthCheckResponse")


def methods(service: str, answers: dict[str, Callable[..., Any]], name: str = "") -> list[Method]:
    """Methods of a service, which may be asked for under another ``name``."""
    known = rpcs(service)
    found = []
    for rpc_name, answer in answers.items():
        rpc = known[rpc_name]
        make = stream if rpc.client_streaming or rpc.server_streaming else coroutine
        path = f"/{name or service}/{rpc_name}"
        found.append(
            make(path, _bounded(rpc.request.FromString, path), rpc.response.SerializeToString, answer)
        )
    return found


def _bounded(parse: Callable[[bytes], Any], path: str) -> Callable[[bytes], Any]:
    """Parses no message that is larger than any that means something: each has names, and few of them."""

    def parsed(message: bytes) -> Any:
        if len(message) > MESSAGE_BYTES:
            text = f"{path}: expected a message of at most {MESSAGE_BYTES} bytes, found {len(message)}"
            raise Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return parse(message)

    return parsed


def checked(answer: Callable[[Any], Awaitable[dict[str, Any]]], response: Any) -> Callable[..., Any]:
    """An RPC from a coroutine that gives its response's fields."""

    async def answered(request: Any, call: Call) -> Any:
        try:
            return response(**await answer(request))
        except UnknownModel as error:
            raise Aborted(grpc.StatusCode.NOT_FOUND, str(error)) from None
        except Refused as error:
            raise Aborted(grpc.StatusCode[grpc_of_http(error.code)], str(error)) from None

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

    async def _check(self, request: Any, call: Call) -> Any:
        if request.service not in _LIVE_SERVICES:
            raise Aborted(grpc.StatusCode.NOT_FOUND, f"unknown service '{request.service}'")
        return _HealthResponse(status=self._serving)

    async def _watch(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        request = await anext(requests, None)
        if request is None:
            raise Aborted(grpc.StatusCode.UNIMPLEMENTED, "Watch: expected one message, found none")
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


async def _reflect(requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    async for request in requests:
        yield reflect(request)


REFLECTION: Final[dict[str, Callable[..., Any]]] = {"ServerReflectionInfo": _reflect}
