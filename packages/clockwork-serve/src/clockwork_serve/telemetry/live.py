"""What a journal tells of the last minutes, in bounded memory, for a screen that follows it.

:class:`LiveView` takes records and answers: what is new since a reader last asked (:meth:`~LiveView.frame`),
what was in a stretch (:meth:`~LiveView.window`), which requests (:meth:`~LiveView.requests`) and who asks for
what (:meth:`~LiveView.panels`). All times it gives are whole microseconds from the journal's first step.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Final

import msgspec
from msgspec import Struct

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import printable
from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    CodeReady,
    DeviceSpec,
    Drain,
    Infer,
    Lane,
    Load,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Quarantined,
    Readiness,
    Result,
    Status,
    Unload,
    WeightsReady,
    WorkerJoined,
)
from clockwork_serve.telemetry.boxes import CHUNK_ROWS, LaneBoxes, box, drawn, drawn_new
from clockwork_serve.telemetry.journal import JournalHead, Step, Torn
from clockwork_serve.telemetry.tracks import AskedAction, OpenRequest, Tracks
from clockwork_serve.units import NS_PER_US

US_PER_S: Final = 1_000_000
STRETCHES: Final = 600  # into how many bins of counts the time that is kept is cut
OLD_PIXELS: Final = 6000  # how fine boxes are shown, of all that is kept, whose details are no longer there
SHOWN_MOST: Final = 8  # models whose queues and weights a bin names: those with most
NAMES_MOST: Final = 64
"""Models and tenants that a bin counts by name; what the others did is counted together."""
OPEN_MOST: Final = 1000
GIVE_UP_BINS: Final = 60  # after so many bins, what has been open for as long as anything is kept is given up
REFUSED, LOST = "refused", 255
OTHERS: Final = "(others)"
_STATUS: Final = {status: number for number, status in enumerate(Status)}
TABLE_MOST: Final = 200


class LiveLimits(Struct, frozen=True, kw_only=True):
    """How much is kept: the last ``keep_s``, and of those no more boxes with details and requests than said.

    ``requests`` are kept of those that were answered well, and as many of all others.
    """

    keep_s: float = 600.0
    boxes: int = 1_000_000
    requests: int = 50_000
    events: int = 1000


class EndedRequest(Struct, frozen=True, array_like=True):
    """A request that has ended, as a table shows it; durations in microseconds."""

    ended: int
    arrived: int
    request: str
    model: str
    tenant: str
    outcome: str
    reason: str
    slo: int
    queue: int
    ran: int
    batch: int
    device: str
    cold: bool
    promised: bool
    message: str


class _Bin:
    """What happened in one stretch of time."""

    __slots__ = ("answered", "arrivals", "ends", "lasted", "memory", "models", "queues", "start", "tenants")

    def __init__(self, start: int) -> None:
        self.start = start
        self.arrivals = self.answered = 0
        self.ends: Counter[str] = Counter()  # by name, those that were not answered well
        self.lasted: list[int] | None = []  # microseconds to each good answer, while the bin is open
        self.models: dict[str, list[int]] = {}  # arrivals, good answers, others
        self.tenants: dict[str, list[int]] = {}
        self.queues: list[Any] = []
        self.memory: list[Any] = []

    def of(self, counts: dict[str, list[int]], name: str) -> list[int]:
        """The counts of a name, or those of all others."""
        found = counts.get(name)
        if found is None:
            name = name if len(counts) < NAMES_MOST else OTHERS
            found = counts.setdefault(name, [0, 0, 0])
        return found


class ReaderCursor:
    """How far one reader has read."""

    __slots__ = ("begun", "bin", "events", "known", "lanes")

    def __init__(self, known: Sequence[int] = (0, 0)) -> None:
        self.known = list(known)  # models, lanes whose names it has
        self.begun = False
        self.lanes: list[int] = []
        self.bin = self.events = 0


class LiveView(Tracks):
    """Follows a journal, and keeps its last minutes.

    ``settings`` are rows of name, value and origin; without them, those of the journal's head are shown.
    """

    def __init__(
        self, limits: LiveLimits | None = None, settings: Sequence[tuple[str, str, str]] = ()
    ) -> None:
        super().__init__()
        self._limits = limits = LiveLimits() if limits is None else limits
        self._keep_us = round(limits.keep_s * US_PER_S)
        self._bin_us = max(1, self._keep_us // STRETCHES)
        self._old_us = max(1, self._keep_us // OLD_PIXELS)
        self._settings = settings
        self._head_of_run: JournalHead | None = None
        self._models: dict[str, int] = {}
        self._lanes_by_key: dict[tuple[str, str], int] = {}
        self._boxes: list[LaneBoxes] = []
        self._refusals: set[int] = set()  # lanes that are reasons
        self._kept_chunks = 0
        self._unmeasured: dict[int, AskedAction] = {}  # by action id, what was sent and has not ended
        self._devices: dict[str, tuple[DeviceSpec, str]] = {}  # with its worker
        self._workers: dict[str, str] = {}
        self._resident: dict[str, dict[str, int]] = {}  # by device and model, bytes
        self._bins: deque[_Bin] = deque()
        self._events: deque[tuple[int, str, str]] = deque(maxlen=limits.events)
        self._events_added = 0
        self._good: deque[EndedRequest] = deque(maxlen=limits.requests)
        self._bad: deque[EndedRequest] = deque(maxlen=limits.requests)
        self.handlers |= {
            AdmissionReply: self._on_admission_reply, Readiness: self._on_readiness,
            CodeReady: self._on_ready, WeightsReady: self._on_ready, Quarantined: self._on_quarantined,
            ModelAdded: lambda event: self._note("model", f"model added: {event.model.key}"),
            ModelRemoved: lambda event: self._note("model", f"model removed: {event.model}"),
            Drain: lambda event: self._note("server", "drain"),
        }  # fmt: skip

    def on_record(self, record: JournalHead | Step | Torn) -> None:
        """Follow the next record."""
        if isinstance(record, JournalHead):
            self._head_of_run = record
        self.take(record)
        self._bin()

    @property
    def now_us(self) -> int:
        """How far the journal was read."""
        return self._us(self.now_ns)

    def _us(self, at_ns: int) -> int:
        return (at_ns + self.offset_ns - (self.began_ns or 0)) // NS_PER_US

    # Records

    def run_began(self, head: JournalHead | None, *, first: bool) -> None:
        """Note a controller that started."""
        if head is not None:
            self._note("server", f"controller started, {head.version}")

    def run_ended(self) -> None:
        """Nothing is known of workers until they join the next controller."""
        for worker in self._workers:
            self._workers[worker] = ""

    def steps_missing(self, steps: int) -> None:
        """Note it."""
        self._note("server", f"{steps} steps are missing in the journal")

    def gateway_lost(self, gateway: str) -> None:
        """Note it."""
        self._note("worker", f"gateway lost: {gateway}")

    def worker_joined(self, event: WorkerJoined) -> None:
        """It is up, with the weights that it brought."""
        self.worker_became(event.worker, "up", "")
        brought = {state.device: state.weights for state in event.states}
        for spec in event.devices:
            self._devices[spec.device] = (spec, event.worker)
            for kind in Lane:
                self._lane_number(spec.device, kind)
            self._resident[spec.device] = {
                one.model: one.weights.size for one in brought.get(spec.device, ()) if one.ready
            }

    def worker_became(self, worker: str, state: str, message: str) -> None:
        """Note it; a lost worker's memory is empty."""
        self._workers[worker] = state
        self._note("worker", f"worker {worker}: {state}{f', {message}' if message else ''}")
        if state == "lost":
            for device, (_, whose) in self._devices.items():
                if whose == worker:
                    self._resident[device] = {}

    def _on_readiness(self, effect: Readiness) -> None:
        self._note("server", "ready" if effect.ready else f"not ready: {effect.why}")

    def _on_ready(self, event: CodeReady | WeightsReady) -> None:
        if not event.ok:
            self._note("model", f"not prepared on {event.device}: {event.message}")

    def _on_quarantined(self, effect: Quarantined) -> None:
        what = f"in quarantine: {effect.why}" if effect.why else "out of quarantine"
        self._note("model", f"{effect.model} {what}")

    def _note(self, kind: str, text: str) -> None:
        self._events_added += 1
        self._events.append((self.now_us, kind, printable(text)))

    # Requests

    def request_came(self, asked: OpenRequest) -> None:
        """Count it; its model has a number, which is its colour, from now on."""
        found, request = self._bin(), asked.request
        self._model_number(request.model)
        found.arrivals += 1
        found.of(found.models, request.model)[0] += 1
        if request.tenant:
            found.of(found.tenants, request.tenant)[0] += 1

    def request_ended(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        """Count it, and keep it for tables."""
        found, request, ok = self._bin(), asked.request, outcome == Outcome.OK
        reason = "" if answer is None else str(answer.reason)
        place = 1 if ok else 2
        found.of(found.models, request.model)[place] += 1
        if request.tenant:
            found.of(found.tenants, request.tenant)[place] += 1
        if ok:
            found.answered += 1
            if found.lasted is not None:
                found.lasted.append((self.now_ns - request.arrival_ns) // NS_PER_US)
        else:
            self._refused(f"{outcome}: {reason}" if reason else outcome, request.model)
        shown = EndedRequest(
            ended=self.now_us, arrived=self._us(request.arrival_ns), request=request.request_id,
            model=request.model, tenant=request.tenant, outcome=outcome, reason=reason,
            slo=request.slo_ns // NS_PER_US, queue=answer.queue_ns // NS_PER_US if answer else 0,
            ran=answer.exec_ns // NS_PER_US if answer else 0, batch=answer.batch if answer else 0,
            device=asked.device, cold=answer is not None and answer.cold,
            promised=answer is not None and answer.promised, message=message,
        )  # fmt: skip
        (self._good if ok else self._bad).append(shown)

    def _on_admission_reply(self, reply: AdmissionReply) -> None:
        """Who is refused before the body is there never becomes a request."""
        if reply.reason:
            self._refused(f"{Outcome.REJECTED}: {reply.reason}", "")

    def _refused(self, name: str, model: str) -> None:
        self._bin().ends[name] += 1
        now_us = self.now_us
        row = box(now_us, 0, (now_us, 0), (now_us, now_us), self._model_number(model), 0, 1, 1)
        self._add(self._lane_number(name, REFUSED), row)

    # Actions

    def action_sent(self, sent: AskedAction) -> None:
        """It has a place on its lane from now on."""
        action = sent.action
        if isinstance(action, Unload):
            self._resident.get(action.device, {}).pop(action.model, None)
        else:
            self._unmeasured[action.action_id] = sent

    def action_ended(self, sent: AskedAction, result: Result | None, why: str) -> None:
        """Keep its box."""
        action = sent.action
        self._unmeasured.pop(action.action_id, None)
        if isinstance(action, Unload):
            return
        status, start_ns, lasted_ns = LOST, self.now_ns, 0
        if result is not None:
            status, start_ns, lasted_ns = _STATUS[result.status], result.started_ns, result.lane_ns
            if isinstance(action, Load) and result.status is Status.OK:
                self._resident.setdefault(action.device, {})[action.model] = action.weights.size
        self._add(self._lane_number(action.device, sent.lane), self._row(sent, start_ns, lasted_ns, status))

    def _row(self, sent: AskedAction, start_ns: int, lasted_ns: int, status: int) -> tuple[int, ...]:
        action, start_us = sent.action, self._us(start_ns)
        due = [self._us(one.request.deadline_ns) for one in sent.asked] or [start_us]
        predicted = self._us(sent.start_ns), sent.expected_ns // NS_PER_US
        batch, requests = (action.batch, len(action.calls)) if isinstance(action, Infer) else (0, 0)
        return box(
            start_us, lasted_ns // NS_PER_US, predicted, (min(due), max(due)),
            self._model_number(action.model), batch, requests, status,
        )  # fmt: skip

    def _add(self, lane: int, row: tuple[int, ...]) -> None:
        if not self._boxes[lane].add(row):
            return
        self._kept_chunks += 1
        self._kept_chunks -= self._boxes[lane].forget(self.now_us - self._keep_us)
        while self._kept_chunks * CHUNK_ROWS > self._limits.boxes:
            oldest = min(
                (one for one in self._boxes if one.oldest_us is not None), key=lambda one: one.oldest_us or 0
            )
            oldest.merge_oldest(self._old_us)
            self._kept_chunks -= 1

    def _lane_number(self, name: str, kind: str) -> int:
        number = self._lanes_by_key.get((name, kind))
        if number is None:
            number = self._lanes_by_key[name, kind] = len(self._boxes)
            if kind == REFUSED:
                self._refusals.add(number)
            self._boxes.append(LaneBoxes())
        return number

    def _model_number(self, model: str) -> int:
        return self._models.setdefault(model, len(self._models))

    # Time

    def _bin(self) -> _Bin:
        """The bin of now."""
        now_us, bins = self.now_us, self._bins
        start = now_us - now_us % self._bin_us
        if not bins or bins[-1].start < start:
            if bins:
                self._close(bins[-1])
            bins.append(_Bin(start))
            while bins[0].start < now_us - self._keep_us:
                bins.popleft()
            for kept in (self._good, self._bad):
                while kept and kept[0].ended < now_us - self._keep_us:
                    kept.popleft()
            if start // self._bin_us % GIVE_UP_BINS == 0:
                self.give_up(self.now_ns - self._keep_us * NS_PER_US)
        return bins[-1]

    def _close(self, ended: _Bin) -> None:
        ended.queues, ended.memory = self._queues(), self._memory()
        ended.lasted = _percentiles(ended.lasted or ())

    def _queues(self) -> list[Any]:
        return heapq.nlargest(SHOWN_MOST, self.waiting.items(), key=itemgetter(1))

    def _memory(self) -> list[Any]:
        total: Counter[str] = Counter()
        for models in self._resident.values():
            total.update(models)
        return total.most_common(SHOWN_MOST)

    # Answers

    def frame(self, reader: ReaderCursor, pixel_us: int) -> dict[str, Any]:
        """What is new since that reader's last frame; the first one begins now."""
        begins, reader.begun = not reader.begun, True
        reader.lanes += [one.added if begins else 0 for one in self._boxes[len(reader.lanes) :]]
        lanes = []
        for number, one in enumerate(self._boxes):
            if reader.lanes[number] < one.added:
                rows = drawn_new(one.since(reader.lanes[number]), pixel_us)
                reader.lanes[number] = one.added
                lanes.append([number, self._dots(number, rows)])
        bins = [self._told(one) for one in self._bins if one.start >= reader.bin]
        reader.bin = self._bins[-1].start if self._bins else 0
        new_events = self._events_added - reader.events if not begins else 0
        reader.events = self._events_added
        return {
            "now": self.now_us, "lanes": lanes, "open": self._open_boxes(), "bins": bins,
            "events": list(self._events)[-new_events:] if new_events else [], **self._names(reader),
        }  # fmt: skip

    def window(self, from_us: int, to_us: int, pixels: int, known: Sequence[int] = (0, 0)) -> dict[str, Any]:
        """What overlaps a stretch, for a screen of so many pixels; ``known``: see :class:`ReaderCursor`."""
        pixel_us = max(1, (to_us - from_us) // max(1, pixels))
        lanes = []
        for number, one in enumerate(self._boxes):
            boxes, older = one.between(from_us, to_us)
            if len(boxes) or len(older):
                lanes.append([number, self._dots(number, drawn(boxes, older, pixel_us))])
        bins = [self._told(one) for one in self._bins if from_us - self._bin_us <= one.start <= to_us]
        events = [one for one in self._events if from_us <= one[0] <= to_us]
        return {
            "now": self.now_us, "from": from_us, "to": to_us, "lanes": lanes, "bins": bins, "events": events,
            "kept": self._bins[0].start if self._bins else 0, **self._names(ReaderCursor(known)),
        }  # fmt: skip

    def _dots(self, number: int, rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Rows of a lane or, of refusals, what a dot needs: when, how many, a model."""
        return [[row[0], row[4], row[2]] for row in rows] if number in self._refusals else rows

    def _names(self, reader: ReaderCursor) -> dict[str, Any]:
        """The names that a reader lacks."""
        models, lanes = reader.known
        reader.known = [len(self._models), len(self._boxes)]
        return {
            "models": [models, [printable(one) for one in islice(self._models, models, None)]],
            "names": [
                lanes,
                [[printable(key[0]), key[1]] for key in islice(self._lanes_by_key, lanes, None)],
            ],
        }

    def _open_boxes(self) -> list[Any]:
        """What was sent and has not ended, as predicted."""
        return [
            [
                self._lane_number(sent.action.device, sent.lane), self._us(sent.start_ns),
                sent.expected_ns // NS_PER_US, self._model_number(sent.action.model),
            ]
            for sent in islice(self._unmeasured.values(), OPEN_MOST)
        ]  # fmt: skip

    def _told(self, one: _Bin) -> dict[str, Any]:
        last = one is self._bins[-1]
        return {
            "at": one.start, "lasts": self._bin_us, "arrivals": one.arrivals, "good": one.answered,
            "ends": one.ends, "latency": _percentiles(one.lasted or ()) if last else one.lasted,
            "queues": self._queues() if last else one.queues,
            "memory": self._memory() if last else one.memory,
        }  # fmt: skip

    def requests(
        self, from_us: int, to_us: int, *, offset: int = 0, limit: int = 50, only: str = "",
        model: str | None = None, tenant: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The requests that ended in a stretch, oldest first; ``only``: ``good``, ``bad`` or both.

        ``tenant`` and ``model`` leave out all others. ``since`` tells from when on all are kept.
        """
        kept = [rows for name, rows in (("bad", self._bad), ("good", self._good)) if only in ("", name)]
        found = [
            one
            for rows in kept
            for one in rows
            if from_us <= one.ended <= to_us
            and (model is None or one.model == model)
            and (tenant is None or one.tenant == tenant)
        ]
        found.sort(key=lambda one: one.ended)
        full = [rows[0].ended for rows in kept if rows and len(rows) == rows.maxlen]
        page = found[max(0, offset) : max(0, offset) + min(max(1, limit), TABLE_MOST)]
        return {"total": len(found), "since": max(full, default=0), "rows": [_safe(one) for one in page]}

    def find(self, request_id: str) -> EndedRequest | None:
        """A request that has ended, if it is kept."""
        return next(
            (one for rows in (self._bad, self._good) for one in rows if one.request == request_id), None
        )

    def panels(self, from_us: int, to_us: int) -> dict[str, Any]:
        """Models, tenants and devices in a stretch, and the settings in effect."""
        bins = [one for one in self._bins if from_us - self._bin_us < one.start <= to_us]
        models, tenants = _sums(one.models for one in bins), _sums(one.tenants for one in bins)
        places: Counter[str] = Counter()
        for held in self._resident.values():
            places.update(dict.fromkeys(held, 1))
        return {
            "seconds": len(bins) * self._bin_us / US_PER_S,
            "models": [
                [printable(name), *counts, self.waiting.get(name, 0), places[name]]
                for name, counts in _most(models)
            ],
            "tenants": [[printable(name), *counts] for name, counts in _most(tenants)],
            "devices": [self._device(name, from_us, to_us) for name in self._devices],
            "settings": [list(row) for row in self._settings or _config_rows(self._head_of_run)],
            "version": self._head_of_run.version if self._head_of_run else "",
            "started": self._head_of_run.started if self._head_of_run else "",
        }

    def _device(self, name: str, from_us: int, to_us: int) -> dict[str, Any]:
        spec, worker = self._devices[name]
        held = self._resident.get(name, {})
        span_us = max(1, min(to_us, self.now_us) - max(0, from_us))
        busy = {
            kind: self._boxes[self._lane_number(name, kind)].busy_us(from_us, to_us) / span_us
            for kind in Lane
        }
        return {
            "device": printable(name), "kind": spec.kind, "worker": printable(worker),
            "state": self._workers.get(worker, ""), "memory": spec.pages * spec.page_bytes,
            "held": sum(spec.pages_of(size) for size in held.values()) * spec.page_bytes,
            "models": len(held), "exec": busy[Lane.EXEC], "load": busy[Lane.LOAD],
        }  # fmt: skip


def _percentiles(lasted: Sequence[int]) -> list[int]:
    """The median, the 99th percentile and the maximum; nothing of nothing."""
    if not lasted:
        return []
    ordered = sorted(lasted)
    return [ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], ordered[-1]]


def _sums(counts: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for one in counts:
        for name, found in one.items():
            sums = total.setdefault(name, [0, 0, 0])
            for at, count in enumerate(found):
                sums[at] += count
    return total


def _most(counts: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    """Those that were asked for most."""
    return heapq.nlargest(TABLE_MOST, counts.items(), key=lambda item: item[1][0])


def _safe(one: EndedRequest) -> EndedRequest:
    """With foreign text made printable."""
    return msgspec.structs.replace(
        one, model=printable(one.model), tenant=printable(one.tenant), message=printable(one.message)
    )


def _config_rows(head: JournalHead | None) -> list[tuple[str, str, str]]:
    """The controller's settings of a run."""
    usual = msgspec.to_builtins(ControllerConfig())
    given = {} if head is None else head.config
    return [
        (name, str(value), "default" if usual.get(name) == value else "set") for name, value in given.items()
    ]
