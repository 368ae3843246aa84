"""What LOAD, a swap of weights and INFER cost on a torch device, and what its memory does meanwhile.

    .venv/bin/python -m benchmarks.torch_device REPO [--device torch-cpu:0] [--runs 200]

REPO holds two or more copies of one torch architecture, without anything else. Medians over runs that are
interleaved, in ms; page faults of the whole process per INFER.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build, torch_target
from clockwork_serve.devices.base import NUMPY_DTYPES
from clockwork_serve.messages import Call, Code, Extent, Infer, Load, Model, Window
from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all
from clockwork_serve.units import GIB, MIB, align, to_ms

WHENEVER = Window(0, 1 << 62)
PAGE = 16 * MIB


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
        device = build(config)
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


def measure(device: Device, code: Code, models: list[Model], pages: int, runs: int) -> None:
    """Print one table."""
    device.prepare(code)
    size = models[0].weights.size
    first, second = Extent(0, pages), Extent(pages, pages)
    load_ns = [timed(lambda at=at: load(device, code, models[at % 2], (first, second)[at % 2])) for at in range(20)]
    rate = size / statistics.median(load_ns)
    show(f"LOAD of {size / MIB:.1f} MiB ({rate:.2f} GB/s)", load_ns)
    calls = {batch: call_of(code, batch) for batch in code.batch_sizes}
    same_ns: list[int] = []
    swapped_ns: list[int] = []
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for turn in range(runs):
        place = second if turn % 2 else first
        swapped_ns.append(timed(lambda: infer(device, code, 1, place, calls[1])))  # noqa: B023
        same_ns.append(timed(lambda: infer(device, code, 1, place, calls[1])))  # noqa: B023
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    show("INFER, batch 1, weights as before", same_ns)
    show("INFER, batch 1, other weights than before", swapped_ns)
    print(f"    {'page faults per INFER':45}{faults / (2 * runs):9.1f}")
    for batch in code.batch_sizes[1:]:
        show(f"INFER, batch {batch}", [timed(lambda: infer(device, code, batch, first, calls[batch]))  # noqa: B023
                                       for _ in range(max(5, runs // (5 * batch)))])  # fmt: skip
    print(f"    {getattr(device, 'counters')()}")  # noqa: B009 - only torch devices count


def call_of(code: Code, batch: int) -> CallBuffers:
    """Inputs of zeros and ones, and room for outputs."""
    inputs, room = {}, 0
    for spec in code.inputs:
        shape = (batch, *spec.shape) if code.batched else spec.shape
        inputs[spec.name] = np.ones(shape, NUMPY_DTYPES[spec.datatype])
    for spec in code.outputs:
        room += align((spec.row_bytes or 0) * batch)
    return CallBuffers(inputs=inputs, output=memoryview(bytearray(room)))


def load(device: Device, code: Code, model: Model, extent: Extent) -> None:
    """One LOAD."""
    device.load(
        Load(
            action_id=1, device=device.spec.device, model=model.key, code_id=code.code_id,
            weights=model.weights, extent=extent, version=1, window=WHENEVER, expected_ns=0,
        )
    )  # fmt: skip


def infer(device: Device, code: Code, batch: int, extent: Extent, call: CallBuffers) -> None:
    """One INFER of one call that fills the batch."""
    action = Infer(
        action_id=1, device=device.spec.device, model="m", code_id=code.code_id, extent=extent, version=1,
        batch=batch, calls=(Call(request_id="r", rows=batch, tensors=b""),), window=WHENEVER, expected_ns=0,
    )  # fmt: skip
    device.infer(action, [call])


def timed(act: Callable[[], None]) -> int:
    """How long a call takes."""
    started_ns = time.monotonic_ns()
    act()
    return time.monotonic_ns() - started_ns


def show(what: str, durations_ns: list[int]) -> None:
    """One row: median and the tenth from the top in a hundred."""
    durations_ns = sorted(durations_ns)
    p90_ns = durations_ns[len(durations_ns) * 9 // 10]
    print(f"    {what:45}{to_ms(round(statistics.median(durations_ns))):9.3f}   p90 {to_ms(p90_ns):9.3f}")


if __name__ == "__main__":
    main()
