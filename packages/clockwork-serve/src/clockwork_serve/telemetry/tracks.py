"""Follows a journal's records: what waits, what each lane was sent and when that was to run, how all ended.

What draws them (:mod:`~clockwork_serve.telemetry.live`) is a subclass. Memory holds what is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from clockwork_serve.messages import (
    Action,
    Answer,
    GatewayLost,
    Infer,
    Load,
    Outcome,
    Request,
    Result,
    Unload,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry.in_flight import NEVER_NS, SentAction, SentActions
from clockwork_serve.telemetry.journal import JournalHead, Step, Torn
from clockwork_serve.units import NS_PER_S

OPEN: Final = "open"
"""The outcome of a request that nobody answers any more, such as of a controller that died."""


class OpenRequest:
    """A request without an answer, and later as long as an INFER that it was in has no result."""

    __slots__ = ("answered_ns", "device", "held", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.held: SentAction[OpenRequest] | None = None  # the INFER that it is in
        self.device = ""  # the one of the INFER that it was in last
        self.answered_ns = NEVER_NS


AskedAction = SentAction[OpenRequest]  # an action without a result, with its requests


class Tracks:
    """Follows records in their order; what subclasses draw, they override.

    ``now_ns`` is the instant of the step, on the journal's clock; ``offset_ns`` leads from there to a time
    that goes on where a machine was booted anew: its run follows a second after the one before.
    """

    def __init__(self) -> None:
        self.now_ns = self.offset_ns = 0
        self.began_ns: int | None = None
        self.waiting: dict[str, int] = {}  # by model, requests that are in no INFER, if there are any
        self._head: JournalHead | None = None  # of a run whose first step is to come
        self._asked: dict[str, OpenRequest] = {}
        self._sent = SentActions[OpenRequest]()
        self._moved: dict[str, None] = {}  # models of which ``waiting`` changed in this step
        self._lost_gateways: set[str] = set()  # of this step
        self.handlers: dict[type, Callable[[Any], None]] = {
            Request: self._on_request, Answer: self._on_answer, Infer: self._on_action,
            Load: self._on_action, Unload: self._on_action, Result: self._on_result,
            WorkerJoined: self._on_worker_joined, WorkerLost: self._on_worker_lost,
            WorkerHung: self._on_worker_hung, GatewayLost: self._on_gateway_lost,
        }  # fmt: skip

    # What subclasses draw

    def run_began(self, head: JournalHead | None, *, first: bool) -> None:
        """A controller began to write; without ``head``, an earlier part of the journal is gone."""

    def run_ended(self) -> None:
        """Its requests have no answers, and nothing is known of workers until the next begins."""

    def request_came(self, asked: OpenRequest) -> None:
        """A request arrived."""

    def request_ended(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        """A request was answered or, without an ``answer``, lost; its ``outcome`` may be ``OPEN``."""

    def action_sent(self, sent: AskedAction) -> None:
        """An action was sent."""

    def action_ended(self, sent: AskedAction, result: Result | None, why: str) -> None:
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

    def take(self, record: JournalHead | Step | Torn) -> None:
        """Follow the next record."""
        if isinstance(record, Step):
            self._step(record)
        elif isinstance(record, JournalHead) and not record.continues:
            self._end_run()
            self._head = record

    def give_up(self, before_ns: int) -> None:
        """End what should have ended before: what came of it is not in the journal."""
        for asked in [one for one in self._asked.values() if one.request.deadline_ns < before_ns]:
            self._end_request(asked, OPEN, None, "its end is not in the journal")
        for sent in self._sent.due(before_ns):
            self._end_unmeasured(sent, "no result")

    def _step(self, step: Step) -> None:
        if self._head is not None or self.began_ns is None:
            self._begin_run(step.now_ns)
        self.now_ns = step.now_ns
        if step.dropped:
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

    def _end_run(self) -> None:
        """Nobody answers its requests any more; its actions go on, and a next controller gets the results."""
        for asked in list(self._asked.values()):
            self._end_request(asked, OPEN, None, "its controller died")
        self.run_ended()
        self._end_step()

    def _end_actions(self) -> None:
        """No result comes any more."""
        for sent in self._sent.end():
            self._end_unmeasured(sent, "no result")

    # Requests

    def _on_request(self, request: Request) -> None:
        asked = self._asked[request.request_id] = OpenRequest(request)
        self._wait(request.model, 1)
        self.request_came(asked)

    def _wait(self, model: str, change: int) -> None:
        self.waiting[model] = self.waiting.get(model, 0) + change
        self._moved[model] = None

    def _on_answer(self, answer: Answer) -> None:
        asked = self._asked.get(answer.request_id)
        if asked is not None:
            self._end_request(asked, answer.outcome, answer, answer.message)

    def _end_request(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        del self._asked[asked.request.request_id]
        asked.answered_ns = self.now_ns
        if asked.held is None:
            self._wait(asked.request.model, -1)
        self.request_ended(asked, outcome, answer, message)

    # Actions

    def _on_action(self, action: Action) -> None:
        calls = action.calls if isinstance(action, Infer) else ()
        asked = [one for call in calls if (one := self._asked.get(call.request_id)) is not None]
        sent = self._sent.send(action, self.now_ns, asked)
        for one in asked:
            if one.held is None:
                self._wait(one.request.model, -1)
            one.held, one.device = sent, action.device
        self.action_sent(sent)

    def _on_result(self, result: Result) -> None:
        sent = self._sent.ended(result)
        if sent is not None:
            self._release(sent)
            self.action_ended(sent, result, "")

    def _end_unmeasured(self, sent: AskedAction, why: str) -> None:
        """An action of which it is known now that no result comes."""
        self._release(sent)
        self.action_ended(sent, None, why)

    def _release(self, sent: AskedAction) -> None:
        """What it held waits again, but what is over."""
        for asked in sent.asked:
            if asked.held is sent:
                if asked.answered_ns == NEVER_NS:
                    self._wait(asked.request.model, 1)
                asked.held = None

    # Workers, gateways

    def _on_worker_joined(self, event: WorkerJoined) -> None:
        """What an earlier controller sent it, and it is not running, it has told that one, or never did."""
        self.worker_joined(event)
        for sent in self._sent.joined(event):
            self._end_unmeasured(sent, "no result")

    def _on_worker_lost(self, event: WorkerLost) -> None:
        self.worker_became(event.worker, "lost", "")
        for sent in self._sent.lost(event):
            ran = sent.action.action_id in (event.running or ())
            self._end_unmeasured(sent, "running when its worker was lost" if ran else "worker lost")

    def _on_worker_hung(self, effect: WorkerHung) -> None:
        """What a hung worker holds is planned anew."""
        self.worker_became(effect.worker, "hung" if effect.why else "up", effect.why)
        for sent in self._sent.of(effect.worker) if effect.why else ():
            self._release(sent)

    def _on_gateway_lost(self, event: GatewayLost) -> None:
        self._lost_gateways.add(event.gateway)
        self.gateway_lost(event.gateway)
