"""Where an SLO may come from, and what is none."""

from __future__ import annotations

import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import decide_ns_of, default_slo_ns, priority_of, requested_slo_ns, tightest
from clockwork_serve.units import NS_PER_S, ms


def test_a_request_may_carry_none() -> None:
    assert requested_slo_ns({}) is None
    assert requested_slo_ns({"tenant": "a"}) is None


@pytest.mark.parametrize(
    ("parameters", "header", "remaining_s", "expected_ms"),
    [
        ({"slo_ms": 20}, None, None, 20),
        ({"slo_ms": 0.5}, None, None, 0.5),
        ({"timeout": 30_000}, None, None, 30),
        ({"timeout": 0, "slo_ms": 20}, None, None, 20),
        ({}, "12.5", None, 12.5),
        ({}, None, 0.25, 249),
        ({"slo_ms": 20, "timeout": 30_000}, "12.5", 0.25, 12.5),
        ({"slo_ms": 20, "timeout": 10_000}, "12.5", 0.25, 10),
        ({"slo_ms": 5, "timeout": 10_000}, "12.5", 0.25, 5),
        ({"slo_ms": 20, "timeout": 30_000}, "50", 0.004, 3),
        ({"slo_ms": 86_400_000}, None, None, 86_400_000),
    ],
)
def test_the_tightest_wins(
    parameters: dict[str, float], header: str | None, remaining_s: float | None, expected_ms: float
) -> None:
    assert tightest(requested_slo_ns(parameters), header, remaining_s) == ms(expected_ms)


@pytest.mark.parametrize(
    ("client_s", "arrives_s"),
    [(0.02, 0.0209), (0.5, 0.5009), (0.9995, 1.0005), (1.5, 1.5098), (9.5, 9.5099), (15, 15.0999),
     (99, 99.0998), (150.5, 150.9999), (1000.5, 1009.9998), (5000, 5009.9999)],
)  # fmt: skip
def test_a_grpc_deadline_is_no_later_than_the_client_set_it(client_s: float, arrives_s: float) -> None:
    found = tightest(None, None, arrives_s)
    assert found is not None
    assert client_s * 0.95 * NS_PER_S < found <= client_s * NS_PER_S


def test_a_grpc_deadline_beyond_a_day_means_never_and_a_past_one_means_now() -> None:
    assert tightest(None, None, 10**9) is None
    assert tightest(None, None, -1.0) == 1


@pytest.mark.parametrize(
    ("parameters", "header", "words"),
    [
        ({"slo_ms": -1}, None, ("'slo_ms'", "above 0", "-1")),
        ({"slo_ms": 0}, None, ("'slo_ms'", "above 0", "found 0")),
        ({"slo_ms": float("nan")}, None, ("'slo_ms'", "found nan")),
        ({"slo_ms": float("inf")}, None, ("'slo_ms'", "found inf")),
        ({"slo_ms": "50"}, None, ("'slo_ms'", "a number", "found '50'")),
        ({"slo_ms": True}, None, ("'slo_ms'", "found True")),
        ({"slo_ms": 86_400_001}, None, ("'slo_ms'", "24 h")),
        ({"timeout": "abc"}, None, ("'timeout'", "microseconds", "'abc'")),
        ({"timeout": 1.5}, None, ("'timeout'", "whole number", "1.5")),
        ({"timeout": -5}, None, ("'timeout'", "-5")),
        ({"timeout": False}, None, ("'timeout'", "found False")),
        ({}, "soon", ("'x-slo-ms'", "milliseconds", "'soon'")),
        ({}, "nan", ("'x-slo-ms'", "nan")),
        ({}, "-3", ("'x-slo-ms'", "-3")),
        ({}, "1e300", ("'x-slo-ms'", "24 h")),
    ],
)
def test_what_is_no_limit_is_refused_by_name(
    parameters: dict[str, float], header: str | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tightest(requested_slo_ns(parameters), header, None)
    for word in words:
        assert word in str(caught.value)


def test_defaults_in_order() -> None:
    assert default_slo_ns(7, 8, 9) == 7
    assert default_slo_ns(None, 8, 9) == 8
    assert default_slo_ns(None, None, ms(3)) == ms(100)
    assert default_slo_ns(None, None, ms(500)) == 5 * ms(500)
    assert default_slo_ns(None, None, None) == NS_PER_S // 10


def test_priority_zero_means_the_models_own() -> None:
    assert priority_of({}, 3) == 3
    assert priority_of({"priority": 0}, 3) == 3
    assert priority_of({"priority": 1}, 3) == 1
    for wrong in (-1, "high", 1.5, True, 2**31):
        with pytest.raises(InvalidRequest, match=r"'priority'.* 15 and more the least"):
            priority_of({"priority": wrong}, 0)


def test_a_time_to_decide_may_be_none_and_zero_is_at_the_door() -> None:
    assert [decide_ns_of({}), decide_ns_of({"decide_ms": 0}), decide_ns_of({"decide_ms": 2.5})] == [
        -1,
        0,
        ms(2.5),
    ]
    for wrong in (-1, "soon", True, False, float("nan")):
        with pytest.raises(InvalidRequest, match=r"'decide_ms'.* from 0 up to"):
            decide_ns_of({"decide_ms": wrong})
