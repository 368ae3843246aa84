"""Histograms keep quantiles within their stated error; nothing else is counted here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.telemetry.counters import BOUNDS_NS, ErrorCounters, Histogram


def filled(durations: list[int]) -> Histogram:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    return histogram


def test_bounds_ascend_and_hold_1_2_5() -> None:
    assert list(BOUNDS_NS) == sorted(set(BOUNDS_NS))
    assert {1_000, 2_000, 5_000, 10**6, 5 * 10**8, 10**11} <= set(BOUNDS_NS)


def test_an_empty_histogram_has_no_quantile() -> None:
    assert Histogram().quantile_ns(0.5) is None


def test_counts_and_sum_are_exact() -> None:
    histogram = filled([1_000, 1_001, 10**12, -5])
    assert (histogram.count, histogram.sum_ns) == (4, 1_000 + 1_001 + 10**12)
    assert histogram.counts[-1] == 1


@given(st.lists(st.integers(1_001, 10**10), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_within_one_bucket(durations: list[int], share: float) -> None:
    found = filled(durations).quantile_ns(share)
    exact = sorted(durations)[max(0, -(-int(share * 1000) * len(durations) // 1000) - 1)]
    assert found is not None
    assert abs(found - exact) <= 0.15 * exact


def test_prediction_errors_join_both_directions() -> None:
    errors = ErrorCounters(under=filled([1_000_000] * 3), over=filled([5_000] * 1))
    found = errors.quantile_ns(0.5)
    assert found is not None
    assert 890_000 <= found <= 1_000_000
