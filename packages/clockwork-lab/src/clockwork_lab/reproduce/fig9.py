"""Fig 9: a trace of 46,000 functions on 4,026 models and twelve GPUs, then with more load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, points, value
from clockwork_lab.reproduce.limits import LimitStretch, bound, stretches
from clockwork_lab.reproduce.players import Player
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.sim import Tally
from clockwork_serve.sim.tally import Count
from clockwork_serve.units import NS_PER_S, to_ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.zoo import Zoo

REQUESTS, BASELINE_REQUESTS, SHORT_REQUESTS = 21_600_000, 1_000_000, 15_000
SWEEP_REQUESTS, SHORT_SWEEP_REQUESTS = 200_000, 4_000
SWEEP = (0.8, 1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.4)
SWEEP_WARMUP_S, LIMIT_S = 20.0, 10.0  # length of the interval for which the sweep's limit is computed

LOST_MOST, BUSY_LEAST, COLD_LEAST = 5, 0.8, 0.013
BUCKET_S, SHORT_BUCKET_S = 60.0, 0.5

WARMUP_S, SHORT_WARMUP_S = 60.0, 0.5

Read = Callable[[Count], float | None]


def fig9(run: FigureRun, requests: int | None = None) -> Figure:
    """The trace under every policy; ``requests`` is the length of the run (None: by its own setting)."""
    everyone = run.everyone()
    rates = SWEEP[::8] if run.short else SWEEP
    found = [each for each in sources(run) if each.trace is None or not run.short]
    run.plan(len(everyone) * (len(found) + len(rates)))
    bucket_s = SHORT_BUCKET_S if run.short else BUCKET_S
    # Excludes the first calls of thousands of models, which are all cold at once.
    warmup_s = SHORT_WARMUP_S if run.short else WARMUP_S
    panels: list[Panel] = []
    claims: list[PaperClaim] = []
    for source in found:
        tallies = {}
        for player in everyone:
            seconds = _requests(run, player, requests) / source.rate_rps
            scenario = source.scenario(seconds, warmup_s)
            tally = run.simulate(scenario, player, devices=DEVICES, bucket_s=bucket_s, base=source.folder)
            tallies[player.name] = tally
            claims += _claims(source, player, tally, seconds)
        panels += _panels(source, everyone, tallies, bucket_s)
    sweep = _sweep(run, found[0], everyone, rates)
    return Figure(
        figure="fig9",
        title="a trace on thousands of models, twelve GPUs",
        question=f"At which load do {DEVICES} GPUs stop serving {KINDS * COPIES:,} models in time?",
        setup=run.setup(
            experiment=f"{DEVICES} GPUs, one a worker; {warmup_s:g} s of warm-up, from cold; "
            f"SLO {SLO_MS:g} ms; " + "; ".join(source.words for source in found)
        ),
        panels=(*panels, sweep),
        claims=tuple(claims),
        notes=(
            "Lost: late, refused or not answered at all; an SLO that is met by refusing is not met here.",
            "Cold: the model's weights were on no GPU when the request came.",
        ),
    )


def _requests(run: FigureRun, player: Player, requests: int | None) -> int:
    if requests is not None:
        return requests
    if run.short:
        return SHORT_REQUESTS
    return REQUESTS if player.ours else BASELINE_REQUESTS


def lost(count: Count) -> int:
    """Requests that were not answered in time."""
    return count.late + count.others.total()


def _panels(
    source: TraceSource, everyone: tuple[Player, ...], tallies: dict[str, Tally], bucket_s: float
) -> list[Panel]:
    def panel(
        what: str, y_label: str, read: Read, published: str = "", limit: tuple[Series, ...] = ()
    ) -> Panel:
        ours = [player.series(_minutes(tallies[player.name], read, bucket_s)) for player in everyone]
        return Panel(
            name=f"{source.name}: {what}", x_label="minutes", y_label=y_label,
            series=(*_published(published, ours), *ours, *limit),
        )  # fmt: skip

    longest = max(tallies.values(), key=lambda tally: len(tally.rows))
    offered = Series(
        name="offered",
        role=SeriesRole.LIMIT,
        points=points(_minutes(longest, lambda count: count.offered / bucket_s, bucket_s)),
    )
    return [
        panel("good answers", "requests/s", lambda count: count.ok / bucket_s, "", (offered,)),
        panel("median latency", "ms", lambda count: _latency_ms(count, 0.5), "median_ms"),
        panel("p99 latency", "ms", lambda count: _latency_ms(count, 0.99), "p99_ms"),
        panel("longest latency", "ms", lambda count: _latency_ms(count, 1.0), "max_ms"),
        panel("mean batch a request saw", "requests",
              lambda count: count.batch_sum / count.ok if count.ok else None, "batch"),
        panel("cold starts", "requests/s", lambda count: count.cold / bucket_s, "cold_rps"),
        panel("lost", "requests", lambda count: float(lost(count))),
        _busy_panel(source, everyone, tallies, bucket_s),
    ]  # fmt: skip


def _minutes(tally: Tally, read: Read, bucket_s: float) -> list[tuple[float, float | None]]:
    """One point for each whole stretch."""
    rows = tally.rows[:-1] or tally.rows
    return [((at + 0.5) * bucket_s / 60, read(row[0])) for at, row in enumerate(rows)]


def _busy_panel(
    source: TraceSource, everyone: tuple[Player, ...], tallies: dict[str, Tally], bucket_s: float
) -> Panel:
    whole_ns = bucket_s * NS_PER_S * DEVICES
    return Panel(
        name=f"{source.name}: EXEC lanes busy",
        x_label="minutes",
        y_label="% of the time",
        series=tuple(
            player.series(
                ((at + 0.5) * bucket_s / 60, min(100.0, 100 * busy.exec_ns / whole_ns))
                for at, busy in enumerate(tallies[player.name].busy_rows[:-1])
            )
            for player in everyone
        ),
    )


def _published(name: str, ours: list[Series]) -> list[Series]:
    """The mean of the published per-minute series, as a level line."""
    if not name:
        return []
    xs = [point.x for series in ours for point in series.points] or [0.0]
    level = value("fig9", name, name, 0.0)
    ends = dict.fromkeys((min(xs), max(xs)))
    return [Series(name="published: mean", role=SeriesRole.PAPER, points=points((x, level) for x in ends))]


def _latency_ms(count: Count, share: float) -> float | None:
    return to_ms(count.answered.quantile_ns(share)) if count.ok else None


def _sweep(
    run: FigureRun, source: TraceSource, everyone: tuple[Player, ...], factors: tuple[float, ...]
) -> Panel:
    """Requests lost in a million, as the load grows."""
    count = SHORT_SWEEP_REQUESTS if run.short else SWEEP_REQUESTS
    ours = []
    for player in everyone:
        pairs: list[tuple[float, float | None]] = []
        for factor in factors:
            rate = source.rate_rps * factor
            tally = run.simulate(
                source.scenario(count / rate, SHORT_WARMUP_S if run.short else SWEEP_WARMUP_S, rate),
                player, devices=DEVICES, base=source.folder,
            )  # fmt: skip
            ended = tally.loads[0]
            pairs.append((rate, 100 * lost(ended) / max(1, ended.ended)))
        ours.append(player.series(pairs))
    return Panel(
        name=f"{source.name}: lost as the load grows",
        x_label="offered requests/s",
        y_label="% of requests lost",
        series=(*ours, _unavoidable(run, source, [source.rate_rps * factor for factor in factors])),
    )


def _unavoidable(run: FigureRun, source: TraceSource, rates: list[float]) -> Series:
    """Requests that no policy could serve, by the oracle, which knows all requests in advance."""
    kinds = [each.kind for each in source.models for _ in range(each.copies)]
    stretch = LimitStretch(SHORT_WARMUP_S, 1.0) if run.short else LimitStretch(SWEEP_WARMUP_S, LIMIT_S)
    pairs = []
    for rate in rates:
        scenario = source.scenario(stretch.seconds, stretch.start_s, rate)
        limit = bound(run, kinds, stretches(run, scenario, [stretch])[0], devices=DEVICES)
        pairs.append((rate, 100 * max(0.0, 1 - limit.goodput / limit.offered)))
    return Series(name="lost at least, by the oracle", role=SeriesRole.LIMIT, points=points(pairs))


def _claims(source: TraceSource, player: Player, tally: Tally, seconds: float) -> list[PaperClaim]:
    if not player.ours and not player.agrees:
        return []
    count = tally.loads[0]
    exec_share = tally.busy.exec_ns / (seconds * NS_PER_S * DEVICES)
    failed = value("fig9", "failed", "failed", 0.0)
    cold = value("fig9", "cold_share", "cold_share", 0.0)
    about = f"{source.name}, {count.ended:,} requests: {player.name}"
    claims = [
        PaperClaim(name=f"lost (published: of 208 million); {about}", paper=failed, ours=float(lost(count)),
              sense="<=", target=LOST_MOST),
        PaperClaim(name=f"GPUs busy; {about}", paper=1.0, ours=min(1.0, exec_share), sense=">=",
              target=BUSY_LEAST),
    ]  # fmt: skip
    if source.trace is None:  # the real trace's instances fit into memory
        share = count.cold / max(1, count.ok)
        claims.append(
            PaperClaim(
                name=f"cold starts, share; {about}", paper=cold, ours=share, sense=">=", target=COLD_LEAST
            )
        )
    return claims


# ------------------------------------------------------------
# The two traces of Fig 9 as scenarios: one generated, one read from a folder that the user names.


DEVICES, SLO_MS = 12, 100.0
FUNCTIONS, KINDS, COPIES, RATE_RPS = 46_000, 61, 66, 5_500.0
REAL_FILE = "d01_500fn_min480-959_invocations.csv.gz"
REAL_INSTANCES, REAL_RATE_RPS, REAL_CAP = 500, 9_000.0, 0.25
"""The real trace's first function makes 63 % of all calls; it is cut to a quarter, as is printed."""


class TraceSource(Struct, frozen=True, kw_only=True):
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
            name=f"{self.name} at {rate:g} r/s", seconds=warmup_s + seconds, warmup_s=warmup_s,
            models=self.models, loads=(load,),
        )  # fmt: skip


def sources(run: FigureRun) -> list[TraceSource]:
    """The generated trace, and the real one where its folder is known."""
    found = [
        TraceSource(
            name="generated trace",
            words=f"generated trace of {FUNCTIONS:,} functions on {COPIES} copies of each of the paper's 61 "
            f"models at {RATE_RPS:g} r/s, functions dealt out in stripes, busiest first, to instances in "
            "alphabetical order",
            rate_rps=RATE_RPS,
            models=model_sets(run.zoo),
        )
    ]
    file = None if run.traces is None else next(iter(sorted(run.traces.rglob(REAL_FILE))), None)
    if file is not None:
        found.append(
            TraceSource(
                name="real trace",
                words=f"the real trace of 500 functions on {REAL_INSTANCES} instances of the 61 models at "
                f"{REAL_RATE_RPS:g} r/s, its first function cut to {REAL_CAP:.0%} of the calls",
                rate_rps=REAL_RATE_RPS,
                models=model_sets(run.zoo, REAL_INSTANCES),
                trace=file.name,
                folder=file.parent,
            )
        )
    return found


def model_sets(zoo: Zoo, instances: int = KINDS * COPIES) -> tuple[ModelSet, ...]:
    """Instances of the paper's models, as evenly as can be, in alphabetical order.

    That is the order of the authors' list, whose shuffle leaves it as it is.
    """
    kinds = sorted(model.kind for model in zoo.paper_models())
    least, more = divmod(instances, len(kinds))
    return tuple(ModelSet(name=kind, kind=kind, copies=least + (at < more)) for at, kind in enumerate(kinds))
