"""A journal as a timeline for Perfetto's page: actions measured and predicted, requests, queues, refusals.

Records are read one by one, and what is over is written at once: memory holds what is open, and the tracks of
devices and models.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    Action,
    AdmissionReply,
    Answer,
    CodeReady,
    Drain,
    GatewayLost,
    Infer,
    Load,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Quarantined,
    Readiness,
    Request,
    Result,
    Status,
    Unload,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry.following import read_records
from clockwork_serve.telemetry.in_flight import (
    NEVER_NS,
    SentAction,
    SentActions,
    title_of,
    told_of_action,
    told_of_answer,
    told_of_request,
)
from clockwork_serve.telemetry.journal import JournalHead, Step, Torn, journal_files
from clockwork_serve.telemetry.perfetto import BY_NAME, BY_RANK, Args, SliceRows, StateTrack, TraceFile
from clockwork_serve.units import NS_PER_S, to_ms

TELL_EVERY: Final = 1024
"""Records between two reports of progress."""


class TimelineReport(Struct, kw_only=True):
    """What a timeline holds: slices of ``requests``, of which some were ``refused``, and of ``actions``.

    ``seconds``: how much of the journal was read, with ``runs`` of a controller. ``unmatched``: results and
    answers to what it does not hold. ``missing_steps`` were never written, the last ``torn_bytes`` neither,
    for who wrote it was killed. ``cut``: it was stopped before the end.
    """

    runs: int = 0
    seconds: float = 0.0
    requests: int = 0
    refused: int = 0
    actions: int = 0
    unmatched: int = 0
    missing_steps: int = 0
    torn_bytes: int = 0
    cut: bool = False


class _Asked:
    """A request without an answer, and later as long as an INFER that it was in has no result."""

    __slots__ = ("answered_ns", "flow", "held", "ran", "request")

    def __init__(self, request: Request, flow: int) -> None:
        self.request = request
        self.flow = flow  # 0: none is drawn
        self.held: SentAction[_Asked] | None = None  # the INFER that it is in
        self.ran = False  # the flow leads through an INFER
        self.answered_ns = NEVER_NS


_Sent = SentAction[_Asked]


class _LaneRows:
    """The tracks of a lane: what was measured, and what was predicted."""

    def __init__(self, file: TraceFile, name: str, devices: int, rank: int) -> None:
        self.measured = SliceRows(file, name, devices, rank)
        self.predicted = SliceRows(file, f"{name}, predicted", devices, rank + 1)


class Timeline:
    """Draws the records of a journal, in their order, and counts in ``report`` what it drew.

    What lies before ``since_ns`` or after ``until_ns`` is left out; both count from the first step.
    """

    def __init__(self, file: TraceFile, since_ns: int = 0, until_ns: int | None = None) -> None:
        self.report = TimelineReport()
        self._file = file
        self._since_ns, self._until_ns = since_ns, until_ns
        self._began_ns: int | None = None
        self._now_ns = 0
        self._head: JournalHead | None = None  # of a run whose first step is to come
        self._flows = 0
        self._asked: dict[str, _Asked] = {}
        self._sent = SentActions[_Asked]()
        self._waiting: dict[str, int] = {}  # by model, requests that are in no INFER, if there are any
        self._shown: dict[str, int] = {}  # what was drawn of that
        self._moved: dict[str, None] = {}  # models of which that changed in this step
        self._notes: dict[tuple[int, str, str], tuple[dict[str, Any], list[int]]] = {}  # of this step
        self._lost_gateways: set[str] = set()  # of this step
        # The page shows these four in the order of their names.
        self._lanes = file.track("devices", ordering=BY_RANK)
        self._refusals = file.track("refusals", ordering=BY_NAME)
        self._models = file.track("requests", ordering=BY_NAME)
        self._server = file.track("server", ordering=BY_RANK)
        self._ready = StateTrack(file, "readiness", self._server, 1)
        self._events = file.track("events", self._server, rank=2)
        self._devices: dict[str, tuple[_LaneRows, _LaneRows]] = {}
        self._reasons: dict[str, int] = {}
        self._model_tracks: dict[str, tuple[int, SliceRows, int]] = {}
        self._workers: dict[str, StateTrack] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            Request: self._on_request, Answer: self._on_answer, AdmissionReply: self._on_admission_reply,
            Infer: self._on_action, Load: self._on_action, Unload: self._on_action, Result: self._on_result,
            WorkerJoined: self._on_worker_joined, WorkerLost: self._on_worker_lost,
            WorkerHung: self._on_worker_hung, GatewayLost: self._on_gateway_lost,
            Readiness: self._on_readiness, CodeReady: self._on_code_ready, Quarantined: self._on_quarantined,
            ModelAdded: lambda event: self._note(self._events, "model added", {"model": event.model.key}),
            ModelRemoved: lambda event: self._note(self._events, "model removed", {"model": event.model}),
            Drain: lambda event: self._note(self._events, "drain", {}),
        }  # fmt: skip

    @property
    def over(self) -> bool:
        """Whether nothing follows that is to be drawn."""
        return self._file.past(self._now_ns) and not self._asked and not self._sent

    def take(self, record: JournalHead | Step | Torn) -> None:
        """Draw the next record."""
        if isinstance(record, Step):
            self._step(record)
        elif isinstance(record, Torn):
            self.report.torn_bytes += record.missing_bytes
        elif not record.continues:
            self._end_run("its controller died")
            self._head = record
            self.report.runs += 1

    def close(self) -> None:
        """Draw what is open when the journal ends."""
        self._end_run("")
        self._end_actions()
        self._file.flush()
        if self._began_ns is not None:
            self.report.seconds = (self._now_ns + self._file.offset_ns - self._began_ns) / NS_PER_S

    def _step(self, step: Step) -> None:
        if self._head is not None or self._began_ns is None:
            self._begin_run(step.now_ns)
        self._now_ns = step.now_ns
        if step.dropped:
            self.report.missing_steps += step.dropped
            self._note(self._events, "steps are missing", {"steps": step.dropped})
        handlers = self._handlers
        for message in (*step.events, *step.effects):
            if (handler := handlers.get(type(message))) is not None:
                handler(message)
        if self._lost_gateways:
            for asked in [one for one in self._asked.values() if one.request.gateway in self._lost_gateways]:
                self._end_request(asked, Outcome.CANCELLED, {"message": "its gateway was lost"})
            self._lost_gateways.clear()
        self._end_step()

    def _end_step(self) -> None:
        if self._moved:
            self._count_waiting()
        for (track, name, kind), (args, flows) in self._notes.items():
            if len(flows) > 1:
                args["times"] = len(flows)
            self._file.instant(track, name, kind, self._now_ns, args, [flow for flow in flows if flow])
        self._notes.clear()

    def _note(self, track: int, name: str, args: Args, kind: str = "event", flow: int = 0) -> None:
        """Something at this instant: once, if it happens many times, else they would lie on a pile."""
        if flow or self._file.covers(self._now_ns, self._now_ns):
            self._notes.setdefault((track, name, kind), (dict(args), []))[1].append(flow)

    def _begin_run(self, now_ns: int) -> None:
        """Its first step; where the clock began anew, the run is drawn a second after the one before."""
        file, head = self._file, self._head
        if self._began_ns is None:
            self._began_ns = now_ns
            file.since_ns = now_ns + self._since_ns
            file.until_ns = NEVER_NS if self._until_ns is None else now_ns + self._until_ns
            if head is not None and head.started:
                with suppress(ValueError):
                    file.clock(now_ns, datetime.fromisoformat(head.started))
        elif now_ns < self._now_ns:
            self._end_actions()
            file.offset_ns += self._now_ns + NS_PER_S - now_ns
        if head is not None:
            self._now_ns = now_ns
            named = {"version": head.version, "policy": str(head.config.get("policy", ""))}
            self._note(self._events, "controller started", named)
        self._head = None

    def _end_run(self, why: str) -> None:
        """Nobody answers its requests any more; its actions go on, and a next controller gets the results."""
        for asked in list(self._asked.values()):
            self._end_request(asked, "open", {"message": why} if why else {}, answered=False)
        for state in (self._ready, *self._workers.values()):
            state.become("", self._now_ns)
        self._end_step()

    def _end_actions(self) -> None:
        for sent in self._sent.end():
            self._draw_unmeasured(sent, "no result")

    # Requests

    def _on_request(self, request: Request) -> None:
        if not self._file.past(self._now_ns):
            self._flows += 1
            self._asked[request.request_id] = _Asked(request, self._flows)
            self._wait(request.model, 1)

    def _wait(self, model: str, change: int) -> None:
        self._waiting[model] = self._waiting.get(model, 0) + change
        self._moved[model] = None

    def _on_answer(self, answer: Answer) -> None:
        asked = self._asked.get(answer.request_id)
        if asked is None:
            self.report.unmatched += not self._file.past(self._now_ns)
            return
        self._end_request(asked, answer.outcome, told_of_answer(answer))

    def _end_request(self, asked: _Asked, outcome: str, found: Args, *, answered: bool = True) -> None:
        """Draw it from its arrival until now; a flow leads through its INFERs to its answer or refusal."""
        request, now_ns, file = asked.request, self._now_ns, self._file
        del self._asked[request.request_id]
        asked.answered_ns = now_ns
        if asked.held is None:
            self._wait(request.model, -1)
        covered = file.covers(request.arrival_ns, now_ns)
        if not covered or not (answered or asked.ran):
            asked.flow = 0
        if not covered:
            return
        self.report.requests += 1
        name = f"{outcome}: {found['reason']}" if "reason" in found else outcome
        _, rows, answers = self._model(request.model)
        args = {**told_of_request(request, outcome, now_ns), **found}
        flows = [asked.flow] if asked.flow else []
        rows.slice(name, "request", request.arrival_ns, now_ns, args, flows)
        ending = {"request": request.request_id}
        if answered and outcome != Outcome.OK:
            self.report.refused += 1
            ending["model"] = request.model
            self._note(self._reason(name), name, ending, "refusal", asked.flow)
        elif asked.flow:
            self._note(answers, "answer" if answered else "no answer", ending, "answer", asked.flow)

    def _on_admission_reply(self, reply: AdmissionReply) -> None:
        """Who is refused before the body is there never becomes a request."""
        if reply.reason:
            name = f"{Outcome.REJECTED}: {reply.reason}"
            self._note(self._reason(name), f"{name}, by query", {"query": reply.announced_id}, "refusal")

    def _reason(self, name: str) -> int:
        """The track of the refusals for that reason."""
        track = self._reasons.get(name)
        if track is None:
            track = self._reasons[name] = self._file.track(name, self._refusals)
        return track

    def _model(self, key: str) -> tuple[int, SliceRows, int]:
        """A model's tracks: the counter of waiting requests, requests, answers."""
        tracks = self._model_tracks.get(key)
        if tracks is None:
            file, group = self._file, self._file.track(key, self._models, ordering=BY_RANK)
            waiting = file.track("waiting", group, rank=1, unit="requests")
            answers = file.track("answers", group, rank=3)
            tracks = self._model_tracks[key] = (waiting, SliceRows(file, "requests", group, 2), answers)
        return tracks

    def _count_waiting(self) -> None:
        """Draw the length of each queue that is another after this step."""
        now_ns, shown, waiting = self._now_ns, self._shown, self._waiting
        if self._file.covers(now_ns, now_ns):
            # The first time, also what waited already: the file may begin in the midst of it.
            for model in self._moved if shown else {**self._moved, **waiting}:
                count = waiting[model]
                if shown.get(model, 0) != count:
                    shown[model] = count
                    self._file.count(self._model(model)[0], now_ns, count)
        for model in self._moved:
            if not waiting[model]:
                del waiting[model]
        self._moved.clear()

    # Actions

    def _on_action(self, action: Action) -> None:
        now_ns = self._now_ns
        if self._file.past(now_ns):
            return
        calls = action.calls if isinstance(action, Infer) else ()
        asked = [one for call in calls if (one := self._asked.get(call.request_id)) is not None]
        sent = self._sent.send(action, now_ns, asked)
        for one in asked:
            if one.held is None:
                self._wait(one.request.model, -1)
            one.held = sent
        if not isinstance(action, Unload):
            end_ns = sent.start_ns + sent.expected_ns
            args = {"action": action.action_id}
            self._rows(action).predicted.slice(title_of(action), "prediction", sent.start_ns, end_ns, args)

    def _on_result(self, result: Result) -> None:
        sent = self._sent.ended(result)
        if sent is None:
            self.report.unmatched += not self._file.past(self._now_ns)
            return
        self._release(sent)
        title, args = title_of(sent.action), told_of_action(sent, result.started_ns)
        if result.status is not Status.OK:
            title = f"{title}: {result.status}"
            args |= {"status": result.status, "message": result.message}
        elif isinstance(sent.action, Infer):
            args |= {
                "input_ms": to_ms(result.input_ns), "run_ms": to_ms(result.run_ns),
                "output_ms": to_ms(result.output_ns),
            }  # fmt: skip
        if result.once_ns:
            args["once_ms"] = to_ms(result.once_ns)
        self._draw_action(sent, title, result.started_ns, result.ended_ns, args)

    def _draw_unmeasured(self, sent: _Sent, why: str) -> None:
        """An action of which it is known now that no result comes."""
        self._release(sent)
        args = told_of_action(sent, self._now_ns)
        self._draw_action(sent, f"{title_of(sent.action)}: {why}", NEVER_NS, self._now_ns, args)

    def _draw_action(self, sent: _Sent, title: str, start_ns: int, end_ns: int, args: Args) -> None:
        """An action from its start; one that had none is drawn at its end, and no flow leads through it."""
        from_ns = min(start_ns, end_ns)
        if not self._file.covers(from_ns, end_ns):
            return
        self.report.actions += 1
        flows = []
        for asked in sent.asked:
            # Its flow may have ended before, or may yet end before, if the worker's clock is ahead.
            if asked.flow and start_ns <= self._now_ns and start_ns < asked.answered_ns:
                asked.ran = True
                flows.append(asked.flow)
        self._rows(sent.action).measured.slice(title, "action", from_ns, end_ns, args, flows)

    def _release(self, sent: _Sent) -> None:
        """What it held waits again, but what is over."""
        for asked in sent.asked:
            if asked.held is sent:
                if asked.answered_ns == NEVER_NS:
                    self._wait(asked.request.model, 1)
                asked.held = None

    # Workers, gateways, the server

    def _rows(self, action: Action) -> _LaneRows:
        lanes = self._devices.get(action.device)
        if lanes is None:
            rank = 4 * len(self._devices) + 1
            exec_ = _LaneRows(self._file, f"{action.device} exec", self._lanes, rank)
            lanes = exec_, _LaneRows(self._file, f"{action.device} load", self._lanes, rank + 2)
            self._devices[action.device] = lanes
        return lanes[0] if isinstance(action, Infer) else lanes[1]

    def _worker(self, name: str) -> StateTrack:
        found = self._workers.get(name)
        if found is None:
            found = self._workers[name] = StateTrack(self._file, f"worker {name}", self._server, 3)
        return found

    def _on_worker_joined(self, event: WorkerJoined) -> None:
        """What an earlier controller sent it, and it is not running, it has told that one, or never did."""
        devices = ", ".join(spec.device for spec in event.devices)
        self._worker(event.worker).become("up", self._now_ns, {"devices": devices})
        for sent in self._sent.joined(event):
            self._draw_unmeasured(sent, "no result")

    def _on_worker_lost(self, event: WorkerLost) -> None:
        self._worker(event.worker).become("lost", self._now_ns)
        for sent in self._sent.lost(event):
            ran = sent.action.action_id in (event.running or ())
            self._draw_unmeasured(sent, "running when its worker was lost" if ran else "worker lost")

    def _on_worker_hung(self, effect: WorkerHung) -> None:
        """What a hung worker holds is planned anew."""
        name = "hung" if effect.why else "up"
        args = {"message": effect.why} if effect.why else {}
        self._worker(effect.worker).become(name, self._now_ns, args)
        for sent in self._sent.of(effect.worker) if effect.why else ():
            self._release(sent)

    def _on_gateway_lost(self, event: GatewayLost) -> None:
        self._lost_gateways.add(event.gateway)
        self._note(self._events, "gateway lost", {"gateway": event.gateway})

    def _on_readiness(self, effect: Readiness) -> None:
        name = "ready" if effect.ready else "not ready"
        self._ready.become(name, self._now_ns, {"message": effect.why} if effect.why else {})

    def _on_code_ready(self, event: CodeReady) -> None:
        if not event.ok:
            args = {"device": event.device, "message": event.message}
            self._note(self._events, "code not prepared", args)

    def _on_quarantined(self, effect: Quarantined) -> None:
        args = {"model": effect.model}
        if effect.why:
            args["message"] = effect.why
        self._note(self._events, "quarantine" if effect.why else "quarantine ended", args)


def draw_timeline(
    path: Path,
    out: IO[bytes],
    *,
    since_ns: int = 0,
    until_ns: int | None = None,
    tell: Callable[[int, int], None] = lambda done_bytes, requests: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TimelineReport:
    """Write to ``out`` what a journal holds; ``since_ns`` and ``until_ns`` count from its first step.

    ``tell`` is called with the bytes read and the requests drawn. If ``stopped``, the file is whole as far as
    it goes. Raises :class:`ConfigError` where there is no journal.
    """
    if not journal_files(path):
        raise ConfigError(f"journal: expected a file that `--journal` wrote; found nothing at {path}")
    timeline = Timeline(TraceFile(out), since_ns, until_ns)
    report = timeline.report
    try:
        for number, (done_bytes, record) in enumerate(read_records(path), start=1):
            timeline.take(record)
            if number % TELL_EVERY == 0:
                tell(done_bytes, report.requests)
                report.cut = stopped()
            if report.cut or timeline.over:
                break
    except msgspec.DecodeError as error:
        raise ConfigError(f"journal: {path} is none, or of another version of clockwork: {error}") from None
    timeline.close()
    return report
