"""Fig 9 in real time: its generated trace against real processes, over the sockets that serve."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
import uvloop
from msgspec import structs

from clockwork_lab.reproduce.fig9 import COLD_LEAST, DEVICES, LOST_MOST, SLO_MS, sources
from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, points
from clockwork_lab.reproduce.players import GOAL_CAP, Player, players
from clockwork_lab.reproduce.real_controller import PROFILE, ROW, started
from clockwork_lab.reproduce.real_requests import Accounting, Requests
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.devices.base import DeviceConfig
from clockwork_serve.devices.emulated import PROFILE_FILE, CodeProfile, emulated_config, emulated_profile
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import Code, CodeAdded, CodeFile, Frame, ModelAdded, TensorSpec
from clockwork_serve.sim import Cluster
from clockwork_serve.units import GIB, NS_PER_S, ms
from clockwork_serve.workload.stream import Workload, build
from clockwork_serve.workload.zoo import Zoo, ZooModel

RATE_RPS, SECONDS = 5_600.0, 3600.0  # 20 million requests in an hour
REQUESTS_LEAST: Final = 20_000_000
WARMUP_S, SHORT_RATE_RPS, SHORT_SECONDS = 60.0, 300.0, 2.0
BUCKETS, BUCKET_LEAST_S = 60, 1.0  # points of each curve, unless they would be closer than that
WORKERS: Final = 2  # processes that the devices are distributed over
OUTPUT_BYTES: Final = 64
NOTES = (
    "Counted by the clock of the process that sends: a request counts from when it should have been sent.",
    "Lost: late, refused, failed or not answered at all.",
    "Requests enter by a gateway's link to the controller: HTTP and gRPC are left out, and tensors are tiny.",
    "All processes share this machine's cores; what else runs on it is part of the result.",
)


@dataclass(slots=True, frozen=True)
class TimeBucket:
    """One point of the curves: its accounting, and seconds of CPU of controller, workers and generator."""

    seconds: float
    accounting: Accounting
    cpu_s: tuple[float, ...]


def fig9_real(run: FigureRun, seconds: float | None = None, rate_rps: float | None = None) -> Figure:
    """The trace for so many seconds after the warm-up (None: an hour) at that rate (None: 5,600 r/s).

    Raises :class:`ClockworkError` if a process ends by itself.
    """
    seconds = seconds or (SHORT_SECONDS if run.short else SECONDS)
    rate_rps = rate_rps or (SHORT_RATE_RPS if run.short else RATE_RPS)
    ours = players((GOAL_CAP,))[-1]
    warmup_s, bucket_s = min(WARMUP_S, seconds), max(BUCKET_LEAST_S, seconds / BUCKETS)
    workload = build(sources(run)[0].scenario(seconds, warmup_s, rate_rps), run.seed)
    run.plan(1)
    found = uvloop.run(_measure(run, ours, workload, bucket_s))
    found = [each for at, each in enumerate(found) if at * bucket_s >= warmup_s]
    return Figure(
        figure="fig9_real",
        title="a trace on thousands of models, twelve emulated devices, in real time",
        question="Does a controller with real processes and sockets serve the trace in time?",
        setup=run.setup(
            experiment=f"one controller process, policy {ours.name}, {WORKERS} worker processes of {DEVICES} "
            f"emulated devices, {len(workload.models):,} models; {seconds:g} s at {rate_rps:g} r/s after "
            f"{warmup_s:g} s of warm-up from cold, SLO {SLO_MS:g} ms; "
            f"{len(os.sched_getaffinity(0))} cores for all processes",
            **{"cores used": cores_used(found)},
            workload=list(workload.notes),
            simulated=False,
        ),
        panels=panels(found),
        claims=tuple(claims(found)),
        notes=NOTES,
    )


def panels(found: Sequence[TimeBucket]) -> tuple[Panel, ...]:
    """Goodput, what is lost, cold starts and CPU along the run."""

    def rate(count: Callable[[Accounting], int]) -> Callable[[TimeBucket], float]:
        return lambda each: count(each.accounting) / each.seconds

    def lost(count: Callable[[Accounting], int]) -> Callable[[TimeBucket], float]:
        return lambda each: float(count(each.accounting))

    def cores(first: int, end: int | None) -> Callable[[TimeBucket], float]:
        return lambda each: sum(each.cpu_s[first:end]) / each.seconds

    return (
        _panel("good answers", "requests/s", found, {
            "offered": rate(lambda count: count.offered), "good": rate(lambda count: count.good),
        }),
        _panel("lost", "requests", found, {
            "late": lost(lambda count: count.late), "refused": lost(lambda count: count.rejected),
            "late, good by the controller's clock": lost(lambda count: count.overdue),
            "promised, but not served": lost(lambda count: count.broken),
        }),
        _panel("cold starts", "requests/s", found, {"cold": rate(lambda count: count.cold)}),
        _panel("CPU", "cores", found, {
            "controller": cores(0, 1), "workers": cores(1, -1), "generator": cores(-1, None),
        }),
    )  # fmt: skip


def claims(found: Sequence[TimeBucket]) -> list[PaperClaim]:
    """What is asked of an hour; a shorter run misses its number of requests."""

    def total(count: Callable[[Accounting], int]) -> float:
        return float(sum(count(each.accounting) for each in found))

    offered, good = total(lambda count: count.offered), total(lambda count: count.good)
    about = f"of {offered:,.0f} requests"

    def at_most(name: str, ours: float, most: float) -> PaperClaim:
        return PaperClaim(name=name, paper=None, ours=ours, sense="<=", target=most)

    return [
        at_most(
            f"late by the clock here, good by the controller's; {about}",
            total(lambda count: count.overdue), 0,
        ),
        at_most(f"lost; {about}", total(lambda count: count.lost), LOST_MOST),
        at_most(f"promised, but not served; {about}", total(lambda count: count.broken), 0),
        at_most(
            f"without an answer, or with two; {about}",
            total(lambda count: count.unanswered) + total(lambda count: count.twice), 0,
        ),
        PaperClaim(name="requests", paper=None, ours=offered, sense=">=", target=REQUESTS_LEAST),
        PaperClaim(
            name="cold starts, share", paper=None, ours=total(lambda count: count.cold) / max(1.0, good),
            sense=">=", target=COLD_LEAST,
        ),
    ]  # fmt: skip


def cores_used(found: Sequence[TimeBucket]) -> str:
    """Of each process."""
    seconds = sum(each.seconds for each in found)
    used = [sum(each.cpu_s[at] for each in found) / seconds for at in range(len(found[0].cpu_s))]
    names = ["controller", *(f"worker {at}" for at in range(len(used) - 2)), "generator"]
    return ", ".join(f"{name} {cores:.2f}" for name, cores in zip(names, used, strict=True))


def _panel(
    name: str, y_label: str, found: Sequence[TimeBucket], read: dict[str, Callable[[TimeBucket], float]]
) -> Panel:
    ends = [sum(each.seconds for each in found[: at + 1]) for at in range(len(found))]
    return Panel(
        name=name,
        x_label="minutes",
        y_label=y_label,
        series=tuple(
            Series(
                name=f"real time: {series}",
                role=SeriesRole.REAL,
                variant=variant,
                points=points((end_s / 60, get(each)) for end_s, each in zip(ends, found, strict=True)),
            )
            for variant, (series, get) in enumerate(read.items())
        ),
    )


async def _measure(run: FigureRun, player: Player, workload: Workload, bucket_s: float) -> list[TimeBucket]:
    cpu_s: list[tuple[float, ...]] = []
    length_s = workload.duration_ns / NS_PER_S
    with tempfile.TemporaryDirectory(prefix="clockwork-") as folder:
        configs = _devices()
        frames = _catalogue(Path(folder), run.zoo, configs[0], workload.models, player.cap)
        async with started(player.config, configs, frames, WORKERS) as real:

            def began(bucket: int) -> None:
                cpu_s.append(real.each_cpu_s())
                run.report(min(1.0, bucket * bucket_s / length_s), "real time")

            keys = [f"{name}/1" for name, _ in workload.models]
            requests = Requests(real.socket, keys, ms(SLO_MS))
            try:
                await requests.ready()
                counted = await requests.follow(workload, round(bucket_s * NS_PER_S), began)
                cpu_s.append(real.each_cpu_s())
            finally:
                await requests.close()
    run.finished("real time")
    return [
        TimeBucket(bucket_s, accounting, tuple(after - before for before, after in zip(*ends, strict=True)))
        for accounting, ends in zip(counted, pairwise(cpu_s), strict=True)
    ]


def _devices() -> list[DeviceConfig]:
    """The paper's GPUs, as the simulator has them."""
    like = Cluster()
    return [
        emulated_config(
            f"emulated:{number}", PROFILE, memory_bytes=like.pages * like.page_bytes,
            page_bytes=like.page_bytes, workspace_bytes=GIB, io_bytes=GIB,
        )
        for number in range(DEVICES)
    ]  # fmt: skip


def _catalogue(
    folder: Path, zoo: Zoo, device: DeviceConfig, models: Sequence[tuple[str, str]], cap: int
) -> list[Frame]:
    """A code for each kind, whose durations are a file in a folder of its own, and all models."""
    frames: list[Frame] = []
    for kind in dict.fromkeys(kind for _, kind in models):
        code = _store(zoo.code(kind, cap), zoo[kind], folder / kind)
        frames.append(CodeAdded(code=code, profiles=(emulated_profile(device, code),)))
    for name, kind in models:
        model = structs.replace(zoo.model(name, kind, cap), output_bytes=OUTPUT_BYTES)
        frames.append(ModelAdded(model=model))
    return frames


def _store(code: Code, row: ZooModel, folder: Path) -> Code:
    """The code in a folder, with tensors of a few numbers: they do not pass through the controller anyhow."""
    profile = msgspec.json.encode(CodeProfile(infer_ns=dict(row.infer_ns), load_ns=row.load_ns))
    folder.mkdir()
    (folder / PROFILE_FILE).write_bytes(profile)
    return structs.replace(
        code, path=str(folder), files=(CodeFile(PROFILE_FILE, hash_of(profile)),),
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(ROW,)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(ROW,)),),
    )  # fmt: skip
