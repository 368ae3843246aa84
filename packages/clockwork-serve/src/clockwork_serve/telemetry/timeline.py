"""A journal as a timeline for Perfetto's page: actions measured and predicted, requests, queues, refusals.

Records are read one by one, and what is over is written at once: memory holds what is open, and the tracks of
devices and models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

from msgspec import Struct

from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    CodeReady,
    Drain,
    Infer,
    Lane,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Quarantined,
    Readiness,
    Result,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.telemetry.following import read_records
from clockwork_serve.telemetry.in_flight import (
    NEVER_NS,
    Told,
    title_of,
    told_of_action,
    told_of_answer,
    told_of_request,
    told_of_transfers,
)
from clockwork_serve.telemetry.journal import JournalHead, journal_bytes
from clockwork_serve.telemetry.perfetto import BY_NAME, BY_RANK, Args, SliceRows, StateTrack, TraceFile
from clockwork_serve.telemetry.tracks import OPEN, AskedAction, OpenRequest, Tracks
from clockwork_serve.units import NS_PER_S, to_ms

TELL_EVERY: Final = 1024  # records between two reports of progress


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


class _LaneRows:
    """What a lane was measured and predicted to do."""

    def __init__(self, file: TraceFile, name: str, devices: int, rank: int) -> None:
        self.measured = SliceRows(file, name, devices, rank)
        self.predicted = SliceRows(file, f"{name}, predicted", devices, rank + 1)


class Timeline(Tracks):
    """Draws the records of a journal, in their order, and counts in ``report`` what it drew.

    What lies before ``since_ns`` or after ``until_ns`` is left out; both count from the first step.
    """

    def __init__(self, file: TraceFile, since_ns: int = 0, until_ns: int | None = None) -> None:
        super().__init__()
        self.report = TimelineReport()
        self._file = file
        self._since_ns, self._until_ns = since_ns, until_ns
        self._shown: dict[str, int] = {}  # what was drawn of ``waiting``
        self._notes: dict[tuple[int, str, str], tuple[dict[str, Any], list[int]]] = {}  # of this step
        # The page shows these four in the order of their names.
        self._devices = file.track("devices", ordering=BY_RANK)
        self._refusals = file.track("refusals", ordering=BY_NAME)
        self._models = file.track("requests", ordering=BY_NAME)
        self._server = file.track("server", ordering=BY_RANK)
        self._ready = StateTrack(file, "readiness", self._server, 1)
        self._events = file.track("events", self._server, rank=2)
        self._rows: dict[str, dict[Lane, _LaneRows]] = {}
        self._reasons: dict[str, int] = {}
        self._model_tracks: dict[str, tuple[int, SliceRows, int]] = {}
        self._workers: dict[str, StateTrack] = {}
        self.handlers |= {
            AdmissionReply: self._on_admission_reply, Readiness: self._on_readiness,
            CodeReady: self._on_code_ready, Quarantined: self._on_quarantined,
            ModelAdded: lambda event: self._note(self._events, "model added", {"model": event.model.key}),
            ModelRemoved: lambda event: self._note(self._events, "model removed", {"model": event.model}),
            Drain: lambda event: self._note(self._events, "drain", {}),
        }  # fmt: skip

    @property
    def over(self) -> bool:
        """Whether nothing follows that is to be drawn."""
        return self.past() and not self.open

    def past(self) -> bool:
        """Whether what begins now is not to be drawn."""
        return self._file.past(self.now_ns)

    def close(self) -> None:
        """Draw what is open when the journal ends."""
        self.end()
        self._file.flush()
        report = self.report
        report.runs, report.unmatched = self.runs, self.unmatched
        report.missing_steps, report.torn_bytes = self.missing_steps, self.torn_bytes
        if self.began_ns is not None:
            report.seconds = (self.now_ns + self.offset_ns - self.began_ns) / NS_PER_S

    def run_began(self, head: JournalHead | None, *, first: bool) -> None:
        """Note a controller that started; the first step is where the file's times count from."""
        file, now_ns = self._file, self.now_ns
        file.offset_ns = self.offset_ns
        if first:
            file.since_ns = now_ns + self._since_ns
            file.until_ns = NEVER_NS if self._until_ns is None else now_ns + self._until_ns
            if head is not None and head.started:
                with suppress(ValueError):
                    file.clock(now_ns, datetime.fromisoformat(head.started))
        if head is not None:
            named = {"version": head.version, "policy": str(head.config.get("policy", ""))}
            self._note(self._events, "controller started", named)

    def run_ended(self) -> None:
        """Nothing is known of workers any more."""
        for state in (self._ready, *self._workers.values()):
            state.become("", self.now_ns)

    def step_ended(self) -> None:
        """Draw what was noted."""
        for (track, name, kind), (args, flows) in self._notes.items():
            if len(flows) > 1:
                args["times"] = len(flows)
            self._file.instant(track, name, kind, self.now_ns, args, [flow for flow in flows if flow])
        self._notes.clear()

    def steps_missing(self, steps: int) -> None:
        """Note it."""
        self._note(self._events, "steps are missing", {"steps": steps})

    def _note(self, track: int, name: str, args: Args, kind: str = "event", flow: int = 0) -> None:
        """Something at this instant: once, if it happens many times, else they would lie on a pile."""
        if flow or self._file.covers(self.now_ns, self.now_ns):
            self._notes.setdefault((track, name, kind), (dict(args), []))[1].append(flow)

    # Requests

    def request_ended(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        """Draw it from its arrival until now; a flow leads through its INFERs to its answer or refusal."""
        request, now_ns, file = asked.request, self.now_ns, self._file
        answered = outcome != OPEN
        covered = file.covers(request.arrival_ns, now_ns)
        if not covered or not (answered or asked.ran):
            asked.flow = 0
        if not covered:
            return
        self.report.requests += 1
        found: Told = {"message": message} if message else {}
        if answer is not None:
            found = told_of_answer(answer)
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

    def waiting_changed(self, models: Iterable[str]) -> None:
        """Draw the length of each queue that is another after this step."""
        now_ns, shown, waiting = self.now_ns, self._shown, self.waiting
        if self._file.covers(now_ns, now_ns):
            # The first time, also what waited already: the file may begin in the midst of it.
            for model in models if shown else {**dict.fromkeys(models), **waiting}:
                count = waiting[model]
                if shown.get(model, 0) != count:
                    shown[model] = count
                    self._file.count(self._model(model)[0], now_ns, count)

    # Actions

    def action_sent(self, sent: AskedAction) -> None:
        """Draw what was predicted of it."""
        rows = self._lane_rows(sent)
        if not isinstance(sent.action, Unload):
            end_ns = sent.start_ns + sent.expected_ns
            args = {"action": sent.action.action_id}
            rows.predicted.slice(title_of(sent.action), "prediction", sent.start_ns, end_ns, args)

    def action_ended(self, sent: AskedAction, result: Result | None, why: str) -> None:
        """Draw what was measured of it; one without a result has no length."""
        if result is None:
            args = told_of_action(sent, self.now_ns)
            self._draw_action(sent, f"{title_of(sent.action)}: {why}", NEVER_NS, self.now_ns, args)
            return
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
        args |= told_of_transfers(result)
        self._draw_action(sent, title, result.started_ns, result.ended_ns, args)

    def _draw_action(self, sent: AskedAction, title: str, start_ns: int, end_ns: int, args: Args) -> None:
        """An action from its start; one that had none is drawn at its end, and no flow leads through it."""
        from_ns = min(start_ns, end_ns)
        if not self._file.covers(from_ns, end_ns):
            return
        self.report.actions += 1
        flows = []
        for asked in sent.asked:
            # Its flow may have ended before, or may yet end before, if the worker's clock is ahead.
            if asked.flow and start_ns <= self.now_ns and start_ns < asked.answered_ns:
                asked.ran = True
                flows.append(asked.flow)
        self._lane_rows(sent).measured.slice(title, "action", from_ns, end_ns, args, flows)

    def _lane_rows(self, sent: AskedAction) -> _LaneRows:
        device = sent.action.device
        rows = self._rows.get(device)
        if rows is None:
            rank = 4 * len(self._rows) + 1
            rows = self._rows[device] = {
                lane: _LaneRows(self._file, f"{device} {lane}", self._devices, rank + 2 * at)
                for at, lane in enumerate((Lane.EXEC, Lane.LOAD))
            }
        return rows[sent.lane]

    # Workers, gateways, the server

    def _worker(self, name: str) -> StateTrack:
        found = self._workers.get(name)
        if found is None:
            found = self._workers[name] = StateTrack(self._file, f"worker {name}", self._server, 3)
        return found

    def worker_joined(self, event: WorkerJoined) -> None:
        """It is up."""
        devices = ", ".join(spec.device for spec in event.devices)
        self._worker(event.worker).become("up", self.now_ns, {"devices": devices})

    def worker_became(self, worker: str, state: str, message: str) -> None:
        """Draw it."""
        self._worker(worker).become(state, self.now_ns, {"message": message} if message else {})

    def gateway_lost(self, gateway: str) -> None:
        """Note it."""
        self._note(self._events, "gateway lost", {"gateway": gateway})

    def _on_readiness(self, effect: Readiness) -> None:
        name = "ready" if effect.ready else "not ready"
        self._ready.become(name, self.now_ns, {"message": effect.why} if effect.why else {})

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
    path: Path, out: IO[bytes], *, since_ns: int = 0, until_ns: int | None = None,
    tell: Callable[[int, int], None] = lambda done_bytes, requests: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TimelineReport:  # fmt: skip
    """Write to ``out`` what a journal holds; ``since_ns`` and ``until_ns`` count from its first step.

    ``tell`` is called with the bytes read and the requests drawn. If ``stopped``, the file is whole as far as
    it goes. Raises :class:`ConfigError` where there is no journal.
    """
    journal_bytes(path)
    timeline = Timeline(TraceFile(out), since_ns, until_ns)
    report = timeline.report
    for number, (done_bytes, record) in enumerate(read_records(path), start=1):
        timeline.take(record)
        if number % TELL_EVERY == 0:
            tell(done_bytes, report.requests)
            report.cut = stopped()
        if report.cut or timeline.over:
            break
    timeline.close()
    return report
