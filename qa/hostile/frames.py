"""HTTP/2 and gRPC by hand, for attacks that no library would send. It opens no socket."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from qa.hostile.http import RESET, Plan, fit

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
START: Final = PREFACE + b"\0\0\0\4\0\0\0\0\0"
INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
STREAM: Final = "/inference.GRPCInferenceService/ModelStreamInfer"
WATCH: Final = "/grpc.health.v1.Health/Watch"
REFLECT: Final = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """One frame; ``length`` is what its head says, if that is a lie."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """HPACK's number with a prefix of so many bits."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    rest, found = value - most, bytearray((first | most,))
    while rest >= 128:
        found.append(rest & 127 | 128)
        rest >>= 7
    found.append(rest)
    return bytes(found)


def field(name: str, value: bytes, *, index: bool = False) -> bytes:
    """A header as a literal; ``index``: the receiver keeps it in its table."""
    kind = b"\x40" if index else b"\0"
    return kind + integer(len(name), 7) + name.encode() + integer(len(value), 7) + value


def head(path: str, *more: tuple[str, bytes]) -> bytes:
    """The headers of a call of gRPC."""
    fields = (
        (":method", b"POST"), (":scheme", b"http"), (":path", path.encode()), (":authority", b"h"),
        ("te", b"trailers"), ("content-type", b"application/grpc"), *more,
    )  # fmt: skip
    return b"".join(field(name, value) for name, value in fields)


def opened(stream: int, path: str, *more: tuple[str, bytes]) -> bytes:
    """A call that begins."""
    return frame(HEADERS, END_HEADERS, stream, head(path, *more))


def message(content: bytes, *, packed: int = 0, length: int | None = None) -> bytes:
    """A message of gRPC with its prefix."""
    return bytes((packed,)) + (len(content) if length is None else length).to_bytes(4, "big") + content


def sent(stream: int, content: bytes, *, ends: bool = True) -> bytes:
    """Data in frames of the size that everybody takes."""
    parts = [content[at : at + 16384] for at in range(0, len(content), 16384)] or [b""]
    return b"".join(
        frame(DATA, END_STREAM if ends and at == len(parts) - 1 else 0, stream, part)
        for at, part in enumerate(parts)
    )


def _tag(number: int, kind: int) -> bytes:
    return bytes((number << 3 | kind,))


def _text(number: int, content: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def infer_request(model: bytes, shape: Sequence[int], raw: bytes, datatype: bytes = b"FP32") -> bytes:
    """A ``ModelInferRequest`` with one input ``x``."""
    dims = b"".join(_varint(dim & (1 << 64) - 1) for dim in shape)
    tensor = _text(1, b"x") + _text(2, datatype) + _text(3, dims)
    return _text(1, model) + _text(5, tensor) + _text(7, raw)


# Attacks


def h2_random_bytes(dice: random.Random) -> Plan:
    """No protocol at all."""
    return Plan((dice.randbytes(dice.randint(1, 5000)),))


def h2_random_frames(dice: random.Random) -> Plan:
    """Frames whose kinds, flags, streams and lengths are dice."""
    frames = [
        frame(dice.randrange(12), dice.randrange(256), dice.choice((0, 1, 3, 2, 1 << 31)),
              dice.randbytes(dice.randrange(60)))
        for _ in range(30)
    ]  # fmt: skip
    return Plan((START + b"".join(frames),))


def h2_bit_flips(dice: random.Random) -> Plan:
    """A good call with a few bits turned."""
    good = bytearray(START + opened(1, INFER) + sent(1, message(infer_request(b"m1", (1, 64), bytes(256)))))
    for _ in range(dice.randint(1, 12)):
        # Never the highest: a path that is no text has an attack of its own.
        good[dice.randrange(len(PREFACE), len(good))] ^= 1 << dice.randrange(7)
    return Plan((bytes(good),))


def h2_truncated(dice: random.Random) -> Plan:
    """A good call that ends anywhere."""
    good = _good_call(dice)
    return Plan((good[: dice.randrange(len(good))],), end=dice.choice(("close", RESET, "half")))


def h2_rapid_reset(dice: random.Random) -> Plan:
    """Calls that are taken back at once."""
    calls = [
        opened(stream, INFER) + frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
        for stream in range(1, 400, 2)
    ]
    return Plan((START + b"".join(calls),))


def h2_continuations(dice: random.Random) -> Plan:
    """Headers without an end."""
    more = b"".join(frame(CONTINUATION, 0, 1, field(f"x{n}", b"y" * 900)) for n in range(100))
    return Plan((START + frame(HEADERS, 0, 1, head(INFER)) + more,))


def h2_settings(dice: random.Random) -> Plan:
    """Settings, over and over, some of which cannot be."""
    setting = dice.randrange(8).to_bytes(2, "big") + dice.randbytes(4)
    return Plan((START + frame(SETTINGS, 0, 0, setting) * 500,))


def h2_pings(dice: random.Random) -> Plan:
    """Pings, each of which wants an answer."""
    return Plan((START + frame(PING, 0, 0, bytes(8)) * 1000,))


def h2_windows(dice: random.Random) -> Plan:
    """Windows beyond what a number holds, or of nothing."""
    step = dice.choice((0, 1, (1 << 31) - 1)).to_bytes(4, "big")
    return Plan((START + frame(WINDOW_UPDATE, 0, 0, step) * 300,))


def h2_header_bomb(dice: random.Random) -> Plan:
    """A header that is sent once and named a thousand times."""
    block = head(INFER) + field("x", b"y" * 3000, index=True) + b"\xbe" * 4000
    return Plan((START + frame(HEADERS, END_HEADERS, 1, block),))


def h2_large_headers(dice: random.Random) -> Plan:
    """More metadata than is taken."""
    block = head(INFER, *((f"x{n}", b"y" * 1500) for n in range(30)))
    parts = [block[at : at + 16000] for at in range(0, len(block), 16000)]
    frames = [frame(HEADERS, 0, 1, parts[0]), *(frame(CONTINUATION, 0, 1, part) for part in parts[1:-1])]
    return Plan((START + b"".join(frames) + frame(CONTINUATION, END_HEADERS, 1, parts[-1]),))


def grpc_too_large(dice: random.Random) -> Plan:
    """A message whose prefix is beyond the limit, and some of it."""
    said = dice.choice((65 << 20, 1 << 31, (1 << 32) - 1))
    return Plan((START + opened(1, INFER) + sent(1, message(bytes(60_000), length=said), ends=False),))


def grpc_prefix_lies(dice: random.Random) -> Plan:
    """A prefix that is longer or shorter than what follows."""
    content = infer_request(b"m1", (1, 64), bytes(256))
    said = max(0, len(content) + dice.choice((-200, -1, 1, 5000)))
    return Plan((START + opened(1, INFER) + sent(1, message(content, length=said)),))


def grpc_compressed(dice: random.Random) -> Plan:
    """A bomb, a stream that is broken, or a name that nobody knows."""
    name, content = dice.choice(
        ((b"gzip", fit("gzip_bomb")), (b"gzip", dice.randbytes(300)), (b"gzip", b""), (b"zip", bytes(10)))
    )
    call = opened(1, INFER, ("grpc-encoding", name)) + sent(1, message(content, packed=1))
    return Plan((START + call,))


def grpc_wrong_protobuf(dice: random.Random) -> Plan:
    """A message that is none, or of a shape that nothing has."""
    content = dice.choice(
        (
            lambda: dice.randbytes(200),
            lambda: infer_request(b"m1", [1 << 62] * 200, bytes(256)),
            lambda: infer_request(b"m1", (-1, 64), bytes(256)),
            lambda: infer_request(b"m1", (1, 64), dice.randbytes(dice.randrange(300))),
            lambda: infer_request(b"m1", (1, 1), dice.randbytes(12), b"BYTES"),
            lambda: infer_request(b"m1", (1, 64), bytes(256), b"FP99"),
            lambda: infer_request(b"../../etc/passwd", (1, 64), bytes(256)),
            lambda: infer_request(b"\xff\xfe", (1, 64), bytes(256)),
        )
    )()
    return Plan((START + opened(1, dice.choice((INFER, STREAM))) + sent(1, message(content)),))


def grpc_unknown_methods(dice: random.Random) -> Plan:
    """Paths that are no method."""
    paths = (
        "/",
        "",
        "/a/b",
        "/inference.GRPCInferenceService/" + "x" * 3000,
        INFER + "\0",
        "infer",
        "/../..",
    )
    call = opened(1, dice.choice(paths)) + sent(1, message(b""))
    return Plan((START + call,))


def grpc_paths_that_are_no_text(dice: random.Random) -> Plan:
    """A path whose bytes are not UTF-8."""
    block = head("/x").replace(
        field(":path", b"/x"), field(":path", b"/inference." + dice.choice((b"\xff", b"\xf4r")))
    )
    return Plan((START + frame(HEADERS, END_HEADERS | END_STREAM, 1, block),))


def grpc_wrong_headers(dice: random.Random) -> Plan:
    """Deadlines, types and lengths that mean nothing."""
    name = dice.choice(("grpc-timeout", "content-type", "content-length", "x-slo-ms", "te", "x", "\0"))
    call = opened(1, INFER, (name, dice.choice((b"", b"99999999999S", b"-1", b"\0\xff", b"nan", b"1n"))))
    return Plan((START + call + sent(1, message(infer_request(b"m1", (1, 64), bytes(256)))),))


def grpc_many_messages(dice: random.Random) -> Plan:
    """A stream of requests that all fail, whose answers nobody reads."""
    one = message(infer_request(b"m1", (1, 3), bytes(12)))
    return Plan((START + opened(1, STREAM) + sent(1, one * 200, ends=False),), end=RESET)


def grpc_many_streams(dice: random.Random) -> Plan:
    """A hundred calls at once on one connection, none of which goes on."""
    path = dice.choice((STREAM, WATCH, REFLECT))
    return Plan((START + b"".join(opened(stream, path) for stream in range(1, 200, 2)),), hold_s=0.3)


def _good_call(dice: random.Random) -> bytes:
    path = dice.choice((INFER, STREAM))
    content = infer_request(b"m1", (1, 64), dice.randbytes(256))
    return START + opened(1, path) + sent(1, message(content))


ATTACKS: Final[tuple[Callable[[random.Random], Plan], ...]] = (
    h2_random_bytes, h2_random_frames, h2_bit_flips, h2_truncated, h2_continuations,
    h2_settings, h2_pings, h2_windows, h2_large_headers, grpc_too_large, grpc_prefix_lies,
    grpc_compressed, grpc_wrong_protobuf, grpc_unknown_methods, grpc_wrong_headers, grpc_many_messages,
    grpc_paths_that_are_no_text,
)  # fmt: skip
BEYOND_GRPCIO: Final[tuple[Callable[[random.Random], Plan], ...]] = (
    h2_rapid_reset, h2_header_bomb, grpc_many_streams,
)  # fmt: skip
"""What grpcio's core (1.85) does not stand: each leaves up to a megabyte behind, each time."""
