"""Scenarios of tests, and a run that shows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.run import Ran, run

STEADY = """
name = "steady"
seconds = 1

[[models]]
name = "m"
kind = "any"

[[loads]]
name = "steady"
models = ["m"]
arrivals = "fixed"
rate_rps = 100
slo_ms = 2000
"""
CLOSED = """
name = "closed"
seconds = 1

[[models]]
name = "m"
kind = "any"

[[loads]]
name = "clients"
models = ["m"]
arrivals = "closed"
concurrency = 2
slo_ms = 2000
"""
ANY_LATENESS = 60_000.0
"""Machines of tests are shared: what is tested there is not how late a sender was."""


def written(folder: Path, text: str = STEADY) -> str:
    """The path of that scenario."""
    file = folder / "scenario.toml"
    file.write_text(text)
    return str(file)


def ran(folder: Path, url: str, text: str = STEADY, **options: Any) -> Ran:
    """A whole run."""
    given = {"max_lateness_ms": ANY_LATENESS, "drain_s": 5.0, **options}
    return run(make_plan(written(folder, text), Options(url=url, **given)))
