"""Lets a simulation run while somebody watches and may stop it. It changes nothing of its course."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct

from clockwork_serve.errors import ClockworkError
from clockwork_serve.sim import Simulation, Tally
from clockwork_serve.units import NS_PER_S

Tell = Callable[[float, float], None]
"""Told (simulated seconds, seconds that it took)."""


class CheckFailed(ClockworkError):
    """The machines contradicted themselves or one another; the message says when and how."""


class Played(Struct, frozen=True, kw_only=True):
    """How far a run came: the axis' time in ns, the seconds it took, and whether it was stopped early.

    ``faults`` counts those that hit something, by kind.
    """

    tally: Tally
    reached_ns: int
    took_s: float
    cut: bool
    faults: dict[str, int]


class _Stopped(Exception):
    """Somebody wants no more of it."""


def play(
    simulation: Simulation,
    *,
    tell: Tell = lambda simulated_s, took_s: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Played:
    """Run to the end, or until ``stopped()``, which is asked now and then.

    Raises :class:`CheckFailed` when a machine contradicts itself.
    """
    began = time.monotonic()

    def pulse(now_ns: int) -> None:
        tell(now_ns / NS_PER_S, time.monotonic() - began)
        if stopped():
            raise _Stopped

    cut = False
    try:
        simulation.run(pulse=pulse)
    except _Stopped:
        cut = True
    except AssertionError as error:
        raise CheckFailed(
            f"a machine contradicts itself at {simulation.now_ns / NS_PER_S:.9f} s: {error!r}"
        ) from error
    faults = simulation.faults
    return Played(
        tally=simulation.tally,
        reached_ns=simulation.now_ns,
        took_s=time.monotonic() - began,
        cut=cut,
        faults={} if faults is None else dict(sorted(faults.executed.items())),
    )
