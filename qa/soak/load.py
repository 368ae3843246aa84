"""The load of a soak: scenarios of the load generator, in turns over HTTP and gRPC."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from clockwork_lab.bench.plan import Options, Plan, make_plan
from clockwork_lab.bench.report import BenchReport
from clockwork_lab.bench.run import LoadSample, run
from clockwork_lab.bench.server import Protocol
from qa.soak.servers import Up

HEAD: Final = """
name = "{name}"
seconds = {seconds}

[[models]]
name = "quick"
kind = "resnet50_v2"
copies = 24

[[models]]
name = "slow"
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
        ("soon", ["quick"], 'arrivals = "poisson"\nrate_rps = 260\nslo_ms = 50'),
        ("later", ["quick"], 'arrivals = "poisson"\nrate_rps = 80\nslo_ms = 200\npriority = 9'),
        ("slow", ["slow"], 'arrivals = "fixed"\nrate_rps = 40\nslo_ms = 100'),
    ],
    "bursts": [
        ("calm", ["quick", "slow"], 'arrivals = "gamma"\ncv = 3\nrate_rps = 200\nslo_ms = 100'),
        ("bursts", ["quick"],
         'arrivals = "poisson"\nrate_rps = 900\non_s = 0.4\noff_s = 1.6\nslo_ms = 60'),
    ],
    "closed": [
        ("clients", ["slow"], 'arrivals = "closed"\nconcurrency = 1\nslo_ms = 100\nretry_ms = 20'),
        ("open", ["quick"], 'arrivals = "poisson"\nrate_rps = 100\nslo_ms = 100'),
    ],
    "popular": [
        ("zipf", ["quick", "slow"],
         'arrivals = "poisson"\nrate_rps = 320\npopularity = "zipf"\nzipf_s = 1.1\nslo_ms = 40'),
        ("cold", ["slow"], 'arrivals = "gamma"\ncv = 2\nrate_rps = 40\nslo_ms = 30\npriority = 2'),
    ],
    "too much": [
        ("urgent", ["slow"], 'arrivals = "poisson"\nrate_rps = 60\nslo_ms = 25\npriority = 1'),
        ("flood", ["quick"], 'arrivals = "poisson"\nrate_rps = 1100\nslo_ms = 25\npriority = 15'),
    ],
}  # fmt: skip
"""By name, of one protocol and one server: its loads' names, sets of models, and further fields."""
AT_SERVER: Final = {
    "cpu": {"quick": "m{i}", "slow": "d{i}"}, "emulated": {"quick": "e{i}", "slow": "f{i}"},
}  # fmt: skip
"""What the sets of models are on each server."""


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
    """What became of the generator's requests, summed."""

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

    def add(self, other: Ends) -> None:
        """The same of others."""
        for name in ("asked", "answered", "good", "late", "failed", "lost", "twice"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)

    def take(self, report: BenchReport) -> None:
        """Of one run of the generator."""
        total = report.total
        self.asked += total.offered
        self.answered += total.good + total.late
        self.good += total.good
        self.late += total.late
        self.failed += total.failed
        self.lost += total.reset + total.broken + total.unanswered + total.unsent
        self.twice += report.sending.unexpected_bytes
        self.reasons.update({f"{one.kind}: {one.reason}": one.count for one in report.reasons})


@dataclass(frozen=True, slots=True)
class Target:
    """A scenario over a protocol to a server."""

    up: Up
    protocol: Protocol
    scenario: str


class Generator:
    """One leg of load: all its targets at once, each in a thread that watches its senders."""

    def __init__(self, folder: Path, targets: Sequence[Target], seconds: float, seed: int) -> None:
        self.asked: dict[str, int] = {}
        self._reports: list[tuple[str, BenchReport]] = []
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(
                target=self._run, args=(target.up.name, self._plan(folder, target, seconds, seed + at))
            )
            for at, target in enumerate(targets)
        ]

    def start(self) -> None:
        """Let it begin."""
        for thread in self._threads:
            thread.start()

    @property
    def begun(self) -> bool:
        """Whether all of them send, or have failed."""
        return bool(self._errors) or sum(count > 0 for count in self.asked.values()) == len(self._threads)

    def join(self) -> dict[str, Ends]:
        """Wait for its end; what became of its requests, by server."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise RuntimeError(f"the load generator failed: {'; '.join(self._errors)}")
        found: dict[str, Ends] = {}
        for server, report in self._reports:
            found.setdefault(server, Ends()).take(report)
        return found

    def _plan(self, folder: Path, target: Target, seconds: float, seed: int) -> Plan:
        server = target.up.server
        used = {one for _, models, _ in SCENARIOS[target.scenario] for one in models}
        options = Options(
            url=server.facts["grpc"] if target.protocol == "grpc" else server.http_url,
            protocol=target.protocol, seed=seed,
            renamed={one: AT_SERVER[target.up.name][one] for one in used},
            deadline="header",  # a parameter over gRPC: libraries drop what comes at gRPC's own deadline
        )  # fmt: skip
        return make_plan(scenario(folder, target.scenario, seconds), options)

    def _run(self, server: str, plan: Plan) -> None:
        def show(moment: LoadSample) -> None:
            self.asked[server] = moment.asked

        try:
            self._reports.append((server, run(plan, show=show).report))
        except Exception as error:  # noqa: BLE001 - told by who joins
            self._errors.append(repr(error))
