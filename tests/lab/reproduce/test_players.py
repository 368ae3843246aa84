"""Who is compared, and at which largest batch."""

from __future__ import annotations

from clockwork_lab.reproduce.figure import Role
from clockwork_lab.reproduce.players import RELEASED_CAP, players, soloists
from clockwork_serve.controller import POLICIES, ControllerConfig


def test_every_policy_plays_at_every_cap():
    everyone = players()
    roles = {Role.RELEASED, Role.MENDED} | ({Role.DEFAULT} if "default" in POLICIES else set())

    assert {player.role for player in everyone} == roles
    assert {(player.role, player.cap) for player in everyone} == {
        (role, cap) for role in roles for cap in (16, 8)
    }
    assert all(player.config.max_batch == player.cap for player in everyone)
    assert len({player.name for player in everyone}) == len(everyone)


def test_as_released_differs_from_the_authors_code_in_the_cap_alone():
    for player in players():
        if player.role is Role.RELEASED:
            assert player.config == ControllerConfig.as_released(max_batch=player.cap)


def test_a_players_curve_carries_its_role():
    player = players((8,))[0]
    series = player.series([(1, 2), (3, None)])

    assert (series.name, series.role) == (player.name, player.role)
    assert [(point.x, point.y) for point in series.points] == [(1, 2), (3, None)]


def test_soloists_are_those_that_claims_are_about():
    assert soloists()[0].role is Role.RELEASED
    assert len(soloists()) == 2
    assert soloists()[0].cap == RELEASED_CAP
    assert soloists()[0].agrees
    assert soloists()[1].ours is ("default" in POLICIES)
    assert set(soloists()) <= set(players())
