"""Twenty scenarios whose predictions are played: what is asked for, on what memory, of which models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.units import MIB, NS_PER_MS
from clockwork_serve.workload.zoo import Zoo
from harness import repositories

SECONDS: Final = 20.0
WARMUP_S: Final = 3.0

HEAD = """name = "{name}"
seconds = {seconds:g}
warmup_s = {warmup_s:g}

[cluster]
zoo = "{name}.csv"
memory_mib = {memory_mib}
page_mib = {page_mib}

"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model that only takes its time; durations in ms, of INFER by batch size."""

    infer_ms: dict[int, float]
    load_ms: float = 5.0
    weights_mb: float = 1.0

    @staticmethod
    def v100(name: str) -> Kind:
        """One of the paper's, on the paper's GPU."""
        row = Zoo.read("v100")[name]
        curve = {size: lasts_ns / NS_PER_MS for size, lasts_ns in row.infer_ns.items()}
        return Kind(curve, row.load_ns / NS_PER_MS, row.weights_bytes / 1e6)


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario: ``models`` by name (its kind, how many copies), and its loads as TOML; memory in MiB."""

    name: str
    models: dict[str, tuple[Kind, int]]
    loads: str
    memory_mib: int = 64
    page_mib: int = 1
    decide_ns: int = -1
    """How long the yes or no may take; -1: as long as there is hope."""

    @property
    def config(self) -> ControllerConfig:
        """Of its server, and of the simulation."""
        return ControllerConfig(decide_ns=self.decide_ns)

    def text(self) -> str:
        """The scenario, whose table of models lies beside it."""
        head = HEAD.format(
            name=self.name, seconds=SECONDS, warmup_s=WARMUP_S, memory_mib=self.memory_mib,
            page_mib=self.page_mib,
        )  # fmt: skip
        sets = [
            f'[[models]]\nname = "{name}"\nkind = "{name}"\ncopies = {copies}\n'
            for name, (_, copies) in self.models.items()
        ]
        return head + "\n".join([*sets, self.loads])

    def table(self) -> str:
        """Its models' durations, for simulations."""
        sizes = sorted({size for kind, _ in self.models.values() for size in kind.infer_ms})
        lines = [",".join(["model", "weights_mb", "load_ms", *[f"infer_b{size}_ms" for size in sizes]])]
        for name, (kind, _) in self.models.items():
            curve = [f"{kind.infer_ms[size]:g}" if size in kind.infer_ms else "" for size in sizes]
            lines.append(",".join([name, f"{kind.weights_mb:g}", f"{kind.load_ms:g}", *curve]))
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> Path:
        """The scenario, its table, and a repository of all copies; the first one's path."""
        (folder / f"{self.name}.csv").write_text(self.table())
        for name, (kind, copies) in self.models.items():
            for copy in range(copies):
                repositories.emulated(
                    folder / self.name, name if copies == 1 else f"{name}-{copy:04d}", kind.infer_ms,
                    load_ms=kind.load_ms, weights_mb=kind.weights_mb * 1e6 / MIB,
                )  # fmt: skip
        path = folder / f"{self.name}.toml"
        path.write_text(self.text())
        return path


def load(name: str, models: str, slo_ms: float, arrivals: str = "poisson", **more: object) -> str:
    """One ``[[loads]]`` table; ``models``: names between blanks; ``more``: fields, dotted for a table's."""
    fields: dict[str, object] = {"name": name, "models": models.split(), "arrivals": arrivals}
    fields |= {"slo_ms": slo_ms} | more
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    return "[[loads]]\n" + "\n".join(lines) + "\n"


NET: Final = Kind({1: 20, 2: 24, 4: 32, 8: 48, 16: 80})
"""16 + 4n ms."""
HEAVY: Final = Kind({1: 60, 2: 75, 4: 105, 8: 165})
V100_PAGE_MIB: Final = 16
KINDS: Final = ("resnet152_v1", "resnext101_64x4d", "densenet161", "se_resnext101_32x4d", "inceptionv3")


def net(copies: int) -> dict[str, tuple[Kind, int]]:
    """So many models of 16 + 4n ms."""
    return {"net": (NET, copies)}


def v100(*kinds: str, copies: int = 1) -> dict[str, tuple[Kind, int]]:
    """The paper's models, on the paper's GPU."""
    return {kind: (Kind.v100(kind), copies) for kind in kinds}


CALIBRATION: Final = Case("calibration", net(4), load("all", "net", 150, rate_rps=400))
"""Played before anything is predicted."""

# Each has a step that is clear: a device more or less moves the share in time by several points, and the
# target lies between.
CASES: Final = (
    Case("time", {"net": (Kind({1: 20, 2: 28, 4: 44, 8: 76}), 6)}, load("all", "net", 120, rate_rps=150)),
    Case(
        "memory", {"net": (Kind({1: 15, 2: 24}, load_ms=70), 24)}, load("all", "net", 60, rate_rps=45),
        memory_mib=10,
    ),
    Case("steady", net(4), load("all", "net", 100, rate_rps=440)),
    Case(
        "two-slos", net(4),
        load("quick", "net", 60, rate_rps=90) + load("patient", "net", 400, rate_rps=145),
    ),
    Case("zipf", net(12), load("all", "net", 120, rate_rps=245, popularity="zipf", zipf_s=1.1)),
    Case("bursts", net(4), load("all", "net", 120, rate_rps=450, on_s=1, off_s=1)),
    Case("gamma", net(4), load("all", "net", 150, "gamma", rate_rps=280, cv=3)),
    Case("fixed", net(4), load("all", "net", 90, "fixed", rate_rps=400)),
    Case("closed", net(4), load("all", "net", 100, "closed", concurrency=8, retry_ms=50)),
    Case(
        "classes", net(4),
        load("urgent", "net", 80, rate_rps=60, priority=1) + load("usual", "net", 200, rate_rps=220),
    ),
    Case(
        "rush", net(6),
        load("all-day", "net", 120, rate_rps=100)
        + load("lunch", "net", 120, rate_rps=205, start_s=8, stop_s=14),
    ),
    Case(
        "growing", net(4),
        load("all", "net", 120, "poisson", rate_rps=132, **{"rate_ramp.every_s": 3, "rate_ramp.factor": 1.2}),
    ),
    Case("at-the-door", net(4), load("all", "net", 150, rate_rps=310), decide_ns=0),
    Case("heavy", {"net": (HEAVY, 4)}, load("all", "net", 300, rate_rps=320)),
    Case(
        "few-pages", {"net": (Kind({1: 15, 2: 24}, load_ms=40), 16)},
        load("all", "net", 100, rate_rps=70, popularity="zipf", zipf_s=0.6), memory_mib=5,
    ),
    Case(
        "v100", v100("resnet152_v2", copies=6), load("all", "resnet152_v2", 60, rate_rps=500),
        4096, V100_PAGE_MIB,
    ),
    Case("v100-kinds", v100(*KINDS), load("all", " ".join(KINDS), 80, rate_rps=750), 4096, V100_PAGE_MIB),
    Case(
        "v100-two-slos", v100("winograd_resnet101_v2", "resnet152_v1s", copies=3),
        load("quick", "winograd_resnet101_v2", 40, rate_rps=250)
        + load("patient", "resnet152_v1s", 250, rate_rps=250),
        4096, V100_PAGE_MIB,
    ),
    Case(
        "v100-memory", v100("resnext101_64x4d", copies=8),
        load("all", "resnext101_64x4d", 100, rate_rps=130), 640, V100_PAGE_MIB,
    ),
    Case(
        "v100-zipf", v100("resnet152_v2", copies=16),
        load("all", "resnet152_v2", 80, rate_rps=220, popularity="zipf", zipf_s=0.9), 960, V100_PAGE_MIB,
    ),
)  # fmt: skip
