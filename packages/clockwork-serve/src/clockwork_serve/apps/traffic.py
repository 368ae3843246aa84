"""The user's own traffic as a scenario: a source is read, and written down with all that it tells.

A journal tells most: every request with its deadline, tenant and class, what gateways refused by themselves,
and the models, devices and durations that answered. Other sources are read by ``workload.traffic``.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from clockwork_serve.apps.learned import (
    LearnedServer,
    TableDelays,
    is_journal,
    places,
    read_zoo,
)
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.telemetry import JournalHead, Step, read_records
from clockwork_serve.telemetry.journal import refusals_beside
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.traffic import (
    NO_SLOS,
    USUAL_PATHS,
    ClientRatesTraffic,
    LoggedRequest,
    RequestClass,
    TrafficSource,
    open_traffic,
    told,
)
from clockwork_serve.workload.transcript import TrafficChanges, Transcriber, Transcript
from clockwork_serve.workload.zoo import FILES, Zoo

RECENT: Final = 1 << 16
"""Ids among which one that comes again is found: after a failover, or where a gateway ended it too."""
TELL_EVERY: Final = 1024
SAME_CLOCK_NS: Final = NS_PER_S  # clocks of two runs that differ by less are one


class JournalTraffic:
    """The requests of a journal, and of those in which its gateways keep what they ended by themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wall = False
        self.done_bytes = 0
        self.learned = LearnedServer()
        self._offset_ns: int | None = None
        self._lost: Counter[str] = Counter()

    def requests(self) -> Iterator[LoggedRequest]:
        """Each request once, in about their order. Raises :class:`ConfigError`."""
        recent: dict[str, None] = {}
        streams = [self._of_controller(), *map(self._of_gateway, refusals_beside(self.path))]
        for request_id, request in heapq.merge(*streams, key=lambda one: one[1].at_ns):
            if request_id in recent:
                continue
            recent[request_id] = None
            if len(recent) > RECENT:
                del recent[next(iter(recent))]
            yield request

    def _of_controller(self) -> Iterator[tuple[str, LoggedRequest]]:
        for number, (done_bytes, record) in enumerate(read_records(self.path), start=1):
            self.done_bytes = done_bytes
            self.learned.take(record)
            if isinstance(record, JournalHead):
                self._begin(record)
            elif isinstance(record, Step):
                for event in record.events:
                    if isinstance(event, Request):
                        yield event.request_id, self._logged(number, event)

    def _of_gateway(self, path: Path) -> Iterator[tuple[str, LoggedRequest]]:
        for number, (_, record) in enumerate(read_records(path), start=1):
            if not isinstance(record, Step):
                continue
            invalid = {
                effect.request_id
                for effect in record.effects
                if isinstance(effect, Answer) and effect.outcome is Outcome.INVALID
            }
            for event in record.events:
                if not isinstance(event, Request):
                    continue
                if event.request_id in invalid:
                    self._lost["request left out, for it was invalid"] += 1
                    continue
                self._lost["request ended by a gateway alone: here the controller decides"] += 1
                yield event.request_id, self._logged(number, event)

    def _begin(self, head: JournalHead) -> None:
        """Take the time of day where a run began; that of the same clock stays what it was."""
        if head.started:
            since_ns = round(datetime.fromisoformat(head.started).timestamp() * NS_PER_S)
            offset_ns = since_ns - head.started_ns
            if self._offset_ns is None or abs(offset_ns - self._offset_ns) > SAME_CLOCK_NS:
                self._offset_ns = offset_ns
            self.wall = True

    def _logged(self, number: int, request: Request) -> LoggedRequest:
        whose = RequestClass(request.tenant, request.priority, request.decide_ns)
        return LoggedRequest(
            number, request.arrival_ns + (self._offset_ns or 0), self.learned.name_of(request.model),
            max(0, request.slo_ns), whose,
        )  # fmt: skip

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        return [*self.learned.notes(), *told(self._lost)]


def transcribe(
    source: Path, out: Path, changes: TrafficChanges, *, zoo: str | None = None, model: str = "",
    paths: str = USUAL_PATHS, tell: Callable[[int], None] = lambda done: None,
) -> Transcript:  # fmt: skip
    """Write a source down as the scenario ``out``.

    ``zoo``: the table whose kinds models are of; every model must have a row of it. A journal brings its own.
    ``tell`` is called with bytes read, and may raise. Raises :class:`ConfigError`.
    """
    traffic: TrafficSource = (
        JournalTraffic(source) if is_journal(source) else open_traffic(source, model=model, paths=paths)
    )
    chosen = changes
    if isinstance(traffic, ClientRatesTraffic):
        _check_clock(traffic, changes)
        # Two weeks may be billions: only the chosen part is drawn, and times are from the trace's beginning.
        traffic.choose(changes.from_ns or 0, changes.to_ns)
        chosen = msgspec.structs.replace(changes, absolute=True, from_ns=changes.from_ns or 0)
    table = None if zoo is None else read_zoo(zoo, foreign=True)
    transcriber = Transcriber(source, out, chosen)
    try:
        for number, request in enumerate(traffic.requests()):
            if not number:
                _check_clock(traffic, changes)
            transcriber.take(request)
            if number % TELL_EVERY == 0:
                tell(traffic.done_bytes)
        return _finished(transcriber, traffic, out, zoo, table, slos_given=changes.slo_ms is not None)
    except BaseException:
        transcriber.discard()
        raise


def _check_clock(traffic: TrafficSource, changes: TrafficChanges) -> None:
    """Raise :class:`ConfigError` for a date where the source does not tell the time of day."""
    if changes.absolute and not traffic.wall:
        raise ConfigError(
            "from: expected a time from the first request on, such as 90s or 2h, found a date; "
            f"{traffic.path} does not tell the time of day"
        )


def _finished(
    transcriber: Transcriber, traffic: TrafficSource, out: Path, zoo: str | None, table: Zoo | None, *,
    slos_given: bool,
) -> Transcript:  # fmt: skip
    """Write the scenario, with the zoo of a journal beside it where no other was given."""
    journal = traffic if isinstance(traffic, JournalTraffic) else None
    learned = None if journal is None else journal.learned
    own = None
    name = "v100" if zoo is None else zoo
    if journal is not None and learned is not None and zoo is None:
        rows = learned.rows()
        own, name = out.with_suffix(".zoo.json"), f"{out.stem}.zoo.json"
        table = Zoo.of(str(own), places(own, rows))
        delays = TableDelays.of(learned.delays)
        table_file = {"tables": {learned.kind: rows}, "measured_on": learned.machine, "delays": delays}
        own.write_bytes(msgspec.json.format(msgspec.json.encode(table_file), indent=1))
    elif zoo is not None and (zoo.endswith(FILES) or is_journal(zoo)):
        name = os.path.relpath(zoo, out.absolute().parent)
    known = (table or read_zoo(name)).models
    try:
        made = transcriber.finish(
            [note for note in traffic.notes() if note != NO_SLOS or not slos_given],
            zoo=name, known=known.__contains__, strict=zoo is not None,
            kinds=None if learned is None else learned.kinds(),
            cluster=None if learned is None else learned.cluster(),
            tenants=None if learned is None else learned.tenants(),
        )  # fmt: skip
    except BaseException:
        if own is not None:
            own.unlink()
        raise
    return made if own is None else msgspec.structs.replace(made, files=[*made.files, str(own)])
