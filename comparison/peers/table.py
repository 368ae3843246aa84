"""Tables of what was measured, as Markdown and JSON: every figure comes from a result's file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from comparison.peers.loads import LOADS
from comparison.peers.record import main_figures, shown, spread
from harness.report import between_marks, page_row

Result = dict[str, Any]
_COLUMNS: Final[tuple[tuple[str, str, Callable[[Result], float | None], str], ...]] = (
    ("in_time_per_s", "in time/s", lambda one: main_figures(one)["in_time_per_s"], "{:.1f}"),
    ("in_time_share", "share %", lambda one: 100 * main_figures(one)["in_time_share"], "{:.1f}"),
    ("p50_ms", "p50 ms", lambda one: main_figures(one)["p50_ms"], "{:.0f}"),
    ("p99_ms", "p99 ms", lambda one: main_figures(one)["p99_ms"], "{:.0f}"),
    ("no_p99_ms", "no after ms (p99)", lambda one: main_figures(one)["no_p99_ms"], "{:.0f}"),
    ("late", "late", lambda one: main_figures(one)["late"], "{:.0f}"),
    ("none", "no answer", lambda one: main_figures(one)["none"], "{:.0f}"),
    ("cpu_ms", "CPU ms/request", lambda one: one["cpu_ms_per_request"], "{:.2f}"),
    ("pss_mib", "PSS MiB", lambda one: one["pss_bytes"] / 2**20, "{:.0f}"),
    ("others", "others %", lambda one: 100 * one["others_share"], "{:.1f}"),
)


def results(out: Path) -> list[Result]:
    """All that there are."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("results/*/*.json"))]


def summarised(found: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """By load and server: runs, how many were disturbed, the spread of each column; or why there is none."""
    table: dict[str, dict[str, Any]] = {}
    grouped: dict[tuple[str, str], list[Result]] = {}
    for one in found:
        grouped.setdefault((one["load"], one["server"]), []).append(one)
    for (load, server), runs in grouped.items():
        measured = [one for one in runs if one["status"] == "measured"]
        row: dict[str, Any] = {"runs": len(measured)}
        if measured:
            row["disturbed"] = sum(bool(one["noise"]) for one in measured)
            row["columns"] = {key: spread(value(one) for one in measured) for key, _, value, _ in _COLUMNS}
            row["asked_per_s"] = spread(main_figures(one)["asked_per_s"] for one in measured)
            row["loads_per_s"] = spread(loads_per_s(one) for one in measured)
        if len(measured) < len(runs):
            row["why"] = next(str(one["why"]).splitlines()[0] for one in runs if one["status"] != "measured")
        table.setdefault(load, {})[server] = row
    return table


def loads_per_s(one: Result) -> float | None:
    """Models loaded a second: by calls, or because they were asked for, as each finds its model gone."""
    if "loads" in one:
        return float(one["loads"] / one["seconds"])
    comers = one["figures"].get("by_load", {}).get("comers")
    if comers is None:
        return None
    return float(comers["in_time_per_s"] + comers["late"] * comers["asked_per_s"] / max(1, comers["asked"]))


def markdown(table: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """Every load's table, then versions and configurations."""
    lines = [f"Machine: {facts['machine']}. Medians of the runs (least to most).", ""]
    for load, servers in sorted(table.items()):
        lines += [f"### {LOADS[load].title if load in LOADS else load}", ""]
        lines += _rows(["server", "runs", *(title for _, title, _, _ in _COLUMNS)], _load_rows(servers))
        lines += [f"{name}: not measured: {row['why']}" for name, row in servers.items() if "why" in row]
        lines.append("")
    lines += ["### Versions and configurations", ""]
    head = ["server", "version", "ONNX Runtime", "licence", "configured", "note"]
    rows = [
        [name, one["version"], one["onnxruntime"], one["licence"],
         f"[{one['configured']}]({one['source']})" if one["source"].startswith("http") else one["configured"],
         one["note"]]
        for name, one in facts["servers"].items()
    ]  # fmt: skip
    return "\n".join([*lines, *_rows(head, rows)]) + "\n"


def _load_rows(servers: dict[str, Any]) -> list[list[str]]:
    def goodput(item: tuple[str, Any]) -> float:
        found = item[1]["columns"]["in_time_per_s"]
        return -float(found["median"])

    measured = [(name, row) for name, row in servers.items() if row["runs"]]
    rows = []
    for name, row in sorted(measured, key=goodput):
        mark = f"{row['runs']}, {row['disturbed']} disturbed" if row["disturbed"] else f"{row['runs']}"
        extra = f" ({shown(row['loads_per_s'], '{:.0f}')} loads/s)" if row["loads_per_s"] else ""
        cells = [shown(row["columns"][key], form) for key, _, _, form in _COLUMNS]
        rows.append([f"{name}{extra}", mark, *cells])
    return rows


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [page_row(head), page_row(["---"] * len(head)), *(page_row(row) for row in rows), ""]


def write(out: Path, page: Path | None) -> str:
    """``table.json`` and ``table.md`` in the folder; into the page too, between its marks. The Markdown."""
    facts = json.loads((out / "facts.json").read_text())
    table = summarised(results(out))
    text = markdown(table, facts)
    (out / "table.json").write_text(json.dumps({**facts, "loads": table}, indent=1))
    (out / "table.md").write_text(text)
    if page is not None:
        page.write_text(between_marks(page.read_text(), text))
    return text
