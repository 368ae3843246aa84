"""How soon rejections reach clients at three times the load: all, and those of infeasible requests."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Final

from comparison.peers import served
from comparison.peers.loads import EMULATED, MOBILENET, SLO_MS, names, steady
from comparison.peers.measure import Serving
from comparison.peers.record import NS_PER_MS, ages_ns, quantile_ms, sent_late_ns
from comparison.peers.servers import CLOCKWORK
from comparison.promises.question import Figures, Question, Row, Runs, at_most, column
from comparison.promises.rig import NUMBERED, Execution, Rig, executions, log_of, numbered, started
from harness.http_load import Sample, Shot, http_message, open_loop, poisson, run

MODELS: Final = 15
TIMES: Final = 3.0
SECONDS, WARMUP_S = 20, 4
SLOS_MS: Final = (60, 120, 200)
"""Of one model: with one SLO for all, few are hopeless on arrival beyond doubt."""
REJECTED: Final = 429
MS: Final = 1_000_000


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """Three times what the server answers in time at best. ``one`` is one model, ``emulated`` are 15."""
    kind, models = (MOBILENET if variant == "mobilenet" else EMULATED), 1 if variant == "one" else MODELS
    rate = TIMES * rig.limit(kind, models, repeat)
    asked = CLOCKWORK if kind == MOBILENET else NUMBERED
    with rig.serving(kind, names(models), asked=asked) as up, up.metered():
        figures = _bodies(up, rate, repeat) if kind == MOBILENET else _numbers(up, rate, repeat)
    return {**up.used, "rate_rps": rate, **figures}


def _bodies(up: Serving, rate: float, repeat: int) -> Figures:
    played = up.play(steady(MOBILENET, MODELS, rate, seconds=SECONDS, warmup_s=WARMUP_S), repeat)
    counted = played.counted
    refused = counted[played.is_end(counted, "rejected")]
    # A request is sent late where no connection is free or the socket takes no more: the server's doing too.
    from_sent = refused["last_ns"] - refused["sent_ns"]
    return {
        "asked": len(counted), "good_per_s": played.good_per_s, "rejected": len(refused),
        "p50_ms": quantile_ms(ages_ns(refused), 0.5), "p99_ms": quantile_ms(ages_ns(refused), 0.99),
        "from_sent_p99_ms": quantile_ms(from_sent, 0.99),
        "sent_late_p99_ms": quantile_ms(sent_late_ns(counted), 0.99),
        "expired": played.count("expired"), "none": played.count("none"), **played.about,
    }  # fmt: skip


def _numbers(up: Serving, rate: float, repeat: int) -> Figures:
    setup, rng = up.setup, random.Random(repeat)
    slos = SLOS_MS if len(setup.names) == 1 else (SLO_MS[EMULATED],)
    shots = []
    for number, at_ns in enumerate(poisson(rate, SECONDS + WARMUP_S, rng)):
        model, slo_ms = rng.choice(setup.names), rng.choice(slos)
        shots.append(Shot(at_ns, message(up, model, number, slo_ms), f"{number} {model} {slo_ms}"))
    log = log_of(setup)
    log.write_text("")
    report = run(open_loop(up.url, shots, connections=64))
    return told(report.samples, executions(log.read_text().splitlines()), setup.batch)


def message(up: Serving, model: str, number: int, slo_ms: float) -> bytes:
    """A whole request that says its number to the device."""
    setup = replace(up.setup, slo_ms=slo_ms)
    made = up.asked.request(setup, numbered(up.x, number))
    headers = "".join(f"{name}: {value}\r\n" for name, value in made.headers)
    return http_message(up.url, "POST", made.path.replace("{model}", model), made.body, headers)


def told(samples: Sequence[Sample], ran: Sequence[Execution], batch_max: int) -> Figures:
    """Of requests named ``NUMBER MODEL SLO``: all refusals, and those that the oracle calls infeasible."""
    ordered = sorted(samples, key=lambda one: one.sent_ns)
    hopeless = infeasible(
        asked_of(ordered, started(ran)), [(one.began_ns, one.ended_ns) for one in ran],
        Rules(lambda rows: round(served.exec_ms(rows) * MS), batch_max),
    )  # fmt: skip
    from_ns = min((one.due_ns for one in ordered), default=0) + WARMUP_S * 1_000_000_000
    counted = [(one, bad) for one, bad in zip(ordered, hopeless, strict=True) if one.due_ns >= from_ns]
    refused = [(one, bad) for one, bad in counted if one.status == REJECTED]
    ages = [one.latency_ns for one, _ in refused]
    # From the oracle's instant: who was sent late was hopeless when it was sent.
    at_once = [one.done_ns - one.sent_ns for one, bad in refused if bad]
    good = sum(one.status == 200 and one.latency_ns <= slo_ns(one) for one, _ in counted)
    return {
        "asked": len(counted), "good_per_s": good / SECONDS, "rejected": len(refused),
        "p50_ms": quantile_ms(ages, 0.5), "p99_ms": quantile_ms(ages, 0.99),
        "hopeless": sum(bad for _, bad in counted), "hopeless_rejected": len(at_once),
        "hopeless_answered": sum(
            bad and one.status == 200 and one.done_ns <= one.sent_ns + slo_ns(one) for one, bad in counted
        ),
        "hopeless_p50_ms": quantile_ms(at_once, 0.5), "hopeless_p99_ms": quantile_ms(at_once, 0.99),
        "hopeless_soon": sum(age <= 10 * NS_PER_MS for age in at_once) / len(at_once) if at_once else None,
        "sent_late_p99_ms": quantile_ms([one.sent_ns - one.due_ns for one, _ in counted], 0.99),
        "rows_per_batch": sum(len(one.numbers) for one in ran) / max(1, len(ran)),
    }  # fmt: skip


def slo_ns(one: Sample) -> int:
    """As its name tells."""
    return int(one.name.split()[2]) * MS


def asked_of(samples: Sequence[Sample], began_ns: Mapping[int, int]) -> list[Asked]:
    """As the oracle sees them: whoever was not answered in time was not admitted."""
    found = []
    for one in samples:
        number, model, _ = one.name.split()
        deadline_ns = one.sent_ns + slo_ns(one)
        in_time = one.status == 200 and one.done_ns <= deadline_ns
        began = began_ns.get(int(number)) if in_time else None
        found.append(Asked(model, one.sent_ns, deadline_ns, began))
    return found


# ------------------------------------------------------------
# The oracle.


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. ``began_ns`` is when its execution began; None: it never did, or was answered too late."""

    model: str
    sent_ns: int
    deadline_ns: int
    began_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What the oracle takes for granted."""

    batch_ns: Callable[[int], int]
    batch_max: int
    ahead_ns: int = 2_000_000
    grace_ns: int = 5_000_000


def infeasible(requests: Sequence[Asked], busy: Sequence[tuple[int, int]], rules: Rules) -> list[bool]:
    """Of each request, in their order. ``busy``: beginning and end of all executions.

    One device runs one batch at a time; a batch of n requests of one model takes ``batch_ns(n)``. For a
    request that was sent at ``t`` this knows what had been admitted: all requests that were sent at least
    ``ahead_ns`` before it, were served in time in the end, and had not begun to run at ``t``. Requests that
    were rejected in the end, or served too late, are ignored.

    A request is infeasible if the device, after the batch that it runs at ``t``, cannot execute this one and
    those of the admitted that are due at most ``grace_ns`` after this one's deadline, even in full batches:
    for each model as few as hold its requests. These simplifications make fewer requests infeasible: that
    each of the admitted has its own deadline, those due later, other arrivals meanwhile, overhead, and
    network delays.
    """
    assert all(one.sent_ns <= other.sent_ns for one, other in pairwise(requests))
    runs = sorted(busy)
    found, first, run = [], 0, 0
    for row, request in enumerate(requests):
        now_ns = request.sent_ns
        while run < len(runs) and runs[run][1] <= now_ns:
            run += 1
        free_ns = runs[run][1] if run < len(runs) and runs[run][0] < now_ns else now_ns
        # Whoever is before `first` has begun, or never does.
        while first < row and not _waits(requests[first], now_ns):
            first += 1
        waiting = Counter(
            one.model
            for one in requests[first:row]
            if _waits(one, now_ns)
            and one.sent_ns + rules.ahead_ns <= now_ns
            and one.deadline_ns <= request.deadline_ns
        )
        waiting[request.model] += 1
        found.append(free_ns + work_ns(waiting, rules) > request.deadline_ns + rules.grace_ns)
    return found


def _waits(request: Asked, now_ns: int) -> bool:
    return request.began_ns is not None and request.began_ns >= now_ns


def work_ns(waiting: Counter[str], rules: Rules) -> int:
    """The least time in which so many requests of each model can be executed."""
    total = 0
    for count in waiting.values():
        full, rest = divmod(count, rules.batch_max)
        total += full * rules.batch_ns(rules.batch_max) + (rules.batch_ns(rest) if rest else 0)
    return total


# ------------------------------------------------------------
# The rows.

TITLES: Final = {
    "one": "one model, emulated, SLOs 60, 120, 200 ms", "emulated": "15 models, emulated, SLO 200 ms",
    "mobilenet": "15 MobileNets, 602 kB, SLO 100 ms",
}  # fmt: skip


def rows(runs: Runs) -> list[Row]:
    """What clients waited for a no."""
    found = []
    for variant, title in TITLES.items():
        told = partial(column, runs, variant)
        if variant != "mobilenet":
            found += [
                Row(f"{title}: hopeless on arrival, no after (p99)", told("hopeless_p99_ms"), "{:.1f} ms",
                    at_most(10)),
                Row(f"{title}: so many were refused of these", told("hopeless_rejected"), "{:.0f}"),
                Row(f"{title}: of these, no within 10 ms", told("hopeless_soon", 100.0), "{:.1f} %"),
                Row(f"{title}: answered in time of these, so that the oracle was wrong",
                    told("hopeless_answered"), "{:.0f}", at_most(0, every=True)),
            ]  # fmt: skip
        found += [
            Row(f"{title}: all, no after (p99)", told("p99_ms"), "{:.1f} ms"),
            Row(f"{title}: all, no after (p50)", told("p50_ms"), "{:.1f} ms"),
            Row(f"{title}: so many were refused", told("rejected"), "{:.0f}"),
            Row(f"{title}: asked", told("rate_rps"), "{:.0f}/s"),
            Row(f"{title}: sent late (p99)", told("sent_late_p99_ms"), "{:.1f} ms"),
        ]
    return found


QUESTION: Final = Question(
    "rejections", "Rejections at three times the load", ("one", "emulated", "mobilenet"), measure, rows
)
