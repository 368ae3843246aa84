"""What traces cost who is served, and whether any refused or late request, or any span's parent, is missing.

A server with an emulated device and a journal answers an open loop. In turns, a process sends its traces to a
collector and every request has a trace of its client's, or that process is stopped and none has. What it
missed it reads in its next turn, so it works twice as hard there. Then more is asked than can be served, the
gateway is stopped now and then, and some requests are wrong; of all that did not end well, the collector must
know.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import IO, Any

from clockwork_serve.messages import Answer, Outcome, Reason, Request
from clockwork_serve.oip import trace_context
from clockwork_serve.telemetry import Journal
from harness import report, repositories
from harness.http_load import Sample, Shot, header_of, infer_message, open_loop, poisson, reason_of, run
from harness.serving import Serving, serve, until

RATIO = 1.05
SLO_MS = 250.0
CLOSING_S = 3.0
"""Until all is on disk, and read."""
AT_REST_US = 20.0


@contextmanager
def idle(command: Sequence[str], **pipes: int) -> Iterator[subprocess.Popen[str]]:
    """A process that gets what CPU nobody else wants, as if it were on another machine."""
    with subprocess.Popen([sys.executable, "-m", *command], text=True, **pipes) as process:  # type: ignore[call-overload]
        with suppress(OSError):
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        yield process


def stop_now_and_then(pid: int) -> None:
    """Three times a tenth of a second."""
    for _ in range(3):
        time.sleep(0.4)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(pid, signal.SIGCONT)


def first_line(stream: IO[str] | None) -> str:
    """What a process says first."""
    assert stream is not None
    return stream.readline().strip()


class Asking:
    """Sends requests to a server; ``bad`` are those that did not end well."""

    def __init__(self, serving: Serving, seed: int) -> None:
        self.url = serving.http_url
        self.rng = random.Random(seed)
        self.requests = 0
        self.bad: list[Sample] = []
        self.anonymous: Counter[str] = Counter()

    def message(self, *, traced: bool, slo_ms: float = SLO_MS, width: int = 4) -> bytes:
        """A request; one of another width than 4 is wrong."""
        data = bytes(4 * width)
        made = infer_message(self.url, "m", [("x", "FP32", (1, width), data)], slo_ms=slo_ms)
        if not traced:
            return made
        trace = f"traceparent: 00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01\r\n"
        return made.replace(b"Content-Type:", trace.encode() + b"Content-Type:", 1)

    def load(self, shots: Iterable[Shot], connections: int = 32) -> list[Sample]:
        """What became of a schedule."""
        samples = run(open_loop(self.url, shots, connections=connections)).samples
        self.requests += len(samples)
        self.bad += [sample for sample in samples if sample.status not in (0, 200)]
        return samples

    def turn(self, rate: float, seconds: float, *, traced: bool) -> float:
        """The p99 of good answers, in ms."""
        shots = [
            Shot(at_ns, self.message(traced=traced)) for at_ns in poisson(rate, seconds, self.rng)
        ]  # fmt: skip
        good = sorted(sample.latency_ns for sample in self.load(shots) if sample.status == 200)
        return good[len(good) * 99 // 100] / 1e6

    def trouble(self, serving: Serving, rate: float, seconds: float) -> None:
        """Ask for more than can be served, and wrongly now and then; stop the gateway now and then."""
        gateway = serving.server.pid("gateway-0")
        assert gateway is not None
        shots = [
            Shot(at_ns, self.message(traced=True, slo_ms=60, width=3 if self.rng.random() < 0.02 else 4))
            for at_ns in poisson(rate, seconds, self.rng)
        ]
        stopping = threading.Thread(target=stop_now_and_then, args=(gateway,))
        stopping.start()
        self.load(shots, connections=128)
        stopping.join()

    def unknown(self, roots: set[str]) -> list[str]:
        """Ids and reasons of what did not end well, and is in no trace."""
        ids = [(header_of(sample, "clockwork-request-id"), reason_of(sample)) for sample in self.bad]
        return [f"{name or '(no id)'}: {reason}" for name, reason in ids if name not in roots]


def in_turns(asking: Asking, pid: int, rounds: int, rate: float, seconds: float) -> dict[str, list[float]]:
    """The p99 of each turn, with traces and without."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    asking.turn(rate, 1.0, traced=True)
    for number in range(rounds):
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            os.kill(pid, signal.SIGCONT if kind == "with" else signal.SIGSTOP)
            found[kind].append(asking.turn(rate, seconds, traced=kind == "with"))
    os.kill(pid, signal.SIGCONT)
    return found


def judge_spans(outcome: report.Outcome, spans: list[dict[str, Any]], asking: Asking) -> None:
    """Whether all is there."""
    ids = {(one["trace"], one["span"]) for one in spans}
    inner = [one for one in spans if one["name"] != "clockwork.request"]
    roots = {one["attributes"]["clockwork.request"] for one in spans if one["name"] == "clockwork.request"}
    orphans = [one["name"] for one in inner if (one["trace"], one["parent"]) not in ids]
    outcome.none("spans without their parent", orphans, more=f"of {len(spans):,}")
    outcome.none("spans that are there twice", [0] * (len(spans) - len(ids)))
    reasons = Counter(reason_of(sample) or str(sample.status) for sample in asking.bad)
    kinds = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    unknown = asking.unknown(roots)
    outcome.none("requests that did not end well, and are in no trace", unknown, more=f"of {kinds}")
    late = [reason for reason in ("late", "would_miss_deadline", "bad_input") if not reasons[reason]]
    if late:
        outcome.invalid = f"none was {' or '.join(late)}"
    outcome.figures["reasons"] = dict(reasons)


def record_us(folder: Path, count: int = 20_000) -> float:
    """CPU that a gateway uses to keep one request that it refuses, both threads."""
    journal = Journal(folder / "refused")
    began_ns = time.process_time_ns()
    for number in range(count):
        name = f"gateway-0-19b0b2c5d5e-{number}"
        request = Request(request_id=name, gateway="gateway-0", model="m/1", arrival_ns=1, deadline_ns=2)
        answer = Answer(
            request_id=name, gateway="gateway-0", outcome=Outcome.REJECTED, reason=Reason.WOULD_MISS_DEADLINE,
            message="the deadline would be missed by 12.3 ms: others are due before it", retry_after_ns=1,
        )  # fmt: skip
        journal.on_step(1 << 50, (request,), (answer,))
    journal.close()
    return (time.process_time_ns() - began_ns) / count / 1e3


def parse_us(count: int = 20_000) -> float:
    """CPU to read one trace context."""
    parent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    began_ns = time.process_time_ns()
    for _ in range(count):
        trace_context(parent)
    return (time.process_time_ns() - began_ns) / count / 1e3


def measure(folder: Path, rounds: int, rate: float, seconds: float, seed: int) -> report.Outcome:
    """Turns, then trouble, then what the collector knows."""
    outcome = report.Outcome("benchmarks.traces")
    repositories.emulated(folder / "models", "m", {1: 4, 2: 5, 4: 7, 8: 12, 16: 22})
    journal, file = folder / "run.journal", folder / "spans"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        serve(folder / "models", device="emulated", journal=journal) as serving,
        idle(["harness.collector", str(file)], **pipes) as collector,
    ):
        command = ["harness.tracing", str(journal), first_line(collector.stdout)]
        with idle(command, stdout=subprocess.PIPE) as traces:
            asking = Asking(serving, seed)
            until("it reads the journal", lambda: _reads(traces.pid, journal))
            found = in_turns(asking, traces.pid, rounds, rate, seconds)
            asking.trouble(serving, 4 * rate, 2.0)
            time.sleep(CLOSING_S)
            traces.send_signal(signal.SIGINT)
            told = json.loads(traces.communicate(timeout=120)[0])
            cpu_us = told["cpu_s"] * 1e6 / told["requests"]
        collector.communicate(timeout=120)
    ratios = [a / b for a, b in zip(found["with"], found["without"], strict=True)]
    times = f"({median(found['with']):.2f} and {median(found['without']):.2f} ms; {rounds} pairs of turns)"
    outcome.at_most("p99 with traces, of that without, median", RATIO, median(ratios), digits=3, more=times)
    judge_spans(outcome, [json.loads(line) for line in file.read_text().splitlines()], asking)
    outcome.none("spans dropped or not taken", [0] * (told["dropped"] + told["failed"]))
    outcome.at_most("CPU of a gateway to keep what it refuses", AT_REST_US, record_us(folder), "us", digits=1)
    outcome.at_most("CPU of a gateway to read a trace context", AT_REST_US, parse_us(), "us", digits=1)
    outcome.figures |= {"p99_ms": found, "ratios": ratios, "told": told, "cpu_us_of_a_request": cpu_us}
    print(f"CPU of the process that sends traces: {cpu_us:.0f} us a request, at idle priority", flush=True)
    return outcome


def _reads(pid: int, file: Path) -> bool:
    return any(link.exists() and link.samefile(file) for link in Path(f"/proc/{pid}/fd").iterdir())


def main() -> int:
    """Run it; returns the exit status."""
    options = report.parser(__doc__)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--rate", type=float, default=200.0)
    options.add_argument("--seconds", type=float, default=8.0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outcome = measure(Path(name), given.rounds, given.rate, given.seconds, given.seed)
    return report.finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
