"""Requests as bytes, built before the run; HTTP/2 headers without a dynamic table (RFC 7541)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_client.datatypes import encode_strings
from clockwork_client.tensors import DTYPES
from clockwork_lab.bench.server import ServerAddress, Shape, TensorInfo
from clockwork_serve.errors import ConfigError
from clockwork_serve.oip.protobuf import ModelInferRequest, varint
from clockwork_serve.units import NS_PER_MS, NS_PER_US
from clockwork_serve.workload.tables import NO_SLO_MS

# ------------------------------------------------------------
# The tensors of requests, generated to match a model's metadata.


WORD_BYTES: Final = 8  # length of each random element of BYTES
_SHAPE: Final = re.compile(r"(?:(?P<model>[^:]+):)?(?P<name>[^:]+):(?P<dims>\d+(?:,\d+)*)")


class Tensor(Struct, frozen=True):
    """An input as it is sent."""

    name: str
    datatype: str
    shape: Shape
    data: bytes


def read_shapes(given: Sequence[str]) -> dict[tuple[str, str], Shape]:
    """``[MODEL:]INPUT:1,3,224,224`` by (model or "", input). Raises :class:`ConfigError`."""
    shapes = {}
    for text in given:
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise ConfigError(f"shape: expected [MODEL:]INPUT:1,3,224,224, found {text!r}; correct it")
        dims = tuple(int(size) for size in found["dims"].split(","))
        shapes[found["model"] or "", found["name"]] = dims
    return shapes


class Data:
    """The source of values: ``random``, ``zeros``, or a numpy file (.npy: the only input; .npz: by name).

    Raises :class:`ConfigError`.
    """

    def __init__(self, source: str, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._arrays: dict[str, np.ndarray] = {}
        self._made: dict[tuple[str, str, Shape], bytes] = {}
        if source not in ("random", "zeros"):
            self._read(Path(source))

    def _read(self, path: Path) -> None:
        wanted = "random, zeros, or a file that numpy.save or numpy.savez wrote"
        try:
            loaded = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"input_data: expected {wanted}, found {path} ({error})") from None
        if isinstance(loaded, np.ndarray):
            self._arrays = {"": loaded}
            return
        with loaded:
            self._arrays = {name: loaded[name] for name in loaded.files}

    def tensors(
        self, model: str, inputs: Sequence[TensorInfo], shapes: Mapping[tuple[str, str], Shape]
    ) -> tuple[Tensor, ...]:
        """One request's inputs. Raises :class:`ConfigError`."""
        if "" in self._arrays and len(inputs) != 1:
            names = ", ".join(each.name for each in inputs)
            raise ConfigError(
                f"input_data: expected arrays for the inputs {names} of model {model!r}, found one array "
                "without a name; write them with numpy.savez"
            )
        return tuple(self._tensor(model, each, shapes) for each in inputs)

    def _tensor(self, model: str, info: TensorInfo, shapes: Mapping[tuple[str, str], Shape]) -> Tensor:
        given = shapes.get((model, info.name), shapes.get(("", info.name)))
        if self._arrays:
            array = self._array(model, info)
            shape = given or array.shape
            _check_shape(model, info, shape, "the shape of the array in --input-data")
            return Tensor(info.name, info.datatype, shape, _bytes_of(model, info, array, shape))
        if given is not None:
            _check_shape(model, info, given, "--shape")
        shape = _closed(model, info) if given is None else given
        key = (info.name, info.datatype, shape)
        if key not in self._made:
            self._made[key] = self._drawn(*key)
        return Tensor(info.name, info.datatype, shape, self._made[key])

    def _array(self, model: str, info: TensorInfo) -> np.ndarray:
        array = self._arrays.get(info.name, self._arrays.get(""))
        if array is None:
            raise ConfigError(
                f"input_data: expected an array called {info.name!r}, an input of model {model!r}; found "
                f"{', '.join(self._arrays)}"
            )
        return array

    def _drawn(self, name: str, datatype: str, shape: Shape) -> bytes:
        count = int(np.prod(shape, dtype=np.int64))
        rng = np.random.default_rng([self._seed, *name.encode()])
        if datatype == "BYTES":
            letters = np.full(count * WORD_BYTES, ord("0"), np.uint8)
            if self._source == "random":
                letters = rng.integers(ord("a"), ord("z") + 1, count * WORD_BYTES, np.uint8)
            text = letters.tobytes()
            return encode_strings(text[at : at + WORD_BYTES] for at in range(0, len(text), WORD_BYTES))
        kind = DTYPES[datatype]
        if self._source == "zeros":
            return bytes(count * kind.itemsize)
        if datatype == "BF16":
            return (rng.random(count, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        if kind.kind == "f":
            return rng.random(count).astype(kind).tobytes()
        return rng.integers(0, 2 if kind.kind == "b" else 10, count).astype(kind).tobytes()


def _closed(model: str, info: TensorInfo) -> Shape:
    """The described shape; an open first dimension is a batch of one."""
    shape = (1, *info.shape[1:]) if info.shape[:1] == (-1,) else info.shape
    if -1 in shape:
        example = ",".join(str(size) if size > 0 else "N" for size in shape)
        raise ConfigError(
            f"shape: expected the sizes that are open in input {info.name!r} of model {model!r}, which is "
            f"{list(info.shape)}; give --shape {info.name}:{example} with numbers for N"
        )
    return shape


def _check_shape(model: str, info: TensorInfo, shape: Shape, where: str) -> None:
    fits = len(shape) == len(info.shape) and all(
        wanted in (-1, size) for wanted, size in zip(info.shape, shape, strict=True)
    )
    if not fits:
        raise ConfigError(
            f"shape: expected {list(info.shape)} for input {info.name!r} of model {model!r}, found "
            f"{list(shape)} in {where}; -1 stands for any size"
        )


def _bytes_of(model: str, info: TensorInfo, array: np.ndarray, shape: Shape) -> bytes:
    if array.size != int(np.prod(shape, dtype=np.int64)):
        raise ConfigError(
            f"input_data: expected {list(shape)} for input {info.name!r} of model {model!r}, found an "
            f"array of {list(array.shape)}"
        )
    if info.datatype == "BYTES":
        return encode_strings(
            element if isinstance(element, bytes) else str(element).encode()
            for element in array.reshape(-1).tolist()
        )
    kind: np.dtype[Any] = DTYPES[info.datatype]
    if array.dtype != kind:
        raise ConfigError(
            f"input_data: expected {info.datatype} for input {info.name!r} of model {model!r}, found "
            f"{array.dtype}; convert it with astype"
        )
    return np.ascontiguousarray(array).tobytes()


# ------------------------------------------------------------
# Encoding and decoding of HTTP/2 headers with a dynamic table of size 0 (RFC 7541): stateless.
#
# Without that table a header is an entry of the standard's static table or a literal. So blocks can be
# skipped, and equal blocks mean equal headers.


_STATIC: Final[tuple[tuple[str, str], ...]] = (
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""),
    ("cache-control", ""), ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""),
    ("content-length", ""), ("content-location", ""), ("content-range", ""), ("content-type", ""),
    ("cookie", ""), ("date", ""), ("etag", ""), ("expect", ""), ("expires", ""), ("from", ""), ("host", ""),
    ("if-match", ""), ("if-modified-since", ""), ("if-none-match", ""), ("if-range", ""),
    ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""), ("location", ""), ("max-forwards", ""),
    ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""), ("referer", ""), ("refresh", ""),
    ("retry-after", ""), ("server", ""), ("set-cookie", ""), ("strict-transport-security", ""),
    ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""), ("www-authenticate", ""),
)  # fmt: skip
_BY_LENGTH: Final = {
    5: "012aceiost", 6: " %-./3456789=A_bdfghlmnpru", 7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz", 8: "&*,;XZ",
    10: '!"()?', 11: "'+|", 12: "#>", 13: "\0$@[]~", 14: "^}", 15: "<`{",
}  # fmt: skip
"""The standard's Huffman code, which is canonical: characters by the bits of their codes. What takes more
bits than these (a backslash, what is not ASCII) is in no header of gRPC."""


class Undecodable(ValueError):
    """Not a header block, or one that refers to a dynamic table."""


def _codes() -> dict[tuple[int, int], str]:
    codes, code, before = {}, 0, 5
    for bits, characters in _BY_LENGTH.items():
        code <<= bits - before
        before = bits
        for character in characters:
            codes[bits, code] = character
            code += 1
    return codes


_CODES: Final = _codes()
_BITS_MAX: Final = max(_BY_LENGTH)


def literal(name: str, value: str) -> bytes:
    """A header as a literal."""
    return b"\0" + _text(name.encode()) + _text(value.encode())


def _text(content: bytes) -> bytes:
    size = len(content)
    return (bytes([size]) if size < 127 else b"\x7f" + varint(size - 127)) + content


def decode(block: bytes) -> dict[str, str]:
    """The headers of a block; the last one of equal names. Raises :class:`Undecodable`."""
    found: dict[str, str] = {}
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = _integer(block, at, 7)
                name, value = _entry(index)
            elif first & 0xE0 == 0x20:
                size, at = _integer(block, at, 5)
                if size:
                    raise Undecodable("the peer uses a dynamic header table although its size was set to 0")
                continue
            else:
                index, at = _integer(block, at, 6 if first & 0x40 else 4)
                if index:
                    name = _entry(index)[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
            found[name] = value
    except IndexError:
        raise Undecodable("a header block ends too early") from None
    return found


def _entry(index: int) -> tuple[str, str]:
    if not 0 < index <= len(_STATIC):
        raise Undecodable(f"entry {index} of a table that this side keeps empty")
    return _STATIC[index - 1]


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return value, at
        if shift > 28:
            raise Undecodable("a length beyond all reason")


def _string(block: bytes, at: int) -> tuple[str, int]:
    packed = block[at] & 0x80
    length, at = _integer(block, at, 7)
    content = block[at : at + length]
    if len(content) < length:
        raise Undecodable("a header block ends too early")
    return (_unpacked(content) if packed else content.decode("latin-1")), at + length


def _unpacked(content: bytes) -> str:
    """Decode Huffman's code. A character outside our table ends the text with a question mark."""
    found, code, bits = [], 0, 0
    for byte in content:
        for shift in range(7, -1, -1):
            code, bits = code << 1 | byte >> shift & 1, bits + 1
            character = _CODES.get((bits, code))
            if character is not None:
                found.append(character)
                code = bits = 0
            elif bits > _BITS_MAX:
                return "".join(found) + "?"
    return "".join(found)


# ------------------------------------------------------------
# Requests as bytes, built before the run.
#
# A message is its head, which differs by model and SLO, and its body, which models of equal inputs share.


Deadline = Literal["header", "timeout", "grpc", "none"]
INFER_PATH: Final = "/inference.GRPCInferenceService/ModelInfer"
NO_SLO_NS: Final = round(NO_SLO_MS * NS_PER_MS)
_RAW_INPUT: Final = bytes([7 << 3 | 2])
"""The tag of an entry of ``raw_input_contents``: field 7, of a length that follows."""
_GRPC_UNITS: Final = ((1, "n"), (1_000, "u"), (1_000_000, "m"), (1_000_000_000, "S"))
_GRPC_DIGITS_MAX: Final = 99_999_999


class Message(Struct, frozen=True):
    """``head`` is what comes first on the wire: HTTP's head (with OIP's JSON), or gRPC's header block.

    ``body`` is an index into the list of bodies; ``lead`` is what stands between the two (gRPC).
    """

    head: bytes
    body: int
    lead: bytes = b""


class Maker:
    """What all messages of a run have in common."""

    def __init__(
        self, address: ServerAddress, headers: Sequence[tuple[str, str]], deadline: Deadline
    ) -> None:
        self._address = address
        self._headers = headers
        self._deadline = deadline
        self.bodies: list[bytes] = []
        self._known: dict[bytes, int] = {}

    def _body(self, body: bytes) -> int:
        at = self._known.get(body)
        if at is None:
            at = self._known[body] = len(self.bodies)
            self.bodies.append(body)
        return at

    def raw(self, path: str, model: str, body: bytes, slo_ns: int) -> Message:
        """A POST of the body; ``{model}`` in the path stands for the model's name."""
        return self._post(path.replace("{model}", quote(model, safe="")), [], body, b"", slo_ns)

    def http(self, model: str, tensors: Sequence[Tensor], slo_ns: int, priority: int) -> Message:
        """An inference with binary tensors."""
        parameters: dict[str, Any] = {"binary_data_output": True, **self._parameters(slo_ns, priority)}
        request = {
            "inputs": [
                {
                    "name": each.name, "shape": each.shape, "datatype": each.datatype,
                    "parameters": {"binary_data_size": len(each.data)},
                }
                for each in tensors
            ],
            "parameters": parameters,
        }  # fmt: skip
        text = msgspec.json.encode(request)
        lines = [("Inference-Header-Content-Length", str(len(text)))]
        path = f"/v2/models/{quote(model, safe='')}/infer"
        return self._post(path, lines, b"".join(each.data for each in tensors), text, slo_ns)

    def grpc(self, model: str, tensors: Sequence[Tensor], slo_ns: int, priority: int) -> Message:
        """The same as ``ModelInfer``. A header ``x-slo-ms`` is none of gRPC's: it is a parameter there."""
        request = ModelInferRequest(model_name=model)
        for each in tensors:
            request.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        for name, value in self._parameters(slo_ns, priority).items():
            request.parameters[name].int64_param = value
        if self._deadline == "header" and slo_ns < NO_SLO_NS:
            request.parameters["slo_ms"].double_param = slo_ns / NS_PER_MS
        start = request.SerializeToString()
        contents = [part for each in tensors for part in (_RAW_INPUT + varint(len(each.data)), each.data)]
        size = len(start) + sum(map(len, contents))
        # The field's head in front of the last tensor ends the lead, so that the tensor itself is shared.
        lead = b"\0" + size.to_bytes(4, "big") + start + b"".join(contents[:-1])
        return Message(self._grpc_head(slo_ns), self._body(contents[-1] if contents else b""), lead)

    def _parameters(self, slo_ns: int, priority: int) -> dict[str, int]:
        found = {}
        if self._deadline == "timeout" and slo_ns < NO_SLO_NS:
            found["timeout"] = max(1, slo_ns // NS_PER_US)
        if priority:
            found["priority"] = priority
        return found

    def _post(
        self, path: str, lines: Sequence[tuple[str, str]], body: bytes, text: bytes, slo_ns: int
    ) -> Message:
        given = {name.lower() for name, _ in self._headers}
        if "content-type" not in given:
            lines = [("Content-Type", "application/octet-stream"), *lines]
        if self._deadline == "header" and slo_ns < NO_SLO_NS:
            lines = [*lines, ("x-slo-ms", f"{slo_ns / NS_PER_MS:.10g}")]
        head = [
            f"POST {self._address.base}{path} HTTP/1.1",
            *([] if "host" in given else [f"Host: {self._address.name}"]),
            *(f"{name}: {value}" for name, value in (*self._headers, *lines)),
            f"Content-Length: {len(text) + len(body)}",
        ]
        return Message("\r\n".join((*head, "", "")).encode() + text, self._body(body))

    def _grpc_head(self, slo_ns: int) -> bytes:
        headers = [
            (":method", "POST"), (":scheme", "https" if self._address.tls else "http"),
            (":path", INFER_PATH), (":authority", self._address.name), ("te", "trailers"),
            ("content-type", "application/grpc"), ("user-agent", "clockwork-bench"),
        ]  # fmt: skip
        if self._deadline == "grpc" and slo_ns < NO_SLO_NS:
            headers.append(("grpc-timeout", _grpc_timeout(slo_ns)))
        headers += [(name.lower(), value) for name, value in self._headers]
        return b"".join(literal(name, value) for name, value in headers)


def _grpc_timeout(slo_ns: int) -> str:
    """The timeout as precisely as eight digits allow."""
    unit_ns, unit = next(pair for pair in _GRPC_UNITS if slo_ns // pair[0] <= _GRPC_DIGITS_MAX)
    return f"{slo_ns // unit_ns}{unit}"
