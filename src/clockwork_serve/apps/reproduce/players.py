"""The policies that a figure compares, at which largest batch. It knows no experiment."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct, structs

from clockwork_serve.apps.reproduce.figure import Role, Series, points
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.config import POLICIES

CAPS = (16, 8)
"""Largest batches: the paper's text speaks of 16, the authors' code has 8."""


class Player(Struct, frozen=True, kw_only=True):
    """One policy with its settings, and how its curves are named and drawn."""

    name: str
    role: Role
    cap: int
    config: ControllerConfig
    variant: int

    def series(self, pairs: Iterable[tuple[float, float | None]]) -> Series:
        """A curve of this policy."""
        return Series(name=self.name, role=self.role, variant=self.variant, points=points(pairs))


def players(caps: tuple[int, ...] = CAPS) -> tuple[Player, ...]:
    """Policy ``paper`` as released and mended, and ``default``, at each cap."""
    policies = [
        ("paper as released", Role.RELEASED, ControllerConfig.as_released()),
        ("paper mended", Role.MENDED, ControllerConfig(policy="paper")),
    ]
    if "default" in POLICIES:
        policies.append(("default", Role.DEFAULT, ControllerConfig(policy="default")))
    return tuple(
        Player(
            name=f"{name}, batch ≤ {cap}",
            role=role,
            cap=cap,
            config=_capped(config, cap),
            variant=int(cap != max(caps)),
        )
        for name, role, config in policies
        for cap in caps
    )


def _capped(config: ControllerConfig, cap: int) -> ControllerConfig:
    return structs.replace(config, max_batch=cap)
