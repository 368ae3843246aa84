"""The simulated world's numbers as one real server has them, from its journal; it tunes nothing later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from msgspec import structs

from clockwork_serve.messages import (
    Answer,
    CodeAdded,
    DeviceSpec,
    Infer,
    Model,
    ModelAdded,
    Profile,
    Request,
    Result,
    Status,
    WorkerJoined,
)
from clockwork_serve.sim import Constants, read_constants
from clockwork_serve.sim.constants import Network, Noise, Quantiles
from clockwork_serve.telemetry.journal import Step
from clockwork_serve.units import NS_PER_MS, NS_PER_US
from harness.http_load import Sample, header_of
from harness.report import quantile

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
ENOUGH = 20
"""Executions of one code and batch size whose median is believed."""
AT_ONCE_NS = 500_000
"""An INFER sent that long before the one before it ends is with the worker by then."""


# What a journal says of one device


@dataclass(slots=True)
class Execution:
    """One INFER that ran; instants of the controller's clock, but for its start and end: the worker's."""

    code: str
    batch: int
    sent_ns: int
    earliest_ns: int
    started_ns: int
    ended_ns: int
    heard_ns: int
    alone: bool
    """No other INFER was out when it was sent."""

    @property
    def lane_ns(self) -> int:
        """How long it took the lane."""
        return self.ended_ns - self.started_ns


@dataclass(slots=True)
class Story:
    """All of it, in order of time."""

    profiles: dict[str, Profile] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    devices: list[DeviceSpec] = field(default_factory=list)
    heard_ns: dict[str, int] = field(default_factory=dict)
    """By request: when the controller heard of it."""
    answered_ns: dict[str, int] = field(default_factory=dict)
    """By request: when the controller answered it."""
    executions: list[Execution] = field(default_factory=list)

    def between(self, from_ns: int, to_ns: int) -> list[Execution]:
        """The executions that were sent within that time."""
        return [one for one in self.executions if from_ns <= one.sent_ns < to_ns]


def story_of(steps: Iterable[Step]) -> Story:
    """Read a journal."""
    story = Story()
    out: dict[int, tuple[Infer, int, bool]] = {}
    for step in steps:
        for event in step.events:
            _hear(story, event, step.now_ns, out)
        for effect in step.effects:
            if isinstance(effect, Infer):
                out[effect.action_id] = (effect, step.now_ns, not out)
            elif isinstance(effect, Answer):
                story.answered_ns[effect.request_id] = step.now_ns
    return story


def _hear(story: Story, event: object, now_ns: int, out: dict[int, tuple[Infer, int, bool]]) -> None:
    if isinstance(event, Request):
        story.heard_ns[event.request_id] = now_ns
    elif isinstance(event, CodeAdded):
        for profile in event.profiles:
            story.profiles[profile.code_id] = profile
    elif isinstance(event, ModelAdded):
        story.models[event.model.name] = event.model
    elif isinstance(event, WorkerJoined):
        story.devices.extend(event.devices)
    elif isinstance(event, Result) and event.action_id in out:
        infer, sent_ns, alone = out.pop(event.action_id)
        if event.status is Status.OK:
            story.executions.append(
                Execution(
                    infer.code_id, infer.batch, sent_ns, infer.window.earliest_ns, event.started_ns,
                    event.ended_ns, now_ns, alone,
                )
            )  # fmt: skip


# What a simulation is given of it


@dataclass(slots=True)
class Delays:
    """How long things took outside the lane, in ns: each a list of all that were seen."""

    up: list[int]
    """Sent by the client to heard by the controller."""
    down: list[int]
    """Answered by the controller to heard by the client."""
    there: list[int]
    """Sent to an idle worker to started."""
    back: list[int]
    """Ended on the lane to heard by the controller."""
    turn: list[int]
    """Ended on the lane to the start of the next, where that was waiting."""

    @staticmethod
    def together(several: Iterable[Delays]) -> Delays:
        """Those of several runs as one."""
        found = Delays([], [], [], [], [])
        for one in several:
            found.up += one.up
            found.down += one.down
            found.there += one.there
            found.back += one.back
            found.turn += one.turn
        return found


def delays_of(samples: Iterable[Sample], story: Story, executions: Sequence[Execution]) -> Delays:
    """Delays of one run."""
    up, down = [], []
    for sample in samples:
        name = header_of(sample, "clockwork-request-id")
        if sample.status == 200 and name in story.heard_ns and name in story.answered_ns:
            up.append(story.heard_ns[name] - sample.sent_ns)
            down.append(sample.done_ns - story.answered_ns[name])
    ordered = sorted(executions, key=lambda one: one.started_ns)
    return Delays(
        up=up,
        down=down,
        there=[one.started_ns - max(one.sent_ns, one.earliest_ns) for one in ordered if one.alone],
        back=[one.heard_ns - one.ended_ns for one in ordered],
        turn=[
            after.started_ns - before.ended_ns
            for before, after in pairwise(ordered)
            if max(after.sent_ns, after.earliest_ns) < before.ended_ns - AT_ONCE_NS
        ],
    )


@dataclass(slots=True)
class Calibration:
    """What a simulation is given: durations by code and batch in ns, constants, and where they came from."""

    infer_ns: dict[str, dict[int, int]]
    constants: Constants
    slowness: dict[str, float]
    """By code: the median duration under load over the profile's."""
    turn_ns: int


def calibrate(
    profiles: Mapping[str, Profile], delays: Delays, executions: Sequence[Execution]
) -> Calibration:
    """From runs at moderate load.

    A duration is the median of its kind (code and batch size), or, where too few were seen, the profile's
    times the slowness of its code under load (median over its executions); plus the mean time that a lane
    takes from one action to the next, which the simulated lane has not. Noise is what executions differ from
    the median of their kind.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for one in executions:
        groups[one.code, one.batch].append(one.lane_ns)
    slowness = {
        code: median(
            [one.lane_ns / profile.infer_ns[one.batch] for one in executions if one.code == code] or [1.0]
        )
        for code, profile in profiles.items()
    }
    turn_ns = round(mean(delays.turn)) if delays.turn else 0
    usual_ns = {kind: median(lanes_ns) for kind, lanes_ns in groups.items() if len(lanes_ns) >= ENOUGH}
    off = [lane_ns - kind_ns for kind, kind_ns in usual_ns.items() for lane_ns in groups[kind]]
    usual = read_constants()
    return Calibration(
        infer_ns={
            code: {
                batch: round(usual_ns.get((code, batch), lane_ns * slowness[code])) + turn_ns
                for batch, lane_ns in profile.infer_ns.items()
            }
            for code, profile in profiles.items()
        },
        constants=structs.replace(
            usual,
            network=_network(delays),
            noise=Noise(
                infer_us=_quantiles_us(off) if off else usual.noise.infer_us, load_us=usual.noise.load_us
            ),
        ),
        slowness=slowness,
        turn_ns=turn_ns,
    )


def _network(delays: Delays) -> Network:
    """The fixed part of a hop is its 10th percentile; the jitter, which is even, has the median right."""
    least_ns = (quantile(delays.there, 0.1) + quantile(delays.back, 0.1)) / 2
    usual_ns = (quantile(delays.there, 0.5) + quantile(delays.back, 0.5)) / 2
    return Network(
        gateway_ns=round((quantile(delays.up, 0.5) + quantile(delays.down, 0.5)) / 2),
        worker_ns=round(least_ns),
        jitter_ns=round(2 * (usual_ns - least_ns)),
    )


def _quantiles_us(values_ns: Sequence[float]) -> Quantiles:
    return tuple((share, round(quantile(values_ns, share) / NS_PER_US, 1)) for share in SHARES)


def truth_of(story: Story, found: Calibration) -> dict[str, Profile]:
    """How long things take under load, by model: a zoo's kinds are called by the models."""
    return {
        name: structs.replace(
            story.profiles[model.code_id], code_id=name, infer_ns=dict(found.infer_ns[model.code_id])
        )
        for name, model in story.models.items()
    }


def write_zoo(file: Path, models: Mapping[str, Model], profiles: Mapping[str, Profile]) -> None:
    """A table of models for ``clockwork simulate --zoo``: what the server measured before it served."""
    batches = sorted({batch for model in models.values() for batch in model.batch_sizes})
    lines = [",".join(["model", "weights_mb", "load_ms", *(f"infer_b{batch}_ms" for batch in batches)])]
    for name, model in sorted(models.items()):
        profile = profiles[model.code_id]
        curve = profile.infer_ns
        cells = [f"{curve[batch] / NS_PER_MS:.6f}" if batch in model.batch_sizes else "" for batch in batches]
        load_ns = profile.load_ns(model.weights.size)
        lines.append(
            ",".join([name, f"{model.weights.size / 1e6:.6f}", f"{load_ns / NS_PER_MS:.6f}", *cells])
        )
    file.write_text("\n".join(lines) + "\n")
