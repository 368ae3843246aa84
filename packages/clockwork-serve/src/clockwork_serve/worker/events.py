"""Events and effects of the worker's brain that are not messages between processes.

Each ``Start``, ``Prepare`` or ``Retire`` occupies a lane until exactly one ``Result``, ``Prepared`` or
``Retired`` follows from it.
"""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.messages import (
    Action,
    Code,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    Infer,
    Lane,
    Load,
    Result,
    RetainWeights,
    Unload,
    WorkerJoined,
)


class Prepared(Struct, frozen=True, kw_only=True):
    """The load lane finished a :class:`Prepare`; ``message`` says why it failed."""

    device: str
    code_id: str
    ok: bool = True
    message: str = ""


class Retired(Struct, frozen=True, kw_only=True):
    """The load lane finished a :class:`Retire`."""

    device: str
    code_id: str


class ControllerLost(Struct, frozen=True, kw_only=True):
    """The link to the controller ended.

    Queued actions are refused (no controller observes it), running ones continue; codes and weights stay.
    """


class ControllerFound(Struct, frozen=True, kw_only=True):
    """A link to a controller, perhaps a new one: send WorkerJoined. ``worker`` is this worker's name."""

    worker: str


class Stop(Struct, frozen=True, kw_only=True):
    """Refuse queued and future actions; finish running ones."""


class Start(Struct, frozen=True, kw_only=True):
    """Execute an action on its lane, now.

    The lane's Result goes on to the controller, but as WEIGHTS_CHANGED if they did while it ran. An UNLOAD
    forgets its weights whatever its status; one with a negative ``action_id`` is the worker's own, and the
    controller hears nothing of it.
    """

    device: str
    lane: Lane
    action: Action


class Prepare(Struct, frozen=True, kw_only=True):
    """Make a code ready to run, on the load lane."""

    device: str
    code: Code


class Retire(Struct, frozen=True, kw_only=True):
    """Free a code that nothing uses any more, on the load lane."""

    device: str
    code_id: str


WorkerEvent = (
    Load | Unload | Infer | CodeAdded | CodeRemoved | Result | Prepared | Retired | ControllerLost
    | ControllerFound | RetainWeights | Stop
)  # fmt: skip
"""What a worker observes."""

WorkerEffect = Start | Prepare | Retire | Result | CodeReady | WorkerJoined  # what a worker decides
