"""Points where one policy is below another."""

from __future__ import annotations

from clockwork_lab.reproduce.figure import Panel, Role, Series, points
from clockwork_lab.reproduce.players import Player, dominance_claims, points_below
from clockwork_serve.controller import ControllerConfig


def curve(name: str, role: Role, *values: float | None) -> Series:
    return Series(name=name, role=role, points=points(enumerate(values)))


PANEL = Panel(
    name="", x_label="", y_label="",
    series=(
        curve("ours", Role.DEFAULT, 100.0, 100.0, 99.8, None, 50.0),
        curve("released", Role.RELEASED, 90.0, 101.0, 100.0, 10.0, None),
        curve("mended", Role.MENDED, 95.0, 80.0, 100.0, 5.0, None),
    ),
)  # fmt: skip


def player(name: str, role: Role, cap: int = 16) -> Player:
    return Player(name=name, role=role, cap=cap, config=ControllerConfig())


def test_a_point_is_below_if_any_rival_is_above_by_more_than_noise():
    assert points_below(PANEL, "ours", ["released", "mended"]) == [1.0, 3.0]
    assert points_below(PANEL, "ours", ["mended"]) == [3.0]


def test_claims_compare_equal_caps_only():
    everyone = [
        player("ours", Role.DEFAULT), player("released", Role.RELEASED), player("mended", Role.MENDED, cap=8),
    ]  # fmt: skip
    (claim,) = dominance_claims([PANEL, PANEL], everyone)

    assert (claim.ours, claim.met) == (4.0, False)
    assert "16" in claim.name
    assert dominance_claims([PANEL], everyone[1:]) == []
