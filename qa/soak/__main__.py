"""Mixed load with faults on, for hours: whether anything grows, leaks, drifts or goes wrong.

make soak                                       an hour
python -m qa.soak --minutes 2           the short form
python -m qa.soak --hours 8 --json FILE --record FILE

Two servers, one that computes and one with an emulated device. In legs: two scenarios of the load generator
at once, one over HTTP and one over gRPC, while models are unloaded, loaded and replaced, other clients check
every answer, and one thing goes wrong. After each leg
nothing is asked for a moment: then all books must be equal, and what each process holds is counted.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final

from clockwork_lab.bench.server import Protocol
from harness.report import finish, parser
from harness.serving import total
from qa.books import NOT_PASSED_ON, books, pages, tracebacks
from qa.soak.honest import Churn, Honest, Truth
from qa.soak.load import SCENARIOS, Ends, Generator, Target
from qa.soak.servers import TURNS, Done, Faults, Up, processes, served, write_emulated, write_onnx
from qa.soak.verdict import Findings, Screen, conclude
from qa.soak.watch import Errors, Watch, as_json

UNHEARD: Final = "clockwork_gateway_unheard_answers_total"
LEG_S: Final = (3.0, 45.0)
LEGS_MIN: Final = 13
SETTLE_S: Final = 2.5
"""After a leg: longer than the server reads on from who was refused."""
RECOVERY_S: Final = 30.0
HONEST_RATE: Final = 40.0
CHANGE_EVERY_S: Final = 1.5


class Soak:
    """One soak of servers that are up: the first computes, the second pretends to."""

    def __init__(self, folder: Path, ups: list[Up], watch: Watch, seconds: float, seed: int) -> None:
        self.found = Findings()
        self.stopped = False
        self._folder, self._ups, self._watch, self._seconds = folder, ups, watch, seconds
        self.screen = Screen(seconds, watch, self.found)
        self._dice = random.Random(seed)
        truth, server = Truth(), ups[0].server
        self._honest = Honest(server, truth, HONEST_RATE, seed)
        self._churn = Churn(server, folder / "cpu" / "models", truth, CHANGE_EVERY_S, seed)
        self._faults = Faults(ups, seed, self._gateway_dies)
        self._errors = {up.name: Errors() for up in ups}
        self._pids = processes(ups)
        self._generator: Generator | None = None

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
        self.found.tracebacks = [line for up in self._ups for line in tracebacks(up.log())]
        self.found.cut = self.stopped

    def close(self) -> None:
        """Leave no process behind."""
        self._faults.close()

    def _leg(self, leg: int, seconds: float, fault: str) -> None:
        names = [*SCENARIOS]
        protocols: list[Protocol] = ["http", "grpc"] if leg % 2 == 0 else ["grpc", "http"]
        scenarios = (names[leg % len(names)], self._dice.choice(names))
        targets = [
            Target(up, protocol, scenario)
            for up, protocol, scenario in zip(self._ups, protocols, scenarios, strict=True)
        ]
        said = ", ".join(f"{one.scenario} over {one.protocol} to {one.up.name}" for one in targets)
        self.screen.doing = f"leg {leg + 1}: {said}; {fault}"
        generator = Generator(self._folder, targets, seconds, self._dice.randrange(1 << 30))
        self._generator = generator
        unchanged, answered = len(self._churn.failed), self._honest.answered
        self._honest.go_on()
        self._churn.go_on()
        generator.start()
        while not generator.begun:  # a gateway that is killed before has no connections to lose
            self._sleep(0.05)
        before_s = seconds * self._dice.uniform(0.2, 0.5)
        self._sleep(before_s)
        done = self._faults.begin(fault, seconds - before_s)
        self.found.faults[fault] += 1
        self._sleep(seconds - before_s)
        ends = generator.join()
        self._generator = None
        self._honest.pause()
        self._churn.pause()
        self._faults.end()
        self._take(ends, done, self._churn.failed[unchanged:])
        ends["cpu"].answered += self._honest.answered - answered
        self._quiet(leg, done, ends)
        counts = [[one.asked, one.good, one.late, one.failed, one.lost] for one in ends.values()]
        self._watch.write("leg", [leg, said, fault, *counts])

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.screen.show(self._asked)
            time.sleep(min(0.5, left))

    def _take(self, ends: dict[str, Ends], done: Done, unchanged: list[str]) -> None:
        """Count a leg; what only a fault excuses is a violation."""
        found = self.found
        found.honest, found.changes = Counter(self._honest.ends), Counter(self._churn.done)
        found.violations += self._honest.violations
        self._honest.violations.clear()
        for server, one in ends.items():
            found.ends.add(one)
            mine = done if done.server == server else Done()
            if one.lost and not mine.gateway_died and not mine.hostile:
                found.violations.append(f"lost: {one.lost} requests to {server} got no response")
            if one.twice:
                found.violations.append(f"twice: {one.twice} bytes of {server} that nobody had asked for")
            if one.failed and not mine.worker_died and not mine.gateway_died:
                words = dict(one.reasons)
                found.violations.append(f"failed: {one.failed} requests to {server} without a cause: {words}")
        if unchanged and not (
            done.server == "cpu" and (done.worker_died or done.gateway_died or done.hostile)
        ):
            found.violations.append(f"not changed: {unchanged[0]}")

    def _quiet(self, leg: int, done: Done, ends: dict[str, Ends]) -> None:
        """Nothing is asked: all books must be equal, and what is held is counted."""
        self.screen.doing = f"leg {leg + 1}: quiet"
        self._sleep(SETTLE_S)
        left: dict[str, int] = {}
        errors_ms: dict[str, float] = {}
        for up in self._ups:
            mine = done if done.server == up.name else Done()
            left.update({f"{up.name}: {what}": count for what, count in self._books(up, mine).items()})
            metrics = up.metrics()
            good = int(total(metrics, "clockwork_requests_total", outcome="ok"))
            over = int(
                sum(
                    total(one, UNHEARD, why="over") for one in pages(up.server.http_url, up.gateways).values()
                )
            )
            late = int(total(metrics, "clockwork_requests_total", outcome="expired", reason="late"))
            heard, more_over, more_late = good - up.heard, over - up.over, late - up.late
            up.heard, up.over, up.late = good, over, late
            if not mine.gateway_died and not mine.hostile:
                lacking = f"{up.name}: good answers that clients lack"
                left[lacking] = unexplained(heard, more_late, ends[up.name].answered)
                self.found.over += more_over
            for name, error_ms in self._errors[up.name].since(metrics).items():
                errors_ms[f"{up.name} {name}"] = error_ms
        self.found.violations += [f"books: {what}: {count}" for what, count in left.items() if count]
        self._deaths(done)
        quiet = self._watch.quiet(leg)
        quiet.books, quiet.error_ms = left, errors_ms
        self.found.quiets.append(quiet)
        self._watch.write("quiet", as_json(quiet))

    def _books(self, up: Up, done: Done) -> dict[str, int]:
        """What is not equal, after as long as that may take."""
        end = time.monotonic() + RECOVERY_S
        while True:
            found = books(up.server.http_url, up.gateways)
            if NOT_PASSED_ON in found:
                if done.gateway_died and found[NOT_PASSED_ON] <= up.offset:
                    up.offset = found[NOT_PASSED_ON]
                found[NOT_PASSED_ON] -= up.offset
            if not any(found.values()) or time.monotonic() > end:
                return found
            self._sleep(0.5)

    def _deaths(self, done: Done) -> None:
        """Processes that are others than before, and were not killed."""
        end = time.monotonic() + RECOVERY_S
        while (now := processes(self._ups)).keys() != self._pids.keys() and time.monotonic() < end:
            self._sleep(0.2)
        ended = [name for name, pid in self._pids.items() if now.get(name) != pid and pid != done.killed]
        self.found.ended += ended
        self._pids = now


def unexplained(good: int, late: int, answered: int) -> int:
    """By how many good answers the books, which counted others as late, and the clients differ.

    gRPC's core tells of some answers that were in time too late for the server to be sure: those are counted
    as late. So the books may lack what their clients have as long as it stands there as late.
    """
    return max(0, good - answered) or min(0, good + late - answered)


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
    """Two servers, and a soak of them; Ctrl-C ends it after the leg that is on."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        ups = []
        print("starting two servers: compiling and profiling their models", file=sys.stderr, flush=True)
        for kind, write, gateways in (("cpu", write_onnx, 2), ("emulated", write_emulated, 1)):
            (folder / kind).mkdir()
            write(folder / kind / "models")
            ups.append(stack.enter_context(served(folder / kind, kind, gateways)))
        watch = Watch(ups, record, every_s=min(5.0, max(1.0, seconds / 100)))
        it = Soak(folder, ups, watch, seconds, seed)

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
