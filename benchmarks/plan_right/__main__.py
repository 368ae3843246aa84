"""Is ``clockwork plan`` right? Predictions are written down, then played on real processes.

    python -m benchmarks.plan_right [--short] [--only NAME]... [--json FILE]
    python -m benchmarks.plan_right --predict FILE     plans what is not in it yet
    python -m benchmarks.plan_right --play FILE        plays what is in it: a quarter of an hour
    python -m benchmarks.plan_right --cpu              a real model on the CPU device: nine minutes

A scenario that is none of the others is played first, to learn this machine's delays and noise from the
server's journal, as anybody would who has a server. Then twenty scenarios are planned, and their requests
simulated on as many devices as the plan says and on one less; all of it is written down, and the file's hash
printed, before anything is played. Then a server with emulated devices gets the same requests at the same
instants. What was played is kept beside the predictions, so that an interrupted run goes on; what proves
nothing, as its requests were sent late, is played again. Needs a quiet machine. ``--short``: two scenarios.
``--cpu`` plays none of them, but looks for the greatest rate of a real model.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, structs

from benchmarks.plan_right import cpu
from benchmarks.plan_right.check import (
    NEAR,
    CheckReport,
    Ends,
    check_report,
    measured_ends,
    predicted_ends,
)
from benchmarks.plan_right.scenarios import CALIBRATION, CASES, SECONDS, WARMUP_S, Case
from clockwork_serve.apps.learned import read_delays
from clockwork_serve.apps.plan.demand import kinds_of
from clockwork_serve.apps.plan.report import MixReport, PlanQuestion, make_plan
from clockwork_serve.apps.plan.runs import PlanRuns
from clockwork_serve.apps.simulate import read_with_zoo
from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.sim import Constants
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness.report import Outcome, finish, parser, table

TARGET: Final = 0.99
MOST: Final = 16
CALIBRATION_DEVICES: Final = 4
SHORT: Final = ("time", "memory")
SHARE: Final = 0.9
"""Of the scenarios, how many must be as predicted: 18 of 20."""
TRIES: Final = 3
"""Of a run that was disturbed; then it proves nothing."""
GOODPUT_NEAR, P99_NEAR, SAME_REFUSED = 0.02, 0.10, 0.8
LUCK_SAME, LUCK_SPREAD = 0.1, 1.5
"""Which of several like requests or models is hit hangs on microseconds. Where two simulations disagree, too,
so much less of the refused have to be the same, and models may differ so many times as much."""
OTHER_LUCK: Final = 1001
"""A seed of durations and delays; the requests stay the same."""
COLUMNS: Final = (
    "", "devices", "in time", "measured", "one less", "measured", "goodput", "p99", "models", "by luck",
    "same refused", "by luck",
)  # fmt: skip


class Prediction(Struct, frozen=True, kw_only=True):
    """What is said of a scenario before it is played.

    ``asked``: its text and its models, hashed. ``luck_same``, ``luck_spread``: how near two simulations are
    that differ in noise alone, with one device less; no prediction can beat that.
    """

    name: str
    asked: str
    devices: int
    in_time: float
    in_time_fewer: float
    constants: Constants
    """The delays and the noise that it rests on."""
    luck_same: float
    luck_spread: float
    ends: dict[int, list[tuple[int, str, bool, int]]]
    """By number of devices, of each request: due when, its model, whether in time, its latency; in ns."""

    def of(self, devices: int) -> Ends:
        """What is said of each request on so many devices."""
        return {(due, model): (good, took) for due, model, good, took in self.ends[devices]}


class Run(Struct, frozen=True, kw_only=True):
    """What was found when a prediction was played; ``prediction``: its hash."""

    name: str
    devices: int
    prediction: str
    found: CheckReport


Runs = Mapping[tuple[str, int], CheckReport]
"""By scenario and number of devices."""


def digest(text: bytes) -> str:
    """Its SHA-256."""
    return hashlib.sha256(text).hexdigest()


def asked_of(case: Case) -> str:
    """What a prediction of a case is about."""
    return digest(f"{case.text()}\n{case.table()}\n{case.config}\n{TARGET}".encode())[:16]


def question(
    path: Path, case: Case, constants: Constants | None = None, devices: int | None = None
) -> PlanQuestion:
    """A plan's question of a case, or of the case on so many devices."""
    scenario, zoo = read_with_zoo(path, devices=devices)
    return PlanQuestion(
        scenario=scenario, zoo=zoo, kinds=kinds_of(scenario), target=TARGET, seeds=(1,), config=case.config,
        most=MOST, constants=constants,
    )  # fmt: skip


# ------------------------------------------------------------
# To predict: on virtual time, after the machine was measured.


def measured(folder: Path) -> Constants:
    """The delays and the noise of a server on this machine."""
    path = CALIBRATION.write(folder)
    for number in range(TRIES):
        journal = folder / f"calibration-{number}.journal"
        with served(folder, CALIBRATION, CALIBRATION_DEVICES, journal) as url:
            _, invalid = measured_ends(str(path), url, seed=1)
        if not invalid:
            return read_delays(str(journal))
        print(f"  calibration: {invalid}", flush=True)
    sys.exit(f"the delays of this machine: measured {TRIES} times, never undisturbed; leave it in peace")


def planned(case: Case, constants: Constants, folder: Path, processes: int) -> tuple[MixReport, MixReport]:
    """The fewest devices that are enough for a case, and one less. Raises if there are none."""
    path = case.write(folder)
    with PlanRuns(None, processes) as runs:
        made = make_plan(question(path, case, constants), runs)
    assert made.answer is not None and made.fewer is not None, f"{case.name}: no answer"
    return made.answer, made.fewer


def predict(case: Case, constants: Constants, folder: Path, processes: int) -> Prediction:
    """Plan a case, and say what becomes of each request, with as many devices and with one less."""
    answer, fewer = planned(case, constants, folder, processes)
    path = folder / f"{case.name}.toml"
    count = answer.total
    asked = {n: question(path, case, constants, n) for n in (count, count - 1)}
    ends = {n: predicted_ends(one.simulated()) for n, one in asked.items()}
    other = predicted_ends(structs.replace(asked[count - 1].simulated(), seed=OTHER_LUCK))
    luck = check_report(asked[count - 1], ends[count - 1], other, url="", invalid="")
    return Prediction(
        name=case.name, asked=asked_of(case), devices=count, in_time=answer.in_time.mean,
        in_time_fewer=fewer.in_time.mean, constants=constants,
        luck_same=same_refused(luck), luck_spread=spread(luck),
        ends={n: [(due, model, *end) for (due, model), end in found.items()] for n, found in ends.items()},
    )  # fmt: skip


def same_refused(found: CheckReport) -> float:
    """Of the requests that one side or both did not answer in time, the share of both (Jaccard's index).

    1 where there is nothing to compare, as with closed loads, whose requests come when they like.
    """
    either = found.neither + found.only_predicted + found.only_measured
    return found.neither / either if either else 1.0


def spread(found: CheckReport) -> float:
    """By how much goodput was too high or too low for single models, all together, as a share of it."""
    off_rps = sum(abs(model.predicted_rps - model.measured_rps) for model in found.models)
    return off_rps / found.total.measured_rps if found.total.measured_rps else 1.0


def predict_all(file: Path, cases: Sequence[Case]) -> None:
    """Predict what the file has not yet, or what was asked otherwise then."""
    kept = {one.asked for one in read_predictions(file)}
    missing = [case for case in cases if asked_of(case) not in kept]
    with tempfile.TemporaryDirectory() as name:
        if missing:
            constants = measured(Path(name))
        for case in missing:
            made = predict(case, constants, Path(name), len(os.sched_getaffinity(0)))
            with file.open("ab") as out:
                out.write(msgspec.json.encode(made) + b"\n")
            print(f"  {case.name}: {made.devices} devices, {made.in_time:.2%} in time; one less "
                  f"{made.in_time_fewer:.2%}", flush=True)  # fmt: skip


def read_predictions(file: Path) -> list[Prediction]:
    """What is in a file; nothing if there is none."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [msgspec.json.decode(line, type=Prediction) for line in lines]


# ------------------------------------------------------------
# To play: on real processes, whose times count.


@contextmanager
def served(folder: Path, case: Case, devices: int, journal: Path | None = None) -> Iterator[str]:
    """A server with so many emulated devices; its URL."""
    settings = Settings(
        repository=str(folder / case.name), http_port=0, grpc_port=0, metrics_port=0, log_level="warning",
        journal="memory" if journal is None else str(journal),
    )  # fmt: skip
    config = ServerConfig(
        settings=settings, store=StoreConfig(cache_dir=str(folder / "cache")), controller=case.config,
        devices=tuple(
            DeviceConfig(
                device=f"emulated:{at}", kind="emulated", memory_bytes=case.memory_mib * MIB,
                page_bytes=case.page_mib * MIB,
            )
            for at in range(devices)
        ),
    )  # fmt: skip
    with running_server(config) as server:
        yield server.http_url


def play(case: Case, said: Prediction, devices: int, folder: Path) -> CheckReport:
    """Play a case on so many devices, and hold it against what was said."""
    path = folder / f"{case.name}.toml"
    with served(folder, case, devices) as url:
        ends, invalid = measured_ends(str(path), url, seed=1)
    asked = question(path, case, said.constants, devices)
    return check_report(asked, said.of(devices), ends, url=url, invalid=invalid)


def play_all(file: Path, cases: Sequence[Case]) -> tuple[list[Prediction], Runs]:
    """Play what was predicted of these cases, but what was played before; all that is found."""
    kept = file.with_name(file.name + ".played")
    current = {one.asked: one for one in read_predictions(file)}
    said = [current[asked_of(case)] for case in cases if asked_of(case) in current]
    hashes = {one.name: digest(msgspec.json.encode(one)) for one in said}
    runs: dict[tuple[str, int], CheckReport] = {}
    for line in kept.read_bytes().splitlines() if kept.is_file() else []:
        run = msgspec.json.decode(line, type=Run)
        if hashes.get(run.name) == run.prediction:
            runs[run.name, run.devices] = run.found
    by_name = {case.name: case for case in cases}
    for one in said:
        with tempfile.TemporaryDirectory() as name:
            by_name[one.name].write(Path(name))
            for devices in (one.devices, one.devices - 1):
                if (one.name, devices) in runs and not runs[one.name, devices].invalid:
                    continue
                for _ in range(TRIES):
                    found = runs[one.name, devices] = play(by_name[one.name], one, devices, Path(name))
                    print(f"  {one.name}, {devices} devices: {in_time(found):.2%} in time"
                          f"{found.invalid and f'; INVALID: {found.invalid}'}", flush=True)  # fmt: skip
                    if not found.invalid:
                        break
                run = Run(name=one.name, devices=devices, prediction=hashes[one.name], found=found)
                with kept.open("ab") as out:
                    out.write(msgspec.json.encode(run) + b"\n")
    return said, runs


def in_time(found: CheckReport) -> float:
    """The share that was measured to be in time."""
    return found.total.measured_rps * (SECONDS - WARMUP_S) / max(1, found.total.requests)


# ------------------------------------------------------------
# What came of it.


def proves_nothing(runs: Mapping[tuple[str, int], CheckReport]) -> str:
    """Why the runs together prove nothing; empty if they do."""
    bad = {key: run.invalid for key, run in runs.items() if run.invalid}
    if not bad:
        return ""
    (name, devices), why = next(iter(bad.items()))
    return f"{len(bad)} of {len(runs)} runs, {TRIES} times each; of {name} with {devices} devices: {why}"


def p99_off(found: CheckReport) -> float:
    """By which share the p99 of answers in time was predicted too long; 1 if one side has none."""
    ours, theirs = found.total.predicted_ms, found.total.measured_ms
    return ours[1] / theirs[1] - 1 if ours and theirs else 1.0


def judge(outcome: Outcome, said: Sequence[Prediction], runs: Runs) -> None:
    """Show and judge what was predicted and played."""
    rows, good = [], dict[str, list[bool]]()
    for one in said:
        whole, fewer = (runs[one.name, devices] for devices in (one.devices, one.devices - 1))
        alike = same_refused(fewer)
        rows.append((
            one.name, one.devices, f"{one.in_time:.2%}", f"{in_time(whole):.2%}", f"{one.in_time_fewer:.2%}",
            f"{in_time(fewer):.2%}", f"{fewer.total.off:+.1%}", f"{p99_off(fewer):+.1%}",
            f"{spread(fewer):.1%}", f"{one.luck_spread:.1%}", f"{alike:.2f}", f"{one.luck_same:.2f}",
        ))  # fmt: skip
        for what, holds in {
            f"as many devices as planned meet {TARGET:.0%}, one less does not":
                in_time(whole) >= TARGET > in_time(fewer),
            f"one less: goodput within {GOODPUT_NEAR:.0%}": abs(fewer.total.off) <= GOODPUT_NEAR,
            f"one less: goodput by model within {NEAR:.0%}, or as luck allows":
                all(model.near for model in fewer.models)
                or spread(fewer) <= LUCK_SPREAD * one.luck_spread,
            f"one less: p99 within {P99_NEAR:.0%}": abs(p99_off(fewer)) <= P99_NEAR,
            f"one less: {SAME_REFUSED:g} of the refused are the same, or as luck allows":
                alike >= min(SAME_REFUSED, one.luck_same - LUCK_SAME),
        }.items():  # fmt: skip
            good.setdefault(what, []).append(holds)
        outcome.figures[one.name] = {
            "devices": one.devices, "luck_same": one.luck_same, "luck_spread": one.luck_spread,
            **{str(found.devices): msgspec.to_builtins(found) for found in (whole, fewer)},
        }  # fmt: skip
    print(f"\n{table(COLUMNS, rows)}")
    for what, each in good.items():
        least = math.ceil(SHARE * len(each))
        bad = ", ".join(one.name for one, held in zip(said, each, strict=True) if not held)
        outcome.judge(
            what, asked=f">= {least} of {len(each)}", good=sum(each) >= least,
            found=f"{sum(each)} (not {bad})" if bad else f"{sum(each)}",
        )  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help=f"of {', '.join(SHORT)} alone")
    options.add_argument("--only", action="append", metavar="NAME", choices=[case.name for case in CASES])
    options.add_argument("--predict", type=Path, metavar="FILE", help="write predictions there")
    options.add_argument("--play", type=Path, metavar="FILE", help="play the predictions there")
    options.add_argument(
        "--cpu", action="store_true", help="the greatest rate on the CPU device, and no more"
    )
    given = options.parse_args()
    names = given.only or (SHORT if given.short else [case.name for case in CASES])
    cases = [case for case in CASES if case.name in names]
    outcome = Outcome("benchmarks.plan_right")
    if given.cpu:
        cpu.measure(outcome, TARGET)
        return finish(outcome, given.json)
    with tempfile.TemporaryDirectory() as folder:
        file = given.predict or given.play or Path(folder) / "predictions.jsonl"
        if not given.play:
            predict_all(file, cases)
        if not file.is_file():
            options.error(f"play: expected a file of predictions, found no {file}; make it with --predict")
        print(f"predictions: SHA-256 {digest(file.read_bytes())}", flush=True)
        if given.predict:
            return 0
        said, runs = play_all(file, cases)
    if len(said) < len(cases):
        missing = {case.name for case in cases} - {one.name for one in said}
        options.error(f"play: expected predictions of {', '.join(sorted(missing))}; make them with --predict")
    judge(outcome, said, runs)
    outcome.invalid = proves_nothing(runs)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
