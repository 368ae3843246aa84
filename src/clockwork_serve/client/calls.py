"""Each call of the protocol as data: what to send, and how to read what comes back. It sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve.client.answers import ModelMetadata, ModelState, ModelStatistics, Result, ServerMetadata
from clockwork_serve.client.errors import Failed, Invalid, ServingError, error_class
from clockwork_serve.client.tensors import decode, encode
from clockwork_serve.client.wire import Response
from clockwork_serve.oip.records import Buffer, Parameter

T = TypeVar("T")
Inputs = Mapping[str, npt.NDArray[Any]]

_RESERVED: Final = {
    "slo_ms": "give it as the argument slo_ms",
    "binary_data_output": "outputs always come in binary",
}
_encoder = msgspec.json.Encoder()


@dataclass(slots=True, frozen=True)
class Call(Generic[T]):
    """A request, ready to be sent as often as it takes; ``read`` makes the answer of its response."""

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


class _AnswerHead(Struct):
    model_name: str
    outputs: list[_OutputHead]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] = {}


class _Refusal(Struct):
    error: str
    outcome: str = ""
    reason: str = ""
    retry_after_ms: float | None = None
    parameters: dict[str, Any] = {}


class _Statistics(Struct):
    model_stats: list[ModelStatistics]


_answers = msgspec.json.Decoder(_AnswerHead)
_refusals = msgspec.json.Decoder(_Refusal)


def infer(
    model: str,
    inputs: Inputs,
    *,
    version: str = "",
    outputs: Sequence[str] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    request_id: str = "",
    datatypes: Mapping[str, str] | None = None,
) -> Call[Result]:
    """One inference. Raises :class:`Invalid`."""
    if not isinstance(inputs, Mapping) or not inputs:
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
        request["outputs"] = [_wish(name) for name in outputs]
    if given:
        request["parameters"] = given
    parts[0] = _json(request)
    headers = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n" % (
        len(parts[0])
    )
    path = f"{_model(model, version)}/infer"
    return Call("POST", path, _read_result, tuple(parts), headers, request_id)


def check(metadata: ModelMetadata, inputs: Inputs, outputs: Sequence[str] | None) -> None:
    """Raise :class:`Invalid` where a request does not fit what is known of its model.

    An input that is missing may be optional, and is left to the server.
    """
    datatypes = {tensor.name: tensor.datatype for tensor in metadata.inputs}
    for name, array in inputs.items():
        if name not in datatypes:
            raise Invalid(
                f"unexpected input '{name}' for model '{metadata.name}': expected {list(datatypes)}"
            )
        wanted = datatypes[name]
        # Sixteen bits may stand for BF16; the caller says so by datatypes.
        if isinstance(array, np.ndarray) and not (wanted == "BF16" and array.dtype == np.uint16):
            encode(name, array[:0] if array.ndim else array, wanted)
    known = [tensor.name for tensor in metadata.outputs]
    for name in outputs or ():
        if name not in known:
            raise Invalid(f"unexpected output '{name}' for model '{metadata.name}': expected {known}")


def health(what: str) -> Call[bool]:
    """``live`` or ``ready``."""
    return Call("GET", f"/v2/health/{what}", _read_yes)


def model_ready(model: str, version: str) -> Call[bool]:
    """Whether a model is served now."""
    return Call("GET", f"{_model(model, version)}/ready", _read_yes)


def metadata() -> Call[ServerMetadata]:
    """Who serves."""
    return Call("GET", "/v2", lambda response: _read(response, ServerMetadata))


def model_metadata(model: str, version: str) -> Call[ModelMetadata]:
    """A model's inputs and outputs."""
    return Call("GET", _model(model, version), lambda response: _read(response, ModelMetadata))


def models() -> Call[list[ModelState]]:
    """All that the repository holds."""
    return Call("POST", "/v2/repository/index", lambda response: _read(response, list[ModelState]), (b"{}",))


def statistics(model: str, version: str) -> Call[list[ModelStatistics]]:
    """Of one model, or of all."""
    path = f"{_model(model, version)}/stats" if model else "/v2/models/stats"
    return Call("GET", path, lambda response: _read(response, _Statistics).model_stats)


def control(model: str, verb: str) -> Call[None]:
    """``load`` or ``unload``."""
    path = f"/v2/repository/models/{_quoted(model)}/{verb}"
    return Call("POST", path, _read_nothing, (b"{}",))


def error_of(response: Response) -> ServingError:
    """What a response that is no success means, as an error to raise."""
    try:
        said = _refusals.decode(response.body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        text = bytes(response.body[:200]).decode(errors="replace").strip()
        said = _Refusal(f"HTTP status {response.status}{': ' + text if text else ''}")
    retry_after_s = None if said.retry_after_ms is None else said.retry_after_ms / 1000
    if retry_after_s is None:
        # A date is possible too; nobody who serves models sends one.
        whole = response.headers.get("retry-after", "")
        retry_after_s = float(whole) if whole.isdecimal() else None
    return error_class(response.status, said.outcome, said.reason)(
        said.error or f"HTTP status {response.status}",
        status=response.status,
        reason=said.reason,
        request_id=response.headers.get("clockwork-request-id", ""),
        retry_after_s=retry_after_s,
        parameters=said.parameters,
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
    try:
        return quote(_name(name), safe="")
    except UnicodeEncodeError as error:
        raise Invalid(f"parameter 'model': expected a name of Unicode, found another: {error}") from None


def _name(model: str) -> str:
    if not isinstance(model, str) or not model:
        raise Invalid(f"parameter 'model': expected a name, found {model!r}")
    return model


def _wish(name: str) -> dict[str, Any]:
    return {"name": name, "parameters": {"binary_data": True}}


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
    if response.status != 200:
        raise error_of(response)
    try:
        return msgspec.json.decode(response.body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Failed(f"the answer is not what the protocol says: {error}", status=response.status) from None


def _read_yes(response: Response) -> bool:
    if response.status in (401, 403):
        raise error_of(response)
    return response.status == 200


def _read_nothing(response: Response) -> None:
    if response.status != 200:
        raise error_of(response)


def _read_result(response: Response) -> Result:
    if response.status != 200:
        raise error_of(response)
    body, length = memoryview(response.body), response.headers.get("inference-header-content-length", "")
    at = int(length) if length.isdecimal() and len(length) < 19 else len(body)
    try:
        head = _answers.decode(body[:at])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Failed(f"the answer is not what the protocol says: {error}", status=200) from None
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
