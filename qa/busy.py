"""Whether tests pass on a busy machine: they run beside programs that want every core all the time.

    python -m qa.busy                          those that failed there once, 20 times each
    python -m qa.busy --times 1 tests/serve    any tests
    python -m qa.busy --whole                  all of ``make test``, once

All tests have the same priority: beside such programs those with less would have a tenth of a core. Each time
is a pytest of its own, with servers of its own. A test that could not be judged was run again
(tests/timing.py) and counts by its last run. The programs end with this one, whatever ends it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harness.report import Outcome, finish, parser

ROOT: Final = Path(__file__).parents[1]
END_TO_END: Final = "tests/end_to_end/"
FAILED_ONCE: Final = (
    (
        f"{END_TO_END}test_slow_device.py::"
        "test_durations_that_double_are_learned_within_a_window_and_the_other_device_is_left_alone"
    ),
    f"{END_TO_END}test_overload.py::test_hopeless_requests_hear_at_once_and_the_rest_is_served",
    (
        f"{END_TO_END}triton/test_differences.py::test_both_say_the_same_or_the_difference_is_listed"
        "[stats: three good requests and two wrong ones]"
    ),
    f"{END_TO_END}test_door.py::test_stock_clients_infer_over_tls_with_their_keys",
    (
        f"{END_TO_END}stock/test_perf_analyzer.py::"
        "test_it_measures_with_shared_memory_and_ends_without_a_warning"
    ),
    f"{END_TO_END}test_tenants.py::test_ten_times_a_quota_at_the_tightest_slo_leaves_anothers_answers_in_time",
    (
        f"{END_TO_END}test_tenants.py::"
        "test_what_a_tenant_may_ask_for_is_capped_and_its_refusal_says_when_to_come_back"
    ),
)
"""Beside two programs that burned both cores, in 35 minutes of ``make test``."""
BURN: Final = """
import os, sys, time
end_s, parent = time.monotonic() + float(sys.argv[1]), int(sys.argv[2])
while time.monotonic() < end_s and os.getppid() == parent:
    sum(range(100_000))
"""
ENDS: Final = re.compile(r"^(PASSED|FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)
CLOSING: Final = re.compile(r"\b(?:passed|failed|errors?)\b.* in [0-9.]+s")
"""Pytest's last line."""
AGAIN: Final = re.compile(r"^(tests/.+?): could not be judged: ", re.MULTILINE)


@dataclass(slots=True)
class Counts:
    """How often each test ended how, and was run again."""

    passed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)

    def add(self, said: str) -> None:
        """What a pytest with ``-rA`` printed."""
        summary = said.rpartition("short test summary info")[2]
        for end, name in ENDS.findall(summary):
            (self.passed if end == "PASSED" else self.failed)[name] += 1
        self.again.update(AGAIN.findall(said))

    def judge(self, outcome: Outcome, times: int) -> None:
        """A row for each test, or one for all if there are many."""
        names = sorted({*self.passed, *self.failed})
        for name in names if len(names) <= 20 else sorted(self.failed):
            passed, failed, again = self.passed[name], self.failed[name], self.again[name]
            outcome.judge(
                name.removeprefix(END_TO_END), asked=f"{times} of {times}",
                found=f"{passed} of {passed + failed}{f', {again} times run again' if again else ''}",
                good=not failed and passed == times,
            )  # fmt: skip
        passed, failed = self.passed.total(), self.failed.total()
        found = f"{failed} of {passed + failed} failed, {self.again.total()} run again"
        outcome.judge("all", asked="0 fail", found=found, good=passed > 0 and not failed)
        outcome.figures = {
            "passed": dict(self.passed), "failed": dict(self.failed), "run_again": dict(self.again),
        }  # fmt: skip


@contextmanager
def programs(count: int, limit_s: float) -> Iterator[None]:
    """So many programs that never rest, until the block ends, for this long at most."""
    running = [
        subprocess.Popen([sys.executable, "-c", BURN, str(limit_s), str(os.getpid())]) for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def tests(names: Sequence[str], times: int, log: Path) -> Counts:
    """Each of them so often. What pytest said goes to ``log``."""
    counts = Counts()
    for number in range(times):
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="cw-") as folder:  # short: sockets' paths are limited
            done = subprocess.run(
                [
                    sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider",
                    "--basetemp", f"{folder}/t", *names,
                ],
                cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "1000"},
            )  # fmt: skip
        with log.open("a") as file:
            file.write(done.stdout + done.stderr)
        before = counts.failed.total()
        counts.add(done.stdout)
        if done.returncode not in (0, 1):
            counts.failed[f"pytest: exit status {done.returncode}, see {log}"] += 1
        print(
            f"  {number + 1} of {times}: {time.monotonic() - began_s:.0f} s, "
            f"{counts.failed.total() - before} failed, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    return counts


def whole(log: Path) -> tuple[int, str]:
    """``make test``: its exit status, and pytest's last line or, if there is none, its own."""
    make = shutil.which("make")
    if make is None:
        return 1, "make is not in PATH"
    last = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            [make, "test"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "TESTS_NICE": "no"},
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            last = verdict(last, line)
        return process.wait(), last


def verdict(before: str, line: str) -> str:
    """What a run says of itself, after one more line: pytest's last one, whatever make says after it."""
    if CLOSING.search(before) and not CLOSING.search(line):
        return before
    return line.strip("= \n") or before


def main() -> int:
    """Run it; returns the exit status."""
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument(
        "tests", nargs="*", metavar="TEST", help="for pytest; default: those that failed once"
    )
    options.add_argument("--whole", action="store_true", help="make test, once")
    options.add_argument("--times", type=int, default=20)
    options.add_argument("--programs", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--short", action="store_true", help="three times: five minutes")
    options.add_argument(
        "--limit", type=float, default=10_800.0, metavar="SECONDS", help="life of the programs"
    )
    given = options.parse_args()
    times = 3 if given.short else given.times
    log = ROOT / "build" / "busy.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    outcome = Outcome("qa.busy")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no pytest is left behind
    with programs(given.programs, given.limit):
        if given.whole:
            status, last = whole(log)
            outcome.judge(
                f"make test beside {given.programs} programs", asked="passes", found=last, good=not status
            )
        else:
            tests(given.tests or FAILED_ONCE, times, log).judge(outcome, times)
    print(f"  what was said: {log.relative_to(ROOT)}")
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
