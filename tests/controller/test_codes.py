"""The ways to run a queue on a device."""

from __future__ import annotations

import pytest
from msgspec import structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.codes import useful_sizes
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import CODE, device, profile


def test_models_of_one_code_share_their_batches_and_what_is_learned() -> None:
    made = belief("d0")
    strategies = []
    for at, name in enumerate("ab"):
        served = serve(made, name)
        place(made, served, "d0", first=4 * at)
        strategies.append(ask(made, served).strategies[0])
    assert strategies[0].batches is strategies[1].batches
    assert [(batch.count, batch.size) for batch in strategies[0].batches] == [(1, 1), (2, 2), (4, 4), (8, 8)]
    strategies[0].batches[0].samples.learn(ms(99), 0)
    assert strategies[1].least.estimate_ns > ms(90)


def test_one_request_alone_can_always_run() -> None:
    sizes = useful_sizes(CODE, profile(), device(), ControllerConfig(max_exec_ns=1))
    assert sizes == {1}


@pytest.mark.parametrize(("max_batch", "sizes"), [(8, {1, 2, 4, 8}), (4, {1, 2, 4}), (3, {1, 2})])
def test_no_batch_is_larger_than_allowed(max_batch: int, sizes: set[int]) -> None:
    assert useful_sizes(CODE, profile(), device(), ControllerConfig(max_batch=max_batch)) == sizes


@pytest.mark.parametrize(("beyond", "sizes"), [(0, {1, 2}), (1, {1})])
@pytest.mark.parametrize("limit", ["workspace_bytes", "io_bytes", "max_exec_ns", "min_batch_gain"])
def test_a_size_that_takes_all_there_is_and_saves_just_enough_is_used(
    limit: str, beyond: int, sizes: set[int]
) -> None:
    infer_ns = {1: 100, 2: 150 + beyond if limit == "min_batch_gain" else 150}
    spare = {2: 500 + beyond} if limit in ("workspace_bytes", "io_bytes") else {}
    used = structs.replace(profile(), infer_ns=infer_ns, **({limit: spare} if spare else {}))
    config = ControllerConfig(min_batch_gain=0.25, max_exec_ns=150 - beyond * (limit == "max_exec_ns"))
    spec = structs.replace(device(), workspace_bytes=500, io_bytes=500)
    assert useful_sizes(CODE, used, spec, config) == sizes


def test_the_least_size_is_judged_by_its_time_per_request() -> None:
    code = structs.replace(CODE, batch_sizes=(4, 8))
    used = structs.replace(profile(), infer_ns={4: 100, 8: 210})
    assert useful_sizes(code, used, device(), ControllerConfig()) == {4}


@pytest.mark.parametrize("limit", ["workspace_bytes", "io_bytes"])
def test_a_size_that_does_not_fit_says_nothing_of_a_larger_one(limit: str) -> None:
    used = structs.replace(profile(), **{limit: {2: 1 << 40}})
    assert useful_sizes(CODE, used, device(), ControllerConfig()) == {1, 4, 8}


def test_of_fine_sizes_each_need_not_save_much_against_the_one_before() -> None:
    sizes = tuple(range(1, 9))
    fine = structs.replace(CODE, batch_sizes=sizes)
    times = structs.replace(profile(), infer_ns={size: ms(16 + 4 * size) for size in sizes})
    assert useful_sizes(fine, times, device(), ControllerConfig()) == set(sizes)
    flat = structs.replace(profile(), infer_ns={size: ms(10 * size) for size in sizes})
    assert useful_sizes(fine, flat, device(), ControllerConfig()) == {1}
