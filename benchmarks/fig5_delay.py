"""Fig 5 of the Clockwork paper at an SLO of 10 ms, with other delays between controller and worker.

python -m benchmarks.fig5_delay                        the simulator's 75 us, and 600 us: about five minutes
python -m benchmarks.fig5_delay --delays-us 75,150,300

At 10 ms goodput depends on the network. This shows how much for each policy of the figure, on virtual time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import structs

from clockwork_lab.reproduce import fig5
from clockwork_lab.reproduce.players import players
from clockwork_lab.reproduce.run import FigureRun, provenance
from clockwork_serve.units import NS_PER_US, ms
from harness.report import table

SLO_MS: Final = 10.0
DELAYS_US: Final = (75, 600)


def goodput_rps(delay_us: int, seed: int, *, seconds: float = fig5.SECONDS) -> dict[str, float]:
    """By policy: goodput at 10 ms with this one-way delay to the worker; all else as in the figure."""
    run = FigureRun(seed=seed)
    network = structs.replace(run.constants.network, worker_ns=delay_us * NS_PER_US)
    run.constants = structs.replace(run.constants, network=network)
    found = run.compare(players(), {SLO_MS: fig5.scenario(SLO_MS, seconds)}, devices=1)
    return {name: tally.goodput_rps(0, ms(seconds * 1e3)) for (name, _), tally in found.items()}


def _delays(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Simulate and print; the exit status."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--delays-us", type=_delays, default=DELAYS_US, metavar="US,US")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    given = made.parse_args()
    found = {delay: goodput_rps(delay, given.seed) for delay in given.delays_us}
    print(f"Fig 5, SLO {SLO_MS:g} ms, seed {given.seed}: goodput in r/s by one-way delay to the worker\n")
    head = ["policy", *(f"{delay} us" for delay in found)]
    names = [player.name for player in players()]
    print(table(head, [[name, *(f"{by_name[name]:.1f}" for by_name in found.values())] for name in names]))
    if given.json is not None:
        record = {"slo_ms": SLO_MS, "seed": given.seed, "goodput_rps": found, **provenance()}
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
