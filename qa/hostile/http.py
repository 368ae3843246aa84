"""HTTP as no honest client sends it: each attack a plan, decided by its dice alone. It opens no socket."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

RESET: Final = "reset"
BOMB_BYTES: Final = 80 << 20
WIDE: Final = 64
MODEL: Final = "/v2/models/m1/infer"
VERBS: Final = (
    "GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "BREW", "get", "",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """``pieces`` with ``pause_s`` between them, then up to ``hold_s`` for what comes, then the ``end``.

    ``end``: "close"; "reset"; "half" (only our side, then read); "unread" (closed without a look).
    """

    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    hold_s: float = 0.1
    end: str = "close"


@cache
def fit(name: str) -> bytes:
    """What takes long to make, made once: bombs that become larger than any limit."""
    if name == "gzip_bomb":
        return gzip.compress(bytes(BOMB_BYTES), 9, mtime=0)
    if name == "deflate_bomb":
        return zlib.compress(bytes(BOMB_BYTES), 9)
    raise KeyError(name)


def _post(body: bytes, *headers: str, path: str = MODEL) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: h", *headers, f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def _get(path: str, *headers: str, verb: str = "GET") -> bytes:
    return "\r\n".join((f"{verb} {path} HTTP/1.1", "Host: h", *headers, "", "")).encode("latin-1")


def _json(**changes: Any) -> dict[str, Any]:
    x = {"name": "x", "datatype": "FP32", "shape": [1, WIDE], "data": [0.5] * WIDE}
    return {"inputs": [x | changes]}


def _infer(dice: random.Random) -> bytes:
    """A good request: JSON, or binary, or in chunks."""
    if dice.random() < 0.3:
        return _post(json.dumps(_json()).encode())
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDE], "parameters": {"binary_data_size": 256}}
    text = json.dumps({"inputs": [tensor]}).encode()
    body, length = text + bytes(256), f"Inference-Header-Content-Length: {len(text)}"
    if dice.random() < 0.5:
        return _post(body, length)
    return _chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), length)


def _chunked(chunks: bytes, *headers: str) -> bytes:
    return _get(MODEL, *headers, "Transfer-Encoding: chunked", verb="POST") + chunks


def random_bytes(dice: random.Random) -> Plan:
    """No protocol at all."""
    return Plan((dice.randbytes(dice.randint(1, 20_000)),))


def random_lines(dice: random.Random) -> Plan:
    """Lines of text."""
    letters = 'GETPOST /:;,=%\t v2HTTP/1.1\\"{}[]é\0'
    lines = ("".join(dice.choices(letters, k=dice.randint(0, 80))) for _ in range(30))
    return Plan(("\r\n".join(lines).encode("latin-1"),))


def bit_flips(dice: random.Random) -> Plan:
    """A good request with a few bits turned."""
    good = bytearray(_infer(dice))
    for _ in range(dice.randint(1, 20)):
        good[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
    return Plan((bytes(good),))


def truncated(dice: random.Random) -> Plan:
    """A good request that ends anywhere, in any way."""
    good = _infer(dice)
    return Plan((good[: dice.randrange(len(good))],), end=dice.choice(("close", RESET, "half", "unread")))


def in_pieces(dice: random.Random) -> Plan:
    """A good request, a few bytes at a time."""
    good, step = _infer(dice), dice.randint(1, 40)
    return Plan(tuple(good[at : at + step] for at in range(0, len(good), step)), pause_s=0.0005)


def lengths_that_lie(dice: random.Random) -> Plan:
    """Content-Length: two of them, below zero, beyond any number, of a thousand digits, of no digits."""
    values = dice.choice(
        (["5", "6"], ["5", "5"], ["-5"], ["+5"], ["5, 5"], ["0x5"], [""], ["5 5"], [str(1 << 63)], ["9" * 30],
         ["0" * 5000 + "5"], ["1e3"], ["\x005"], ["65537"], [str(64 << 20)])
    )  # fmt: skip
    return Plan((_get(MODEL, *(f"Content-Length: {value}" for value in values), verb="POST") + b"hello",))


def lengths_and_chunks(dice: random.Random) -> Plan:
    """Both, in either order, and encodings that end in no chunks: where servers disagree, requests hide."""
    headers = [
        dice.choice(("Content-Length: 6", "Content-Length: 100000", "X: y")),
        dice.choice(
            ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked, identity",
             "Transfer-Encoding:\tchunked",
             "Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", " Transfer-Encoding: chunked",
             "Transfer-Encoding: identity", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity")
        ),
    ]  # fmt: skip
    dice.shuffle(headers)
    return Plan((_get(MODEL, *headers, verb="POST") + b"0\r\n\r\n" + _get("/v2/smuggled"),))


def header_lengths_that_lie(dice: random.Random) -> Plan:
    """Inference-Header-Content-Length beside a small body or one that is received in the region."""
    value = dice.choice(
        ("-1", "0", "1", "999999999", "0" * 5000, "9" * 5000, "one", "", "1.5", "²", "100001")
    )
    return Plan((_post(bytes(dice.choice((10, 100_000))), f"Inference-Header-Content-Length: {value}"),))


def chunks_that_lie(dice: random.Random) -> Plan:
    """Chunks of a wrong, a huge or no size, with extensions and trailers that do not end."""
    chunks = dice.choice(
        (b"5\r\nhello!\r\n0\r\n\r\n", b"ffffffffffffffffff\r\nhello", b"-1\r\nhello\r\n", b"g\r\n", b"\r\n",
         b"5;" + b"e" * 50_000, b"0\r\n" + b"A: b\r\n" * 5000, b'5;a="\r\n"\r\nhello\r\n0\r\n\r\n',
         b"1\r\na\r\n" * 3000, b"5\nhello\n0\n\n", b"7fffffff\r\n" + bytes(60_000), b"0x5\r\nhello\r\n")
    )  # fmt: skip
    return Plan((_chunked(chunks),))


def control_bytes(dice: random.Random) -> Plan:
    """NUL, bare ends of lines, folded and nameless headers."""
    lines = dice.choice(
        ("X: a\0b", "X\0: b", "X: a\rb", "X: a\nY: b", ": b", " X: b", "X : b", "X: a\r\n folded", "X",
         "\x7f: b",
         "X: \xff\xfe", "\t", "Host: a\r\nHost: b")
    )  # fmt: skip
    return Plan((_get("/v2/health/live", lines),))


def long_targets(dice: random.Random) -> Plan:
    """Targets that are long, or all slashes, or all percent signs."""
    target = dice.choice(
        ("/a" * 15_000, "/" * 30_000, "/%41" * 7000, "/v2?" + "q" * 31_000, "/" + "%" * 30_000)
    )
    return Plan((_get(target),))


def strange_targets(dice: random.Random) -> Plan:
    """Out of the repository, twice decoded, of another host, none."""
    name = dice.choice(
        ("../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e", "m1%00", "%ff%fe", "%", "%zz",
         "m1%2finfer",
         ".", "..", "*", "m1\\..\\", "%252e%252e", "m1;a", "\xe9", "m" * 3000, "m1/versions/-1",
         "m1/versions/²")
    )  # fmt: skip
    target = dice.choice(
        (f"/v2/models/{name}/infer", f"/v2/models/{name}", f"/v2/models/{name}/config", name)
    )
    verb = dice.choice(("GET", "POST"))
    return Plan((_get(target, "Content-Length: 2", verb=verb) + b"{}",))


def wrong_verbs(dice: random.Random) -> Plan:
    """Verbs that a path does not take, or nobody knows."""
    path = dice.choice(("/v2", MODEL, "/v2/health/live", "/metrics", "*", "h:80", "/v2/repository/index"))
    return Plan((_get(path, verb=dice.choice(VERBS)) * dice.choice((1, 50)),))


def wrong_versions(dice: random.Random) -> Plan:
    """Versions of HTTP that are not spoken, and other protocols."""
    line = dice.choice(
        (b"GET /v2 HTTP/0.9\r\n\r\n", b"GET /v2\r\n", b"GET /v2 HTTP/2.0\r\n\r\n",
         b"GET /v2 HTTP/1.99\r\n\r\n",
         b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
         b"GET /v2 ICE/1.0\r\n\r\n", b"*1\r\n$4\r\nPING\r\n", b"HTTP/1.1 200 OK\r\n\r\n")
    )  # fmt: skip
    return Plan((line,))


def huge_headers(dice: random.Random) -> Plan:
    """Too many, or too long, or both."""
    headers = dice.choice((["A: b"] * 20_000, ["A: " + "b" * 200_000], ["a" * 60_000 + ": b"], [":"] * 9000))
    return Plan((_get("/v2", *headers),))


def many_upgrades(dice: random.Random) -> Plan:
    """A thousand requests in a row, each for another protocol."""
    one = dice.choice((_get("/v2/x", "Connection: Upgrade", "Upgrade: h2c"), b"CONNECT a:1 HTTP/1.1\r\n\r\n"))
    return Plan((one * 1000,), end=dice.choice(("close", RESET)))


def pipelined(dice: random.Random) -> Plan:
    """A thousand requests at once, whose answers nobody waits for."""
    return Plan((_get(dice.choice(("/v2/health/live", "/v2/nothing"))) * 1000,), hold_s=0.01, end=RESET)


def pipelined_inference(dice: random.Random) -> Plan:
    """More inference than one connection may have open; and then it is gone."""
    return Plan((_infer(dice) * 150,), hold_s=0.01, end=RESET)


def expectations(dice: random.Random) -> Plan:
    """A body that waits to be asked for and never comes, or one nobody understands."""
    expected = dice.choice(("100-continue", "miracles", "100-continue, 100-continue"))
    return Plan((_get(MODEL, f"Expect: {expected}", "Content-Length: 100000", verb="POST"),), end=RESET)


def early_questions(dice: random.Random) -> Plan:
    """A large body whose head tells a deadline, that never comes."""
    slo = dice.choice(("0.001", "5", "100", "1e9", "nan", "-1", "9" * 400))
    head = _get(MODEL, f"x-slo-ms: {slo}", "Content-Length: 200000", verb="POST")
    return Plan((head, bytes(dice.randrange(200_000))), end=dice.choice(("close", RESET)))


def json_nests(dice: random.Random) -> Plan:
    """Brackets."""
    depth = dice.choice((30, 200, 1000, 100_000))
    deep = b"[" * depth + b"]" * dice.choice((0, depth))
    body = dice.choice(
        (deep, b'{"inputs":%s}' % deep, b'{"a":' * depth,
         b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,64],"data":%s}]}' % deep)
    )  # fmt: skip
    return Plan((_post(body),))


def json_shapes(dice: random.Random) -> Plan:
    """Shapes whose product is negative, none, or has a thousand digits."""
    shape = dice.choice(
        ([-1, 64], [0, 64], [1 << 62] * 8, [1 << 64, 64], [10**18] * 300, [1] * 5000, [], [1.5, 64], [True,
         64],
         [10**400], None, "1,64", [1, -64, -1], [1 << 32, 1 << 32])
    )  # fmt: skip
    return Plan((_post(json.dumps(_json(shape=shape)).encode()),))


def json_values(dice: random.Random) -> Plan:
    """Numbers that are none, or beyond any; text that is none; names that come twice."""
    body = dice.choice(
        (json.dumps(_json(data=[float("nan")] * WIDE)), json.dumps(_json(data=[1e999] * WIDE)),
         json.dumps(_json(data=[10**30] * WIDE)), json.dumps(_json(data=["x"] * WIDE)),
         json.dumps(_json(name="\ud800")),
         json.dumps(_json(name="n" * 20_000)), json.dumps(_json(datatype="d" * 20_000)),
         '{"inputs":[],"inputs":{}}',
         json.dumps({"inputs": _json()["inputs"] * 300}), json.dumps(_json() | {"id": 5}),
         '{"inputs":[' + "1" * 5000,
         json.dumps(_json() | {"outputs": [{"name": "y"}] * 300}), "\ufeff{}", "{}" * 50, "null", '"',
         "\\u0000")
    ).encode("utf-8", "surrogatepass")  # fmt: skip
    return Plan((_post(body),))


def parameters_that_lie(dice: random.Random) -> Plan:
    """Deadlines, priorities, sizes and shared memory that cannot be."""
    value: Any = dice.choice(
        (-1, 0, 10**400, 1e308, "soon", True, 1 << 62, [], {}, None, "../../etc/passwd", "\0", 0.5)
    )
    name = dice.choice(
        ("slo_ms", "timeout", "priority", "sequence_id", "binary_data_size", "shared_memory_region",
         "shared_memory_offset", "shared_memory_byte_size", "classification", "binary_data",
         "binary_data_output")
    )  # fmt: skip
    where = dice.choice(("request", "input", "output"))
    asked = _json(data=None, parameters={name: value}) if where == "input" else _json()
    if where == "request":
        asked["parameters"] = {name: value}
    elif where == "output":
        asked["outputs"] = [{"name": "y", "parameters": {name: value}}]
    return Plan((_post(json.dumps(asked).encode()),))


def strings_that_lie(dice: random.Random) -> Plan:
    """Elements of BYTES whose lengths do not fit what there is."""
    data = dice.choice((b"\xff\xff\xff\xff", b"\x05\0\0\0hell", b"\0", b"", bytes(4096), dice.randbytes(40)))
    count = dice.choice((1, 2, 1024, 1 << 40))
    tensor = {
        "name": "text", "datatype": "BYTES", "shape": [count, 1],
        "parameters": {"binary_data_size": len(data)},
    }  # fmt: skip
    text = json.dumps({"inputs": [tensor]}).encode()
    length = f"Inference-Header-Content-Length: {len(text)}"
    return Plan((_post(text + data, length, path="/v2/models/words/infer"),))


def encodings_that_lie(dice: random.Random) -> Plan:
    """Bombs, broken streams, streams in streams, and names that nobody knows."""
    good = json.dumps(_json()).encode()
    packed = gzip.compress(good, mtime=0)  # a seed decides all of it
    twice = gzip.compress(packed, mtime=0)
    name, body = dice.choice(
        (("gzip", packed[:-5]), ("gzip", packed + b"more"), ("gzip", dice.randbytes(500)),
         ("deflate", b"\x78\x9c"), ("gzip", twice), ("br", good), ("gzip, gzip", packed),
         ("identity, gzip", packed), ("", good), ("deflate", zlib.compress(good)[:-1]), ("gzip", b""))
    )  # fmt: skip
    return Plan((_post(body, f"Content-Encoding: {name}"),))


def bombs(dice: random.Random) -> Plan:
    """Eighty megabytes of nothing, packed."""
    name = dice.choice(("gzip", "deflate"))
    return Plan((_post(fit(f"{name}_bomb"), f"Content-Encoding: {name}"),), hold_s=0.5)


def other_endpoints(dice: random.Random) -> Plan:
    """All that is not inference, with bodies that do not fit; nothing that an operator could mean."""
    path = dice.choice(
        ("/v2/repository/index", "/v2/repository/models/..%2f..%2fetc/load",
         "/v2/repository/models/nosuch/load",
         "/v2/repository/models/nosuch/unload", "/v2/trace/setting", "/v2/logging", "/v2/models/stats",
         "/v2/systemsharedmemory/region/r/register", "/v2/systemsharedmemory/region/..%2f/register",
         "/v2/cudasharedmemory/status", "/v2/models/m1/generate", "/metrics", "/v2/models",
         "/v2/models/m1/config")
    )  # fmt: skip
    body = dice.choice(
        (b"", b"{}", b"[]", b'{"ready":%s}' % (b"[" * 900 + b"]" * 900), b'{"key":"/../etc","byte_size":-1}',
         b'{"key":5,"offset":1e99}', b'{"log_level":{}}', b'{"parameters":[]}',
         b'{"parameters":{"config":"{}"}}',
         dice.randbytes(100))
    )  # fmt: skip
    return Plan((_post(body, path=path) if dice.random() < 0.8 else _get(path),))


def gone_before_the_answer(dice: random.Random) -> Plan:
    """A good request whose client does not wait."""
    return Plan((_infer(dice),), end=dice.choice(("unread", RESET)), hold_s=0.0)


def nothing(dice: random.Random) -> Plan:
    """A connection, and its end."""
    return Plan((), hold_s=0.0, end=dice.choice(("close", RESET)))


ATTACKS: Final[tuple[Callable[[random.Random], Plan], ...]] = (
    random_bytes, random_lines, bit_flips, truncated, in_pieces, lengths_that_lie, lengths_and_chunks,
    header_lengths_that_lie, chunks_that_lie, control_bytes, long_targets, strange_targets, wrong_verbs,
    wrong_versions, huge_headers, many_upgrades, pipelined, pipelined_inference, expectations,
    early_questions,
    json_nests, json_shapes, json_values, parameters_that_lie, strings_that_lie, encodings_that_lie,
    other_endpoints, gone_before_the_answer, nothing,
)  # fmt: skip
