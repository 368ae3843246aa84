"""The worker's brain: starts each action inside its window or refuses it with a reason; does no I/O."""

from __future__ import annotations

from clockwork_serve.worker.events import (
    ControllerFound,
    ControllerLost,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Start,
    Stop,
    WorkerEffect,
    WorkerEvent,
)
from clockwork_serve.worker.worker import Worker

__all__ = [
    "ControllerFound", "ControllerLost", "Prepare", "Prepared", "Retire", "Retired", "Start",
    "Stop", "Worker", "WorkerEffect", "WorkerEvent",
]  # fmt: skip
