"""One request as data, sent to a server over HTTP or gRPC, and what came of it in a form that compares.

What cannot be equal (clocks, durations, the words of messages) is taken out here, and nothing else.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2

PATIENCE_S = 20.0
HEAD_START_S = 0.05
WIRE_PATIENCE_S = 2.0
"""For what is no good HTTP, to which there may be no answer at all."""
OWN_PARAMETERS = {"queue_ms", "exec_ms", "expected_ms", "batch_size", "cold_start"}
"""What every good answer of ours says more."""
CLOCKS = {"last_inference", "ns"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """``first``: requests sent before, one after another; ``beside``: sent a moment earlier, not waited for.

    ``mask``: names of fields, and of models in an index, that depend on what else was asked. ``settles``: a
    server may answer what came before a moment before it has counted it. ``timed``: the answer depends on
    what came first and how long it took.
    """

    name: str
    first: tuple[Case, ...] = ()
    beside: tuple[Case, ...] = ()
    mask: frozenset[str] = frozenset()
    settles: bool = False
    timed: bool = False


@dataclass(frozen=True, kw_only=True)
class Http(Case):
    """A request over HTTP. ``raw``: the very bytes instead, where the request is no good HTTP."""

    method: str = "GET"
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    raw: bytes = b""

    def wire(self, host: str) -> bytes:
        """What goes to the socket."""
        if self.raw:
            return self.raw.replace(b"HOST", host.encode())
        named = {name.lower() for name, _ in self.headers}
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if not named & {"content-length", "transfer-encoding"} and (self.body or self.method == "POST"):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True, kw_only=True)
class Rpc(Case):
    """A call over gRPC. ``request``: fields of its message, or bytes; a list of them for a stream."""

    rpc: str
    request: Mapping[str, Any] | bytes | list[Mapping[str, Any]] = field(default_factory=dict)
    service: str = "inference.GRPCInferenceService"
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_s: float = PATIENCE_S
    compression: grpc.Compression = grpc.Compression.NoCompression


@dataclass(frozen=True)
class Answer:
    """``status`` as a word; ``facts`` by path where it is good, "error" among them where it is not."""

    status: str
    facts: Mapping[str, Any]
    good: bool


def ask(case: Case, http_url: str, grpc_url: str) -> Answer:
    """The answer to a case, after all that comes before it."""
    for each in case.first:
        ask(each, http_url, grpc_url)
    threads = [
        threading.Thread(target=ask, args=(each, http_url, grpc_url), daemon=True) for each in case.beside
    ]
    for thread in threads:
        thread.start()
        time.sleep(HEAD_START_S)
    answer = _ask_http(case, http_url) if isinstance(case, Http) else _ask_grpc(case, grpc_url)
    for thread in threads:
        thread.join()
    return answer


def differences(triton: Answer, ours: Answer) -> tuple[str, str]:
    """What differs, as each of the two has it; two empty texts if nothing does."""
    if triton.status != ours.status:
        return triton.status, ours.status
    paths = dict.fromkeys((*triton.facts, *ours.facts))
    differ = sorted(path for path in paths if not _equal(triton.facts, ours.facts, path))
    return _shown(triton.facts, differ), _shown(ours.facts, differ)


def _equal(one: Mapping[str, Any], other: Mapping[str, Any], path: str) -> bool:
    if (path in one) != (path in other):
        return False
    a, b = one[path], other[path]
    return (a == b and isinstance(a, bool) == isinstance(b, bool)) or repr(a) == repr(b)


def _shown(facts: Mapping[str, Any], paths: list[str]) -> str:
    return "; ".join(
        f"{path} {json.dumps(facts[path], ensure_ascii=False)}" if path in facts else f"no {path}"
        for path in paths
    )


# HTTP


def _ask_http(case: Http, url: str) -> Answer:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    with socket.create_connection((host, port), WIRE_PATIENCE_S if case.raw else PATIENCE_S) as connection:
        connection.sendall(case.wire(f"{host}:{port}"))
        response = http.client.HTTPResponse(connection, method=case.method)
        try:
            response.begin()
            body = response.read()
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            return Answer(f"no answer ({type(error).__name__})", {}, good=False)
    good = response.status < 400
    if not good and case.method != "HEAD":
        return Answer(str(response.status), {"error": _has_error(body)}, good=False)
    facts = dict(_http_facts(response, body, case.mask)) if good else {}
    return Answer(str(response.status), facts, good=good)


def _has_error(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("error"), str) and bool(found["error"])


def _http_facts(
    response: http.client.HTTPResponse, body: bytes, mask: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    yield "Content-Type", response.getheader("Content-Type")
    encoding = response.getheader("Content-Encoding")
    if encoding is not None:
        yield "Content-Encoding", encoding
        body = zlib.decompress(body, 47)
    size = response.getheader("Inference-Header-Content-Length")
    if size is not None:
        yield "Inference-Header-Content-Length", "there"
        yield "tensors", body[int(size) :].hex()
        body = body[: int(size)]
    try:
        found = json.loads(body.decode(errors="replace"))
    except ValueError:
        yield "body", body.decode("latin-1")
        return
    if body.decode(errors="replace").encode() != body:
        yield "body", "no UTF-8"
    if isinstance(found, dict) and "outputs" in found and "parameters" in found:
        _take_own(found["parameters"])
        if not found["parameters"]:
            del found["parameters"]
    yield from _flat(found, mask, "")


def _take_own(parameters: dict[str, Any]) -> None:
    for name in OWN_PARAMETERS:
        parameters.pop(name, None)


def _flat(found: Any, mask: frozenset[str], path: str) -> Iterator[tuple[str, Any]]:
    """Leaves by their paths; lines of an index by their models' names."""
    if path in ("", "models") and isinstance(found, list) and found and isinstance(found[0], dict):
        found = {" ".join((line["name"], line.get("version", ""))).strip(): line for line in found}
        found = {name: line for name, line in found.items() if name.split()[0] not in mask}
    if isinstance(found, dict) and found:
        for name, value in found.items():
            masked = name in CLOCKS or name in mask
            yield from _flat("some" if masked else value, mask, f"{path}.{name}".lstrip("."))
    elif (
        isinstance(found, list)
        and found
        and not all(each is None or isinstance(each, int | float | str) for each in found)
    ):
        for index, value in enumerate(found):
            yield from _flat(value, mask, f"{path}[{index}]")
    else:
        yield path or "body", found


# gRPC


def _ask_grpc(case: Case, url: str) -> Answer:
    assert isinstance(case, Rpc)
    response_type = _response_type(case)
    with grpc.insecure_channel(url, options=[("grpc.max_receive_message_length", -1)]) as channel:
        path = f"/{case.service}/{case.rpc}"
        more = {"metadata": case.metadata, "timeout": case.timeout_s, "compression": case.compression}
        try:
            if isinstance(case.request, list):
                requests = iter([_encoded(case, each) for each in case.request])
                stream = channel.stream_stream(path, None, response_type.FromString)
                found = list(stream(requests, **more))
            else:
                unary = channel.unary_unary(path, None, response_type.FromString)
                found = [unary(_encoded(case, case.request), **more)]
        except grpc.RpcError as error:
            return Answer(error.code().name, {"error": bool(error.details())}, good=False)
    return Answer("OK", dict(_grpc_facts(found, case.mask)), good=True)


def _encoded(case: Rpc, request: Mapping[str, Any] | bytes) -> bytes:
    if isinstance(request, bytes):
        return request
    name = "ModelInfer" if case.rpc == "ModelStreamInfer" else case.rpc
    return bytes(getattr(service_pb2, f"{name}Request")(**request).SerializeToString())


def _response_type(case: Rpc) -> Any:
    return getattr(service_pb2, f"{case.rpc}Response", service_pb2.ServerLiveResponse)


def _grpc_facts(found: list[Any], mask: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for index, message in enumerate(found):
        fields = MessageToDict(message, preserving_proto_field_name=True)
        inner = fields.get("infer_response", fields)
        if "parameters" in inner and "model_name" in inner:
            _take_own(inner["parameters"])
            if not inner["parameters"]:
                del inner["parameters"]
        if "error_message" in fields:
            fields = {"error_message": "some"}
        yield from _flat(fields, mask, f"[{index}]" if len(found) > 1 else "")
