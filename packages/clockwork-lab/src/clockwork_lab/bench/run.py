"""A whole run: starts, watches and ends the senders, and reports what they measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_lab.bench.child import OPEN_S
from clockwork_lab.bench.job import Job, SenderMessage, write_job
from clockwork_lab.bench.plan import Plan
from clockwork_lab.bench.records import (
    ANSWERED,
    FIRST_ENDS,
    ROW,
    End,
    Kind,
    Records,
    Rows,
    Table,
    head_of,
    write_records,
)
from clockwork_lab.bench.report import BenchReport, make_report
from clockwork_lab.bench.server import Unreachable
from clockwork_serve.errors import ClockworkError
from clockwork_serve.units import NS_PER_MS, NS_PER_S


@dataclass(slots=True)
class Ran:
    """The result of a run."""

    report: BenchReport
    records: Records


def run(
    plan: Plan, *, show: Callable[[LoadSample], None] = lambda moment: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Ran:  # fmt: skip
    """Run the plan to its end, or until ``stopped()``, which is polled; requests in flight are awaited.

    Raises :class:`Unreachable`, or :class:`SenderFailed` if a sending process ends by itself.
    """
    cut_ns: int | None = None
    with Crew(plan) as crew:
        crew.begin()
        live = Live(plan, crew)
        while not crew.over:
            if cut_ns is None and stopped():
                cut_ns = time.monotonic_ns() - crew.start_ns
                crew.stop()
            show(live.sample(stopping=cut_ns is not None))
            time.sleep(EVERY_S)
        show(live.sample(stopping=cut_ns is not None))
        records = crew.records()
        messages = [process.final for process in crew.processes if process.final is not None]
    return Ran(make_report(plan, records, messages, cut_ns=cut_ns), records)


def write(plan: Plan, ran: Ran, path: Path) -> None:
    """Write the records of all requests."""
    workload = plan.schedule.workload
    models = tuple(
        f"{name}={plan.names[at]}" if plan.names.get(at, name) != name else name
        for at, (name, _) in enumerate(workload.models)
    )
    head = head_of(
        ran.records, scenario=plan.scenario.name, url=str(plan.address), seed=plan.options.seed,
        warmup_ns=plan.schedule.warmup_ns, end_ns=plan.schedule.end_ns, models=models, loads=workload.loads,
    )  # fmt: skip
    write_records(path, head, ran.records)


# ------------------------------------------------------------
# The sending processes as their parent sees them: it starts, synchronises, monitors and ends them.


AHEAD_NS: Final = 200 * NS_PER_MS  # how far ahead of the start of the run its instant is sent to the senders
_READY_S: Final = OPEN_S + 50.0
_POLL_S: Final = 0.005


class SenderFailed(ClockworkError):
    """A sending process ended on its own."""


class SenderProcess:
    """One sending process and its rows. ``final`` is its last message, once it has ended."""

    def __init__(self, job: Job, rows: Rows) -> None:
        self.job, self.rows = job, rows
        self.ends: list[End] = list(FIRST_ENDS)
        self.final: SenderMessage | None = None
        self.ready = False
        self._text = b""
        self._seen = 0
        self._log, self._counts = rows.array("ended"), rows.counts
        self.child = subprocess.Popen(
            [sys.executable, "-m", "clockwork_lab.bench.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(rows.fd,),
            start_new_session=True,  # Ctrl-C reaches the parent only, which stops its senders
        )  # fmt: skip
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self._in, self._out = self.child.stdin, self.child.stdout
        os.set_blocking(self._out.fileno(), False)

    def send_job(self) -> None:
        """Send it its job."""
        with contextlib.suppress(BrokenPipeError):
            write_job(self._in, self.job)

    def begin(self, start_ns: int) -> None:
        """Send it the instant at which the run begins."""
        self._in.write(b"%d\n" % start_ns)
        self._in.flush()

    def stop(self) -> None:
        """Have it stop sending: it sees the end of its standard input."""
        with contextlib.suppress(OSError):
            self._in.close()

    def close(self) -> None:
        """Close its descriptors; its rows can still be read."""
        self._out.close()
        os.close(self.rows.fd)

    def poll(self) -> None:
        """Read its messages. Raises :class:`SenderFailed` or :class:`Unreachable`."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out.fileno(), 1 << 16):
                self._text += data
            ended = True
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            message = msgspec.json.decode(line, type=SenderMessage)
            if message.error:
                raise Unreachable(f"url: expected connections to {self.job.host}, found: {message.error}")
            self.ready |= message.ready
            if message.code:
                assert message.code == len(self.ends)
                self.ends.append(End(Kind(message.kind), message.reason))
            if message.over:
                self.final = message
        if ended and self.final is None:
            raise SenderFailed(f"a sending process ended with status {self.child.wait()}")

    def new_rows(self) -> np.ndarray:
        """The rows that ended since the last call."""
        until = self._counts[0]
        self.poll()  # receives the meaning of new codes first
        seen, self._seen = self._seen, until
        return self._log[seen:until]

    @property
    def due(self) -> int:
        """Requests that were due so far."""
        return int(self._counts[1] + self._counts[2])

    def table(self, number: int, code_of: dict[End, int]) -> Table:
        """All rows that were due, as records."""
        opened, closed = self._counts[1], self._counts[2]
        first = self.job.open_rows
        found = np.zeros(opened + closed, ROW)
        for name in ROW.names or ():
            if name not in ("end", "process"):
                column = self.rows.array(name)
                found[name][:opened] = column[:opened]
                found[name][opened:] = column[first : first + closed]
        status = self.rows.array("status")
        codes = np.array([code_of[end] for end in self.ends], np.int16)
        found["end"][:opened] = codes[status[:opened]]
        found["end"][opened:] = codes[status[first : first + closed]]
        found["process"] = number
        return found


class Crew:
    """All sending processes. Leaving the block ends them, if necessary by SIGKILL."""

    def __init__(self, plan: Plan) -> None:
        self.processes = [SenderProcess(job, rows) for job, rows in zip(plan.jobs, plan.rows, strict=True)]
        self.start_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stop()
            if process.final is None:
                process.child.kill()
            process.child.wait()
            process.close()

    def begin(self) -> None:
        """Have them open their connections, then send all of them the instant of the start."""
        for process in self.processes:
            process.send_job()
        give_up_at = time.monotonic() + _READY_S
        while not all(process.ready for process in self.processes):
            for process in self.processes:
                process.poll()
            if time.monotonic() > give_up_at:
                raise SenderFailed(f"a sending process did not begin within {_READY_S:g} s")
            time.sleep(_POLL_S)
        self.start_ns = time.monotonic_ns() + AHEAD_NS
        for process in self.processes:
            process.begin(self.start_ns)

    def stop(self) -> None:
        """Have all stop sending; requests in flight are awaited."""
        for process in self.processes:
            process.stop()

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return all(process.final is not None for process in self.processes)

    def records(self) -> Records:
        """The records of all requests, in order of their schedule."""
        ends: dict[End, int] = {end: code for code, end in enumerate(FIRST_ENDS)}
        for process in self.processes:
            for end in process.ends:
                ends.setdefault(end, len(ends))
        table = np.concatenate([process.table(number, ends) for number, process in enumerate(self.processes)])
        order = np.argsort(table["scheduled_ns"], kind="stable")
        return Records(table[order], tuple(ends))


# ------------------------------------------------------------
# Live figures during a run: counts since its start, rates and quantiles of the last interval.


EVERY_S: Final = 0.25


class LoadSample(Struct, frozen=True, kw_only=True):
    """A sample of the run. Quantiles are in ms, None if there were no requests.

    ``asked``: requests due so far; ``out``: those of them that are in flight. Rates are over the last
    interval.
    """

    at_s: float
    seconds: float
    warming: bool
    stopping: bool
    asked: int
    out: int
    good: int
    late: int
    others: dict[str, int]
    reasons: dict[str, int]
    asked_rps: float
    good_rps: float
    p50_ms: float | None
    p99_ms: float | None
    lateness_p99_ms: float | None
    bars: tuple[float, ...]  # satisfaction in each of the last intervals, the newest last


class Live:
    """Reads the senders' rows as they end."""

    def __init__(self, plan: Plan, crew: Crew) -> None:
        self._plan, self._crew = plan, crew
        self._good = self._late = self._over = 0
        self._ends: Counter[End] = Counter()
        self._asked, self._then_s = 0, 0.0
        self._bars: list[float] = []

    def sample(self, *, stopping: bool) -> LoadSample:
        """The state now, with rates since the previous call."""
        latencies, lateness = [], []
        good_before, over_before = self._good, self._over
        asked = 0
        for process in self._crew.processes:
            new = process.new_rows()
            asked += process.due
            if not new.size:
                continue
            due, sent, last, slo, status = (
                process.rows.array(name)[new]
                for name in ("scheduled_ns", "sent_ns", "last_ns", "slo_ns", "status")
            )
            self._over += new.size
            answered = status == ANSWERED
            latency = (last - due)[answered]
            good = int(np.count_nonzero(latency <= slo[answered]))
            self._good += good
            self._late += latency.size - good
            latencies.append(latency)
            lateness.append((sent - due)[sent > 0])
            for code, count in enumerate(np.bincount(status, minlength=2).tolist()):
                if code != ANSWERED and count:
                    self._ends[process.ends[code]] += count
        at_s = (time.monotonic_ns() - self._crew.start_ns) / NS_PER_S
        span_s = max(1e-3, at_s - self._then_s)
        asked_rps, self._asked, self._then_s = (asked - self._asked) / span_s, asked, at_s
        if self._over > over_before:
            self._bars = [*self._bars[-59:], (self._good - good_before) / (self._over - over_before)]
        others: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for end, count in self._ends.items():
            others[end.kind.name.lower()] += count
            reasons[end.reason or end.kind.name.lower()] += count
        quantiles = _quantiles(latencies)
        return LoadSample(
            at_s=max(0.0, at_s), seconds=self._plan.schedule.end_ns / NS_PER_S, stopping=stopping,
            warming=at_s * NS_PER_S < self._plan.schedule.warmup_ns, asked=asked, out=asked - self._over,
            good=self._good, late=self._late, others=dict(others), reasons=dict(reasons.most_common(8)),
            asked_rps=asked_rps, good_rps=(self._good - good_before) / span_s, p50_ms=quantiles[0],
            p99_ms=quantiles[1], lateness_p99_ms=_quantiles(lateness)[1], bars=tuple(self._bars),
        )  # fmt: skip


def _quantiles(parts: list[np.ndarray]) -> tuple[float | None, float | None]:
    values = np.concatenate(parts) if parts else np.zeros(0)
    if not values.size:
        return None, None
    p50, p99 = np.quantile(values, (0.5, 0.99)) / NS_PER_MS
    return float(p50), float(p99)
