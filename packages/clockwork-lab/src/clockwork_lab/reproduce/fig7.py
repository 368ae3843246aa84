"""Fig 7: how tight an SLO six GPUs can meet, for few and many models and three rates."""

from __future__ import annotations

from collections.abc import Sequence

from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, curve, points
from clockwork_lab.reproduce.limits import LimitStretch, satisfactions, stretches
from clockwork_lab.reproduce.players import Player, dominance_claims
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.sim import Tally
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Ramp, Scenario

KIND, DEVICES = "resnet50_v2", 6
CASES = tuple((models, rate) for rate in (600, 1200, 2400) for models in (12, 48))
FIRST_MS, FACTOR = 2.9, 1.5
STEPS_MS = (2.9, 4.35, 6.53, 9.79, 14.68, 22.0, 33.0, 49.6)
"""The SLO of each step, as the published curves label them."""
LIMIT_S = 5.0
STEP_S, SHORT_STEP_S, WARM_SLO_MS = 30.0, 1.0, 100.0
TARGETS = {
    12: {4.35: 0.75, 6.53: 0.90, 9.79: 0.99, 14.68: 0.999},
    48: {4.35: 0.75, 6.53: 0.88, 9.79: 0.95, 14.68: 0.99},
}
AGREEMENT, AGREES_ABOVE_MS = 0.06, 6.6
STEPPED_LOAD = 1  # the load whose SLO grows step by step

Case = tuple[int, int]


def fig7(run: FigureRun) -> Figure:
    """Every case under every policy."""
    cases = CASES[-1:] if run.short else CASES
    everyone = run.everyone()
    step_s = SHORT_STEP_S if run.short else STEP_S
    scenarios = {case: _scenario(*case, step_s) for case in cases}
    tallies = run.compare(everyone, scenarios, devices=DEVICES, bucket_s=step_s)
    found = {key: satisfied(tally) for key, tally in tallies.items()}
    panels = []
    for case, scenario in scenarios.items():
        published = curve("fig7", scenario.name, "satisfaction", name="published: Clockwork")
        ours = [over_steps(player, found[player.name, case]) for player in everyone]
        limit = limit_of_steps(run, scenario, step_s, "limit")
        panels.append(satisfaction_panel(scenario.name, [published, *ours, limit]))
    return Figure(
        figure="fig7",
        title="satisfaction against the SLO, six GPUs",
        question="How tight an SLO do six GPUs meet, with few and many models, at three rates?",
        setup=run.setup(
            experiment=f"{DEVICES} GPUs, N copies of {KIND}, Poisson arrivals of R r/s over all of them, SLO "
            f"x {FACTOR:g} every {step_s:g} s from {FIRST_MS:g} ms, after {step_s:g} s at {WARM_SLO_MS:g} ms"
        ),
        panels=tuple(panels),
        claims=(*_claims(cases, everyone, found), *dominance_claims(panels, everyone)),
        notes=(
            "Satisfaction is the share of a step's requests that were answered in time.",
            f"The limit is the oracle's for the first {LIMIT_S:g} s of each step: it knows all arrivals.",
        ),
    )


def _scenario(models: int, rate: int, step_s: float) -> Scenario:
    return Scenario(
        name=f"N={models} R={rate}",
        seconds=step_s * (1 + len(STEPS_MS)),
        models=(ModelSet(name="resnet50", kind=KIND, copies=models),),
        loads=stepped_loads("ramp", "resnet50", float(rate), step_s),
    )


def stepped_loads(name: str, models: str, rate_rps: float, step_s: float) -> tuple[LoadTable, ...]:
    """A step at a loose SLO, then a load whose SLO begins tight and grows with each step."""
    return (
        LoadTable(name="warm", models=(models,), arrivals="poisson", rate_rps=rate_rps, slo_ms=WARM_SLO_MS,
                  stop_s=step_s),
        LoadTable(name=name, models=(models,), arrivals="poisson", rate_rps=rate_rps, slo_ms=FIRST_MS,
                  slo_ramp=Ramp(every_s=step_s, factor=FACTOR, until=100.0), start_s=step_s),
    )  # fmt: skip


def satisfied(tally: Tally) -> list[float]:
    """Satisfaction of the load whose SLO grows, for each step."""
    return [row[STEPPED_LOAD].satisfaction for row in tally.rows[1 : 1 + len(STEPS_MS)]]


def over_steps(player: Player, values: Sequence[float]) -> Series:
    """A curve of a policy, with a value for each step."""
    return player.series(zip(STEPS_MS, values, strict=False))


def limit_of_steps(run: FigureRun, scenario: Scenario, step_s: float, name: str) -> Series:
    """The oracle's limit of satisfaction, from the first seconds of each step."""
    wanted = [LimitStretch(step_s * (1 + step), min(LIMIT_S, step_s)) for step in range(len(STEPS_MS))]
    values = satisfactions(run, KIND, stretches(run, scenario, wanted), devices=DEVICES)
    return Series(name=name, role=SeriesRole.LIMIT, points=points(zip(STEPS_MS, values, strict=True)))


def satisfaction_panel(name: str, series: Sequence[Series]) -> Panel:
    """Satisfaction against the SLO."""
    return Panel(
        name=name, x_label="SLO (ms)", y_label="satisfaction", series=tuple(series), x_log=True, y_max=1.05
    )


def _claims(
    cases: Sequence[Case], everyone: Sequence[Player], found: dict[tuple[str, Case], list[float]]
) -> list[PaperClaim]:
    claims = []
    for models, rate in cases:
        published = curve("fig7", f"N={models} R={rate}", "satisfaction")
        for player in everyone:
            for slo, ours in zip(STEPS_MS, found[player.name, (models, rate)], strict=False):
                paper = published.at(slo)
                assert paper is not None
                name = f"N={models} R={rate} at {slo:g} ms: {player.name}"
                if player.agrees and slo > AGREES_ABOVE_MS:
                    claims.append(PaperClaim.near(name, paper, ours, AGREEMENT))
                target = TARGETS[models].get(slo) if rate == max(rate for _, rate in CASES) else None
                if player.ours and target is not None:
                    claims.append(PaperClaim(name=name, paper=paper, ours=ours, sense=">=", target=target))
    return claims
