"""What clients send to a gateway: connections, requests, tensors, compressed bodies, keys, shared memory."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError, InvalidRequest
from clockwork_serve.messages import Reply
from clockwork_serve.oip import (
    Served,
    UnknownModel,
    decompress,
    grpc_infer,
    parse_infer,
    requested_slo_ns,
    shared_region,
    wanted_coding,
)
from clockwork_serve.oip import grpc_infer as grpc_wire
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, rpcs
from clockwork_serve.oip.shared_memory import shared_ref
from clockwork_serve.oip.slo import priority_of, tightest
from clockwork_serve.serve.gateway.access import AccessDenied, KeyRing, Right
from clockwork_serve.serve.gateway.client_shm import OBJECTS, Regions
from clockwork_serve.serve.grpc.call import Aborted
from clockwork_serve.serve.grpc.service import GatewayGrpc
from clockwork_serve.serve.http.routes import Endpoints, RouteRefused, find_route
from clockwork_serve.telemetry import GatewayCounters
from clockwork_serve.units import MIB
from tests.fuzz import mutators
from tests.fuzz.engine import Target, scratch
from tests.oip.models import served, spec
from tests.serve.http.any_bytes import answers

_MODELS = [
    served((spec("X", "FP32", 2),), (spec("Y", "FP32", 2),)),
    served((spec("X", "INT8", -1, -1),), (spec("Y", "INT8", -1),)),
    served((spec("X", "BYTES", -1),), (spec("Y", "BYTES", -1),)),
    served((spec("X", "BOOL", 2), spec("Z", "FP16", 2, optional=True)), (spec("Y", "FP16", 2),)),
    served((spec("X", "INT64", -1),), (spec("Y", "UINT64", -1),)),
]
_FOLDER = scratch()
_PREFIX = f"/clockwork-fuzz-{os.getpid()}"


def _connection(data: bytes) -> None:
    """However a stream is cut, the same is said to it."""
    first, step, stream = data[:1], data[1:2], data[2:]
    cuts = sorted({(first or b"\1")[0] % (len(stream) + 1), *range(0, len(stream), 1 + (step or b"\0")[0])})
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert answers(pieces) == answers([stream])


def _read(call: Any, model: Served) -> None:
    if not call.shared:
        model.check(call)
        while call.strings is not None and call.strings.step():
            pass
    model.wanted(call)
    requested_slo_ns(call.parameters)
    priority_of(call.parameters, 0)


def _http_infer(data: bytes) -> None:
    """A byte for the model, two for the length of the JSON (0: all of it; 65535: raw tensors)."""
    model = _MODELS[data[0] % len(_MODELS)] if data else _MODELS[0]
    length, body = int.from_bytes(data[1:3], "little"), memoryview(data[3:])
    _read(model.raw_call(body) if length == 0xFFFF else parse_infer(body, length or None), model)


def _mutate_infer(data: bytes, dice: Any) -> bytes:
    head, length, body = data[:1], int.from_bytes(data[1:3], "little"), data[3:]
    length = min(length, len(body)) or len(body)
    changed, tensors = mutators.as_json(body[:length], dice), body[length:]
    if tensors and dice.random() < 0.3:
        tensors = mutators.raw(tensors, dice)
    told = len(changed) + dice.choice((0, 0, 0, 0, 1, -1)) if tensors or dice.random() < 0.2 else 0
    if dice.random() < 0.05:
        told = dice.choice((1, 0xFFFF, 0xFFFE))
    return head + max(0, min(told, 0xFFFF)).to_bytes(2, "little") + changed + tensors


class _Gateway:
    """Answers whatever it is asked, at once, and knows no model."""

    def __init__(self) -> None:
        self.link = SimpleNamespace(ready=True, serves=True, why_not_ready="", why_waiting=lambda name: "")
        self.settings = Settings()
        self.models = self
        self.quarantines = SimpleNamespace(why=lambda key: "")
        (_FOLDER / "table").mkdir(exist_ok=True)
        self.regions = Regions(_PREFIX, _FOLDER / "table")

    def find(self, name: str, version: str) -> Any:
        if name == "m" and version in ("", "1"):
            return _MODELS[0]
        raise UnknownModel(f"unknown model: '{name}'")

    def names(self) -> list[str]:
        return ["m"]

    def versions(self, name: str) -> list[str]:
        return ["1"]

    def counters(self) -> GatewayCounters:
        return GatewayCounters(gateway="g0")

    async def ask(self, what: str, body: bytes = b"{}", timeout_s: float = 1.0) -> Reply:
        msgspec.json.decode(body)
        if what == "index":
            return Reply(ask_id=1, ok=True, body=b'[{"name": "m", "version": "1", "state": "READY"}]')
        return Reply(ask_id=1, ok=True, body=b'{"model_stats": []}')


_ENDPOINTS = Endpoints(_Gateway(), "0")  # type: ignore[arg-type]


def _done(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of what waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def _routes(data: bytes) -> None:
    """``METHOD TARGET`` on the first line, the body after it."""
    line, _, body = data.partition(b"\n")
    method, _, url = line.partition(b" ")
    route = find_route(url)
    if route is None or not route.takes(method) or route.endpoint is None:
        return
    name = getattr(route.endpoint, "__name__", "")
    if name in ("_metrics", "_description"):
        return
    found = route.endpoint(_ENDPOINTS, msgspec.structs.replace(route, local=True), body)
    if isinstance(found, Coroutine):
        _done(found)


_RPCS = sorted(rpcs(INFERENCE_SERVICE))
_GRPC = GatewayGrpc.__new__(GatewayGrpc)
_GRPC._gateway, _GRPC._endpoints = _ENDPOINTS.gateway, _ENDPOINTS
_ANSWERS = _GRPC._inference()


def _grpc_rpcs(data: bytes) -> None:
    """A byte for the method, then its message."""
    name = _RPCS[data[0] % len(_RPCS)] if data else _RPCS[0]
    request = rpcs(INFERENCE_SERVICE)[name].request.FromString(data[1:])
    if name in _ANSWERS and name != "ModelConfig":
        _done(
            _ANSWERS[name](request, SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:4000"))
        ).SerializeToString()


def _grpc_infer(data: bytes) -> None:
    """A byte for the model, a message, perhaps after a length a header of the deadline."""
    model = _MODELS[data[0] % len(_MODELS)] if data else _MODELS[0]
    length = data[1] if len(data) > 1 else 0
    header = data[2 : 2 + length].decode("latin-1")
    call = grpc_infer.parse_infer(grpc_wire.walk(data[2 + length :]), model)
    _read(call, model)
    tightest(requested_slo_ns(call.parameters), header or None, None)


def _compression(data: bytes) -> None:
    """A byte for the encoding and the limit, then the body."""
    how = data[0] if data else 0
    limit = (1 << 20, 300, 0)[how // 8 % 3]
    encoding = ("gzip", "deflate", "x-gzip", "identity", "br", "gzip, deflate", "GZIP", "\xb2")[how % 8]
    found = decompress(data[1:], encoding, limit)
    assert len(found) <= limit
    wanted_coding(data[1:300].decode("latin-1"))


def _api_keys(data: bytes) -> None:
    """A file of keys; its first line, behind "# ", is what a client shows."""
    path = _FOLDER / "keys.toml"
    path.write_bytes(data)
    path.chmod(0o600)
    ring = KeyRing(str(path))
    ring.tenants()
    line = data.partition(b"\n")[0]
    ring.authorize(Right.INFER, line[2:], None)


def _shared_memory(data: bytes) -> None:
    """JSON: ``name``, ``fields`` of a registration, and ``refs`` as parameters of tensors."""
    try:
        given = msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    if not isinstance(given, dict):
        return
    name, fields, refs = given.get("name"), given.get("fields"), given.get("refs")
    regions = _ENDPOINTS.gateway.regions
    assert regions is not None
    regions.unregister()
    if isinstance(name, str) and isinstance(fields, dict):
        if isinstance(fields.get("key"), str):
            fields["key"] = fields["key"].replace("PREFIX", _PREFIX)
        regions.register(shared_region(name, fields))
    for parameters in refs if isinstance(refs, list) else []:
        ref = shared_ref("input", "x", parameters) if isinstance(parameters, dict) else None
        if ref is not None:
            with regions._reached(ref, os.O_RDONLY) as (fd, start):
                assert len(os.pread(fd, ref.nbytes, start)) == ref.nbytes


def _region_there(data: bytes) -> None:
    there = Path(OBJECTS) / f"{_PREFIX[1:]}-a"
    there.write_bytes(bytes(256))
    try:
        _shared_memory(data)
    finally:
        there.unlink()


_HTTP = mutators.headed(2, mutators.text)
_GRPC_ERRORS = (InvalidRequest, DecodeError)

TARGETS = (
    Target("http_connection", _connection, (), _HTTP),
    Target("http_infer", _http_infer, (InvalidRequest,), _mutate_infer),
    Target("http_routes", _routes, (RouteRefused, UnknownModel), mutators.text),
    Target("grpc_infer", _grpc_infer, _GRPC_ERRORS, mutators.headed(2, mutators.protobuf)),
    Target("grpc_rpcs", _grpc_rpcs, (Aborted, DecodeError), mutators.headed(1, mutators.protobuf)),
    Target("compression", _compression, (InvalidRequest,), mutators.packed, growth_bytes=16 * MIB),
    Target("api_keys", _api_keys, (ConfigError, AccessDenied), mutators.text),
    Target("shared_memory", _region_there, (InvalidRequest,), mutators.as_json),
)
