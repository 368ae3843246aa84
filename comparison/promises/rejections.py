"""How soon rejections reach clients at three times the load: all, and those of infeasible requests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from comparison.peers import served
from comparison.peers.clockwork.adapter import PEER
from comparison.promises.executions import NUMBERED, Execution, executions, log_of, numbered, started
from comparison.promises.infeasible import Asked, Rules, infeasible
from comparison.promises.loads import (
    EMULATED,
    MOBILENET,
    NS_PER_MS,
    SLO_MS,
    ages_ns,
    names,
    quantile_ms,
    steady,
)
from comparison.promises.question import Figures, Question, Row, Runs, at_most, column
from comparison.promises.rig import Rig, Serving
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
    asked = PEER if kind == MOBILENET else NUMBERED
    with rig.serving(kind, names(models), asked=asked) as serving, serving.apart():
        figures = _bodies(serving, rate, repeat) if kind == MOBILENET else _numbers(serving, rate, repeat)
    return {**serving.slot, "rate_rps": rate, **figures}


def _bodies(serving: Serving, rate: float, repeat: int) -> Figures:
    played = serving.play(steady(MOBILENET, MODELS, rate, seconds=SECONDS, warmup_s=WARMUP_S), repeat)
    counted = played.counted
    refused = counted[played.is_end(counted, "rejected")]
    # A request is sent late where no connection is free or the socket takes no more: the server's doing too.
    from_sent = refused["last_ns"] - refused["sent_ns"]
    return {
        "asked": len(counted), "good_per_s": played.good_per_s, "rejected": len(refused),
        "p50_ms": quantile_ms(ages_ns(refused), 0.5), "p99_ms": quantile_ms(ages_ns(refused), 0.99),
        "from_sent_p99_ms": quantile_ms(from_sent, 0.99), "sent_late_p99_ms": played.sent_late_p99_ms,
        "expired": played.count("expired"), "none": played.count("none"), "generator": played.generator,
    }  # fmt: skip


def _numbers(serving: Serving, rate: float, repeat: int) -> Figures:
    setup, rng = serving.setup, random.Random(repeat)
    slos = SLOS_MS if len(setup.names) == 1 else (SLO_MS[EMULATED],)
    shots = []
    for number, at_ns in enumerate(poisson(rate, SECONDS + WARMUP_S, rng)):
        model, slo_ms = rng.choice(setup.names), rng.choice(slos)
        shots.append(Shot(at_ns, message(serving, model, number, slo_ms), f"{number} {model} {slo_ms}"))
    log = log_of(setup)
    log.write_text("")
    report = run(open_loop(serving.url, shots, connections=64))
    return told(report.samples, executions(log.read_text().splitlines()), setup.batch)


def message(serving: Serving, model: str, number: int, slo_ms: float) -> bytes:
    """A whole request that says its number to the device."""
    setup = replace(serving.setup, slo_ms=slo_ms)
    made = serving.asked.request(setup, numbered(serving.x, number))
    headers = "".join(f"{name}: {value}\r\n" for name, value in made.headers)
    return http_message(serving.url, "POST", made.path.replace("{model}", model), made.body, headers)


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
