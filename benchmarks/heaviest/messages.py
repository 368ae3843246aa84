"""Messages as grammars with knobs: a recipe is plain values, from which the same bytes are made again."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any, Final

from benchmarks.heaviest.gateway import MODELS, ROWS_MAX
from clockwork_serve.oip.protobuf import varint
from clockwork_serve.units import KIB, MIB

Recipe = dict[str, Any]
JSON_MAX: Final = 16 * MIB
BODY_MAX: Final = 64 * MIB
MESSAGE_MAX: Final = 8 * MIB
_ELEMENTS: Final = (
    "0", "1.5", "-1e-7", "123456789.123456789", "1e400", "true", "null", '""', '"abc"',
    '"\\u00e9\\n"', "[]", "[0]", "{}", '{"a":0}', " ", "0 ", "[[0]]", "9" * 400, "0." + "1" * 800,
    '"' + "x" * 500 + '"', '"\\ud800"', "\x7f",
)  # fmt: skip
_ENDPOINTS: Final = (
    "/v2/repository/index", "/v2/repository/models/two/load", "/v2/trace/setting", "/v2/logging",
    "/v2/models/two/trace/setting", "/v2/systemsharedmemory/region/r/register", "/v2/nowhere",
)  # fmt: skip
_RPCS: Final = (
    "ServerLive", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad",
    "TraceSetting", "LogSettings", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister",
)  # fmt: skip
_FIELD: Final = {"BOOL": 1, "INT64": 3, "FP32": 6, "BYTES": 8}

# A knob's values: a list to choose from, or the least and the most of a number.
_KNOBS: Final[dict[str, dict[str, Any]]] = {
    "http_json": {
        "model": [*MODELS], "element": [*range(len(_ELEMENTS))], "count": (1, 8 * MIB), "depth": (1, 40),
        "inputs": (1, 20_000), "shape": ["honest", "model", "dims"], "parameters": (0, 900_000),
        "own_parameters": (0, 100_000), "outputs": (0, 100_000), "classes": (0, 65_536), "id": (0, MIB),
        "space": (0, MIB), "form": ["sized", "chunked", "gzip"], "chunk": (1, 64 * KIB),
        "header": ["", "whole"], "accept": ["", "gzip"], "rows": (1, ROWS_MAX),
    },
    "http_binary": {
        "model": [*MODELS], "rows": (1, ROWS_MAX), "mib": (1, 64), "words": (1, 20_000),
        "word": (0, 4 * KIB), "same": (1, 100), "form": ["sized", "chunked", "gzip"], "chunk": (1, 64 * KIB),
        "classes": (0, 65_536),
        "outputs": ["", "json", "binary"], "raw": ["", "raw"], "shift": (0, 3), "accept": ["", "gzip"],
    },
    "http_other": {
        "path": [*_ENDPOINTS], "element": [*range(len(_ELEMENTS))], "count": (1, 8 * MIB),
        "form": ["sized", "chunked"], "chunk": (1, 64 * KIB), "headers": (0, 200), "header": (1, 32 * KIB),
        "requests": (1, 4000), "target": (0, 32 * KIB), "percent": ["", "percent"],
    },
    "grpc": {
        "model": [*MODELS], "rows": (1, ROWS_MAX), "form": ["raw", "packed", "single", "split"],
        "count": (1, 8 * MIB), "value": [0, 1, 127, 128, 300, 2**31, 2**63], "word": (0, 4 * KIB),
        "shape": ["honest", "model", "dims"], "inputs": (1, 5000), "same": (0, 100),
        "parameters": (0, 20_000), "outputs": (0, 20_000), "classes": (0, 65_536),
        "raws": (0, 20_000), "stream": [0, 0, 1, 8],
    },
    "grpc_other": {"rpc": [*_RPCS], "field": (1, 8), "count": (1, 4 * MIB), "inner": (0, 64)},
}  # fmt: skip
PROTOCOLS: Final = tuple(_KNOBS)


def random_recipe(protocol: str, dice: Random) -> Recipe:
    """Anything; most knobs of numbers at their least, so that few are large together."""
    found: Recipe = {"protocol": protocol}
    for name, values in _KNOBS[protocol].items():
        if isinstance(values, list):
            found[name] = dice.choice(values)
        else:
            found[name] = _number(values, dice) if dice.random() < 0.4 else values[0]
    return found


def mutated(recipe: Recipe, dice: Random) -> Recipe:
    """The same with one to three knobs turned."""
    found = dict(recipe)
    knobs = _KNOBS[recipe["protocol"]]
    for name in dice.sample([*knobs], dice.randint(1, 3)):
        values = knobs[name]
        if isinstance(values, list):
            found[name] = dice.choice(values)
        elif dice.random() < 0.5:
            factor = dice.choice((0.25, 0.5, 0.8, 1.25, 2, 4))
            found[name] = min(values[1], max(values[0], int(found[name] * factor) + dice.randint(-1, 1)))
        else:
            found[name] = dice.choice((values[0], values[1], _number(values, dice)))
    return found


def _number(values: tuple[int, int], dice: Random) -> int:
    least, most = values
    return min(most, max(least, int(math.exp(dice.uniform(0, math.log(most + 1))))))


# HTTP


def http_message(recipe: Recipe) -> bytes:
    """All bytes of one or more requests, the last of which closes."""
    makers: dict[str, Callable[[Recipe], bytes]] = {
        "http_json": _http_json, "http_binary": _http_binary, "http_other": _http_other,
    }  # fmt: skip
    return makers[recipe["protocol"]](recipe)


def _http_json(recipe: Recipe) -> bytes:
    element = _ELEMENTS[recipe["element"]]
    count = min(recipe["count"], JSON_MAX // (len(element) + 1))
    datatype, model_shape, _, batched = MODELS[recipe["model"]]
    shape: list[int] = [count]
    if recipe["shape"] == "model":
        shape = [1 if dim < 0 else dim for dim in model_shape]
        shape = [recipe["rows"], *shape] if batched else shape
        count = min(count, math.prod(shape)) if element not in ("[]", "[0]", "[[0]]") else count
    elif recipe["shape"] == "honest" and recipe["model"] == "open":
        shape = [1, count]
    elif recipe["shape"] == "dims":
        shape = [1] * min(count, JSON_MAX // 2)
        count = 1
    data = "[" * recipe["depth"] + ",".join([element] * count) + "]" * recipe["depth"]
    own_parameters = _parameters(recipe["own_parameters"])
    own = own_parameters and f',"parameters":{own_parameters}'
    dims = json.dumps(shape, separators=(",", ":"))
    tensor = f'{{"name":"x","datatype":"{datatype}","shape":{dims}{own},"data":{data}}}'
    tensors = ",".join([tensor] * max(1, min(recipe["inputs"], JSON_MAX // len(tensor))))
    more = ""
    if recipe["id"]:
        more += ',"id":"%s"' % ("i" * recipe["id"])
    if recipe["parameters"]:
        more += f',"parameters":{_parameters(recipe["parameters"])}'
    if recipe["outputs"]:
        wish = f'{{"name":"y","parameters":{{"classification":{recipe["classes"]}}}}}'
        more += f',"outputs":[{",".join([wish] * recipe["outputs"])}]'
    body = (f'{{"inputs":[{tensors}]{more}' + " " * recipe["space"] + "}").encode()[:JSON_MAX]
    headers = [f"Inference-Header-Content-Length: {len(body)}"] if recipe["header"] else []
    return _request(f"/v2/models/{recipe['model']}/infer", body, recipe, headers)


def _parameters(count: int) -> str:
    return "{" + ",".join([f'"{index:x}":0' for index in range(count)]) + "}" if count else ""


def _http_binary(recipe: Recipe) -> bytes:
    model = recipe["model"]
    shape, data, datatype = _tensor(
        model, recipe["rows"], recipe["mib"] * MIB, recipe["words"], recipe["word"]
    )
    same = max(1, min(recipe["same"], BODY_MAX // (len(data) + 1)))
    tensor = {
        "name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)},
    }  # fmt: skip
    asked: dict[str, Any] = {"inputs": [tensor] * same}
    if recipe["outputs"]:
        wish = {"binary_data": recipe["outputs"] == "binary", "classification": recipe["classes"]}
        asked["outputs"] = [{"name": "y", "parameters": wish}]
    text = json.dumps(asked).encode() + b" " * recipe["shift"]
    body = text + data * same
    length = len(text)
    if recipe["raw"]:
        body, length = data, 0
    body = body[:BODY_MAX]
    return _request(f"/v2/models/{model}/infer", body, recipe, [f"Inference-Header-Content-Length: {length}"])


def _tensor(model: str, rows: int, nbytes: int, words: int, word: int) -> tuple[list[int], bytes, str]:
    """A good one of a model: its shape, its bytes, its datatype."""
    datatype, own, _, batched = MODELS[model]
    size = {"FP32": 4, "INT64": 8, "BOOL": 1, "BYTES": 0}[datatype]
    fixed = math.prod(dim for dim in own if dim > 0)
    first = max(1, words if datatype == "BYTES" else (nbytes - KIB) // (size * fixed))
    shape, left = [], first
    for dim in own:
        shape.append(left if dim < 0 else dim)
        left = 1 if dim < 0 else left
    shape = [rows, *shape] if batched else shape
    count = math.prod(shape)
    if datatype == "BYTES":
        word = min(word, BODY_MAX // count - 5)
        return shape, (max(word, 0).to_bytes(4, "little") + b"w" * word) * count, datatype
    return shape, bytes(size * count), datatype


def _http_other(recipe: Recipe) -> bytes:
    element = _ELEMENTS[recipe["element"]]
    count = min(recipe["count"], JSON_MAX // (len(element) + 8))
    body = ('{"parameters":[' + ",".join([element] * count) + "]}").encode()
    more = max(0, min(recipe["headers"], 32 * KIB // (recipe["header"] + 8)))
    headers = [f"H{index}: {'h' * recipe['header']}" for index in range(more)]
    path = recipe["path"] + ("%41" if recipe["percent"] else "a") * (recipe["target"] // 3)
    if recipe["requests"] == 1:
        return _request(path, body, recipe, headers)
    head = "\r\n".join([f"GET {path[:64]} HTTP/1.1", "Host: h", *headers, "", ""]).encode()
    requests = min(recipe["requests"], 4 * MIB // len(head))
    found: bytes = head * requests + head.replace(b"Host: h", b"Host: h\r\nConnection: close")
    return found


def _request(path: str, body: bytes, recipe: Recipe, headers: list[str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: h", "Connection: close", *headers]
    if recipe.get("accept"):
        lines.append("Accept-Encoding: gzip")
    if recipe["form"] == "gzip":
        body = gzip.compress(body, 1)
        lines.append("Content-Encoding: gzip")
    if recipe["form"] == "chunked":
        # A chunk of a byte is six: few of the smallest, not megabytes.
        chunk = max(recipe["chunk"], len(body) // 200_000 + 1)
        whole = b"%x\r\n" % chunk
        parts: list[bytes] = []
        for at in range(0, len(body), chunk):
            piece = body[at : at + chunk]
            parts += (whole if len(piece) == chunk else b"%x\r\n" % len(piece), piece, b"\r\n")
        body = b"".join(parts) + b"0\r\n\r\n"
        lines.append("Transfer-Encoding: chunked")
    else:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


# gRPC


def field(number: int, content: bytes) -> bytes:
    """A field of protobuf that has a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def grpc_message(recipe: Recipe) -> bytes:
    """A ``ModelInferRequest``, at most as large as the server takes."""
    model = recipe["model"]
    shape, data, datatype = _tensor(
        model, recipe["rows"], min(recipe["count"], MESSAGE_MAX), recipe["count"] // 8, recipe["word"]
    )
    contents = b""
    if recipe["form"] != "raw":
        count = recipe["count"]
        shape = [*shape[:-1], count] if recipe["shape"] == "honest" else shape
        contents = _contents(datatype, count, recipe)
    if recipe["shape"] == "dims":
        shape = [1] * min(recipe["count"], 2 * MIB)
    head = field(1, b"x") + field(2, datatype.encode()) + field(3, b"".join(map(varint, shape)))
    tensor = field(5, head + (field(5, contents) if contents else b""))
    room = MESSAGE_MAX - len(tensor)
    found = [field(1, model.encode()), tensor]
    found.append(field(5, field(1, b"x") + field(2, datatype.encode())) * (recipe["inputs"] - 1))
    found.append(tensor * min(recipe["same"], max(0, room // (len(tensor) + 1))))
    found += [
        field(4, field(1, b"%x" % index) + field(2, b"\x10\x01")) for index in range(recipe["parameters"])
    ]
    wish = field(1, b"y") + field(
        2, field(1, b"classification") + field(2, b"\x10" + varint(recipe["classes"]))
    )
    found.append(field(6, wish) * recipe["outputs"])
    if recipe["form"] == "raw":
        found.append(field(7, data))
    found.append(field(7, b"") * recipe["raws"])
    message = b"".join(found)
    return message if len(message) <= MESSAGE_MAX else b"".join(found[:2])[:MESSAGE_MAX]


def _contents(datatype: str, count: int, recipe: Recipe) -> bytes:
    number, form = _FIELD[datatype], recipe["form"]
    if datatype == "BYTES":
        piece = field(8, b"w" * (recipe["word"] if form != "split" else 0))
        return piece * min(count, MESSAGE_MAX // len(piece))
    element = b"\0\0\0\0" if datatype == "FP32" else varint(recipe["value"])
    if form == "packed":
        return field(number, element * min(count, MESSAGE_MAX // len(element) - 16))
    if form == "split":
        return field(number, element) * min(count, MESSAGE_MAX // (len(element) + 3))
    tag = varint(number << 3 | (5 if datatype == "FP32" else 0))
    return (tag + element) * min(count, MESSAGE_MAX // (len(element) + 2))


def other_message(recipe: Recipe) -> bytes:
    """A message of an RPC that asks for no inference."""
    piece = field(recipe["field"], field(1, b"k") * recipe["inner"])
    count: int = max(1, min(recipe["count"], MESSAGE_MAX // len(piece)))
    return piece * count
