"""Why many requests were refused, late or slow: counted by cause from a journal, and tried on a sample.

Causes follow from what was recorded, the first that fits: a quota or limit, a fault, memory (no device had
the weights when it came), estimates (it was sent, and ended later than planned), compute (all else). What
would have helped is found for a sample by playing it again (``explain``).
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import mean, median
from typing import Final

from msgspec import Struct

from clockwork_serve.messages import (
    Answer,
    ControllerEffect,
    ControllerEvent,
    Infer,
    ModelRemoved,
    Outcome,
    Reason,
    Request,
    WorkerHung,
    WorkerLost,
    WorkerSilent,
)
from clockwork_serve.sim.explain import TELL_EVERY, Explanation, Tell, cases_of, explain
from clockwork_serve.sim.remedies import RemedyKind
from clockwork_serve.sim.tally import ReadyWeights
from clockwork_serve.telemetry import JournalHead, Step, read_records
from clockwork_serve.units import NS_PER_S, to_ms

FAULT_NS: Final = NS_PER_S // 2
"""A fault is the cause of what came so long after it at most."""
SAMPLE: Final = 20
"""So many requests of all are tried."""
NAMED: Final = 5
"""Models and faults that are named."""
NEAREST: Final = 3
LOOKED_AT_MAX: Final = 100_000
"""Ids among which those nearest to an unknown one are looked for."""

Taken = tuple[int, Request, Answer, int, bool, bool]
"""(run, request, answer, when it was answered, no device had its weights when it came, it was sent)."""


class Which(enum.StrEnum):
    """Which requests are asked about."""

    REFUSED = "refused"
    """And those that failed, which are counted apart from them."""
    LATE = "late"
    SLOW = "slow"
    """Answered in time, after more than half of the SLO."""


class SurveyCause(enum.StrEnum):
    """Why a request was not answered well, or slowly."""

    FAULT = "faults"
    LIMIT = "limits"
    MEMORY = "memory"
    ESTIMATE = "estimates"
    COMPUTE = "compute"


class Saved(Struct, frozen=True, kw_only=True):
    """How many of a sample a kind of remedy would have met."""

    kind: RemedyKind
    met: int
    tried: int


class SurveyReport(Struct, frozen=True, kw_only=True):
    """All that is said; ``lines`` are what people read."""

    which: Which
    requests: int
    chosen: int
    causes: dict[str, int]
    models: dict[str, int]
    sample: tuple[str, ...]
    saved: tuple[Saved, ...]
    lines: tuple[str, ...]


class _Open:
    """A request without an answer."""

    __slots__ = ("cold", "request", "sent")

    def __init__(self, request: Request, *, cold: bool) -> None:
        self.request = request
        self.cold = cold
        self.sent = False


class _Survey:
    """Reads steps, and keeps the requests that are asked about."""

    def __init__(self, which: Which, tenant: str | None) -> None:
        self._which, self._tenant = which, tenant
        self.run = 0
        self.now_ns = 0
        self.began_ns: dict[int, int] = {}
        """By run, when its first step was."""
        self.answered: list[tuple[int, int]] = []
        """(run, when) of all answers."""
        self.taken: list[Taken] = []
        self.faults: list[tuple[int, int, str]] = []
        """(run, when, what)."""
        self._open: dict[str, _Open] = {}
        self._weights = ReadyWeights()

    def head(self) -> None:
        """A run begins."""
        self.run += 1
        self._open.clear()
        self._weights = ReadyWeights()

    def step(self, step: Step) -> None:
        """Read one step."""
        self.now_ns = step.now_ns
        self.began_ns.setdefault(self.run, step.now_ns)
        for event in step.events:
            self._event(event, step.now_ns)
        self._weights.on_step(step.events, step.effects)
        for effect in step.effects:
            self._effect(effect, step.now_ns)

    def _event(self, event: ControllerEvent, now_ns: int) -> None:
        if isinstance(event, Request):
            self._open[event.request_id] = _Open(event, cold=not self._weights.devices.get(event.model))
        elif isinstance(event, WorkerLost | WorkerSilent):
            what = "lost" if isinstance(event, WorkerLost) else "silent"
            self.faults.append((self.run, now_ns, f"worker {event.worker} {what}"))
        elif isinstance(event, ModelRemoved):
            self.faults.append((self.run, now_ns, f"model {event.model} removed"))

    def _effect(self, effect: ControllerEffect, now_ns: int) -> None:
        if isinstance(effect, Answer):
            found = self._open.pop(effect.request_id, None)
            if found is None or self._tenant not in {None, found.request.tenant}:
                return
            self.answered.append((self.run, now_ns))
            if self._asked(found.request, effect, now_ns):
                self.taken.append((self.run, found.request, effect, now_ns, found.cold, found.sent))
        elif isinstance(effect, Infer):
            for call in effect.calls:
                if (asked := self._open.get(call.request_id)) is not None:
                    asked.sent = True
        elif isinstance(effect, WorkerHung) and effect.why:
            self.faults.append((self.run, now_ns, f"worker {effect.worker} hung"))

    def _asked(self, request: Request, answer: Answer, now_ns: int) -> bool:
        if self._which is Which.REFUSED:
            return answer.outcome in {Outcome.REJECTED, Outcome.FAILED}
        if self._which is Which.LATE:
            return answer.outcome is Outcome.EXPIRED
        return answer.outcome is Outcome.OK and now_ns - request.arrival_ns > request.slo_ns // 2

    def cause(self, taken: Taken) -> tuple[SurveyCause, str]:
        """Why one was not answered well, and what names it: a fault, a reason, a model."""
        run, request, answer, now_ns, cold, sent = taken
        if answer.reason in {Reason.TENANT_QUOTA, Reason.QUEUE_FULL, Reason.DRAINING}:
            return SurveyCause.LIMIT, answer.reason.value
        for when, at_ns, what in self.faults:
            if when == run and at_ns <= now_ns and request.arrival_ns - at_ns < FAULT_NS:
                return SurveyCause.FAULT, what
        if answer.outcome is Outcome.FAILED or answer.reason is Reason.NOT_SERVING:
            return SurveyCause.FAULT, answer.reason.value
        if cold:
            return SurveyCause.MEMORY, request.model
        if sent and answer.outcome is Outcome.EXPIRED:
            return SurveyCause.ESTIMATE, request.model
        return SurveyCause.COMPUTE, request.model


def survey(
    path: Path, which: Which, *, since_ns: int | None = None, tenant: str | None = None,
    sample: int = SAMPLE, tell: Tell = lambda done: None, stopped: Callable[[], bool] = lambda: False,
    check: Callable[[], None] = lambda: None,
) -> SurveyReport:  # fmt: skip
    """Count by cause the requests of a journal, or of its last ``since_ns``, and try remedies on a sample."""
    found = _Survey(which, tenant)
    for number, (done, record) in enumerate(read_records(path), start=1):
        if isinstance(record, JournalHead):
            found.head()
        elif isinstance(record, Step):
            found.step(record)
        if number % TELL_EVERY == 0:
            tell(done)
            check()
    from_ns = None if since_ns is None else found.now_ns - since_ns
    chosen = [one for one in found.taken if from_ns is None or (one[0] == found.run and one[3] >= from_ns)]
    answered = sum(from_ns is None or (run == found.run and at >= from_ns) for run, at in found.answered)
    step = max(1, len(chosen) // sample)
    ids = [one[1].request_id for one in chosen[::step][:sample]]
    told = [explain(case, viewer=tenant, check=check) for case in cases_of(path, ids, stopped=stopped)]
    return _report(found, which, chosen, answered, told)


def _report(
    found: _Survey, which: Which, chosen: Sequence[Taken], answered: int, told: Sequence[Explanation]
) -> SurveyReport:
    causes: Counter[SurveyCause] = Counter()
    names: dict[SurveyCause, Counter[str]] = {}
    models: Counter[str] = Counter()
    seconds: Counter[tuple[int, int]] = Counter()
    for one in chosen:
        cause, name = found.cause(one)
        causes[cause] += 1
        names.setdefault(cause, Counter())[name] += 1
        models[one[1].model] += 1
        if cause is SurveyCause.COMPUTE:
            run, _, _, at_ns, *_ = one
            seconds[run, (at_ns - found.began_ns[run]) // NS_PER_S] += 1
    failed = sum(one[2].outcome is Outcome.FAILED for one in chosen)
    also = f", and {failed:,} failed" if failed else ""
    lines = [f"{len(chosen) - failed:,} of {answered:,} requests were {which.value}{also}."]
    for cause, count in causes.most_common():
        named = ", ".join(f"{name} {many:,}" for name, many in names[cause].most_common(NAMED))
        text = f"  {cause.value}: {count:,} ({named}{', ...' if len(names[cause]) > NAMED else ''})"
        if cause is SurveyCause.COMPUTE:
            (run, second), many = seconds.most_common(1)[0]
            the_run = "the run" if len(found.began_ns) == 1 else f"run {run}"
            text += f"; most in second {second} of {the_run}: {many:,}"
        lines.append(text)
    ran = [one[2] for one in chosen if one[2].batch]
    if which is Which.SLOW and ran:
        waited = to_ms(round(mean([one.queue_ns for one in ran])))
        lasted = to_ms(round(mean([one.exec_ns for one in ran])))
        lines.append(f"In the mean they waited for {waited:.1f} ms and ran for {lasted:.1f} ms.")
    saved = _saved(told)
    if saved:
        lines.append(f"Of a sample of {len(told)}, these would have been met with:")
        lines += [f"  {_KINDS[one.kind]}: {one.met} of {one.tried}" for one in saved]
    slos = [one.slo_ms / each.slo_ms for each in told for one in each.remedies if one.slo_ms]
    if slos:
        lines.append(f"In the median they are met from an SLO of {median(slos):.2f} times theirs on.")
    return SurveyReport(
        which=which, requests=answered, chosen=len(chosen),
        causes={cause.value: count for cause, count in causes.items()},
        models=dict(models.most_common(NAMED)), sample=tuple([one.request_id for one in told]),
        saved=tuple(saved), lines=tuple(lines),
    )  # fmt: skip


_KINDS: Final = {
    RemedyKind.SLO: "a longer SLO", RemedyKind.DEVICE: "one device more",
    RemedyKind.MEMORY: "more memory", RemedyKind.MODEL: "another model not there",
    RemedyKind.PRIORITY: "a higher priority",
}  # fmt: skip


def _saved(told: Sequence[Explanation]) -> list[Saved]:
    refused = [one for one in told if one.outcome != Outcome.OK]
    return [
        Saved(
            kind=kind, tried=len(refused),
            met=sum(any(one.kind is kind and one.helps for one in each.remedies) for each in refused),
        )
        for kind in RemedyKind
        if refused
    ]  # fmt: skip


def nearest_ids(path: Path, request_id: str) -> list[str]:
    """Ids in a journal that are most like one that is not."""
    known: list[str] = []
    for _, record in read_records(path):
        if isinstance(record, Step):
            known += [one.request_id for one in record.events if isinstance(one, Request)]
        if len(known) >= LOOKED_AT_MAX:
            break
    alike = [one for one in known if abs(len(one) - len(request_id)) <= 1]
    return get_close_matches(request_id, alike, n=NEAREST, cutoff=0.5)
