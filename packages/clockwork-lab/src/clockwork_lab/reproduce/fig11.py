"""Fig 11: goodput through one controller as emulated workers are added, on virtual time."""

from __future__ import annotations

import time

from msgspec import Struct, structs

from clockwork_lab.reproduce.fig9 import FUNCTIONS, SLO_MS, model_sets
from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, SeriesRole, curve, value
from clockwork_lab.reproduce.players import Player, named, players, soloists
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.units import ms
from clockwork_serve.workload.scenario import LoadTable, Ramp, Scenario

WORKERS, SHORT_WORKERS = (10, 30, 40, 50, 70, 90, 110, 130, 150), (5, 10)
FIRST_RPS, FACTOR, STEPS = 500.0, 1.5, 4
"""Requests/s for each worker at first; x 1.5 each step, as in the paper, from below the peak to far above."""
STEP_S, SHORT_STEP_S, WARM_S = 1.0, 0.1, 1.0
MAX_EXEC_MS, CAP = 25.0, 8
BRAIN_RPS = 110_000.0
US_PER_S = 1e6
NOTES = (
    "On virtual time the controller is never the bottleneck; what it costs is in the second panel.",
    "That is an upper bound: the simulated workers and the world run on the same core.",
    "The paper's controller uses about 18 cores; its goodput beyond 110 workers is bound by them.",
)


class Reached(Struct, frozen=True):
    """One run: goodput of each step in requests/s, and the CPU time per request in seconds."""

    rates: tuple[float, ...]
    cpu_s: float

    @property
    def peak_rps(self) -> float:
        """The best step."""
        return max(self.rates, default=0.0)


def fig11(run: FigureRun) -> Figure:
    """Every number of workers under every policy, at the authors' largest batch."""
    workers = SHORT_WORKERS if run.short else WORKERS
    step_s = SHORT_STEP_S if run.short else STEP_S
    alone = {player.role for player in soloists()} if run.short else set(SeriesRole)
    ours = [player for player in players((CAP,)) if player.role in alone]
    everyone = tuple(map(_as_published, (*ours, *named(run.policies, (CAP,)))))
    run.plan(len(workers) * len(everyone))
    found = {
        (player.name, count): _measure(run, player, count, step_s) for player in everyone for count in workers
    }
    return Figure(
        figure="fig11",
        title="goodput through one controller, emulated workers, virtual time",
        question="How much goodput goes through one controller as workers are added?",
        setup=run.setup(
            experiment=f"N workers of one GPU, {FUNCTIONS:,} generated functions on 4,026 instances of the "
            f"paper's models, SLO {SLO_MS:g} ms, batch ≤ {CAP}, INFERs of at most {MAX_EXEC_MS:g} ms; "
            f"{FIRST_RPS:g} r/s for each worker, x {FACTOR:g} every {step_s:g} s, {STEPS} steps"
        ),
        panels=(
            Panel(
                name="peak goodput",
                x_label="workers",
                y_label="requests/s",
                series=(
                    curve("fig11", "Clockwork", "goodput_rps", name="published: Clockwork"),
                    *(
                        player.series((count, found[player.name, count].peak_rps) for count in workers)
                        for player in everyone
                    ),
                ),
            ),
            Panel(
                name="CPU of controller, workers and world together",
                x_label="workers",
                y_label="us per request",
                series=tuple(
                    player.series((count, US_PER_S * found[player.name, count].cpu_s) for count in workers)
                    for player in everyone
                ),
            ),
        ),
        claims=tuple(_claims(workers, everyone, found)),
        notes=NOTES,
    )


def _as_published(player: Player) -> Player:
    return structs.replace(player, config=structs.replace(player.config, max_exec_ns=ms(MAX_EXEC_MS)))


def _scenario(run: FigureRun, workers: int, step_s: float) -> Scenario:
    sets = model_sets(run.zoo)
    names = tuple(each.name for each in sets)
    first = FIRST_RPS * workers
    return Scenario(
        name=f"{workers} workers",
        seconds=WARM_S + STEPS * step_s,
        warmup_s=WARM_S,
        models=sets,
        loads=(
            LoadTable(name="warm", models=names, arrivals="generated", functions=FUNCTIONS, rate_rps=first,
                 slo_ms=SLO_MS, stop_s=WARM_S),
            LoadTable(name="calls", models=names, arrivals="generated", functions=FUNCTIONS, rate_rps=first,
                 slo_ms=SLO_MS, start_s=WARM_S, counts="rates",
                 rate_ramp=Ramp(every_s=step_s, factor=FACTOR)),
        ),
    )  # fmt: skip


def _measure(run: FigureRun, player: Player, workers: int, step_s: float) -> Reached:
    started = time.process_time()
    tally = run.simulate(_scenario(run, workers, step_s), player, devices=workers, bucket_s=step_s)
    cpu_s = time.process_time() - started
    first = round(WARM_S / step_s)
    rates = tuple(row[1].ok / step_s for row in tally.rows[first : first + STEPS])
    return Reached(rates, cpu_s / max(1, sum(count.offered for row in tally.rows for count in row)))


def _claims(
    workers: tuple[int, ...], everyone: tuple[Player, ...], found: dict[tuple[str, int], Reached]
) -> list[PaperClaim]:
    claims = []
    for player in everyone:
        most = max(workers, key=lambda count: found[player.name, count].peak_rps)
        reached = found[player.name, most]
        if player.role is SeriesRole.MENDED:
            continue
        claims.append(
            PaperClaim(name=f"peak goodput on virtual time, at {most} workers: {player.name}",
                  paper=value("fig11", "Clockwork", "goodput_rps", 110.0), ours=reached.peak_rps, sense=">=",
                  target=value("fig11", "Clockwork", "goodput_rps", min(110.0, float(most))))
        )  # fmt: skip
        if player.role is SeriesRole.DEFAULT:
            name = f"requests/s that one core carries at {most} workers, world and all: {player.name}"
            carried = 1 / reached.cpu_s if reached.cpu_s else None
            claims.append(PaperClaim(name=name, paper=None, ours=carried, sense=">=", target=BRAIN_RPS))
    return claims
