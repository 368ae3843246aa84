"""Physical limits of a device from its profile: what no policy can exceed. It simulates nothing."""

from __future__ import annotations

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
    """Requests/s that one device can answer of ``rate_rps`` spread evenly over ``models`` copies.

    At most ``slots`` copies are on the device (1376 pages, 7 each), so of each request's chance to find its
    copy there no policy gets more than ``slots / models``: which copies are asked next is chance, evenly. All
    others need a LOAD, and the lane does one after another; a LOAD also serves what else comes for its copy
    within the SLO. INFERs bound it too: the device's best rate.
    """
    best_rps = max(size * NS_PER_S / lasts for size, lasts in model.infer_ns.items())
    warm = min(1.0, slots / models)
    each = 1 + rate_rps / models * slo_ns / NS_PER_S
    cold_rps = min((1 - warm) * rate_rps, NS_PER_S / model.load_ns * each)
    return min(best_rps, warm * rate_rps + cold_rps)
