"""The same load on a real server and on virtual time: the accuracy of ``clockwork simulate``.

Two convolutional models on the CPU device, Poisson arrivals at shares of its capacity, one SLO. Each share
runs several times for real, in turn, and as often on virtual time. Both get the same arrivals, to the
nanosecond, from the same scenario file. Durations, their noise and the delays of messages are measured in
runs of their own at 0.65 of the capacity, one in each turn; the simulator is given these and nothing of the
runs that it is compared with.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import structs

from benchmarks.simulate_reality.calibration import (
    Calibration,
    Delays,
    Execution,
    Story,
    calibrate,
    delays_of,
    story_of,
    truth_of,
    write_zoo,
)
from clockwork_serve.apps.simulate import Report, SimulationQuestion, ask, play, report
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Profile
from clockwork_serve.telemetry import read_journal
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S, to_ms
from clockwork_serve.workload.stream import Workload
from harness import repositories
from harness.http_load import Sample, Shot, infer_message, open_loop, run
from harness.machine import Disturbance, Watch
from harness.report import Outcome, finish, parser, percent, quantile, table
from harness.serving import Serving, serve

SIDE, CHANNELS = 64, 64
DEPTHS = {"shallow": 6, "deep": 14}
CURVES_MS = {"shallow": {1: 3.0, 2: 5.0, 4: 9.0}, "deep": {1: 8.0, 2: 13.0, 4: 23.0}}
"""Of the emulated models, by batch size."""
Inputs = list[tuple[str, str, tuple[int, ...], bytes]]
INPUTS: dict[str, Inputs] = {
    "cpu": [("x", "FP32", (1, 3, SIDE, SIDE), bytes(4 * 3 * SIDE * SIDE))],
    "emulated": [("x", "FP32", (1, 4), bytes(16))],
}
MEMORY_MIB = 256
WARM = 40
"""Requests, one by one, before anything is measured."""
CALIBRATION_SHARE = 0.65
CALIBRATION_SEED = 1001
PAUSE_S = 0.5
GOODPUT_TOLERANCE, P99_TOLERANCE = 0.05, 0.15
"""What is always near enough; else the spread of the real runs decides."""
SEEN = (
    "of capacity", "to controller", "to client", "to idle lane", "from lane", "between actions",
    "times profile", "late",
)  # fmt: skip
MOST = {"others": 0.05, "stolen": 0.005}
"""Shares of one core that others may take before the runs prove nothing."""


SCENARIO = """name = "{name}"
seconds = {seconds}
warmup_s = {warmup_s}

[cluster]
zoo = "measured.csv"
memory_mib = {memory_mib}
page_mib = 1

{models}
[[loads]]
name = "clients"
models = [{names}]
arrivals = "poisson"
rate_rps = {rate_rps}
slo_ms = {slo_ms}
"""


@dataclass(slots=True)
class Run:
    """One run, real or not: requests sent after the warm-up."""

    goodput_rps: float
    p50_ms: float
    p99_ms: float
    late: int
    refused: int
    offered: int
    delays: Delays | None = None
    slowness: float = 0.0

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "goodput_rps": self.goodput_rps, "p50_ms": self.p50_ms, "p99_ms": self.p99_ms, "late": self.late,
            "refused": self.refused, "offered": self.offered,
        }  # fmt: skip


@dataclass(slots=True)
class Pair:
    """All runs at one share of the capacity."""

    share: float
    real: list[Run]
    ours: list[Run]


def scenario_text(name: str, rate_rps: float, seconds: float, warmup_s: float, slo_ms: float) -> str:
    """A scenario of all models at one rate."""
    return SCENARIO.format(
        name=name, seconds=seconds, warmup_s=warmup_s, memory_mib=MEMORY_MIB, rate_rps=round(rate_rps, 3),
        slo_ms=slo_ms, names=", ".join(f'"{model}"' for model in DEPTHS),
        models="".join(f'[[models]]\nname = "{model}"\nkind = "{model}"\n\n' for model in DEPTHS),
    )  # fmt: skip


def shots_of(workload: Workload, url: str, inputs: Inputs) -> list[Shot]:
    """The workload's requests as messages."""
    names = [name for name, _ in workload.models]
    messages: dict[tuple[int, int], bytes] = {}
    shots = []
    for part in workload.open():
        for at_ns, model, slo_ns in zip(part.times_ns, part.models, part.slos_ns, strict=True):
            message = messages.get((model, slo_ns))
            if message is None:
                message = infer_message(url, names[model], inputs, slo_ms=to_ms(slo_ns))
                messages[model, slo_ns] = message
            shots.append(Shot(at_ns, message, names[model]))
    return shots


class Reality:
    """A real server, and the journal of all that it did."""

    def __init__(self, serving: Serving, journal: Path, inputs: Inputs) -> None:
        self._serving = serving
        self._inputs = inputs
        self._journal = journal
        self._spans: list[tuple[int, int, list[Sample], Workload, int]] = []

    def warm_up(self) -> None:
        """Load every model, and let the server get to know them."""
        url = self._serving.http_url
        messages = [infer_message(url, model, self._inputs, slo_ms=5000) for model in DEPTHS]
        schedule = [Shot(at * 30 * NS_PER_MS, messages[at % len(messages)]) for at in range(WARM)]
        ends = run(open_loop(url, schedule)).ends()
        if set(ends) != {"200"}:
            raise RuntimeError(f"the warm-up was not answered: {dict(ends)}")

    def play(self, workload: Workload, slo_ns: int) -> None:
        """Send a workload's requests at their instants."""
        schedule = shots_of(workload, self._serving.http_url, self._inputs)
        began_ns = time.monotonic_ns()
        samples = run(open_loop(self._serving.http_url, schedule)).samples
        self._spans.append((began_ns, time.monotonic_ns(), samples, workload, slo_ns))
        time.sleep(PAUSE_S)

    def story(self) -> Story:
        """What the journal says so far."""
        time.sleep(PAUSE_S)
        return story_of(read_journal(self._journal))

    def judged(self, index: int, story: Story) -> tuple[Run, list[Execution]]:
        """One of the runs, by its number, and what the lane did in it."""
        from_ns, to_ns, samples, workload, slo_ns = self._spans[index]
        executions = story.between(from_ns, to_ns)
        first_ns = min(sample.due_ns for sample in samples) + workload.warmup_ns
        counted = [sample for sample in samples if sample.due_ns >= first_ns]
        answered = [sample for sample in counted if sample.status == 200]
        good = [one.done_ns - one.sent_ns for one in answered if one.done_ns - one.sent_ns <= slo_ns]
        found = Run(
            goodput_rps=len(good) * NS_PER_S / (workload.duration_ns - workload.warmup_ns),
            p50_ms=quantile(good, 0.5) / NS_PER_MS,
            p99_ms=quantile(good, 0.99) / NS_PER_MS,
            late=len(answered) - len(good) + sum(one.end == "504 late" for one in counted),
            refused=sum(one.status == 429 for one in counted),
            offered=len(counted),
            delays=delays_of(samples, story, executions),
            slowness=median(
                [one.lane_ns / story.profiles[one.code].infer_ns[one.batch] for one in executions] or [1.0]
            ),
        )
        return found, executions


def capacity_rps(story: Story, infer_ns: Mapping[str, Mapping[int, int]]) -> float:
    """Requests per second that one device answers at best, the models being asked equally."""
    best_ns = [
        min(infer_ns[model.code_id][batch] / batch for batch in model.batch_sizes)
        for model in story.models.values()
    ]
    return NS_PER_S * len(best_ns) / sum(best_ns)


def simulated(question: SimulationQuestion, found: Calibration, truth: dict[str, Profile], seed: int) -> Run:
    """One run on virtual time; the seed decides noise, not arrivals."""
    asked = structs.replace(question, constants=found.constants, seed=seed)
    made: Report = report(asked, play(asked.simulation(truth=truth)))
    (load,) = made.loads
    return Run(
        goodput_rps=load.goodput_rps,
        p50_ms=load.answers.p50_ms or 0.0,
        p99_ms=load.answers.p99_ms or 0.0,
        late=load.late,
        refused=sum(load.refused.values()),
        offered=load.offered,
    )


class Plan:
    """Which runs there are: their scenario files, written once the capacity is known."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self._folder = folder
        self._given = given
        self.slo_ns = round(given.slo_ms * NS_PER_MS)
        self.zoo = folder / "measured.csv"

    def question(self, name: str, rate: float, seed: int) -> SimulationQuestion:
        """A scenario of all models at one rate, made ready."""
        given = self._given
        file = self._folder / f"{name}.toml"
        file.write_text(scenario_text(name, rate, given.seconds, given.warmup, given.slo_ms))
        return ask(file, config=ControllerConfig(), seed=seed)


def measure(serving: Serving, folder: Path, given: argparse.Namespace) -> Outcome:
    """Find the capacity, run everything for real in turns, calibrate, simulate, compare."""
    reality, plan = Reality(serving, folder / "journal", INPUTS[given.device]), Plan(folder, given)
    reality.warm_up()
    story = reality.story()
    profiled = {code: profile.infer_ns for code, profile in story.profiles.items()}
    write_zoo(plan.zoo, story.models, story.profiles)
    rate = CALIBRATION_SHARE * capacity_rps(story, profiled)
    print(f"looking for the capacity at {rate:.1f} r/s")
    reality.play(plan.question("first", rate, CALIBRATION_SEED).workload, plan.slo_ns)
    story = reality.story()
    capacity = capacity_rps(story, calibrated(reality, story, [0]).infer_ns)
    questions = [plan.question(f"share-{one:g}", one * capacity, given.seed) for one in given.shares]
    calibration = plan.question("calibration", CALIBRATION_SHARE * capacity, CALIBRATION_SEED)
    turn = [calibration, *questions]
    watch = Watch([os.getpid(), *serving.pids()])
    for round_ in range(given.rounds):
        for one in turn:
            rate = one.scenario.loads[0].rate_rps or 0.0
            print(f"turn {round_ + 1} of {given.rounds}: {one.scenario.name}, {rate:.1f} r/s", flush=True)
            reality.play(one.workload, plan.slo_ns)
    disturbed = watch.read()
    story = reality.story()
    numbers = range(1, 1 + given.rounds * len(turn))
    found = calibrated(reality, story, list(numbers[:: len(turn)]))
    truth = truth_of(story, found)
    pairs = [
        Pair(
            share,
            [reality.judged(number, story)[0] for number in numbers[at + 1 :: len(turn)]],
            [simulated(one, found, truth, seed) for seed in range(1, given.rounds + 1)],
        )
        for at, (share, one) in enumerate(zip(given.shares, questions, strict=True))
    ]
    outcome = Outcome("benchmarks.simulate_reality", invalid=", ".join(disturbed.too_much(**MOST)))
    conclude(outcome, found, capacity, pairs, disturbed)
    return outcome


def calibrated(reality: Reality, story: Story, numbers: Sequence[int]) -> Calibration:
    """From some of the runs."""
    runs = [reality.judged(number, story) for number in numbers]
    delays = Delays.together(one.delays for one, _ in runs if one.delays is not None)
    return calibrate(story.profiles, delays, [each for _, executions in runs for each in executions])


# Real runs held against simulated ones


def agrees(real: Sequence[float], ours: Sequence[float], tolerance: float) -> bool:
    """Whether the medians are near enough, or ours lies within the real runs."""
    wanted, found = median(real), median(ours)
    return abs(found - wanted) <= tolerance * wanted or min(real) <= found <= max(real)


def compare(outcome: Outcome, pair: Pair) -> list[list[str]]:
    """Judge one share; two rows of the table of differences."""
    rows = []
    for what, unit, field, tolerance in (
        ("goodput", "r/s", "goodput_rps", GOODPUT_TOLERANCE), ("p99", "ms", "p99_ms", P99_TOLERANCE),
    ):  # fmt: skip
        seen = [float(getattr(one, field)) for one in pair.real]
        told = [float(getattr(one, field)) for one in pair.ours]
        off = median(told) / median(seen) - 1
        outcome.judge(
            f"{what} at {pair.share:g} of capacity", asked=f"within {tolerance:.0%}, or the real runs",
            found=f"{off:+.1%}", good=agrees(seen, told, tolerance),
        )  # fmt: skip
        rows.append(
            [
                f"{pair.share:g}", f"{what} {unit}",
                f"{median(seen):.1f}", f"{min(seen):.1f} to {max(seen):.1f}",
                f"{median(told):.1f}", f"{min(told):.1f} to {max(told):.1f}", f"{off:+.1%}",
            ]
        )  # fmt: skip
    return rows


def seen_row(share: float, runs: Sequence[Run]) -> list[str]:
    """What a real server's world was like at one share: where a difference may come from."""
    parts: dict[str, list[int]] = {"up": [], "down": [], "there": [], "back": [], "turn": []}
    for one in runs:
        assert one.delays is not None
        for name, values in parts.items():
            values.extend(getattr(one.delays, name))
    cells = [
        f"{quantile(values, 0.5) / 1e3:.0f} / {quantile(values, 0.99) / 1e3:.0f}" if values else "-"
        for values in parts.values()
    ]
    late = percent(sum(one.late for one in runs), sum(one.offered for one in runs))
    return [f"{share:g}", *cells, f"{median(one.slowness for one in runs):.3f}", late]


def conclude(
    outcome: Outcome, found: Calibration, capacity: float, pairs: Sequence[Pair], disturbed: Disturbance
) -> None:
    """Print the tables; judge."""
    print("\nthe simulated world, measured at 0.65 of the capacity:")
    for line in found.constants.lines():
        print(f"  {line}")
    slowest = ", ".join(f"{value:.3f}" for value in found.slowness.values())
    print(f"  durations: {slowest} times the profile's, and {found.turn_ns / 1e3:.0f} us between two")
    rows = [row for pair in pairs for row in compare(outcome, pair)]
    head = ("of capacity", "", "real, median", "real runs", "simulated, median", "simulated runs", "off by")
    print(f"\ncapacity {capacity:.1f} r/s\n{table(head, rows)}")
    print("\nwhat the real runs saw (us, p50 / p99; medians):")
    print(table(SEEN, [seen_row(pair.share, pair.real) for pair in pairs]))
    outcome.figures = {
        "capacity_rps": capacity, "constants": list(found.constants.lines()),
        "slowness": list(found.slowness.values()), "between_actions_us": found.turn_ns / 1e3,
        "shares": {
            f"{pair.share:g}": {
                "real": [one.record() for one in pair.real],
                "simulated": [one.record() for one in pair.ours],
            }
            for pair in pairs
        },
        "differences": rows,
        "others_share": disturbed.others_s / disturbed.seconds,
        "stolen_share": disturbed.stolen_s / disturbed.seconds,
    }  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=18, help="of each run")
    options.add_argument("--warmup", type=float, default=2, help="of these, not counted")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--slo-ms", type=float, default=100)
    options.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 1.2], help="of the capacity")
    options.add_argument("--device", choices=tuple(INPUTS), default="cpu")
    options.add_argument("--pin", action="store_true", help="give the device a core of its own")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        for model, depth in DEPTHS.items():
            if given.device == "cpu":
                repositories.convolutions(root, model, side=SIDE, channels=CHANNELS, depth=depth)
            else:
                repositories.emulated(root, model, CURVES_MS[model])
        with serve(
            root,
            device=given.device,
            journal=Path(name) / "journal",
            memory_bytes=MEMORY_MIB * MIB,
            pin=given.pin,
        ) as serving:
            outcome = measure(serving, Path(name), given)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
