"""Each call of the protocol as data: the request to send, the parser of its response, and its timeout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_client.datatypes import SLO_MAX_MS, Buffer, Parameter
from clockwork_client.errors import Expired, Failed, Invalid, ServingError, error_class
from clockwork_client.tensors import decode, encode
from clockwork_client.wire import Response

# ------------------------------------------------------------
# Results of calls: plain records. Unknown fields, which a newer server may send, are ignored.


@dataclass(slots=True, frozen=True)
class Result:
    """The response to an inference request. ``outputs`` are arrays that the caller owns.

    ``id`` is the caller's request id; ``request_id`` is the server's, used in its logs and journal. The times
    are reported by the server, None where it does not report them; ``expected_ms`` is its prediction.
    """

    outputs: dict[str, npt.NDArray[Any]]
    model: str
    version: str
    id: str = ""
    request_id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.outputs[name]

    @property
    def queue_ms(self) -> float | None:
        """How long the request was queued."""
        return self.parameters.get("queue_ms")

    @property
    def exec_ms(self) -> float | None:
        """How long the model ran."""
        return self.parameters.get("exec_ms")

    @property
    def expected_ms(self) -> float | None:
        """How long the server predicted that the model would run."""
        return self.parameters.get("expected_ms")

    @property
    def batch_size(self) -> int | None:
        """How many rows ran together."""
        return self.parameters.get("batch_size")

    @property
    def cold_start(self) -> bool | None:
        """Whether the model's weights had to be loaded first."""
        return self.parameters.get("cold_start")


class ServerMetadata(Struct, frozen=True):
    """The server's name and version, and the extensions of the protocol that it implements."""

    name: str
    version: str = ""
    extensions: tuple[str, ...] = ()


class TensorMetadata(Struct, frozen=True):
    """An input or output of a model; a -1 in its shape is a size that each request chooses."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Struct, frozen=True):
    """A model's inputs and outputs."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()


class ModelState(Struct, frozen=True):
    """A version of a model in the server's repository; ``state`` is READY if it accepts requests."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class StatisticDuration(Struct, frozen=True):
    """A count of events and their total duration."""

    count: int = 0
    ns: int = 0


class ModelStatistics(Struct, frozen=True):
    """A model's counters. ``inference_stats`` has success, fail, queue, compute_infer and others."""

    name: str
    version: str = ""
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: dict[str, StatisticDuration] = {}
    batch_stats: list[dict[str, Any]] = []


# ------------------------------------------------------------
# Each call of the protocol as data: the request to send and the parser of its response.


T = TypeVar("T")
Inputs = Mapping[str, npt.NDArray[Any]]

_RESERVED: Final = {
    "slo_ms": "give it as the argument slo_ms",
    "binary_data_output": "outputs always come in binary",
}
_encoder = msgspec.json.Encoder()


@dataclass(slots=True, frozen=True)
class ClientCall(Generic[T]):
    """A request, which may be sent several times; ``read`` parses its response."""

    method: str
    path: str
    read: Callable[[Response], T]
    parts: tuple[Buffer, ...] = ()
    headers: bytes = b""
    id: str = ""


class _OutputHead(Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = {}


class _ResponseHead(Struct):
    model_name: str
    outputs: list[_OutputHead]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] = {}


class _ErrorBody(Struct):
    error: str
    outcome: str = ""
    reason: str = ""
    retry_after_ms: float | None = None
    parameters: dict[str, Any] = {}


class _Statistics(Struct):
    model_stats: list[ModelStatistics]


_response_heads = msgspec.json.Decoder(_ResponseHead)
_error_bodies = msgspec.json.Decoder(_ErrorBody)


def infer(
    model: str,
    inputs: Inputs,
    *,
    version: str = "",
    outputs: Sequence[str] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    request_id: str = "",
    datatypes: Mapping[str, str] | None = None,
) -> ClientCall[Result]:
    """An inference request. Raises :class:`Invalid`."""
    if not isinstance(inputs, Mapping):
        raise Invalid(f"parameter 'inputs': expected arrays by name, found {inputs!r}")
    heads: list[dict[str, Any]] = []
    parts: list[Buffer] = [b""]
    for name, array in inputs.items():
        datatype, data = encode(name, array, datatypes.get(name, "") if datatypes else "")
        heads.append(
            {
                "name": name, "datatype": datatype, "shape": array.shape,
                "parameters": {"binary_data_size": len(data)},
            }
        )  # fmt: skip
        parts.append(data)
    request: dict[str, Any] = {"inputs": heads}
    given = _checked(parameters) if parameters else {}
    if request_id:
        request["id"] = request_id
    if isinstance(outputs, str):
        raise Invalid(f"parameter 'outputs': expected a list of names, found {outputs!r}; use [{outputs!r}]")
    if outputs is None:
        given["binary_data_output"] = True
    else:
        request["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    if given:
        request["parameters"] = given
    parts[0] = _json(request)
    headers = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n" % (
        len(parts[0])
    )
    path = f"{_model(model, version)}/infer"
    return ClientCall("POST", path, _read_result, tuple(parts), headers, request_id)


def check(metadata: ModelMetadata, inputs: Inputs, outputs: Sequence[str] | None) -> None:
    """Raise :class:`Invalid` if a request does not match the model's known metadata.

    A missing input may be optional, so that check is left to the server.
    """
    datatypes = {tensor.name: tensor.datatype for tensor in metadata.inputs}
    for name, array in inputs.items():
        if name not in datatypes:
            raise Invalid(
                f"unexpected input '{name}' for model '{metadata.name}': expected {list(datatypes)}"
            )
        wanted = datatypes[name]
        # A uint16 array may hold the bits of BF16, as the caller declares by `datatypes`.
        if isinstance(array, np.ndarray) and not (wanted == "BF16" and array.dtype == np.uint16):
            encode(name, array[:0] if array.ndim else array, wanted)
    known = [tensor.name for tensor in metadata.outputs]
    for name in outputs or ():
        if name not in known:
            raise Invalid(f"unexpected output '{name}' for model '{metadata.name}': expected {known}")


def health(what: str) -> ClientCall[bool]:
    """The health query ``live`` or ``ready``."""
    return ClientCall("GET", f"/v2/health/{what}", _read_success)


def model_ready(model: str, version: str) -> ClientCall[bool]:
    """Whether a model is served now."""
    return ClientCall("GET", f"{_model(model, version)}/ready", _read_success)


def metadata() -> ClientCall[ServerMetadata]:
    """The server's metadata."""
    return ClientCall("GET", "/v2", lambda response: _read(response, ServerMetadata))


def model_metadata(model: str, version: str) -> ClientCall[ModelMetadata]:
    """A model's inputs and outputs."""
    return ClientCall("GET", _model(model, version), lambda response: _read(response, ModelMetadata))


def models() -> ClientCall[list[ModelState]]:
    """All models in the repository."""
    return ClientCall(
        "POST", "/v2/repository/index", lambda response: _read(response, list[ModelState]), (b"{}",)
    )


def statistics(model: str, version: str) -> ClientCall[list[ModelStatistics]]:
    """Statistics of one model, or of all if ``model`` is empty."""
    path = f"{_model(model, version)}/stats" if model else "/v2/models/stats"
    return ClientCall("GET", path, lambda response: _read(response, _Statistics).model_stats)


def control(model: str, verb: str) -> ClientCall[None]:
    """Load or unload a model; ``verb`` is ``load`` or ``unload``."""
    return ClientCall("POST", f"/v2/repository/models/{_quoted(model)}/{verb}", _read_empty, (b"{}",))


def error_of(response: Response) -> ServingError:
    """The error to raise for a response that is not a success."""
    try:
        body = _error_bodies.decode(response.body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        text = bytes(response.body[:200]).decode(errors="replace").strip()
        body = _ErrorBody(f"HTTP status {response.status}{': ' + text if text else ''}")
    retry_after_s = None if body.retry_after_ms is None else body.retry_after_ms / 1000
    if retry_after_s is None:
        # HTTP also allows a date here, which inference servers do not send.
        whole = response.headers.get("retry-after", "")
        retry_after_s = float(whole) if whole.isdecimal() else None
    return error_class(response.status, body.outcome, body.reason)(
        body.error or f"HTTP status {response.status}",
        status=response.status,
        reason=body.reason,
        request_id=response.headers.get("clockwork-request-id", ""),
        retry_after_s=retry_after_s,
        parameters=body.parameters,
    )


def _model(name: str, version: str) -> str:
    path = f"/v2/models/{_quoted(name)}"
    if not version:
        return path
    if not isinstance(version, str) or not version.isdecimal():
        raise Invalid(f"parameter 'version': expected digits as text, or '', found {version!r}")
    return f"{path}/versions/{version}"


def _json(request: dict[str, Any]) -> bytes:
    try:
        return _encoder.encode(request)
    except UnicodeEncodeError as error:
        raise Invalid(f"request: expected names and texts of Unicode, found others: {error}") from None


def _quoted(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise Invalid(f"parameter 'model': expected a name, found {name!r}")
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as error:
        raise Invalid(f"parameter 'model': expected a name of Unicode, found another: {error}") from None


def _checked(parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    for name, value in parameters.items():
        if not isinstance(name, str):
            raise Invalid(f"parameter '{name}': expected a name, found {type(name).__name__}")
        if name in _RESERVED:
            raise Invalid(f"parameter '{name}': expected none of that name; {_RESERVED[name]}")
        if not isinstance(value, bool | int | float | str):
            raise Invalid(
                f"parameter '{name}': expected true or false, a number or a string, "
                f"found {type(value).__name__}"
            )
    return dict(parameters)


def _read(response: Response, kind: type[T]) -> T:
    _read_empty(response)
    return _decoded(response.body, msgspec.json.Decoder(kind))


def _decoded(text: Buffer, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Failed(f"the answer is not what the protocol says: {error}", status=200) from None


def _read_success(response: Response) -> bool:
    if response.status in (401, 403):
        raise error_of(response)
    return response.status == 200


def _read_empty(response: Response) -> None:
    if response.status != 200:
        raise error_of(response)


def _read_result(response: Response) -> Result:
    _read_empty(response)
    body, length = memoryview(response.body), response.headers.get("inference-header-content-length", "")
    at = int(length) if length.isdecimal() and len(length) < 19 else len(body)
    head = _decoded(body[:at], _response_heads)
    outputs: dict[str, npt.NDArray[Any]] = {}
    for each in head.outputs:
        size = each.parameters.get("binary_data_size")
        if not isinstance(size, int) or not 0 <= size <= len(body) - at:
            raise Failed(
                f"output '{each.name}': expected binary_data_size up to {len(body) - at}, found {size!r}"
            )
        outputs[each.name] = decode(each.name, each.datatype, each.shape, body[at : at + size])
        at += size
    headers = response.headers
    return Result(
        outputs, head.model_name, head.model_version, head.id, headers.get("clockwork-request-id", ""),
        head.parameters, headers,
    )  # fmt: skip


# ------------------------------------------------------------
# The timeout of one call over all its attempts, and its retries. The caller passes the current time.
#
# An attempt's deadline is its start plus the caller's SLO. The request carries what remains of it when it is
# sent. The client itself waits `grace_s` longer, so that the server can still report the outcome.


class CallTimeout:
    """The time limits of one call: ``timeout_s`` for all its attempts, and ``slo_ms`` for each if given."""

    def __init__(
        self, now: float, timeout_s: float, slo_ms: float | None, grace_s: float, retries: int
    ) -> None:
        check_seconds("timeout_s", timeout_s)
        if slo_ms is not None and not (isinstance(slo_ms, int | float) and 0 < slo_ms <= SLO_MAX_MS):
            raise Invalid(
                f"parameter 'slo_ms': expected milliseconds above 0 and up to {SLO_MAX_MS:.0f} (24 h), "
                f"found {slo_ms!r}"
            )
        if not isinstance(retries, int) or retries < 0:
            raise Invalid(f"parameter 'retries': expected 0 or more, found {retries!r}")
        self._end = now + timeout_s
        self._slo_ms = slo_ms
        self._grace_s = grace_s
        self._retries = retries
        self._deadline = self._end

    def start(self, now: float) -> float:
        """Start an attempt; the instant until which its response is awaited."""
        if self._slo_ms is None:
            return self._end
        self._deadline = min(self._end, now + self._slo_ms / 1000)
        return min(self._end, self._deadline + self._grace_s)

    def remaining_ms(self, now: float) -> float | None:
        """What remains of this attempt's SLO, to send to the server; None if the caller gave no SLO.

        Raises :class:`Expired` if nothing remains.
        """
        if self._slo_ms is None:
            return None
        remaining_ms = (self._deadline - now) * 1000
        if remaining_ms < 0.001:
            raise Expired(
                "the deadline passed before there was a connection to send the request; nothing was sent"
            )
        return remaining_ms

    def wait_s(self, error: ServingError, now: float) -> float | None:
        """How long to wait before the next attempt; None if ``error`` is final and to be raised."""
        wait_s = error.retry_after_s
        if not self._retries or wait_s is None or now + wait_s >= self._end:
            return None
        self._retries -= 1
        return wait_s


def check_seconds(field: str, value: float) -> None:
    """Raise :class:`Invalid` unless ``value`` is a positive finite number of seconds."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise Invalid(f"parameter '{field}': expected seconds above 0, found {value!r}")
