"""What the headline figure is made of: servers, models, rates and the load; nothing here measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from comparison.peers.loads import Load, poisson
from comparison.peers.peer import Peer
from comparison.peers.servers import PEERS, FastApiBounded

KIND: Final = "mobilenet_v2"
MODELS: Final = 12
SLO_MS: Final = 200.0
SERVERS: Final[dict[str, Peer]] = {
    "clockwork": PEERS["clockwork"], "fastapi": FastApiBounded(), "triton": PEERS["triton"],
}  # fmt: skip
INSTALLED_AS: Final = {"fastapi": "fastapi_ort", "triton": "triton"}
"""By server, the peer in whose Python it runs."""
NAMES: Final = {
    "clockwork": "Clockwork Serve", "fastapi": "FastAPI with ONNX Runtime", "triton": "Triton"
}  # fmt: skip
SHORT_NAMES: Final = {"clockwork": "Clockwork Serve", "fastapi": "FastAPI + ORT", "triton": "Triton"}


@dataclass(frozen=True, slots=True)
class Plan:
    """``shares``: the rates, as shares of what one core does with bare ONNX Runtime, image after image.

    ``again``: how often a disturbed run is measured again, and how often in all.
    """

    shares: tuple[float, ...] = (0.5, 0.9, 1.2, 2.0)
    repeats: int = 3
    seconds: float = 10.0
    warmup_s: float = 2.0
    again: int = 2
    again_in_all: int = 9
    patience_s: float = 5.0
    """How long a run waits for the machine to be left alone; beyond that it is measured all the same."""


STANDARD: Final = Plan()
SHORT: Final = Plan(
    shares=(0.5, 2.0), repeats=1, seconds=5.0, warmup_s=1.0, again=0, again_in_all=0, patience_s=1.0
)


def rate_rps(share: float, image_ms: float) -> float:
    """A share of what one core does."""
    return share * 1e3 / image_ms


def load(plan: Plan, share: float, image_ms: float) -> Load:
    """Requests by chance for all models alike; the seed of a run is its repeat's number."""
    rate = rate_rps(share, image_ms)
    title = f"{MODELS} MobileNets, {rate:.0f} r/s, SLO {SLO_MS:.0f} ms"
    asked = [poisson(["m"], rate, SLO_MS)]
    return Load(f"headline_{share:g}", title, [("m", KIND, MODELS)], asked, plan.seconds, plan.warmup_s)
