"""Calls over gRPC, good and bad: every RPC of the inference service, and health."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import grpc

from tests.end_to_end.triton.asking import Rpc
from tests.end_to_end.triton.http_control import UNSETTLED, VERSION
from tests.end_to_end.triton.http_infer import DATA, FLOATS

NOTHING: dict[str, Any] = {}

PLAIN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "ServerLive", NOTHING),
    ("", "ServerReady", NOTHING),
    ("", "ServerMetadata", NOTHING),
    ("", "ModelReady", {"name": "ident"}),
    ("of a version", "ModelReady", {"name": "ident", "version": "1"}),
    ("unknown version", "ModelReady", {"name": "ident", "version": "9"}),
    ("version abc", "ModelReady", {"name": "ident", "version": "abc"}),
    ("unknown model", "ModelReady", {"name": "nosuch"}),
    ("no name", "ModelReady", NOTHING),
    ("", "ModelMetadata", {"name": "ident"}),
    ("of a version", "ModelMetadata", {"name": "ident", "version": "1"}),
    ("unknown version", "ModelMetadata", {"name": "ident", "version": "9"}),
    ("version abc", "ModelMetadata", {"name": "ident", "version": "abc"}),
    ("unknown model", "ModelMetadata", {"name": "nosuch"}),
    ("no name", "ModelMetadata", NOTHING),
    ("two versions", "ModelMetadata", {"name": "versions"}),
    ("no batches", "ModelMetadata", {"name": "flat"}),
    ("", "ModelConfig", {"name": "ident"}),
    ("no batches", "ModelConfig", {"name": "flat"}),
    ("a queue policy", "ModelConfig", {"name": "slow"}),
    ("for clients", "ModelConfig", {"name": "image"}),
    ("a reshape", "ModelConfig", {"name": "reshaped"}),
    ("unknown model", "ModelConfig", {"name": "nosuch"}),
    ("unknown version", "ModelConfig", {"name": "ident", "version": "9"}),
    ("", "ModelStatistics", {"name": "idle"}),
    ("unknown model", "ModelStatistics", {"name": "nosuch"}),
    ("unknown version", "ModelStatistics", {"name": "idle", "version": "9"}),
    ("", "RepositoryIndex", NOTHING),
    ("those that are ready", "RepositoryIndex", {"ready": True}),
    ("of a named repository", "RepositoryIndex", {"repository_name": "nosuch"}),
    ("", "RepositoryModelLoad", {"model_name": "spare"}),
    ("unknown model", "RepositoryModelLoad", {"model_name": "nosuch"}),
    ("no name", "RepositoryModelLoad", NOTHING),
    ("source is no Python", "RepositoryModelLoad", {"model_name": "later"}),
    ("of a named repository", "RepositoryModelLoad", {"repository_name": "nosuch", "model_name": "spare"}),
    ("config is no JSON", "RepositoryModelLoad",
     {"model_name": "spare", "parameters": {"config": {"string_param": "{"}}}),
    ("file without config", "RepositoryModelLoad",
     {"model_name": "spare", "parameters": {"file:1/model.py": {"bytes_param": b"pass"}}}),
    ("unknown parameter", "RepositoryModelLoad",
     {"model_name": "spare", "parameters": {"nope": {"string_param": "a"}}}),
    ("unknown model", "RepositoryModelUnload", {"model_name": "nosuch"}),
    ("no name", "RepositoryModelUnload", NOTHING),
    ("unload_dependents is a text", "RepositoryModelUnload",
     {"model_name": "nosuch", "parameters": {"unload_dependents": {"string_param": "yes"}}}),
    ("", "SystemSharedMemoryStatus", NOTHING),
    ("unknown region", "SystemSharedMemoryStatus", {"name": "r"}),
    ("what is not there", "SystemSharedMemoryRegister", {"name": "r", "key": "/nosuch", "byte_size": 64}),
    ("no fields", "SystemSharedMemoryRegister", NOTHING),
    ("unknown region", "SystemSharedMemoryUnregister", {"name": "r"}),
    ("all", "SystemSharedMemoryUnregister", NOTHING),
    ("", "CudaSharedMemoryStatus", NOTHING),
    ("", "CudaSharedMemoryRegister", {"name": "r", "raw_handle": b"AAAA", "byte_size": 64}),
    ("all", "CudaSharedMemoryUnregister", NOTHING),
    ("", "TraceSetting", NOTHING),
    ("of a model", "TraceSetting", {"model_name": "ident"}),
    ("unknown model", "TraceSetting", {"model_name": "nosuch"}),
    ("unknown setting", "TraceSetting", {"settings": {"nope": {"value": ["1"]}}}),
    ("level TIMESTAMPS", "TraceSetting",
     {"model_name": "idle", "settings": {"trace_level": {"value": ["TIMESTAMPS"]}}}),
    ("", "LogSettings", NOTHING),
    ("unknown setting", "LogSettings", {"settings": {"nope": {"bool_param": True}}}),
    ("of another kind", "LogSettings", {"settings": {"log_info": {"string_param": "yes"}}}),
)  # fmt: skip
"""What is special, the RPC, its request."""


def tensor(**changes: Any) -> dict[str, Any]:
    """An input of two floats, with parts changed; None leaves a part out."""
    fields = {"name": "X", "datatype": "FP32", "shape": [1, 2], **changes}
    return {part: value for part, value in fields.items() if value is not None}


def request(
    *inputs: Any, model: str = "ident", raw: list[bytes] | None = None, **more: Any
) -> dict[str, Any]:
    """A ``ModelInferRequest``, of one raw input if nothing else is said."""
    return {
        "model_name": model, "inputs": list(inputs or [tensor()]),
        "raw_input_contents": [FLOATS] if raw is None else raw, **more,
    }  # fmt: skip


def infer(name: str, *inputs: Any, **more: Any) -> Rpc:
    """A ``ModelInfer``."""
    return Rpc(name=f"ModelInfer: {name}", rpc="ModelInfer", request=request(*inputs, **more))


FIELDS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def _tensors() -> Iterator[Rpc]:
    for datatype, (values, packed) in DATA.items():
        model = "ident" if datatype == "FP32" else f"ident_{datatype}"
        yield infer(f"{datatype} raw", tensor(datatype=datatype), model=model, raw=[packed])
        typed = [value.encode() for value in values] if datatype == "BYTES" else values
        contents = {FIELDS[datatype]: typed}
        yield infer(f"{datatype} typed", tensor(datatype=datatype, contents=contents), model=model, raw=[])
    yield infer("BF16 raw", tensor(datatype="BF16"), model="ident_BF16", raw=[b"\x80\x3f\0\x40"])
    yield infer("FP16 raw", tensor(datatype="FP16"), model="ident_FP16", raw=[struct.pack("<2e", 1, 2)])
    for name, datatype, contents in (
        ("typed in another field", "FP32", {"int_contents": [1, 2]}),
        ("typed, too few", "FP32", {"fp32_contents": [1]}),
        ("typed, too many", "FP32", {"fp32_contents": [1, 2, 3]}),
        ("typed, out of range", "INT8", {"int_contents": [300, 0]}),
        ("typed in two fields", "FP32", {"fp32_contents": [1, 2], "int_contents": [1, 2]}),
    ):  # fmt: skip
        model = "ident" if datatype == "FP32" else f"ident_{datatype}"
        yield infer(name, tensor(datatype=datatype, contents=contents), model=model, raw=[])
    yield infer("raw and typed", tensor(contents={"fp32_contents": [3, 4]}))
    yield infer("neither raw nor typed", raw=[])
    yield infer("raw, too short", raw=[FLOATS[:7]])
    yield infer("raw, too long", raw=[FLOATS + b"\0"])
    yield infer("raw, twice for one input", raw=[FLOATS, FLOATS])
    yield infer("raw, empty", raw=[b""])
    yield infer("BOOL raw of 2", tensor(datatype="BOOL"), model="ident_BOOL", raw=[b"\2\0"])
    yield infer(
        "BYTES raw, cut off", tensor(datatype="BYTES"), model="ident_BYTES", raw=[struct.pack("<I", 9)]
    )


PARAMETERS: dict[str, Any] = {
    "of every kind": {"a": {"int64_param": 1}, "b": {"double_param": 1.5}, "c": {"string_param": "x"},
                      "d": {"bool_param": True}, "e": {"uint64_param": 1}},
    "without a value": {"a": {}},
    "timeout 10 s": {"timeout": {"int64_param": 10_000_000}},
    "timeout 0": {"timeout": {"int64_param": 0}},
    "timeout negative": {"timeout": {"int64_param": -1}},
    "timeout a text": {"timeout": {"string_param": "1"}},
    "timeout unsigned": {"timeout": {"uint64_param": 10_000_000}},
    "priority 1": {"priority": {"uint64_param": 1}}, "priority signed": {"priority": {"int64_param": 1}},
    "priority a text": {"priority": {"string_param": "1"}},
    "sequence_id 1": {"sequence_id": {"int64_param": 1}, "sequence_start": {"bool_param": True}},
    "sequence_id a text": {"sequence_id": {"string_param": "a"}},
    "binary_data_output": {"binary_data_output": {"bool_param": True}},
    "reserved name": {"triton_a": {"int64_param": 1}},
}  # fmt: skip
"""Parameters of a request."""


def _fields() -> Iterator[Rpc]:
    yield infer("id", id="42")
    yield infer("version 1", model_version="1")
    yield infer("unknown version", model_version="9")
    yield infer("version abc", model_version="abc")
    yield infer("unknown model", model="nosuch")
    yield infer("no model", model="")
    yield infer("another datatype", tensor(datatype="INT32"))
    yield infer("unknown datatype", tensor(datatype="FP99"))
    yield infer("no datatype", tensor(datatype=None))
    yield infer("unknown input", tensor(name="Z"))
    yield Rpc(name="ModelInfer: no inputs", rpc="ModelInfer", request={"model_name": "ident"})
    yield infer("unknown output", outputs=[{"name": "NOPE"}])
    yield infer("an output twice", outputs=[{"name": "Y"}, {"name": "Y"}])
    yield infer("an output by name", outputs=[{"name": "Y"}])
    yield infer("a batch of 9", tensor(shape=[9, 1]), raw=[bytes(36)])
    yield infer("a batch of 0", tensor(shape=[0, 2]), raw=[b""])
    yield infer("no batch axis", tensor(shape=[2]))
    yield infer("no shape", tensor(shape=None))
    yield infer("a negative dimension", tensor(shape=[1, -2]))
    yield infer("without batch axis in the model", tensor(shape=[2, 3]), model="flat", raw=[bytes(24)])
    a, b = (tensor(name=name, datatype="INT32", shape=[1, 4]) for name in ("A", "B"))
    four = struct.pack("<4i", 1, 2, 3, 4)
    yield infer("two inputs and two outputs", a, b, model="add_sub", raw=[four, four])
    yield infer("outputs in another order", a, b, model="add_sub", raw=[four, four],
                outputs=[{"name": "DIFFERENCE"}, {"name": "SUM"}])  # fmt: skip
    yield infer("one input of two", a, model="add_sub", raw=[four])
    yield infer("one input twice", a, a, model="add_sub", raw=[four, four])
    typed = {**b, "contents": {"int_contents": [1, 2, 3, 4]}}
    yield infer("one input raw, one typed", a, typed, model="add_sub", raw=[four])
    yield infer("without the optional input", model="optional")
    yield infer("a model that raises", model="raises")
    for name, given in PARAMETERS.items():
        yield infer(f"parameters: {name}", parameters=given)
    scores = struct.pack("<3f", 0.1, 0.7, 0.2)
    for name, value in {
        "2": {"int64_param": 2}, "a text": {"string_param": "2"}, "-1": {"int64_param": -1},
    }.items():  # fmt: skip
        yield infer(
            f"classification: {name}", tensor(shape=[1, 3]), model="labelled", raw=[scores],
            outputs=[{"name": "Y", "parameters": {"classification": value}}],
        )  # fmt: skip
    place = {"shared_memory_region": {"string_param": "r"}, "shared_memory_byte_size": {"int64_param": 8}}
    yield infer("an input in unknown shared memory", tensor(parameters=place), raw=[])
    yield infer("an output in unknown shared memory", outputs=[{"name": "Y", "parameters": place}])


def _channels() -> Iterator[Rpc]:
    whole = request()
    yield Rpc(
        name="ModelInfer: compressed", rpc="ModelInfer", request=whole, compression=grpc.Compression.Gzip
    )
    yield Rpc(name="ModelInfer: metadata", rpc="ModelInfer", request=whole, metadata=(("x-a", "b"),))
    yield Rpc(name="ModelInfer: no message", rpc="ModelInfer", request=b"\xff\xff\xff")
    yield Rpc(name="ModelMetadata: no message", rpc="ModelMetadata", request=b"\xff\xff\xff")
    yield Rpc(name="ModelInfer: an empty message", rpc="ModelInfer", request=b"")
    yield Rpc(
        name="ModelMetadata: an unknown field", rpc="ModelMetadata", request=b"\x0a\x05ident\xfa\x3f\x01a"
    )
    yield Rpc(name="unknown RPC", rpc="Nope", request=b"")
    yield Rpc(name="unknown service", rpc="ServerLive", request=b"", service="inference.Nope")
    one = request(tensor(shape=[1, 1]), model="slow", raw=[FLOATS[:4]])
    yield Rpc(
        name="ModelInfer: deadline of 50 ms, model of 300 ms", rpc="ModelInfer", request=one, timeout_s=0.05,
        timed=True,
    )  # fmt: skip
    slow = Rpc(name="", rpc="ModelInfer", request=one)
    calm = {**one, "model_name": "patient"}
    timeout = {"parameters": {"timeout": {"int64_param": 50_000}}}
    yield Rpc(
        name="ModelInfer: timeout of 50 ms, others before it", rpc="ModelInfer", request={**calm, **timeout},
        beside=(Rpc(name="", rpc="ModelInfer", request=calm),), timed=True,
    )  # fmt: skip
    yield Rpc(
        name="ModelInfer: queue full", rpc="ModelInfer", request=one, beside=(slow, slow, slow), timed=True
    )


def _streams() -> Iterator[Rpc]:
    good, bad = request(id="1"), request(tensor(name="Z"), id="2")
    for name, requests, metadata in (
        ("nothing", [], ()),
        ("one request", [good], ()),
        ("three requests", [good, {**good, "id": "2"}, {**good, "id": "3"}], ()),
        ("a bad one between", [good, bad, {**good, "id": "3"}], ()),
        ("a bad one, errors as a status", [bad], (("triton_grpc_error", "true"),)),
        ("unknown model", [request(model="nosuch")], ()),
        ("empty final response wished",
         [request(parameters={"triton_enable_empty_final_response": {"bool_param": True}})], ()),
        ("an empty request", [{}], ()),
    ):  # fmt: skip
        yield Rpc(
            name=f"ModelStreamInfer: {name}", rpc="ModelStreamInfer", request=requests, metadata=metadata
        )


def calls() -> Iterator[Rpc]:
    """All of them."""
    for name, rpc, fields in PLAIN:
        mask = VERSION if rpc == "ServerMetadata" else UNSETTLED
        yield Rpc(name=f"{rpc}: {name}" if name else rpc, rpc=rpc, request=fields, mask=mask)
    for part in (_tensors, _fields, _channels, _streams):
        yield from part()
    for name, asked in (("", b""), ("of the inference service", b"\x0a\x1einference.GRPCInferenceService"),
                        ("of an unknown one", b"\x0a\x04nope")):  # fmt: skip
        yield Rpc(
            name=f"health Check {name}".strip(), rpc="Check", request=asked, service="grpc.health.v1.Health"
        )
