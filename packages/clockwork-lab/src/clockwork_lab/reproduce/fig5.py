"""Fig 5: goodput against the SLO on one GPU, 15 ResNet50 with 16 clients each."""

from __future__ import annotations

from collections.abc import Sequence

from clockwork_lab.oracle.bound import closed_loop_limit_rps
from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, curve, points, value
from clockwork_lab.reproduce.players import GOAL_CAP, Player, dominance_claims
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.sim import Tally
from clockwork_serve.sim.tally import DurationHistogram
from clockwork_serve.units import ms, to_ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario

KIND = "resnet50_v2"
SLOS_MS = (10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
TARGETS_RPS = dict(zip(SLOS_MS, (600.0, 850.0, 900.0, 910.0, 915.0, 915.0), strict=True))
AGREEMENT = 0.10
PUBLISHED = "published: Clockwork"
MODELS, CLIENTS = 15, 16
WARM_S, WARM_RPS, WARM_SLO_MS = 1.0, 150.0, 250.0
"""Models are warmed up at a loose SLO first: policies that reject late requests never load at a tight one."""
WARMUP_S, SECONDS, SHORT_S = 2.0, 12.0, 2.5

Values = dict[tuple[str, float], float]  # by player and SLO


def fig5(run: FigureRun) -> Figure:
    """Every policy at every SLO."""
    slos = (50.0, 250.0) if run.short else SLOS_MS
    everyone = run.everyone()
    seconds = SHORT_S if run.short else SECONDS
    scenarios = {slo: scenario(slo, seconds) for slo in slos}
    tallies = run.compare(everyone, scenarios, devices=1)
    rates = {key: tally.goodput_rps(0, ms(seconds * 1e3)) for key, tally in tallies.items()}

    def panel(
        name: str, y_label: str, published: Series, ours: Values, limit: Sequence[Series] = ()
    ) -> Panel:
        curves = [player.series((slo, ours[player.name, slo]) for slo in slos) for player in everyone]
        return Panel(
            name=name, x_label="SLO (ms)", y_label=y_label, series=(published, *curves, *limit), x_log=True,
            y_log=y_label == "ms",
        )  # fmt: skip

    def latency_panel(name: str, series: str, share: float) -> Panel:
        published = curve("fig5", series, "latency_ms", name=PUBLISHED)
        return panel(name, "ms", published, {key: _quantile_ms(tallies[key], share) for key in tallies})

    published = curve("fig5", "Clockwork", "goodput_rps", name=PUBLISHED)
    goodput = panel("goodput", "good answers per second", published, rates, [_limit(run, slos)])
    return Figure(
        figure="fig5",
        title="goodput against SLO, one GPU",
        question=f"Which goodput does one GPU reach at each SLO, asked by {MODELS * CLIENTS} clients?",
        setup=run.setup(
            experiment=f"1 GPU, {MODELS} copies of {KIND}, {CLIENTS} closed-loop clients each, "
            f"{seconds - WARMUP_S:g} s after a warm-up of {WARMUP_S:g} s, which starts with {WARM_S:g} s of "
            f"{WARM_RPS:g} r/s at {WARM_SLO_MS:g} ms and no clients"
        ),
        panels=(
            goodput,
            latency_panel("longest latency of any answer", "Clockwork max", 1.0),
            latency_panel("p99.99 latency", "Clockwork p99.99", 0.9999),
        ),
        claims=(*_claims(everyone, slos, rates), *dominance_claims([goodput], everyone)),
        notes=(
            "Latencies are of all requests, refused ones too, as in the paper.",
            "The limit is the most efficient batch whose duration and network fit the SLO, run back to back.",
            "At 10 ms it depends on the network: the paper's inputs take 0.5 ms on each link of 10 Gbit/s.",
            "`python -m benchmarks.fig5_delay` repeats the point at 10 ms with other delays to the worker.",
        ),
    )


def scenario(slo_ms: float, seconds: float) -> Scenario:
    """The experiment of the figure at one SLO."""
    return Scenario(
        name=f"SLO {slo_ms:g} ms",
        seconds=seconds,
        warmup_s=WARMUP_S,
        models=(ModelSet(name="resnet50", kind=KIND, copies=MODELS),),
        loads=(
            LoadTable(name="clients", models=("resnet50",), arrivals="closed", concurrency=CLIENTS,
                      slo_ms=slo_ms, start_s=WARM_S),
            LoadTable(name="warm", models=("resnet50",), arrivals="fixed", rate_rps=WARM_RPS,
                      slo_ms=WARM_SLO_MS, stop_s=WARM_S),
        ),
    )  # fmt: skip


def _limit(run: FigureRun, slos: Sequence[float]) -> Series:
    infer_ns, network = run.zoo[KIND].infer_ns, run.constants.network
    rates = [(slo, closed_loop_limit_rps(infer_ns, ms(slo), GOAL_CAP, network=network)) for slo in slos]
    return Series(name=f"limit, batch ≤ {GOAL_CAP}", role=SeriesRole.LIMIT, points=points(rates))


def _quantile_ms(tally: Tally, share: float) -> float:
    """A quantile of the latencies of all responses, good and rejected."""
    both = DurationHistogram()
    for part in (tally.loads[0].answered, tally.loads[0].refused):
        both.count += part.count
        both.max_ns = max(both.max_ns, part.max_ns)
        for bucket, count in part.counts.items():
            both.counts[bucket] = both.counts.get(bucket, 0) + count
    return to_ms(both.quantile_ns(share))


def _claims(everyone: Sequence[Player], slos: Sequence[float], rates: Values) -> list[PaperClaim]:
    claims = []
    for slo in slos:
        published = value("fig5", "Clockwork", "goodput_rps", slo)
        for player in everyone:
            ours = rates[player.name, slo]
            name = f"goodput at {slo:g} ms: {player.name}"
            if player.agrees:
                claims.append(PaperClaim.near(name, published, ours, AGREEMENT * published))
            elif player.ours:
                target = TARGETS_RPS[slo]
                claims.append(PaperClaim(name=name, paper=published, ours=ours, sense=">=", target=target))
    return claims
