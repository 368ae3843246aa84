"""How well actions were predicted, from a journal of the controller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from msgspec import Struct, field

from clockwork_serve.controller.cluster import LaneBelief
from clockwork_serve.messages import Infer, Load, Result, Status
from clockwork_serve.telemetry.journal import Step
from clockwork_serve.units import NS_PER_MS

PERCENTILES: Final = (99.0, 99.9, 99.99, 99.999, 100.0)


class Errors(Struct):
    """Actions of one kind, in ns: errors (measured minus predicted) of duration and end, and the duration."""

    duration_ns: list[int] = field(default_factory=list)
    completion_ns: list[int] = field(default_factory=list)
    took_ns: list[int] = field(default_factory=list)

    def shares(self) -> list[float]:
        """Errors of the duration as a share of it."""
        return [error / max(1, took) for error, took in zip(self.duration_ns, self.took_ns, strict=True)]


class Pending(Struct, frozen=True):
    """An action in flight."""

    action: Infer | Load
    ends_ns: int


def errors_of(steps: Iterable[Step], network_ns: int) -> dict[str, Errors]:
    """Errors by kind, ``INFER`` and ``LOAD``, of all actions that were done.

    The predicted end of an action is that of the controller's own belief about its lane, reconstructed from
    the journal; ``network_ns`` is the network delay that it was configured with.
    """
    found = {"INFER": Errors(), "LOAD": Errors()}
    lanes: dict[tuple[str, str], LaneBelief] = {}
    pending: dict[int, Pending] = {}
    for step in steps:
        for event in step.events:
            if isinstance(event, Result) and (sent := pending.pop(event.action_id, None)) is not None:
                kind = _kind(sent.action)
                lanes[sent.action.device, kind].end(event.action_id, event.ended_ns)
                if event.status is Status.OK:
                    _add(found[kind], sent, event)
        for effect in step.effects:
            if isinstance(effect, Infer | Load):
                lane = lanes.setdefault((effect.device, _kind(effect)), LaneBelief(network_ns))
                ends_ns = lane.available_ns(step.now_ns) + effect.expected_ns
                lane.send(effect.action_id, effect.expected_ns, step.now_ns)
                pending[effect.action_id] = Pending(effect, ends_ns)
    return found


def _kind(action: Infer | Load) -> str:
    return "INFER" if isinstance(action, Infer) else "LOAD"


def _add(errors: Errors, sent: Pending, result: Result) -> None:
    errors.duration_ns.append(result.lane_ns - sent.action.expected_ns)
    errors.completion_ns.append(result.ended_ns - sent.ends_ns)
    errors.took_ns.append(result.lane_ns)


def tail(errors: Iterable[float], *, over: bool, unit: float = NS_PER_MS) -> list[tuple[float, float]]:
    """(percentile, error) of over- or under-prediction, over all actions; those of the other sign count as 0.

    ``over``: predicted longer than measured. Percentiles for which there are too few actions are left out.
    """
    values = np.array(list(errors), dtype=float)
    if not values.size:
        return []
    signed = np.maximum(0.0, -values if over else values) / unit
    return [
        (share, float(np.percentile(signed, share)))
        for share in PERCENTILES
        if share == max(PERCENTILES) or values.size * (1 - share / 100) >= 1
    ]
