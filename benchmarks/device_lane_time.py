"""What the CPU device costs over the bare runtime: INFER against a plain session's run, LOAD against memcpy.

    python -m benchmarks.device_lane_time [MODEL.onnx | REPOSITORY/MODEL ...] [--seconds 3] [--json FILE]

Both sides of a ratio run in turn in one process, first one first, then the other. Each INFER is what the lane
is taken for: inputs from a request's memory, run, outputs in the request's memory; at batch sizes above 1 the
rows come from as many calls. A plain session gets its inputs as one array that is there already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build
from clockwork_serve.devices.base import NUMPY_DTYPES
from clockwork_serve.messages import Extent, TensorRef
from clockwork_serve.store import Compiler, Fill, Repository, ServedVersion, StoreConfig, generate_inputs
from clockwork_serve.store.cache import Cache
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_US
from harness import records, repositories
from harness.machine import Watch
from harness.report import Outcome, finish, parser, table

BLOB_MB = (1, 4, 10, 25, 47, 100)
OTHERS_MOST = 0.2
MEDIAN_RATIO, WORST_RATIO, WORST_US, LOAD_RATIO = 1.05, 1.13, 30, 2.0


@dataclass(slots=True)
class Timed:
    """Durations of one side, in ns: wall and CPU of the calling thread."""

    wall: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)

    def time(self, work: Callable[[], object]) -> None:
        """Run once."""
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        work()
        self.wall.append(time.perf_counter_ns() - wall)
        self.cpu.append(time.thread_time_ns() - cpu)


@dataclass(slots=True)
class Row:
    """One comparison. ``error`` is max|a-b| / max|b| over all outputs."""

    name: str
    batch: int
    ours: Timed
    theirs: Timed
    error: float = 0.0

    @property
    def added_ns(self) -> float:
        """What ours takes more, median against median."""
        return statistics.median(self.ours.wall) - statistics.median(self.theirs.wall)

    @property
    def ratio(self) -> float:
        """Ours to theirs, wall time."""
        return statistics.median(self.ours.wall) / statistics.median(self.theirs.wall)

    @property
    def cpu_ratio(self) -> float:
        """Ours to theirs, CPU time."""
        return statistics.median(self.ours.cpu) / statistics.median(self.theirs.cpu)

    @property
    def short(self) -> bool:
        """Whether the plain run takes less than 1 ms."""
        return statistics.median(self.theirs.wall) < NS_PER_MS

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        ours, theirs = statistics.median(self.ours.wall), statistics.median(self.theirs.wall)
        return (
            self.name, str(self.batch), f"{theirs / 1e6:.3f}", f"{ours / 1e6:.3f}", f"{self.ratio:.3f}",
            f"{self.cpu_ratio:.3f}", f"{self.added_ns / 1e3:+.0f}", f"{self.error:.0e}",
            str(len(self.ours.wall)),
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.name, "batch": self.batch, "runs": len(self.ours.wall), "ratio": self.ratio,
            "cpu_ratio": self.cpu_ratio, "added_us": self.added_ns / 1e3, "error": self.error,
            "ours_ms": statistics.median(self.ours.wall) / 1e6,
            "theirs_ms": statistics.median(self.theirs.wall) / 1e6,
        }  # fmt: skip


HEAD = ("", "batch", "plain ms", "ours ms", "ratio", "CPU ratio", "added us", "error", "runs")


def main() -> int:
    """Measure and judge."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "models", nargs="*", type=Path, help="ONNX files, or folders of a model repository's models"
    )
    arguments.add_argument("--only", action="store_true", help="leave out the made models")
    arguments.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    given = arguments.parse_args()
    outcome = Outcome("benchmarks.device_lane_time")
    device = build(DeviceConfig(device="cpu:0", memory_bytes=256 * MIB))
    watch = Watch([os.getpid()])
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = infer_rows(device, Path(folder), given)
        with tempfile.TemporaryDirectory() as folder:
            loads = load_rows(device, Path(folder), given.seconds)
    finally:
        device.close()
    disturbance = watch.read()
    print(table(HEAD, (row.cells() for row in rows)))
    print()
    print(table(("LOAD", "MB", "memcpy ms", *HEAD[3:7]), (row.cells()[:7] for row in loads)))
    judge(outcome, rows, loads)
    taken = (disturbance.others_s + disturbance.stolen_s) / disturbance.seconds
    if taken > OTHERS_MOST:
        outcome.invalid = f"other processes took {taken:.0%} of a core, at most {OTHERS_MOST:.0%} is allowed"
    outcome.figures = {
        "infer": [row.record() for row in rows],
        "load": [row.record() for row in loads],
        "others_of_a_core": taken,
    }
    return finish(outcome, given.json)


def judge(outcome: Outcome, rows: list[Row], loads: list[Row]) -> None:
    """What was promised."""
    middle = statistics.median(row.ratio for row in rows)
    outcome.at_most("INFER, median over models", MEDIAN_RATIO, middle, digits=3)
    long = [row for row in rows if not row.short]
    if long:
        worst = max(long, key=lambda row: row.ratio)
        beside = f"({worst.name}, batch {worst.batch})"
        outcome.at_most("INFER, worst of those >= 1 ms", WORST_RATIO, worst.ratio, digits=3, more=beside)
    short = [row for row in rows if row.short]
    if short:
        worst = max(short, key=lambda row: row.added_ns)
        beside = f"({worst.name}, batch {worst.batch})"
        added_us = worst.added_ns / NS_PER_US
        outcome.at_most(
            "INFER, added to worst of those < 1 ms", WORST_US, added_us, "us", digits=1, more=beside
        )
    worst = max((row for row in loads if row.batch >= 4), key=lambda row: row.ratio)
    outcome.at_most("LOAD of >= 4 MB, against memcpy", LOAD_RATIO, worst.ratio, more=f"({worst.batch} MB)")


def infer_rows(device: Device, root: Path, given: argparse.Namespace) -> list[Row]:
    """Each model at each batch size that it has."""
    repository = root / "models"
    if not given.only:
        repositories.layers(repository, "dense_64x2", width=64, depth=2)
        repositories.layers(repository, "dense_256x8", width=256, depth=8)
        repositories.layers(repository, "dense_1024x4", width=1024, depth=4)
        repositories.convolutions(repository, "conv_32x8", side=32, channels=32, depth=8, seed=8, mean=True)
    for path in given.models:
        if path.is_dir():
            shutil.copytree(path, repository / path.name)
            continue
        (repository / path.stem / "1").mkdir(parents=True)
        shutil.copy(path, repository / path.stem / "1" / "model.onnx")
    rows = []
    for served in compiled(repository, root / "cache"):
        if not served.code.lifted:
            print(f"  {served.model.name}: left out, its weights are not lifted")
            continue
        plain = plain_session(repository / served.model.name / "1" / "model.onnx")
        device.prepare(served.code)
        device.load(records.load(served.model, extent_of(device, served)))
        for batch in given.batch if served.code.batched else [1]:
            if batch in served.code.batch_sizes:
                rows.append(infer_row(device, served, plain, batch, given.seconds))
                print("  " + "  ".join(rows[-1].cells()), flush=True)
        device.retire(served.code.code_id)
    return rows


def infer_row(device: Device, served: ServedVersion, plain: Any, batch: int, seconds: float) -> Row:
    """One model at one batch size."""
    code = served.code
    fills = msgspec.json.decode((Path(code.path) / "probe.json").read_bytes(), type=tuple[Fill, ...])
    inputs = generate_inputs(fills, rows=batch)
    parts = [inputs]
    if code.batched:
        parts = [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(batch)]
    room = memoryview(bytearray(batch * served.model.output_bytes + 64))
    calls = [
        CallBuffers(inputs=part, output=room[i * served.model.output_bytes :][: served.model.output_bytes])
        for i, part in enumerate(parts)
    ]
    action = records.infer(served.model, extent_of(device, served), [1] * len(calls), batch=batch)
    names = [spec.name for spec in code.outputs]
    row = Row(served.model.name, batch, Timed(), Timed())
    wanted = plain.run(names, inputs)
    device.infer(action, calls)
    for order, name in enumerate(names):
        found = [output(call, name) for call in calls]
        got = np.concatenate(found).reshape(wanted[order].shape) if code.batched else found[0]
        row.error = max(
            row.error, float(np.abs(got - wanted[order]).max() / (np.abs(wanted[order]).max() or 1))
        )
    alternate(row, lambda: device.infer(action, calls), lambda: plain.run(names, inputs), seconds)
    return row


def load_rows(device: Device, root: Path, seconds: float) -> list[Row]:
    """LOAD of one matrix of each size against a copy of the same bytes to the same place."""
    repository = root / "models"
    for size in BLOB_MB:
        side = round((size * 1e6 / 4) ** 0.5)
        repositories.one_matrix(repository, f"matrix_{size}", repositories.matrix_of(size, side, side))
    rows = []
    target = np.zeros(BLOB_MB[-1] * 1_100_000, np.uint8)
    for served in compiled(repository, root / "cache"):
        device.prepare(served.code)
        action = records.load(served.model, extent_of(device, served))
        blob = np.fromfile(served.model.weights.path, np.uint8)
        place = target[: len(blob)]
        row = Row("", int(served.model.name.rpartition("_")[2]), Timed(), Timed())
        device.load(action)
        alternate(
            row,
            lambda action=action: device.load(action),  # type: ignore[misc]
            lambda place=place, blob=blob: np.copyto(place, blob),  # type: ignore[misc]
            seconds / 2,
        )
        rows.append(row)
        device.retire(served.code.code_id)
    return sorted(rows, key=lambda row: row.batch)


def alternate(
    row: Row, ours: Callable[[], object], theirs: Callable[[], object], seconds: float, least: int = 5
) -> None:
    """Both in turn, changing who is first."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(row.ours.wall) < least:
        row.ours.time(ours)
        row.theirs.time(theirs)
        row.theirs.time(theirs)
        row.ours.time(ours)


def compiled(repository: Path, cache_dir: Path) -> list[ServedVersion]:
    """Everything in a repository that can be served."""
    config = StoreConfig(cache_dir=str(cache_dir))
    cache = Cache(cache_dir)
    compiler = Compiler(cache, config)
    return [
        compiler.compile(entry, version)
        for entry in Repository(repository, config).scan()
        for version in entry.versions
    ]


def plain_session(path: Path) -> Any:
    """What a user would run, with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def extent_of(device: Device, served: ServedVersion) -> Extent:
    """Pages from the first on."""
    return Extent(0, device.spec.pages_of(served.model.weights.size))


def output(call: CallBuffers, name: str) -> Any:
    """One output of a call."""
    ref: TensorRef = next(ref for ref in call.outputs if ref.name == name)
    return np.ndarray(ref.shape, NUMPY_DTYPES[ref.datatype], buffer=call.output, offset=ref.offset)


if __name__ == "__main__":
    raise SystemExit(main())
