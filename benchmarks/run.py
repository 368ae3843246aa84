"""Runs the benchmarks one after the other, in short form by default; a failure stops none of the others."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from clockwork_serve.config import default_cache

ROOT = Path(__file__).parents[1]

SHORT: dict[str, tuple[str, ...]] = {
    "http_overhead": ("--requests", "500"),
    "http_front_end": ("--rounds", "3", "--seconds", "1"),
    "grpc_front_end": ("--rounds", "3", "--seconds", "1"),
    "against_triton": ("--rounds", "2", "--seconds", "1"),
    "wakeup_lateness": ("--seconds", "8"),
    "far_tensors": ("--short",),
    "generator_capacity": ("--rounds", "1", "--seconds", "2"),
    "overload_10x": ("--short",),
    "past_saturation": ("--seconds", "1", "--rounds", "1"),
    "metastable": ("--count", "4"),
    "feasible_load": ("--seconds", "30"),
    "faults": ("--short",),
    "failover": ("--short",),
    "hostile": ("--seconds", "60"),
    "footprint": (),
    "start": ("--models", "150"),
    "many_models": ("--models", "200", "--held", "20", "--idle-seconds", "10"),
    "device_lane_time": ("--seconds", "0.5"),
    "device_memory": ("--cycles", "300"),
    "scheduler_cost": ("6x1000", "64x10000", "--requests", "10000"),
    "worker_cost": ("--actions", "5000"),
    "simulator_speed": ("--minutes", "2"),
    "simulator_seeds": ("--count", "50"),
    "policy_ideas": ("--case", "cold", "--seeds", "1"),
    "promises": ("--short",),
    "traces": ("--rounds", "2", "--seconds", "3"),
    "causes": ("--short",),
    "plan_right": ("--short",),
}
"""By benchmark, what makes it short; without it, it takes as long as the docs say."""

COPY = re.compile(r".*_\d+")
"""Names of the demo's copies; without the number, they are the models themselves."""

STATUS = {0: "passed", 1: "missed", 2: "invalid"}


def demo_models() -> tuple[str, ...]:
    """The models that ``clockwork demo`` wrote last, as arguments; none if it never ran."""
    files = Path(default_cache(os.environ)) / "demo"
    written = sorted(files.glob("repository-*/"), key=lambda folder: folder.stat().st_mtime)
    folders = sorted(written[-1].iterdir()) if written else []
    return tuple(str(folder) for folder in folders if folder.is_dir() and not COPY.fullmatch(folder.name))


def main() -> int:
    """Run them; the worst exit status."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHORT)}; default: all")
    options.add_argument("--full", action="store_true", help="the long forms: about half an hour")
    options.add_argument("--json", type=Path, metavar="FOLDER", help="write NAME.json for each there")
    given = options.parse_args()
    unknown = set(given.names) - SHORT.keys()
    if unknown:
        options.error(f"names: expected some of {', '.join(SHORT)}; found {', '.join(sorted(unknown))}")
    ended: dict[str, int] = {}
    for name in given.names or SHORT:
        more = () if given.full else SHORT[name]
        if name == "device_lane_time" and (models := demo_models()):
            more = (*more, *models, "--only", "--batch", "1", "4")
        if given.json is not None:
            given.json.mkdir(parents=True, exist_ok=True)
            more = (*more, "--json", str(given.json.absolute() / f"{name}.json"))
        command = [sys.executable, "-m", f"benchmarks.{name}", *more]
        ended[name] = subprocess.run(command, cwd=ROOT, check=False).returncode
    print("\n" + "\n".join(f"  {name:<16} {STATUS.get(code, 'failed')}" for name, code in ended.items()))
    return max(ended.values())


if __name__ == "__main__":
    sys.exit(main())
