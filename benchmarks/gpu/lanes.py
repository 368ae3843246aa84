"""LOAD against a plain copy, INFER against the package alone, CUDA graphs on and off: both sides in turn."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.device_lane_time import Row, Timed, alternate
from benchmarks.gpu.rig import (
    Batch,
    Rig,
    device_counters,
    error_of,
    gigabytes,
    load_action,
    rows_of,
    undisturbed,
)
from clockwork_serve.devices import Device
from clockwork_serve.messages import TorchIndex
from clockwork_serve.store import ServedVersion
from clockwork_serve.units import NS_PER_S
from harness.report import Outcome, quantile

BANDWIDTH_SHARE: Final = 0.85
INFER_RATIO: Final = 1.03
LEAST: Final = 5


def index_of(served: ServedVersion) -> TorchIndex:
    """How the weights of a code lie in their blob."""
    return msgspec.json.decode((Path(served.code.path) / "index.json").read_bytes(), type=TorchIndex)


def load(rig: Rig, outcome: Outcome, seconds: float) -> None:
    """LOAD of weights that are in pinned memory, against one copy of the same bytes from pinned memory."""
    from benchmarks.gpu.plain import PlainCopy

    served = rig.main
    plain = PlainCopy(rig.target, served.model.weights.path)
    with rig.device(served, host_bytes=4 * max(plain.nbytes, 4 << 20)) as device:
        action = load_action(device, served)
        for _ in range(3):  # the file comes into the pool, graphs of the place are made
            device.load(action)
            plain.copy()
        row = Row("LOAD", 1, Timed(), Timed())
        with undisturbed():
            alternate(row, lambda: device.load(action), plain.copy, seconds, LEAST)
    rig.load_ns = row.ours.wall
    ours, theirs = statistics.median(row.ours.wall), statistics.median(row.theirs.wall)
    share = theirs / ours
    outcome.judge(
        f"LOAD of {plain.nbytes / 1e6:.1f} MB, bandwidth of a plain pinned copy reached",
        asked=f">= {BANDWIDTH_SHARE:.0%}",
        found=f"{share:.1%} ({gigabytes(plain.nbytes, ours)} of {gigabytes(plain.nbytes, theirs)})",
        good=share >= BANDWIDTH_SHARE,
    )
    outcome.figures["load"] = row.record() | {
        "bytes": plain.nbytes, "p99_ms": quantile(row.ours.wall, 0.99) / 1e6,
        "plain_p99_ms": quantile(row.theirs.wall, 0.99) / 1e6, "share": share,
    }  # fmt: skip


def infer(rig: Rig, outcome: Outcome, seconds: float) -> None:
    """INFER at each batch size, against the same package with copies of its own around it, and without."""
    served = rig.main
    index, sizes = index_of(served), served.code.batch_sizes
    ratios, alone = {}, {}
    with rig.device(served) as device, undisturbed():
        device.load(load_action(device, served))
        for size in sizes:
            rig.tell(f"INFER of {size} against the package alone")
            row, phases = infer_row(rig, device, size, index, seconds / len(sizes))
            ratios[size], alone[size] = row, phases
    for size, row in ratios.items():
        outcome.judge(
            f"INFER of {size}, whole, against copy in, run, copy out alone", asked=f"<= {INFER_RATIO}",
            found=f"{row.ratio:.3f} ({row.cells()[3]} and {row.cells()[2]} ms, {row.added_ns / 1e3:+.0f} us)",
            good=row.ratio <= INFER_RATIO,
        )  # fmt: skip
        ran, by_itself = alone[size]["run_ns"], alone[size]["alone_ns"]
        outcome.judge(
            f"INFER of {size}, its run alone, by events", asked=f"<= {INFER_RATIO}",
            found=f"{ran / by_itself:.3f} ({ran / 1e6:.3f} and {by_itself / 1e6:.3f} ms)",
            good=ran / by_itself <= INFER_RATIO,
        )  # fmt: skip
    outcome.figures["infer"] = [row.record() | alone[size] for size, row in ratios.items()]


def infer_row(
    rig: Rig, device: Device, size: int, index: TorchIndex, seconds: float
) -> tuple[Row, dict[str, Any]]:
    """One batch size: both whole, in turn; then the phases of ours and the run alone, in turn."""
    from benchmarks.gpu.plain import PlainPackage

    rows = rows_of("resnet50", size, rig.seed + 2, short=rig.sizes.short)
    batch, plain = Batch(device, rig.main, rows), PlainPackage(rig.target, rig.main, index, rows)
    for _ in range(LEAST):
        batch.infer()
        wanted = plain.whole()
    row = Row("INFER", size, Timed(), Timed(), error_of(batch.answers(), wanted))
    alternate(row, batch.infer, plain.whole, seconds / 2, LEAST)
    taken: list[Any] = []
    alone: list[int] = []
    end_ns = time.monotonic_ns() + seconds / 2 * NS_PER_S
    while time.monotonic_ns() < end_ns or len(alone) < LEAST:
        taken.append(batch.infer())
        alone.append(plain.run())
    return row, {
        "alone_ns": statistics.median(alone),
        **{
            name: statistics.median(getattr(phases, name) for phases in taken)
            for name in ("input_ns", "run_ns", "output_ns")
        },
    }


def graphs(rig: Rig, outcome: Outcome, seconds: float) -> None:
    """The same INFERs with and without CUDA graphs, and what the first LOAD to a place takes with them."""
    served = rig.main
    sizes = served.code.batch_sizes
    with rig.device(served, graphs=256) as with_graphs, rig.device(served, graphs=0) as without:
        firsts = []
        for device in (with_graphs, without):
            started_ns = time.monotonic_ns()
            device.load(load_action(device, served))
            firsts.append(time.monotonic_ns() - started_ns)
        made = device_counters(with_graphs).get("graphs", 0)
        if not made:
            outcome.invalid = (
                "no graph was made" if rig.target.gpu else "there are no CUDA graphs on the CPU; the code ran"
            )
        found = []
        with undisturbed():
            for size in sizes:
                rows = rows_of("resnet50", size, rig.seed + 3, short=rig.sizes.short)
                on, off = (Batch(device, served, rows) for device in (with_graphs, without))
                row = Row("graph", size, Timed(), Timed())
                on.infer()
                off.infer()
                alternate(row, on.infer, off.infer, seconds / len(sizes), LEAST)
                found.append(row)
    for row in found:
        outcome.judge(
            f"INFER of {row.batch} with graphs, against without", asked="<= 1",
            found=f"{row.ratio:.3f} ({row.cells()[3]} and {row.cells()[2]} ms)", good=row.ratio <= 1,
        )  # fmt: skip
    outcome.judge(
        "first LOAD to a place, with graphs and without", asked="", good=True,
        found=f"{firsts[0] / 1e6:.1f} and {firsts[1] / 1e6:.1f} ms, {made} graphs",
    )  # fmt: skip
    outcome.figures["graphs"] = {
        "made": made, "first_load_ms": [each / 1e6 for each in firsts],
        "infer": [row.record() for row in found],
    }  # fmt: skip
