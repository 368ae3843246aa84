"""Requests and responses as descriptors: the tensors stay in the gateway's shared memory."""

from __future__ import annotations

import enum
from typing import Final

from msgspec import Struct


class Outcome(enum.StrEnum):
    """How a request ended; exactly one per request."""

    OK = "ok"
    REJECTED = "rejected"
    EXPIRED = "expired"  # no response by the deadline (one that was finished after it is also counted late)
    CANCELLED = "cancelled"
    FAILED = "failed"
    INVALID = "invalid"


class Reason(enum.StrEnum):
    """Why an outcome is not OK."""

    NONE = ""
    WOULD_MISS_DEADLINE = "would_miss_deadline"
    QUEUE_FULL = "queue_full"
    TENANT_QUOTA = "tenant_quota"
    DRAINING = "draining"
    NOT_SERVING = "not_serving"  # no worker can serve it now
    UNKNOWN_MODEL = "unknown_model"
    BAD_INPUT = "bad_input"
    MODEL_RAISED = "model_raised"
    DEVICE_FAULT = "device_fault"
    WORKER_LOST = "worker_lost"
    UNSERVABLE = "unservable"  # no device that has joined has the memory, or the backend, for it
    QUARANTINED = "quarantined"  # the model is in quarantine: it took devices down
    LATE = "late"  # a device had it, and had not answered by the deadline
    PROMISE_BROKEN = "promise_broken"
    """It was promised in time, and cannot be any more: :class:`Cause` says why."""


class Cause(enum.StrEnum):
    """Why a promise was broken: what happened after it was made."""

    NONE = ""  # it was kept, or none was made
    CONTROLLER_LOST = "controller_lost"
    """The controller that could have given it was lost, and the next one had no place for it."""
    DEVICE_LOST = "device_lost"  # the device that it was planned on was lost, or lost the model's weights
    DEVICE_STALLED = "device_stalled"  # the device did not move
    DEVICE_SLOWED = "device_slowed"  # an inference or a LOAD took longer than was planned for it
    OUTRANKED = "outranked"  # a more urgent class needed its time
    MODEL_REMOVED = "model_removed"
    MODEL_FAILED = "model_failed"  # the model raised an error, or is in quarantine
    DELIVERY_LATE = "delivery_late"  # the answer was in time, and its gateway gave it to the client too late
    UNEXPLAINED = "unexplained"  # none of these: the plan was wrong


USUAL_PRIORITY: Final = 8  # the class of requests that name none

LEAST_PRIORITY: Final = 15  # the least urgent class; 1 is the most urgent one


class TensorRef(Struct, frozen=True, kw_only=True, array_like=True):
    """One tensor inside a region: ``nbytes`` from ``offset``, of full ``shape`` (batch axis included)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Tensors(Struct, frozen=True, kw_only=True, array_like=True):
    """Where a request's tensors are.

    ``region`` names shared memory as ``PID:FD:BYTES`` of the gateway that owns it; empty: no process of the
    server's host can map it. ``server``, if any, is where workers on other machines get its tensors, as
    ``HOST:PORT``; without a host, that of the server. For a request, ``refs``
    are the inputs and ``output_offset``/``output_bytes`` the room for outputs; for a result, ``refs`` are
    the outputs. ``epoch`` is also stored in the 8 bytes at ``header_offset`` for as long as the slot belongs
    to this request: a reader that finds another number must refuse. Outputs without a region are in their
    request's room, with offsets from its start.
    """

    region: str
    epoch: int
    header_offset: int
    refs: tuple[TensorRef, ...]
    output_offset: int = 0
    output_bytes: int = 0
    server: str = ""


class Request(Struct, frozen=True, kw_only=True, array_like=True, tag="request"):
    """A request as the controller sees it. ``deadline_ns`` is absolute.

    Requests share a batch only if model and ``signature`` are equal; a request of ``rows > 1``, or of a code
    that is not batched, runs alone. ``signature`` is empty when all shapes are those that the model declares.
    ``priority`` is 1 (most urgent) to 15; 0 stands for the usual one, 8. ``tenant`` is whose quota it uses.
    ``way_ns`` of the time until the deadline goes by between the client and the controller, as measured.
    ``decide_ns``: how long after its arrival it may be told no, or is promised an answer; below 0: as the
    server's setting says. ``trace`` is the W3C trace context that its client sent, as
    ``TRACE-PARENT-FLAGS`` in hexadecimal, with its ``tracestate`` after a space if there is one; empty: none.
    ``awaited``: it awaited failover; where its verdict was due meanwhile, its client takes silence for a yes.
    """

    request_id: str
    gateway: str
    model: str
    arrival_ns: int
    deadline_ns: int
    rows: int = 1
    signature: str = ""
    priority: int = 0
    tensors: bytes = b""
    tenant: str = ""
    way_ns: int = 0
    decide_ns: int = -1
    trace: str = ""
    awaited: bool = False

    @property
    def slo_ns(self) -> int:
        """Its SLO: from its arrival to its deadline."""
        return self.deadline_ns - self.arrival_ns


class AdmissionQuery(Struct, frozen=True, kw_only=True, array_like=True, tag="announced"):
    """A gateway asks, when only the head of a request has arrived, whether the request would be admitted.

    Answered at once. ``announced_id`` is not the id of the :class:`Request` that may follow. Other fields are
    as there.
    """

    announced_id: str
    gateway: str
    model: str
    arrival_ns: int
    deadline_ns: int
    tenant: str = ""
    way_ns: int = 0


class AdmissionReply(Struct, frozen=True, kw_only=True, array_like=True, tag="foretold"):
    """The reply to an AdmissionQuery: with a ``reason``, the request would be rejected.

    Without one, it would be admitted now, which is no promise. Fields as in :class:`Answer`.
    """

    announced_id: str
    gateway: str
    reason: Reason = Reason.NONE
    message: str = ""
    retry_after_ns: int = 0


class Cancel(Struct, frozen=True, kw_only=True, array_like=True, tag="cancel"):
    """The client cancelled a request, or disconnected."""

    request_id: str


class Answer(Struct, frozen=True, kw_only=True, array_like=True, tag="answer"):
    """The one answer to a request.

    ``release``: no worker uses its tensors any more; else a :class:`Release` follows.
    ``retry_after_ns`` is how long to wait before a like request could be served (0: no advice).
    ``queue_ns`` (arrival to start), ``exec_ns`` (lane time), ``expected_ns`` (predicted lane time), ``batch``
    and ``cold`` (weights were loaded for it) describe an execution, where there was one. ``promised``: it had
    been promised in time; ``cause`` is why that was broken.
    """

    request_id: str
    gateway: str
    outcome: Outcome
    reason: Reason = Reason.NONE
    message: str = ""
    retry_after_ns: int = 0
    release: bool = True
    outputs: bytes = b""
    queue_ns: int = 0
    exec_ns: int = 0
    expected_ns: int = 0
    batch: int = 0
    cold: bool = False
    promised: bool = False
    cause: Cause = Cause.NONE


class Delivered(Struct, frozen=True, kw_only=True, array_like=True, tag="delivered"):
    """Delivery report of a gateway, by request id, for the counters.

    Responses ``in_time`` were written to their clients' sockets, or dropped because the clients had
    disconnected. For ``late`` ones the deadline had passed: their clients got EXPIRED instead. A gateway that
    reports deliveries sends an empty report first.
    """

    in_time: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


class Release(Struct, frozen=True, kw_only=True, array_like=True, tag="release"):
    """No worker uses the tensors of an answered request any more."""

    request_id: str
    gateway: str
