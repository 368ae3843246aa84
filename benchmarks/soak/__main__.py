"""Mixed load with faults on, for hours: whether anything grows, leaks, drifts or goes wrong.

make soak                                       an hour
python -m benchmarks.soak --minutes 2           the short form
python -m benchmarks.soak --hours 8 --json FILE --record FILE

In legs: two scenarios of the load generator at once, one over HTTP and one over gRPC, while models are
unloaded, loaded and replaced, other clients check every answer, and one thing goes wrong. After each leg
nothing is asked for a moment: then all books must be equal, and what each process holds is counted.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Final

from benchmarks.hostile import books, tracebacks
from benchmarks.report import finish, parser
from benchmarks.serving import Serving, total
from benchmarks.soak.faults import NONE, TURNS, Done, Faults
from benchmarks.soak.honest import Churn, Honest, Truth
from benchmarks.soak.load import SCENARIOS, Ends, Generator, write_models
from benchmarks.soak.screen import Screen
from benchmarks.soak.serving import Log, Processes, served
from benchmarks.soak.verdict import Findings, conclude
from benchmarks.soak.watch import Errors, Watch, as_json

LEG_S: Final = (4.0, 45.0)
LEGS_MIN: Final = 8
SETTLE_S: Final = 2.5
"""After a leg: longer than the server reads on from who was refused."""
RECOVERY_S: Final = 30.0
HONEST_RATE: Final = 40.0
CHANGE_EVERY_S: Final = 1.5
Up = tuple[Serving, Processes, Log]


class Soak:
    """One soak of a server that is up."""

    def __init__(self, folder: Path, up: Up, watch: Watch, seconds: float, seed: int) -> None:
        self.found = Findings()
        self._serving, self._server, self._log = serving, server, _ = up
        self._folder = folder
        self._watch, self._seconds = watch, seconds
        self.screen = Screen(seconds, watch, self.found)
        self._dice = random.Random(seed)
        truth = Truth()
        self._honest = Honest(serving, truth, HONEST_RATE, seed)
        self._churn = Churn(serving, folder / "models", truth, CHANGE_EVERY_S, seed)
        self._faults = Faults(server, seed, self._gateway_dies)
        self._errors = Errors()
        self._offset = 0
        """Requests that gateways received which were killed."""
        self._ok = 0.0
        self._pids = server.all()
        self._generator: Generator | None = None
        self.stopped = False

    def _gateway_dies(self) -> None:
        self._honest.gateway_died_s = time.monotonic()

    def counts(self) -> dict[str, int]:
        """For each sample."""
        return {"requests": self.found.requests + self._asked, "violations": len(self.found.violations)}

    @property
    def _asked(self) -> int:
        return sum(self._generator.asked.values()) if self._generator is not None else 0

    def run(self) -> None:
        """Leg after leg until time is over."""
        leg_s = min(LEG_S[1], max(LEG_S[0], self._seconds / LEGS_MIN - SETTLE_S - 1))
        self._honest.start()
        self._churn.start()
        self._watch.start(self.counts)
        leg = 0
        with self.screen:
            while self._watch.now_s + leg_s < self._seconds and not self.stopped:
                self._leg(leg, leg_s, TURNS[leg % len(TURNS)])
                leg += 1
        self._honest.close()
        self._churn.close()
        self.found.seconds = self._watch.now_s
        self.found.tracebacks = tracebacks(self._log.lines)
        self.found.cut = self.stopped

    def close(self) -> None:
        """Leave no process behind."""
        self._faults.close()

    def _leg(self, leg: int, seconds: float, fault: str) -> None:
        names = [*SCENARIOS]
        scenarios = (names[leg % len(names)], self._dice.choice(names))
        self.screen.doing = f"leg {leg + 1}: {scenarios[0]} over HTTP, {scenarios[1]} over gRPC, {fault}"
        self._generator = generator = Generator(
            self._folder, self._serving, scenarios, seconds, self._dice.randrange(1 << 30)
        )
        self._honest.go_on()
        self._churn.go_on()
        before = len(self._churn.failed)
        answered = self._honest.answered
        generator.start()
        after_s = seconds * (0.1 if fault == NONE else self._dice.uniform(0.2, 0.5))
        self._sleep(after_s)
        done = self._faults.begin(fault, seconds - after_s)
        self.found.faults[fault] += 1
        self._sleep(seconds - after_s)
        ends = generator.join()
        self._generator = None
        self._honest.pause()
        self._churn.pause()
        said = self._faults.end()
        self.found.honest = Counter(self._honest.ends)
        self.found.changes = Counter(self._churn.done)
        self.found.violations += self._honest.violations
        self._honest.violations.clear()
        self._sum(ends)
        self._judge(ends, self._churn.failed[before:], done)
        self._quiet(leg, done, ends.answered + self._honest.answered - answered)
        self._watch.write("leg", [leg, *scenarios, fault, ends.asked, ends.good, ends.late, ends.lost, said])

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.screen.show(self._asked)
            time.sleep(min(0.5, left))

    def _sum(self, ends: Ends) -> None:
        all_ = self.found.ends
        for name in ("asked", "answered", "good", "late", "failed", "lost", "twice"):
            setattr(all_, name, getattr(all_, name) + getattr(ends, name))
        all_.reasons.update(ends.reasons)

    def _judge(self, ends: Ends, unchanged: list[str], done: Done) -> None:
        """What only a fault excuses."""
        violations = self.found.violations
        if ends.lost and not done.gateway_died and not done.hostile:
            violations.append(f"lost: {ends.lost} requests of the generator got no response")
        if ends.twice:
            violations.append(f"twice: {ends.twice} bytes came that nobody had asked for")
        if ends.failed and not done.worker_died and not done.gateway_died:
            violations.append(f"failed: {ends.failed} requests, and nothing had gone wrong: {ends.reasons}")
        if unchanged and not done.worker_died and not done.gateway_died and not done.hostile:
            violations.append(f"not changed: {unchanged[0]}")

    def _quiet(self, leg: int, done: Done, answered: int) -> None:
        """Nothing is asked: all books must be equal, and what is held is counted."""
        self.screen.doing = f"leg {leg + 1}: quiet"
        self._sleep(SETTLE_S)
        left = self._books(done)
        self.found.violations += [f"books: {what}: {count}" for what, count in left.items() if count]
        self._deaths(done)
        metrics = self._serving.metrics()
        ok = total(metrics, "clockwork_requests_total", outcome="ok")
        if ok - self._ok != answered and not done.gateway_died and not done.hostile:
            self.found.violations.append(
                f"books: clients have {answered} answers, the server {ok - self._ok:.0f}"
            )
        self._ok = ok
        quiet = self._watch.quiet(leg)
        quiet.books, quiet.error_ms = left, self._errors.since(metrics)
        self.found.quiets.append(quiet)
        self._watch.write("quiet", as_json(quiet))

    def _books(self, done: Done) -> dict[str, int]:
        """What is not equal, for as long as that may take."""
        name = "gateways: received without an outcome"
        end = time.monotonic() + RECOVERY_S
        while True:
            try:
                found = books(self._serving)
            except (OSError, ValueError):
                found = {"gateways that do not answer": 1}
            if name in found:
                missing = found[name]
                if done.gateway_died and missing <= self._offset:
                    self._offset = missing
                found[name] = missing - self._offset
            if not any(found.values()) or time.monotonic() > end:
                return found
            self._sleep(0.5)

    def _deaths(self, done: Done) -> None:
        """Processes that are others than before, and were not killed."""
        end = time.monotonic() + RECOVERY_S
        while (now := self._server.all()).keys() != self._pids.keys() and time.monotonic() < end:
            self._sleep(0.2)
        for name, pid in self._pids.items():
            if now.get(name) != pid and pid not in done.killed:
                self.found.ended.append(name)
        self._pids = now


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    length = options.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, default=1.0)
    length.add_argument("--minutes", type=float)
    options.add_argument(
        "--record", type=Path, default=Path("build/soak.jsonl"), metavar="FILE",
        help="a line of JSON every few seconds [default: build/soak.jsonl]",
    )  # fmt: skip
    given = options.parse_args()
    seconds = 60 * given.minutes if given.minutes is not None else 3600 * given.hours
    given.record.parent.mkdir(parents=True, exist_ok=True)
    with given.record.open("w") as record:
        found = soak(seconds, given.seed, record)
    for violation in found.violations[:20]:
        print(f"  violation  {violation}")
    for line in found.tracebacks[:5]:
        print(f"  traceback  {line}")
    print(f"  record     {given.record}")
    return finish(conclude(found), given.json)


def soak(seconds: float, seed: int, record: IO[str]) -> Findings:
    """A server, and a soak of it; Ctrl-C ends it after the leg that is on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models")
        print("starting a server: compiling and profiling its models", file=sys.stderr, flush=True)
        with served(folder) as up:
            watch = Watch(up[1], record, every_s=min(5.0, max(1.0, seconds / 100)))
            it = Soak(folder, up, watch, seconds, seed)

            def stop(*_: object) -> None:
                it.stopped = True
                signal.signal(signal.SIGINT, signal.default_int_handler)

            before = signal.signal(signal.SIGINT, stop)
            try:
                it.run()
            finally:
                signal.signal(signal.SIGINT, before)
                it.close()
                watch.close()
            return it.found


if __name__ == "__main__":
    sys.exit(main())
