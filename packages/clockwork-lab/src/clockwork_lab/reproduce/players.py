"""The policies that a figure compares, and their largest batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct, structs

from clockwork_lab import released
from clockwork_lab.reproduce.figure import Panel, PaperClaim, Series, SeriesRole, points
from clockwork_serve.controller import POLICIES, ControllerConfig

GOAL_CAP, RELEASED_CAP = 16, 8
"""Largest batches. The paper's text speaks of 16, and our goals are set at it. The authors' code has 8, and
only that gives their figures: 801 r/s in Fig 5 are batches of 8 back to back; so are Fig 8's 2,500 r/s."""
CAPS = (GOAL_CAP, RELEASED_CAP)
COMPARED = ("paper", "default", "released")  # policies that each figure has


class Player(Struct, frozen=True, kw_only=True):
    """One policy with its settings, and how its curves are named and drawn."""

    name: str
    role: SeriesRole
    cap: int
    config: ControllerConfig

    def series(self, pairs: Iterable[tuple[float, float | None]]) -> Series:
        """A curve of this policy: solid at a largest batch of 16, dotted at another."""
        variant = int(self.cap != GOAL_CAP)
        return Series(name=self.name, role=self.role, variant=variant, points=points(pairs))

    @property
    def agrees(self) -> bool:
        """Whether it is expected to reproduce the published values."""
        return self.role is SeriesRole.RELEASED and self.cap == RELEASED_CAP

    @property
    def ours(self) -> bool:
        """Whether it is expected to reach our goals."""
        return self.role is SeriesRole.DEFAULT and self.cap == GOAL_CAP


def players(caps: tuple[int, ...] = CAPS) -> tuple[Player, ...]:
    """Policies ``released``, ``paper`` and ``default``, at each cap."""
    return tuple(_player(*policy, cap) for policy in _policies() for cap in caps)


def named(policies: Iterable[str], caps: tuple[int, ...] = CAPS) -> tuple[Player, ...]:
    """Other policies, which were asked for by name, at each cap."""
    others = [name for name in dict.fromkeys(policies) if name not in COMPARED]
    return tuple(
        _player(name, SeriesRole.OTHER, ControllerConfig(policy=name), cap) for name in others for cap in caps
    )


def soloists() -> tuple[Player, ...]:
    """Only those with claims: as released at its cap, and ours (or its baseline) at that of the goals."""
    last = _policies()[-1][1]
    return tuple(
        player for player in players() if player.agrees or (player.role is last and player.cap == GOAL_CAP)
    )


def _player(name: str, role: SeriesRole, config: ControllerConfig, cap: int) -> Player:
    config = structs.replace(config, max_batch=cap)
    return Player(name=f"{name}, batch ≤ {cap}", role=role, cap=cap, config=config)


def _policies() -> list[tuple[str, SeriesRole, ControllerConfig]]:
    policies = [
        ("paper as released", SeriesRole.RELEASED, released.settings()),
        ("paper mended", SeriesRole.MENDED, ControllerConfig(policy="paper")),
    ]
    if "default" in POLICIES:
        policies.append(("default", SeriesRole.DEFAULT, ControllerConfig(policy="default")))
    return policies


# ------------------------------------------------------------
# Checks whether our policy is anywhere below the paper's at the same largest batch.


NOISE = 0.005  # relative noise: smaller differences are not significant


def dominance_claims(panels: Sequence[Panel], everyone: Sequence[Player]) -> list[PaperClaim]:
    """For each cap: how many points of ``default`` lie below policy ``paper``, where more is better."""
    claims = []
    for cap in CAPS:
        ours = [player.name for player in everyone if player.role is SeriesRole.DEFAULT and player.cap == cap]
        theirs = [
            player.name
            for player in everyone
            if player.role in (SeriesRole.RELEASED, SeriesRole.MENDED) and player.cap == cap
        ]
        if not ours or not theirs:
            continue
        below = sum(len(points_below(panel, ours[0], theirs)) for panel in panels)
        claims.append(
            PaperClaim(name=f"points where default is below policy paper, batch ≤ {cap}", paper=None,
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
