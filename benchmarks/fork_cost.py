"""What it costs to fork the controller, and to save and restore it: 1,000 models that all are on devices.

The controller is that of ``benchmarks.scheduler_cost`` after some seconds of its traffic, on three devices
with room for all models. Asked is the time of one fork, with the garbage collector off, as in a server.
Times are of this thread's CPU; the least of some is judged, for on a shared machine others spoil caches.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from benchmarks.scheduler_cost import Bench
from clockwork_serve.controller import Controller, belief
from harness.report import Outcome, finish, parser, table

DEVICES: Final = 3
MODELS: Final = 1000
LOAD: Final = 0.6
"""Of the rate of ``scheduler_cost``, which is more than its devices can serve of so many models."""
LIMIT_MS: Final = 5.0
"""Of a fork of so many models."""

WHAT: Final[dict[str, Callable[[Controller], Any]]] = {
    "fork": lambda controller: controller.fork(),
    "save": lambda controller: controller.save(),
    "save, restore": lambda controller: Controller.restore(controller.save()),
}


def least_ms(what: Callable[[Controller], Any], controller: Controller, runs: int) -> float:
    """The CPU time of the fastest run."""
    spent_ns = []
    for _ in range(runs):
        gc.collect()
        before_ns = time.thread_time_ns()
        made = what(controller)
        spent_ns.append(time.thread_time_ns() - before_ns)
        del made
    return min(spent_ns) / 1e6


def busy_controller(devices: int, models: int, seed: int) -> Controller:
    """A controller in the midst of its work; the weights of all models are on some device."""
    bench = Bench(devices, models, "default", seed, slots=models)
    bench.traffic(3 * models, timed=False)
    bench.place_all()
    bench.rate_ns *= LOAD
    bench.traffic(3 * models, timed=False, settle=False)
    return bench.controller


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=MODELS)
    options.add_argument("--devices", type=int, default=DEVICES)
    options.add_argument("--runs", type=int, default=25)
    given = options.parse_args()
    outcome = Outcome("benchmarks.fork_cost")
    if not belief.__file__.endswith(".py"):
        outcome.invalid = "the brains are compiled by mypyc, and such are not copied"
        return finish(outcome, given.json)
    controller = busy_controller(given.devices, given.models, given.seed)
    gc.collect()
    gc.freeze()
    gc.disable()
    found = {name: least_ms(what, controller, given.runs) for name, what in WHAT.items()}
    outcome.figures |= {
        "models": given.models, "devices": given.devices, "saved_bytes": len(controller.save()), "ms": found,
    }  # fmt: skip
    print(f"  Python {sys.version.split()[0]}; brains: pure Python\n")
    rows = [(name, f"{ms:.2f}", f"{ms / given.models * 1e3:.2f}") for name, ms in found.items()]
    print(table(("of the controller", "ms", "us a model"), rows))
    limit_ms = LIMIT_MS * given.models / MODELS
    outcome.at_most(f"fork of {given.models} models", limit_ms, found["fork"], "ms")
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
