"""Loads for ``clockwork bench``, as data, and the text of its scenarios; nothing here plays one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from comparison.peers import served

MOBILENET: Final = "mobilenet_v3_small"
EMULATED: Final = served.DEVICE
SLO_MS: Final = {MOBILENET: 100, EMULATED: 200}
WARMUP_S: Final = 4
MEMORY_MIB: Final = 200
"""20 MobileNets; servers that cannot keep to it hold all that are asked for."""
COMERS: Final = "comers"
"""The load of requests for models that come and go, the last of its scenario."""
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Load:
    """Sets of models (name, kind, copies) and the loads on them; ``seconds`` with the warm-up.

    ``name``: of its results; ``title``: of its table.
    """

    name: str
    title: str
    models: Sequence[tuple[str, str, int]]
    loads: Sequence[Fields]
    seconds: float
    warmup_s: float = WARMUP_S
    memory_mib: float | None = None

    @property
    def text(self) -> str:
        """The scenario."""
        head = {"name": self.title, "seconds": self.seconds, "warmup_s": self.warmup_s}
        parts = [_table("", head)]
        if self.memory_mib is not None:
            parts.append(_table("[cluster]", {"memory_mib": self.memory_mib}))
        for name, kind, copies in self.models:
            parts.append(_table("[[models]]", {"name": name, "kind": kind, "copies": copies}))
        return "\n".join([*parts, *(_table("[[loads]]", one) for one in self.loads)])

    @property
    def kind(self) -> str:
        """Of all of its models."""
        (kind,) = {kind for _, kind, _ in self.models}
        return kind

    @property
    def slo_ms(self) -> float:
        """The shortest."""
        return float(min(one["slo_ms"] for one in self.loads))

    def model_names(self, *sets: str) -> list[str]:
        """Those of some sets, or all, as a scenario's copies are called."""
        wanted = [(name, copies) for name, _, copies in self.models if not sets or name in sets]
        return [each for name, copies in wanted for each in names(copies, name)]

    @property
    def comers(self) -> Fields | None:
        """The load of that name."""
        return next((one for one in self.loads if one["name"] == COMERS), None)

    def without_comers(self) -> Load:
        """The same without it."""
        return replace(self, loads=[one for one in self.loads if one["name"] != COMERS])


def _table(head: str, values: Fields) -> str:
    # JSON's strings, numbers and lists are TOML's.
    return "\n".join([head, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


def names(copies: int, of: str = "m") -> list[str]:
    """As a scenario's copies are called."""
    return [f"{of}-{number:04d}" for number in range(copies)] if copies > 1 else [of]


def poisson(models: Sequence[str], rate_rps: float, slo_ms: float, **more: Any) -> Fields:
    """One load by chance."""
    return {
        "name": "requests", "models": list(models), "arrivals": "poisson", "rate_rps": round(rate_rps, 3),
        "slo_ms": slo_ms, **more,
    }  # fmt: skip


def steady(
    kind: str, copies: int, rate_rps: float, *, seconds: float, warmup_s: float = WARMUP_S, **more: Any
) -> Load:
    """Copies of one kind, asked at one rate; ``seconds`` without the warm-up."""
    title = f"{copies} of {kind}, {rate_rps:.0f} r/s"
    loads = [poisson(["m"], rate_rps, SLO_MS[kind], **more)]
    return Load("steady", title, [("m", kind, copies)], loads, seconds + warmup_s, warmup_s)


# ------------------------------------------------------------
# Those that servers are compared under.


def shared_device(rate_rps: int, seconds: int, name: str = "gpu_15_models") -> Load:
    """At 60 r/s more than the device can do one by one: it asks for batches of the right model in time."""
    title = f"15 models on the emulated device, {rate_rps} r/s, SLO 200 ms"
    return Load(name, title, [("m", EMULATED, 15)], [poisson(["m"], rate_rps, 200)], seconds)


def _bursts(calm_rps: float, more_rps: float, slo_ms: float) -> list[Fields]:
    """So many more for one second of four, for 28 s."""
    bursts = (
        poisson(["m"], more_rps, slo_ms, name=f"burst at {at} s", start_s=at, stop_s=at + 1)
        for at in range(0, 28, 4)
    )
    return [poisson(["m"], calm_rps, slo_ms, name="base"), *bursts]


def _clients(slo_ms: float, retry: str) -> list[Fields]:
    """Fig 5 of the Clockwork paper: clients that ask again when they have an answer.

    After a refusal they wait as long as it says (``retry_after``; 1 ms if it does not), or 1 ms (``fixed``).
    """
    return [{
        "name": "clients", "models": ["m"], "arrivals": "closed", "concurrency": 16, "retry": retry,
        "retry_ms": 1, "slo_ms": slo_ms,
    }]  # fmt: skip


def _mobilenets(
    name: str, copies: int, words: str, loads: Iterable[Fields], *, seconds: float = 20, **more: Any
) -> Load:
    title = f"MobileNetV3-small, {words}, SLO 100 ms"
    return Load(name, title, [("m", MOBILENET, copies)], list(loads), seconds, **more)


LOADS: Final[dict[str, Load]] = {
    load.name: load
    for load in (
        # Half as much again as the device can do in batches of eight: which requests are served?
        Load("gpu_one", "One model on the emulated device, 250 r/s, SLO 200 ms", [("m", EMULATED, 1)],
             [poisson(["m"], 250, 200)], 20),
        shared_device(60, 24),
        # 36 r/s in the mean.
        Load("gpu_bursts", "15 models on the emulated device, 108 r/s for 1 s, 12 r/s for 3 s, SLO 200 ms",
             [("m", EMULATED, 15)], _bursts(12, 96, 200), 28),
        Load("gpu_closed", "15 models with 16 clients each on the emulated device, SLO 200 ms",
             [("m", EMULATED, 15)], _clients(200, "retry_after"), 24),
        # More than a core can do.
        _mobilenets("mobilenet_one", 1, "one model, 650 r/s", [poisson(["m"], 650, 100)]),
        # About what a core can do.
        _mobilenets("mobilenet_15_models", 15, "15 models, 400 r/s", [poisson(["m"], 400, 100)]),
        # 150 r/s in the mean.
        _mobilenets("mobilenet_bursts", 15, "15 models, 450 r/s for 1 s, 50 r/s for 3 s",
                    _bursts(50, 400, 100), seconds=28),
        _mobilenets("mobilenet_closed", 15, "15 models with 16 clients each that wait as told",
                    _clients(100, "retry_after")),
        _mobilenets("mobilenet_closed_hasty", 15,
                    "15 models with 16 clients each that ask again after 1 ms", _clients(100, "fixed")),
        # Hardly any load: what a request costs.
        _mobilenets("mobilenet_light", 15, "15 models, 20 r/s", [poisson(["m"], 20, 100)], seconds=24),
        # More models than memory.
        _mobilenets("mobilenet_100_zipf", 100, "100 models by Zipf's law, memory for 20, 100 r/s",
                    [poisson(["m"], 100, 100, popularity="zipf", zipf_s=0.9)], seconds=24,
                    memory_mib=MEMORY_MIB),
        # Servers that load what is asked for get 25 requests a second for the others in turn, the rest 25
        # calls to load.
        Load("mobilenet_comers", "MobileNetV3-small, one hot model at 100 r/s while 100 others come and go, "
             "25 loads/s, SLO 100 ms", [("hot", MOBILENET, 1), ("m", MOBILENET, 100)],
             [poisson(["hot"], 100, 100, name="hot"),
              poisson(["m"], 25, 100, name=COMERS, arrivals="fixed")], 24, memory_mib=MEMORY_MIB),
    )
}  # fmt: skip
