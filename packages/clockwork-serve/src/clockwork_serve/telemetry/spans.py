"""Spans of requests, made from the steps of a journal: what each waited for, where it ran, how it ended.

A request is a trace, or a part of its client's. Ids follow from the request's id, so that whoever reads the
same journal twice, or knows the id alone, finds the same spans.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, structs

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    Answer,
    Cause,
    GatewayLost,
    Infer,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
    Unload,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry.following import JournalFollower, numbered
from clockwork_serve.telemetry.in_flight import (
    NEVER_NS,
    SentAction,
    SentActions,
    Told,
    told_of_action,
    told_of_answer,
    told_of_request,
    told_of_transfers,
)
from clockwork_serve.telemetry.journal import JournalHead, Step, Torn, refusals_beside
from clockwork_serve.units import NS_PER_S, to_ms

# ------------------------------------------------------------
# The ids of a request's trace, and whether it is kept.


_SHARE_BITS: Final = 56
"""As OpenTelemetry's samplers: the last seven bytes of a trace's id are random enough to be a share."""


class TraceIds(Struct, frozen=True):
    """A request's trace: its id, that of the request's own span, and of its client's span, if there is one.

    ``sampled`` is what its client says of it; None: it does not.
    """

    trace_id: bytes
    span_id: bytes
    parent_id: bytes = b""
    sampled: bool | None = None
    state: str = ""


def trace_ids(request_id: str, trace: str = "") -> TraceIds:
    """The ids of a request's trace, from its id and its ``Request.trace``."""
    made = blake2b(request_id.encode(), digest_size=24).digest()
    if not trace:
        return TraceIds(made[:16], made[16:])
    context, _, state = trace.partition(" ")
    trace_id, parent_id, flags = context.split("-")
    return TraceIds(
        bytes.fromhex(trace_id), made[16:], bytes.fromhex(parent_id), bool(int(flags, 16) & 1), state
    )


def is_sampled(ids: TraceIds, share: float) -> bool:
    """Whether a trace belongs to that share of all; who sampled its parent has decided already."""
    if ids.sampled is not None:
        return ids.sampled
    return int.from_bytes(ids.trace_id[-7:]) < share * (1 << _SHARE_BITS)


_BAD: Final = frozenset({Outcome.REJECTED, Outcome.EXPIRED, Outcome.FAILED, Outcome.INVALID})


def is_kept(ids: TraceIds, answer: Answer, share: float) -> bool:
    """Whether a request's spans are made: those that ended badly always are, else a share."""
    return answer.outcome in _BAD or answer.cause is not Cause.NONE or is_sampled(ids, share)


def child_id(request_id: str, name: str) -> bytes:
    """The id of a span inside of a request's own."""
    return blake2b(f"{request_id} {name}".encode(), digest_size=8).digest()


# ------------------------------------------------------------
# Requests as they come and go, and their spans once they are over.


SETTLED_NS: Final = 3 * NS_PER_S
"""How long after an answer its gateway may still tell that it was late: that is on disk within a second."""
LATE_MAX: Final = 100_000  # the most late answers that are remembered before the answer itself is read
MATES_MAX: Final = 64
_LOADS_KEPT: Final = 4
_log = logging.getLogger(__name__)
_SAME_CLOCK_NS: Final = 60 * NS_PER_S
"""Two ways to the time of day differ less: how long a process takes to start, and how far clocks are set."""


class Span(Struct, frozen=True):
    """A span; both instants are ns since 1970.

    ``error`` says how it failed, ``links`` are other traces and spans in them.
    """

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    name: str
    start_ns: int
    end_ns: int
    attributes: Told
    error: str = ""
    links: tuple[tuple[bytes, bytes], ...] = ()
    state: str = ""


class _Traced:
    """A request; ``answer`` is how it ended, at ``ended_ns``."""

    __slots__ = ("answer", "answered_ns", "attempts", "ended_ns", "ids", "loads", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids = trace_ids(request.request_id, request.trace)
        self.attempts: list[tuple[SentAction[_Traced], Result]] = []
        self.loads: list[tuple[SentAction[_Traced], Result]] = []
        self.answer: Answer | None = None
        self.answered_ns = self.ended_ns = 0


class Spans:
    """Makes the spans of requests from records of journals: the controller's, and what gateways refused.

    ``emit`` gets all spans of one request at once, when it is over. Those that were refused, failed or were
    late are always made, else a ``share`` of all. ``offset_ns`` is :func:`host_offset_ns`, for journals of
    this boot of this host; None: the time of day follows from the journal alone. What ended before
    ``since_ns``, in ns since 1970, is left out.
    """

    def __init__(
        self, emit: Callable[[list[Span]], None], share: float = 1.0, offset_ns: int | None = None,
        since_ns: int = 0,
    ) -> None:  # fmt: skip
        self.requests = self.missing_steps = 0
        self._emit, self._share, self._since_ns = emit, share, since_ns
        self._host_offset_ns = offset_ns
        self._offset_ns = offset_ns or 0  # from the journal's clock to the time of day
        self._head: JournalHead | None = None  # of a run whose first step is to come
        self._now_ns = 0
        self._open: dict[str, _Traced] = {}
        self._answered: dict[str, _Traced] = {}  # until they are settled, in the order of their answers
        self._late: dict[str, int] = {}  # told before their answers: when
        self._sent = SentActions[_Traced]()
        self._loads: dict[str, deque[tuple[SentAction[_Traced], Result]]] = {}  # by model, the last ones
        self._handlers: dict[type, Callable[[Any], object]] = {
            Request: self._on_request, Answer: self._on_answer,
            Infer: self._on_action, Load: self._on_action, Unload: self._on_action, Result: self._on_result,
            WorkerJoined: self._sent.joined, WorkerLost: self._sent.lost,
            GatewayLost: self._on_gateway_lost,
        }  # fmt: skip

    def on_record(self, record: JournalHead | Step | Torn) -> None:
        """The next record of the controller's journal."""
        if isinstance(record, JournalHead):
            self._head = record
            if not record.continues:
                self._end_run()
        elif isinstance(record, Step):
            if self._head is not None:
                self._set_clock(self._head, record.now_ns)
            self._step(record)
            self.settle(record.now_ns)

    def on_refusals(self, record: JournalHead | Step | Torn) -> None:
        """The next record of what a gateway ended by itself, before what is later in the controller's."""
        if isinstance(record, Step):
            if record.events:
                self._step(record)
                return
            self.missing_steps += record.dropped
            for answer in record.effects:
                if isinstance(answer, Answer):
                    self._on_late(answer, record.now_ns)

    def _step(self, step: Step) -> None:
        self._now_ns = step.now_ns
        self.missing_steps += step.dropped
        handlers = self._handlers
        for message in (*step.events, *step.effects):
            if (handler := handlers.get(type(message))) is not None:
                handler(message)

    def settle(self, now_ns: int) -> None:
        """It is at least that time: make the spans of those of which nothing more will be told."""
        while self._answered:
            request_id, traced = next(iter(self._answered.items()))
            if traced.answered_ns > now_ns - SETTLED_NS:
                break
            del self._answered[request_id]
            self._finish(traced)

    def close(self) -> None:
        """Nothing follows: make all spans that are left."""
        self._end_run()

    def _end_run(self) -> None:
        """What a controller left open its gateways ask the next one, as another request, or refuse."""
        self._open.clear()
        for traced in self._answered.values():
            self._finish(traced)
        self._answered.clear()

    def _set_clock(self, head: JournalHead, now_ns: int) -> None:
        self._head = None
        with suppress(ValueError):
            started_ns = int(datetime.fromisoformat(head.started).timestamp() * NS_PER_S)
            offset_ns = started_ns - (head.started_ns or now_ns)
            # The clocks here are exact, if the journal is of this boot; a head has milliseconds.
            host_offset_ns = self._host_offset_ns
            if host_offset_ns is not None and abs(offset_ns - host_offset_ns) < _SAME_CLOCK_NS:
                offset_ns = host_offset_ns
            self._offset_ns = offset_ns

    # What steps tell

    def _on_request(self, request: Request) -> None:
        """A gateway ends what the controller knows, too, if it lost the link: that is the same request."""
        request_id = request.request_id
        known = self._open.get(request_id) or self._answered.pop(request_id, None)
        self._open[request_id] = known or _Traced(request)

    def _on_answer(self, answer: Answer) -> None:
        traced = self._open.pop(answer.request_id, None)
        if traced is None:
            return
        traced.answer, traced.answered_ns, traced.ended_ns = answer, self._now_ns, self._now_ns
        if answer.cold or not traced.attempts:
            device = traced.attempts[-1][0].action.device if traced.attempts else ""
            traced.loads = [
                (sent, result)
                for sent, result in self._loads.get(traced.request.model, ())
                if result.ended_ns > traced.request.arrival_ns and device in ("", sent.action.device)
            ]
        self._answered[answer.request_id] = traced
        late_ns = self._late.pop(answer.request_id, None)
        if late_ns is not None:
            self._note_late(traced, late_ns)

    def _on_late(self, told: Answer, now_ns: int) -> None:
        traced = self._answered.get(told.request_id)
        if traced is not None:
            self._note_late(traced, now_ns)
            return
        self._late[told.request_id] = now_ns
        if len(self._late) > LATE_MAX:
            del self._late[next(iter(self._late))]

    def _note_late(self, traced: _Traced, now_ns: int) -> None:
        """Its client got EXPIRED instead, as ``recorder`` counts it."""
        answer = traced.answer
        assert answer is not None
        reason = Reason.LATE if answer.outcome is Outcome.OK else Reason.NONE
        cause = Cause.DELIVERY_LATE if answer.promised and answer.cause is Cause.NONE else answer.cause
        traced.answer = structs.replace(answer, outcome=Outcome.EXPIRED, reason=reason, cause=cause)
        traced.ended_ns = max(now_ns, traced.answered_ns)

    def _on_gateway_lost(self, event: GatewayLost) -> None:
        for traced in [one for one in self._open.values() if one.request.gateway == event.gateway]:
            request_id = traced.request.request_id
            message = "its gateway was lost"
            self._on_answer(
                Answer(
                    request_id=request_id, gateway=event.gateway, outcome=Outcome.CANCELLED, message=message
                )
            )

    def _on_action(self, action: Infer | Load | Unload) -> None:
        calls = action.calls if isinstance(action, Infer) else ()
        asked = [one for call in calls if (one := self._open.get(call.request_id)) is not None]
        self._sent.send(action, self._now_ns, asked)

    def _on_result(self, result: Result) -> None:
        sent = self._sent.ended(result)
        if sent is None:
            return
        if isinstance(sent.action, Load) and result.status is Status.OK:
            self._loads.setdefault(sent.action.model, deque(maxlen=_LOADS_KEPT)).append((sent, result))
        for traced in sent.asked:
            traced.attempts.append((sent, result))

    # Spans

    def _finish(self, traced: _Traced) -> None:
        answer = traced.answer
        assert answer is not None
        if traced.ended_ns + self._offset_ns < self._since_ns:
            return
        self.requests += 1
        if is_kept(traced.ids, answer, self._share):
            self._emit([self._root(traced, answer), *self._parts(traced)])

    def _root(self, traced: _Traced, answer: Answer) -> Span:
        request, ids = traced.request, traced.ids
        told = told_of_request(request, answer.outcome, traced.ended_ns) | told_of_answer(answer)
        ended = f"{answer.outcome}: {answer.reason}" if answer.reason else str(answer.outcome)
        error = f"{ended}: {answer.message}" if answer.message else ended
        return Span(
            ids.trace_id, ids.span_id, ids.parent_id, "clockwork.request",
            request.arrival_ns + self._offset_ns, traced.ended_ns + self._offset_ns, _named(told),
            error if answer.outcome in _BAD else "", (), ids.state,
        )  # fmt: skip

    def _parts(self, traced: _Traced) -> list[Span]:
        """What it waited for and where it ran, one after the other."""
        found, since_ns = [], traced.request.arrival_ns
        for sent, result in traced.loads:
            told = told_of_action(sent, result.started_ns) | {"device": result.device}
            name = f"load {result.action_id}"
            found.append(self._child(traced, name, result.started_ns, result.ended_ns, told))
        for number, (sent, result) in enumerate(traced.attempts):
            found.append(self._child(traced, f"queue {number}", since_ns, result.started_ns))
            found += self._execution(traced, sent, result)
            since_ns = result.ended_ns
        if traced.attempts and traced.attempts[-1][1].status is Status.OK:
            found.append(self._child(traced, "answer", since_ns, traced.ended_ns))
        else:
            found.append(self._child(traced, f"queue {len(traced.attempts)}", since_ns, traced.ended_ns))
        return found

    def _execution(self, traced: _Traced, sent: SentAction[_Traced], result: Result) -> list[Span]:
        action = sent.action
        told = told_of_action(sent, result.started_ns) | {"device": action.device, "status": result.status}
        told |= {"longer_ms": to_ms(result.lane_ns - sent.expected_ns)} | told_of_transfers(result)
        if result.message:
            told["message"] = result.message
        name = f"exec {action.action_id}"
        mates = [one for one in sent.asked if one is not traced][:MATES_MAX]
        links = [(one.ids.trace_id, child_id(one.request.request_id, name)) for one in mates]
        failed = "" if result.status is Status.OK else f"{result.status}: {result.message}"
        whole = self._child(traced, name, result.started_ns, result.ended_ns, told)
        found = [structs.replace(whole, links=tuple(links), error=failed)]
        at_ns = result.started_ns
        for phase, took_ns in (
            ("input", result.input_ns), ("run", result.run_ns), ("output", result.output_ns),
        ):  # fmt: skip
            if took_ns:
                part = self._child(traced, f"{phase} {action.action_id}", at_ns, at_ns + took_ns)
                found.append(structs.replace(part, parent_id=whole.span_id))
            at_ns += took_ns
        return found

    def _child(
        self, traced: _Traced, name: str, start_ns: int, end_ns: int, told: Told | None = None
    ) -> Span:
        """A part of a request, whose name has a number that is not shown if there may be several."""
        ids, request_id = traced.ids, traced.request.request_id
        return Span(
            ids.trace_id, child_id(request_id, name), ids.span_id, f"clockwork.{name.partition(' ')[0]}",
            start_ns + self._offset_ns, max(start_ns, end_ns) + self._offset_ns, _named(told or {}),
        )  # fmt: skip


def _named(told: Told) -> Told:
    """As attributes; a model's key is its name and its version."""
    name, _, version = str(told.get("model", "")).rpartition("/")
    if name:
        told |= {"model": name, "version": version}
    return {f"clockwork.{name}": value for name, value in told.items()}


# ------------------------------------------------------------
# A controller's journal with what gateways ended by themselves.


LOOK_S: Final = 0.2  # how often it looks for what gateways wrote, while it has read all


class _Refusals:
    """Reads what one gateway ended by itself, as far as the controller's journal was read."""

    def __init__(self, path: Path) -> None:
        self._follower = JournalFollower(path)
        self._records: Iterator[tuple[int, JournalHead | Step]] = iter(())
        self._next: Step | None = None

    def until(self, now_ns: int, *, look: bool) -> Iterator[Step]:
        """The steps up to that instant; ``look``: for new ones, if all that was there is read."""
        if self._next is None and look:
            self._records = numbered(self._follower)
        steps = (record for _, record in self._records if isinstance(record, Step))
        while (step := self._next or next(steps, None)) is not None:
            self._next = step if step.now_ns > now_ns else None
            if self._next is not None:
                return
            yield step

    def close(self) -> None:
        """Read no more."""
        self._follower.close()


class RequestTraces:
    """Feeds :class:`Spans` with the records of the controller's journal at ``path``, and what is beside it.

    Its clock decides when to look for more of that. A file there that is no journal is left out.
    """

    def __init__(self, path: Path, spans: Spans, clock: Callable[[], float] = time.monotonic) -> None:
        self.spans = spans
        self._path, self._clock = path, clock
        self._looked_s = -LOOK_S
        self._beside: dict[Path, _Refusals] = {}

    def on_record(self, record: JournalHead | Step | Torn) -> None:
        """The next record of the controller's journal."""
        if isinstance(record, Step):
            self._read_beside(record.now_ns)
        self.spans.on_record(record)

    def on_idle(self, now_ns: int) -> None:
        """All is read that was there at that instant, of this host's clock."""
        self._read_beside(now_ns)
        self.spans.settle(now_ns)

    def close(self) -> None:
        """Nothing follows: read what gateways still wrote, and make all spans that are left."""
        self._looked_s = -LOOK_S
        self._read_beside(NEVER_NS)
        for beside in self._beside.values():
            beside.close()
        self.spans.close()

    def _read_beside(self, now_ns: int) -> None:
        now_s = self._clock()
        look = now_s - self._looked_s >= LOOK_S
        if look:
            self._looked_s = now_s
            for path in refusals_beside(self._path):
                self._beside.setdefault(path, _Refusals(path))
        for path, beside in list(self._beside.items()):
            try:
                for step in beside.until(now_ns, look=look):
                    self.spans.on_refusals(step)
            except (ConfigError, OSError) as error:
                _log.warning("traces: %s is left out: %s", path, error)
                self._beside[path] = _Refusals(path.with_name(f"{path.name}.none"))


def host_offset_ns() -> int:
    """This host's time of day less its monotonic clock, which journals have."""
    return time.time_ns() - time.monotonic_ns()
