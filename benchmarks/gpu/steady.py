"""How steady INFERs are: their tail, how well the controller's estimator foretells it, LOADs beside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from benchmarks.gpu.rig import Batch, Rig, load_action, rows_of, undisturbed
from clockwork_lab.reproduce.fig10 import tail
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.estimates import Estimator, Samples
from clockwork_serve.devices import Device
from clockwork_serve.messages import Load
from clockwork_serve.store import ServedVersion
from clockwork_serve.units import NS_PER_S, NS_PER_US
from harness.report import Outcome, quantile

TAIL_RATIO: Final = 1.05
PREDICTION_US: Final = 150.0
PAPER_US: Final = {"INFER": (144.0, 55.0), "LOAD": (431.0, 348.0)}
"""Clockwork's paper, Fig 10 and its text: p99 of over- and under-prediction."""
MOVED: Final = 0.05
SHARES: Final = (0.5, 0.9, 0.99, 0.999, 0.9999)
WARM: Final = 50
LEAST: Final = 20
TURN_S: Final = 0.5


def steadiness(rig: Rig, outcome: Outcome, seconds: float) -> None:
    """So many INFERs of one row, one after the other."""
    served, wanted = rig.main, rig.sizes.inferences
    end_ns = time.monotonic_ns() + seconds * NS_PER_S
    with rig.device(served) as device, undisturbed():
        batch = _batch(rig, device)
        rig.infer_ns = _durations(batch, lambda count: count < wanted and _before(end_ns, count))
    found = {share: quantile(rig.infer_ns, share) for share in SHARES}
    ratio = found[0.9999] / found[0.5]
    short = "" if len(rig.infer_ns) >= wanted else f", time was up before {wanted:,}"
    outcome.judge(
        "INFER of one row: p99.99 / p50", asked=f"<= {TAIL_RATIO}",
        found=f"{ratio:.3f} ({len(rig.infer_ns):,} of them{short})", good=ratio <= TAIL_RATIO,
    )  # fmt: skip
    outcome.judge(
        "p50, p90, p99, p99.9, p99.99", asked="", good=True,
        found=", ".join(f"{value / 1e6:.3f}" for value in found.values()) + " ms",
    )  # fmt: skip
    outcome.figures["infer_ms"] = {f"p{100 * share:g}": value / 1e6 for share, value in found.items()} | {
        "count": len(rig.infer_ns), "max": max(rig.infer_ns) / 1e6, "min": min(rig.infer_ns) / 1e6
    }  # fmt: skip


def prediction(rig: Rig, outcome: Outcome) -> None:
    """The controller's own estimator, told one measured duration after the other; each is predicted first."""
    config, profile = ControllerConfig(), rig.profile()
    kind, code_id = profile.device_kind, profile.code_id
    estimator = Estimator(config.estimate_window, config.estimate_quantile)
    estimator.learn_profile(profile)
    timings = estimator.timings(rig.target.name, kind, code_id)
    windows = {
        "INFER": (timings.infer(1, ""), rig.infer_ns),
        "LOAD": (timings.load(rig.main.model.weights.size), rig.load_ns),
    }
    if not rig.infer_ns:
        outcome.invalid = "it needs the durations that the part 'steadiness' measures"
    for name, (window, measured) in windows.items():
        if not measured:
            continue
        errors = errors_of(window, measured)
        over, under = (quantile([max(0, way * each) for each in errors], 0.99) / NS_PER_US for way in (-1, 1))
        paper = "/".join(f"{each:g}" for each in PAPER_US[name])
        goal = f"<= {PREDICTION_US:g} us" if name == "INFER" else ""
        outcome.judge(
            f"{name}: p99 of over- and under-prediction (paper: {paper} us)", asked=goal,
            found=f"{over:.0f} and {under:.0f} us ({len(errors):,} of them)",
            good=not goal or max(over, under) <= PREDICTION_US,
        )  # fmt: skip
        outcome.figures[name] = {
            "p99_over_us": over, "p99_under_us": under, "count": len(errors), "paper_us": PAPER_US[name],
            "over_us": tail(errors, over=True, unit=NS_PER_US),
            "under_us": tail(errors, over=False, unit=NS_PER_US),
        }  # fmt: skip


def errors_of(window: Samples, measured: Sequence[int]) -> list[int]:
    """Measured less predicted, each predicted from what came before it."""
    errors = []
    for duration_ns in measured:
        errors.append(duration_ns - window.estimate_ns)
        window.learn(duration_ns, 0)
    return errors


def interference(rig: Rig, outcome: Outcome, seconds: float) -> None:
    """INFERs at one place, in turns alone and while LOADs to another place follow each other."""
    served = rig.main
    alone: list[int] = []
    beside: list[int] = []
    loads: list[int] = []
    turns = max(1, round(seconds / 2 / TURN_S))
    with rig.device(served) as device, undisturbed():
        batch = _batch(rig, device)
        device.load(load_action(device, served, 1))
        for turn in range(turns):
            rig.tell(f"INFER beside LOADs, turn {turn + 1} of {turns}")
            alone += _turn(batch)
            with loading(device, served, 1, loads):
                beside += _turn(batch)
    before, after = quantile(alone, 0.99), quantile(beside, 0.99)
    moved = after / before - 1
    outcome.judge(
        "p99 of INFER moved by LOADs that follow each other", asked=f"<= {MOVED:.0%}",
        found=f"{moved:+.1%} ({before / 1e6:.3f} to {after / 1e6:.3f} ms; {len(alone):,}, {len(beside):,})",
        good=moved <= MOVED,
    )  # fmt: skip
    middle, load = quantile(beside, 0.5) / quantile(alone, 0.5) - 1, quantile(loads, 0.5)
    outcome.judge(
        "p50 of INFER moved; LOADs beside it", asked="", good=True,
        found=f"{middle:+.1%}; {len(loads):,} of p50 {load / 1e6:.2f} ms",
    )  # fmt: skip
    outcome.figures["interference"] = {
        "p99_moved": moved, "p50_moved": middle, "loads": len(loads), "load_p50_ms": load / 1e6,
        "alone_ms": {f"p{100 * share:g}": quantile(alone, share) / 1e6 for share in SHARES},
        "beside_ms": {f"p{100 * share:g}": quantile(beside, share) / 1e6 for share in SHARES},
    }  # fmt: skip


@contextmanager
def loading(device: Device, served: ServedVersion, place: int, durations: list[int]) -> Iterator[None]:
    """LOADs to a place, one after the other, by a thread of their own as in a worker, within the block."""
    ended = threading.Event()
    failed: list[BaseException] = []
    action = load_action(device, served, place)

    def repeat(action: Load) -> None:
        try:
            while not ended.is_set():
                started_ns = time.monotonic_ns()
                device.load(action)
                durations.append(time.monotonic_ns() - started_ns)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            failed.append(error)

    thread = threading.Thread(target=repeat, args=(action,), name="loading")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]


def _batch(rig: Rig, device: Device) -> Batch:
    """One row on weights that are there, warm."""
    device.load(load_action(device, rig.main))
    batch = Batch(device, rig.main, rows_of("resnet50", 1, rig.seed + 4, short=rig.sizes.short))
    for _ in range(WARM):
        batch.infer()
    return batch


def _turn(batch: Batch) -> list[int]:
    end_ns = time.monotonic_ns() + TURN_S * NS_PER_S
    return _durations(batch, lambda count: _before(end_ns, count))


def _before(end_ns: float, count: int) -> bool:
    return count < LEAST or time.monotonic_ns() < end_ns


def _durations(batch: Batch, more: Callable[[int], bool]) -> list[int]:
    found: list[int] = []
    while more(len(found)):
        started_ns = time.monotonic_ns()
        batch.infer()
        found.append(time.monotonic_ns() - started_ns)
    return found
