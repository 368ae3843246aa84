"""Fig 7: how tight an SLO six GPUs can meet, for few and many models and three rates."""

from __future__ import annotations

from clockwork_lab.reproduce.dominance import dominance_claims
from clockwork_lab.reproduce.figure import Claim, Figure, Panel, Role, Series, points
from clockwork_lab.reproduce.limits import LimitStretch, satisfactions, stretches
from clockwork_lab.reproduce.paper_curves import curve
from clockwork_lab.reproduce.players import Player, players, soloists
from clockwork_lab.reproduce.run import Run
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

Satisfactions = dict[tuple[str, int, int], list[float]]


def fig7(run: Run) -> Figure:
    """Every case under every policy."""
    cases = CASES[-1:] if run.short else CASES
    everyone = soloists() if run.short else players()
    step_s = SHORT_STEP_S if run.short else STEP_S
    run.plan(len(cases) * len(everyone))
    found: Satisfactions = {}
    for models, rate in cases:
        for player in everyone:
            tally = run.simulate(_scenario(models, rate, step_s), player, devices=DEVICES, bucket_s=step_s)
            found[player.name, models, rate] = [
                row[1].satisfaction for row in tally.rows[1 : 1 + len(STEPS_MS)]
            ]
    panels = [
        _panel(models, rate, everyone, found, _limit(run, _scenario(models, rate, step_s), step_s))
        for models, rate in cases
    ]
    return Figure(
        figure="fig7",
        title="satisfaction against the SLO, six GPUs",
        setup=run.setup(
            experiment=f"{DEVICES} GPUs, N copies of {KIND}, Poisson arrivals of R r/s over all of them, SLO "
            f"x {FACTOR:g} every {step_s:g} s from {FIRST_MS:g} ms, after {step_s:g} s at {WARM_SLO_MS:g} ms",
        ),
        panels=tuple(panels),
        claims=(*_claims(cases, everyone, found), *dominance_claims(panels, everyone)),
        notes=(
            "Satisfaction is the share of a step's requests that were answered in time.",
            f"The limit is the oracle's for the first {LIMIT_S:g} s of each step: it knows all arrivals.",
        ),
    )


def _scenario(models: int, rate: int, step_s: float) -> Scenario:
    end_s = step_s * (1 + len(STEPS_MS))
    return Scenario(
        name=f"N={models} R={rate}",
        seconds=end_s,
        models=(ModelSet(name="resnet50", kind=KIND, copies=models),),
        loads=(
            LoadTable(name="warm", models=("resnet50",), arrivals="poisson", rate_rps=float(rate),
                 slo_ms=WARM_SLO_MS, stop_s=step_s),
            LoadTable(name="ramp", models=("resnet50",), arrivals="poisson", rate_rps=float(rate),
            slo_ms=FIRST_MS,
                 slo_ramp=Ramp(every_s=step_s, factor=FACTOR, until=100.0), start_s=step_s),
        ),
    )  # fmt: skip


def _limit(run: Run, scenario: Scenario, step_s: float) -> Series:
    """The oracle's limit, from the first seconds of each step."""
    seconds = min(LIMIT_S, step_s)
    wanted = [LimitStretch(step_s * (1 + step), seconds) for step in range(len(STEPS_MS))]
    values = satisfactions(run, KIND, stretches(run, scenario, wanted), devices=DEVICES)
    return Series(name="limit", role=Role.LIMIT, points=points(zip(STEPS_MS, values, strict=True)))


def _panel(
    models: int, rate: int, everyone: tuple[Player, ...], found: Satisfactions, limit: Series
) -> Panel:
    name = f"N={models} R={rate}"
    ours = [
        player.series(zip(STEPS_MS, found[player.name, models, rate], strict=False)) for player in everyone
    ]
    return Panel(
        name=name,
        x_label="SLO (ms)",
        y_label="satisfaction",
        series=(curve("fig7", name, "satisfaction", name="published: Clockwork"), *ours, limit),
        x_log=True,
        y_max=1.05,
    )


def _claims(
    cases: tuple[tuple[int, int], ...], everyone: tuple[Player, ...], found: Satisfactions
) -> list[Claim]:
    claims = []
    for models, rate in cases:
        published = curve("fig7", f"N={models} R={rate}", "satisfaction")
        for player in everyone:
            for slo, ours in zip(STEPS_MS, found[player.name, models, rate], strict=False):
                paper = published.at(slo)
                assert paper is not None
                name = f"N={models} R={rate} at {slo:g} ms: {player.name}"
                if player.agrees and slo > AGREES_ABOVE_MS:
                    claims.append(
                        Claim(
                            name=name, paper=paper, ours=ours, sense="+-", target=paper, tolerance=AGREEMENT
                        )
                    )
                target = TARGETS[models].get(slo) if rate == max(rate for _, rate in CASES) else None
                if player.ours and target is not None:
                    claims.append(Claim(name=name, paper=paper, ours=ours, sense=">=", target=target))
    return claims
