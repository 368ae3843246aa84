"""What passes is over when it has passed: one case of each family that the search makes."""

from __future__ import annotations

import pytest

from qa.metastable import FAMILIES, Case, Dice, judged, play


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_steady_load_is_soon_served_as_before(family: str) -> None:
    found = play(family, 3)
    assert found.held, found


def case() -> Case:
    return FAMILIES["retries"](Dice("retries", 1))


def counts(made: Case, *bad_s: float) -> list[tuple[int, int]]:
    """A hundred requests in each quarter of a second, all good, but for those that begin then."""
    bad = {round(4 * at_s) for at_s in bad_s}
    quarters = int(made.scenario.seconds * 1000) // 250
    return [(90 if at in bad else 100, 100) for at in range(quarters)]


def test_what_stays_bad_is_found() -> None:
    made = case()
    end_s = -(-int(made.end_s * 1000) // 250) / 4
    last_s = (int(made.scenario.seconds * 1000) // 250 - 1) / 4
    assert judged("retries", 1, counts(made), made).recovered_s == 0
    late = judged("retries", 1, counts(made, end_s + made.allowed_s + 1), made)
    assert not late.held
    assert late.recovered_s == made.allowed_s + 1.25
    assert judged("retries", 1, counts(made, end_s + 1), made).held
    assert judged("retries", 1, counts(made, last_s), made).recovered_s == float("inf")
