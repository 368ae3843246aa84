"""Counts the requests (by outcome, by minute) and actions of a simulation; memory does not grow with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from clockwork_serve.messages import (
    Answer,
    ControllerEffect,
    ControllerEvent,
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
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.tables import NO_SLO_MS

SUB_BITS = 6
"""Histogram buckets are 2**-SUB_BITS wide against their value: 1.6 %."""


class DurationHistogram:
    """Counts of durations in ns, in buckets of constant relative width."""

    __slots__ = ("count", "counts", "max_ns", "sum_ns")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0
        self.sum_ns = 0
        self.max_ns = 0

    def add(self, value_ns: int) -> None:
        """Count one duration."""
        shift = value_ns.bit_length() - SUB_BITS - 1
        bucket = (shift << SUB_BITS) + (value_ns >> shift) if shift > 0 else value_ns
        counts = self.counts
        if bucket in counts:
            counts[bucket] += 1
        else:
            counts[bucket] = 1
        self.count += 1
        self.sum_ns += value_ns
        if value_ns > self.max_ns:  # noqa: PLR1730 - a call of max takes longer than all the rest
            self.max_ns = value_ns

    def quantile_ns(self, share: float) -> int:
        """An upper bound of this quantile, exact to a bucket's width; 0 if there are no durations."""
        wanted = share * self.count
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return min(_upper(bucket), self.max_ns)
        return self.max_ns

    @property
    def mean_ns(self) -> float:
        """The mean; 0 if there are none."""
        return self.sum_ns / self.count if self.count else 0.0


def _upper(bucket: int) -> int:
    if bucket < 2 << SUB_BITS:
        return bucket
    shift = (bucket >> SUB_BITS) - 1
    return ((bucket - (shift << SUB_BITS) + 1) << shift) - 1


class Count:
    """Outcomes of the requests of one load (in one bucket of time).

    ``ok`` counts good responses in time, ``late`` those after their deadline, ``others`` every other end by
    outcome and reason, as ``rejected/would_miss_deadline``. ``answered`` holds the latencies of good
    responses in time, ``refused`` of all others.
    """

    __slots__ = ("answered", "batch_sum", "cold", "late", "offered", "ok", "others", "refused")

    def __init__(self) -> None:
        self.offered = 0
        self.ok = 0
        self.late = 0
        self.cold = 0
        """Good responses whose weights were on no device when the request arrived."""
        self.batch_sum = 0
        """Sum of the batch sizes of good responses: divided by ``ok``, the mean batch per request."""
        self.others: Counter[str] = Counter()
        self.answered = DurationHistogram()
        self.refused = DurationHistogram()

    @property
    def ended(self) -> int:
        """Requests that have ended."""
        return self.ok + self.late + self.others.total()

    @property
    def satisfaction(self) -> float:
        """Share of ended requests with a good response in time; 1 where none ended."""
        return self.ok / self.ended if self.ended else 1.0


class Busy:
    """Lane time in ns and actions, summed over all devices (in one bucket of time)."""

    __slots__ = ("exec_ns", "infers", "load_ns", "loads", "refused", "unloads")

    def __init__(self) -> None:
        self.exec_ns = 0
        self.load_ns = 0
        self.infers = 0
        self.loads = 0
        self.unloads = 0
        self.refused = 0
        """Actions that a worker refused, or that failed."""


class Tally:
    """Counts by load: in total (after the warm-up) and, if ``bucket_ns`` is set, by buckets of that length.

    A request belongs to the bucket in which it was sent.
    """

    def __init__(self, loads: tuple[str, ...], warmup_ns: int = 0, bucket_ns: int = 0) -> None:
        self.names = loads
        self.warmup_ns = warmup_ns
        self.bucket_ns = bucket_ns
        self.loads = [Count() for _ in loads]
        self.busy = Busy()
        self.rows: list[list[Count]] = []
        """``rows[bucket][load]``."""
        self.busy_rows: list[Busy] = []

    def row(self, at_ns: int) -> list[Count]:
        """The counts of the bucket that an instant lies in, by load."""
        at = at_ns // self.bucket_ns
        while len(self.rows) <= at:
            self.rows.append([Count() for _ in self.names])
        return self.rows[at]

    def busy_row(self, at_ns: int) -> Busy:
        """The devices' counts of the bucket that an instant lies in."""
        at = at_ns // self.bucket_ns
        while len(self.busy_rows) <= at:
            self.busy_rows.append(Busy())
        return self.busy_rows[at]

    def ended(self, load: int, sent_ns: int, delivered_ns: int, answer: Answer, *, in_time: bool) -> None:
        """Count a response that reached its client at ``delivered_ns``."""
        if sent_ns >= self.warmup_ns:
            count = self.loads[load]
            if in_time:
                count.ok += 1
                count.batch_sum += answer.batch
                if answer.cold:
                    count.cold += 1
                count.answered.add(delivered_ns - sent_ns)
            else:
                _count(count, delivered_ns - sent_ns, answer, in_time=False)
        if self.bucket_ns:
            _count(self.row(sent_ns)[load], delivered_ns - sent_ns, answer, in_time=in_time)

    def total(self) -> Count:
        """All loads together (without histograms of refusals)."""
        total = Count()
        for count in self.loads:
            total.offered += count.offered
            total.ok += count.ok
            total.late += count.late
            total.cold += count.cold
            total.batch_sum += count.batch_sum
            total.others.update(count.others)
        return total

    def goodput_rps(self, load: int, until_ns: int) -> float:
        """Good responses in time per second after the warm-up, to requests sent before ``until_ns``."""
        seconds = (until_ns - self.warmup_ns) / NS_PER_S
        return self.loads[load].ok / seconds if seconds > 0 else 0.0


def _count(count: Count, took_ns: int, answer: Answer, *, in_time: bool) -> None:
    if in_time:
        count.ok += 1
        count.batch_sum += answer.batch
        if answer.cold:
            count.cold += 1
        count.answered.add(took_ns)
        return
    count.refused.add(took_ns)
    if answer.outcome is Outcome.OK or answer.batch:
        count.late += 1
    else:
        reason = answer.reason.value
        count.others[f"{answer.outcome.value}/{reason}" if reason else answer.outcome.value] += 1


# ------------------------------------------------------------
# Where weights are.


class ReadyWeights:
    """Follows a controller's steps: by model that was loaded once, the devices that have its weights."""

    def __init__(self) -> None:
        self.devices: dict[str, set[str]] = {}
        self._loads: dict[int, Load] = {}
        self._of_worker: dict[str, list[str]] = {}

    def on_step(self, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]) -> None:
        """Note what one step brought."""
        for event in events:
            if type(event) is Result:
                load = self._loads.pop(event.action_id, None)
                if load is not None and event.status is Status.OK:
                    self.devices.setdefault(load.model, set()).add(load.device)
            elif type(event) is WorkerJoined:
                self._of_worker[event.worker] = [spec.device for spec in event.devices]
                for state in event.states:
                    for one in state.weights:
                        self.devices.setdefault(one.model, set()).add(state.device)
            elif type(event) is WorkerLost:
                gone = set(self._of_worker.pop(event.worker, ()))
                self._loads = {key: load for key, load in self._loads.items() if load.device not in gone}
                for devices in self.devices.values():
                    devices.difference_update(gone)
        for effect in effects:
            if type(effect) is Load:
                self._loads[effect.action_id] = effect
            elif type(effect) is Unload:
                self.devices.get(effect.model, set()).discard(effect.device)


# ------------------------------------------------------------
# Requests that are not in time, by minute and by cause.


COMPUTE: Final = "too little time on devices"
MEMORY: Final = "weights had been evicted: too little memory"
COLD: Final = "weights were not loaded yet: the first requests"
LATE: Final = "took longer than estimated"
OTHER: Final = "failed, or lost to a fault"
CAUSES: Final = (COMPUTE, MEMORY, COLD, LATE, OTHER)
MINUTE_NS: Final = 60 * NS_PER_S
NO_SLO_NS: Final = round(NO_SLO_MS * NS_PER_MS)
_LOST: Final = frozenset({Outcome.FAILED, Outcome.CANCELLED, Outcome.INVALID})


class MissCount:
    """Watches a simulation: requests with an SLO by minute; of those that miss, the model and the cause.

    Minutes begin at ``from_ns``; what is after the last of ``minutes`` belongs to it. An answer takes
    ``hop_ns`` to its client. ``allowed``: how many may miss in each minute, if that is limited.
    """

    def __init__(self, from_ns: int, minutes: int, hop_ns: int, allowed: Sequence[int] | None = None) -> None:
        self._from_ns, self._last, self._hop_ns, self._allowed = from_ns, minutes - 1, hop_ns, allowed
        self.ended, self.in_time = [0] * minutes, [0] * minutes
        self.quota = 0
        """Requests refused by a tenant's quota, which are not counted."""
        self.missed: dict[tuple[str, str], int] = {}
        """By cause and model."""
        self._beyond = minutes
        """The first minute that has missed more than it may."""
        self.hopeless = False
        """That minute is over."""
        self._open: dict[str, tuple[Request, bool]] = {}
        """Requests without an answer, and whether their weights were ready somewhere when they came."""
        self._weights = ReadyWeights()

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Count what one step brought."""
        if not events and not effects:
            return  # only a timer, and it changed nothing
        devices = self._weights.devices
        for event in events:
            if type(event) is Request:  # as isinstance, which takes longer to say no
                self._open[event.request_id] = (event, bool(devices.get(event.model)))
        self._weights.on_step(events, effects)
        for effect in effects:
            if type(effect) is Answer:
                request, warm = self._open.pop(effect.request_id)
                self._answered(request, effect, now_ns, warm)

    def _answered(self, request: Request, answer: Answer, now_ns: int, warm: bool) -> None:  # noqa: FBT001
        arrival_ns, deadline_ns = request.arrival_ns, request.deadline_ns
        if arrival_ns < self._from_ns or deadline_ns - arrival_ns >= NO_SLO_NS:
            return
        if answer.reason is Reason.TENANT_QUOTA:
            self.quota += 1
            return
        minute = (arrival_ns - self._from_ns) // MINUTE_NS
        if minute > self._last:  # noqa: PLR1730 - min() takes longer
            minute = self._last
        if minute > self._beyond:
            self.hopeless = True
        self.ended[minute] += 1
        if now_ns + self._hop_ns <= deadline_ns and answer.outcome is Outcome.OK:
            self.in_time[minute] += 1
            return
        self._miss(self._cause(request, answer, warm), request.model, 1)
        allowed = self._allowed
        if allowed and self.ended[minute] - self.in_time[minute] > allowed[minute]:
            self._beyond = min(self._beyond, minute)

    def _miss(self, cause: str, model: str, count: int) -> None:
        key = (cause, model)
        self.missed[key] = self.missed.get(key, 0) + count

    def _cause(self, request: Request, answer: Answer, warm: bool) -> str:  # noqa: FBT001
        if answer.outcome in _LOST:
            return OTHER
        if not warm:
            return MEMORY if request.model in self._weights.devices else COLD
        return LATE if answer.batch else COMPUTE

    def add_unseen(self, requests: int) -> None:
        """Add what gateways refused while no controller ran: to the minute that has least to spare."""
        if requests:
            shares = [good / max(1, ended) for good, ended in zip(self.in_time, self.ended, strict=True)]
            self.ended[shares.index(min(shares))] += requests
            self._miss(OTHER, "?", requests)
