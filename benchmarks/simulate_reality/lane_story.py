"""Reads profiles, executions and delays of one device from a server's journal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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
from clockwork_serve.telemetry.journal import Step


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
