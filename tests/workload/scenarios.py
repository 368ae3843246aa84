"""Small scenarios made in code, and streams run to their ends, for the tests of workloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from clockwork_serve.workload.scenario import LoadTable, ModelSet, Ramp, Scenario
from clockwork_serve.workload.stream import Arrivals, Workload, build

ROOT = Path(__file__).resolve().parents[2]


def load(arrivals: str = "poisson", **fields: Any) -> LoadTable:
    """A load called ``load`` on the set ``m``, 100 requests per second unless told otherwise."""
    plain = {"rate_rps": 100.0} if arrivals in {"poisson", "gamma", "fixed"} else {}
    return LoadTable(**{"name": "load", "models": ("m",), "arrivals": arrivals, **plain, **fields})


def scenario(*loads: LoadTable, seconds: float = 20.0, copies: int = 4, **fields: Any) -> Scenario:
    """A scenario with one set of models, ``m``."""
    models = (ModelSet(name="m", kind="resnet50_v2", copies=copies),)
    return Scenario(name="test", seconds=seconds, models=models, loads=loads, **fields)


def run(workload: Workload) -> dict[str, np.ndarray]:
    """All requests of a workload as columns."""
    parts = list(workload.open())
    return {
        name: np.array([value for part in parts for value in getattr(part, name)], dtype=np.int64)
        for name in Arrivals.__slots__
    }


def requests(
    *loads: LoadTable, seed: int = 1, base: Path | None = None, **fields: Any
) -> dict[str, np.ndarray]:
    """All requests of a scenario made of these loads."""
    return run(build(scenario(*loads, **fields), seed, base))


def ramps(largest: float = 4.0) -> st.SearchStrategy[Ramp]:
    """Ramps that multiply or add."""
    every = st.floats(0.5, 8.0)
    factors = st.builds(lambda e, f: Ramp(every_s=e, factor=f), every, st.floats(0.25, largest))
    return factors | st.builds(lambda e, a: Ramp(every_s=e, add=a, until=400.0), every, st.floats(-20, 20))


def open_loads() -> st.SearchStrategy[LoadTable]:
    """Open loads of every kind that is no trace, with everything that may change in them."""

    def make(
        kind: str, cv: float, rate: float, start: float, length: float, extra: dict[str, Any]
    ) -> LoadTable:
        own = {"cv": cv} if kind == "gamma" else {}
        return load(kind, rate_rps=rate, start_s=start, stop_s=min(20.0, start + length), **own, **extra)

    optional = {
        "rate_ramp": ramps(1.5),
        "slo_ms": st.floats(1, 1000),
        "popularity": st.sampled_from(["uniform", "zipf"]),
        "model_ramp": st.builds(lambda e, a: Ramp(every_s=e, add=a), st.floats(0.5, 5), st.integers(-2, 2)),
    }
    bursts = st.fixed_dictionaries({"on_s": st.floats(0.05, 3), "off_s": st.floats(0.05, 3)})
    extras = st.builds(
        lambda one, two: one | two, st.fixed_dictionaries({}, optional=optional), st.just({}) | bursts
    )
    return st.builds(
        make, st.sampled_from(["poisson", "gamma", "fixed"]), st.floats(0.2, 8), st.floats(0.5, 400),
        st.floats(0, 15), st.floats(0.5, 20), extras,
    )  # fmt: skip


WHOLE = """\
# a comment
name = "whole"
seconds = 60
warmup_s = 5.5

[cluster]
zoo = "v100"
devices = 4
devices_per_worker = 2
memory_mib = 1000

[[models]]
name = "m"
kind = "resnet50_v2"
copies = 3

[[models]]
name = "n"
kind = "densenet121"

[[loads]]
name = "first"
models = ["n", "m"]
arrivals = "gamma"
cv = 2
rate_rps = 10.5
slo_ms = 20
slo_ramp = { every_s = 5, factor = 1.5, until = 100 }

[[loads]]
name = "second"
models = ["m"]
arrivals = "azure"
trace = ["day1.csv", "day2.csv.gz"]
mapping = "stripe"
[loads.rate_ramp]
every_s = 10
add = 2

[[faults]]
kind = "slow"
at_s = 10
for_s = 2
device = 3
factor = 2.5
"""
