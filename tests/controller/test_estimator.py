"""Estimates by example."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.estimates import SIGNATURES_MAX, Estimator, Samples
from clockwork_serve.messages import Profile
from clockwork_serve.units import MIB


def test_a_window_starts_from_its_seed() -> None:
    assert Samples(100, size=10, quantile=0.99).estimate_ns == 100


def test_the_estimate_is_nearly_the_largest_of_the_last_ten() -> None:
    samples = Samples(100, size=10, quantile=0.99)
    for value in (10, 20, 30, 40, 50, 60, 70, 80, 90, 200):
        samples.learn(value, 0)
    assert samples.estimate_ns == round(0.91 * 200 + 0.09 * 90), "the paper's interpolation"


def test_a_step_down_is_adopted_within_one_window() -> None:
    samples = Samples(1000, size=10, quantile=0.99)
    for _ in range(10):
        samples.learn(100, 0)
    assert samples.estimate_ns == 100


def test_of_the_shapes_that_clients_choose_the_last_ones_used_are_known() -> None:
    estimator = Estimator(window=10, quantile=0.99)
    estimator.learn_profile(
        Profile(code_id="c", device_kind="cpu", infer_ns={1: 100}, load_base_ns=0, load_ns_per_mib=0)
    )
    timings = estimator.timings("d", "cpu", "c")
    plain = timings.infer(1, "")
    honest = timings.infer(1, "honest")
    for number in range(3 * SIGNATURES_MAX):
        timings.infer(1, str(number))
        assert timings.infer(1, "honest") is honest
    assert len(timings._infer) == SIGNATURES_MAX
    assert timings.infer(1, "") is plain


def test_what_is_forgotten_leaves_the_rest() -> None:
    samples = Samples(100, size=10, quantile=0.99)
    samples.learn(900, 0)
    samples.forget_above(899)
    samples.forget_above(100)
    assert samples.estimate_ns == 100


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_an_estimate_lies_between_the_samples_it_rests_on(values: list[int], quantile: float) -> None:
    samples = Samples(values[0], size=10, quantile=quantile)
    for value in values[1:]:
        samples.learn(value, 0)
    assert min(values[-10:]) <= samples.estimate_ns <= max(values[-10:])


@given(
    st.lists(st.integers(1, 9), min_size=10, max_size=40), st.integers(2, 6),
    st.sampled_from([0.25, 0.5, 0.99, 1.0]), st.sets(st.integers(0, 39), max_size=3),
)  # fmt: skip
def test_the_estimate_is_the_quantile_of_the_window_whatever_came(
    values: list[int], size: int, quantile: float, doubts: set[int]
) -> None:
    samples, window = Samples(values[0], size, quantile), [values[0]]
    for at, value in enumerate(values[1:]):
        samples.learn(value, 0)
        window = [*window, value][-size:]
        if at in doubts and len(window) > 1:
            most = sorted(window)[-2]
            samples.forget_above(most)
            window = [one for one in window if one <= most]
        rank = quantile * (len(window) - 1)
        lower, upper = sorted(window)[math.floor(rank)], sorted(window)[math.ceil(rank)]
        assert samples.estimate_ns == round(lower + (rank - int(rank)) * (upper - lower))


def profile() -> Profile:
    return Profile(
        code_id="c", device_kind="cpu", infer_ns={1: 100, 4: 300}, load_base_ns=50, load_ns_per_mib=10
    )


def test_models_of_one_code_share_a_window_and_devices_do_not() -> None:
    estimator = Estimator(window=10, quantile=0.99)
    estimator.learn_profile(profile())
    estimator.timings("d0", "cpu", "c").infer(1, "").learn(500, 0)
    assert estimator.timings("d0", "cpu", "c").infer(1, "").estimate_ns > 400
    assert estimator.timings("d1", "cpu", "c").infer(1, "").estimate_ns == 100


def test_a_batch_size_without_a_profile_is_scaled_up_from_the_nearest() -> None:
    estimator = Estimator(window=10, quantile=0.99)
    estimator.learn_profile(profile())
    assert estimator.timings("d0", "cpu", "c").infer(8, "").estimate_ns == 600


def test_load_is_linear_in_bytes() -> None:
    estimator = Estimator(window=10, quantile=0.99)
    estimator.learn_profile(profile())
    assert estimator.timings("d0", "cpu", "c").load(3 * MIB).estimate_ns == 80


def test_a_promise_asks_for_what_is_seldom_exceeded() -> None:
    samples = Samples(1_000_000, size=10, quantile=0.99)
    assert samples.quantile_ns(0.999) == 1_000_000, "nothing is known but the profile"
    for at in range(3000):
        samples.learn(1_400_000 if at % 50 == 49 else 1_000_000 + at % 7 * 1000, at)
    assert 1_390_000 < samples.quantile_ns(0.999) < 1_450_000, "one in fifty takes so long"
    assert 1_000_000 < samples.quantile_ns(0.97) < 1_040_000
    for at in range(3000):
        samples.learn(2_000_000 + at % 7 * 1000, 3000 + at)
    assert 2_000_000 < samples.quantile_ns(0.97) < 2_010_000, "it moves with the mean"


def test_a_lost_device_is_forgotten() -> None:
    estimator = Estimator(window=10, quantile=0.99)
    estimator.learn_profile(profile())
    estimator.timings("d0", "cpu", "c").infer(1, "").learn(500, 0)
    estimator.forget_device("d0")
    assert estimator.timings("d0", "cpu", "c").infer(1, "").estimate_ns == 100
