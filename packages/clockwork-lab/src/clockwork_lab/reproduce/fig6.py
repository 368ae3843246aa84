"""Fig 6: 3600 models are added to one GPU, one a second, beside one busy model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, curve, points, value
from clockwork_lab.reproduce.limits import OTHERS_WEIGH, LimitStretch, bound, stretches
from clockwork_lab.reproduce.players import Player, dominance_claims
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.sim import Tally
from clockwork_serve.sim.tally import Busy, Count
from clockwork_serve.units import NS_PER_S, to_ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Ramp, Scenario

KIND = "resnet50_v2"
MODELS, MINOR_RPS, MAJOR_RPS, SLO_MS = 3600, 200.0, 1000.0, 100.0
LEAD_S, HOUR_S, BUCKET_S = 60.0, 3600.0, 30.0
SHORT_HOUR_S = 18.0  # the short form adds the hour's models within 18 s
LIMIT_S = 20.0
AGREEMENT = 0.15
MINOR, MAJOR = 0, 1

Value = Callable[[Sequence[Count], Busy], float | None]
Pairs = list[tuple[float, float | None]]


def fig6(run: FigureRun) -> Figure:
    """The hour, under every policy."""
    hour_s = SHORT_HOUR_S if run.short else HOUR_S
    shrink = hour_s / HOUR_S
    bucket_s = max(1.0, BUCKET_S * shrink)
    lead_s = LEAD_S * shrink if run.short else LEAD_S
    everyone = run.everyone()
    compared = run.compare(everyone, {"": _scenario(lead_s, hour_s)}, devices=1, bucket_s=bucket_s)
    tallies = {name: tally for (name, _), tally in compared.items()}

    def panel(name: str, y_label: str, published: Series, read: Value, limit: Sequence[Series] = ()) -> Panel:
        ours = [
            player.series(_along(tallies[player.name], read, lead_s, shrink, bucket_s)) for player in everyone
        ]
        x_label = "minutes since the first of the Major models"
        return Panel(name=name, x_label=x_label, y_label=y_label, series=(published, *ours, *limit))

    panels = (
        panel("Major goodput", "requests/s", _published("Major goodput", "goodput_rps"),
              _rate(MAJOR, bucket_s), [_limit(run, lead_s, hour_s)]),
        panel("Minor goodput", "requests/s", _published("Minor goodput", "goodput_rps"),
              _rate(MINOR, bucket_s)),
        panel("Major mean latency", "ms", _published("Major latency", "mean_latency_ms"), _latency(MAJOR)),
        panel("Minor mean latency", "ms", _published("Minor latency", "mean_latency_ms"), _latency(MINOR)),
        panel("Major cold starts", "% of good answers", _published("Major cold starts", "percent"),
              lambda row, _: 100 * row[MAJOR].cold / row[MAJOR].ok if row[MAJOR].ok else None),
        panel("LOAD lane busy", "% of the time", _published("PCIe busy", "percent"),
              lambda _, busy: min(100.0, 100 * busy.load_ns / (bucket_s * NS_PER_S))),
        panel("EXEC lane busy", "% of the time", _published("GPU busy", "percent"),
              lambda _, busy: min(100.0, 100 * busy.exec_ns / (bucket_s * NS_PER_S))),
    )  # fmt: skip
    return Figure(
        figure="fig6",
        title="thousands of models on one GPU",
        question=f"What happens to goodput as {MODELS:,} models come to share one GPU beside a busy one?",
        setup=run.setup(
            experiment=f"1 GPU of 1376 pages; Minor: 1 copy of {KIND} at {MINOR_RPS:g} r/s; Major: "
            f"{MAJOR_RPS:g} r/s evenly over 1 copy, one more every {hour_s / MODELS:g} s up to {MODELS}; "
            f"Poisson; SLO {SLO_MS:g} ms; {lead_s:g} s of Minor alone before; one point for {bucket_s:g} s"
        ),
        panels=panels,
        claims=() if run.short else tuple(_claims(everyone, tallies, panels[0], panels[1])),
        notes=(
            "The limit of Major is the oracle's, beside a Minor served in full, for those without foresight.",
            "Mean latency is of good answers.",
        ),
    )


def _scenario(lead_s: float, hour_s: float) -> Scenario:
    return Scenario(
        name="an hour of models",
        seconds=lead_s + hour_s,
        models=(ModelSet(name="minor", kind=KIND), ModelSet(name="major", kind=KIND, copies=MODELS)),
        loads=(
            LoadTable(name="Minor", models=("minor",), arrivals="poisson", rate_rps=MINOR_RPS, slo_ms=SLO_MS),
            LoadTable(
                name="Major", models=("major",), arrivals="poisson", rate_rps=MAJOR_RPS, slo_ms=SLO_MS,
                start_s=lead_s, active_models=1,
                model_ramp=Ramp(every_s=hour_s / MODELS, add=1, until=float(MODELS)),
            ),
        ),
    )  # fmt: skip


def _along(tally: Tally, read: Value, lead_s: float, shrink: float, bucket_s: float) -> Pairs:
    """A value for each interval but the last, at its middle, in minutes of the paper's hour."""
    found: Pairs = []
    for at, (row, busy) in enumerate(zip(tally.rows, tally.busy_rows, strict=False)):
        middle_s = (at + 0.5) * bucket_s - lead_s
        if middle_s / shrink < HOUR_S:
            found.append((middle_s / shrink / 60, read(row, busy)))
    return found


def _published(series: str, y_name: str) -> Series:
    return curve("fig6", series, y_name, name="published: Clockwork")


def _rate(load: int, bucket_s: float) -> Value:
    return lambda row, _: row[load].ok / bucket_s


def _latency(load: int) -> Value:
    return lambda row, _: to_ms(round(row[load].answered.mean_ns)) if row[load].ok else None


def _limit(run: FigureRun, lead_s: float, hour_s: float) -> Series:
    """The oracle's limit for Major if Minor is served in full, at the minutes of the published curve."""
    shrink = hour_s / HOUR_S
    seconds = LIMIT_S * shrink
    minutes = [point.x for point in curve("fig6", "Major goodput", "goodput_rps").points]
    wanted = [LimitStretch(lead_s + minute * 60 * shrink - seconds / 2, seconds) for minute in minutes]
    values = []
    for minute, requests in zip(minutes, stretches(run, _scenario(lead_s, hour_s), wanted), strict=True):
        each_rps = MAJOR_RPS / max(1.0, minute * MODELS / 60)
        rates = [MINOR_RPS] + [each_rps] * max(requests.models)
        limit = bound(run, KIND, requests, devices=1, rates_rps=rates, first_class=MINOR)
        values.append((limit.goodput - OTHERS_WEIGH * requests.loads.count(MINOR)) / seconds)
    return Series(name="limit", role=SeriesRole.LIMIT, points=points(zip(minutes, values, strict=True)))


def _claims(
    everyone: Sequence[Player], tallies: dict[str, Tally], major: Panel, minor: Panel
) -> list[PaperClaim]:
    claims = []
    for player in everyone:
        own_major, own_minor = (_own(panel, player) for panel in (major, minor))
        for name, own in (("Major goodput", own_major), ("Minor goodput", own_minor)):
            for minute, published in _published_minutes(name):
                about = f"{name} at {minute:g} min: {player.name}"
                ours = at_minute(own, minute)
                if player.agrees:
                    claims.append(PaperClaim.near(about, published, ours, AGREEMENT * published))
                elif player.ours and own is own_major:
                    claims.append(
                        PaperClaim(name=about, paper=published, ours=ours, sense=">=", target=published)
                    )
        if player.ours:
            claims += _own_claims(player, tallies[player.name], major, own_major, own_minor)
    return claims + dominance_claims([major], everyone)


def _own(panel: Panel, player: Player) -> Series:
    return next(series for series in panel.series if series.name == player.name)


def _published_minutes(name: str) -> list[tuple[float, float]]:
    """The published values along the hour."""
    found = curve("fig6", name, "goodput_rps").points
    return [(point.x, point.y) for point in found if point.x >= 0 and point.y is not None]


def _own_claims(
    player: Player, tally: Tally, major: Panel, own: Series, own_minor: Series
) -> list[PaperClaim]:
    limit = next(series for series in major.series if series.role is SeriesRole.LIMIT).at(58.0) or 0.0
    longest_ms = max(to_ms(count.answered.max_ns) for count in tally.loads)
    return [
        PaperClaim(name=f"Major goodput at 58 min against the limit: {player.name}",
              paper=value("fig6", "Major goodput", "goodput_rps", 58.0), ours=at_minute(own, 58.0),
              sense=">=", target=0.97 * limit),
        PaperClaim(name=f"Minor goodput at 58 min: {player.name}",
              paper=value("fig6", "Minor goodput", "goodput_rps", 58.0), ours=at_minute(own_minor, 58.0),
              sense="+-", target=MINOR_RPS, tolerance=0.05 * MINOR_RPS),
        PaperClaim(name=f"longest latency of a good answer (ms): {player.name}", paper=96.6, ours=longest_ms,
              sense="<=", target=SLO_MS),
    ]  # fmt: skip


def at_minute(series: Series, minute: float) -> float | None:
    """The value at a minute, between the middles of the stretches around it."""
    known = [(point.x, point.y) for point in series.points if point.y is not None]
    return float(np.interp(minute, [x for x, _ in known], [y for _, y in known])) if known else None
