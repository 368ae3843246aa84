"""A scenario: one small TOML file that says what is asked of a server; it never says by whom it is answered.

The same file drives a simulation and a load generator: the tables ``cluster`` and ``faults`` speak to
simulations alone. Times in files are seconds and milliseconds, from the start of the run.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ConfigError, did_you_mean
from clockwork_serve.workload.tables import (
    NO_SLO_MS,
    ClusterTable,
    DeviceGroup,
    FaultTable,
    FieldError,
    LoadTable,
    ModelSet,
    Ramp,
    TenantTable,
    found,
    lines_of,
    require_between,
    require_finite,
    require_known,
    require_text,
    unfit,
)

__all__ = [
    "NO_SLO_MS", "ClusterTable", "FaultTable", "LoadTable", "ModelSet", "Ramp", "Scenario", "Source",
    "TenantTable", "check_kinds", "read_scenario",
]  # fmt: skip

ALL_KINDS: Final = "*"
LONGEST_S: Final = 1e8  # seconds of a run, some three years: an axis of ns in 64 bits holds more
LARGEST_FILE: Final = 1 << 20
_TABLES: Final[dict[str, type[Struct]]] = {
    "models": ModelSet, "loads": LoadTable, "tenants": TenantTable, "faults": FaultTable,
}  # fmt: skip
_TOP: Final = ("name", "seconds", "warmup_s", "cluster", "models", "loads", "tenants", "faults")
_AT: Final = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.*)`")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>.*)`")
_TYPES: Final = re.compile(r"Expected `(?P<expected>.*)`, got `(?P<got>.*)`")
_ENUM: Final = re.compile(r"Invalid enum value (?P<value>.*)")


Record = TypeVar("Record", bound=Struct)
_RAMPS: Final = ("slo_ramp", "rate_ramp", "model_ramp")


class Source(Struct, frozen=True, kw_only=True):
    """Where a scenario was read from: its file, and the lines of its keys by path."""

    file: str
    lines: dict[str, int]

    def place(self, path: str) -> str:
        """``FILE:LINE`` of a path, or of the closest table around it that the file has."""
        while path:
            if path in self.lines:
                return f"{self.file}:{self.lines[path]}"
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.file

    def at(self, path: str, what: str) -> ConfigError:
        """The error about one path: file, line, path, and ``what`` was expected and found."""
        return ConfigError(f"{self.place(path)}: {path}: {what}")


class Scenario(Struct, frozen=True, kw_only=True):
    """What is asked for during ``seconds``; the first ``warmup_s`` are left out of the counts.

    ``source`` is None for scenarios made in code.
    """

    name: str
    seconds: float
    models: tuple[ModelSet, ...]
    loads: tuple[LoadTable, ...]
    warmup_s: float = 0.0
    cluster: ClusterTable = ClusterTable()
    tenants: tuple[TenantTable, ...] = ()
    faults: tuple[FaultTable, ...] = ()
    source: Source | None = None

    def __post_init__(self) -> None:
        """Check what concerns several tables. Raises :class:`FieldError`."""
        require_text(self, ("name",))
        require_between(self, ("seconds",), 1e-6, LONGEST_S)
        require_finite(self, ("warmup_s",), least=0)
        if self.warmup_s >= self.seconds:
            raise unfit("warmup_s", f"less than seconds = {self.seconds:g}", self.warmup_s, "shorten it")
        for table in ("models", "loads", "tenants"):
            entries: tuple[ModelSet | LoadTable | TenantTable, ...] = getattr(self, table)
            if not entries and table != "tenants":
                raise unfit(table, f"at least one [[{table}]]", (), "add one")
            names = [entry.name for entry in entries]
            for index, name in enumerate(names):
                if name in names[:index]:
                    raise unfit(f"{table}[{index}].name", "each name once", name, "call it otherwise")
        self._check_loads()
        self._check_faults()

    def _check_loads(self) -> None:
        last_s = max(self.seconds if load.stop_s is None else load.stop_s for load in self.loads)
        if last_s <= self.warmup_s:
            raise unfit(
                "warmup_s", f"less than {last_s:g}, when the last load stops", self.warmup_s,
                "nothing would be counted; shorten it",
            )  # fmt: skip
        sets = [entry.name for entry in self.models]
        tenants = [entry.name for entry in self.tenants]
        for index, load in enumerate(self.loads):
            if load.tenant is not None:
                require_known(
                    f"loads[{index}].tenant", load.tenant, tenants, "the name of a [[tenants]] table"
                )
            for name in load.models:
                require_known(f"loads[{index}].models", name, sets, "the name of a [[models]] table")
            for field in ("start_s", "stop_s"):
                value = getattr(load, field)
                if value is not None and value > self.seconds:
                    raise unfit(
                        f"loads[{index}].{field}", f"at most seconds = {self.seconds:g}", value, "correct one"
                    )

    def _check_faults(self) -> None:
        devices = self.cluster.devices
        bounds = {"device": devices, "worker": devices // self.cluster.devices_per_worker}
        for index, fault in enumerate(self.faults):
            if fault.at_s > self.seconds:
                path = f"faults[{index}].at_s"
                raise unfit(path, f"at most seconds = {self.seconds:g}", fault.at_s, "correct one")
            for field, bound in bounds.items():
                value = getattr(fault, field)
                if value is not None and value >= bound:
                    path = f"faults[{index}].{field}"
                    raise unfit(path, f"less than the cluster's {bound}", value, "they count from 0")

    def wrong(self, path: str, what: str) -> ConfigError:
        """The error about one path of this scenario, with file and line if it was read from a file."""
        return (
            self.source.at(path, what)
            if self.source
            else ConfigError(f"scenario {self.name}: {path}: {what}")
        )


def read_scenario(path: str | Path) -> Scenario:
    """Read a scenario. Raises :class:`ConfigError` naming file, line, field, expected and found."""
    text = _read_text(Path(path))
    source = Source(file=str(path), lines=lines_of(text))
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        line = re.search(r"\(at line (\d+),", str(error))
        place = f"{path}:{line.group(1)}" if line else f"{path}:{text.count(chr(10)) + 1}"
        raise ConfigError(f"{place}: expected valid TOML, found: {error}; correct that line") from None
    for name in values:
        if name not in _TOP:
            raise source.at(name, f"expected a known key, found {name!r}; {did_you_mean(name, _TOP)}")
    plain: dict[str, Any] = {key: values[key] for key in ("name", "seconds", "warmup_s") if key in values}
    if "cluster" in values:
        plain["cluster"] = _record(source, "cluster", values["cluster"], ClusterTable)
    for table, kind in _TABLES.items():
        rows = values.get(table, [])
        if not isinstance(rows, list):
            raise source.at(table, f"expected [[{table}]] tables, found {found(rows)}; write [[{table}]]")
        plain[table] = tuple(_record(source, f"{table}[{i}]", row, kind) for i, row in enumerate(rows))
    return _record(source, "", {**plain, "source": source}, Scenario)


def check_kinds(scenario: Scenario, kinds: Iterable[str]) -> None:
    """Every model set is of one of these kinds. Raises :class:`ConfigError` naming file, line and field."""
    known = tuple(kinds)
    for index, entry in enumerate(scenario.models):
        if entry.kind != ALL_KINDS and entry.kind not in known:
            advice = did_you_mean(entry.kind, known)
            raise scenario.wrong(
                f"models[{index}].kind",
                f"expected a kind of model in the zoo, found {entry.kind!r}; {advice}",
            )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(
                f"{path}: expected a scenario of at most {LARGEST_FILE} bytes; is it another file?"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a readable scenario, found: {error.strerror}; check the path"
        ) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: expected UTF-8, found other bytes; save it as UTF-8") from None


def _record(source: Source, path: str, values: object, kind: type[Record]) -> Record:
    """One table as its record; errors of msgspec and of the record itself become ours."""
    prefix = f"{path}." if path else ""
    if isinstance(values, dict) and kind is LoadTable:
        ramps = {key: _record(source, prefix + key, values[key], Ramp) for key in _RAMPS if key in values}
        values = {**values, **ramps}
    if isinstance(values, dict) and kind is ClusterTable and isinstance(values.get("groups"), list):
        rows = enumerate(values["groups"])
        values = {
            **values,
            "groups": [_record(source, f"{prefix}groups[{i}]", row, DeviceGroup) for i, row in rows],
        }
    try:
        return msgspec.convert(values, kind)
    except FieldError as error:
        raise source.at(prefix + error.field, error.what) from None
    except msgspec.ValidationError as error:
        matched = _AT.match(str(error))
        assert matched is not None
        inner = (matched.group("path") or "$").removeprefix("$").removeprefix(".")
        raise _explained(source, (prefix + inner).rstrip("."), matched.group("what"), values, kind) from None


def _explained(source: Source, path: str, what: str, values: object, kind: type[Struct]) -> ConfigError:
    """A message of msgspec in the form of ours."""
    dot = f"{path}." if path else ""
    if match := _UNKNOWN.match(what):
        name = match.group("name")
        advice = did_you_mean(name, kind.__struct_fields__)
        return source.at(dot + name, f"expected a known field, found {name!r}; {advice}")
    if match := _MISSING.match(what):
        return source.at(dot + match.group("name"), "expected a value, found none; add it")
    field = path.rpartition(".")[2].partition("[")[0]
    value = values.get(field, values) if isinstance(values, dict) else values
    if match := _TYPES.match(what):
        expected = match.group("expected").replace(" | null", "")
        expected = expected.replace("object", "table").replace("array", "list")
        return source.at(path, f"expected {expected}, found {found(value)}; correct it")
    if _ENUM.match(what):
        choices = _choices(kind, field)
        shown = ", ".join(choices)
        return source.at(
            path, f"expected one of {shown}, found {found(value)}; {did_you_mean(str(value), choices)}"
        )
    return source.at(path, f"expected otherwise, found {found(value)}: {what}")


def _choices(kind: type[Struct], field: str) -> tuple[str, ...]:
    """The values that a field of named choices takes."""
    types = [info.type for info in msgspec.structs.fields(kind) if info.name == field]
    named = [part for one in types for part in (one, *get_args(one)) if get_origin(part) is Literal]
    return tuple(str(value) for part in named for value in get_args(part))
