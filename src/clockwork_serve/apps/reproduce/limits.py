"""Physical limits of a device from its profile: what no policy can exceed. It simulates nothing."""

from __future__ import annotations

import math

from clockwork_serve.sim import Constants
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.zoo import ZooModel


def network_ns(constants: Constants) -> int:
    """The least that a request spends on the way: client side to controller to worker, and back."""
    return 2 * (constants.network.gateway_ns + constants.network.worker_ns)


def batch_limit(model: ZooModel, slo_ns: int, constants: Constants, cap: int) -> tuple[int, float]:
    """(batch, requests/s) of one device that runs the best batch that fits the SLO; (0, 0) if none.

    An answer in time was in a batch that lasted at most SLO minus network, so a device cannot give more of
    them per second than its best such batch does back to back. Noise of durations is left out.
    """
    room_ns = slo_ns - network_ns(constants)
    fitting = [
        (size * NS_PER_S / lasts_ns, size)
        for size, lasts_ns in model.infer_ns.items()
        if size <= cap and lasts_ns <= room_ns
    ]
    rate, size = max(fitting, default=(0.0, 0))
    return size, rate


def cold_limit(model: ZooModel, models: int, rate_rps: float, slo_ns: int, slots: int = 196) -> float:
    """Requests/s that one device can answer of ``rate_rps`` Poisson arrivals, even over ``models`` copies.

    At most ``slots`` copies are on the device (1376 pages, 7 each), and which copy is asked next is chance,
    evenly: no policy finds more than ``slots / models`` of the requests warm. All others need a LOAD, and
    the lane does one after another. A LOAD serves the first of its waiting requests, and others that came
    within the SLO after it: each of those came within the SLO after another one for the same copy, and of
    such there are ``1 - exp(-rate / models * SLO)``. INFERs bound it too: the device's best rate.
    """
    best_rps = max(size * NS_PER_S / lasts for size, lasts in model.infer_ns.items())
    warm_rps = min(1.0, slots / models) * rate_rps
    close_rps = rate_rps * -math.expm1(-rate_rps / models * slo_ns / NS_PER_S)
    return min(best_rps, rate_rps, warm_rps + NS_PER_S / model.load_ns + close_rps)
