"""Fig 2: isolated inferences have constant durations, concurrent ones do not; on the real CPU device."""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
from msgspec import Struct, structs
from onnx import TensorProto, helper

from clockwork_lab.demo.graphs import Graph
from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, curve, points, value
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build
from clockwork_serve.messages import Call, Extent, Infer, Load, Window
from clockwork_serve.serve.supervisor.processes import running_on
from clockwork_serve.store import Cache, Repository, ServedVersion, StoreConfig, compile_all
from clockwork_serve.units import MIB, NS_PER_S, to_ms

RUNS, SHORT_RUNS, WARM_RUNS = 10_000, 300, 50
SECONDS, SHORT_SECONDS = 8.0, 0.3
THREADS = (1, 2, 4, 8, 16)
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
STEADY, UNSTEADY = 1.10, 4.0


class Alone(Struct, frozen=True):
    """Isolated runs: the duration of each, and its thread's CPU time, in ms."""

    wall_ms: list[float]
    cpu_ms: list[float]


class Crowd(Struct, frozen=True):
    """Runs by that many concurrent threads: requests per second, and latencies in ms."""

    rate_rps: float
    median_ms: float
    most_ms: float


def fig2(run: FigureRun) -> Figure:
    """One core is the device: first one request at a time, then 1 to 16 threads."""
    run.plan(1 + len(THREADS))
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, running_on({core}), collector_off():
        path = write_model(Path(folder) / "models", "convolutions", run.seed)
        alone = isolated(run, Path(folder))
        crowds = crowded(run, path)
    median_ms = statistics.median(alone.wall_ms)
    wall, cpu = (over_median(durations) for durations in (alone.wall_ms, alone.cpu_ms))
    first = crowds[1]
    published_ms = value("fig2", "isolated runs", "latency_ms", 50.0)
    isolated_runs = _published("isolated runs", "latency_ms", published_ms, max(PERCENTILES))
    return Figure(
        figure="fig2",
        title="one inference at a time, and several at once",
        question="Does an inference always take the same time, alone and when several run at once?",
        setup=run.setup(
            simulated=False,
            experiment="a network of 8 convolutions at batch 1 in ONNX Runtime with one thread, on core "
            f"{core} alone; {len(alone.wall_ms):,} isolated runs through the CPU device, median "
            f"{median_ms:.3f} ms; then plain sessions called by 1 to 16 threads on that core",
        ),
        panels=(
            Panel(
                name="isolated runs",
                x_label="percentile",
                y_label="latency over its median",
                series=(isolated_runs, _real(wall), _real(cpu, "ours: CPU time of the thread", 1)),
            ),
            _panel("throughput", "over that of one thread", crowds,
                   lambda crowd: crowd.rate_rps / first.rate_rps, _published("throughput", "goodput_rps")),
            _panel("median latency", "over that of one thread", crowds,
                   lambda crowd: crowd.median_ms / first.median_ms, _published("median", "latency_ms")),
            _panel("longest latency", "over the median of one thread", crowds,
                   lambda crowd: crowd.most_ms / first.median_ms,
                   _published("max", "latency_ms", value("fig2", "median", "latency_ms", 1.0)), y_log=True),
        ),
        claims=(
            PaperClaim(name="isolated: p99 of the CPU time over its median", paper=2.9014 / 2.9005,
                  ours=cpu[2][1], sense="<=", target=STEADY),
            PaperClaim(name="16 threads: longest latency over the median of one", paper=166 / 2.90,
                  ours=crowds[16].most_ms / first.median_ms, sense=">=", target=UNSTEADY),
        ),
        notes=(
            "Ratios, since the paper's device is a GPU and ours a core: both run one thing at a time best.",
            "What else runs on this machine shows in the isolated runs' tail, and not in their CPU time.",
            "A time slice of a core is longer than an inference: most runs of a crowd are whole.",
        ),
    )  # fmt: skip


@contextmanager
def collector_off() -> Iterator[None]:
    """Disable garbage collection, as the worker does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def over_median(durations_ms: list[float]) -> list[tuple[float, float]]:
    """(percentile, value over the median)."""
    middle = statistics.median(durations_ms)
    return [(share, float(np.percentile(durations_ms, share)) / middle) for share in PERCENTILES]


def isolated(run: FigureRun, folder: Path) -> Alone:
    """Runs one after another through the CPU device."""
    count = SHORT_RUNS if run.short else RUNS
    (served,) = compile_models(folder / "models", folder / "cache")
    device = build(DeviceConfig(device="cpu:0", memory_bytes=64 * MIB))
    try:
        lane = ModelLane(device, served)
        for _ in range(WARM_RUNS):
            lane.infer()
        alone = Alone([], [])
        for at in range(count):
            used_ns, started_ns = time.thread_time_ns(), time.perf_counter_ns()
            lane.infer()
            alone.wall_ms.append(to_ms(time.perf_counter_ns() - started_ns))
            alone.cpu_ms.append(to_ms(time.thread_time_ns() - used_ns))
            if not at & 0xFF:
                run.report(at / count, "isolated runs")
    finally:
        device.close()
    run.finished("isolated runs")
    return alone


def crowded(run: FigureRun, path: Path) -> dict[int, Crowd]:
    """Concurrent threads that all run one plain session without scheduling."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    picture = {"x": np.zeros((1, *INPUT_SHAPE), np.float32)}
    for _ in range(WARM_RUNS):
        session.run(None, picture)
    found = {}
    for threads in THREADS:
        seconds = SHORT_SECONDS if run.short else SECONDS
        found[threads] = _crowd(lambda: session.run(None, picture), threads, seconds)
        run.finished(f"{threads} threads")
    return found


def _crowd(work: Callable[[], object], threads: int, seconds: float) -> Crowd:
    durations: list[list[int]] = [[] for _ in range(threads)]
    end_ns = time.perf_counter_ns() + round(seconds * NS_PER_S)

    def call(mine: list[int]) -> None:
        while (started_ns := time.perf_counter_ns()) < end_ns or not mine:
            work()
            mine.append(time.perf_counter_ns() - started_ns)

    workers = [threading.Thread(target=call, args=(mine,)) for mine in durations]
    started_ns = time.perf_counter_ns()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took_s = (time.perf_counter_ns() - started_ns) / NS_PER_S
    every = sorted(duration for mine in durations for duration in mine)
    return Crowd(len(every) / took_s, to_ms(round(statistics.median(every))), to_ms(every[-1]))


def _real(pairs: Iterable[tuple[float, float]], name: str = "ours: CPU", variant: int = 0) -> Series:
    return Series(name=name, role=SeriesRole.REAL, points=points(pairs), variant=variant)


def _published(series: str, y_name: str, unit: float | None = None, most: float = math.inf) -> Series:
    """A published curve up to x = ``most``, over ``unit`` (None: its value at 1)."""
    found = curve("fig2", series, y_name, name="published: V100")
    one = unit or found.at(1.0) or 1.0
    pairs = ((point.x, (point.y or 0) / one) for point in found.points if point.x <= most)
    return structs.replace(found, points=points(pairs))


def _panel(
    name: str, y_label: str, crowds: dict[int, Crowd], read: Callable[[Crowd], float], published: Series,
    *, y_log: bool = False,
) -> Panel:  # fmt: skip
    return Panel(
        name=f"{name}, threads at once", x_label="threads", y_label=y_label,
        series=(published, _real((float(threads), read(crowd)) for threads, crowd in crowds.items())),
        x_log=True, y_log=y_log,
    )  # fmt: skip


# ------------------------------------------------------------
# A generated convolutional network, compiled like any user's model: what runs on the real device.


SIDE: Final = 32
INPUT_SHAPE: Final = (3, SIDE, SIDE)
CLASSES: Final = 128
_CHANNELS, _DEPTH = 32, 8
_WHENEVER: Final = Window(0, 1 << 62)
_SETTINGS: Final = "max_batch_size = 8\n"


def write_model(root: Path, name: str, seed: int) -> Path:
    """Write a model of eight convolutions and one wide layer (about 4 MB); the graph's path.

    All seeds give one architecture, so one code, with weights of their own.
    """
    rng = np.random.default_rng(seed)
    graph, last, width = Graph("convolutions"), "x", INPUT_SHAPE[0]
    for layer in range(_DEPTH):
        kernel = rng.standard_normal((_CHANNELS, width, 3, 3), dtype=np.float32) / np.float32(3 * width**0.5)
        strides = [2, 2] if layer == _DEPTH - 1 else [1, 1]
        convolved = graph.node("Conv", last, graph.constant(kernel), pads=[1] * 4, strides=strides)
        last, width = graph.node("Relu", convolved), _CHANNELS
    wide = _CHANNELS * (SIDE // 2) ** 2
    matrix = rng.standard_normal((wide, CLASSES), dtype=np.float32) / np.float32(wide**0.5)
    graph.node("MatMul", graph.node("Flatten", last), graph.constant(matrix), output="y")
    model = graph.model(
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *INPUT_SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
    )
    folder = root / name / "1"
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    (root / name / "clockwork.toml").write_text(_SETTINGS)
    return path


def compile_models(root: Path, cache_dir: Path) -> list[ServedVersion]:
    """All models of a repository, compiled."""
    config, cache = StoreConfig(cache_dir=str(cache_dir)), Cache(cache_dir)
    served, problems = compile_all(Repository(root, config), cache)
    cache.close()
    assert not problems, problems
    return served


class ModelLane:
    """One model on a device of this process, run by the caller: isolated if there is one thread."""

    def __init__(self, device: Device, served: ServedVersion) -> None:
        self._device = device
        name = device.spec.device
        extent = Extent(0, device.spec.pages_of(served.model.weights.size))
        device.prepare(served.code)
        device.load(
            Load(
                action_id=1, device=name, model=served.model.key, code_id=served.code.code_id,
                weights=served.model.weights, extent=extent, version=1, window=_WHENEVER, expected_ns=0,
            )
        )  # fmt: skip
        self._action = Infer(
            action_id=2, device=name, model=served.model.key, code_id=served.code.code_id, extent=extent,
            version=1, batch=1, window=_WHENEVER, expected_ns=0,
            calls=(Call(request_id="0", rows=1, tensors=b""),),
        )  # fmt: skip
        room = memoryview(bytearray(served.model.output_bytes + 64))
        self._calls = [CallBuffers(inputs={"x": np.zeros((1, *INPUT_SHAPE), np.float32)}, output=room)]

    def infer(self) -> None:
        """One request, alone."""
        self._calls[0].outputs.clear()
        self._device.infer(self._action, self._calls)
