"""Physical limits, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from clockwork_serve.apps.reproduce.limits import batch_limit, cold_limit, network_ns
from clockwork_serve.sim import read_constants
from clockwork_serve.units import ms
from clockwork_serve.workload.zoo import Zoo

RESNET = Zoo.read("v100")["resnet50_v2"]
CONSTANTS = read_constants()


@pytest.mark.parametrize(
    ("slo_ms", "cap", "batch", "rate"),
    [(10, 16, 4, 681.4), (25, 16, 16, 924.9), (25, 8, 8, 805.6), (2.8, 16, 0, 0.0), (5, 16, 2, 493.8)],
)
def test_the_best_batch_that_fits(slo_ms: float, cap: int, batch: int, rate: float):
    assert batch_limit(RESNET, ms(slo_ms), CONSTANTS, cap) == (batch, pytest.approx(rate, abs=0.1))


def test_the_network_is_paid_both_ways():
    assert network_ns(CONSTANTS) == 2 * (CONSTANTS.network.gateway_ns + CONSTANTS.network.worker_ns)


def test_cold_models_are_bound_by_the_load_lane():
    # 196 / 3480 warm, 1 / 8.32 ms of LOADs, and 2.83 % within 100 ms after another request for their copy
    assert cold_limit(RESNET, 3480, 1000.0, ms(100)) == pytest.approx(56.3 + 120.2 + 28.3, abs=0.2)
    assert cold_limit(RESNET, 196, 1000.0, ms(100)) == pytest.approx(924.9, abs=0.1)
    assert cold_limit(RESNET, 196, 500.0, ms(100)) == pytest.approx(500.0)
