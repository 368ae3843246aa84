"""Fig 8: latency-sensitive clients on six GPUs, alone and beside batch clients."""

from __future__ import annotations

from clockwork_lab.reproduce.fig7 import FACTOR, FIRST_MS, LIMIT_S, STEPS_MS, WARM_SLO_MS
from clockwork_lab.reproduce.figure import Claim, Figure, Panel, Role, Series, points
from clockwork_lab.reproduce.limits import LimitStretch, stretches
from clockwork_lab.reproduce.limits import satisfactions as share_limits
from clockwork_lab.reproduce.paper_curves import curve
from clockwork_lab.reproduce.players import Player, players, soloists
from clockwork_lab.reproduce.run import Run
from clockwork_serve.sim import Tally
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Ramp, Scenario

KIND, DEVICES = "resnet50_v2", 6
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
SENSITIVE_LOAD, BATCH_LOAD = 1, 2


def fig8(run: Run) -> Figure:
    """Every case under every policy."""
    step_s = SHORT_STEP_S if run.short else STEP_S
    everyone = soloists() if run.short else players()
    run.plan(len(CASES) * len(everyone))
    tallies = {
        (case, player.name): run.simulate(_scenario(case, step_s), player, devices=DEVICES, bucket_s=step_s)
        for case in CASES
        for player in everyone
    }
    limit = alone_limit(run, step_s)
    satisfied = [_satisfaction_panel(case, everyone, tallies, limit) for case in CASES]
    batched = [_goodput_panel(case, everyone, tallies, step_s) for case in CASES if CASES[case][0]]
    return Figure(
        figure="fig8",
        title="latency-sensitive clients beside batch clients, six GPUs",
        setup=run.setup(
            experiment=f"{DEVICES} GPUs; {SENSITIVE} latency-sensitive copies of {KIND} at {SENSITIVE_RPS:g} "
            f"r/s each, Poisson; their SLO: {WARM_SLO_MS:g} ms for {step_s:g} s, then {FIRST_MS:g} ms, x "
            f"{FACTOR:g} every {step_s:g} s; batch clients: closed loop, a day of SLO, started within "
            f"{min(JITTER_S, step_s / 2):g} s",
        ),
        panels=(*satisfied, *batched),
        claims=tuple(_claims(everyone, tallies, step_s)),
        notes=("The limit is the oracle's for the latency-sensitive clients alone.",),
    )


def _scenario(case: str, step_s: float) -> Scenario:
    models, concurrency, _, _ = CASES[case]
    rate = SENSITIVE * SENSITIVE_RPS
    sets = [ModelSet(name="sensitive", kind=KIND, copies=SENSITIVE)]
    loads = [
        LoadTable(name="warm", models=("sensitive",), arrivals="poisson", rate_rps=rate, slo_ms=WARM_SLO_MS,
             stop_s=step_s),
        LoadTable(name="sensitive", models=("sensitive",), arrivals="poisson", rate_rps=rate, slo_ms=FIRST_MS,
             slo_ramp=Ramp(every_s=step_s, factor=FACTOR, until=100.0), start_s=step_s),
    ]  # fmt: skip
    if models:
        sets.append(ModelSet(name="batch", kind=KIND, copies=models))
        jitter_s = min(JITTER_S, step_s / 2)
        loads.append(
            LoadTable(name="batch", models=("batch",), arrivals="closed", concurrency=concurrency,
                 start_jitter_s=jitter_s)
        )  # fmt: skip
    return Scenario(name=case, seconds=step_s * (1 + len(STEPS_MS)), models=tuple(sets), loads=tuple(loads))


def satisfactions(tally: Tally) -> list[float]:
    """Satisfaction of the latency-sensitive clients, for each step."""
    return [row[SENSITIVE_LOAD].satisfaction for row in tally.rows[1 : 1 + len(STEPS_MS)]]


def batch_rates(tally: Tally, step_s: float) -> list[float]:
    """Goodput per second of the batch clients, for each step."""
    return [row[BATCH_LOAD].ok / step_s for row in tally.rows[1 : 1 + len(STEPS_MS)]]


def alone_limit(run: Run, step_s: float) -> Series:
    """The oracle's for the latency-sensitive clients alone, from the first seconds of each step."""
    wanted = [LimitStretch(step_s * (1 + step), min(LIMIT_S, step_s)) for step in range(len(STEPS_MS))]
    found = stretches(run, _scenario("alone", step_s), wanted)
    values = share_limits(run, KIND, found, devices=DEVICES)
    return Series(name="limit, alone", role=Role.LIMIT, points=points(zip(STEPS_MS, values, strict=True)))


def _satisfaction_panel(
    case: str, everyone: tuple[Player, ...], tallies: dict[tuple[str, str], Tally], limit: Series
) -> Panel:
    published = curve("fig8", CASES[case][2], "satisfaction", name="published: Clockwork")
    return Panel(
        name=f"latency-sensitive, {case}",
        x_label="SLO (ms)",
        y_label="satisfaction",
        series=(
            published,
            *(_steps(player, satisfactions(tallies[case, player.name])) for player in everyone),
            limit,
        ),
        x_log=True,
        y_max=1.05,
    )


def _goodput_panel(
    case: str, everyone: tuple[Player, ...], tallies: dict[tuple[str, str], Tally], step_s: float
) -> Panel:
    published = curve("fig8", CASES[case][3], "batch_goodput_rps", name="published: Clockwork")
    ours = (_steps(player, batch_rates(tallies[case, player.name], step_s)) for player in everyone)
    return Panel(
        name=f"goodput of {case}",
        x_label="SLO of the latency-sensitive (ms)",
        y_label="batch requests/s",
        series=(published, *ours),
        x_log=True,
    )


def _steps(player: Player, values: list[float]) -> Series:
    return player.series(zip(STEPS_MS, values, strict=False))


def _claims(
    everyone: tuple[Player, ...], tallies: dict[tuple[str, str], Tally], step_s: float
) -> list[Claim]:
    """The floors beside 12 batch clients, for our policy at the larger cap; the paper's shape as released."""
    case = "12 batch clients of 16"
    claims = []
    for player in everyone:
        tally = tallies[case, player.name]
        for slo, satisfied, rate in zip(
            STEPS_MS, satisfactions(tally), batch_rates(tally, step_s), strict=False
        ):
            paper = curve("fig8", CASES[case][2], "satisfaction").at(slo)
            paper_rps = curve("fig8", CASES[case][3], "batch_goodput_rps").at(slo)
            name = f"satisfaction at {slo:g} ms, {case}: {player.name}"
            if player.ours and slo in FLOORS:
                floor, floor_rps = FLOORS[slo]
                claims += [
                    Claim(name=name, paper=paper, ours=satisfied, sense=">=", target=floor),
                    Claim(name=f"batch goodput at {slo:g} ms, {case}: {player.name}", paper=paper_rps,
                          ours=rate, sense=">=", target=floor_rps),
                ]  # fmt: skip
            if player.agrees and slo in {6.53, 22.0, 33.0, 49.6}:
                low = slo < 10
                claims.append(
                    Claim(name=f"shape: {name}", paper=paper, ours=satisfied, sense="<=" if low else ">=",
                          target=0.2 if low else 0.98)
                )  # fmt: skip
    return claims
