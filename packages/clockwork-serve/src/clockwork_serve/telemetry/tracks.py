"""Follows a journal's records: what waits, what each lane was sent and when that was to run, how all ended.

What draws them (:mod:`~clockwork_serve.telemetry.timeline` for a file,
:mod:`~clockwork_serve.telemetry.live` for a screen) is a subclass. Memory holds what is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from clockwork_serve.messages import (
    Action,
    Answer,
    GatewayLost,
    Infer,
    Lane,
    Load,
    Outcome,
    Request,
    Result,
    Unload,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry.journal import JournalHead, Step, Torn
from clockwork_serve.units import NS_PER_S

NEVER_NS: Final = 1 << 61
"""Later than any instant; windows that end later are open."""
OPEN: Final = "open"
"""The outcome of a request that nobody answers any more: its controller died, or the journal ends."""


class OpenRequest:
    """A request without an answer, and later as long as an INFER that it was in has no result."""

    __slots__ = ("answered_ns", "device", "flow", "held", "ran", "request")

    def __init__(self, request: Request, flow: int) -> None:
        self.request = request
        self.flow = flow  # its number, from 1; 0: none is drawn
        self.held: SentAction | None = None  # the INFER that it is in
        self.device = ""  # the one of the INFER that it was in last
        self.ran = False  # the flow leads through an INFER
        self.answered_ns = NEVER_NS


class SentAction:
    """An action without a result, predicted to start at ``start_ns``."""

    __slots__ = ("action", "asked", "expected_ns", "sent_ns", "start_ns")

    def __init__(self, action: Action, sent_ns: int, start_ns: int, asked: list[OpenRequest]) -> None:
        self.action, self.sent_ns, self.start_ns, self.asked = action, sent_ns, start_ns, asked
        self.expected_ns = 0 if isinstance(action, Unload) else action.expected_ns

    @property
    def lane(self) -> Lane:
        """The lane that it is for."""
        return Lane.EXEC if isinstance(self.action, Infer) else Lane.LOAD


class _LaneQueue:
    """A lane of a device: what was sent and has not ended."""

    __slots__ = ("free_ns", "sent")

    def __init__(self) -> None:
        self.sent: dict[int, SentAction] = {}
        self.free_ns = 0

    def available_ns(self, now_ns: int) -> int:
        """When all that was sent will have ended, as predicted; what runs and is late is taken to end now."""
        free_ns = self.free_ns
        for sent in self.sent.values():
            free_ns = max(max(free_ns, sent.sent_ns) + sent.expected_ns, now_ns)
        return max(free_ns, now_ns)


class Tracks:
    """Follows records in their order; what subclasses draw, they override.

    ``now_ns`` is the instant of the step, on the journal's clock; ``offset_ns`` leads from there to a time
    that goes on where a machine was booted anew: its run follows a second after the one before.
    """

    def __init__(self) -> None:
        self.now_ns = self.offset_ns = 0
        self.began_ns: int | None = None
        self.runs = self.unmatched = self.missing_steps = self.torn_bytes = 0
        self.waiting: dict[str, int] = {}  # by model, requests that are in no INFER, if there are any
        self._head: JournalHead | None = None  # of a run whose first step is to come
        self._flows = 0
        self._asked: dict[str, OpenRequest] = {}
        self._sent: dict[int, SentAction] = {}
        self._moved: dict[str, None] = {}  # models of which ``waiting`` changed in this step
        self._lost_gateways: set[str] = set()  # of this step
        self._lanes: dict[tuple[str, Lane], _LaneQueue] = {}
        self._whose: dict[str, str] = {}  # by device, its worker
        self.handlers: dict[type, Callable[[Any], None]] = {
            Request: self._on_request, Answer: self._on_answer, Infer: self._on_action,
            Load: self._on_action, Unload: self._on_action, Result: self._on_result,
            WorkerJoined: self._on_worker_joined, WorkerLost: self._on_worker_lost,
            WorkerHung: self._on_worker_hung, GatewayLost: self._on_gateway_lost,
        }  # fmt: skip

    # What subclasses draw

    def past(self) -> bool:
        """Whether what begins now is not followed."""
        return False

    def run_began(self, head: JournalHead | None, *, first: bool) -> None:
        """A controller began to write; without ``head``, an earlier part of the journal is gone."""

    def run_ended(self) -> None:
        """Its requests have no answers, and nothing is known of workers until the next begins."""

    def request_came(self, asked: OpenRequest) -> None:
        """A request arrived."""

    def request_ended(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        """A request was answered or, without an ``answer``, lost; its ``outcome`` may be ``OPEN``."""

    def action_sent(self, sent: SentAction) -> None:
        """An action was sent."""

    def action_ended(self, sent: SentAction, result: Result | None, why: str) -> None:
        """Its result came or, as ``why`` says, none comes any more."""

    def worker_joined(self, event: WorkerJoined) -> None:
        """A worker joined with its devices."""

    def worker_became(self, worker: str, state: str, message: str) -> None:
        """A worker is ``up``, ``hung`` or ``lost``."""

    def gateway_lost(self, gateway: str) -> None:
        """A gateway is gone."""

    def steps_missing(self, steps: int) -> None:
        """So many steps before this one are not in the journal."""

    def waiting_changed(self, models: Iterable[str]) -> None:
        """Of these models another number waits than before this step."""

    def step_ended(self) -> None:
        """All of a step was told."""

    # Records

    @property
    def open(self) -> bool:
        """Whether requests or actions have not ended."""
        return bool(self._asked or self._sent)

    def take(self, record: JournalHead | Step | Torn) -> None:
        """Follow the next record."""
        if isinstance(record, Step):
            self._step(record)
        elif isinstance(record, Torn):
            self.torn_bytes += record.missing_bytes
        elif not record.continues:
            self._end_run("its controller died")
            self._head = record
            self.runs += 1

    def end(self) -> None:
        """The journal ends: so does what is open."""
        self._end_run("")
        self._end_actions()

    def give_up(self, before_ns: int) -> None:
        """End what should have ended before: what came of it is not in the journal."""
        for asked in [one for one in self._asked.values() if one.request.deadline_ns < before_ns]:
            self._end_request(asked, OPEN, None, "its end is not in the journal")
        for sent in [one for one in self._sent.values() if one.start_ns + one.expected_ns < before_ns]:
            self._end_unmeasured(sent, "no result")

    def _step(self, step: Step) -> None:
        if self._head is not None or self.began_ns is None:
            self._begin_run(step.now_ns)
        self.now_ns = step.now_ns
        if step.dropped:
            self.missing_steps += step.dropped
            self.steps_missing(step.dropped)
        handlers = self.handlers
        for message in (*step.events, *step.effects):
            if (handler := handlers.get(type(message))) is not None:
                handler(message)
        if self._lost_gateways:
            for asked in [one for one in self._asked.values() if one.request.gateway in self._lost_gateways]:
                self._end_request(asked, Outcome.CANCELLED, None, "its gateway was lost")
            self._lost_gateways.clear()
        self._end_step()

    def _end_step(self) -> None:
        if self._moved:
            self.waiting_changed(self._moved)
            for model in self._moved:
                if not self.waiting[model]:
                    del self.waiting[model]
            self._moved.clear()
        self.step_ended()

    def _begin_run(self, now_ns: int) -> None:
        """Its first step; where the clock began anew, the run follows a second after the one before."""
        head, first = self._head, self.began_ns is None
        if first:
            self.began_ns = now_ns
        elif now_ns < self.now_ns:
            self._end_actions()
            self.offset_ns += self.now_ns + NS_PER_S - now_ns
        self.now_ns = now_ns
        self.run_began(head, first=first)
        self._head = None

    def _end_run(self, why: str) -> None:
        """Nobody answers its requests any more; its actions go on, and a next controller gets the results."""
        for asked in list(self._asked.values()):
            self._end_request(asked, OPEN, None, why)
        self.run_ended()
        self._end_step()

    def _end_actions(self) -> None:
        """No result comes any more, and what lanes are free from is of no use to who comes next."""
        for sent in list(self._sent.values()):
            self._end_unmeasured(sent, "no result")
        for lane in self._lanes.values():
            lane.free_ns = 0

    # Requests

    def _on_request(self, request: Request) -> None:
        if not self.past():
            self._flows += 1
            asked = self._asked[request.request_id] = OpenRequest(request, self._flows)
            self._wait(request.model, 1)
            self.request_came(asked)

    def _wait(self, model: str, change: int) -> None:
        self.waiting[model] = self.waiting.get(model, 0) + change
        self._moved[model] = None

    def _on_answer(self, answer: Answer) -> None:
        asked = self._asked.get(answer.request_id)
        if asked is None:
            self.unmatched += not self.past()
        else:
            self._end_request(asked, answer.outcome, answer, answer.message)

    def _end_request(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        del self._asked[asked.request.request_id]
        asked.answered_ns = self.now_ns
        if asked.held is None:
            self._wait(asked.request.model, -1)
        self.request_ended(asked, outcome, answer, message)

    # Actions

    def _lane(self, action: Action) -> _LaneQueue:
        key = action.device, Lane.EXEC if isinstance(action, Infer) else Lane.LOAD
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _LaneQueue()
        return lane

    def _on_action(self, action: Action) -> None:
        now_ns = self.now_ns
        if self.past():
            return
        lane = self._lane(action)
        calls = action.calls if isinstance(action, Infer) else ()
        asked = [one for call in calls if (one := self._asked.get(call.request_id)) is not None]
        sent = SentAction(action, now_ns, lane.available_ns(now_ns), asked)
        for one in asked:
            if one.held is None:
                self._wait(one.request.model, -1)
            one.held, one.device = sent, action.device
        self._sent[action.action_id] = lane.sent[action.action_id] = sent
        self.action_sent(sent)

    def _on_result(self, result: Result) -> None:
        sent = self._sent.get(result.action_id)
        if sent is None:
            self.unmatched += not self.past()
            return
        self._remove(sent).free_ns = result.ended_ns
        self.action_ended(sent, result, "")

    def _end_unmeasured(self, sent: SentAction, why: str) -> None:
        """An action of which it is known now that no result comes."""
        self._remove(sent)
        self.action_ended(sent, None, why)

    def _remove(self, sent: SentAction) -> _LaneQueue:
        """It is on its lane no more."""
        lane = self._lane(sent.action)
        del self._sent[sent.action.action_id], lane.sent[sent.action.action_id]
        self._release(sent)
        return lane

    def _release(self, sent: SentAction) -> None:
        """What it held waits again, but what is over."""
        for asked in sent.asked:
            if asked.held is sent:
                if asked.answered_ns == NEVER_NS:
                    self._wait(asked.request.model, 1)
                asked.held = None

    # Workers, gateways

    def _sent_to(self, worker: str) -> list[SentAction]:
        return [sent for sent in self._sent.values() if self._whose.get(sent.action.device) == worker]

    def _on_worker_joined(self, event: WorkerJoined) -> None:
        """What an earlier controller sent it, and it is not running, it has told that one, or never did."""
        self.worker_joined(event)
        self._whose.update((spec.device, event.worker) for spec in event.devices)
        running = {one.action_id for state in event.states for one in state.running}
        for sent in self._sent_to(event.worker):
            if sent.action.action_id not in running:
                self._end_unmeasured(sent, "no result")

    def _on_worker_lost(self, event: WorkerLost) -> None:
        self.worker_became(event.worker, "lost", "")
        for sent in self._sent_to(event.worker):
            ran = sent.action.action_id in (event.running or ())
            self._end_unmeasured(sent, "running when its worker was lost" if ran else "worker lost")

    def _on_worker_hung(self, effect: WorkerHung) -> None:
        """What a hung worker holds is planned anew."""
        self.worker_became(effect.worker, "hung" if effect.why else "up", effect.why)
        for sent in self._sent_to(effect.worker) if effect.why else ():
            self._release(sent)

    def _on_gateway_lost(self, event: GatewayLost) -> None:
        self._lost_gateways.add(event.gateway)
        self.gateway_lost(event.gateway)
