"""A slow model at three times its capacity: infeasible requests are rejected at once, and the lane is used.

An emulated (or Python) model takes 500 ms; requests with SLOs of 100, 600 and 1200 ms arrive in an open
loop. The journal has the lane's executions, and the client's clock tells when each request was sent and
answered. Which requests were infeasible, and what could have been served at best, is calculated by
``benchmarks.overload.oracle`` alone.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.overload.oracle import Job, Run, could_join, hopeless_at, most_in_time
from clockwork_serve.messages import Infer, Result, Status
from clockwork_serve.telemetry import read_journal
from harness import repositories
from harness.http_load import Report, Sample, Shot, header_of, infer_message, open_loop, poisson, run
from harness.report import Outcome, finish, milliseconds, parser, quantile
from harness.serving import Serving, serve

MODEL = "slow"
X = [("x", "FP32", (1, 4), bytes(16))]
WOULD_MISS = "429 would_miss_deadline"
WARM_SLO_MS = 5000
LAG_MS = 10


@dataclass(slots=True)
class Findings:
    """What the oracle says of a run; times in ns."""

    service_ns: int
    lags_ns: list[int]
    """Rejection less the instant at which the request became hopeless."""
    late_ns: list[int]
    """Good answers that came after their deadline: by how much."""
    answered: int
    good: int
    best: int
    could_have_joined: int
    other_ends: Counter[str]


def shots(url: str, rate: float, seconds: float, slos_ms: Sequence[int], seed: int) -> list[Shot]:
    """A Poisson process; each request has one of the SLOs, which is also its name."""
    rng = random.Random(seed)
    messages = {slo: infer_message(url, MODEL, X, slo_ms=slo) for slo in slos_ms}
    return [
        Shot(at_ns, messages[slo], str(slo))
        for at_ns in poisson(rate, seconds, rng)
        for slo in [rng.choice(slos_ms)]
    ]


def runs_of(journal: Path, samples: Sequence[Sample]) -> list[Run]:
    """All that the lane did; requests are named ``str(index)`` of ``samples``.

    A response tells the id that the server gave to its request.
    """
    names = {header_of(sample, "clockwork-request-id"): str(index) for index, sample in enumerate(samples)}
    infers: dict[int, Infer] = {}
    runs = []
    for step in read_journal(journal):
        for event in step.events:
            if isinstance(event, Result) and event.action_id in infers and event.status is Status.OK:
                called = infers[event.action_id].calls
                ids = frozenset(names[call.request_id] for call in called if call.request_id in names)
                runs.append(Run(event.started_ns, event.ended_ns, ids))
        for effect in step.effects:
            if isinstance(effect, Infer):
                infers[effect.action_id] = effect
    return sorted(runs, key=lambda run: run.start_ns)


def judge(samples: Sequence[Sample], runs: Sequence[Run]) -> Findings:
    """Hold what the clients saw against what was possible."""
    service_ns = min(run.end_ns - run.start_ns for run in runs)
    jobs = [
        Job(sample.sent_ns, sample.sent_ns + int(sample.name) * 1_000_000, str(index))
        for index, sample in enumerate(samples)
    ]
    good = [
        job
        for job, sample in zip(jobs, samples, strict=True)
        if sample.status == 200 and sample.done_ns <= job.deadline_ns
    ]
    refused = [(job, sample) for job, sample in zip(jobs, samples, strict=True) if sample.end == WOULD_MISS]
    return Findings(
        service_ns=service_ns,
        lags_ns=[sample.done_ns - hopeless_at(job, runs, service_ns) for job, sample in refused],
        late_ns=[
            sample.done_ns - job.deadline_ns
            for job, sample in zip(jobs, samples, strict=True)
            if sample.status == 200 and sample.done_ns > job.deadline_ns
        ],
        answered=sum(1 for sample in samples if sample.status == 200),
        good=len(good),
        best=most_in_time(jobs, service_ns),
        could_have_joined=sum(1 for job, _ in refused if could_join(job, good, service_ns)),
        other_ends=Counter(sample.end for sample in samples if sample.end not in {"200", WOULD_MISS}),
    )


def conclude(found: Findings, sent: int) -> Outcome:
    """The promises, one by one."""
    outcome = Outcome("benchmarks.overload")
    lag_ns = quantile(found.lags_ns, 0.99)
    late_by = f", by up to {milliseconds(max(found.late_ns))}" if found.late_ns else ""
    outcome.at_most("hopeless requests told after, p99", LAG_MS, lag_ns / 1e6, "ms")
    outcome.judge(
        "all others answered", asked="no other end", found=str(dict(found.other_ends) or "none"),
        good=not found.other_ends,
    )  # fmt: skip
    outcome.judge(
        "answered late", asked="<= 0.1 %", found=f"{len(found.late_ns)} of {found.answered}{late_by}",
        good=len(found.late_ns) <= 0.001 * sent,
    )  # fmt: skip
    joined = 100 * found.could_have_joined / sent
    outcome.at_most("rejected, but could have been served", 2, joined, "%")
    beside = f"({found.good} of {found.best})"
    outcome.at_least(
        "goodput of the offline best", 90, 100 * found.good / max(1, found.best), "%", more=beside
    )
    outcome.figures = {
        "sent": sent, "service_ms": found.service_ns / 1e6, "good": found.good, "best": found.best,
        "late_ms": [late_ns / 1e6 for late_ns in found.late_ns], "could_have_joined": found.could_have_joined,
        "lag_ms": {str(share): quantile(found.lags_ns, share) / 1e6 for share in (0.5, 0.9, 0.99, 1.0)},
    }  # fmt: skip
    return outcome


def load(serving: Serving, schedule: Iterable[Shot]) -> list[Sample]:
    """Warm up with one request, send all, and give them back in order of sending."""
    url = serving.http_url
    warm: Report = run(open_loop(url, [Shot(0, infer_message(url, MODEL, X, slo_ms=WARM_SLO_MS))]))
    if warm.ends() != {"200": 1}:
        raise RuntimeError(f"the warm-up was not answered: {dict(warm.ends())}")
    report = run(open_loop(url, schedule))
    return sorted(report.samples, key=lambda sample: sample.sent_ns)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--overload", type=float, default=3.0, help="times the capacity of batch 1")
    options.add_argument("--backend", choices=("emulated", "python"), default="emulated")
    options.add_argument("--service-ms", type=float, default=500.0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root, journal = Path(name) / "models", Path(name) / "journal"
        if given.backend == "emulated":
            repositories.emulated(root, MODEL, {1: given.service_ms})
        else:
            repositories.sleeper(root, MODEL, given.service_ms / 1000)
        device = "cpu" if given.backend == "python" else "emulated"
        with serve(root, device=device, journal=journal) as serving:
            rate = given.overload * 1000 / given.service_ms
            slos = [round(share * given.service_ms) for share in (0.2, 1.2, 2.4)]
            schedule = shots(serving.http_url, rate, given.seconds, slos, given.seed)
            samples = load(serving, schedule)
        runs = runs_of(journal, samples)
    outcome = conclude(judge(samples, runs), len(samples))
    outcome.figures["backend"] = given.backend
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
