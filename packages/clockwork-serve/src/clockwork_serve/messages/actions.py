"""Actions, which the controller sends and a worker executes inside their windows or refuses; and results."""

from __future__ import annotations

import enum

from msgspec import Struct

from clockwork_serve.messages.records import Weights


class Lane(enum.StrEnum):
    """A lane of a device, which executes one action at a time."""

    LOAD = "load"
    EXEC = "exec"


class Status(enum.StrEnum):
    """How an action ended."""

    OK = "ok"
    TOO_EARLY = "too_early"  # reached its lane before its window and could not wait
    TOO_LATE = "too_late"  # its window had closed when its lane was free
    UNKNOWN_CODE = "unknown_code"  # the code is not prepared on that device
    UNKNOWN_DEVICE = "unknown_device"
    WEIGHTS_MISSING = "weights_missing"  # the extent holds no weights of that version
    WEIGHTS_CHANGED = "weights_changed"  # the weights changed while the INFER ran; its outputs were dropped
    NO_ROOM = "no_room"  # the controller did not make room: extent, workspace or I/O area
    IN_USE = "in_use"  # the extent is being read or written by another action
    BAD_ACTION = "bad_action"  # the action contradicts itself or the device
    INPUT_GONE = "input_gone"
    """The request's tensors are no longer there: their gateway died or released them."""
    MODEL_RAISED = "model_raised"  # the model itself failed on these inputs
    DEVICE_FAULT = "device_fault"
    DAMAGED = "damaged"  # there is no file of the weights that matches their hash; nothing was loaded
    SHUTTING_DOWN = "shutting_down"


class Window(Struct, frozen=True, array_like=True):
    """When an action may start: ``earliest_ns <= start <= latest_ns``, on the controller's axis."""

    earliest_ns: int
    latest_ns: int


class Extent(Struct, frozen=True, array_like=True):
    """``count`` contiguous pages of a device, from page ``first``."""

    first: int
    count: int

    def overlaps(self, other: Extent) -> bool:
        """Whether the two share a page."""
        return self.first < other.first + other.count and other.first < self.first + self.count


class Load(Struct, frozen=True, kw_only=True, array_like=True, tag="load"):
    """Copy weights into an extent; once the result is OK they are resident as ``version``."""

    action_id: int
    device: str
    model: str
    code_id: str
    weights: Weights
    extent: Extent
    version: int
    window: Window
    expected_ns: int


class Unload(Struct, frozen=True, kw_only=True, array_like=True, tag="unload"):
    """Remove the weights in an extent."""

    action_id: int
    device: str
    model: str
    extent: Extent
    version: int
    window: Window


class Call(Struct, frozen=True, kw_only=True, array_like=True):
    """One request inside an INFER.

    ``rows`` is its own batch dimension (1 if the code is not batched). ``tensors`` is an encoded
    :class:`~clockwork_serve.messages.requests.Tensors`, opaque to the controller.
    """

    request_id: str
    rows: int
    tensors: bytes


class Infer(Struct, frozen=True, kw_only=True, array_like=True, tag="infer"):
    """Run ``calls`` as one batch, by what was compiled for ``batch`` rows.

    They may have fewer rows: a batch of fixed shape repeats the last one, Python models get what there is.
    ``signature`` is that of the requests: each has durations of its own.
    """

    action_id: int
    device: str
    model: str
    code_id: str
    extent: Extent
    version: int
    batch: int
    calls: tuple[Call, ...]
    window: Window
    expected_ns: int
    signature: str = ""


Action = Load | Unload | Infer


class Held(Struct, frozen=True, array_like=True):
    """What a device holds just after it refused an action, so that the controller's belief can be corrected.

    ``versions`` are those of all weights that are loading or ready and not about to go. ``unprepared`` are
    the codes, of those added, that cannot run there now.
    """

    versions: tuple[int, ...] = ()
    unprepared: tuple[str, ...] = ()


class Result(Struct, frozen=True, kw_only=True, array_like=True, tag="result"):
    """The one result of an action.

    ``started_ns`` and ``ended_ns`` bound the time on the lane (equal, at the instant of refusal, if it never
    started). ``input_ns + run_ns + output_ns`` is that time by phase, for an INFER. ``outputs`` has one
    encoded :class:`~clockwork_serve.messages.requests.Tensors` per call if OK; else ``message`` says why not.
    ``once_ns`` of the time was spent on work that the next action of the kind does not repeat, such as
    verifying a file. ``transfer_in_ns`` and ``transfer_out_ns``: how long it took over a network until inputs
    were there, without waiting for those before them, and after its end; 0 on one host. ``held`` is in the
    last of a device's results, of those that are not OK, that a worker sends at one instant.
    """

    action_id: int
    device: str
    status: Status
    started_ns: int
    ended_ns: int
    input_ns: int = 0
    run_ns: int = 0
    output_ns: int = 0
    outputs: tuple[bytes, ...] = ()
    message: str = ""
    once_ns: int = 0
    transfer_in_ns: int = 0
    transfer_out_ns: int = 0
    held: Held | None = None

    @property
    def lane_ns(self) -> int:
        """How long the lane was occupied, in ns."""
        return self.ended_ns - self.started_ns
