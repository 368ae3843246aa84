"""Two longer scenarios: workers killed again and again, and controllers; and what is possible.

One of two workers is away for r seconds of each period p. The load is a share x of both devices, and one
alone serves 1/2. So of the requests of r, min(1, 1 / 2x) can be served, and of all of them

    possible = 1 - r / p * (1 - min(1, 1 / 2x))
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from qa.faults import acts_processes, run
from qa.faults.result import Kills, Result
from qa.faults.rows import Row
from qa.faults.stage import SETUPS

PERIOD_S: Final = 5.0
CONTROLLER_PERIOD_S: Final = 10.0
TIMES, TIMES_SHORT = 60, 6
CONTROLLER_TIMES, CONTROLLER_TIMES_SHORT = 30, 3
OF_POSSIBLE: Final = 0.99
BACK_S: Final = 1.0


def possible(load: float, away_s: float, period_s: float) -> float:
    """The share of all requests that can be served; ``load`` is of both devices."""
    return 1 - away_s / period_s * (1 - min(1.0, 1 / (2 * load)))


def load_of(setup: str) -> float:
    """The share of both devices that its load takes."""
    found = SETUPS[setup]
    return found.rate_rps * found.device_ms / 1000 / len(found.devices)


def workers(setup: str, *, short: bool, seed: int, cache: Path, stopped: threading.Event) -> Kills:
    """SIGKILL of a worker every 5 s, in turns."""
    times = TIMES_SHORT if short else TIMES
    act = acts_processes.every(PERIOD_S, lambda stage: stage.workers(), times, times)
    row = Row(f"workers-{setup}", "worker SIGKILL every 5 s", "under load", act, setup)
    result = run.play_row(row, short=short, seed=seed, cache=cache, stopped=stopped, longest_s=times * 5 + 60)
    load = load_of(setup)
    away = [ms / 1000 for ms in result.restarts_ms]
    share = result.goodput.share[1]
    could = possible(load, float(np.mean(away)) if away else PERIOD_S, PERIOD_S)
    rows = [
        ("requests lost", "0", f"{result.ends.lost} of {result.ends.sent}", result.ends.lost == 0),
        ("in time of what is possible", f">= 99 % of {could:.2%}", f"{share:.2%}",
         share >= OF_POSSIBLE * could),
        ("answered twice", "0", str(result.twice), not result.twice),
        ("heard more than 50 ms after their deadline", "0", str(result.overdue), not result.overdue),
        ("kills", str(times), str(len(away)), len(away) == times),
    ]  # fmt: skip
    if load > 0.5:
        needed = 0.03 * PERIOD_S / (1 - 1 / (2 * load))
        rows.append(
            (
                f"in time; 97 % is possible with restarts of {needed:.2f} s",
                ">= 97 %",
                f"{share:.2%}",
                share >= 0.97,
            )
        )
    rows.append(
        ("a killed worker serves again after (median, most)", "reported",
         f"{median(away):.2f} s, {max(away):.2f} s" if away else "never", bool(away))
    )  # fmt: skip
    _others(rows, result)
    name = f"a worker killed every {PERIOD_S:g} s at {load:.0%} load, {times} times"
    return Kills(
        name=name, rows=rows, figures={"away_s": away, "share": share, "possible": could}, short=short
    )


def controllers(*, short: bool, seed: int, cache: Path, stopped: threading.Event) -> Kills:
    """SIGKILL of the controller every 10 s."""
    times = CONTROLLER_TIMES_SHORT if short else CONTROLLER_TIMES
    act = acts_processes.every(CONTROLLER_PERIOD_S, lambda stage: ["controller"], times, times)
    row = Row("controllers", "controller SIGKILL every 10 s", "under load", act, "two")
    result = run.play_row(
        row, short=short, seed=seed, cache=cache, stopped=stopped, longest_s=times * 10 + 60
    )
    gaps = [math.inf if ms is None else ms / 1000 for ms in result.back_ms]
    ends = result.ends
    rows = [
        ("requests lost", "0", f"{ends.lost} of {ends.sent}", ends.lost == 0),
        ("answered or failed within their deadline + 50 ms", "all",
         f"all but {result.overdue + result.late_as_good}", not result.overdue + result.late_as_good),
        ("answered twice", "0", str(result.twice), not result.twice),
        ("good answers again after each kill (median, most)", f"<= {BACK_S:g} s",
         f"{median(gaps):.2f} s, {max(gaps):.2f} s" if gaps else "never", bool(gaps) and max(gaps) <= BACK_S),
        ("kills", str(times), str(len(gaps)), len(gaps) == times),
    ]  # fmt: skip
    _others(rows, result)
    name = f"the controller killed every {CONTROLLER_PERIOD_S:g} s, {times} times"
    figures: dict[str, float | list[float]] = {"back_s": gaps, "share": result.goodput.share[1]}
    return Kills(name=name, rows=rows, figures=figures, short=short)


def _others(rows: list[tuple[str, str, str, bool]], result: Result) -> None:
    known = ("requests lost", "answered twice", "heard more", "late answers", "90 %", "first good")
    others = [words for words in result.wrong if not any(word in words for word in known)]
    rows.append(("all else that a row promises", "kept", "; ".join(others) or "kept", not others))
