"""Who is served never, or at the cost of many others, although devices have time for it.

*Reserve*: gateways keep a part of each SLO, and the rest is shorter than a LOAD and an INFER. No LOAD saves a
request that is here, so one has to be sent for later requests. *Tight*: few requests whose SLO leaves time
for little else on the device, beside many relaxed ones that ask for more than it can do.
"""

from __future__ import annotations

from typing import Final

from msgspec import structs

from benchmarks.causes.cases import Case, Found, Given, calls, copies, simulated
from clockwork_serve.sim import Cluster, read_constants
from clockwork_serve.units import ms
from clockwork_serve.workload.scenario import LoadTable

KEPT_MS: Final = (0, 2, 4, 6, 8, 10, 12, 15, 20)
"""Of 45 ms, of which a LOAD (28.8 ms) and an INFER (8.2 ms) leave 8."""
SEEDS: Final = 10
SHORT_SEEDS: Final = 3
TIGHT: Final = structs.replace(calls(12, 9), name="tight")
RELAXED: Final = structs.replace(calls(1080, 250), name="relaxed")


def _reserve(given: Given) -> Found:
    """The least share in time, whatever gateways keep, once the first LOAD has ended."""
    made = copies("se_resnext101_64x4d", 1, given.seconds(30, 5), calls(15, 45))
    constants = read_constants()
    shares: dict[int, float] = {}
    for kept_ms in KEPT_MS:
        network = structs.replace(constants.network, reserve_ns=ms(kept_ms))
        played = simulated(made, Cluster(), given, constants=structs.replace(constants, network=network))
        shares[kept_ms] = played.in_time
    more = ", ".join(f"{kept_ms} ms {share:.3f}" for kept_ms, share in shares.items())
    return Found(min(shares.values()), more=more)


def _counts(given: Given, *loads: LoadTable) -> list[tuple[int, int]]:
    """By load: answers in time and requests, over all seeds."""
    totals = [(0, 0)] * len(loads)
    for seed in range(given.seed, given.seed + (SHORT_SEEDS if given.short else SEEDS)):
        made = copies("resnet50_v2", 6, given.seconds(10, 4), *loads)
        played = simulated(made, Cluster(), Given(seed, given.short))
        totals = [
            (ok + count.ok, asked + count.ended)
            for (ok, asked), count in zip(totals, played.tally.loads, strict=True)
        ]
    return totals


def _relaxed(given: Given) -> Found:
    """What relaxed requests have beside a tight client, as a share of what they have alone."""
    beside, alone = _counts(given, TIGHT, RELAXED)[1], _counts(given, RELAXED)[0]
    return Found(
        beside[0] / alone[0], more=f"{beside[0]} of {beside[1]} in time, alone {alone[0]} of {alone[1]}"
    )


def _tight(given: Given) -> Found:
    """The share of the tight client's requests that are in time."""
    met, asked = _counts(given, TIGHT, RELAXED)[0]
    return Found(met / asked, more=f"{met} of {asked}")


CASES: Final = (
    Case(
        "starved-reserve", "one model alone, SLO 45 ms, of which gateways keep 0 to 20 ms", asked=1.0,
        before=0.0, note="the least share in time of all that is kept", play=_reserve,
    ),
    Case(
        "starved-relaxed", "1,080 r/s at 250 ms beside 12 at 9 ms on one device", asked=0.97, before=0.541,
        note="a share of what they have alone", play=_relaxed,
    ),
    Case("starved-tight", "those at 9 ms", asked=0.05, before=0.001, play=_tight),
)  # fmt: skip
