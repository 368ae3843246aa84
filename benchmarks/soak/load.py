"""What a soak asks a server: models, and scenarios of the load generator, in turns over HTTP and gRPC."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import repositories
from benchmarks.serving import Serving
from clockwork_serve.bench.address import Protocol
from clockwork_serve.bench.live import Moment
from clockwork_serve.bench.plan import Options, Plan, make_plan
from clockwork_serve.bench.report import Report
from clockwork_serve.bench.run import run

EMULATED, MATRICES, DEEP = 16, 24, 4
WIDE, LONG = 64, 16
REPLACED, UNLOADED = 2, 2
"""Models that change while it goes on: whose weights are replaced, and that come and go."""

HEAD: Final = """
name = "{name}"
seconds = {seconds}

[[models]]
name = "emulated"
kind = "resnet50_v2"
copies = 16

[[models]]
name = "matrix"
kind = "resnet50_v2"
copies = 24

[[models]]
name = "deep"
kind = "resnet50_v2"
copies = 4
"""
LOAD: Final = """
[[loads]]
name = "{name}"
models = {models}
{rest}
"""
SCENARIOS: Final[dict[str, list[tuple[str, list[str], str]]]] = {
    "steady": [
        ("soon", ["matrix"], 'arrivals = "poisson"\nrate_rps = 220\nslo_ms = 50'),
        ("later", ["emulated"], 'arrivals = "poisson"\nrate_rps = 120\nslo_ms = 200\npriority = 9'),
        ("deep", ["deep"], 'arrivals = "fixed"\nrate_rps = 40\nslo_ms = 100'),
    ],
    "bursts": [
        ("calm", ["matrix", "deep"], 'arrivals = "gamma"\ncv = 3\nrate_rps = 220\nslo_ms = 100'),
        ("bursts", ["emulated"],
         'arrivals = "poisson"\nrate_rps = 900\non_s = 0.4\noff_s = 1.6\nslo_ms = 60'),
    ],
    "closed": [
        ("clients", ["deep"], 'arrivals = "closed"\nconcurrency = 2\nslo_ms = 100\nretry_ms = 20'),
        ("waiting", ["emulated"],
         'arrivals = "closed"\nconcurrency = 1\nslo_ms = 500\nretry = "retry_after"\nretry_ms = 50'),
    ],
    "popular": [
        ("zipf", ["matrix", "emulated"],
         'arrivals = "poisson"\nrate_rps = 360\npopularity = "zipf"\nzipf_s = 1.1\nslo_ms = 40'),
        ("cold", ["deep"], 'arrivals = "gamma"\ncv = 2\nrate_rps = 40\nslo_ms = 30\npriority = 2'),
    ],
    "too much": [
        ("urgent", ["matrix"], 'arrivals = "poisson"\nrate_rps = 200\nslo_ms = 25\npriority = 1'),
        ("flood", ["emulated"], 'arrivals = "poisson"\nrate_rps = 1200\nslo_ms = 25\npriority = 15'),
    ],
}  # fmt: skip
"""By name, each over one protocol: its loads' names, sets of models, and further fields."""


def write_models(root: Path) -> None:
    """All models that are served."""
    for index in range(EMULATED):
        slower = 1 + index % 4 / 4
        infer_ms = {1: 1.0 * slower, 2: 1.4 * slower, 4: 2.0 * slower, 8: 3.2 * slower}
        repositories.emulated(root, f"e{index}", infer_ms, load_ms=2)
    for index in range(MATRICES):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    for index in range(DEEP):
        repositories.layers(root, f"d{index}", width=128, depth=4, seed=index)
    for name, count in (("r", REPLACED), ("x", UNLOADED)):
        for index in range(count):
            repositories.one_matrix(root, f"{name}{index}", repositories.matrix_of(index, WIDE, LONG))


def scenario(folder: Path, name: str, seconds: float) -> Path:
    """The file of a scenario of that name."""
    text = HEAD.format(name=name, seconds=seconds)
    for load, models, rest in SCENARIOS[name]:
        text += LOAD.format(name=load, models=[*models], rest=rest).replace("'", '"')
    path = folder / f"{name.replace(' ', '_')}.toml"
    path.write_text(text)
    return path


@dataclass(slots=True)
class Ends:
    """What became of the generator's requests, summed over protocols."""

    asked: int = 0
    answered: int = 0
    good: int = 0
    late: int = 0
    failed: int = 0
    lost: int = 0
    """Without any response."""
    twice: int = 0
    """Bytes that nobody asked for."""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, report: Report) -> None:
        """One protocol's."""
        total = report.total
        self.asked += total.offered
        self.answered += total.good + total.late
        self.good += total.good
        self.late += total.late
        self.failed += total.failed
        self.lost += total.reset + total.broken + total.unanswered + total.unsent
        self.twice += report.sending.unexpected_bytes
        self.reasons.update({f"{one.kind}: {one.reason}": one.count for one in report.reasons})


class Generator:
    """One leg of load: a scenario over each protocol at once, each in a thread that watches its senders."""

    def __init__(
        self, folder: Path, serving: Serving, scenarios: tuple[str, str], seconds: float, seed: int
    ) -> None:
        self.reports: list[Report] = []
        self.asked: dict[str, int] = {}
        self.errors: list[str] = []
        urls: dict[Protocol, str] = {"http": serving.http_url, "grpc": serving.grpc_url}
        renamed = [_renamed(name) for name in scenarios]
        self._plans = [
            make_plan(
                scenario(folder, name, seconds),
                # Deadlines as a header or a parameter: libraries drop what comes at gRPC's own.
                Options(
                    url=urls[protocol], protocol=protocol, seed=seed + at, renamed=renamed[at],
                    deadline="header",
                ),
            )
            for at, (protocol, name) in enumerate(zip(urls, scenarios, strict=True))
        ]  # fmt: skip
        self._threads = [threading.Thread(target=self._run, args=(plan,)) for plan in self._plans]

    def start(self) -> None:
        """Let it begin."""
        for thread in self._threads:
            thread.start()

    def join(self) -> Ends:
        """Wait for its end; what became of its requests."""
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise RuntimeError(f"the load generator failed: {'; '.join(self.errors)}")
        ends = Ends()
        for report in self.reports:
            ends.add(report)
        return ends

    def _run(self, plan: Plan) -> None:
        protocol = plan.options.protocol

        def show(moment: Moment) -> None:
            self.asked[protocol] = moment.asked

        try:
            self.reports.append(run(plan, show=show).report)
        except Exception as error:  # noqa: BLE001 - told by who joins
            self.errors.append(repr(error))


def _renamed(name: str) -> dict[str, str]:
    """The server's names of the models that a scenario asks."""
    used = {one for _, models, _ in SCENARIOS[name] for one in models}
    return {one: f"{one[0]}{{i}}" for one in used}
