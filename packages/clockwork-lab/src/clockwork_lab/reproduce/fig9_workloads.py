"""The two traces of Fig 9 as scenarios: one generated, one read from a folder that the user names."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from clockwork_lab.reproduce.run import Run
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.zoo import Zoo

DEVICES, SLO_MS = 12, 100.0
FUNCTIONS, COPIES, RATE_RPS = 46_000, 66, 5_500.0
REAL_FILE = "d01_500fn_min480-959_invocations.csv.gz"
REAL_INSTANCES, REAL_RATE_RPS, REAL_CAP = 500, 9_000.0, 0.25
"""The real trace's first function makes 63 % of all calls; it is cut to a quarter, as is printed."""


class Source(Struct, frozen=True, kw_only=True):
    """A trace, on which models, at which rate. ``trace`` is a file in ``folder``; None: it is generated."""

    name: str
    words: str
    rate_rps: float
    models: tuple[ModelSet, ...]
    trace: str | None = None
    folder: Path | None = None

    def scenario(self, seconds: float, warmup_s: float, rate_rps: float | None = None) -> Scenario:
        """This many seconds of it, after a warm-up that is not counted."""
        rate = rate_rps or self.rate_rps
        names = tuple(each.name for each in self.models)
        load = (
            LoadTable(name="calls", models=names, arrivals="generated", functions=FUNCTIONS, rate_rps=rate,
                 mapping="stripe", slo_ms=SLO_MS)
            if self.trace is None
            else LoadTable(name="calls", models=names, arrivals="azure", trace=self.trace, rate_rps=rate,
                      cap_share=REAL_CAP, slo_ms=SLO_MS)
        )  # fmt: skip
        return Scenario(
            name=f"{self.name} at {rate:g} r/s",
            seconds=warmup_s + seconds,
            warmup_s=warmup_s,
            models=self.models,
            loads=(load,),
        )


def sources(run: Run) -> list[Source]:
    """The generated trace, and the real one where its folder is known."""
    found = [
        Source(
            name="generated trace",
            words=f"generated trace of {FUNCTIONS:,} functions on {COPIES} copies of each of the paper's 61 "
            f"models at {RATE_RPS:g} r/s, functions dealt out in stripes, busiest first, to instances in "
            "alphabetical order",
            rate_rps=RATE_RPS,
            models=generated_models(run.zoo),
        )
    ]
    file = None if run.traces is None else next(iter(sorted(run.traces.rglob(REAL_FILE))), None)
    if file is not None:
        found.append(
            Source(
                name="real trace",
                words=f"the real trace of 500 functions on {REAL_INSTANCES} instances of the 61 models at "
                f"{REAL_RATE_RPS:g} r/s, its first function cut to {REAL_CAP:.0%} of the calls",
                rate_rps=REAL_RATE_RPS,
                models=real_models(run.zoo),
                trace=file.name,
                folder=file.parent,
            )
        )
    return found


def generated_models(zoo: Zoo) -> tuple[ModelSet, ...]:
    """All instances, in alphabetical order: the authors' list, whose shuffle leaves it as it is."""
    kinds = sorted(model.kind for model in zoo.paper_models())
    return tuple(ModelSet(name=kind, kind=kind, copies=COPIES) for kind in kinds)


def real_models(zoo: Zoo) -> tuple[ModelSet, ...]:
    """500 instances of the 61 models, as evenly as can be."""
    kinds = sorted(model.kind for model in zoo.paper_models())
    least, more = divmod(REAL_INSTANCES, len(kinds))
    return tuple(ModelSet(name=kind, kind=kind, copies=least + (at < more)) for at, kind in enumerate(kinds))
