"""The CPU device: the greatest rate that a plan predicts from a server's journal, and what it really is.

A real model on real processes. What serves and what asks share the machine's cores with the device: batches
take longer than when they were profiled, and a plan learns how much longer from the journal of a load that
came before. Told beside the rates: what each process used, and what the profile alone would have predicted.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from benchmarks.plan_right.check import Ends, measured_ends, predicted_ends
from benchmarks.plan_right.scenarios import load
from clockwork_lab.demo.fetch import FetchError, Files, fetch
from clockwork_lab.demo.wheels import MAGIKA, WHEELS
from clockwork_serve.apps.learned import read_delays, read_zoo
from clockwork_serve.apps.simulate import ask
from clockwork_serve.config.table import default_cache
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.sim import Constants
from clockwork_serve.units import NS_PER_MS, NS_PER_S, to_ms
from clockwork_serve.workload.zoo import Zoo
from harness.machine import Watch, cpu_s
from harness.report import Outcome, quantile, table
from harness.serving import Metrics, Serving, serve, total

MODEL: Final = "magika"
"""Tells types of files by their bytes: 8 kB a request, some 9 ms, and batches save it no time."""
SLO_MS: Final = 100.0
SECONDS, WARMUP_S = 30.0, 5.0
SEEDS: Final = (1, 2)
CALIBRATION_SEED: Final = 1001
"""Its requests are none of those that are predicted."""
CALIBRATION: Final = 0.8
"""Of the rate that the profile alone predicts: what the server has served when its journal is read."""
PROFILE, JOURNAL = "profile.json", "calibration.journal"
FACTORS: Final = (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
"""Of the rate that is predicted: what is played."""
NEAR: Final = 0.05
FINE: Final = 0.002
"""How near the greatest rate is looked for, as a share of it."""
FLUSHED_S: Final = 1.0
"""After so long a journal's file has what was served."""
OTHERS: Final = 0.05
"""A share of one core that others may take before the runs prove nothing."""

SCENARIO = """name = "{name}"
seconds = {seconds:g}
warmup_s = {warmup_s:g}

[cluster]
zoo = "{zoo}"
memory_mib = 256
page_mib = 1

[[models]]
name = "{model}"
kind = "{model}"

"""


class Rate(Struct, frozen=True, kw_only=True):
    """What was found at one rate: shares in time and p99 in ms of answers in time, predicted and measured."""

    rate_rps: float
    predicted: float
    measured: float
    predicted_ms: float
    measured_ms: float


def repository(folder: Path) -> Path:
    """A repository of the model, whose wheel pip downloads if ``clockwork demo`` never did."""
    files = Files(Path(default_cache(os.environ)) / "demo")
    wheel = next(one for one in WHEELS if MAGIKA in one.files)
    if not files.has(wheel):
        fetch(files, wheel)
    (folder / "models" / MODEL / "1").mkdir(parents=True)
    (folder / "models" / MODEL / "1" / "model.onnx").write_bytes(files.read(MAGIKA))
    head = 'max_batch_size = 4\ninputs = [{name = "bytes", dims = [2048]}]\n'
    (folder / "models" / MODEL / "clockwork.toml").write_text(head)
    return folder / "models"


def profiled(folder: Path, models: Path) -> Zoo:
    """This machine's profile, as ``clockwork profile`` writes it; what the server keeps to, too."""
    command = [sys.executable, "-m", "clockwork_serve", "profile", str(models), "--json"]
    ended = subprocess.run(
        [*command, f"--cache={folder / 'cache'}"], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"clockwork profile: {ended.stderr.strip()[-500:]}")
    (folder / "profile.json").write_text(ended.stdout)
    return Zoo.read(folder / "profile.json")


def calibrated(folder: Path, rate_rps: float, serving: Serving) -> tuple[Zoo, str]:
    """What the server itself says after a load; and why that proves nothing, if so. Its journal is kept."""
    path = scenario(folder, rate_rps, PROFILE)
    _, invalid = measured_ends(str(path), serving.http_url, seed=CALIBRATION_SEED)
    time.sleep(FLUSHED_S)
    shutil.copy(folder / "serve.journal", folder / JOURNAL)
    return read_zoo(str(folder / JOURNAL)), invalid


def scenario(folder: Path, rate_rps: float, zoo: str) -> Path:
    """The scenario at a rate."""
    name = f"cpu-{rate_rps:.3f}"
    head = SCENARIO.format(name=name, seconds=SECONDS, warmup_s=WARMUP_S, model=MODEL, zoo=zoo)
    path = folder / f"{name}.toml"
    path.write_text(head + load("all", MODEL, SLO_MS, rate_rps=round(rate_rps, 3)))
    return path


def counted(sides: Sequence[Ends]) -> tuple[float, float]:
    """Of requests after the warm-up the share in time, and the p99 in ms of these."""
    ends = [end for side in sides for (due_ns, _), end in side.items() if due_ns >= WARMUP_S * NS_PER_S]
    good = [took_ns for in_time, took_ns in ends if in_time]
    return len(good) / max(1, len(ends)), quantile(good, 0.99) / NS_PER_MS if good else 0.0


def predicted(folder: Path, rate_rps: float, constants: Constants | None = None) -> tuple[float, float]:
    """The same, on virtual time: with a server's delays and its journal, or without, from the profile."""
    path = scenario(folder, rate_rps, JOURNAL if constants else PROFILE)
    questions = [ask(path, config=ControllerConfig(), seed=seed, constants=constants) for seed in SEEDS]
    return counted([predicted_ends(question) for question in questions])


def greatest(folder: Path, zoo: Zoo, target: float, constants: Constants | None = None) -> float:
    """The greatest rate at which the target is predicted to hold."""
    row = zoo[MODEL]
    least, most = 0.0, 1.5 * max(size * NS_PER_S / lasts_ns for size, lasts_ns in row.infer_ns.items())
    while most - least > FINE * most:
        middle = (least + most) / 2
        if predicted(folder, middle, constants)[0] >= target:
            least = middle
        else:
            most = middle
    return least


def crossing(rates: Sequence[Rate], target: float) -> float | None:
    """Where what was measured falls below the target, between rates along a line; None: it does not."""
    for below, above in pairwise(rates):
        if below.measured >= target > above.measured:
            part = (below.measured - target) / (below.measured - above.measured)
            return below.rate_rps + part * (above.rate_rps - below.rate_rps)
    return None


def slowness(metrics: Metrics, zoo: Zoo) -> float:
    """How many times as long as the table says batches ran."""
    curve = zoo[MODEL].infer_ns
    said_s = sum(
        value * min(ns for size, ns in curve.items() if size >= int(dict(labels)["batch"])) / NS_PER_S
        for (name, labels), value in metrics.items()
        if name == "clockwork_executions_total"
    )
    return total(metrics, "clockwork_model_run_seconds_total") / said_s if said_s else 0.0


class Cores:
    """CPU that the worker, the server's other processes and the load generator use, as shares of a core."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._watch = Watch([os.getpid(), *serving.pids()])
        self._before = self._used()

    def read(self) -> dict[str, float]:
        """Since the beginning; ``others``: who took no part."""
        seconds = self._watch.read()
        used = {name: value - self._before[name] for name, value in self._used().items()}
        elsewhere = seconds.others_s - used["generator"]  # which had ended, or was not there yet, then
        return {name: value / seconds.seconds for name, value in {**used, "others": elsewhere}.items()}

    def _used(self) -> dict[str, float]:
        worker = self._serving.worker_pid()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "worker": cpu_s(worker),
            "server": sum(cpu_s(pid) for pid in self._serving.pids() if pid != worker),
            "generator": ended.ru_utime + ended.ru_stime,
        }


def play(folder: Path, rate_rps: float, constants: Constants, url: str) -> tuple[Rate, str]:
    """Play a rate, with each seed; and why that proves nothing, if so."""
    path, said = scenario(folder, rate_rps, JOURNAL), predicted(folder, rate_rps, constants)
    played = [measured_ends(str(path), url, seed=seed) for seed in SEEDS]
    found = counted([ends for ends, _ in played])
    rate = Rate(
        rate_rps=rate_rps, predicted=said[0], measured=found[0], predicted_ms=said[1], measured_ms=found[1]
    )
    print(f"  {rate_rps:.1f} r/s: {said[0]:.2%} predicted, {found[0]:.2%} measured", flush=True)
    return rate, "; ".join(sorted({invalid for _, invalid in played if invalid}))


def judge(
    outcome: Outcome, said_rps: float, rates: Sequence[Rate], target: float, notes: dict[str, Any]
) -> None:
    """Show all rates, and judge the greatest one."""
    rows = [
        (
            f"{rate.rate_rps / said_rps:.2f}", f"{rate.rate_rps:.1f}", f"{rate.predicted:.2%}",
            f"{rate.measured:.2%}", f"{rate.predicted_ms:.1f}", f"{rate.measured_ms:.1f}",
        )
        for rate in rates
    ]  # fmt: skip
    print("\n" + table(("", "r/s", "predicted", "measured", "p99 ms predicted", "measured"), rows))
    found_rps = crossing(rates, target)
    if found_rps is None:
        where = "all" if rates[-1].measured >= target else "none"
        found = (
            f"{where} of {rates[0].rate_rps:.1f} to {rates[-1].rate_rps:.1f} r/s; predicted {said_rps:.1f}"
        )
    else:
        found = f"{found_rps:.1f} r/s, predicted {said_rps:.1f}: {said_rps / found_rps - 1:+.1%}"
    outcome.judge(
        f"CPU device: the greatest rate at which {target:.0%} of {MODEL} are within {SLO_MS:g} ms",
        asked=f"predicted within {NEAR:.0%}", found=found,
        good=found_rps is not None and abs(said_rps / found_rps - 1) <= NEAR,
    )  # fmt: skip
    outcome.figures["cpu"] = {
        "predicted_rps": said_rps, "measured_rps": found_rps, "rates": msgspec.to_builtins(rates), **notes,
    }  # fmt: skip


def measure(outcome: Outcome, target: float) -> None:
    """Profile, learn, predict, play, judge."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            models = repository(folder)
        except FetchError as error:
            outcome.invalid = f"{error}"
            return
        zoo = profiled(folder, models)
        profile_rps = greatest(folder, zoo, target)
        with serve(models, cache=folder / "cache", journal=folder / "serve.journal") as serving:
            learned, invalid = calibrated(folder, CALIBRATION * profile_rps, serving)
            constants, wrong = read_delays(str(folder / JOURNAL)), {invalid} - {""}
            said_rps = greatest(folder, learned, target, constants)
            print(f"predicted: {said_rps:.1f} r/s (from the profile alone {profile_rps:.1f})", flush=True)
            cores, rates = Cores(serving), []
            for factor in FACTORS:
                rate, invalid = play(folder, factor * said_rps, constants, serving.http_url)
                rates.append(rate)
                wrong |= {invalid} - {""}
            used, slower = cores.read(), slowness(serving.metrics(), learned)
    print(
        f"\n  of a core: worker {used['worker']:.0%}, the server's others {used['server']:.0%}, generator "
        f"{used['generator']:.0%}, others {used['others']:.0%}; batches ran {slower:.3f} times as long as "
        "learned"
    )
    infer_ms = {
        name: {size: to_ms(lasts_ns) for size, lasts_ns in known[MODEL].infer_ns.items()}
        for name, known in (("profiled", zoo), ("learned", learned))
    }
    notes = {"profile_rps": profile_rps, "cores": used, "slowness": slower, "infer_ms": infer_ms}
    judge(outcome, said_rps, rates, target, notes)
    if used["others"] > OTHERS:
        wrong.add(f"{used['others']:.0%} of a core used by others")
    outcome.invalid = "; ".join(sorted(wrong))
