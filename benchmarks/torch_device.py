"""What LOAD, a swap of weights and INFER cost on a torch device, and what its memory does meanwhile.

    .venv/bin/python -m benchmarks.torch_device REPO [--device torch-cpu:0] [--runs 200]

REPO holds two or more copies of one torch architecture, without anything else. Medians over runs that are
interleaved, in ms of wall time and of the thread's CPU time; page faults of the whole process per INFER.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clockwork_serve.devices import CallBuffers, DeviceConfig, torch_target
from clockwork_serve.devices.base import NUMPY_DTYPES
from clockwork_serve.devices.torch import TorchDevice
from clockwork_serve.messages import Code, Extent, Model
from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all
from clockwork_serve.units import GIB, MIB, NS_PER_MS, align
from harness import records

PAGE = 16 * MIB

Taken = tuple[int, int]
"""Wall and CPU time, in ns."""


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--device", default="torch-cpu:0")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "clockwork-serve")
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    kind = given.device.partition(":")[0]
    code, models = compiled(given.repository, given.cache, DeviceConfig(device=given.device, kind=kind))
    pages = -(-models[0].weights.size // PAGE)
    for pool_bytes in (0, GIB):
        config = DeviceConfig(
            device=given.device, kind=kind, memory_bytes=3 * pages * PAGE, page_bytes=PAGE,
            pool_bytes=pool_bytes, warm_up_ns=1 << 62,
        )  # fmt: skip
        device = TorchDevice(config)
        try:
            print(f"pool of {pool_bytes >> 20} MiB:")
            measure(device, code, models, pages, given.runs)
        finally:
            device.close()


def compiled(repository: Path, cache_dir: Path, config: DeviceConfig) -> tuple[Code, list[Model]]:
    """The code and the models of a repository of copies."""
    store = StoreConfig(cache_dir=str(cache_dir), torch_target=torch_target((config,)) or "cpu")
    cache = Cache(str(cache_dir))
    try:
        served, problems = compile_all(Repository(repository, store), cache)
    finally:
        cache.close()
    codes = {each.code.code_id: each.code for each in served}
    if problems or len(codes) != 1 or len(served) < 2:
        raise SystemExit(f"expected copies of one architecture, found {sorted(codes)}: {problems}")
    return next(iter(codes.values())), [each.model for each in served]


def measure(device: TorchDevice, code: Code, models: list[Model], pages: int, runs: int) -> None:
    """Print one table."""
    device.prepare(code)
    size = models[0].weights.size
    places = (Extent(0, pages), Extent(pages, pages))
    name = device.spec.device
    pairs = list(zip(models[:2], places, strict=True))
    ways = [functools.partial(device.load, records.load(*pair, name)) for pair in pairs]
    loads = [timed(ways[turn % 2]) for turn in range(20)]
    show(f"LOAD of {size / MIB:.1f} MiB", loads)
    calls = {batch: call_of(code, batch) for batch in code.batch_sizes}
    same: list[Taken] = []
    swapped: list[Taken] = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for turn in range(runs):
        action = records.infer(*pairs[turn % 2], device=name)
        run = functools.partial(device.infer, action, [calls[1]])
        swapped.append(timed(run))
        same.append(timed(run))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    show("INFER, batch 1, weights as before", same)
    show("INFER, batch 1, other weights than before", swapped)
    print(f"    {'page faults per INFER':45}{faults / (2 * runs):9.1f}")
    for batch in code.batch_sizes[1:]:
        action = records.infer(*pairs[0], (batch,), device=name)
        run = functools.partial(device.infer, action, [calls[batch]])
        show(f"INFER, batch {batch}", [timed(run) for _ in range(max(5, runs // (5 * batch)))])
    print(f"    {device.counters()}")


def call_of(code: Code, batch: int) -> CallBuffers:
    """Inputs of zeros and ones, and room for outputs."""
    inputs, room = {}, 0
    for spec in code.inputs:
        shape = (batch, *spec.shape) if code.batched else spec.shape
        inputs[spec.name] = np.ones(shape, NUMPY_DTYPES[spec.datatype])
    for spec in code.outputs:
        room += align((spec.row_bytes or 0) * batch)
    return CallBuffers(inputs=inputs, output=memoryview(bytearray(room)))


def timed(act: Callable[[], object]) -> Taken:
    """How long a call takes."""
    wall_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
    act()
    return time.monotonic_ns() - wall_ns, time.thread_time_ns() - cpu_ns


def show(what: str, taken: list[Taken]) -> None:
    """One row of medians."""
    wall_ms, cpu_ms = (statistics.median(column) / NS_PER_MS for column in zip(*taken, strict=True))
    print(f"    {what:45}{wall_ms:9.3f}   CPU {cpu_ms:9.3f}")


if __name__ == "__main__":
    main()
