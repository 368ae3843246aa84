"""Every simulated figure in its short form: it runs, is whole, and has the shape that the paper shows."""

from __future__ import annotations

from functools import cache

import pytest

from clockwork_lab.reproduce import NAMES, experiment
from clockwork_lab.reproduce.figure import Figure, Series, SeriesRole
from clockwork_lab.reproduce.run import FigureRun

pytestmark = pytest.mark.slow  # all together

SIMULATED = ("fig5", "fig6", "fig7", "fig8", "fig9", "fig11")


@cache
def made(name: str) -> Figure:
    return experiment(name)(FigureRun(seed=1, short=True))


def series(figure: Figure, panel: str, role: SeriesRole) -> Series:
    return next(
        each for found in figure.panels if found.name == panel for each in found.series if each.role is role
    )


def test_every_name_has_an_experiment():
    assert [experiment(name).__name__ for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", SIMULATED)
def test_a_figure_is_whole(name: str):
    figure = made(name)

    assert figure.figure == name
    assert figure.setup["length"] == "short"
    roles = {each.role for panel in figure.panels for each in panel.series}
    assert {SeriesRole.PAPER, SeriesRole.RELEASED} <= roles
    for panel in figure.panels:
        assert all(each.points for each in panel.series), panel.name
        assert len({each.name for each in panel.series}) == len(panel.series)


def test_fig5_goodput_is_near_the_published_and_below_the_limit():
    figure = made("fig5")
    released = series(figure, "goodput", SeriesRole.RELEASED)
    limit = series(figure, "goodput", SeriesRole.LIMIT)

    assert released.at(50.0) == pytest.approx(801, rel=0.2)
    assert (limit.at(50.0) or 0) == pytest.approx(924.9, abs=0.1)
    assert (released.at(50.0) or 0) <= (limit.at(50.0) or 0)


def test_fig6_goodput_of_the_many_falls_as_they_become_more():
    points = [point.y or 0 for point in series(made("fig6"), "Major goodput", SeriesRole.RELEASED).points]

    assert max(points[:5]) > 1.4 * points[-1]
    assert points[-1] == pytest.approx(176, rel=0.25)
    cold = [
        point.y
        for point in series(made("fig6"), "Major cold starts", SeriesRole.RELEASED).points
        if point.x > 40
    ]
    assert all(share is not None and share > 50 for share in cold)


def test_fig7_satisfaction_grows_with_the_slo():
    panel = made("fig7").panels[0]
    released = next(each for each in panel.series if each.role is SeriesRole.RELEASED)

    assert (released.at(2.9) or 0) < 0.05
    assert (released.at(9.79) or 0) == pytest.approx(0.86, abs=0.1)
    assert (released.at(49.6) or 0) > 0.98


@pytest.mark.parametrize("name", ["fig7", "fig8"])
def test_no_policy_is_above_the_oracle(name: str):
    limited = [panel for panel in made(name).panels if panel.series[-1].role is SeriesRole.LIMIT]

    assert limited
    for panel in limited:
        *others, limit = panel.series
        for policy in (each for each in others if each.role is not SeriesRole.PAPER):
            for point in policy.points:
                assert (point.y or 0) <= (limit.at(point.x) or 0) + 1e-9, (panel.name, policy.name, point.x)


def test_fig8_batch_clients_cost_the_sensitive_below_10_ms():
    figure = made("fig8")
    alone = series(figure, "latency-sensitive, alone", SeriesRole.RELEASED)
    beside = series(figure, "latency-sensitive, 12 batch clients of 16", SeriesRole.RELEASED)

    assert (alone.at(6.53) or 0) > 0.5 > (beside.at(6.53) or 0)
    assert (beside.at(49.6) or 0) > 0.95


def test_fig9_loses_little_even_from_cold_and_claims_what_was_asked_for():
    figure = made("fig9")
    released = {
        panel.name.removeprefix("generated trace: "): sum(point.y or 0 for point in each.points)
        for panel in figure.panels
        for each in panel.series
        if each.role is SeriesRole.RELEASED
    }

    assert 0 <= released["lost"] < 0.02 * released["good answers"]
    assert released["cold starts"] > 0
    assert {claim.name.split(";")[0].split(" (")[0] for claim in figure.claims} == {
        "lost", "GPUs busy", "cold starts, share",
    }  # fmt: skip


def test_fig11_twice_the_workers_do_twice_the_work():
    peak = series(made("fig11"), "peak goodput", SeriesRole.RELEASED)

    assert (peak.at(10.0) or 0) == pytest.approx(2 * (peak.at(5.0) or 0), rel=0.25)


def test_a_seed_decides_everything():
    again, other = (experiment("fig5")(FigureRun(seed=seed, short=True)) for seed in (1, 2))

    assert again.panels == made("fig5").panels
    assert other.panels != again.panels
