"""Events and effects of the worker's brain that are not messages between processes.

Each ``Start``, ``Prepare`` or ``Retire`` occupies a lane until exactly one ``LaneDone``, ``Prepared`` or
``Retired`` follows.
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
    Status,
    Unload,
    WorkerJoined,
)


class LaneDone(Struct, frozen=True, kw_only=True):
    """A lane finished a :class:`Start`; the fields mean what they mean in a Result.

    An UNLOAD forgets its weights whatever its status.
    """

    action_id: int
    device: str
    lane: Lane
    status: Status
    started_ns: int
    ended_ns: int
    input_ns: int = 0
    run_ns: int = 0
    output_ns: int = 0
    outputs: tuple[bytes, ...] = ()
    message: str = ""
    once_ns: int = 0


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

    An UNLOAD with a negative ``action_id`` is the worker's own, and has no result for the controller.
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
    Load | Unload | Infer | CodeAdded | CodeRemoved | LaneDone | Prepared | Retired | ControllerLost
    | ControllerFound | RetainWeights | Stop
)  # fmt: skip
"""What a worker observes."""

WorkerEffect = Start | Prepare | Retire | Result | CodeReady | WorkerJoined  # what a worker decides
