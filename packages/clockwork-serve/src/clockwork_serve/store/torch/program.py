"""Inputs, outputs and constants of a torch.export program, read without torch; its blob of weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve.messages import TorchTensor
from clockwork_serve.store.torch.archive import EXPORT, Archive, Json, Payload, known_layout, refuse
from clockwork_serve.store.trial import Dim, GraphTensor, Interface
from clockwork_serve.units import align

# ------------------------------------------------------------
# How the constants of a program become the blob that its code reads; arithmetic on arrays, without torch.
#
# Determined once per architecture, when the graph is rewritten, and the same for every copy: most constants
# are copied, and the normalisation that follows a convolution is folded into its constants.


BLOB_ALIGN = 256  # alignment of tensors in a blob, as loads of a GPU require
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class StoredConstant(Struct, frozen=True, kw_only=True):
    """One constant in the file: its entry, and how the tensor lies in it; strides in elements."""

    entry: str
    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def values(self, data: bytes) -> npt.NDArray[np.void]:
        """The raw elements in order. Raises ``ValueError`` if the entry is too short."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        count = len(data) // self.item_bytes
        if not math.prod(self.shape):
            return np.empty(self.shape, f"V{self.item_bytes}")
        if self.offset < 0 or min(self.stride, default=0) < 0 or last >= count:
            raise ValueError(f"{self.entry} has {len(data)} bytes, too few for {self.shape} {self.dtype}")
        flat = np.frombuffer(data, f"V{self.item_bytes}", count)[self.offset :]
        steps = [step * self.item_bytes for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False))


class Norm(Struct, frozen=True, kw_only=True):
    """A normalisation with fixed statistics, by the numbers of its constants (None: it has none)."""

    mean: int
    variance: int
    scale: int | None
    shift: int | None
    epsilon: float


class BlobPiece(Struct, frozen=True, kw_only=True):
    """How one tensor of the blob is made: copied from ``source``, or with ``norm`` folded in.

    ``bias``: it is the bias of a convolution (whose own is ``source``, if it has one), not its weight.
    """

    source: int | None
    norm: Norm | None = None
    bias: bool = False


class BlobRecipe(Struct, frozen=True, kw_only=True):
    """The file ``recipe.json`` of a code: a piece for every tensor of its index."""

    tensors: tuple[TorchTensor, ...]
    pieces: tuple[BlobPiece, ...]
    blob_bytes: int

    def blob(self, values: Callable[[int], npt.NDArray[np.void]]) -> Bytes:
        """The blob for constants by number. ``ValueError`` if a constant does not match the recipe."""
        blob = np.zeros(self.blob_bytes, np.uint8)
        for tensor, piece in zip(self.tensors, self.pieces, strict=True):
            made = _made(piece, values)
            if made.nbytes != tensor.size:
                raise ValueError(f"{tensor.name}: expected {tensor.size} bytes, found {made.nbytes}")
            blob[tensor.offset : tensor.offset + tensor.size] = made.reshape(-1).view(np.uint8)
        return blob

    def entries(self, sources: Sequence[StoredConstant]) -> list[str]:
        """The entries of the file that are read, each once."""
        numbers = [number for piece in self.pieces for number in _numbers(piece)]
        return list(dict.fromkeys(sources[number].entry for number in numbers))


def laid_out(named: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[tuple[TorchTensor, ...], int]:
    """Tensors (name, dtype, shape, bytes of an element) laid out in order, and the length of the blob."""
    tensors = []
    offset = 0
    for name, dtype, shape, item_bytes in named:
        size = math.prod(shape) * item_bytes
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors.append(
            TorchTensor(name=name, dtype=dtype, shape=shape, stride=stride, offset=offset, size=size)
        )
        offset += align(size, BLOB_ALIGN)
    return tuple(tensors), offset


def _numbers(piece: BlobPiece) -> list[int]:
    numbers = [piece.source]
    if piece.norm is not None:
        numbers += [piece.norm.mean, piece.norm.variance, piece.norm.scale, piece.norm.shift]
    return [number for number in numbers if number is not None]


def _made(piece: BlobPiece, values: Callable[[int], npt.NDArray[np.void]]) -> npt.NDArray[np.generic]:
    norm = piece.norm
    if norm is None:
        assert piece.source is not None, "what is not folded is copied"
        return values(piece.source)

    def floats(number: int) -> Floats:
        return values(number).view(np.float32)

    # Per channel in double precision, so that folding rounds once.
    factor = 1 / np.sqrt(floats(norm.variance).astype(np.float64) + norm.epsilon)
    if norm.scale is not None:
        factor = factor * floats(norm.scale)
    if not piece.bias:
        assert piece.source is not None, "a convolution has a weight"
        weight = floats(piece.source)
        shape = (-1, *[1] * (weight.ndim - 1))
        folded: Floats = weight * factor.astype(np.float32).reshape(shape)
        return folded
    bias = 0.0 if piece.source is None else floats(piece.source).astype(np.float64)
    shifted = (bias - floats(norm.mean)) * factor
    if norm.shift is not None:
        shifted = shifted + floats(norm.shift)
    return np.asarray(shifted, np.float32)


# ------------------------------------------------------------
# Inputs, outputs and constants of a torch.export program, read from its JSON without torch or weights.
#
# ``text`` is a canonical form: names of constants and descriptions are left out, so that programs of one
# architecture have equal texts, independent of their weights and of their export.


OIP_OF = {
    1: "UINT8", 2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64", 6: "FP16", 7: "FP32", 8: "FP64", 12: "BOOL",
    13: "BF16", 28: "UINT16", 34: "UINT32", 35: "UINT64",
}  # fmt: skip
"""The Open Inference Protocol's types by torch's numbers of element types in the program's record."""
_DTYPES = {
    1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 6: ("float16", 2),
    7: ("float32", 4), 8: ("float64", 8), 9: ("complex32", 4), 10: ("complex64", 8), 11: ("complex128", 16),
    12: ("bool", 1), 13: ("bfloat16", 2), 28: ("uint16", 2), 29: ("float8_e4m3fn", 1), 30: ("float8_e5m2", 1),
    34: ("uint32", 4), 35: ("uint64", 8),
}  # fmt: skip
_SYMBOL = re.compile(r"Symbol\('(\w+)'.*\)|(\w+)")
_SPEC_NAMES = {
    "parameter": "parameter_name",
    "buffer": "buffer_name",
    "tensor_constant": "tensor_constant_name",
}
_NOT_COMPUTED = frozenset(
    {"hint", "metadata", "requires_grad", "is_hop_single_tensor_return", "parameter_name", "buffer_name"}
) | {"tensor_constant_name", "persistent"}
_LARGEST_DIM = 1 << 31


@dataclass(frozen=True)
class Program:
    """A checked program. ``sources`` are its constants, each once; ``constants`` number them by placeholder.

    ``ranges`` are the sizes that each free dimension may have. ``inputs`` are placeholders in calling order.
    """

    archive: Archive
    interface: Interface
    inputs: tuple[str, ...]
    sources: tuple[StoredConstant, ...]
    constants: dict[str, int]
    ranges: dict[str, tuple[int, int]]
    text: str


def read_program(archive: Archive) -> Program:
    """The program of an archive. Raises ``ProblemError`` if its inputs or outputs cannot be served."""
    with known_layout():
        return _program(archive)


def _program(archive: Archive) -> Program:
    module = archive.program["graph_module"]
    graph, signature = module["graph"], module["signature"]
    sources: dict[StoredConstant, int] = {}
    constants: dict[str, int] = {}
    inputs: list[str] = []
    for spec in signature["input_specs"]:
        ((kind, found),) = spec.items()
        if kind in _SPEC_NAMES:
            payload = archive.tensors.get(found[_SPEC_NAMES[kind]])
            if payload is None:
                refuse(f"the values of {found[_SPEC_NAMES[kind]]}", "none in the file", EXPORT)
            constants[found["arg"]["name"]] = sources.setdefault(_source(payload), len(sources))
        elif kind == "user_input":
            inputs.append(_tensor_name(found["arg"], f"input {len(inputs)}"))
        elif kind != "constant_input":
            refuse("inputs that are tensors", f"a {kind}", "export the model without custom objects")
    outputs = [_output(spec) for spec in signature["output_specs"]]
    if not outputs:
        refuse("at least one output", "none", "export the model again")
    values = graph["tensor_values"]
    interface = Interface(
        tuple(_graph_tensor(name, values[name], f"input '{name}'") for name in inputs),
        tuple(
            _graph_tensor(shown, values[name], f"output '{shown}'")
            for shown, name in zip(_output_names(module, len(outputs)), outputs, strict=True)
        ),
    )
    names = {name: f"c{number}" for name, number in constants.items()}
    names |= {name: f"in{number}" for number, name in enumerate(inputs)}
    ranges = {name: _range(found) for name, found in archive.program["range_constraints"].items()}
    text = json.dumps(
        {
            "graph": _plain(graph, names),
            "signature": _plain(signature, names),
            "ranges": ranges,
            "constants": [(source.dtype, source.shape) for source in sources],
            "opsets": archive.program.get("opset_version"),
        },
        sort_keys=True,
    )
    return Program(archive, interface, tuple(inputs), tuple(sources), constants, ranges, text)


def _tensor_name(arg: Json, where: str) -> str:
    if "as_tensor" not in arg:
        refuse(
            f"{where} to be a tensor",
            f"{next(iter(arg), 'nothing')}",
            "export the model with tensors as inputs",
        )
    return str(arg["as_tensor"]["name"])


def _output(spec: Json) -> str:
    ((kind, found),) = spec.items()
    if kind != "user_output":
        refuse(
            "a program that keeps nothing between calls", f"a {kind.replace('_', ' ')}",
            "export it after model.eval(), without buffers that forward() writes",
        )  # fmt: skip
    return _tensor_name(found["arg"], "every output")


def _output_names(module: Json, count: int) -> list[str]:
    """Keys where the model returns a dictionary of tensors, else ``output__0`` and so on."""
    plain = [f"output__{number}" for number in range(count)]
    try:
        tree = json.loads(module["module_call_graph"][0]["signature"]["out_spec"])[1]
        keys = json.loads(tree["context"])
        leaves = all(child["type"] is None and not child["children_spec"] for child in tree["children_spec"])
    except (ValueError, TypeError, KeyError, IndexError):
        return plain
    named = isinstance(keys, list) and len(keys) == count and leaves
    return keys if named and all(isinstance(key, str) and key for key in keys) else plain


def _graph_tensor(name: str, meta: Json, where: str) -> GraphTensor:
    if meta["dtype"] not in OIP_OF:
        dtype = _DTYPES.get(meta["dtype"], ("unknown", 0))[0]
        refuse(
            f"an element type of the Open Inference Protocol for {where}",
            dtype,
            "convert it inside the model",
        )
    return GraphTensor(name, OIP_OF[meta["dtype"]], tuple(_dim(size) for size in meta["sizes"]))


def _dim(size: Json) -> Dim:
    if "as_int" in size:
        return int(size["as_int"])
    text = str(size["as_expr"]["expr_str"])
    match = _SYMBOL.fullmatch(text)
    return text if match is None else str(match[1] or match[2])


def _range(found: Json) -> tuple[int, int]:
    least, most = found.get("min_val"), found.get("max_val")
    return (
        0 if least is None else int(least),
        _LARGEST_DIM if most is None else min(int(most), _LARGEST_DIM),
    )


def _source(payload: Payload) -> StoredConstant:
    meta = payload.meta
    if meta["dtype"] not in _DTYPES or meta["layout"] != 7:
        refuse("weights that are dense tensors", "another layout or element type", "convert them first")
    dtype, item_bytes = _DTYPES[meta["dtype"]]
    return StoredConstant(
        entry=payload.entry, dtype=dtype, item_bytes=item_bytes,
        shape=tuple(int(size["as_int"]) for size in meta["sizes"]),
        stride=tuple(int(step["as_int"]) for step in meta["strides"]),
        offset=int(meta["storage_offset"]["as_int"]),
    )  # fmt: skip


def _plain(value: Any, names: dict[str, str]) -> Any:
    """A JSON value without what does not affect results, with values renamed."""
    if isinstance(value, dict):
        return {
            names.get(key, key): (
                names.get(each, each) if key == "name" and isinstance(each, str) else _plain(each, names)
            )
            for key, each in value.items()
            if key not in _NOT_COMPUTED
        }
    return [_plain(each, names) for each in value] if isinstance(value, list) else value


def renamed(found: Iterable[GraphTensor], stated: Iterable[str], role: str) -> tuple[GraphTensor, ...]:
    """Tensors with their declared names: ``NAME__2`` is the third one, as in Triton.

    Outputs have no names in a program, so declared names without numbers are assigned in order.
    """
    tensors, names = list(found), list(stated)
    known = {tensor.name for tensor in tensors}
    if not names or set(names) <= known:
        return tuple(tensors)
    numbers = [re.fullmatch(r".+__(\d+)", name) for name in names]
    chosen = {int(match[1]): name for match, name in zip(numbers, names, strict=True) if match}
    if len(chosen) == len(names):
        wrong = [name for number, name in chosen.items() if number >= len(tensors)]
        if wrong:
            refuse(f"{len(tensors)} {role}", f"the declared '{wrong[0]}'", "number them from __0")
    elif role == "outputs" and len(names) == len(tensors):
        chosen = dict(enumerate(names))
    elif role == "outputs":
        refuse(
            f"a declaration of all {len(tensors)} outputs in their order", f"{len(names)} of them",
            f"declare all, or use {', '.join(sorted(known))}",
        )  # fmt: skip
    else:
        return tuple(tensors)
    return tuple(
        GraphTensor(chosen.get(number, tensor.name), tensor.datatype, tensor.dims)
        for number, tensor in enumerate(tensors)
    )
