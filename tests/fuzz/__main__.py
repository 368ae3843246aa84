"""Fuzzes all parsers, or those named, several at a time; prints a row for each and ends with 1 if one failed.

python -m tests.fuzz --seconds 600 http_infer onnx
python -m tests.fuzz --show onnx build/fuzz/onnx/crash-1f3a
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.fuzz.engine import NAMES, check, has_atheris, target

_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_COUNT = re.compile(r"stat::number_of_executed_units: (\d+)")
_GRACE_S = 120


@dataclass(frozen=True)
class Row:
    """What came of one parser; ``failure`` is what it said last if it failed."""

    name: str
    inputs: int
    seconds: float
    edges: int
    kept: int
    failure: str

    def __str__(self) -> str:
        speed = f"{self.inputs / self.seconds:,.0f}"
        return (
            f"{self.name:<16} {self.inputs:>10,} {speed:>8} {self.edges or '-':>6} {self.kept or '-':>6}  "
            + ("FAILED" if self.failure else "ok")
        )


HEAD = f"{'parser':<16} {'inputs':>10} {'per s':>8} {'edges':>6} {'corpus':>6}"


class Fuzzer:
    """Fuzzes one parser after another, in a process that has imported them; it starts with the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def fuzzed(self, name: str, seconds: float, folder: Path, seed: int) -> Row:
        """What came of a parser."""
        place = folder / name
        log, own = place / "log", place / "tmp"
        own.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        status = self._status_of([name, seconds, str(place), seed], seconds + _GRACE_S)
        shutil.rmtree(own, ignore_errors=True)
        said = log.read_text(errors="replace")
        coverage = _COVERAGE.findall(said)
        count = _COUNT.findall(said)
        edges, _, kept = coverage[-1] if coverage else ("0", "0", "0")
        failure = "" if status == 0 and count else said[-6000:] or f"exit status {status}"
        return Row(name, int(count[-1]) if count else 0, max(seconds, 1), int(edges), int(kept), failure)

    def _status_of(self, job: list[object], most_s: float) -> int:
        """The exit status of who did it; -1 if nobody did it in time."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.process"], cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = b""
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], most_s)
            answer = self._process.stdout.readline() if ready else b""
        finally:
            if not answer:  # what it says later is about this one, not about the next
                self._process.kill()
                self.close()
        return int(answer) if answer else -1

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with self._process:  # it ends with its stdin
                self._process = None


def fuzz(names: list[str], seconds: float, folder: Path, jobs: int, seed: int) -> list[Row]:
    """Fuzz parsers, ``jobs`` at a time; each row is printed when it is there."""
    sys.stdout.write(f"{HEAD}\n")
    rows = []
    idle = SimpleQueue[Fuzzer]()

    def fuzzed(name: str) -> Row:
        fuzzer = idle.get()
        row = fuzzer.fuzzed(name, seconds, folder, seed)
        idle.put(fuzzer)
        return row

    with ExitStack() as ends, ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            idle.put(ends.enter_context(closing(Fuzzer())))
        for each in as_completed([pool.submit(fuzzed, name) for name in names]):
            rows.append(each.result())
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    return rows


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"parsers, all if none: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=600, help="for each parser (default: 600)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="parsers at a time (default: all cores)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the dice (default: 1)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/fuzz"), help="where inputs and logs are left"
    )
    parser.add_argument("--show", action="store_true", help="NAME FILE...: give these inputs to one parser")
    given = parser.parse_args(argv)
    if given.show:
        for file in given.names[1:]:
            accepted = check(target(given.names[0]), Path(file).read_bytes())
            sys.stdout.write(f"{file}: {'accepted' if accepted else 'refused'}\n")
        return 0
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        parser.error(f"expected parsers of {', '.join(NAMES)}; found {', '.join(unknown)}")
    if not has_atheris():
        sys.stdout.write("atheris is not installed: inputs are changed at random, not guided by coverage\n")
    rows = fuzz(given.names or list(NAMES), given.seconds, given.folder.resolve(), given.jobs, given.seed)
    failed = [row for row in rows if row.failure]
    for row in failed:
        sys.stdout.write(f"\n{row.name}: {given.folder}/{row.name}\n{row.failure}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
