"""Inference over HTTP, good and bad, in well-formed HTTP."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from tests.end_to_end.triton.asking import Http

SIZE = "Inference-Header-Content-Length"
Headers = tuple[tuple[str, str], ...]


def tensor(name: str = "X", **changes: Any) -> dict[str, Any]:
    """An input of two floats, with parts of it changed; None leaves a part out."""
    fields = {"name": name, "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} | changes
    return {part: value for part, value in fields.items() if value is not None}


X = tensor()


def body_of(*inputs: Any, **more: Any) -> bytes:
    """A request's JSON."""
    return json.dumps({"inputs": list(inputs or [X]), **more}).encode()


def post(name: str, body: bytes, *, model: str = "ident", headers: Headers = (), **more: Any) -> Http:
    """A POST of an inference request."""
    return Http(
        name=f"infer: {name}",
        method="POST",
        path=f"/v2/models/{model}/infer",
        body=body,
        headers=headers,
        **more,
    )


def ask(name: str, *inputs: Any, model: str = "ident", **more: Any) -> Http:
    """One made of JSON alone."""
    return post(name, body_of(*inputs, **more), model=model)


def binary(
    name: str,
    head: dict[str, Any],
    tail: bytes,
    *,
    model: str = "ident",
    size: Any = None,
    headers: Headers = (),
) -> Http:
    """One with binary tensors behind its JSON; ``size``: what the header says instead of the truth."""
    text = json.dumps(head).encode()
    told = str(len(text) if size is None else size)
    return post(name, text + tail, model=model, headers=((SIZE, told), *headers))


def raw(size: int, **changes: Any) -> dict[str, Any]:
    """An input whose ``size`` bytes are behind the JSON."""
    return tensor(data=None, parameters={"binary_data_size": size}, **changes)


FLOATS = struct.pack("<2f", 1, 2)
STRINGS = struct.pack("<I3sI0s", 3, b"one", 0, b"")
DATA: dict[str, tuple[list[Any], bytes]] = {
    "BOOL": ([True, False], b"\1\0"),
    "UINT8": ([0, 255], b"\0\xff"),
    "UINT16": ([0, 65535], struct.pack("<2H", 0, 65535)),
    "UINT32": ([0, 2**32 - 1], struct.pack("<2I", 0, 2**32 - 1)),
    "UINT64": ([0, 2**64 - 1], struct.pack("<2Q", 0, 2**64 - 1)),
    "INT8": ([-128, 127], struct.pack("<2b", -128, 127)),
    "INT16": ([-(2**15), 2**15 - 1], struct.pack("<2h", -(2**15), 2**15 - 1)),
    "INT32": ([-(2**31), 2**31 - 1], struct.pack("<2i", -(2**31), 2**31 - 1)),
    "INT64": ([-(2**63), 2**63 - 1], struct.pack("<2q", -(2**63), 2**63 - 1)),
    "FP32": ([0.1, -1e30], struct.pack("<2f", 0.1, -1e30)),
    "FP64": ([0.1, -1e300], struct.pack("<2d", 0.1, -1e300)),
    "BYTES": (["one", "größer"], STRINGS),
}


ODD: dict[str, Any] = {
    "UINT8 of 256": ("UINT8", [0, 256]), "INT8 of -129": ("INT8", [0, -129]),
    "UINT32 of -1": ("UINT32", [0, -1]),
    "INT32 of 2**31": ("INT32", [0, 2**31]), "INT64 of 2**63": ("INT64", [0, 2**63]),
    "UINT64 of -1": ("UINT64", [0, -1]), "UINT64 of 2**64": ("UINT64", [0, 2**64]),
    "INT32 of 1.0": ("INT32", [1.0, 2.0]), "INT32 of 1.5": ("INT32", [1.5, 2]),
    "INT64 of 2**53 with a point": ("INT64", [2.0**53, 0]),
    "INT32 of texts": ("INT32", ["1", "2"]),
    "INT32 of truths": ("INT32", [True, False]), "INT32 of null": ("INT32", [None, 1]),
    "BOOL of 0 and 1": ("BOOL", [0, 1]), "BOOL of 2": ("BOOL", [2, 0]),
    "BOOL of texts": ("BOOL", ["true", "false"]),
    "FP64 of whole numbers": ("FP64", [1, 2]), "FP64 of texts": ("FP64", ["1", "2"]),
    "BYTES of numbers": ("BYTES", [1, 2]), "BYTES of null": ("BYTES", [None, "a"]),
    "BYTES empty": ("BYTES", ["", ""]),
}  # fmt: skip
"""Datatypes and data that JSON has otherwise, or that do not fit."""


def _datatypes() -> Iterator[Http]:
    for datatype, (values, packed) in DATA.items():
        model = "ident" if datatype == "FP32" else f"ident_{datatype}"
        yield ask(f"{datatype} as JSON", tensor(datatype=datatype, data=values), model=model)
        yield binary(
            f"{datatype} binary", {"inputs": [raw(len(packed), datatype=datatype)],
                                   "parameters": {"binary_data_output": True}}, packed, model=model,
        )  # fmt: skip
    halves = struct.pack("<2e", 0.5, -2)
    head = {"inputs": [raw(4, datatype="FP16")], "parameters": {"binary_data_output": True}}
    yield binary("FP16 binary", head, halves, model="ident_FP16")
    yield binary(
        "FP16 binary, answer as JSON", {"inputs": [raw(4, datatype="FP16")]}, halves, model="ident_FP16"
    )
    yield ask("FP16 as JSON", tensor(datatype="FP16"), model="ident_FP16")
    head = {"inputs": [raw(4, datatype="BF16")], "parameters": {"binary_data_output": True}}
    yield binary("BF16 binary", head, b"\x80\x3f\0\x40", model="ident_BF16")
    yield binary("BF16 binary, answer as JSON", {"inputs": [raw(4, datatype="BF16")]}, b"\x80\x3f\0\x40",
                 model="ident_BF16")  # fmt: skip
    yield ask("BF16 as JSON", tensor(datatype="BF16"), model="ident_BF16")
    yield binary("BF16 to a model of FP16", {"inputs": [raw(4, datatype="BF16")]}, halves, model="ident_FP16")
    for name, (datatype, values) in ODD.items():
        yield ask(name, tensor(datatype=datatype, data=values), model=f"ident_{datatype}")
    for name, values in {"1e40": [1e40, 0], "a text": ["1", 2], "null": [None, 1], "true": [True, 1]}.items():
        yield ask(f"FP32 of {name}", tensor(data=values))
    not_finite = body_of(X).replace(b"[1, 2]}", b"[NaN, Infinity]}")
    yield post("FP32 of NaN and Infinity, not JSON", not_finite)
    for form, outputs in (("JSON", {}), ("binary", {"parameters": {"binary_data_output": True}})):
        nan = struct.pack("<2f", float("nan"), float("-inf"))
        yield binary(f"not a number, answered as {form}", {"inputs": [raw(8)], **outputs}, nan)
    yield binary("BOOL binary of 2", {"inputs": [raw(2, datatype="BOOL")]}, b"\2\0", model="ident_BOOL")
    strings = {"inputs": [raw(len(STRINGS), datatype="BYTES")]}
    yield binary("BYTES binary, answer as JSON", strings, STRINGS, model="ident_BYTES")
    bad = struct.pack("<I2sI1s", 2, b"\xff\xfe", 1, b"a")
    in_bytes = {"inputs": [raw(len(bad), datatype="BYTES")], "parameters": {"binary_data_output": True}}
    yield binary("BYTES that are no UTF-8, binary", in_bytes, bad, model="ident_BYTES")
    in_bytes = {"inputs": [raw(len(bad), datatype="BYTES")]}
    yield binary("BYTES that are no UTF-8, answer as JSON", in_bytes, bad, model="ident_BYTES")
    short = struct.pack("<I3s", 3, b"one")
    yield binary(
        "BYTES: one element too few", {"inputs": [raw(7, datatype="BYTES")]}, short, model="ident_BYTES"
    )
    yield binary("BYTES: length beyond the end", {"inputs": [raw(8, datatype="BYTES")]},
                 struct.pack("<II", 99, 0), model="ident_BYTES")  # fmt: skip


def _shapes() -> Iterator[Http]:
    yield ask("nested data", tensor(data=[[1, 2]]))
    yield ask("data nested too deep", tensor(data=[[[1, 2]]]))
    for depth in (50, 99, 100, 120):
        nested: Any = [1, 2]
        for _ in range(depth - 1):
            nested = [nested]
        yield ask(f"data nested {depth} deep", tensor(data=nested))
    yield ask("reshaped", tensor(shape=[2, 6], data=[*range(12)]), model="reshaped")
    yield ask(
        "reshaped: in the shape of the model", tensor(shape=[1, 2, 3], data=[*range(6)]), model="reshaped"
    )
    for count in (16_384, 16_385, 262_144):
        many = tensor(datatype="BYTES", shape=[1, count], data=["a"] * count)
        yield ask(f"BYTES of {count} elements", many, model="ident_BYTES")
    yield ask("data nested unevenly", tensor(shape=[2, 2], data=[[1, 2, 3], [4]]))
    yield ask("a batch of 8", tensor(shape=[8, 1], data=[*range(8)]))
    yield ask("a batch of 9", tensor(shape=[9, 1], data=[*range(9)]))
    yield ask("a batch of 0", tensor(shape=[0, 2], data=[]))
    yield ask("a dimension of 0", tensor(shape=[1, 0], data=[]))
    yield ask("no batch axis", tensor(shape=[2]))
    yield ask("one axis too many", tensor(shape=[1, 1, 2]))
    yield ask("shape is empty", tensor(shape=[]))
    yield ask("a negative dimension", tensor(shape=[1, -2]))
    yield ask("shape of fractions", tensor(shape=[1.0, 2.0]))
    yield ask("shape of texts", tensor(shape=["1", "2"]))
    yield ask("shape is a number", tensor(shape=2))
    yield ask("a dimension of 2**64", tensor(shape=[1, 2**64]))
    yield ask("one element too few", tensor(data=[1]))
    yield ask("one element too many", tensor(data=[1, 2, 3]))
    yield ask("no elements", tensor(data=[]))
    yield ask("without batch axis in the model", tensor(shape=[2, 3], data=[*range(6)]), model="flat")
    yield ask("another shape than the model's", tensor(shape=[3, 2], data=[*range(6)]), model="flat")
    yield ask("a batch for a model without one", tensor(shape=[1, 2, 3], data=[*range(6)]), model="flat")
    yield ask("two open dimensions", tensor(shape=[1, 2, 2], data=[1, 2, 3, 4]), model="open")
    yield ask("of another width than the model's", tensor(shape=[1, 4], data=[1, 2, 3, 4]), model="labelled")


BODIES: dict[str, Any] = {
    "nothing": b"", "no JSON": b"hello", "JSON cut off": b'{"inputs":[', "a list": b"[]",
    "a number": b"1",
    "null": b"null", "an empty object": b"{}", "no inputs": b'{"inputs":[]}',
    "inputs null": b'{"inputs":null}',
    "inputs an object": b'{"inputs":{}}', "JSON and more": body_of() + b"more",
    "JSON and a space": body_of() + b" \n", "a byte order mark": b"\xef\xbb\xbf" + body_of(),
    "UTF-16": body_of().decode().encode("utf-16"),
    "no UTF-8": body_of(id="\xff").replace(b"\\u00ff", b"\xff"),
    "comments": b"/* hi */" + body_of(), "a trailing comma": body_of().replace(b"2]}]", b"2,]}]"),
    "one field twice": body_of().replace(b"{", b'{"id":"a","id":"b",', 1),
    "JSON of a thousand brackets": body_of(tensor(data=None)).replace(
        b'"FP32"', b'"FP32","data":' + b"[" * 1000 + b"]" * 1000),
}  # fmt: skip
"""Bodies that are no request, or hardly one."""


def _fields() -> Iterator[Http]:
    whole = {"shape": [1, 4], "datatype": "INT32"}
    a, b = tensor("A", data=[1, 2, 3, 4], **whole), tensor("B", data=[5, 6, 7, 8], **whole)
    yield ask("two inputs and two outputs", a, b, model="add_sub")
    yield ask("inputs in another order", b, a, model="add_sub")
    yield ask("one output of two", a, b, model="add_sub", outputs=[{"name": "DIFFERENCE"}])
    yield ask("outputs in another order", a, b, model="add_sub",
              outputs=[{"name": "DIFFERENCE"}, {"name": "SUM"}])  # fmt: skip
    yield ask("no outputs asked for", a, b, model="add_sub", outputs=[])
    yield ask("one output twice", a, b, model="add_sub", outputs=[{"name": "SUM"}, {"name": "SUM"}])
    yield ask("one input of two", a, model="add_sub")
    yield ask("one input twice", a, a, model="add_sub")
    yield ask("an input too many", a, b, tensor(), model="add_sub")
    yield ask("batches that differ", a, tensor("B", shape=[2, 4], datatype="INT32", data=[*range(8)]),
              model="add_sub")  # fmt: skip
    two = tensor()
    yield ask("without the optional input", two, model="optional")
    yield ask("with the optional input", two, tensor("Z"), model="optional")
    yield ask("the optional input alone", tensor("Z"), model="optional")
    yield ask("another datatype", tensor(datatype="INT32"))
    yield ask("unknown datatype", tensor(datatype="FP99"))
    yield ask("datatype in small letters", tensor(datatype="fp32"))
    yield ask("datatype is a number", tensor(datatype=32))
    yield ask("unknown input", tensor("Z"))
    for part in ("name", "shape", "datatype", "data"):
        yield ask(f"an input without {part}", tensor(**{part: None}) if part != "name" else
                  {key: value for key, value in X.items() if key != "name"})  # fmt: skip
    yield ask("data is null", {**X, "data": None})
    yield ask("data is a number", tensor(data=1))
    yield ask("data is a text", tensor(data="1,2"))
    yield ask("data is an object", tensor(data={"0": 1}))
    yield ask("an input with an unknown field", tensor(nope=1))
    yield ask("unknown field of the request", X, nope=1)
    yield ask("inputs: [null]", None)
    for name, text in BODIES.items():
        yield post(f"body: {name}", text)
    for name, outputs in {
        "unknown": [{"name": "NOPE"}], "without a name": [{}], "an object": {}, "a text": "Y", "null": None,
        "a list of texts": ["Y"],
    }.items():  # fmt: skip
        yield ask(f"outputs: {name}", X, outputs=outputs)
    for name, given in {
        "a text": "42", "empty": "", "a number": 42, "null": None, "a list": [1], "a long one": "x" * 4000,
        "of other letters": "größer \u0001 \U0001f600",
    }.items():  # fmt: skip
        yield ask(f"id: {name}", X, id=given)


PARAMETERS: dict[str, Any] = {
    "nothing": {}, "a list": [], "null": None, "a text": "a",
    "of every kind": {"a": 1, "b": 1.5, "c": "x", "d": True}, "a list inside": {"a": [1]},
    "an object inside": {"a": {"b": 1}}, "null inside": {"a": None}, "reserved name": {"triton_a": 1},
    "headers": {"headers": "a"},
    "timeout 10 s": {"timeout": 10_000_000}, "timeout 0": {"timeout": 0},
    "timeout negative": {"timeout": -1},
    "timeout a text": {"timeout": "1000000"}, "timeout a fraction": {"timeout": 1000000.5},
    "timeout a truth": {"timeout": True}, "timeout huge": {"timeout": 2**63},
    "priority 0": {"priority": 0}, "priority 1": {"priority": 1}, "priority 99": {"priority": 99},
    "priority -1": {"priority": -1}, "priority a text": {"priority": "1"},
    "priority 2**40": {"priority": 2**40},
    "binary_data_output a text": {"binary_data_output": "true"},
    "binary_data_output 1": {"binary_data_output": 1},
    "binary_data_output": {"binary_data_output": True}, "sequence_id 0": {"sequence_id": 0},
    "sequence_id 1": {"sequence_id": 1, "sequence_start": True},
    "sequence_id a text": {"sequence_id": "a"},
    "sequence_start a text": {"sequence_start": "yes"}, "sequence_end alone": {"sequence_end": True},
    "triton_enable_empty_final_response": {"triton_enable_empty_final_response": True},
}  # fmt: skip
"""Parameters of a request."""


def _parameters() -> Iterator[Http]:
    for name, given in PARAMETERS.items():
        yield ask(f"parameters: {name}", X, parameters=given)
    y: dict[str, Any]
    for name, y in {
        "binary_data true": {"binary_data": True}, "binary_data false": {"binary_data": False},
        "binary_data a text": {"binary_data": "true"}, "unknown": {"nope": 1},
        "in unknown shared memory": {"shared_memory_region": "r", "shared_memory_byte_size": 8},
        "shared memory without its size": {"shared_memory_region": "r"},
    }.items():  # fmt: skip
        yield ask(f"output: {name}", X, outputs=[{"name": "Y", "parameters": y}])
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    yield ask("input: in unknown shared memory", tensor(data=None, parameters=place))
    yield ask("input: in shared memory without its size",
              tensor(data=None, parameters={"shared_memory_region": "r"}))  # fmt: skip
    yield ask("output: binary where all are not", X, parameters={"binary_data_output": False},
              outputs=[{"name": "Y", "parameters": {"binary_data": True}}])  # fmt: skip
    yield ask("output: JSON where all are binary", X, parameters={"binary_data_output": True},
              outputs=[{"name": "Y", "parameters": {"binary_data": False}}])  # fmt: skip
    scores = tensor(shape=[2, 3], data=[0.1, 0.7, 0.2, 0.5, 0.25, 0.25])
    for classes in (1, 2, 3, 9, 0, -1, "2", 1.5, True):
        yield ask(f"classification: {json.dumps(classes)}", scores, model="labelled",
                  outputs=[{"name": "Y", "parameters": {"classification": classes}}])  # fmt: skip
    yield ask("classification: binary", scores, model="labelled",
              outputs=[{"name": "Y", "parameters": {"classification": 2, "binary_data": True}}])  # fmt: skip
    yield ask("classification: without labels", X,
              outputs=[{"name": "Y", "parameters": {"classification": 2}}])  # fmt: skip
    yield ask("classification: of INT32", tensor(datatype="INT32"), model="ident_INT32",
              outputs=[{"name": "Y", "parameters": {"classification": 2}}])  # fmt: skip
    yield ask("classification: of BOOL", tensor(datatype="BOOL", data=[True, False]), model="ident_BOOL",
              outputs=[{"name": "Y", "parameters": {"classification": 2}}])  # fmt: skip


def _binaries() -> Iterator[Http]:
    whole = {"inputs": [raw(8)]}
    yield binary("binary in, JSON out", whole, FLOATS)
    y_binary = [{"name": "Y", "parameters": {"binary_data": True}}]
    yield binary("binary in and out", {**whole, "outputs": y_binary}, FLOATS)
    eight = struct.pack("<4i", 1, 2, 3, 4)
    part = {"shape": [1, 4], "datatype": "INT32"}
    mixed = {"inputs": [{**raw(16, **part), "name": "A"}, tensor("B", data=[1, 1, 1, 1], **part)]}
    yield binary("one input binary, one JSON", mixed, eight, model="add_sub")
    outputs = [{"name": "SUM", "parameters": {"binary_data": True}}, {"name": "DIFFERENCE"}]
    yield binary("one output binary, one JSON", {**mixed, "outputs": outputs}, eight, model="add_sub")
    both = {"inputs": [{**raw(16, **part), "name": "A"}, {**raw(16, **part), "name": "B"}]}
    yield binary("two inputs binary", both, eight + eight, model="add_sub")
    yield binary("the header is all there is", {"inputs": [X]}, b"")
    octets = (("Content-Type", "application/octet-stream"),)
    yield binary("Content-Type of binary", whole, FLOATS, headers=octets)
    yield binary("binary data too short", whole, FLOATS[:7])
    yield binary("binary data too long", whole, FLOATS + b"\0")
    yield binary("binary_data_size another than the shape's", {"inputs": [raw(4)]}, FLOATS[:4])
    yield binary("binary_data_size and more behind", {"inputs": [raw(4)]}, FLOATS)
    yield binary("binary_data_size 0", {"inputs": [raw(0)]}, b"")
    yield binary("binary_data_size 0, shape of nothing", {"inputs": [raw(0, shape=[1, 0])]}, b"")
    for name, size in {"negative": -8, "a text": "8", "a fraction": 8.0, "true": True, "huge": 2**63}.items():
        yield binary(f"binary_data_size {name}", {"inputs": [raw(size)]}, FLOATS)
    yield binary("data and binary_data_size", {"inputs": [{**raw(8), "data": [3, 4]}]}, FLOATS)
    text = json.dumps(whole).encode()
    yield post("binary data without its header", text + FLOATS)
    yield post("binary_data_size without data and header", text)
    for name, size in {
        "too large": 9999, "negative": -1, "a text": "abc", "one too small": len(text) - 1,
        "one too large": len(text) + 1, "with a plus": f"+{len(text)}", "a fraction": f"{len(text)}.0",
        "of hex digits": hex(len(text)), "beyond 64 bits": 10**20, "with spaces": f"  {len(text)} ",
    }.items():  # fmt: skip
        yield binary(f"header length {name}", whole, FLOATS, size=size)
    zero = ((SIZE, "0"),)
    yield post("raw binary", FLOATS, headers=zero)
    yield post("raw binary of BYTES", b"one two", model="ident_BYTES", headers=zero)
    yield post(
        "raw binary to a model without batches", struct.pack("<6f", *range(6)), model="flat", headers=zero
    )
    yield post("raw binary, too short for the shape", FLOATS, model="flat", headers=zero)
    yield post("raw binary, part of an element", FLOATS[:7], headers=zero)
    yield post("raw binary to two inputs", FLOATS, model="add_sub", headers=zero)
    yield post("raw binary to two open dimensions", FLOATS, model="open", headers=zero)
    yield post("raw binary of nothing", b"", headers=zero)


def _encodings() -> Iterator[Http]:
    plain = body_of()
    packed = {"gzip": gzip.compress(plain, mtime=0), "deflate": zlib.compress(plain)}
    for encoding, content in packed.items():
        yield post(f"body in {encoding}", content, headers=(("Content-Encoding", encoding),))
        yield post(f"body in {encoding}, cut off", content[:-9], headers=(("Content-Encoding", encoding),))
        yield post(f"body not in {encoding} as told", plain, headers=(("Content-Encoding", encoding),))
        yield post(f"answer in {encoding} wished", plain, headers=(("Accept-Encoding", encoding),))
        text = json.dumps({"inputs": [raw(8)]}).encode()
        yield post(
            f"binary in {encoding}", (gzip.compress if encoding == "gzip" else zlib.compress)(text + FLOATS),
            headers=(("Content-Encoding", encoding), (SIZE, str(len(text)))),
        )  # fmt: skip
    bare = zlib.compressobj(wbits=-15)
    yield post("body in deflate without zlib's head", bare.compress(plain) + bare.flush(),
               headers=(("Content-Encoding", "deflate"),))  # fmt: skip
    for encoding in ("br", "zstd", "identity", "GZIP", "x-gzip", "gzip, deflate", ""):
        content = packed["gzip"] if "gzip" in encoding.lower() else plain
        yield post(
            f"Content-Encoding: {encoding or 'empty'}", content, headers=(("Content-Encoding", encoding),)
        )
    for wish in ("br", "gzip, deflate", "deflate, gzip;q=0.5", "*", "identity", "gzip;q=0", ""):
        yield post(f"Accept-Encoding: {wish or 'empty'}", plain, headers=(("Accept-Encoding", wish),))
    yield post(
        "answer in gzip wished, of an error", body_of(tensor("Z")), headers=(("Accept-Encoding", "gzip"),)
    )
    yield post("answer in gzip wished, binary", body_of(parameters={"binary_data_output": True}),
               headers=(("Accept-Encoding", "gzip"),))  # fmt: skip
    yield Http(name="metadata: answer in gzip wished", path="/v2/models/ident",
               headers=(("Accept-Encoding", "gzip"),))  # fmt: skip


def _versions() -> Iterator[Http]:
    for name, path in {
        "version 1": "ident/versions/1", "unknown version": "ident/versions/9",
        "version 1 of two": "versions/versions/1",
        "the latest of two": "versions", "version abc": "ident/versions/abc", "version 0": "ident/versions/0",
        "unknown model": "nosuch", "unknown model and version": "nosuch/versions/1",
        "name with %20": "id%20ent",
        "name in other letters": "IDENT", "name with %2F": "a%2Fb", "name with dots": "..%2Fident",
        "a query": "ident",
    }.items():  # fmt: skip
        more = "?a=b&c" if name == "a query" else ""
        yield Http(
            name=f"infer: {name}", method="POST", path=f"/v2/models/{path}/infer{more}", body=body_of()
        )
    yield Http(
        name="infer: unknown model and no JSON", method="POST", path="/v2/models/nosuch/infer", body=b"x"
    )
    yield ask("a model that raises", X, model="raises")


def _deadlines() -> Iterator[Http]:
    one = tensor(shape=[1, 1], data=[1])
    slow, patient = (ask("", one, model=model) for model in ("slow", "patient"))
    for name, limit in {"1 us": 1, "50 ms": 50_000, "10 s": 10_000_000}.items():
        call = body_of(one, parameters={"timeout": limit})
        named = f"timeout of {name}, nothing before it, model of 300 ms"
        yield post(named, call, model="patient", timed=True)
    call = body_of(one, parameters={"timeout": 50_000})
    yield post("timeout of 50 ms, others before it", call, model="patient", beside=(patient,), timed=True)
    yield post(
        "timeout of 50 ms, others before it, no default in the model", call, model="slow", beside=(slow,),
        timed=True,
    )  # fmt: skip
    yield post("queue full: two wait, a third comes", body_of(one), model="slow",
               beside=(slow, slow, slow), timed=True)  # fmt: skip


def deadly() -> Iterator[Http]:
    """What ends Triton's process."""
    yield ask("a huge dimension", tensor(shape=[1, 2**62]))
    yield ask("classification: of BYTES", tensor(datatype="BYTES", data=["a", "b"]), model="ident_BYTES",
              outputs=[{"name": "Y", "parameters": {"classification": 2}}])  # fmt: skip


def inferences() -> Iterator[Http]:
    """All of them."""
    for part in (_datatypes, _shapes, _fields, _parameters, _binaries, _encodings, _versions, _deadlines):
        yield from part()
