"""Tables of profiled models, and the records that serve them; it measures nothing and runs nothing.

A table is a CSV file of the columns that ``workload/data/README.md`` describes: package data by name
(``v100``, the paper's models on the paper's GPU) or a user's own file by path; or what ``clockwork profile
--json`` prints, whose rows have the same columns.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ConfigError, printable
from clockwork_serve.messages import DATATYPES, Code, Model, Profile, TensorSpec, Weights
from clockwork_serve.units import MIB, NS_PER_MS

DEVICE_KIND: Final = "emulated:v100"
QUEUE_LIMIT: Final = 1 << 30  # simulated queues are bounded by deadlines alone, as the paper's are

PRECISIONS: Final = ("exact", "two_decimals", "rounded")
_INFER: Final = re.compile(r"infer_b([1-9][0-9]{0,3})_ms")
_NEEDED: Final = ("model", "weights_mb", "load_ms", "infer_b1_ms")
_OPTIONAL: Final = ("input_kb", "output_kb", "precision", "in_paper")
_NAME: Final = re.compile(r"[A-Za-z0-9_.+-]+")
FILES: Final = (".csv", ".json")  # how the names of a user's own tables end
_FLOAT_BYTES: Final = 4


class ZooModel(Struct, frozen=True, kw_only=True):
    """One row: a kind of model. Durations in ns by batch size, for the whole batch; sizes in bytes.

    ``rounded``: the source gave whole milliseconds only, good to about 0.5 ms. ``in_paper``: one of the
    paper's 61.
    """

    kind: str
    weights_bytes: int
    load_ns: int
    infer_ns: dict[int, int]
    input_bytes: int
    output_bytes: int
    rounded: bool
    in_paper: bool

    def batch_sizes(self, max_batch: int | None = None) -> tuple[int, ...]:
        """The profiled sizes, ascending, up to ``max_batch``."""
        return tuple(size for size in self.infer_ns if max_batch is None or size <= max_batch)


class Zoo:
    """A table of models by kind, in the order of its file."""

    def __init__(self, name: str, models: dict[str, ZooModel]) -> None:
        self.name = name
        self.models = models

    @staticmethod
    def read(source: str | Path, here: str = "") -> Zoo:
        """The built-in table of that name, or the file at that path; ConfigError naming what is wrong.

        ``here``: the machine on which a profile must have been measured.
        """
        file = _find(source)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"zoo {source}: expected a file in UTF-8; it cannot be read ({error})"
            ) from error
        if str(source).endswith(".json"):
            return Zoo.of(str(source), _profiled_rows(str(source), text, here))
        return Zoo.of(str(source), _rows(str(source), text))

    @staticmethod
    def of(source: str, rows: Iterable[tuple[str, dict[str, str]]]) -> Zoo:
        """The table of rows by column, each with its place; ConfigError naming what is wrong."""
        models: dict[str, ZooModel] = {}
        for where, row in rows:
            model = _model(where, row)
            if model.kind in models:
                raise ConfigError(f"{where}: model: expected each name once, found {model.kind!r} again")
            models[model.kind] = model
        if not models:
            raise ConfigError(f"zoo {source}: expected at least one row, found none")
        return Zoo(Path(source).stem, models)

    def __getitem__(self, kind: str) -> ZooModel:
        """The row of that kind; ConfigError naming near ones if there is none."""
        model = self.models.get(kind)
        if model is None:
            near = difflib.get_close_matches(kind, self.models, n=8) or list(self.models)[:8]
            raise ConfigError(
                f"kind: expected a model of zoo {self.name} ({', '.join(near)}, ...); found {kind!r}"
            )
        return model

    def paper_models(self) -> tuple[ZooModel, ...]:
        """The rows that the paper's own set contains: 61 of ``v100``."""
        return tuple(model for model in self.models.values() if model.in_paper)

    def code(self, kind: str, max_batch: int | None = None) -> Code:
        """A code whose id is the kind, with one FP32 input and output, of batch sizes up to ``max_batch``."""
        row = self[kind]
        return Code(
            code_id=kind, backend="emulated", path="", inputs=(_tensor("input", row.input_bytes),),
            outputs=(_tensor("output", row.output_bytes),), batched=True,
            batch_sizes=row.batch_sizes(max_batch), lifted=True,
        )  # fmt: skip

    def profile(self, kind: str, device_kind: str = DEVICE_KIND, slower: float = 1.0) -> Profile:
        """The row's durations, each ``slower`` times; ``load_ns(weights_bytes)`` is its LOAD exactly.

        No workspace is named: on the paper's GPUs 512 MiB of workspace and of I/O area are never short.
        """
        row = self[kind]
        load_ns = int(row.load_ns * slower)
        per_mib = load_ns * MIB // row.weights_bytes
        return Profile(
            code_id=kind, device_kind=device_kind,
            infer_ns={size: int(lasts_ns * slower) for size, lasts_ns in row.infer_ns.items()},
            load_base_ns=load_ns - (per_mib * row.weights_bytes >> 20), load_ns_per_mib=per_mib,
        )  # fmt: skip

    def model(self, name: str, kind: str, max_batch: int | None = None) -> Model:
        """A model ``name/1`` of that kind with weights of its own."""
        row = self[kind]
        sizes = row.batch_sizes(max_batch)
        return Model(
            key=f"{name}/1", name=name, version="1", code_id=kind,
            weights=Weights(weights_id=name, path="", size=row.weights_bytes), platform="emulated",
            max_batch_size=sizes[-1], batch_sizes=sizes, output_bytes=row.output_bytes,
            queue_limit=QUEUE_LIMIT,
        )  # fmt: skip


def _tensor(name: str, nbytes: int) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=(max(1, nbytes // _FLOAT_BYTES),))


def _find(source: str | Path) -> Traversable:
    if str(source).endswith(FILES):
        return Path(source)
    folder = files("clockwork_serve.workload") / "data"
    file = folder / f"{source}_zoo.csv"
    if not _NAME.fullmatch(str(source)) or not file.is_file():
        known = sorted(each.name[:-8] for each in folder.iterdir() if each.name.endswith("_zoo.csv"))
        raise ConfigError(
            f"zoo: expected a .csv or .json file, or one of {', '.join(known)}; found {str(source)!r}"
        )
    return file


def _rows(source: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row by column, with its ``FILE:LINE``; comment lines and empty ones are skipped."""
    header: list[str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{source}:{number}"
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        if header is None:
            header = cells
            _check_header(where, header)
            continue
        if len(cells) != len(header):
            raise ConfigError(f"{where}: expected {len(header)} fields as in the header, found {len(cells)}")
        yield where, dict(zip(header, cells, strict=True))


def check_machine(source: str, measured_on: str, here: str, kind: str) -> None:
    """Raise ConfigError for what was measured on another machine than ``here``, unless it was no real one."""
    if here and measured_on not in {"", here} and not kind.startswith("emulated"):
        raise ConfigError(
            f"zoo {source}: measured_on: expected a profile of {printable(here)}, found one of "
            f"{printable(measured_on)}; profile there, or say --foreign-profile"
        )


def _profiled_rows(source: str, text: str, here: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of what ``clockwork profile --json`` prints, by column, with its place."""
    try:
        found = msgspec.json.decode(text, type=_Profiled)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"zoo {source}: expected what clockwork profile --json prints, found {printable(str(error))}"
        ) from None
    tables = found.tables
    if len(tables) != 1:
        kinds = ", ".join(printable(kind) for kind in tables) or "none"
        raise ConfigError(
            f"zoo {source}: tables: expected those of one kind of device, found {kinds}; "
            "profile with one --device"
        )
    for kind, rows in tables.items():
        check_machine(source, found.measured_on, here, kind)
        for number, row in enumerate(rows):
            where = f"{source}: tables[{printable(kind)}][{number}]"
            _check_header(where, list(row))
            yield where, {name: str(value) for name, value in row.items()}


class _Profiled(Struct):
    tables: dict[str, list[dict[str, str | float]]]
    measured_on: str = ""


def row_of(kind: str, model: Model, code: Code, profile: Profile) -> dict[str, str | float]:
    """The row of a measured model, by column: what ``Zoo.read`` makes a kind of that name from.

    Of an input whose size requests choose, an open dimension counts as 1.
    """
    sizes = [
        (DATATYPES[spec.datatype] or _FLOAT_BYTES) * math.prod(max(1, size) for size in spec.shape)
        for spec in code.inputs
    ]
    return {
        "model": kind,
        "weights_mb": max(1, model.weights.size) / 10**6,
        "input_kb": sum(sizes) / 10**3,
        "output_kb": model.output_bytes / 10**3,
        "load_ms": max(1, profile.load_ns(model.weights.size)) / NS_PER_MS,
        **{f"infer_b{size}_ms": took_ns / NS_PER_MS for size, took_ns in sorted(profile.infer_ns.items())},
    }


def _check_header(where: str, header: list[str]) -> None:
    for name in _NEEDED:
        if name not in header:
            raise ConfigError(f"{where}: header: expected a column {name}, found {', '.join(header)}")
    for name in header:
        if name not in (*_NEEDED, *_OPTIONAL) and not _INFER.fullmatch(name):
            known = ", ".join((*_NEEDED, "infer_bN_ms", *_OPTIONAL))
            raise ConfigError(f"{where}: header: expected columns of {known}; found {name!r}")
        if header.count(name) > 1:
            raise ConfigError(f"{where}: header: expected each column once, found {name} twice")


def _model(where: str, row: dict[str, str]) -> ZooModel:
    kind = row["model"]
    if not _NAME.fullmatch(kind):
        raise ConfigError(f"{where}: model: expected letters, digits and . _ + -; found {kind!r}")
    curve = {
        int(match[1]): _ns(_number(where, name, row[name]))
        for name in row
        if (match := _INFER.fullmatch(name)) and (row[name] or match[1] == "1")
    }
    precision = row.get("precision") or "exact"
    if precision not in PRECISIONS:
        raise ConfigError(f"{where}: precision: expected one of {', '.join(PRECISIONS)}; found {precision!r}")
    in_paper = row.get("in_paper") or "yes"
    if in_paper not in {"yes", "no"}:
        raise ConfigError(f"{where}: in_paper: expected yes or no; found {in_paper!r}")
    return ZooModel(
        kind=kind, weights_bytes=_bytes(_number(where, "weights_mb", row["weights_mb"]), 10**6),
        load_ns=_ns(_number(where, "load_ms", row["load_ms"])), infer_ns=dict(sorted(curve.items())),
        input_bytes=_bytes(_number(where, "input_kb", row.get("input_kb") or "0", zero=True), 10**3),
        output_bytes=_bytes(_number(where, "output_kb", row.get("output_kb") or "0", zero=True), 10**3),
        rounded=precision == "rounded", in_paper=in_paper == "yes",
    )  # fmt: skip


def _number(where: str, field: str, cell: str, *, zero: bool = False) -> float:
    """A finite number above 0, or 0 where that is allowed."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        wanted = "a number of at least 0" if zero else "a number above 0"
        raise ConfigError(f"{where}: {field}: expected {wanted}; found {cell!r}")
    return value


def _ns(milliseconds: float) -> int:
    return max(1, round(milliseconds * NS_PER_MS))


def _bytes(amount: float, unit: int) -> int:
    return max(0, round(amount * unit))
