"""What a request costs in CPU, answered or refused, by process of the server."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from comparison.peers.loads import MOBILENET, names, steady
from comparison.peers.measure import SERVER_CORE
from comparison.peers.models import Kinds, network_file
from comparison.peers.peer import INSTALLED
from comparison.peers.record import NS_PER_MS
from comparison.peers.served import Network
from comparison.promises.question import Figures, Question, Row, Runs, at_most, column, paired, percent
from comparison.promises.rig import Rig
from harness.machine import TICK_S
from harness.server import name_of
from harness.serving import total

# ------------------------------------------------------------
# CPU time by process of a server, user and system apart: reads /proc, changes nothing.


KEEPER: Final = "keeper"
"""The first process, which starts the others, and whatever else it started."""
Used = dict[str, dict[str, float]]
"""Seconds of CPU by role of a process: ``user_s`` and ``system_s``."""


def by_role(pids: Iterable[int]) -> Used:
    """What gateway, controller, worker and keeper have used so far."""
    found: Used = {}
    for pid in pids:
        with suppress(OSError):
            role = name_of(pid).partition("-")[0] or KEEPER
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used = found.setdefault(role, {"user_s": 0.0, "system_s": 0.0})
            used["user_s"] += int(fields[11]) * TICK_S
            used["system_s"] += int(fields[12]) * TICK_S
    return found


def between(before: Used, after: Used) -> Used:
    """What each used between two readings."""
    return {
        role: {phase: used - before.get(role, {}).get(phase, 0.0) for phase, used in after[role].items()}
        for role in sorted(after)
    }


def total_s(used: Used) -> float:
    """Of all processes."""
    return sum(one["user_s"] + one["system_s"] for one in used.values())


MODELS: Final = 15
SHARE: Final = 0.8
MANY_RPS: Final = 2000
"""So many that nearly all are refused."""
SECONDS: Final = 24
RUNS: Final = 30
MOST_ANSWERED: Final = 0.95
MOST_REFUSED: Final = 0.7
"""Of a load that is to be answered, or refused: with less, it was another load."""
PARTS: Final = tuple(
    (role, phase) for role in ("gateway", "controller", "worker", "keeper") for phase in ("user", "system")
)


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """``served``: four fifths of what a core can answer; ``refused``: far more than that."""
    rate = SHARE * rig.limit(MOBILENET, MODELS, repeat) if variant == "served" else MANY_RPS
    model_ms = model_cpu_ms(rig.kinds)
    with rig.serving(MOBILENET, names(MODELS)) as up:
        ran_s = total(up.metrics(), "clockwork_model_run_seconds_total")
        before = by_role(up.server.tree())
        with up.metered():
            played = up.play(steady(MOBILENET, MODELS, rate, seconds=SECONDS, warmup_s=0), repeat)
        used = between(before, by_role(up.server.tree()))
        ran_s = total(up.metrics(), "clockwork_model_run_seconds_total") - ran_s
    return {
        **up.used, "rate_rps": rate, "asked": len(played.table), "ok": played.count("ok"),
        "rejected": played.count("rejected"), "expired": played.count("expired"),
        "none": played.count("none"), "ok_share": played.count("ok") / len(played.table),
        "rejected_share": played.count("rejected") / len(played.table),
        "used": used, "model_ms": model_ms, "run_ms": 1e3 * ran_s / max(1, played.count("ok")),
        **played.about,
    }  # fmt: skip


def model_cpu_ms(kinds: Kinds) -> float:
    """CPU of one input in a session of its own on the server's core, the median of some runs."""
    x, before = kinds.input(MOBILENET), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {SERVER_CORE})
    try:
        run, found = Network(str(network_file(INSTALLED / "models", MOBILENET, 0))), []
        for _ in range(RUNS):
            began_ns = time.thread_time_ns()
            run(x)
            found.append((time.thread_time_ns() - began_ns) / NS_PER_MS)
    finally:
        os.sched_setaffinity(0, before)
    return median(found)


def served_ms(one: Figures) -> float:
    """CPU of all processes for each request that was answered."""
    return float(1e3 * total_s(one["used"]) / max(1, one["ok"]))


def refused_ms(refused: Figures, served: Figures) -> float:
    """CPU for each request that was told no: what the answered ones cost by themselves is taken off."""
    if not (good(served, "ok_share", MOST_ANSWERED) and good(refused, "rejected_share", MOST_REFUSED)):
        return math.nan
    spent = 1e3 * total_s(refused["used"])
    return float((spent - refused["ok"] * served_ms(served)) / told_no(refused))


def good(one: Figures, key: str, least: float) -> bool:
    """Whether a load was what it should be."""
    return bool(one[key] >= least)


def told_no(one: Figures) -> int:
    """So many heard a no: whoever heard nothing may have cost nothing."""
    return max(1, int(one["rejected"] + one["expired"]))


def part_ms(used: Used, role: str, phase: str, count: int) -> float:
    """One process's user or system time for each of so many requests."""
    return 1e3 * used.get(role, {}).get(f"{phase}_s", 0.0) / max(1, count)


def refused_part_ms(refused: Figures, served: Figures, role: str, phase: str) -> float:
    """The same of :func:`refused_ms`."""
    each = part_ms(served["used"], role, phase, served["ok"])
    spent = 1e3 * refused["used"].get(role, {}).get(f"{phase}_s", 0.0)
    return float((spent - refused["ok"] * each) / told_no(refused))


def rows(runs: Runs) -> list[Row]:
    """Both costs, and what they are made of."""
    served = [one for _, one in sorted(runs.get("served", {}).items())]
    whole = [served_ms(one) if good(one, "ok_share", MOST_ANSWERED) else math.nan for one in served]
    found = [
        Row("CPU of all processes for a request answered", whole, "{:.2f} ms",
            at_most(2.6)),
        Row("answered: of all that were asked", percent(runs, "served", "ok_share"), "{:.1f} %"),
        Row("answered: asked", column(runs, "served", "rate_rps"), "{:.0f}/s"),
        Row("CPU of the model alone, one input", column(runs, "served", "model_ms"), "{:.2f} ms"),
        Row("answered: in the model, as the worker counts it", column(runs, "served", "run_ms"), "{:.2f} ms"),
    ]  # fmt: skip
    for role, phase in PARTS:
        each = [part_ms(one["used"], role, phase, one["ok"]) for one in served]
        found.append(Row(f"answered: {role}, {phase}", each, "{:.3f} ms"))
    refused = paired(runs, "refused", "served", refused_ms)
    found += [
        Row("CPU of all processes for a request of 602 kB refused", refused, "{:.3f} ms", at_most(0.15)),
        Row("refused: of all that were asked", percent(runs, "refused", "rejected_share"), "{:.1f} %"),
        Row("refused: answered of all that were asked", percent(runs, "refused", "ok_share"), "{:.1f} %"),
        Row("refused: asked", column(runs, "refused", "asked", 1 / SECONDS), "{:.0f}/s"),
    ]
    for role, phase in PARTS:
        told = partial(refused_part_ms, role=role, phase=phase)
        found.append(Row(f"refused: {role}, {phase}", paired(runs, "refused", "served", told), "{:.3f} ms"))
    return found


QUESTION: Final = Question("cost", "What a request costs", ("served", "refused"), measure, rows)
