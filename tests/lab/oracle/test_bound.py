"""The oracle against exhaustive search, against policies, and against what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_lab.oracle.bound import closed_loop_limit_rps, upper_bound
from clockwork_lab.oracle.costs import Costs, ModelCosts, range_best
from clockwork_serve.sim.constants import Cluster, Network
from clockwork_serve.units import NS_PER_MS, ms
from clockwork_serve.workload.stream import Arrivals
from clockwork_serve.workload.zoo import Zoo
from tests.lab.oracle.ticks import Ticks

INSTANT = Network(gateway_ns=0, worker_ns=0, jitter_ns=0)
ZOO = Zoo.read("v100")
R50 = "resnet50_v2"


def small(seed: int) -> tuple[list[tuple[int, int, int]], list[ModelCosts], Cluster]:
    """3 to 6 requests of 1 or 2 models, 2 batch sizes, 1 or 2 devices that hold 1 or 2 of them; whole ms."""
    dice = np.random.default_rng(seed)
    models = []
    for _ in range(2):
        alone = int(dice.integers(2, 5))
        both = int(dice.integers(alone, 2 * alone + 1))
        models.append(
            ModelCosts(
                infer_ns={1: alone * NS_PER_MS, 2: both * NS_PER_MS},
                load_ns=int(dice.integers(1, 5)) * NS_PER_MS,
                pages=int(dice.integers(1, 3)),
            )
        )
    known, slo, devices = int(dice.integers(1, 3)), int(dice.integers(4, 9)), int(dice.integers(1, 3))
    requests = []
    for _ in range(int(dice.integers(3, 5 if devices == 2 else 7))):
        sent = int(dice.integers(0, 6))
        requests.append((sent, sent + slo * int(dice.choice([1, 1, 2])), int(dice.integers(known))))
    return sorted(requests), models, Cluster(devices=devices, pages=int(dice.integers(2, 5)))


def arrivals(requests: list[tuple[int, int, int]]) -> Arrivals:
    """Those requests as a workload gives them."""
    return Arrivals(
        [sent * NS_PER_MS for sent, _, _ in requests], [model for _, _, model in requests],
        [(end - sent) * NS_PER_MS for sent, end, _ in requests], [0] * len(requests),
    )  # fmt: skip


def test_it_is_never_below_what_can_be_served_and_seldom_far_above() -> None:
    gaps, scarce = [], 0
    for seed in range(40):
        requests, models, cluster = small(seed)
        most = Ticks(requests, models, cluster.pages).most(cluster.devices)
        bound = upper_bound(arrivals(requests), models, cluster, network=INSTANT)

        assert bound.count >= most, f"seed {seed}"
        gaps.append(bound.count - most)
        scarce += most < len(requests)
    assert scarce >= 12
    assert max(gaps) <= 2
    assert gaps.count(0) >= 0.85 * len(gaps)


@pytest.mark.parametrize(("devices", "room_ms", "count"), [(1, 20, 9), (1, 7, 9), (2, 7, 9), (3, 11, 20)])
def test_the_relaxation_lacks_only_whole_runs_where_windows_are_equal(
    devices: int, room_ms: int, count: int
) -> None:
    model = ModelCosts(infer_ns={1: 3 * NS_PER_MS}, load_ns=2 * NS_PER_MS, pages=1)
    requests = arrivals([(0, 2 + room_ms, 0)] * count)

    bound = upper_bound(requests, [model], Cluster(devices=devices, pages=1), network=INSTANT)

    assert bound.goodput == pytest.approx(min(count, devices * room_ms / 3), rel=1e-4)
    most = min(count, devices * (room_ms // 3))
    assert bound.count == most if devices == 1 else most <= bound.count < most + devices


def test_what_can_all_be_served_is_counted_in_full() -> None:
    requests = arrivals([(10 * at, 10 * at + 20, at % 3) for at in range(30)])
    model = ModelCosts(infer_ns={1: 3 * NS_PER_MS}, load_ns=2 * NS_PER_MS, pages=1)

    assert upper_bound(requests, [model] * 3, Cluster(devices=1, pages=3), network=INSTANT).count == 30


@pytest.mark.parametrize(
    ("requests", "pages"),
    [([], 4), ([(0, 2, 0), (5, 7, 0)], 4), ([(0, 30, 0)], 1)],
    ids=["none", "too tight for a run", "too large for a device"],
)
def test_what_nobody_can_serve_counts_nothing(requests: list[tuple[int, int, int]], pages: int) -> None:
    model = ModelCosts(infer_ns={1: 3 * NS_PER_MS}, load_ns=2 * NS_PER_MS, pages=2)

    bound = upper_bound(arrivals(requests), [model], Cluster(pages=pages), network=INSTANT)

    assert (bound.count, bound.offered) == (0, len(requests))


def test_the_least_lane_time_is_that_of_the_fullest_batch_a_request_can_be_part_of() -> None:
    dice = np.random.default_rng(5)
    model = ModelCosts(infer_ns={1: ms(2), 2: ms(3), 4: ms(5)}, load_ns=ms(1), pages=1)
    requests = arrivals(sorted((int(dice.integers(60)), 0, int(dice.integers(2))) for _ in range(40)))
    requests.slos_ns = [ms(int(dice.integers(1, 15))) for _ in requests.times_ns]

    costs = Costs(requests, [model] * 2, INSTANT, loads_from_ns=None, most_pages=9, weights=None)

    def companions(at: int, lasts_ns: int) -> int:
        """By definition: at each instant at which it can start, count those that can start too."""
        mine = costs.model == costs.model[at]
        opens, closes = costs.release[mine], costs.end[mine] - lasts_ns
        starts = [t for t in opens if costs.release[at] <= t <= costs.end[at] - lasts_ns]
        return max((int(((opens <= t) & (t <= closes)).sum()) for t in starts), default=0)

    assert len(costs.source) > 30
    for at in range(len(costs.source)):
        counts = {size: min(size, companions(at, lasts)) for size, lasts in model.infer_ns.items()}
        expected = min(model.infer_ns[size] / count for size, count in counts.items() if count)
        assert costs.lane_ns[at] == pytest.approx(expected)


def test_the_best_of_ranges() -> None:
    dice = np.random.default_rng(3)
    values = dice.random(50)
    first = dice.integers(0, 50, 200)
    last = np.array([dice.integers(one + 1, 51) for one in first])

    best = range_best(values, first, last, np.minimum)

    assert best.tolist() == [values[a:b].min() for a, b in zip(first, last, strict=True)]


@pytest.mark.parametrize(
    ("slo_ms", "most", "rps"),
    [(10, 16, 681), (10, 2, 493), (25, 16, 924), (500, 16, 924), (500, 8, 805), (2, 16, 0)],
)
def test_closed_loops_are_limited_by_the_best_batch_that_fits(slo_ms: int, most: int, rps: int) -> None:
    infer_ns = ZOO[R50].infer_ns

    assert int(closed_loop_limit_rps(infer_ns, ms(slo_ms), most)) == rps
    assert closed_loop_limit_rps(infer_ns, ms(slo_ms), most, 3) == pytest.approx(3 * rps, abs=3)
