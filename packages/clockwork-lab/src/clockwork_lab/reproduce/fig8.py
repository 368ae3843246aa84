"""Fig 8: latency-sensitive clients on six GPUs, alone and beside batch clients."""

from __future__ import annotations

from collections.abc import Sequence

from clockwork_lab.reproduce.fig7 import (
    DEVICES,
    FACTOR,
    FIRST_MS,
    KIND,
    STEPPED_LOAD,
    STEPS_MS,
    WARM_SLO_MS,
    limit_of_steps,
    over_steps,
    satisfaction_panel,
    satisfied,
    stepped_loads,
)
from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, curve
from clockwork_lab.reproduce.players import Player
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.sim import Tally
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario

SENSITIVE, SENSITIVE_RPS = 6, 200.0
CASES = {
    "alone": (0, 0, "LS alone", ""),
    "12 batch clients of 16": (12, 16, "LS + 12 big-batch", "12 big-batch clients"),
    "48 batch clients of 4": (48, 4, "LS + 48 small-batch", "48 small-batch clients"),
}
"""Batch models, concurrent requests of each, and the names of the published curves."""
FLOORS = {6.53: (0.90, 1700.0), 9.79: (0.98, 2100.0), 14.68: (0.995, 2300.0)}
"""By SLO: satisfaction and batch goodput to reach beside 12 batch clients."""
STEP_S, SHORT_STEP_S = 30.0, 0.3
JITTER_S = 10.0
SENSITIVE_LOAD, BATCH_LOAD = STEPPED_LOAD, 2

Tallies = dict[tuple[str, str], Tally]  # by player and case


def fig8(run: FigureRun) -> Figure:
    """Every case under every policy."""
    step_s = SHORT_STEP_S if run.short else STEP_S
    everyone = run.everyone()
    scenarios = {case: _scenario(case, step_s) for case in CASES}
    tallies = run.compare(everyone, scenarios, devices=DEVICES, bucket_s=step_s)
    limit = limit_of_steps(run, scenarios["alone"], step_s, "limit, alone")
    panels = []
    for case, (_, _, published, _) in CASES.items():
        paper = curve("fig8", published, "satisfaction", name="published: Clockwork")
        ours = [over_steps(player, satisfied(tallies[player.name, case])) for player in everyone]
        panels.append(satisfaction_panel(f"latency-sensitive, {case}", [paper, *ours, limit]))
    panels += [_goodput_panel(case, everyone, tallies, step_s) for case in CASES if CASES[case][0]]
    return Figure(
        figure="fig8",
        title="latency-sensitive clients beside batch clients, six GPUs",
        question="What do batch clients cost latency-sensitive ones that share six GPUs with them?",
        setup=run.setup(
            experiment=f"{DEVICES} GPUs; {SENSITIVE} latency-sensitive copies of {KIND} at {SENSITIVE_RPS:g} "
            f"r/s each, Poisson; their SLO: {WARM_SLO_MS:g} ms for {step_s:g} s, then {FIRST_MS:g} ms, x "
            f"{FACTOR:g} every {step_s:g} s; batch clients: closed loop, a day of SLO, started within "
            f"{min(JITTER_S, step_s / 2):g} s"
        ),
        panels=tuple(panels),
        claims=tuple(_claims(everyone, tallies, step_s)),
        notes=("The limit is the oracle's for the latency-sensitive clients alone.",),
    )


def _scenario(case: str, step_s: float) -> Scenario:
    models, concurrency, _, _ = CASES[case]
    sets = [ModelSet(name="sensitive", kind=KIND, copies=SENSITIVE)]
    loads = [*stepped_loads("sensitive", "sensitive", SENSITIVE * SENSITIVE_RPS, step_s)]
    if models:
        sets.append(ModelSet(name="batch", kind=KIND, copies=models))
        jitter_s = min(JITTER_S, step_s / 2)
        loads.append(
            LoadTable(name="batch", models=("batch",), arrivals="closed", concurrency=concurrency,
                      start_jitter_s=jitter_s)
        )  # fmt: skip
    return Scenario(name=case, seconds=step_s * (1 + len(STEPS_MS)), models=tuple(sets), loads=tuple(loads))


def _batch_rates(tally: Tally, step_s: float) -> list[float]:
    """Goodput per second of the batch clients, for each step."""
    return [row[BATCH_LOAD].ok / step_s for row in tally.rows[1 : 1 + len(STEPS_MS)]]


def _goodput_panel(case: str, everyone: Sequence[Player], tallies: Tallies, step_s: float) -> Panel:
    published = curve("fig8", CASES[case][3], "batch_goodput_rps", name="published: Clockwork")
    ours = [over_steps(player, _batch_rates(tallies[player.name, case], step_s)) for player in everyone]
    return Panel(
        name=f"goodput of {case}", x_label="SLO of the latency-sensitive (ms)", y_label="batch requests/s",
        series=(published, *ours), x_log=True,
    )  # fmt: skip


def _claims(everyone: Sequence[Player], tallies: Tallies, step_s: float) -> list[PaperClaim]:
    """The floors beside 12 batch clients, for our policy at the larger cap; the paper's shape as released."""
    case = "12 batch clients of 16"
    published = curve("fig8", CASES[case][2], "satisfaction")
    published_rps = curve("fig8", CASES[case][3], "batch_goodput_rps")
    claims = []
    for player in everyone:
        tally = tallies[player.name, case]
        for slo, ours, rate in zip(STEPS_MS, satisfied(tally), _batch_rates(tally, step_s), strict=False):
            paper = published.at(slo)
            name = f"satisfaction at {slo:g} ms, {case}: {player.name}"
            if player.ours and slo in FLOORS:
                floor, floor_rps = FLOORS[slo]
                claims += [
                    PaperClaim(name=name, paper=paper, ours=ours, sense=">=", target=floor),
                    PaperClaim(name=f"batch goodput at {slo:g} ms, {case}: {player.name}",
                          paper=published_rps.at(slo), ours=rate, sense=">=", target=floor_rps),
                ]  # fmt: skip
            if player.agrees and slo in {6.53, 22.0, 33.0, 49.6}:
                sense, target = ("<=", 0.2) if slo < 10 else (">=", 0.98)
                claims.append(
                    PaperClaim(name=f"shape: {name}", paper=paper, ours=ours, sense=sense, target=target)
                )
    return claims
