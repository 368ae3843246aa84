"""Writes requests down as a scenario: a TOML file, and a file of calls for each of its loads.

Requests are taken one by one, in about their order, and memory does not grow with their number. What a person
asks to be otherwise (a part of the time, more or fewer requests, bursts, another model) is done on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ConfigError, did_you_mean
from clockwork_serve.units import NS_PER_MS, NS_PER_S, counted
from clockwork_serve.workload.processes import share_of
from clockwork_serve.workload.scenario import LARGEST_FILE
from clockwork_serve.workload.tables import NO_SLO_MS
from clockwork_serve.workload.trace_files import wrong
from clockwork_serve.workload.traffic import LoggedRequest, RequestClass

FOLLOWS_NS: Final = NS_PER_S  # a request that comes once more comes so much later at most
BACK_NS: Final = 60 * NS_PER_S
"""Rows may be so much earlier than those before them: logs tell of ends, and several processes write."""
GAP_NS: Final = 60 * NS_PER_S
GAP_TIMES: Final = 20  # a gap is told if it is so long, and so many times the mean one
LOADS_MAX: Final = 1000
_BUFFERED: Final = 4096
_NO_SLO_NS: Final = round(NO_SLO_MS * NS_PER_MS)
_SHOWN: Final = 5


class Burst(Struct, frozen=True):
    """``times`` the requests from ``from_ns`` on, for ``length_ns``; instants of the scenario."""

    times: float
    from_ns: int
    length_ns: int


class TrafficChanges(Struct, frozen=True, kw_only=True):
    """What a person wants otherwise than the source has it.

    ``from_ns`` and ``to_ns`` are on the source's axis if ``absolute``, else from its first request on.
    ``added``: models and their rates. ``slo_ms``: the SLO of all requests. ``kinds``: by model, of which kind
    it is; by "": all others.
    """

    from_ns: int | None = None
    to_ns: int | None = None
    absolute: bool = False
    scale: float = 1.0
    bursts: tuple[Burst, ...] = ()
    added: tuple[tuple[str, float], ...] = ()
    slo_ms: float | None = None
    kinds: dict[str, str] = {}


class Transcript(Struct, frozen=True, kw_only=True):
    """What was written: the scenario's file and those beside it, and what there is in it.

    ``left_out``: requests outside of the chosen part; ``unprofiled``: models without a row in the zoo.
    """

    scenario: str
    files: list[str]
    seconds: float
    requests: int
    left_out: int
    models: int
    loads: dict[str, int]
    unprofiled: list[str]
    notes: list[str]


class _LoadFile:
    """The calls of one load; its SLO is ``slo_ns`` as long as all have that one (-1: they have several)."""

    def __init__(self, name: str, path: Path, whose: RequestClass) -> None:
        self.name, self.path, self.whose = name, path, whose
        self.count = 0
        self.first_ns = 0
        self.slo_ns = 0
        self.models: dict[str, None] = {}
        self._rows = ["seconds,function,slo_ms\n"]
        self._began = False

    def add(self, at_ns: int, model: str, slo_ns: int) -> None:
        """Add a call."""
        if not self.count:
            self.first_ns, self.slo_ns = at_ns, slo_ns
        elif at_ns < self.first_ns:
            self.first_ns = at_ns
        if slo_ns != self.slo_ns:
            self.slo_ns = -1
        self.count += 1
        self.models[model] = None
        whole, part = divmod(abs(at_ns), NS_PER_S)
        slo = f"{slo_ns // NS_PER_MS}.{slo_ns % NS_PER_MS:06d}" if 0 < slo_ns < _NO_SLO_NS else ""
        self._rows.append(f"{'-' if at_ns < 0 else ''}{whole}.{part:09d},{model},{slo}\n")
        if len(self._rows) >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        with self.path.open("a" if self._began else "w", encoding="utf-8") as file:
            file.writelines(self._rows)
        self._began = True
        self._rows.clear()


class Transcriber:
    """Takes the requests of ``source``, and writes them down as the scenario ``out``.

    Raises :class:`ConfigError` where that file is there already, or cannot be written.
    """

    def __init__(self, source: Path, out: Path, changes: TrafficChanges) -> None:
        if out.suffix != ".toml" or not out.absolute().parent.is_dir() or out.exists():
            raise ConfigError(
                f"out: expected a new file NAME.toml in a folder that exists, found {out}; name another"
            )
        self._source, self._out, self._changes = source, out, changes
        self._loads: dict[RequestClass, _LoadFile] = {}
        self._first_line: dict[str, int] = {}
        self._origin_ns: int | None = None
        self._from_ns: int | None = None
        self._to_ns: int | None = None
        self._earliest_ns = self._latest_ns = self._last_ns = 0
        self._seen = self._left_out = 0
        self._gaps = self._gap_ns = self._gap_line = 0

    def take(self, request: LoggedRequest) -> None:
        """The next request. Raises :class:`ConfigError` where the source's clock went far back."""
        if self._origin_ns is None:
            self._origin_ns = self._begin(request.at_ns)
        at_ns = request.at_ns - self._origin_ns
        self._look_at_clock(at_ns, request.line)
        self._seen += 1
        if not self._chosen(at_ns):
            self._left_out += 1
            return
        load = self._load(request.whose)
        self._first_line.setdefault(request.model, request.line)
        for number in range(self._copies(at_ns)):
            again_ns = at_ns
            if number:
                again_ns += 1 + int(share_of(f"{self._seen}+{number}") * FOLLOWS_NS)
                if not self._chosen(again_ns):
                    continue
            self._earliest_ns = min(self._earliest_ns, again_ns)
            self._last_ns = max(self._last_ns, again_ns)
            load.add(again_ns, request.model, request.slo_ns)

    def _begin(self, at_ns: int) -> int:
        """With the first request, choose where the scenario's axis has its zero, and its edges on that."""
        changes, origin_ns = self._changes, at_ns
        if changes.absolute and changes.from_ns is not None:
            origin_ns = changes.from_ns
            self._latest_ns = at_ns - origin_ns
        offset_ns = origin_ns if changes.absolute else 0
        self._from_ns = None if changes.from_ns is None else changes.from_ns - offset_ns
        self._to_ns = None if changes.to_ns is None else changes.to_ns - offset_ns
        return origin_ns

    def _look_at_clock(self, at_ns: int, line: int) -> None:
        gap_ns = at_ns - self._latest_ns
        if gap_ns < -BACK_NS:
            raise wrong(
                self._source, line, "time", f"at most {BACK_NS // NS_PER_S} s less than in a row before",
                f"{-gap_ns / NS_PER_S:g} s less", "the clock was set back: sort the rows, or cut them there",
            )  # fmt: skip
        if gap_ns > GAP_NS:
            self._gaps += 1
            if gap_ns > self._gap_ns:
                self._gap_ns, self._gap_line = gap_ns, line
        self._latest_ns = max(self._latest_ns, at_ns)

    def _chosen(self, at_ns: int) -> bool:
        return (self._from_ns is None or at_ns >= self._from_ns) and (
            self._to_ns is None or at_ns < self._to_ns
        )

    def _copies(self, at_ns: int) -> int:
        """How many requests come instead of the one that was seen last."""
        times = self._changes.scale
        start_ns = self._from_ns or 0
        for burst in self._changes.bursts:
            if 0 <= at_ns - start_ns - burst.from_ns < burst.length_ns:
                times *= burst.times
        return int(times) + (share_of(str(self._seen)) < times - int(times))

    def _load(self, whose: RequestClass) -> _LoadFile:
        found = self._loads.get(whose)
        if found is not None:
            return found
        if len(self._loads) == LOADS_MAX:
            raise ConfigError(
                f"{self._source}: expected at most {LOADS_MAX} tenants and classes; found more; split it"
            )
        name = whose.tenant or "requests"
        if whose.priority:
            name = f"{name} of priority {whose.priority}"
        if whose.decide_ns >= 0:
            name = f"{name} decided in {whose.decide_ns / NS_PER_MS:g} ms"
        name = re.sub(r"[^\w .@+-]", "_", name).strip() or "_"
        taken = {load.name for load in self._loads.values()}
        while name in taken:
            name += "_"
        path = self._out.with_name(f"{self._out.stem}.{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.csv")
        if any(load.path == path for load in self._loads.values()):
            path = path.with_suffix(f".{len(self._loads)}.csv")
        self._loads[whose] = load = _LoadFile(name, path, whose)
        return load

    def finish(
        self, notes: list[str], *, zoo: str, kinds: Mapping[str, str] | None,
        cluster: Mapping[str, Any] | None = None, tenants: Mapping[str, Mapping[str, Any]] | None = None,
        known: Callable[[str], bool] = lambda kind: True, strict: bool = False,
    ) -> Transcript:  # fmt: skip
        """Write all that is left, and the scenario itself.

        ``notes``: what the source could not tell. ``zoo`` has the kinds that are ``known``; ``kinds`` are the
        models' own. With ``strict`` a model without a profile is an error, which names its first line. Raises
        :class:`ConfigError` where there is no request.
        """
        loads = [load for load in self._loads.values() if load.count]
        if not loads:
            left = (
                f" but {counted(self._left_out, 'request')} outside of the chosen part"
                if self._left_out
                else ""
            )
            raise ConfigError(
                f"{self._source}: expected requests, found none{left}; choose another part, or source"
            )
        kind_of, unprofiled = self._kinds(loads, kinds or {}, known)
        if strict and unprofiled:
            self._complain(unprofiled[0], zoo)
        notes = [*notes, *self._told(zoo, unprofiled)]
        for load in loads:
            load.flush()
        seconds = self._seconds()
        text = _toml(
            self._out.stem, self._source.name, seconds, notes,
            [
                ("cluster", {"zoo": zoo, **(cluster or {})}),
                *(("[models]", {"name": name, "kind": kind}) for name, kind in kind_of.items()),
                *(("[tenants]", {"name": name, **(tenants or {}).get(name, {})}) for name in _tenants(loads)),
                *(("[loads]", self._table(load)) for load in loads),
                *(("[loads]", self._added(name, rps)) for name, rps in self._changes.added),
            ],
        )  # fmt: skip
        if len(text.encode()) > LARGEST_FILE:
            raise ConfigError(
                f"{self._source}: expected models and loads that fit in a scenario of {LARGEST_FILE} bytes; "
                f"found {counted(len(kind_of), 'model')} in {counted(len(loads), 'load')}; choose fewer"
            )
        self._out.write_text(text, encoding="utf-8")
        return Transcript(
            scenario=str(self._out), files=[str(load.path) for load in loads], seconds=seconds,
            requests=sum(load.count for load in loads), left_out=self._left_out, models=len(kind_of),
            loads={load.name: load.count for load in loads}, unprofiled=unprofiled, notes=notes,
        )  # fmt: skip

    def discard(self) -> None:
        """Remove what was written of a transcript that is not finished."""
        for load in self._loads.values():
            load.path.unlink(missing_ok=True)

    def _start_ns(self) -> int:
        return self._earliest_ns if self._from_ns is None else self._from_ns

    def _seconds(self) -> float:
        length_ns = self._last_ns + 1 - self._start_ns()
        length_ns = -(-length_ns // NS_PER_MS) * NS_PER_MS
        return (length_ns if self._to_ns is None else self._to_ns - self._start_ns()) / NS_PER_S

    def _kinds(
        self, loads: list[_LoadFile], kinds: Mapping[str, str], known: Callable[[str], bool]
    ) -> tuple[dict[str, str], list[str]]:
        """The kind of each model, and the models whose kind is not known."""
        asked = self._changes.kinds
        names = dict.fromkeys(
            [*(name for load in loads for name in load.models), *(one for one, _ in self._changes.added)]
        )
        if extra := next((one for one in asked if one and one not in names), None):
            raise ConfigError(
                f"kind: expected a model that is asked for, found {extra!r}; {did_you_mean(extra, names)}"
            )
        found = {name: asked.get(name) or kinds.get(name) or name for name in names}
        if "" in asked:
            found = {name: kind if known(kind) else asked[""] for name, kind in found.items()}
        return found, [name for name, kind in found.items() if not known(kind)]

    def _complain(self, name: str, zoo: str) -> None:
        place = f"{self._source}:{self._first_line[name]}" if name in self._first_line else "add_model"
        raise ConfigError(
            f"{place}: model: expected one that has a profile in {zoo}, found {name!r}; add its row, or say "
            f"of which kind it is: --kind {name}=KIND"
        )

    def _told(self, zoo: str, unprofiled: list[str]) -> list[str]:
        said = []
        if self._left_out:
            said.append(f"{counted(self._left_out, 'request')} outside of the chosen part are left out")
        if self._gap_ns > max(GAP_NS, GAP_TIMES * max(1, self._latest_ns // max(1, self._seen))):
            said.append(
                f"{counted(self._gaps, 'gap')} of more than {GAP_NS // NS_PER_S} s, the longest of "
                f"{self._gap_ns / NS_PER_S:,.0f} s before line {self._gap_line}: they are kept"
            )
        if unprofiled:
            shown = ", ".join(unprofiled[:_SHOWN]) + (", ..." if len(unprofiled) > _SHOWN else "")
            said.append(
                f"{counted(len(unprofiled), 'model')} without a profile in {zoo} ({shown}): to simulate "
                "them, give --zoo FILE, or --kind MODEL=KIND"
            )
        return said

    def _table(self, load: _LoadFile) -> dict[str, Any]:
        start_ns = load.first_ns - self._start_ns()
        slo_ms = self._changes.slo_ms
        if slo_ms is None and 0 < load.slo_ns < _NO_SLO_NS:
            slo_ms = load.slo_ns / NS_PER_MS
        return {
            "name": load.name, "models": list(load.models), "arrivals": "timestamps", "trace": load.path.name,
            "mapping": "named", "slo_ms": slo_ms, "start_s": start_ns / NS_PER_S,
            "priority": load.whose.priority or None, "tenant": load.whose.tenant or None,
            "decide_ms": None if load.whose.decide_ns < 0 else load.whose.decide_ns / NS_PER_MS,
        }  # fmt: skip

    def _added(self, model: str, rps: float) -> dict[str, Any]:
        return {
            "name": f"added {model}", "models": [model], "arrivals": "poisson", "rate_rps": rps,
            "slo_ms": self._changes.slo_ms,
        }  # fmt: skip


def _tenants(loads: list[_LoadFile]) -> list[str]:
    return list(dict.fromkeys(load.whose.tenant for load in loads if load.whose.tenant))


def _toml(
    name: str, source: str, seconds: float, notes: list[str], tables: list[tuple[str, dict[str, Any]]]
) -> str:
    """A scenario as text; fields that are None are left out."""
    parts = [f"# Made from {source} by clockwork workload from.\n"]
    parts += [f"# - {note}\n" for note in notes]
    parts.append(_fields({"name": name, "seconds": seconds}))
    parts += [f"\n[{title}]\n{_fields(table)}" for title, table in tables]
    return "".join(parts)


def _fields(table: Mapping[str, Any]) -> str:
    return "".join(
        f"{key} = {msgspec.json.encode(value).decode()}\n"
        for key, value in table.items()
        if value is not None
    )
