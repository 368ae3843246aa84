"""A whole run: starts, watches and ends the senders, and reports what they measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clockwork_lab.bench.crew import Crew
from clockwork_lab.bench.live import Moment, watch
from clockwork_lab.bench.plan import Plan
from clockwork_lab.bench.records import Records, head_of, write_records
from clockwork_lab.bench.report import Report, make_report


@dataclass(slots=True)
class Ran:
    """The result of a run."""

    report: Report
    records: Records


def run(
    plan: Plan,
    *,
    show: Callable[[Moment], None] = lambda moment: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Ran:
    """Run the plan to its end, or until ``stopped()``, which is polled; requests in flight are awaited.

    Raises :class:`Unreachable`, or :class:`SenderFailed` if a sending process ends by itself.
    """
    cut_ns: list[int] = []

    def stop_requested() -> bool:
        if not cut_ns and stopped():
            cut_ns.append(time.monotonic_ns() - crew.start_ns)
        return bool(cut_ns)

    with Crew(plan) as crew:
        crew.begin()
        watch(plan, crew, show, stop_requested)
        records = crew.records()
        messages = [process.final for process in crew.processes if process.final is not None]
    report = make_report(plan, records, messages, cut_ns=cut_ns[0] if cut_ns else None)
    return Ran(report, records)


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
