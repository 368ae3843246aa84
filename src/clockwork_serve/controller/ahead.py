"""The work that goes first: what those take who wait for the same device and are due before.

A lane is given work for a moment only, so when it is free says little about an overload; the queues do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from clockwork_serve.controller.codes import Batch
from clockwork_serve.controller.plan import Plan

LOOKED_AT_MAX: Final = 64
"""Of the queues that wait for a device, so many are looked at; what the others take is not counted."""


def ahead_ns(plan: Plan, urgency: int, due_ns: int, enough_ns: int) -> int:
    """What those who are due by then, and in no less urgent class, take of a lane at least.

    More than ``enough_ns`` is enough to know.
    """
    total_ns = 0
    cost_by_code: dict[int, int] = {}
    for key_ns, _, strategy in plan.heap[:LOOKED_AT_MAX]:
        if strategy.key_ns != key_ns:
            continue
        queue, batches = strategy.queue, strategy.batches
        if queue.level > urgency:
            continue
        count = bisect_right(queue.dues, due_ns)
        if count:
            cost_ns = cost_by_code.get(id(batches))  # of one object for all models of a code
            if cost_ns is None:
                cost_ns = cost_by_code[id(batches)] = usual_cost_ns(batches)
            total_ns += count * cost_ns // len(queue.strategies)
            if total_ns > enough_ns:
                break
    return total_ns


def usual_cost_ns(batches: Sequence[Batch]) -> int:
    """What a request usually takes of a lane in the largest batch, which uses it best."""
    largest = batches[-1]
    return largest.samples.median_ns // largest.count
