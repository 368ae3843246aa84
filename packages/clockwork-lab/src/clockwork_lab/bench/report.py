"""A run's figures as records, which ``--json`` writes; docs/use/bench.md explains each number.

All are computed from the records of the requests that were due after the warm-up. Latency counts from when a
request was due.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_lab.bench.job import SenderMessage
from clockwork_lab.bench.plan import Plan
from clockwork_lab.bench.records import ANSWERED, OPEN, Kind, Records, Table
from clockwork_serve import __version__
from clockwork_serve.units import NS_PER_MS, NS_PER_S, counted, plain
from clockwork_serve.workload.tables import NO_SLO_MS

SLO_CLASSES_MAX: Final = 12
"""If there are more different SLOs (as in a ramp), they are grouped by a third of a decade."""
CURVE: Final = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1)
STRETCHES_MAX: Final = 600

GENERATOR_LATE: Final = (
    "the load generator sent its requests late: p99 {p99:.3f} ms after they were due, at most {most:g} ms "
    "are allowed (--max-lateness-ms). {why}"
)
NO_CONNECTION: Final = (
    "{waited:,} requests found no free connection: raise --connections, if the server allows as many"
)
NO_CORE: Final = (
    "It did not get a core when it needed one: give it its own (--cores, --realtime), use --processes, or "
    "lower the rate"
)


class Quantiles(Struct, frozen=True, kw_only=True):
    """In ms; None if there are no values."""

    count: int
    p50_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    max_ms: float | None = None


class Group(Struct, frozen=True, kw_only=True):
    """The outcomes of a set of requests. ``offered`` is the sum of the counts from ``good`` to ``unsent``.

    ``good``: answered within the SLO. ``late``: answered after it. ``unanswered``: no response until the end
    of the run. ``unsent``: no connection was free until the end.
    """

    name: str
    offered: int
    offered_rps: float
    good: int
    goodput_rps: float
    satisfaction: float
    late: int
    rejected: int
    expired: int
    failed: int
    reset: int
    broken: int
    abandoned: int
    unanswered: int
    unsent: int
    answers: Quantiles  # latency of all responses, late ones too
    refusals: Quantiles  # latency of rejected and expired requests
    bytes_per_s: float


class EndReason(Struct, frozen=True, kw_only=True):
    """An end other than a successful response, in the server's words, and its latency."""

    kind: str
    reason: str
    count: int
    age: Quantiles


class BenchStretch(Struct, frozen=True, kw_only=True):
    """An interval of the run, by when requests were due; the warm-up too."""

    from_s: float
    offered: int
    good: int
    late: int
    refused: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    lateness_p99_ms: float | None


class Curve(Struct, frozen=True, kw_only=True):
    """A distribution: ms by share of all requests."""

    shares: tuple[float, ...]
    ms: tuple[float, ...]


class Sending(Struct, frozen=True, kw_only=True):
    """The generator's own figures. ``cpu_share``: of a core, for each process.

    ``unexpected``: how often bytes were received on a connection after its response.
    """

    processes: int
    connections: int
    waited_for_connection: int
    cpu_share: float
    unexpected: int
    unexpected_bytes: int


class BenchReport(Struct, frozen=True, kw_only=True):
    """All figures. If it is not ``valid``, ``invalid`` says why, and it proves nothing about the server."""

    version: str
    scenario: str
    url: str
    protocol: str
    setup: dict[str, Any]
    seconds: float
    warmup_s: float
    measured_s: float
    cut: bool
    valid: bool
    invalid: str
    lateness: Quantiles
    sending: Sending
    total: Group
    loads: tuple[Group, ...]
    models: tuple[Group, ...]
    slos: tuple[Group, ...]
    reasons: tuple[EndReason, ...]
    stretch_s: float
    stretches: tuple[BenchStretch, ...]
    answers_curve: Curve | None
    refusals_curve: Curve | None

    def to_json(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


def make_report(
    plan: Plan, records: Records, messages: list[SenderMessage], *, cut_ns: int | None
) -> BenchReport:
    """Compute the report; ``cut_ns``: when the run was stopped early, if it was."""
    schedule, options = plan.schedule, plan.options
    end_ns = schedule.end_ns if cut_ns is None else max(1, min(cut_ns, schedule.end_ns))
    from_ns = min(schedule.warmup_ns, end_ns)
    counted = records.table["scheduled_ns"] >= from_ns
    part = Records(records.table[counted], records.ends)
    measured_s = (end_ns - from_ns) / NS_PER_S
    lateness_ns = lateness_of(part.table, end_ns + round(options.drain_s * NS_PER_S))
    sending = _sending(messages, end_ns)
    late_ms = _quantile(lateness_ns, 0.99)
    invalid = ""
    if late_ms is not None and late_ms > options.max_lateness_ms:
        why = NO_CORE
        if sending.waited_for_connection * 100 > part.table.size:
            why = NO_CONNECTION.format(waited=sending.waited_for_connection)
        invalid = GENERATOR_LATE.format(p99=late_ms, most=options.max_lateness_ms, why=why)
    elif any(each.full for each in messages):
        invalid = "clients of closed loads stopped early: there is no room for more requests in one run"
    groups = _Groups(part)
    stretch_s, stretches = _stretches(records, end_ns)
    return BenchReport(
        version=__version__, scenario=plan.scenario.name, url=str(plan.address), protocol=options.protocol,
        setup=_setup(plan), seconds=schedule.end_ns / NS_PER_S, warmup_s=from_ns / NS_PER_S,
        measured_s=measured_s, cut=cut_ns is not None, valid=not invalid, invalid=invalid,
        lateness=_quantiles(lateness_ns), sending=sending,
        total=groups.of("all", np.ones(part.table.size, bool), measured_s),
        loads=tuple(_loads(plan, groups, part.table, from_ns, end_ns)),
        models=tuple(_models(plan, groups, part.table, measured_s)),
        slos=tuple(_slos(groups, part.table, measured_s)),
        reasons=tuple(_reasons(part)), stretch_s=stretch_s, stretches=stretches,
        answers_curve=_curve(groups.latency_ns[groups.answered]),
        refusals_curve=_curve(groups.latency_ns[groups.refused]),
    )  # fmt: skip


def lateness_of(table: Table, end_ns: int) -> Table:
    """How late each request was sent; for one that was not, until the end."""
    sent = np.where(table["sent_ns"] > 0, table["sent_ns"], np.maximum(end_ns, table["scheduled_ns"]))
    late: Table = sent - table["scheduled_ns"]
    # A request that failed for lack of a connection was not sent: that is the server's fault, not lateness.
    found: Table = late[(table["sent_ns"] > 0) | (table["end"] == OPEN)]
    return found


class _Groups:
    """Counts over any subset of the records."""

    def __init__(self, records: Records) -> None:
        table = records.table
        self._table, self._kinds = table, records.kinds
        self.latency_ns: Table = table["last_ns"] - table["scheduled_ns"]
        self.answered: Table = table["end"] == ANSWERED
        self.refused: Table = (self._kinds == Kind.REJECTED) | (self._kinds == Kind.EXPIRED)
        self._good = self.answered & (self.latency_ns <= table["slo_ns"])

    def of(self, name: str, chosen: Table, seconds: float) -> Group:
        """The group of the chosen requests, offered over ``seconds``."""
        kinds = np.bincount(self._kinds[chosen], minlength=len(Kind))
        offered = int(np.count_nonzero(chosen))
        good = int(np.count_nonzero(self._good & chosen))
        nbytes = float(self._table["nbytes"][chosen].sum(dtype=np.int64))
        unsent = int(np.count_nonzero(chosen & (self._table["sent_ns"] == 0) & (self._kinds == Kind.OPEN)))
        return Group(
            name=name, offered=offered, offered_rps=offered / seconds if seconds else 0.0, good=good,
            goodput_rps=good / seconds if seconds else 0.0, satisfaction=good / offered if offered else 1.0,
            late=int(kinds[Kind.ANSWERED]) - good, rejected=int(kinds[Kind.REJECTED]),
            expired=int(kinds[Kind.EXPIRED]), failed=int(kinds[Kind.FAILED]), reset=int(kinds[Kind.RESET]),
            broken=int(kinds[Kind.BROKEN]), abandoned=int(kinds[Kind.ABANDONED]),
            unanswered=int(kinds[Kind.OPEN]) - unsent, unsent=unsent,
            answers=_quantiles(self.latency_ns[self.answered & chosen]),
            refusals=_quantiles(self.latency_ns[self.refused & chosen]),
            bytes_per_s=nbytes / seconds if seconds else 0.0,
        )  # fmt: skip


def _loads(plan: Plan, groups: _Groups, table: Table, from_ns: int, end_ns: int) -> Iterable[Group]:
    """Groups by load; rates are over the time in which it was active."""
    for index, load in enumerate(plan.scenario.loads):
        yield groups.of(
            load.name, table["load"] == index, load.active_s(from_ns / NS_PER_S, end_ns / NS_PER_S)
        )


def _models(plan: Plan, groups: _Groups, table: Table, seconds: float) -> Iterable[Group]:
    for index, name in plan.names.items():
        own = plan.schedule.workload.models[index][0]
        shown = own if own == name else f"{own} ({name})"
        yield groups.of(shown, table["model"] == index, seconds)


def _slos(groups: _Groups, table: Table, seconds: float) -> Iterable[Group]:
    slos_ms = table["slo_ns"] / NS_PER_MS
    different = np.unique(slos_ms)
    if different.size <= SLO_CLASSES_MAX:
        for slo_ms in different.tolist():
            name = "none" if slo_ms >= NO_SLO_MS else f"{plain(slo_ms)} ms"
            yield groups.of(name, slos_ms == slo_ms, seconds)
        return
    steps = np.floor(np.log10(slos_ms) * 3)
    for step in np.unique(steps).tolist():
        name = f"{10 ** (step / 3):.3g} to {10 ** ((step + 1) / 3):.3g} ms"
        yield groups.of(name, steps == step, seconds)


def _reasons(records: Records) -> list[EndReason]:
    table, found = records.table, []
    latency_ns = table["last_ns"] - table["scheduled_ns"]
    for code, end in enumerate(records.ends):
        chosen = table["end"] == code
        count = int(np.count_nonzero(chosen))
        if count and end.kind not in (Kind.ANSWERED, Kind.OPEN):
            found.append(
                EndReason(
                    kind=end.kind.name.lower(),
                    reason=end.reason,
                    count=count,
                    age=_quantiles(latency_ns[chosen]),
                )
            )
    return sorted(found, key=lambda reason: -reason.count)


def _stretches(records: Records, end_ns: int) -> tuple[float, tuple[BenchStretch, ...]]:
    """The run cut into seconds, or longer pieces if it is long."""
    stretch_s = float(max(1, -(-end_ns // (NS_PER_S * STRETCHES_MAX))))
    table, groups, kinds = records.table, _Groups(records), records.kinds
    of = (table["scheduled_ns"] // round(stretch_s * NS_PER_S)).astype(np.int64)
    edges = np.searchsorted(of, np.arange(int(of[-1]) + 2)) if of.size else np.zeros(1, int)
    found = []
    for at in range(edges.size - 1):
        here = slice(int(edges[at]), int(edges[at + 1]))
        rows, latency = table[here], groups.latency_ns[here]
        answered = groups.answered[here]
        good = int(np.count_nonzero(answered & (latency <= rows["slo_ns"])))
        refused = int(np.count_nonzero(groups.refused[here]))
        late = int(np.count_nonzero(answered)) - good
        found.append(
            BenchStretch(
                from_s=at * stretch_s, offered=rows.size, good=good, late=late, refused=refused,
                failed=int(np.count_nonzero(kinds[here] >= Kind.FAILED))
                + int(np.count_nonzero(kinds[here] == Kind.OPEN)),
                p50_ms=_quantile(latency[answered], 0.5), p99_ms=_quantile(latency[answered], 0.99),
                lateness_p99_ms=_quantile(lateness_of(rows, end_ns), 0.99),
            )
        )  # fmt: skip
    return stretch_s, tuple(found)


def _sending(messages: list[SenderMessage], end_ns: int) -> Sending:
    total: Callable[[str], int] = lambda name: sum(getattr(each, name) for each in messages)  # noqa: E731
    return Sending(
        processes=len(messages), connections=total("connections"), waited_for_connection=total("waited"),
        cpu_share=sum(each.cpu_s for each in messages) / max(1, len(messages)) / (end_ns / NS_PER_S),
        unexpected=total("unexpected"), unexpected_bytes=total("unexpected_bytes"),
    )  # fmt: skip


def _setup(plan: Plan) -> dict[str, Any]:
    """The options of the run, to repeat it."""
    options = msgspec.to_builtins(plan.options)
    hidden = [(name, "...") for name, _ in plan.options.headers]
    source = plan.scenario.source
    return {
        **options, "file": source.file if source else None, "headers": hidden,
        "deadline": plan.options.deadline_field, "models_asked": len(plan.names),
        "notes": list(plan.schedule.workload.notes),
    }  # fmt: skip


def _curve(values_ns: Table) -> Curve | None:
    if not values_ns.size:
        return None
    found = np.quantile(values_ns, CURVE, method="inverted_cdf") / NS_PER_MS
    return Curve(shares=CURVE, ms=tuple(found.tolist()))


def _quantile(values_ns: Table, share: float) -> float | None:
    if not values_ns.size:
        return None
    return float(np.quantile(values_ns, share, method="inverted_cdf")) / NS_PER_MS


def _quantiles(values_ns: Table) -> Quantiles:
    if not values_ns.size:
        return Quantiles(count=0)
    found = (np.quantile(values_ns, (0.5, 0.99, 0.999, 1), method="inverted_cdf") / NS_PER_MS).tolist()
    return Quantiles(
        count=int(values_ns.size), p50_ms=found[0], p99_ms=found[1], p999_ms=found[2], max_ms=found[3]
    )


# ------------------------------------------------------------
# A report as lines and table rows of text.


Row = list[str]
COLUMNS: Final = (
    "load", ">offered", ">r/s", ">good r/s", ">in time", ">late", ">refused", ">failed", ">lost", ">p50 ms",
    ">p99", ">p99.9", ">max",
)  # fmt: skip
REASON_COLUMNS: Final = (
    "not answered",
    "in the server's words",
    ">count",
    ">after p50 ms",
    ">p99 ms",
    ">max ms",
)
MODELS_MAX: Final = 20  # the most models shown; the worst ones if there are more


def setup_lines(report: BenchReport) -> list[str]:
    """The run's scenario, server and options."""
    setup = report.setup
    sent_as = {
        "header": "x-slo-ms",
        "timeout": "parameter timeout",
        "grpc": "gRPC's deadline",
        "none": "nothing",
    }
    scale = setup["rate_scale"]
    long = f"{seconds(report.seconds)} s, of which {seconds(report.warmup_s)} s of warm-up are not counted"
    return [
        f"{report.scenario}: {long}",
        f"  server     {report.url} over {report.protocol}; deadlines sent as {sent_as[setup['deadline']]}",
        f"  requests   of {counted(setup['models_asked'], 'model')}; seed {setup['seed']}"
        + ("" if scale == 1 else f"; rates times {scale:g}"),
        *(f"  {'workload' if not at else '':<10} {note}" for at, note in enumerate(setup["notes"])),
    ]


def group_rows(groups: Sequence[Group]) -> list[Row]:
    """A row for each group, under ``COLUMNS``: latencies are of all responses, late ones too."""
    return [
        [
            group.name, f"{group.offered:,}", rate(group.offered_rps), rate(group.goodput_rps),
            in_time(group), f"{group.late:,}", f"{group.rejected + group.expired:,}",
            f"{group.failed:,}", f"{lost(group):,}", *_latency(group.answers),
        ]
        for group in groups
    ]  # fmt: skip


def reason_rows(report: BenchReport) -> list[Row]:
    """A row for each reason, under ``REASON_COLUMNS``."""
    return [
        [
            reason.kind, reason.reason, f"{reason.count:,}",
            *(in_ms(value) for value in (reason.age.p50_ms, reason.age.p99_ms, reason.age.max_ms)),
        ]
        for reason in report.reasons
    ]  # fmt: skip


def worst_models(report: BenchReport) -> tuple[Group, ...]:
    """The models to show: all, or if they are many those with the least satisfaction."""
    if len(report.models) <= MODELS_MAX:
        return report.models
    return tuple(sorted(report.models, key=lambda model: model.satisfaction)[:MODELS_MAX])


def closing_lines(report: BenchReport) -> list[str]:
    """Totals, the generator's own figures, and warnings."""
    total, sending, late = report.total, report.sending, report.lateness
    rates = f"{rate(total.goodput_rps)} r/s of {rate(total.offered_rps)} offered"
    lateness = f"p50 {in_ms(late.p50_ms)}, p99 {in_ms(late.p99_ms)}, max {in_ms(late.max_ms)} ms late"
    who = f"{counted(sending.connections, 'connection')}, {counted(sending.processes, 'process')}"
    lines = [
        f"goodput    {rates}: {in_time(total)} in time",
        f"generator  sent {lateness}",
        f"           {who} with {sending.cpu_share:.0%} of a core",
    ]
    if sending.waited_for_connection:
        lines.append(f"           {sending.waited_for_connection:,} requests waited for a connection")
    if total.unanswered:
        lines.append(f"           {total.unanswered:,} requests had no response when the run ended")
    if sending.unexpected:
        lines.append(
            f"           {sending.unexpected:,} unexpected responses: {sending.unexpected_bytes:,} bytes"
        )
    if report.cut:
        lines.append(f"CUT after {report.warmup_s + report.measured_s:.1f} s of {report.seconds:g} s")
    if not report.valid:
        lines.append(f"INVALID: {report.invalid}")
    return lines


def lost(group: Group) -> int:
    """Requests without any response from the server."""
    return group.reset + group.broken + group.abandoned + group.unanswered + group.unsent


def rate(per_second: float) -> str:
    """Requests per second."""
    return f"{per_second:,.1f}" if per_second < 1000 else f"{per_second:,.0f}"


def seconds(value: float) -> str:
    """Seconds, down to the millisecond."""
    return f"{round(value, 3):g}"


def in_time(group: Group) -> str:
    """The satisfaction as text; "-" if there were no requests."""
    return share(group.satisfaction) if group.offered else "-"


def share(part: float) -> str:
    """A share in percent, truncated rather than rounded: 100 % means all."""
    return "100 %" if part >= 1 else f"{math.floor(part * 100_000) / 1000:.3f}\N{NO-BREAK SPACE}%"


def _latency(found: Quantiles) -> Row:
    return [in_ms(value) for value in (found.p50_ms, found.p99_ms, found.p999_ms, found.max_ms)]


def in_ms(value: float | None) -> str:
    """Milliseconds as text, without the unit."""
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
