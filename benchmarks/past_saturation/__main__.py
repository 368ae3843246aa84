"""More requests than the controller or its devices can process, over a gateway's link: the goodput left.

Real processes of a controller and emulated devices; HTTP and gRPC are left out, so that the controller is the
bottleneck (with few ``--devices`` these are). The rate is raised until less than 97 % is good three times.
Then the best rate, 1.5 and 3 times it are offered in turns; medians count, of the most that any run reached.
In each turn the last is offered once more without what a gateway refuses by the controller's summary.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import uvloop

from benchmarks.past_saturation.processes import Processes, processes
from benchmarks.past_saturation.requests import Accounting, Requests
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.units import ms
from harness.report import Outcome, finish, parser, percent, table

SLO_MS: Final = 100.0
FIRST_RPS, STEP, RATE_MAX = 4000.0, 1.25, 200_000.0
KEPT: Final = 0.97
TIMES: Final = (1.0, 1.5, 3.0)
LEAST: Final = 0.9
TRIES: Final = 3
REST_S: Final = 0.3


@dataclass(slots=True)
class Offered:
    """One rate, offered for a while."""

    rate_rps: float
    good_rps: float
    accounting: Accounting
    cores: tuple[float, float, float]
    """Used by the controller, the workers and the generator."""
    refuses: bool
    """Whether its gateway refused anything by the controller's summary."""


async def offer(
    requests: Requests, real: Processes, rng: np.random.Generator, rate: float, seconds: float
) -> Offered:
    """Offer it, and wait for the answers."""
    before, began = real.cpu_s(), time.monotonic()
    accounting = await requests.offer(rng, rate, seconds)
    took_s = time.monotonic() - began
    used = [(after - earlier) / took_s for earlier, after in zip(before, real.cpu_s(), strict=True)]
    await asyncio.sleep(REST_S)
    cores = used[0], used[1], used[2]
    return Offered(rate, accounting.good / seconds, accounting, cores, requests.refuses)


async def measure(devices: int, seconds: float, rounds: int, seed: int) -> list[Offered]:
    """All that was offered; the climb first."""
    rng = np.random.default_rng(seed)
    found: list[Offered] = []
    config = ControllerConfig(max_batch=8)
    async with processes(config, devices=devices, models=4 * devices, workers=1) as real:
        requests = Requests(real.socket, real.models, ms(SLO_MS))
        try:
            await requests.ready()
            await offer(requests, real, rng, 1000, 1.0)
            rate = FIRST_RPS
            tries = 0
            while rate < RATE_MAX and tries < TRIES:
                found.append(await offer(requests, real, rng, rate, seconds))
                tries += 1
                if found[-1].accounting.good >= KEPT * found[-1].accounting.offered:
                    rate, tries = rate * STEP, 0
            top = max(found, key=lambda one: one.good_rps).rate_rps
            for _ in range(rounds):
                found += [await offer(requests, real, rng, times * top, seconds) for times in TIMES]
                requests.refuses = False
                found.append(await offer(requests, real, rng, TIMES[-1] * top, seconds))
                requests.refuses = True
        finally:
            await requests.close()
    return found


def conclude(outcome: Outcome, found: list[Offered], rounds: int) -> None:
    """The promise for each multiple."""
    each = len(TIMES) + 1
    turns = found[len(found) - rounds * each :]
    *medians, without = [statistics.median([one.good_rps for one in turns[at::each]]) for at in range(each)]
    best = max(one.good_rps for one in found if one.refuses)
    for times, good_rps in zip(TIMES, medians, strict=True):
        outcome.judge(
            f"goodput at {times:g} times the rate of the best", asked=f">= {LEAST:.0%} of {best:,.0f}/s",
            found=f"{good_rps:,.0f}/s, {percent(good_rps, best)}", good=good_rps >= LEAST * best,
        )  # fmt: skip
    outcome.figures = {
        "best_rps": best, "medians_rps": dict(zip(TIMES, medians, strict=True)), "without_rps": without,
        "offered": [(one.rate_rps, one.good_rps, one.cores, one.refuses) for one in found],
    }  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--devices", type=int, default=32)
    options.add_argument("--seconds", type=float, default=3.0, help="of each rate")
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    found = uvloop.run(measure(given.devices, given.seconds, given.rounds, given.seed))
    rows = [
        (f"{one.rate_rps:,.0f}", "yes" if one.refuses else "no", f"{one.good_rps:,.0f}", one.accounting.late,
         one.accounting.rejected, one.accounting.by_summary, *(f"{share:.2f}" for share in one.cores))
        for one in found
    ]  # fmt: skip
    heads = "offered/s", "gateway refuses", "good/s", "late", "refused", "by summary", "controller"
    print(table((*heads, "workers", "generator"), rows))
    outcome = Outcome("benchmarks.past_saturation")
    conclude(outcome, found, given.rounds)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
