"""The gRPC server of a gateway, on the gateway's own loop. It decides nothing.

It is slower than HTTP by grpc.aio's own cost, about 150 us a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
import msgspec
from google.protobuf import json_format

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Outcome
from clockwork_serve.oip import InferCall, Served, UnknownModel, grpc_of_http
from clockwork_serve.oip.grpc_infer import encode_infer, parse_infer
from clockwork_serve.oip.protobuf import HEALTH_SERVICE, INFERENCE_SERVICE, Rpc, message, rpcs
from clockwork_serve.serve.gateway import Ending, Gateway
from clockwork_serve.serve.gateway_door import Door
from clockwork_serve.serve.gateway_endpoints import Endpoints, Refused
from clockwork_serve.serve.gateway_grpc_guard import IDENTITY, KeyGuard
from clockwork_serve.serve.gateway_limits import grpc_options
from clockwork_serve.serve.gateway_slots import Body
from clockwork_serve.units import NS_PER_MS

Context = Any
"""``grpc.aio.ServicerContext``; grpc publishes no types."""

_DETAILS_MAX: Final = 2000
_LIVE_SERVICES: Final = ("", INFERENCE_SERVICE)
_HealthResponse: Final = message("grpc.health.v1.HealthCheckResponse")
_StreamResponse: Final = message("inference.ModelStreamInferResponse")
_ModelConfig: Final = message("inference.ModelConfig")


class _GrpcInquiry:
    """One ``ModelInfer``. ``ended`` becomes its response, or the :class:`Ending` if there is none."""

    __slots__ = (
        "arrival_ns", "body", "ended", "every_output_binary", "identity", "model", "remaining_s", "request",
        "slo_header", "version",
    )  # fmt: skip

    def __init__(self, request: Any, context: Context, arrival_ns: int, ended: asyncio.Future[Any]) -> None:
        self.request = request
        self.model: str = request.model_name
        self.version: str = request.model_version
        self.identity = IDENTITY.get()
        self.arrival_ns = arrival_ns
        self.slo_header = _metadata(context, "x-slo-ms")
        self.remaining_s: float | None = context.time_remaining()
        self.every_output_binary = True
        self.body: Body | None = None
        self.ended = ended

    def call(self, served: Served) -> InferCall:
        """Parse it. Raises :class:`InvalidRequest`."""
        return parse_infer(self.request)

    def end(self, ending: Ending) -> None:
        """Encode the response while the outputs are there."""
        if self.ended.done():
            return
        if ending.outcome is not Outcome.OK:
            self.ended.set_result(ending)
            return
        assert ending.call is not None
        assert ending.served is not None
        self.ended.set_result(encode_infer(ending.call, ending.served, ending.outputs, ending.parameters))


class GrpcServer:
    """All RPCs of the inference service, and the health service."""

    def __init__(self, gateway: Gateway, endpoints: Endpoints, door: Door, *, reuse_port: bool) -> None:
        self._gateway = gateway
        self._endpoints = endpoints
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        gateway.readiness_listeners.append(self._on_readiness)
        self._credentials = None if door.tls is None else door.tls.grpc_credentials()
        self._server = grpc.aio.server(
            options=[
                *grpc_options(door.limits),
                ("grpc.max_send_message_length", -1),
                # Else a port that another program has would be shared without a word.
                ("grpc.so_reuseport", int(reuse_port)),
            ]
        )
        if door.keys is not None:
            self._server.add_generic_rpc_handlers((KeyGuard(door.keys),))
        self._server.add_generic_rpc_handlers(
            (_handlers(INFERENCE_SERVICE, self._inference()), _handlers(HEALTH_SERVICE, self._health()))
        )

    async def listen(self, host: str, port: int) -> int:
        """Accept connections; the port (chosen if 0). Raises :class:`ConfigError` if it is taken."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            number: int = (
                self._server.add_insecure_port(address)
                if self._credentials is None
                else self._server.add_secure_port(address, self._credentials)
            )
        except RuntimeError as error:
            raise ConfigError(
                f"grpc_port: expected a free port; found {port} on {host} not to be had ({error}); "
                "choose another"
            ) from None
        await self._server.start()
        return number

    async def close(self, patience_s: float) -> None:
        """Accept no more, and let open requests end for a while."""
        await self._server.stop(patience_s)

    # Inference

    async def _infer(self, request: Any, context: Context) -> Any:
        found, request_id = await self._ended(request, context)
        if request_id:
            context.set_trailing_metadata((("clockwork-request-id", request_id),))
        if isinstance(found, Ending):
            await context.abort(
                grpc.StatusCode[found.status.grpc], _text(found), _trailers(found, request_id)
            )
        return found

    async def _stream_infer(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """One response per request, in order. Errors are told inside, unless the client wants a status."""
        as_status = _metadata(context, "triton_grpc_error") == "true"
        async for request in requests:
            found, request_id = await self._ended(request, context)
            if not isinstance(found, Ending):
                yield _StreamResponse(infer_response=found)
            elif as_status:
                await context.abort(
                    grpc.StatusCode[found.status.grpc], _text(found), _trailers(found, request_id)
                )
            else:
                yield _StreamResponse(error_message=_text(found), infer_response={"id": request.id})

    async def _ended(self, request: Any, context: Context) -> tuple[Any, str]:
        ended: asyncio.Future[Any] = self._loop.create_future()
        request_id = self._gateway.infer(_GrpcInquiry(request, context, self._gateway.clock(), ended))
        try:
            return await ended, request_id
        except asyncio.CancelledError:
            # The client went away, or its deadline passed.
            if request_id:
                self._gateway.cancel(request_id)
            raise

    # All else, as plain data

    def _inference(self) -> dict[str, Callable[..., Any]]:
        plain = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_load,
            "RepositoryModelUnload": self._repository_unload,
        }
        known = rpcs(INFERENCE_SERVICE)
        return {
            **{name: _checked(answer, known[name].response) for name, answer in plain.items()},
            "ModelInfer": self._infer,
            "ModelStreamInfer": self._stream_infer,
        }

    async def _server_live(self, request: Any) -> dict[str, Any]:
        return {"live": True}

    async def _server_ready(self, request: Any) -> dict[str, Any]:
        return {"ready": self._gateway.link.ready}

    async def _model_ready(self, request: Any) -> dict[str, Any]:
        try:
            self._endpoints.check_model_ready(request.name, request.version)
        except Refused:
            return {"ready": False}
        return {"ready": True}

    async def _server_metadata(self, request: Any) -> dict[str, Any]:
        return self._endpoints.server()

    async def _model_metadata(self, request: Any) -> dict[str, Any]:
        return self._endpoints.metadata(request.name, request.version)

    async def _model_config(self, request: Any) -> dict[str, Any]:
        config = msgspec.json.decode(self._endpoints.config(request.name, request.version))
        return {"config": json_format.ParseDict(config, _ModelConfig(), ignore_unknown_fields=True)}

    async def _model_statistics(self, request: Any) -> dict[str, Any]:
        found = await self._endpoints.statistics(request.name, request.version)
        for record in found["model_stats"]:
            record.pop("response_stats", None)
        return found

    async def _repository_index(self, request: Any) -> dict[str, Any]:
        found = await self._endpoints.index(ready=request.ready)
        return {"models": [{field: entry.get(field, "") for field in _INDEX_FIELDS} for entry in found]}

    async def _repository_load(self, request: Any) -> dict[str, Any]:
        await self._endpoints.load(_named(request), dict(request.parameters))
        return {}

    async def _repository_unload(self, request: Any) -> dict[str, Any]:
        await self._endpoints.unload(_named(request))
        return {}

    # Health

    def _health(self) -> dict[str, Callable[..., Any]]:
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


_INDEX_FIELDS: Final = ("name", "version", "state", "reason")


def _handlers(service: str, answers: dict[str, Callable[..., Any]]) -> Any:
    methods = {
        rpc.name: _handler(rpc, answers.get(rpc.name, _unimplemented(rpc))) for rpc in rpcs(service).values()
    }
    return grpc.method_handlers_generic_handler(service, methods)


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


def _checked(answer: Callable[[Any], Awaitable[dict[str, Any]]], response: Any) -> Callable[..., Any]:
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


def _named(request: Any) -> str:
    # One published protocol has the model's name as field 1, which is the repository's name in the other.
    name: str = request.model_name or request.repository_name
    return name


def _metadata(context: Context, key: str) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return str(value)
    return None


def _text(ending: Ending) -> str:
    # It travels as a header, whose size clients limit.
    return ending.text[:_DETAILS_MAX]


def _trailers(ending: Ending, request_id: str) -> tuple[tuple[str, str], ...]:
    trailers = [("clockwork-outcome", str(ending.outcome)), ("clockwork-reason", str(ending.reason))]
    if request_id:
        trailers.append(("clockwork-request-id", request_id))
    if ending.retry_after_ns > 0:
        trailers.append(("clockwork-retry-after-ms", f"{ending.retry_after_ns / NS_PER_MS:.3f}"))
    return tuple(trailers)
