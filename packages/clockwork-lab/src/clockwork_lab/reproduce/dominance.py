"""Checks whether our policy is anywhere below the paper's at the same largest batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from clockwork_lab.reproduce.figure import Claim, Panel, Role
from clockwork_lab.reproduce.players import CAPS, Player

NOISE = 0.005
"""Relative noise: smaller differences are not significant."""


def dominance_claims(panels: Sequence[Panel], everyone: Sequence[Player]) -> list[Claim]:
    """For each cap: how many points of ``default`` lie below policy ``paper``, where more is better."""
    claims = []
    for cap in CAPS:
        ours = [player.name for player in everyone if player.role is Role.DEFAULT and player.cap == cap]
        theirs = [
            player.name
            for player in everyone
            if player.role in (Role.RELEASED, Role.MENDED) and player.cap == cap
        ]
        if not ours or not theirs:
            continue
        below = sum(len(points_below(panel, ours[0], theirs)) for panel in panels)
        claims.append(
            Claim(name=f"points where default is below policy paper, batch ≤ {cap}", paper=None,
                  ours=float(below), sense="<=", target=0.0)
        )  # fmt: skip
    return claims


def points_below(panel: Panel, ours: str, theirs: Iterable[str]) -> list[float]:
    """The x values at which our curve is below any of theirs, by more than noise."""
    curves = {series.name: series for series in panel.series}
    rivals = [curves[name] for name in theirs]
    below = []
    for point in curves[ours].points:
        best = max((value for rival in rivals if (value := rival.at(point.x)) is not None), default=None)
        if best is not None and (point.y or 0.0) < best * (1 - NOISE):
            below.append(point.x)
    return below
