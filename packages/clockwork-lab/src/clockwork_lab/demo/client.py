"""The demo's client, which uses the published tritonclient only."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from clockwork_lab.demo.judgement import Tensors

UNHURRIED_MS = 60_000
"""The SLO of requests that test results rather than latency."""

CONNECTIONS = 256


def inputs_of(tensors: Tensors, module: Any) -> list[Any]:
    """``InferInput`` objects of the HTTP or gRPC module; they may be sent many times."""
    made = []
    for name, array in tensors.items():
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def outputs_of(result: Any, *, http: bool) -> Tensors:
    """All outputs of a response by name."""
    response = result.get_response()
    names = [o["name"] for o in response["outputs"]] if http else [o.name for o in response.outputs]
    return {name: np.asarray(result.as_numpy(name)) for name in names}


class Client:
    """One request at a time, alternating between HTTP and gRPC."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self._http = triton_http.InferenceServerClient(
            http_url.removeprefix("http://"), network_timeout=120.0
        )
        self._grpc = triton_grpc.InferenceServerClient(grpc_url)
        self._asked = 0

    def ask(self, model: str, tensors: Tensors) -> Tensors:
        """Run ``model``; its outputs. Raises ``InferenceServerException`` on failure."""
        self._asked += 1
        parameters = {"slo_ms": UNHURRIED_MS}
        if self._asked % 2:
            result = self._http.infer(model, inputs_of(tensors, triton_http), parameters=parameters)
            return outputs_of(result, http=True)
        result = self._grpc.infer(model, inputs_of(tensors, triton_grpc), parameters=parameters)
        return outputs_of(result, http=False)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both connections."""
        self._http.close()
        self._grpc.close()


class PreparedRequest:
    """One request, encoded once for both protocols."""

    def __init__(self, tensors: Tensors) -> None:
        self.http = inputs_of(tensors, triton_http)
        self.grpc = inputs_of(tensors, triton_grpc)


class AsyncClient:
    """Any number of concurrent requests, on the running loop only."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self._http = triton_http_aio.InferenceServerClient(
            http_url.removeprefix("http://"), conn_limit=CONNECTIONS
        )
        self._grpc = triton_grpc_aio.InferenceServerClient(grpc_url)

    async def ask(self, model: str, request: PreparedRequest, slo_ms: int, *, http: bool) -> Any:
        """The raw response. Raises ``InferenceServerException`` on failure."""
        parameters = {"slo_ms": slo_ms}
        if http:
            return await self._http.infer(model, request.http, parameters=parameters)
        return await self._grpc.infer(model, request.grpc, parameters=parameters)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()
        await self._grpc.close()


_LATE = ("504", "StatusCode.DEADLINE_EXCEEDED")
_REFUSED = ("429", "503", "StatusCode.RESOURCE_EXHAUSTED", "StatusCode.UNAVAILABLE")


def refusal(error: InferenceServerException) -> tuple[str, str]:
    """The outcome (``late``, ``rejected`` or ``failed``) and reason of a request without a result.

    The reason of a rejection is empty: tritonclient does not pass it on; the server's metrics have it.
    """
    status = str(error.status())
    if status in _LATE:
        return "late", "late"
    return ("rejected", "") if status in _REFUSED else ("failed", f"{status}: {error.message()}")


def parameters_of(result: Any, *, http: bool) -> Mapping[str, Any]:
    """The response's parameters."""
    response = result.get_response()
    if http:
        return dict(response.get("parameters", {}))
    return {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in response.parameters.items()}
