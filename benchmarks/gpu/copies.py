"""Thousands of models of one code on a device that holds a few: each answer from the model's own weights.

A copy is one of a few bases, which differ in every weight, with a last bias of its own. So what any copy
must answer is known: what its base answers in double precision, and the difference of the biases.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.lanes import index_of
from benchmarks.gpu.machine import available_bytes
from benchmarks.gpu.rig import (
    MAIN,
    Batch,
    Floats,
    Rig,
    compiled,
    device_counters,
    error_of,
    exact,
    gigabytes,
    grown,
    load_action,
    places_of,
    rows_of,
    undisturbed,
)
from clockwork_serve.devices import Device
from clockwork_serve.messages import Weights
from clockwork_serve.store import ServedVersion
from clockwork_serve.units import GIB, MIB, NS_PER_S
from harness import machine
from harness.report import Outcome, quantile

ERROR: Final = 1e-2
"""Another copy's answer is off by about 1; how exact answers are is another part's question."""
HOST_SHARE: Final = 0.4
"""Of the host memory that is available: files beyond that would not stay in the page cache."""
DISK_SHARE: Final = 0.6
RSS_GROWS: Final = 16 * MIB
WRITERS: Final = 8
PLACES: Final = 48
"""Within the graphs that a device keeps, so that it is paging that is measured."""
FIXED: Final = ("reserved_bytes", "segments", "alloc_retries", "out_of_memory")
"""What torch's allocator counts and must not change."""


@dataclass(slots=True)
class Copies:
    """``count`` models; ``files`` hold their weights, fewer than models where memory is short.

    ``bases`` are answers to ``rows`` in double precision, ``bias`` the last bias of each base.
    """

    count: int
    files: list[Weights]
    owners: list[int]
    """By file: the copy that it was written for."""
    rows: Floats
    bases: list[npt.NDArray[np.float64]]
    why_fewer: str

    def weights(self, number: int) -> Weights:
        """Those of a copy."""
        return self.files[number % len(self.files)]

    def wanted(self, number: int) -> npt.NDArray[np.float64]:
        """What a copy must answer."""
        owner = self.owners[number % len(self.files)]
        base = self.bases[owner % len(self.bases)]
        return base + shift(owner, base.shape[-1])


def shift(number: int, width: int) -> Floats:
    """What a copy's last bias is set to: about as large as answers are."""
    return np.random.default_rng(number).standard_normal(width, dtype=np.float32)


class Writer:
    """Writes copies of the main model's weights into a folder, as many as there is memory for."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self._rig, self._folder = rig, folder
        self._blobs, self._answers, self._rows = bases(rig)
        self._bias = bias_of(rig.main)
        self._files: list[Weights] = []

    def copies(self, count: int, seconds: float) -> Copies:
        """So many models. Files that were written before are used again; ``seconds`` bound the writing."""
        fit, why = self._fit(count)
        end_s = time.monotonic() + seconds
        self._folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
            while len(self._files) < fit:
                self._rig.tell(f"writing weights, {len(self._files)} of {fit}")
                first = len(self._files)
                step = min(fit, first + 2 * WRITERS)
                self._files += pool.map(self._write, range(first, step))
                if time.monotonic() > end_s:
                    break
        files = self._files[:count]
        if len(files) < fit:
            why = f"{seconds:.0f} s were enough for {len(files)} files"
        return Copies(count, files, list(range(len(files))), self._rows, self._answers, why)

    def _fit(self, count: int) -> tuple[int, str]:
        """How many files there may be, and why not all."""
        nbytes = len(self._blobs[0])
        held = len(self._files)
        by_memory = int(HOST_SHARE * available_bytes()) // nbytes  # what is cached counts as available
        by_disk = held + int(DISK_SHARE * shutil.disk_usage(self._rig.cache_dir).free) // nbytes
        fit = min(count, max(1, held, min(by_memory, by_disk)))
        if fit == count:
            return fit, ""
        what = "host memory" if by_memory <= by_disk else "the disk of the cache"
        return fit, f"{what} has room for {fit} files of {nbytes / 1e6:.0f} MB"

    def _write(self, number: int) -> Weights:
        blob = self._blobs[number % len(self._blobs)].copy()
        start, width = self._bias
        blob[start : start + 4 * width] = shift(number, width).view(np.uint8)
        path = self._folder / f"{number}.bin"
        blob.tofile(path)
        return Weights(weights_id=hashlib.sha256(blob.tobytes()).hexdigest(), path=str(path), size=len(blob))


def bias_of(served: ServedVersion) -> tuple[int, int]:
    """Where in a blob the last bias is: (byte, numbers). It is the only vector as wide as the answer.

    Raises LookupError if it is not.
    """
    (width,) = served.code.outputs[0].shape
    found = [tensor for tensor in index_of(served).tensors if tensor.shape == (width,)]
    if len(found) != 1:
        raise LookupError(f"expected one vector of {width} weights, found {[each.name for each in found]}")
    return found[0].offset, width


def bases(rig: Rig) -> tuple[list[npt.NDArray[np.uint8]], list[npt.NDArray[np.float64]], Floats]:
    """Blobs, compiled from networks of different weights, and what each answers with no last bias."""
    from benchmarks.gpu import models as gpu_models

    short = rig.sizes.short
    kind = gpu_models.kinds(short=short)[MAIN]
    rows = rows_of(MAIN, 1, rig.seed + 5, short=short)
    blobs, answers, program = [], [], None
    for number in range(rig.sizes.bases):
        name = MAIN if number == 0 else f"{MAIN}_{number}"
        rig.tell(f"base {number + 1} of {rig.sizes.bases}")
        model = rig.models[MAIN] if number == 0 else gpu_models.built(kind, rig.seed + 100 * number)
        if not (rig.repository / name).exists():
            program = program or gpu_models.exported(kind, model, rig.sizes.largest)
            gpu_models.write(rig.repository, name, gpu_models.restated(program, model), rig.sizes.largest)
        served = rig.main if number == 0 else compiled(rig, name)
        if served.code.code_id != rig.main.code.code_id:
            raise LookupError(f"{name}: expected the code of {MAIN}, found another one")
        blobs.append(np.fromfile(served.model.weights.path, np.uint8))
        answers.append(exact(model, rows) - model.head.bias.detach().double().numpy())
    return blobs, answers, rows


def paging(rig: Rig, outcome: Outcome, writer: Writer, count: int, seconds: float) -> None:
    """Copies asked at random: each access is a LOAD, unless the copy is there, and an INFER."""
    copies = writer.copies(count, seconds / 2)
    served = rig.main
    page = rig.config().page_bytes
    slot = -(-served.model.weights.size // page) * page
    memory = min(rig.sizes.paging_bytes, rig.free_bytes() // 2 or rig.sizes.paging_bytes)
    places = max(1, min(memory // slot, count // 2, PLACES))
    with rig.device(served, memory_bytes=places * slot, host_bytes=pool_bytes(rig)) as device, undisturbed():
        found = access(rig, device, served, copies, seconds / 2)
    said = f", {len(copies.files):,} different files, for {copies.why_fewer}" if copies.why_fewer else ""
    outcome.judge(
        f"{count:,} models on {found['places']} places: answers by their own weights",
        asked=f"all, error <= {ERROR:g}",
        found=f"{found['right']:,} of {found['accesses']:,}, error {found['error']:.1e}{said}",
        good=found["right"] == found["accesses"],
    )
    outcome.judge(
        f"{count:,} models: allocations of the device after start", asked="none" if rig.target.gpu else "",
        found=changes(found["grown"]), good=not any(found["grown"].values()),
    )  # fmt: skip
    outcome.judge(
        f"{count:,} models: resident memory after start", asked=f"<= +{RSS_GROWS >> 20} MiB",
        found=f"{found['rss'] / MIB:+.1f} MiB", good=found["rss"] <= RSS_GROWS,
    )  # fmt: skip
    outcome.judge(
        f"{count:,} models: LOAD p50, p99; from the pool of host memory; accesses a second",
        asked="", good=True,
        found=f"{found['load_ms'][0]:.2f}, {found['load_ms'][1]:.2f} ms ({found['rate']}); "
        f"{found['from_pool']:,} of {found['loads']:,}; {found['per_s']:.0f}",
    )  # fmt: skip
    outcome.figures[str(count)] = found | {"files": len(copies.files), "why_fewer": copies.why_fewer}


def access(rig: Rig, device: Device, served: ServedVersion, copies: Copies, seconds: float) -> dict[str, Any]:
    """Random accesses for so long; the least recently loaded copy makes room."""
    places = places_of(device, served)
    batch = Batch(device, served, copies.rows)
    holds: dict[int, int] = {}  # copies by place
    for place in range(places):
        device.load(load_action(device, served, place, copies.weights(place)))
        holds[place] = place
        batch.move(place)
        batch.infer()
    before, rss, free = device_counters(device), machine.rss_bytes(os.getpid()), rig.free_bytes()
    places_by_copy = {number: place for place, number in holds.items()}
    loads: list[int] = []
    errors: list[float] = []
    asked = set()
    order = _order(copies.count, rig.seed)
    started_ns, next_place = time.monotonic_ns(), 0
    while (time.monotonic_ns() - started_ns) < seconds * NS_PER_S or len(errors) < places:
        number = next(order)
        place = places_by_copy.get(number, -1)
        if place < 0:
            place, next_place = next_place, (next_place + 1) % places
            places_by_copy.pop(holds[place], None)
            load_ns = time.monotonic_ns()
            device.load(load_action(device, served, place, copies.weights(number)))
            loads.append(time.monotonic_ns() - load_ns)
            holds[place] = number
            places_by_copy[number] = place
        batch.move(place)
        batch.infer()
        asked.add(number)
        errors.append(error_of(batch.answers(), copies.wanted(number)))
    lasted_s = (time.monotonic_ns() - started_ns) / NS_PER_S
    after = device_counters(device)
    changed = grown(before, after, FIXED)
    if rig.target.gpu:
        changed["gpu_bytes"] = free - rig.free_bytes()
    return {
        "places": places, "accesses": len(errors), "right": sum(error <= ERROR for error in errors),
        "error": max(errors), "asked": len(asked), "loads": len(loads), "per_s": len(errors) / lasted_s,
        "load_ms": [quantile(loads, share) / 1e6 for share in (0.5, 0.99)],
        "rate": gigabytes(served.model.weights.size, quantile(loads, 0.5)),
        "from_pool": grown(before, after, ["pool_hits"]).get("pool_hits", 0), "grown": changed,
        "rss": machine.rss_bytes(os.getpid()) - rss, "counters": after,
    }  # fmt: skip


def changes(grown: dict[str, int]) -> str:
    """In words."""
    said = ", ".join(f"{name} {value:+,}" for name, value in grown.items())
    return said or "a CPU has no allocator that counts"


def _order(count: int, seed: int) -> Any:
    """Every copy once in a random order, again and again."""
    dice = random.Random(seed)
    numbers: Sequence[int] = range(count)
    while True:
        yield from dice.sample(numbers, count)


def pool_bytes(rig: Rig) -> int:
    """Pinned memory: less than the files take, so that the tier behind it is used, too."""
    if rig.sizes.short:
        return rig.sizes.host_bytes
    return int(min(8 * GIB, 0.08 * available_bytes()))
