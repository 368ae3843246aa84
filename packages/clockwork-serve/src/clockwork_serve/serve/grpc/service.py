"""The inference service over gRPC: every RPC and the right it needs, health, reflection."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import grpc
import msgspec
from google.protobuf import json_format

from clockwork_serve.errors import ConfigError, InvalidRequest
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.oip import InferCall, Served, UnknownModel, grpc_of_http, trace_context
from clockwork_serve.oip.grpc_infer import (
    SMALL_BYTES,
    WalkedRequest,
    encode_infer,
    parse_in_steps,
    parse_infer,
    walk,
)
from clockwork_serve.oip.protobuf import (
    HEALTH_SERVICE,
    INFERENCE_SERVICE,
    REFLECTION_SERVICE,
    ModelInferRequest,
    ModelStreamInferResponse,
    message,
    reflect,
    rpcs,
)
from clockwork_serve.serve.gateway.access import AccessControl, AccessDenied, Right
from clockwork_serve.serve.gateway.client_shm import is_loopback
from clockwork_serve.serve.gateway.codec import Codec, CodecFailed, LargeOutputs, has_large_outputs
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.requests import Body, InferResponse, gateway_response
from clockwork_serve.serve.gateway.settings import excess, grpc_options
from clockwork_serve.serve.grpc.call import Aborted, Failure, GrpcCall, Metadata, Method
from clockwork_serve.serve.grpc.server import AccessCheck, GrpcServer, callback, coroutine, stream
from clockwork_serve.serve.http.routes import Endpoints, RouteRefused, log_settings, trace_settings
from clockwork_serve.units import KIB, NS_PER_MS

# ------------------------------------------------------------
# Access to RPCs, checked by metadata before a message is read.


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
_SINGLE: Final = ("authorization", "x-api-key", "origin", "x-slo-ms")
"""Metadata that a call may have once, as :data:`~clockwork_serve.serve.http.exchange.SINGLE_HEADERS`."""


def right_of(method: str) -> Right | None:
    """The right that an RPC needs; None if none. An unknown RPC needs ADMIN."""
    return _RIGHTS.get(method, Right.ADMIN)


def access_check(access: AccessControl) -> AccessCheck:
    """Checks the size of the metadata, and access.

    gRPC's core does not count metadata that a client sends as references to its header table: 4,000 bytes can
    stand for 12 MB.
    """
    settings = access.config.settings

    def check(path: str, metadata: Metadata) -> str:
        wrong = ""
        if len(metadata) > settings.max_headers:
            wrong = excess("max_headers", settings.max_headers, len(metadata))
        elif sum([len(name) + len(value) for name, value in metadata]) > settings.max_head:
            wrong = excess("max_head", settings.max_head)
        if wrong:
            raise Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, wrong)
        names = [name for name, _ in metadata if name in _SINGLE]
        if len(names) > len(set(names)):
            text = f"metadata: expected each of {', '.join(_SINGLE)} once, found one more often"
            raise Aborted(grpc.StatusCode.INVALID_ARGUMENT, text)
        right = right_of(path)
        if right is None or (access.keys is None and right is not Right.ADMIN):
            return ""
        try:
            return _authorized(access, right, dict(metadata))
        except AccessDenied as denied:
            code = grpc.StatusCode.PERMISSION_DENIED if denied.known else grpc.StatusCode.UNAUTHENTICATED
            raise Aborted(code, str(denied)) from None

    return check


def _authorized(access: AccessControl, right: Right, metadata: Mapping[str, str | bytes]) -> str:
    """The tenant of the caller's key; "" where there are no keys. Raises :class:`AccessDenied`.

    No browser speaks this protocol, but a proxy may translate from one that pages can speak (gRPC-Web), and
    passes their Origin on.
    """
    if access.keys is None:
        access.sites.check(None, _bytes(metadata.get("origin")))
        return ""
    authorization, api_key = _bytes(metadata.get("authorization")), _bytes(metadata.get("x-api-key"))
    return access.keys.authorize(right, authorization, api_key).tenant


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


# ------------------------------------------------------------
# Methods of services, from coroutines; health; reflection.


OLD_REFLECTION_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
"""The same messages under an older name, which most clients use."""
MESSAGE_BYTES: Final = 16 * KIB
"""The largest message other than inference: protobuf may make thousands of objects of one."""
_LIVE_SERVICES: Final = ("", INFERENCE_SERVICE)
_HealthResponse: Final = message("grpc.health.v1.HealthCheckResponse")
Fields = dict[str, Any] | None
Answer = Callable[[Any, GrpcCall], Fields | Awaitable[Fields]]


def methods(service: str, answers: dict[str, Callable[..., Any]], name: str = "") -> list[Method]:
    """Methods of a service, perhaps under another ``name``."""
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
    """A parser that rejects messages larger than any that makes sense: each holds a few names."""

    def parsed(message: bytes) -> Any:
        if len(message) > MESSAGE_BYTES:
            text = f"{path}: expected a message of at most {MESSAGE_BYTES} bytes, found {len(message)}"
            raise Aborted(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return parse(message)

    return parsed


def checked(answer: Answer, response: Any) -> Callable[..., Any]:
    """An RPC from a function, or a coroutine, that returns its response's fields."""

    async def answered(request: Any, call: GrpcCall) -> Any:
        try:
            found = answer(request, call)
            fields = await found if isinstance(found, Awaitable) else found
            return response(**fields or {})
        except UnknownModel as error:
            raise Aborted(grpc.StatusCode.NOT_FOUND, str(error)) from None
        except RouteRefused as error:
            raise Aborted(grpc.StatusCode[grpc_of_http(error.code)], str(error)) from None

    return answered


class Health:
    """The standard health service, for the server as a whole."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._changed = asyncio.Event()
        gateway.readiness_listeners.append(self._on_readiness)

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Its RPCs by name."""
        return {"Check": self._check, "Watch": self._watch}

    async def _check(self, request: Any, call: GrpcCall) -> Any:
        if request.service not in _LIVE_SERVICES:
            raise Aborted(grpc.StatusCode.NOT_FOUND, f"unknown service '{request.service}'")
        return _HealthResponse(status=self._serving)

    async def _watch(self, requests: AsyncIterator[Any], call: GrpcCall) -> AsyncIterator[Any]:
        request = await anext(requests, None)
        if request is None:
            raise Aborted(grpc.StatusCode.UNIMPLEMENTED, "Watch: expected one message, found none")
        if request.service not in _LIVE_SERVICES:
            yield _HealthResponse(status="SERVICE_UNKNOWN")
        last_status = ""
        while True:
            changed = self._changed
            if request.service in _LIVE_SERVICES and self._serving != last_status:
                last_status = self._serving
                yield _HealthResponse(status=last_status)
            await changed.wait()

    @property
    def _serving(self) -> str:
        return "SERVING" if self._gateway.link.ready else "NOT_SERVING"

    def _on_readiness(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _reflect(requests: AsyncIterator[Any], call: GrpcCall) -> AsyncIterator[Any]:
    async for request in requests:
        yield reflect(request)


REFLECTION: Final[dict[str, Callable[..., Any]]] = {"ServerReflectionInfo": _reflect}


# ------------------------------------------------------------
# The gRPC server of a gateway, on the gateway's own loop.


_STREAMED_MAX: Final = 128  # requests of one stream without a response, above which no more is read from it
_ModelConfig: Final = message("inference.ModelConfig")
_RegionStatus: Final = message("inference.SystemSharedMemoryStatusResponse.RegionStatus")


_Write = Callable[["_GrpcExchange", LargeOutputs], None]
"""Has the codec process encode large outputs, and then responds."""


class _GrpcExchange(ABC):
    """A ``ModelInferRequest`` as the gateway's :class:`Exchange`; subclasses respond."""

    __slots__ = (
        "arrival_ns", "body", "every_output_binary", "gateway", "identity", "message_id", "model", "read",
        "remaining_s", "request", "rpc", "slo_header", "trace", "version", "write",
    )  # fmt: skip

    def __init__(self, request: Any, rpc: GrpcCall, gateway: Gateway, write: _Write) -> None:
        self.write = write
        self.request: Any = request  # until it was parsed
        self.message_id: str = request.id
        self.gateway = gateway
        self.rpc = rpc
        self.model: str = request.model_name
        self.version: str = request.model_version
        self.identity = rpc.identity
        self.arrival_ns = rpc.arrival_ns
        self.slo_header = rpc.metadatum("x-slo-ms")
        self.trace = _trace(rpc)
        self.remaining_s = rpc.time_allowed(gateway.clock)
        self.every_output_binary = True
        self.body: Body | None = None
        self.read: InferCall | InvalidRequest | None = None  # what was parsed before

    @property
    def local(self) -> bool:
        """Whether the client is on this host."""
        return _local(self.rpc)

    async def read_in_steps(self) -> None:
        """Parse it, a piece in a turn of the loop, if it has strings to be built."""
        if not isinstance(self.request, WalkedRequest) or not self.request.has_strings:
            return
        try:
            steps = parse_in_steps(self.request, self.gateway.models.find(self.model, self.version))
            while self.is_open:
                next(steps)
                await asyncio.sleep(0)
        except StopIteration as end:
            self.read = end.value
        except InvalidRequest as error:
            self.read = error.with_traceback(None)
        except Exception:  # noqa: BLE001 - the gateway, which parses it again, will log it and end the request
            return

    def call(self, served: Served) -> InferCall:
        """Parse it. Raises :class:`InvalidRequest`."""
        request, self.request = self.request, None
        read, self.read = self.read, None
        if isinstance(read, InvalidRequest):
            try:
                raise read
            finally:
                del read  # its traceback refers to this frame
        return read or parse_infer(request, served)

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether the client still waits for a response."""

    def end(self, response: InferResponse) -> None:
        """Encode the response while the outputs' memory is there, or have the codec process do it."""
        call = response.call
        # Classes are requested of named outputs only.
        if (
            call is not None
            and call.outputs
            and response.outcome is Outcome.OK
            and has_large_outputs(response)
        ):
            self.write(self, LargeOutputs(response))
        else:
            self.respond(response)

    @abstractmethod
    def respond(self, response: InferResponse) -> None:
        """Encode the response."""


class _Delivery:
    """The delivery of a good answer. It must not refer to its call, which refers to it."""

    __slots__ = ("_gateway", "_response")

    def __init__(self, gateway: Gateway, response: InferResponse) -> None:
        self._gateway = gateway
        self._response = response

    def failure(self) -> Failure | None:
        """The status to send instead, if it is late."""
        gateway, response = self._gateway, self._response
        if gateway.clock() <= response.deadline_ns:  # as most are
            return None
        late = gateway.check_late(response)
        return None if late is None else _failure(late)

    def on_sent(self) -> None:
        """It was sent."""
        self._gateway.note_sent(self._response)


def _trace(rpc: GrpcCall) -> str:
    """The trace context that a call's metadata has; empty if it has none."""
    parent = rpc.metadatum("traceparent")
    if parent is None:
        return ""
    parents, states = [
        ",".join(str(value) for name, value in rpc.metadata if name == key)
        for key in ("traceparent", "tracestate")
    ]
    return trace_context(parents, states)


class _UnaryExchange(_GrpcExchange):
    """A ``ModelInfer``."""

    __slots__ = ()

    @property
    def is_open(self) -> bool:
        """Whether the client still waits for a response."""
        return self.rpc.is_open

    def respond(self, response: InferResponse) -> None:
        """Encode the response."""
        if not self.rpc.is_open:
            if response.deadline_ns:
                self.gateway.discard(response)
        elif response.outcome is Outcome.OK:
            message = _encoded(response)
            response.outputs = []
            trailers = (("clockwork-request-id", response.request_id),)
            self.rpc.reply_unless(_Delivery(self.gateway, response), message, trailers)
        else:
            late = self.gateway.check_delivery(response) if response.deadline_ns else None
            self.rpc.fail(*_failure(late or response))


class _StreamExchange(_GrpcExchange):
    """One request of a ``ModelStreamInfer``. ``ended`` gets its response, or the :class:`InferResponse`."""

    __slots__ = ("ended", "request_id", "unreported")

    def __init__(
        self, request: Any, rpc: GrpcCall, gateway: Gateway, write: _Write, ended: asyncio.Future[Any]
    ) -> None:
        super().__init__(request, rpc, gateway, write)
        self.ended = ended
        self.unreported: InferResponse | None = None  # until it was reported whether it was in time
        self.request_id = ""  # "" where it ended at once

    @property
    def is_open(self) -> bool:
        """Whether the client still waits for a response."""
        return not self.ended.done()

    def respond(self, response: InferResponse) -> None:
        """Encode the response."""
        if self.ended.done():
            if response.deadline_ns:
                self.gateway.discard(response)
            return
        found: bytes | InferResponse = response
        if response.outcome is Outcome.OK:
            # There is only one response; clients that support several wait for this.
            response.parameters["triton_final_response"] = True
            found = _encoded(response, streamed=True)
            response.outputs = []
        if response.deadline_ns:
            self.unreported = response
        self.ended.set_result(found)

    def timely_result(self, found: bytes | InferResponse) -> bytes | InferResponse:
        """The response to send now: the given one, or another if the deadline has passed."""
        response, self.unreported = self.unreported, None
        late = None if response is None else self.gateway.check_delivery(response)
        return late or found

    def abandon(self, gateway: Gateway) -> None:
        """The client left."""
        response, self.unreported = self.unreported, None
        if response is not None:
            gateway.discard(response)
        if self.request_id and (self.ended.cancelled() or not self.ended.done()):
            gateway.cancel(self.request_id)


class GatewayGrpc:
    """All RPCs of the inference service, health and reflection."""

    def __init__(
        self, gateway: Gateway, endpoints: Endpoints, access: AccessControl, codec: Codec, *, reuse_port: bool
    ) -> None:
        self._gateway = gateway
        self._endpoints = endpoints
        self._codec = codec
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._credentials = None if access.tls is None else access.tls.grpc_credentials()
        self._server = GrpcServer(
            [
                callback(f"/{INFERENCE_SERVICE}/ModelInfer", _read, self._infer),
                stream(f"/{INFERENCE_SERVICE}/ModelStreamInfer", _read, bytes, self._stream_infer),
                *methods(INFERENCE_SERVICE, self._inference()),
                *methods(HEALTH_SERVICE, Health(gateway).answers()),
                *methods(REFLECTION_SERVICE, REFLECTION),
                *methods(REFLECTION_SERVICE, REFLECTION, OLD_REFLECTION_SERVICE),
            ],
            options=[
                *grpc_options(access.config.settings),
                ("grpc.max_send_message_length", -1),
                # Otherwise gRPC would silently share a port with another program.
                ("grpc.so_reuseport", int(reuse_port)),
            ],
            access_check=access_check(access),
            clock=gateway.clock,
            silent_s=access.config.settings.stream_s,
        )

    async def listen(self, host: str, port: int) -> int:
        """Accept connections; the port (chosen if 0). Raises :class:`ConfigError` if it cannot be opened."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return await self._server.listen(address, self._credentials)
        except OSError as error:
            raise ConfigError(
                f"grpc_port: expected a free port; found {port} on {host} not to be had ({error}); "
                "choose another"
            ) from None

    async def close(self, grace_s: float) -> None:
        """Accept no more, and let open requests complete for ``grace_s``."""
        await self._server.close(grace_s)

    # Inference

    def _infer(self, rpc: GrpcCall, request: Any) -> None:
        exchange = _UnaryExchange(request, rpc, self._gateway, self._write)
        if isinstance(request, WalkedRequest) and request.has_strings:
            self._start(self._infer_soon(rpc, exchange))
        else:
            self._infer_now(rpc, exchange)

    async def _infer_soon(self, rpc: GrpcCall, exchange: _UnaryExchange) -> None:
        await exchange.read_in_steps()
        if rpc.is_open:
            self._infer_now(rpc, exchange)

    def _infer_now(self, rpc: GrpcCall, exchange: _UnaryExchange) -> None:
        request_id = self._gateway.infer(exchange)
        if request_id and rpc.is_open:
            # The client may leave, or its deadline pass.
            rpc.on_cancel = partial(self._gateway.cancel, request_id)

    async def _stream_infer(self, requests: AsyncIterator[Any], rpc: GrpcCall) -> AsyncIterator[bytes]:
        """One response per request, in their order; the requests run concurrently.

        An error is sent as a response, unless the client wants a status, which ends the stream.
        """
        as_status = rpc.metadatum("triton_grpc_error") == "true"
        open_exchanges: asyncio.Queue[_StreamExchange | None] = asyncio.Queue(_STREAMED_MAX)
        reader = self._loop.create_task(self._read_stream(requests, rpc, open_exchanges))
        exchange: _StreamExchange | None = None
        try:
            while (exchange := await open_exchanges.get()) is not None:
                found = exchange.timely_result(await exchange.ended)
                if not isinstance(found, InferResponse):
                    yield found
                elif as_status:
                    raise Aborted(*_failure(found))
                else:
                    yield ModelStreamInferResponse(
                        error_message=found.text, infer_response={"id": exchange.message_id}
                    ).SerializeToString()
            await reader
        finally:
            reader.cancel()
            if exchange is not None:
                exchange.abandon(self._gateway)
            while not open_exchanges.empty():
                if (left := open_exchanges.get_nowait()) is not None:
                    left.abandon(self._gateway)
            del reader  # breaks a cycle: its error's traceback refers to this frame

    async def _read_stream(
        self, requests: AsyncIterator[Any], rpc: GrpcCall,
        open_exchanges: asyncio.Queue[_StreamExchange | None],
    ) -> None:  # fmt: skip
        try:
            async for request in requests:
                future = self._loop.create_future()
                exchange = _StreamExchange(request, rpc, self._gateway, self._write, future)
                del request  # it may be large, and the next one may not come for long
                await exchange.read_in_steps()
                exchange.request_id = self._gateway.infer(exchange)
                try:
                    await open_exchanges.put(exchange)
                except asyncio.CancelledError:
                    exchange.abandon(self._gateway)
                    raise
        finally:
            await open_exchanges.put(None)

    def _write(self, exchange: _GrpcExchange, large: LargeOutputs) -> None:
        self._start(self._write_soon(exchange, large))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write_soon(self, exchange: _GrpcExchange, large: LargeOutputs) -> None:
        try:
            response = await large.response(self._codec, lambda: exchange.is_open)
        except (InvalidRequest, CodecFailed) as error:
            # The controller has counted it as answered.
            self._gateway.discard(large.original)
            response = gateway_response(
                Outcome.FAILED, Reason.NONE, f"the answer could not be written: {error}"
            )
        exchange.respond(response)

    # All other RPCs

    def _inference(self) -> dict[str, Callable[..., Any]]:
        asked = self._endpoints
        answers: dict[str, Answer] = {
            "ServerLive": lambda request, rpc: {"live": True},
            "ServerReady": lambda request, rpc: {"ready": self._gateway.link.ready},
            "ModelReady": self._model_ready,
            "ServerMetadata": lambda request, rpc: asked.server(),
            "ModelMetadata": lambda request, rpc: asked.metadata(request.name, request.version),
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": lambda request, rpc: asked.load(_named(request), dict(request.parameters)),
            "RepositoryModelUnload": lambda request, rpc: asked.unload(_named(request)),
            "SystemSharedMemoryStatus": self._regions,
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": lambda request, rpc: asked.unregister(
                request.name, local=_local(rpc)
            ),
            "CudaSharedMemoryStatus": self._cuda_regions,
            "CudaSharedMemoryRegister": lambda request, rpc: asked.register_cuda(),
            "CudaSharedMemoryUnregister": lambda request, rpc: None,
            "TraceSetting": self._trace_setting,
            "LogSettings": self._log_settings,
        }
        known = rpcs(INFERENCE_SERVICE)
        return {name: checked(answer, known[name].response) for name, answer in answers.items()}

    def _model_ready(self, request: Any, rpc: GrpcCall) -> Fields:
        try:
            self._endpoints.check_model_ready(request.name, request.version)
        except (UnknownModel, RouteRefused):
            return {"ready": False}
        return {"ready": True}

    def _model_config(self, request: Any, rpc: GrpcCall) -> Fields:
        config = msgspec.json.decode(self._endpoints.config(request.name, request.version))
        return {"config": json_format.ParseDict(config, _ModelConfig(), ignore_unknown_fields=True)}

    async def _model_statistics(self, request: Any, rpc: GrpcCall) -> Fields:
        found = await self._endpoints.statistics(request.name, request.version)
        for record in found["model_stats"]:
            record.pop("response_stats", None)
        return found

    async def _repository_index(self, request: Any, rpc: GrpcCall) -> Fields:
        found = await self._endpoints.index(ready=request.ready)
        return {"models": [{field: entry.get(field, "") for field in _INDEX_FIELDS} for entry in found]}

    def _regions(self, request: Any, rpc: GrpcCall) -> Fields:
        found = self._endpoints.regions(request.name, local=_local(rpc))
        return {"regions": {region["name"]: _RegionStatus(**region) for region in found}}

    def _register(self, request: Any, rpc: GrpcCall) -> None:
        fields = {"key": request.key, "offset": request.offset, "byte_size": request.byte_size}
        self._endpoints.register(request.name, fields, local=_local(rpc))

    def _cuda_regions(self, request: Any, rpc: GrpcCall) -> None:
        self._endpoints.cuda_regions(request.name)  # there are none

    def _trace_setting(self, request: Any, rpc: GrpcCall) -> Fields:
        changes = {name: list(setting.value) for name, setting in request.settings.items()}
        found = trace_settings(self._endpoints, request.model_name, changes)
        return {"settings": {name: {"value": value} for name, value in found.items()}}

    def _log_settings(self, request: Any, rpc: GrpcCall) -> Fields:
        found = log_settings({name: _chosen(setting) for name, setting in request.settings.items()})
        return {"settings": {name: {_LOG_FIELDS[type(value)]: value} for name, value in found.items()}}


_INDEX_FIELDS: Final = ("name", "version", "state", "reason")
_LOG_FIELDS: Final = {bool: "bool_param", int: "uint32_param", str: "string_param"}


def _chosen(setting: Any) -> Any:
    """The value of a setting; None if it has none."""
    field = setting.WhichOneof("parameter_choice")
    return None if field is None else getattr(setting, field)


def _named(request: Any) -> str:
    # One published version has the model's name as field 1; in the other that is the repository's name.
    name: str = request.model_name or request.repository_name
    return name


def _read(message: bytes) -> Any:
    """A ``ModelInferRequest``; its tensors are not decoded.

    Raises :class:`Aborted`, and what protobuf raises.
    """
    if len(message) <= SMALL_BYTES:
        return ModelInferRequest.FromString(message)
    try:
        return walk(message)
    except InvalidRequest as error:
        raise Aborted(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None


def _local(rpc: GrpcCall) -> bool:
    # "ipv4:127.0.0.1:40000" or "ipv6:%5B::1%5D:40000".
    _, _, address = unquote(rpc.peer()).partition(":")
    return is_loopback(address.rpartition(":")[0].strip("[]"))


def _encoded(response: InferResponse, *, streamed: bool = False) -> bytes:
    assert response.call is not None
    assert response.served is not None
    return encode_infer(
        response.call, response.served, response.outputs, response.parameters, streamed=streamed
    )


def _failure(response: InferResponse) -> tuple[grpc.StatusCode, str, Metadata]:
    return grpc.StatusCode[response.status.grpc], response.text, _trailers(response)


def _trailers(response: InferResponse) -> Metadata:
    trailers = [("clockwork-outcome", str(response.outcome)), ("clockwork-reason", str(response.reason))]
    if response.request_id:
        trailers.append(("clockwork-request-id", response.request_id))
    if response.retry_after_ns > 0:
        trailers.append(("clockwork-retry-after-ms", f"{response.retry_after_ns / NS_PER_MS:.3f}"))
    return tuple(trailers)
