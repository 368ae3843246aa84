"""Asks the store's compiler whether it batches a graph, and serves what it batched as a worker would."""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows.graph import Array
from benchmarks.rows.judge import (
    POISONS,
    Arrays,
    Refused,
    Rows,
    Specs,
    gap_of,
    plain_rows,
    poisoned,
    rounding_of,
    runner,
    session_of,
    unsettled,
)
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build
from clockwork_serve.devices.base import NUMPY_DTYPES
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Extent
from clockwork_serve.store import Cache, Compiler, ServedVersion, StoreConfig
from clockwork_serve.store.optimiser import Optimiser
from clockwork_serve.store.repository import Entry
from clockwork_serve.store.settings import ModelSettings, ProblemError
from clockwork_serve.units import MIB
from harness import records

SWEPT_AFTER = 400
"""Graphs after which the cache is emptied: nothing in it is asked for again."""
_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made there, whose syncs cost nothing
_PAGE = 1 * MIB
_ROOM = 1 << 18
_SLACK = 10
"""How much more than between batch sizes an optimised graph may differ from one that is not."""


def in_memory() -> str | None:
    """A folder for temporary folders that no disk is behind; None: the usual one."""
    return str(_MEMORY) if _MEMORY.is_dir() else None


@dataclass(frozen=True, slots=True)
class Said:
    """What the store says of a graph. ``why`` is its first warning, or why it does not compile."""

    batched: bool
    why: str
    served: ServedVersion | None


class Store:
    """A compiler on a cache that lasts for some graphs."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rows-", dir=in_memory()))
        self._optimiser = Optimiser()
        self._asked = 0
        self._open()

    def _open(self) -> None:
        config = StoreConfig(cache_dir=str(self._folder / "cache"))
        self._cache = Cache(config.cache_dir)
        self._compiler = Compiler(self._cache, config, self._optimiser)

    def ask(self, model: bytes, settings: ModelSettings | None = None) -> Said:
        """Compile it, as detection decides, or as ``settings`` wish."""
        self._asked += 1
        if self._asked % SWEPT_AFTER == 0:
            self._cache.close()
            shutil.rmtree(self._folder / "cache")
            self._open()
        place = self._folder / "models" / "graph" / "1"
        place.mkdir(parents=True, exist_ok=True)
        (place / "model.onnx").write_bytes(model)
        entry = Entry(
            name="graph", path=str(place.parent), root=str(place.parent.parent), backend="onnx",
            versions=(1,), present=(1,), settings=settings or ModelSettings(),
        )  # fmt: skip
        try:
            served = self._compiler.compile(entry, 1)
        except ProblemError as error:
            return Said(batched=False, why=f"does not compile: {error.problem.found}", served=None)
        except Exception as error:  # noqa: BLE001 - a fault of the compiler, which a server survives, too
            return Said(batched=False, why=f"compiler's fault: {type(error).__name__}: {error}", served=None)
        why = served.model.warnings[0] if served.model.warnings else ""
        return Said(batched=served.model.max_batch_size > 1, why=why, served=served)

    def close(self) -> None:
        """Remove what was stored."""
        self._cache.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def device(memory_bytes: int = 64 * MIB) -> Iterator[Device]:
    """A device as a worker has it."""
    config = DeviceConfig(
        device="cpu:0", memory_bytes=memory_bytes, page_bytes=_PAGE, io_bytes=64 * MIB, warm_up_ns=0
    )
    made = build(config)
    try:
        yield made
    finally:
        made.close()


@dataclass(slots=True)
class Company:
    """Answers in company: how many were asked for, refused, wrong, and the first that was.

    ``unsettled`` ones differ by no more than they do alone when the last bits of their input change;
    ``optimised`` ones are what ONNX Runtime itself gives, alone, once it has optimised the graph.

    ``unopened`` says why the device could not even load what was compiled.
    """

    answers: int = 0
    refused: int = 0
    wrong: int = 0
    unsettled: int = 0
    optimised: int = 0
    first: str = ""
    unopened: str = ""

    def note(self, text: str) -> None:
        """One more wrong answer."""
        self.wrong += 1
        self.first = self.first or text


def serve(
    on: Device, served: ServedVersion, model: bytes, rows: Rows, seed: int, *, light: bool = False
) -> Company:
    """A model's answers in company, at each batch size, place, order and padding, against plain ones alone.

    ``light``: fewer of them.
    """
    plain = runner(session_of(model))
    company = Company()
    dice = np.random.default_rng(seed)
    try:
        load(on, served)
    except DeviceError as error:
        company.unopened = str(error)
        return company
    allowed = _SLACK * rounding_of(array.dtype for array in rows.arrays.values())
    alone: dict[int, Sequence[Array]] = {}
    for number in range(2 if light else 4):
        with contextlib.suppress(Refused):
            alone[number] = plain(rows.take([number]))
    for size in served.code.batch_sizes if alone else ():
        for poison in ("rows", "large") if light else ("rows", *POISONS):
            number = int(dice.choice(list(alone)))
            count = size if size < 4 or dice.random() < 0.5 else int(dice.integers(size // 2 + 1, size + 1))
            place = int(dice.integers(0, count))
            chosen = [int(each) for each in dice.integers(len(rows), size=count)]
            chosen[place] = number
            batch = rows.take(chosen)
            other = batch if poison == "rows" else poisoned(Rows(batch), poison, dice).arrays
            for name, array in batch.items():
                other[name][place] = array[place]
            company.answers += 1
            try:
                answer = _answers(on, served, other, size)[place]
            except (DeviceError, ModelError):
                company.refused += 1
                continue
            gap = _gap(answer, served, alone[number], allowed)
            if gap and unsettled(plain, rows.take([number]), alone[number], allowed, dice):
                company.unsettled += 1
            elif gap and not _gap(answer, served, _optimised(model, rows.take([number])), allowed):
                company.optimised += 1
            elif gap:
                company.note(f"row {place} of {count} in a batch of {size}, beside {poison}: {gap}")
    on.retire(served.code.code_id)
    return company


def _optimised(model: bytes, row: Arrays) -> Sequence[Array]:
    """What ONNX Runtime answers to one row with the optimisations that are its default."""
    return runner(session_of(model, optimised=True))(row)


def load(on: Device, served: ServedVersion) -> None:
    """Its code prepared, its weights at the first page."""
    on.prepare(served.code)
    on.load(records.load(served.model, _extent(served)))


def _extent(served: ServedVersion) -> Extent:
    return Extent(0, max(1, -(-served.model.weights.size // _PAGE)))


def _answers(on: Device, served: ServedVersion, batch: Arrays, size: int) -> list[CallBuffers]:
    """Requests of one row each, answered together in a batch of ``size``, padded by the device."""
    count = len(next(iter(batch.values())))
    calls = [_call(served, batch, number) for number in range(count)]
    on.infer(records.infer(served.model, _extent(served), [1] * count, batch=size), calls)
    return calls


def _gap(call: CallBuffers, served: ServedVersion, wanted: Sequence[Array], allowed: float) -> str:
    """How an answer differs from what it is alone; empty if it does not."""
    for spec, single in zip(served.code.outputs, wanted, strict=True):
        gap = gap_of(_output(call, spec.name).ravel(), as_served(single).ravel())
        if gap > (allowed if single.dtype.kind == "f" else 0.0):
            return f"output {spec.name} is {gap:.1e} off"
    return ""


def alone(on: Device, served: ServedVersion, given: Arrays) -> list[Array]:
    """One request as it is given, its outputs in the code's order."""
    rows = len(next(iter(given.values()))) if served.code.batched else 1
    call = _in_memory(given, max(served.model.output_bytes, _ROOM))
    on.infer(records.infer(served.model, _extent(served), [rows]), [call])
    return [_output(call, spec.name) for spec in served.code.outputs]


def _call(served: ServedVersion, batch: Arrays, number: int) -> CallBuffers:
    known = all(spec.row_bytes is not None for spec in served.code.outputs)
    room = max(served.model.output_bytes, _ROOM) if known else _ROOM
    return _in_memory({name: array[number : number + 1] for name, array in batch.items()}, room)


def _in_memory(given: Arrays, room: int) -> CallBuffers:
    """A request as its gateway puts it into memory."""
    inputs: dict[str, Any] = {name: as_served(array) for name, array in given.items()}
    return CallBuffers(inputs=inputs, output=memoryview(bytearray(b"\xaa" * room)))


def as_served(array: Array) -> Array:
    """Texts as bytes, as they come from a gateway."""
    if array.dtype != object:
        return array
    flat = [each.encode() if isinstance(each, str) else each for each in array.ravel().tolist()]
    made = np.empty(len(flat), object)
    made[:] = flat
    return made.reshape(array.shape)


def _output(call: CallBuffers, name: str) -> Array:
    ref = next(ref for ref in call.outputs if ref.name == name)
    if ref.datatype != "BYTES":
        return np.ndarray(ref.shape, NUMPY_DTYPES[ref.datatype], buffer=call.output, offset=ref.offset)
    found, start = [], ref.offset
    while start < ref.offset + ref.nbytes:
        (length,) = struct.unpack_from("<I", call.output, start)
        found.append(bytes(call.output[start + 4 : start + 4 + length]))
        start += 4 + length
    made = np.empty(len(found), object)
    made[:] = found
    return made.reshape(ref.shape)


def some_rows(specs: Specs, seed: int, lows: Mapping[str, int] | None = None) -> Rows:
    """Rows to serve."""
    return plain_rows(specs, 24, np.random.default_rng(seed), lows)
