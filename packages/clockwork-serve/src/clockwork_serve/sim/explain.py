"""Explains a request from a journal: what was believed, chosen and measured, and what would have helped.

Sentences are made here, once: for a terminal, for JSON, and for whoever else shows them. Times are in ms from
the request's arrival, unless names say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct, structs

from clockwork_serve.controller import Controller
from clockwork_serve.controller.outlook import Ahead, Outlook
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    USUAL_PRIORITY,
    Answer,
    Infer,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
)
from clockwork_serve.sim.changes import AskedChange, asked_change
from clockwork_serve.sim.counterfactual import PlayedScene, Scene, play
from clockwork_serve.sim.history import History
from clockwork_serve.sim.recording import EXPECTED, NEARBY, RECORDED
from clockwork_serve.sim.remedies import (
    LUCKS,
    SLO_TIMES,
    UNLIKELY,
    Remedy,
    RemedyKind,
    RequestCase,
    other_remedies,
    smallest_slo,
)
from clockwork_serve.telemetry import JournalHead, Step, Torn, read_records
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S, plain, to_ms

LEAD_NS: Final = 2 * NS_PER_S
"""What was measured so long before a request is known to those who try remedies."""
LEAD_RECORDS: Final = 20_000
"""About as long, at 5,000 requests a second."""
AFTER_NS: Final = NS_PER_S
FORK_EVERY_NS: Final = NS_PER_S // 2
TELL_EVERY: Final = 256
"""Records between two reports of progress."""
SHOWN: Final = 6
"""Batches and models that a sentence names."""

Tell = Callable[[int], None]
"""Called with bytes read."""


class DeviceView(Struct, frozen=True, kw_only=True):
    """A device as it was believed when the verdict was given, for this request."""

    device: str
    weights: str
    free_ms: float
    ready_ms: float | None
    infer_ms: float
    end_ms: float | None
    text: str


class Attempt(Struct, frozen=True, kw_only=True):
    """One INFER that the request was in: as planned, and as measured (None: it never ran)."""

    device: str
    batch: int
    requests: int
    status: str
    sent_ms: float
    planned_start_ms: float
    planned_end_ms: float
    started_ms: float | None
    ended_ms: float | None
    text: str


class Tried(Struct, frozen=True, kw_only=True):
    """A remedy in words; ``chance``: the share of lucks with which the request is met.

    ``from_ms``: when its world begins to differ from what was recorded.
    """

    kind: RemedyKind
    helps: bool
    chance: float
    text: str
    from_ms: float | None = None
    rests_on: str = ""
    slo_ms: float | None = None
    memory_mib: float | None = None
    model: str | None = None
    priority: int | None = None


class Changed(Struct, frozen=True, kw_only=True):
    """How it would have gone with a change that was asked for; ``outcome`` is "open" if it got no answer.

    ``from_ms``: when its world begins to differ from what was recorded; None: it does not. So it went
    (answered in time, or not) in ``alike`` of ``tries``, by luck among what was measured nearby.
    """

    change: str
    outcome: str
    reason: str
    message: str
    after_ms: float | None
    deadline_ms: float
    from_ms: float | None
    rests_on: str
    alike: int
    tries: int
    text: str


class Explanation(Struct, frozen=True, kw_only=True):
    """All that is said of one request; ``lines`` are what people read, in their order."""

    request_id: str
    model: str
    tenant: str
    priority: int
    slo_ms: float
    outcome: str
    reason: str
    message: str
    after_ms: float
    sentence: str
    devices: tuple[DeviceView, ...]
    attempts: tuple[Attempt, ...]
    remedies: tuple[Tried, ...]
    changed: Changed | None
    lines: tuple[str, ...]


# ------------------------------------------------------------
# Requests in their surroundings, from a journal that is read once.


class _Pending:
    """A request that was found, and whose steps are still being read."""

    __slots__ = ("arrived", "began", "controller", "good", "last_ns", "request")

    def __init__(self, request: Request, controller: Controller, began: int, arrived: int) -> None:
        self.request = request
        self.controller = controller
        self.began, self.arrived = began, arrived
        self.last_ns = request.deadline_ns + max(AFTER_NS, 4 * request.slo_ns)
        self.good = False


class _Reader:
    """Replays a journal, and remembers controllers as they were a while ago, and the steps since then."""

    def __init__(self, wanted: Collection[str], controller: Controller | None = None) -> None:
        self._wanted = wanted
        self._controller = controller
        self._steps: list[Step] = []
        self._dropped = 0
        self._forks: list[tuple[int, Controller]] = []
        """(step that is next, controller) every ``FORK_EVERY_NS``."""
        self._renewed_ns = 0
        self._late_ns = 0
        self._pending: list[_Pending] = []

    def take(self, record: JournalHead | Step | Torn) -> list[RequestCase]:
        """Read a record; returns the requests whose steps are complete."""
        if isinstance(record, JournalHead):
            done = self.finish()
            self._controller = Controller(record.controller_config())
            return done
        if not isinstance(record, Step):
            return []
        if record.dropped:
            done = self.finish()
            self._controller = None
            return done
        if self._controller is None:
            return []
        self._replay(self._controller, record)
        done = [self._case(one) for one in self._pending if record.now_ns > one.last_ns]
        self._pending = [one for one in self._pending if record.now_ns <= one.last_ns]
        return done

    def finish(self) -> list[RequestCase]:
        """A run ends: what was read of its requests is all that there is."""
        done = [self._case(one) for one in self._pending]
        self._pending, self._steps, self._forks = [], [], []
        self._dropped = self._renewed_ns = 0
        return done

    def _replay(self, controller: Controller, step: Step) -> None:
        at = self._dropped + len(self._steps)
        if self._forks and controller.workers() and not self._forks[0][1].workers():
            self._forks.clear()  # before there was a device nothing can be tried
        if step.now_ns - self._renewed_ns >= FORK_EVERY_NS or not self._forks:
            self._forks.append((at, controller.fork()))
            self._renewed_ns = step.now_ns
            self._trim(step.now_ns)
        wake_ns = controller.next_wakeup_ns()
        if not step.events and wake_ns is not None and step.now_ns > wake_ns:
            self._late_ns = max(self._late_ns, step.now_ns - wake_ns)
        self._steps.append(step)
        for event in step.events:
            controller.observe(event, step.now_ns)
            if isinstance(event, Request) and event.request_id in self._wanted:
                began, fork = self._before(event.arrival_ns - LEAD_NS)
                self._pending.append(_Pending(event, fork, began, at))
        controller.decide(step.now_ns)
        for effect in step.effects:
            if isinstance(effect, Answer):
                for one in self._pending:
                    if one.request.request_id == effect.request_id:
                        one.good = effect.outcome is Outcome.OK

    def _before(self, at_ns: int) -> tuple[int, Controller]:
        """The last controller that is remembered from before an instant, or the first of all."""
        best = self._forks[0]
        for one in self._forks:
            if self._time_of(one) <= at_ns:
                best = one
        return best

    def _time_of(self, fork: tuple[int, Controller]) -> int:
        """When a controller that is remembered made its next step."""
        at = fork[0] - self._dropped
        return self._steps[at].now_ns if at < len(self._steps) else self._renewed_ns

    def _trim(self, now_ns: int) -> None:
        """Forget what is too old for every request that comes or is pending."""
        while len(self._forks) > 2 and self._time_of(self._forks[1]) < now_ns - 2 * LEAD_NS:
            del self._forks[0]
        oldest = min([self._forks[0][0], *[one.began for one in self._pending]])
        del self._steps[: oldest - self._dropped]
        self._dropped = oldest

    def _case(self, one: _Pending) -> RequestCase:
        steps = self._steps[one.began - self._dropped :]
        early = Scene(one.controller, steps, late_ns=self._late_ns)
        return RequestCase(one.request, early, one.arrived - one.began, good=one.good)


def cases_of(
    path: Path, wanted: Collection[str], *, tell: Tell = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[RequestCase]:  # fmt: skip
    """The requests of these ids, each in its surroundings, as they come in a journal."""
    reader = _Reader(wanted)
    left = len(wanted)
    for number, (done, record) in enumerate(read_records(path), start=1):
        for case in reader.take(record):
            left -= 1
            yield case
        if number % TELL_EVERY == 0:
            tell(done)
            if stopped() or not left:
                return
    yield from reader.finish()


def case_in(
    history: History, request_id: str, check: Callable[[], None] = lambda: None
) -> RequestCase | None:
    """A request in its surroundings, by a journal's index and checkpoints; None if the journal lacks it.

    Raises :class:`ConfigError` where what was before it is gone, or the journal is damaged.
    """
    moment = history.find(request_id)
    if moment is None:
        return None
    early = structs.replace(moment, record=max(moment.run + 1, moment.record - LEAD_RECORDS))
    try:
        controller, steps = history.controller_at(early)
    except ConfigError:  # nothing is left of the time before it
        controller, steps = history.controller_at(moment)
    reader = _Reader({request_id}, controller)
    for step in steps:
        check()
        for case in reader.take(step):
            return case
    return next(iter(reader.finish()), None)


# ------------------------------------------------------------
# The story of one request.


def explain(
    case: RequestCase, *, viewer: str | None = None, changes: Sequence[str] = (),
    check: Callable[[], None] = lambda: None, instead: Answer | None = None,
) -> Explanation:  # fmt: skip
    """Explain a request. ``viewer``: the tenant that reads it; of others it sees no names.

    ``instead`` is what the client got in place of the controller's answer, which was late at its gateway.

    With ``changes``, how it would have gone with them (``changes.asked_change``) is told, in place of
    remedies. ``check`` is called now and then, and may raise. Raises :class:`ConfigError` for changes that
    cannot be.
    """
    story = _Story(case, viewer, instead)
    if changes:
        return story.told([], story.changed(asked_change(case, changes, viewer), check))
    ended = None if story.answer is None else story.answer.outcome
    # What a gateway was late with, no choice of the controller would have changed.
    settled = instead is not None or ended in {Outcome.CANCELLED, Outcome.INVALID}
    remedies = [] if settled else _remedies(case, check)
    return story.told([story.tried(one) for one in remedies])


def _remedies(case: RequestCase, check: Callable[[], None]) -> Iterator[Remedy]:
    request = case.request
    limit_ns = case.late.steps[-1].now_ns - request.arrival_ns - NS_PER_MS
    slo = smallest_slo(case, min(limit_ns, round(SLO_TIMES * request.slo_ns)), check)
    if slo is not None:
        yield slo
    if not case.good:
        yield from other_remedies(case, check)


class _Story:
    """What happened to a request, in sentences."""

    def __init__(self, case: RequestCase, viewer: str | None, instead: Answer | None) -> None:
        self._case, self._viewer, self._instead = case, viewer, instead
        self._request = request = case.request
        self._origin_ns = request.arrival_ns
        self._mine = {
            event.model
            for step in case.early.steps
            for event in step.events
            if isinstance(event, Request) and (viewer is None or event.tenant == viewer)
        }
        self._tenants = {
            event.request_id: event.tenant
            for step in case.early.steps
            for event in step.events
            if isinstance(event, Request)
        }
        self.answer: Answer | None = None
        self.answered_ns = 0
        self._outlooks: list[Outlook] = []
        self._due_ns = 0
        self._attempts: list[Attempt] = []
        self._loads: list[str] = []
        self._walk()

    def _ms(self, at_ns: int) -> float:
        return to_ms(at_ns - self._origin_ns)

    def name(self, model: str) -> str:
        """A model's name, unless it is another tenant's."""
        hidden = self._viewer is not None and model not in self._mine
        return "another tenant's model" if hidden else model

    def _walk(self) -> None:
        """Go through the steps from its arrival to its answer, with a controller."""
        steps, request = self._case.late.steps, self._request
        controller = self._case.late.controller.fork()
        ended = {
            event.action_id: event for step in steps for event in step.events if isinstance(event, Result)
        }
        for step in steps:
            answer = next(
                (
                    one
                    for one in step.effects
                    if isinstance(one, Answer) and one.request_id == request.request_id
                ),
                None,
            )
            if not self._outlooks or (answer is not None and answer.outcome is not Outcome.OK):
                self._outlooks = controller.outlooks(request, step.now_ns)
                self._due_ns = controller.due_ns(request)
            for event in step.events:
                controller.observe(event, step.now_ns)
            controller.decide(step.now_ns)
            self._look(controller, step, ended)
            if answer is not None:
                self.answer, self.answered_ns = answer, step.now_ns
                return

    def _look(self, controller: Controller, step: Step, ended: dict[int, Result]) -> None:
        """What was sent for it in a step."""
        request = self._request
        for at, effect in enumerate(step.effects):
            if isinstance(effect, Load) and effect.model == request.model:
                result = ended.get(effect.action_id)
                until = "did not end" if result is None else f"ended at {_at(self._ms(result.ended_ns))}"
                self._loads.append(
                    f"LOAD of its weights on {effect.device} at {_at(self._ms(step.now_ns))}, {until}"
                )
            if not isinstance(effect, Infer):
                continue
            ids = [call.request_id for call in effect.calls]
            if request.request_id in ids:
                later = [
                    one.expected_ns
                    for one in step.effects[at + 1 :]
                    if isinstance(one, Infer) and one.device == effect.device
                ]
                free_ns = next(
                    (
                        one.free_ns
                        for one in controller.outlooks(request, step.now_ns)
                        if one.device == effect.device
                    ),
                    step.now_ns,
                )
                self._attempt(effect, step.now_ns, free_ns - sum(later), ended.get(effect.action_id), ids)

    def _attempt(
        self, action: Infer, sent_ns: int, planned_end_ns: int, result: Result | None, ids: list[str]
    ) -> None:
        planned = self._ms(planned_end_ns - action.expected_ns), self._ms(planned_end_ns)
        ran = result is not None and result.ended_ns > result.started_ns
        started = self._ms(result.started_ns) if result is not None and ran else None
        ended = self._ms(result.ended_ns) if result is not None and ran else None
        status = "no result" if result is None else str(result.status)
        others = [one for one in ids if one != self._request.request_id]
        mine = [one for one in others if self._viewer is None or self._tenants.get(one) == self._viewer]
        with_ = "alone" if not others else f"with {_listed(mine, len(others) - len(mine))}"
        text = (
            f"INFER on {action.device}, batch {action.batch}, {with_}: sent at {_at(self._ms(sent_ns))}, "
            f"planned {_at(planned[0])} to {_at(planned[1])}"
        )
        if started is not None and ended is not None:
            text += f", measured {_at(started)} to {_at(ended)}"
        if result is not None and result.status is not Status.OK:
            text += f"; the worker said {status}"
        self._attempts.append(
            Attempt(
                device=action.device, batch=action.batch, requests=len(ids), status=status,
                sent_ms=self._ms(sent_ns), planned_start_ms=planned[0], planned_end_ms=planned[1],
                started_ms=started, ended_ms=ended, text=text,
            )
        )  # fmt: skip

    # Words

    def _view(self, one: Outlook) -> DeviceView:
        free_ms = self._ms(one.free_ns)
        parts = [f"{one.device}: "]
        if one.sent:
            parts.append(f"its lane was taken until {_at(free_ms)} ({self._counts(one.sent, 'batch of ')}); ")
        else:
            parts.append("its lane was free; ")
        cannot = one.weights not in {"ready", "loading", "absent"}
        if cannot:
            parts.append(f"it cannot serve this model: {one.weights}")
        elif one.weights == "ready":
            parts.append("the weights were there")
        elif one.weights == "loading":
            parts.append(f"the weights were being loaded, until {_at(self._ms(one.ready_ns))}")
        else:
            parts.append(f"the weights were absent, a LOAD could end at {_at(self._ms(one.ready_ns))}")
        if one.waiting and not cannot:
            parts.append(
                f"; due before it: {self._counts(one.waiting, '')} ({to_ms(one.before_ns):.1f} ms of work)"
            )
        if not cannot:
            parts.append(f"; the soonest end was {_at(self._ms(one.end_ns))}")
        return DeviceView(
            device=one.device, weights=one.weights, free_ms=free_ms,
            ready_ms=None if cannot else self._ms(one.ready_ns), infer_ms=to_ms(one.infer_ns),
            end_ms=None if cannot else self._ms(one.end_ns), text="".join(parts),
        )  # fmt: skip

    def _counts(self, ahead: tuple[Ahead, ...], what: str) -> str:
        """``3 of a, 1 of b``."""
        named: dict[str, int] = {}
        if what:
            shown = [f"{what}{one.requests} of {self.name(one.model)}" for one in ahead[:SHOWN]]
            left = len(ahead) - SHOWN
            return ", ".join(shown) + (f", and {left} more" if left > 0 else "")
        for one in ahead:
            name = self.name(one.model)
            named[name] = named.get(name, 0) + one.requests
        shown = [f"{count} of {name}" for name, count in list(named.items())[:SHOWN]]
        left = sum(list(named.values())[SHOWN:])
        return ", ".join(shown) + (f", {left} of others" if left else "")

    def tried(self, one: Remedy) -> Tried:
        """A remedy in words."""
        page_bytes = next(
            (spec.page_bytes for each in self._case.early.controller.workers() for spec in each.devices), MIB
        )
        memory_mib = one.pages * page_bytes / MIB
        text = {
            RemedyKind.SLO: f"an SLO of {to_ms(one.slo_ns):.1f} ms or more",
            RemedyKind.DEVICE: "one device more",
            RemedyKind.MEMORY: f"{memory_mib:g} MiB more memory on each device",
            RemedyKind.MODEL: f"{self.name(one.model)} not there",
            RemedyKind.PRIORITY: f"priority {one.priority}",
        }[one.kind]
        return Tried(
            kind=one.kind, helps=one.helps, chance=one.chance,
            text=f"{text} ({one.chance:.0%})" if one.may_help else text, rests_on=one.rests_on,
            from_ms=None if one.from_ns is None else self._ms(one.from_ns),
            slo_ms=to_ms(one.slo_ns) if one.slo_ns else None,
            memory_mib=memory_mib if one.pages else None, model=self.name(one.model) if one.model else None,
            priority=one.priority or None,
        )  # fmt: skip

    def changed(self, asked: AskedChange, check: Callable[[], None]) -> Changed:
        """How it goes with a change."""
        request_id, change = self._request.request_id, asked.change
        plays: list[PlayedScene] = []
        for seed in range(LUCKS):
            check()
            plays.append(play(asked.scene, change, until=request_id, seed=seed))
            if plays[0].from_ns is None:
                break  # there is nothing that luck could change
        goods = [one.good(request_id) for one in plays]
        alike = max(goods.count(True), goods.count(False))
        first = plays[goods.index(goods.count(True) == alike)]
        at_ns, answer = first.answers.get(request_id, (0, None))
        deadline_ns = change.edits.get(request_id, {}).get("deadline_ns", self._request.deadline_ns)
        if answer is None:
            how = "it gets no answer within what was recorded"
        elif answer.outcome is Outcome.OK:
            left = to_ms(deadline_ns - at_ns)
            how = f"met at {_at(self._ms(at_ns))}, {left:.1f} ms before its deadline"
        else:
            how = f"{_ENDED[answer.outcome].lower()} at {_at(self._ms(at_ns))}{_why(answer)}"
        rests_on = first.rests_on(request_id)
        from_ms = None if first.from_ns is None else self._ms(first.from_ns)
        text = f"With {asked.text}: {how}; "
        text += "nothing is different" if from_ms is None else f"different from {_at(from_ms)} on"
        text += f"; its duration rests on {_RESTS[rests_on]}" if rests_on else ""
        text += f"; so in {alike} of {len(plays)} tries" if alike < len(plays) else ""
        return Changed(
            change=asked.text, outcome="open" if answer is None else str(answer.outcome),
            reason="" if answer is None else str(answer.reason),
            message="" if answer is None else answer.message,
            after_ms=None if answer is None else self._ms(at_ns), deadline_ms=self._ms(deadline_ns),
            from_ms=from_ms, rests_on=rests_on, alike=alike, tries=len(plays), text=f"{text}.",
        )  # fmt: skip

    def _sentence(self) -> str:
        request, answer = self._request, self.answer
        slo = f"{plain(round(to_ms(request.slo_ns), 3))} ms"
        if answer is None:
            return f"It has no answer in this journal; its SLO was {slo}."
        after = f"{self._ms(self.answered_ns):.1f} ms after it came"
        if answer.outcome is Outcome.OK:
            last = self._attempts[-1] if self._attempts else None
            where = "" if last is None else f", on {last.device} in a batch of {last.requests}"
            cold = ", once its weights were loaded" if answer.cold else ""
            ready = f"ts answer was ready {after}{where}{cold}; its SLO was {slo}"
            if self._instead is None:
                return f"I{ready}."
            return (
                f"{_ENDED[self._instead.outcome]}{_why(self._instead)}: i{ready}, and its gateway was late."
            )
        return f"{_ENDED[answer.outcome]} {after}{_why(answer)}; its SLO was {slo}."

    def told(self, tried: list[Tried], changed: Changed | None = None) -> Explanation:
        """The whole."""
        request, answer = self._request, self.answer
        ended = self._instead or answer
        views = [self._view(one) for one in self._outlooks]
        helped = [one.text for one in tried if one.helps]
        may_help = [one.text for one in tried if not one.helps and one.chance >= UNLIKELY]
        not_helped = [one.text for one in tried if one.chance < UNLIKELY]
        lines = [self._sentence()]
        when = "when it came" if self._case.good else "when that was decided"
        if views:
            due = f"it had to end by {_at(self._ms(self._due_ns))}"
            lines.append(f"As the controller believed {when}, {due}:")
            lines += [f"  {view.text}" for view in views]
        lines += [f"{one}" for one in self._loads]
        lines += [one.text for one in self._attempts]
        if helped:
            start = "It is met with" if self._case.good else "Answered, if:"
            lines.append(f"{start} {'; or '.join(helped)}.")
        if may_help:
            lines.append(f"Perhaps, depending on how long things take: {'; or '.join(may_help)}.")
        if not self._case.good and tried and not helped and not may_help:
            lines.append("Nothing that was tried would have helped.")
        if not_helped:
            lines.append(f"Not helped by: {'; '.join(not_helped)}.")
        guessed = [one.text for one in tried if one.helps and one.rests_on == EXPECTED]
        if guessed:
            lines.append(
                f"Of {', '.join(guessed)}: nothing like it was measured nearby, so it rests on estimates."
            )
        if changed is not None:
            lines.append(changed.text)
        return Explanation(
            request_id=request.request_id, model=request.model, tenant=request.tenant,
            priority=request.priority or USUAL_PRIORITY, slo_ms=to_ms(request.slo_ns),
            outcome="open" if ended is None else str(ended.outcome),
            reason="" if ended is None else str(ended.reason),
            message="" if ended is None else ended.message, after_ms=self._ms(self.answered_ns),
            sentence=lines[0], devices=tuple(views), attempts=tuple(self._attempts), remedies=tuple(tried),
            changed=changed, lines=tuple(lines),
        )  # fmt: skip


_ENDED: Final = {
    Outcome.REJECTED: "Refused", Outcome.EXPIRED: "Not answered in time",
    Outcome.CANCELLED: "Cancelled", Outcome.FAILED: "Failed", Outcome.INVALID: "Invalid",
}  # fmt: skip
_RESTS: Final = {
    RECORDED: "what was recorded", NEARBY: "what was measured nearby",
    EXPECTED: "estimates, for nothing like it was measured",
}  # fmt: skip


def _why(answer: Answer) -> str:
    """`` (would_miss_deadline): the deadline would be missed by ...``."""
    reason = f" ({answer.reason.value})" if answer.reason is not Reason.NONE else ""
    return f"{reason}: {answer.message}" if answer.message else reason


def _at(ms: float) -> str:
    return f"{ms:+.1f} ms"


def _listed(ids: list[str], hidden: int) -> str:
    shown = ", ".join(ids[:SHOWN])
    more = len(ids) - SHOWN
    parts = [shown] if shown else []
    if more > 0:
        parts.append(f"{more} more")
    if hidden:
        parts.append(f"{hidden} of other tenants")
    return ", ".join(parts)
