"""What a number of devices would give: simulated, with what is loaded, by the code that serves."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from clockwork_serve.apps.scaling.demand import LikelyLoad
from clockwork_serve.apps.scaling.future import FutureWorld, Judged, judge
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Cluster, read_constants
from clockwork_serve.sim.tally import COLD, COMPUTE
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from clockwork_serve.workload.zoo import Zoo

ROW = {"model": "net", "weights_mb": "16", "load_ms": "40", "infer_b1_ms": "40"}
WORLD = FutureWorld(
    kinds={"a/1": "net", "b/1": "net"}, zoo=Zoo.of("served", [("here", ROW)]), config=ControllerConfig(),
    cluster=Cluster(pages=4, page_bytes=16 * MIB), loaded=("a/1", "b/1"),
)  # fmt: skip


def load(rate_rps: float, names: tuple[str, ...] = ("a/1", "b/1"), slo_ms: int = 100) -> LikelyLoad:
    """An even load of half a minute, to all models alike."""
    times = np.arange(0, 30 * NS_PER_S, int(NS_PER_S / rate_rps), dtype=np.int64)
    number = np.arange(times.size)
    return LikelyLoad(
        30 * NS_PER_S, times, number % len(names), np.full(times.size, slo_ms * NS_PER_MS, np.int64),
        np.zeros_like(number), names, ((0, "", -1),),
    )  # fmt: skip


def test_enough_devices_miss_nothing_and_too_few_miss_for_want_of_time() -> None:
    asked = load(40.0)
    enough, few = judge(asked, WORLD, 2), judge(asked, WORLD, 1)
    assert enough.met(0.999)
    assert enough.in_time == 1.0
    assert 0.6 < enough.busy < 0.9
    assert not few.met(0.999)
    assert 0.4 < few.in_time < 0.7
    assert few.cause == COMPUTE
    assert few.model in {"a", "b"}
    assert judge(asked, WORLD, 1) == few, "the same load gives the same answer"


def test_what_is_loaded_counts_and_what_is_not_is_cold() -> None:
    asked = load(5.0, slo_ms=70)
    assert judge(asked, WORLD, 1).missed == 0
    # The beginning that does not count loads what it asks for: so here all requests are after it.
    late = structs.replace(WORLD, loaded=("a/1",))
    once = LikelyLoad(
        asked.window_ns, np.array([10 * NS_PER_S]), np.array([1]), np.array([70 * NS_PER_MS]), np.array([0]),
        asked.names, asked.classes,
    )  # fmt: skip
    found = judge(once, late, 1)
    assert found.missed == 1
    assert found.cause == COLD
    assert judge(once, WORLD, 1).missed == 0


def test_models_of_other_versions_keep_their_names_and_unknown_ones_do_not_count() -> None:
    world = structs.replace(WORLD, kinds={"a/2": "net"}, loaded=("a/2", "gone/1"))
    found = judge(load(52.0, ("a/2", "gone/1")), world, 1)
    assert found.model == "a/2"
    assert found.requests == pytest.approx(780, abs=1)


def test_what_gateways_keep_of_a_servers_requests_is_no_time_of_devices() -> None:
    usual = read_constants()
    kept = structs.replace(usual, network=structs.replace(usual.network, reserve_ns=30 * NS_PER_MS))
    asked = load(20.0, slo_ms=65)
    assert judge(asked, WORLD, 1).missed == 0
    assert judge(asked, structs.replace(WORLD, constants=kept), 1).missed > 0.1 * 600


def test_no_request_is_met_by_any_device() -> None:
    asked = load(5.0)
    none = LikelyLoad(
        asked.window_ns, *(np.array([], np.int64) for _ in range(4)), asked.names, asked.classes
    )
    assert judge(none, WORLD, 1).met(0.999)


def test_overload_is_not_simulated_to_its_end() -> None:
    found = judge(load(100.0), WORLD, 1)
    assert 0.1 * 3000 <= found.missed < 0.2 * 3000
    assert found.requests < 2000
    assert not found.met(0.9)


def test_what_may_be_chance_does_not_count() -> None:
    for missed, met in ((1, True), (3, True), (4, False)):
        assert Judged(devices=1, requests=1000, missed=missed).met(0.999) is met
