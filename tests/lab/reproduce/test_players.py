"""Who is compared, and at which largest batch."""

from __future__ import annotations

import pytest

from clockwork_lab import released
from clockwork_lab.reproduce.fig5 import fig5
from clockwork_lab.reproduce.figure import Panel, Series, SeriesRole, points
from clockwork_lab.reproduce.players import (
    RELEASED_CAP,
    Player,
    dominance_claims,
    players,
    points_below,
    soloists,
)
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.controller.policies import SCHEDULERS, PaperScheduler


def test_every_policy_plays_at_every_cap():
    everyone = players()
    roles = {SeriesRole.RELEASED, SeriesRole.MENDED} | (
        {SeriesRole.DEFAULT} if "default" in POLICIES else set()
    )

    assert {player.role for player in everyone} == roles
    assert {(player.role, player.cap) for player in everyone} == {
        (role, cap) for role in roles for cap in (16, 8)
    }
    assert all(player.config.max_batch == player.cap for player in everyone)
    assert len({player.name for player in everyone}) == len(everyone)


def test_as_released_differs_from_the_authors_code_in_the_cap_alone():
    for player in players():
        if player.role is SeriesRole.RELEASED:
            assert player.config == released.settings(max_batch=player.cap)


def test_a_players_curve_carries_its_role():
    player = players((8,))[0]
    series = player.series([(1, 2), (3, None)])

    assert (series.name, series.role) == (player.name, player.role)
    assert [(point.x, point.y) for point in series.points] == [(1, 2), (3, None)]


def test_soloists_are_those_that_claims_are_about():
    assert soloists()[0].role is SeriesRole.RELEASED
    assert len(soloists()) == 2
    assert soloists()[0].cap == RELEASED_CAP
    assert soloists()[0].agrees
    assert soloists()[1].ours is ("default" in POLICIES)
    assert set(soloists()) <= set(players())


def test_another_policy_plays_beside_them_at_every_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULERS, "mine", PaperScheduler)
    run = FigureRun(short=True, policies=("mine", "default", "mine"))
    everyone = run.everyone()
    assert everyone[:2] == soloists()
    assert [(one.name, one.role, one.config.policy) for one in everyone[2:]] == [
        (f"mine, batch ≤ {cap}", SeriesRole.OTHER, "mine") for cap in (16, 8)
    ]
    assert not any(one.agrees or one.ours for one in everyone[2:])
    goodput = fig5(run).panels[0]
    mine = next(series for series in goodput.series if series.name == "mine, batch ≤ 16")
    assert mine.role is SeriesRole.OTHER
    assert any(point.y for point in mine.points)


def curve(name: str, role: SeriesRole, *values: float | None) -> Series:
    return Series(name=name, role=role, points=points(enumerate(values)))


PANEL = Panel(
    name="", x_label="", y_label="",
    series=(
        curve("ours", SeriesRole.DEFAULT, 100.0, 100.0, 99.8, None, 50.0),
        curve("released", SeriesRole.RELEASED, 90.0, 101.0, 100.0, 10.0, None),
        curve("mended", SeriesRole.MENDED, 95.0, 80.0, 100.0, 5.0, None),
    ),
)  # fmt: skip


def player(name: str, role: SeriesRole, cap: int = 16) -> Player:
    return Player(name=name, role=role, cap=cap, config=ControllerConfig())


def test_a_point_is_below_if_any_rival_is_above_by_more_than_noise():
    assert points_below(PANEL, "ours", ["released", "mended"]) == [1.0, 3.0]
    assert points_below(PANEL, "ours", ["mended"]) == [3.0]


def test_claims_compare_equal_caps_only():
    everyone = [
        player("ours", SeriesRole.DEFAULT), player("released", SeriesRole.RELEASED),
        player("mended", SeriesRole.MENDED, cap=8),
    ]  # fmt: skip
    (claim,) = dominance_claims([PANEL, PANEL], everyone)

    assert (claim.ours, claim.met) == (4.0, False)
    assert "16" in claim.name
    assert dominance_claims([PANEL], everyone[1:]) == []
