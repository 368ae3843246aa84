"""Estimates that would stay too high for ever, because of what is past.

A device that stopped for a moment, or was slow, leaves durations that no deadline allows. So nothing runs
there any more, nothing is measured, and it would be believed slow without end. What is in a request's way,
and was not measured for a while, is doubted, so that the next ones are tried: longer durations than it allows
are forgotten where the usual one is none of them; where it is one, the profile is believed until something is
measured.

It never touches an estimate that is in nobody's way: of what is asked for once in a while, the tail counts.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.delays import LASTS_NS
from clockwork_serve.controller.estimator import Samples

RARELY: Final = 5
"""After a trial in vain the next one waits so many times as long as it would take: it costs others a lane."""


def forget_strays(samples: Samples, allowed_ns: int, now_ns: int, *, at_once: bool = False) -> bool:
    """A request may take ``allowed_ns`` at most: forget what alone is in its way, if it is old; whether so.

    ``at_once``: it need not be old, unless it was forgotten in vain before.
    """
    if samples.estimate_ns <= allowed_ns or samples.median_ns > allowed_ns:
        return False
    if not (at_once and not samples.in_vain) and not _is_old(samples, now_ns):
        return False
    samples.forget_above(allowed_ns)
    return True


def doubt(samples: Samples, allowed_ns: int, now_ns: int) -> None:
    """A request was refused that may take ``allowed_ns`` at most: if need be, have the next one tried."""
    if (
        samples.seed_ns <= allowed_ns < samples.estimate_ns
        and not forget_strays(samples, allowed_ns, now_ns)
        and _is_old(samples, now_ns)
    ):
        samples.restart(allowed_ns)


def _is_old(samples: Samples, now_ns: int) -> bool:
    wait_ns = max(LASTS_NS, RARELY * samples.estimate_ns) if samples.in_vain else LASTS_NS
    return now_ns >= samples.measured_ns + wait_ns
