"""The policies that a figure compares, at which largest batch. It knows no experiment."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct, structs

from clockwork_lab.reproduce.figure import Role, Series, points
from clockwork_serve.controller import POLICIES, ControllerConfig

GOAL_CAP, RELEASED_CAP = 16, 8
"""Largest batches. The paper's text speaks of 16, and our goals are set at it. The authors' code has 8, and
only that gives their figures: 801 r/s in Fig 5 are batches of 8 back to back; so are Fig 8's 2,500 r/s."""
CAPS = (GOAL_CAP, RELEASED_CAP)


class Player(Struct, frozen=True, kw_only=True):
    """One policy with its settings, and how its curves are named and drawn."""

    name: str
    role: Role
    cap: int
    config: ControllerConfig

    def series(self, pairs: Iterable[tuple[float, float | None]]) -> Series:
        """A curve of this policy: solid at a largest batch of 16, dotted at another."""
        variant = int(self.cap != GOAL_CAP)
        return Series(name=self.name, role=self.role, variant=variant, points=points(pairs))

    @property
    def agrees(self) -> bool:
        """Whether it should do what was published."""
        return self.role is Role.RELEASED and self.cap == RELEASED_CAP

    @property
    def ours(self) -> bool:
        """Whether it should reach our goals."""
        return self.role is Role.DEFAULT and self.cap == GOAL_CAP


def players(caps: tuple[int, ...] = CAPS) -> tuple[Player, ...]:
    """Policy ``paper`` as released and mended, and ``default``, at each cap."""
    return tuple(
        Player(
            name=f"{name}, batch ≤ {cap}", role=role, cap=cap, config=structs.replace(config, max_batch=cap)
        )
        for name, role, config in _policies()
        for cap in caps
    )


def soloists() -> tuple[Player, ...]:
    """Those alone that claims are about: as released at its cap, and ours (or its baseline) at the goals'."""
    last = _policies()[-1][1]
    return tuple(
        player for player in players() if player.agrees or (player.role is last and player.cap == GOAL_CAP)
    )


def _policies() -> list[tuple[str, Role, ControllerConfig]]:
    policies = [
        ("paper as released", Role.RELEASED, ControllerConfig.as_released()),
        ("paper mended", Role.MENDED, ControllerConfig(policy="paper")),
    ]
    if "default" in POLICIES:
        policies.append(("default", Role.DEFAULT, ControllerConfig(policy="default")))
    return policies
