"""Regression test of speed: one of our benchmarks on two revisions in turn, and on one of them twice.

    python -m benchmarks.versus [--rounds 5] [--figure PATTERN]... REVISION BENCHMARK [its arguments]

A is the revision, B the working tree as it is now, uncommitted changes included, A2 the revision once more.
Each round runs all three, beginning with another one each time; each runs the benchmark of its own tree. What
changes on the machine from round to round falls on all three, so only ratios within a round are looked at.
``docs/develop/benchmarks.md`` says how a figure is judged, and how often that is wrong.

BENCHMARK is found in each tree where that tree has it: ``faults`` and ``qa.faults`` are one benchmark, which
older revisions have as ``qa.faults``.
``demo`` as BENCHMARK is ``clockwork demo`` of either tree. One environment serves both: it must never compare
what two environments installed.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, Final

from harness.report import Outcome, finish, parser, table

ROOT: Final = Path(__file__).parents[1]
FOLDERS: Final = ("benchmarks", "qa", "comparison")
"""Where there are benchmarks; older revisions have all of them in the first."""
SIDES: Final = ("A", "B", "A2")
LIMIT: Final = 1.02
ROUNDS_MIN: Final = 3
WIDEST: Final = 1.25
"""Two runs of one revision that differ by more than this prove nothing."""
CHANCE: Final = 0.02
DRAWS: Final = 4000
LOWER_SUFFIXES: Final = ("_ns", "_us", "_ms", "_s", "_s_per_mib", "_bytes")
LOWER_NAMES: Final = frozenset({"ns", "us", "ms", "s", "cpu", "latency", "late", "ratio", "cost"})
HIGHER_SUFFIXES: Final = ("_per_s", "_rps", "_per_second")
HIGHER_NAMES: Final = frozenset({"rps", "per_s", "goodput", "requests", "ok", "throughput"})
CHOSEN: Final[Mapping[str, tuple[str, ...]]] = {
    "http_front_end": ("*/median/ours/per_s", "*/median/ours/us"),
    "grpc_front_end": ("median/ours/per_s", "median/ours/us"),
    "device_lane_time": ("infer/*/ours_ms", "load/*/ours_ms"),
    "scheduler_cost": ("*/better_half_us",),
    "simulator_speed": ("run/rps", "us_per_request_by_part/*"),
    "journal_cost": ("controller_us/*", "alone_us"),
    "http_overhead": ("raw HTTP ms/0.5", "tritonclient ms/0.5", "Client ms/0.5"),
    "demo": ("ok", "models/*/p50_ms"),
}
"""What is looked at unless ``--figure`` says it: what is ours, no yardstick's, and no tail of few values."""


class VersusError(Exception):
    """Why two revisions cannot be compared, and what to do."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The files of one revision, and the Python that runs them."""

    name: str
    path: Path
    python: str
    cache: Path

    def environment(self) -> dict[str, str]:
        """Such that children, too, import this tree's source before any that is installed."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*sources(self.path), self.path)))}

    def check(self) -> None:
        """That its source is what runs. Compiles it, lest the first round be slower. VersusError."""
        code = "import clockwork_serve; print(clockwork_serve.__file__)"
        done = self._run("-c", code)
        found = done.stdout.strip()
        if done.returncode or not Path(found).is_relative_to(self.path):
            raise VersusError(
                f"{self.name}: expected {self.python} to import clockwork_serve from {self.path}, found "
                f"{found or done.stderr.strip()[-500:]}; run this with the Python of the project's .venv"
            )
        folders = (folder for folder in ("harness", *FOLDERS) if (self.path / folder).is_dir())
        self._run("-m", "compileall", "-q", *map(str, sources(self.path)), *folders)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *arguments], cwd=self.path, env=self.environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What to run, and how often. ``limit_s`` is for one run."""

    benchmark: str
    arguments: tuple[str, ...] = ()
    rounds: int = 5
    limit_s: float = 1800.0
    accept_invalid: bool = False
    figures: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    higher: tuple[str, ...] = ()


@dataclass(slots=True)
class Compared:
    """One figure: its values by side, a round each. ``higher`` is whether more of it is better."""

    name: str
    higher: bool
    values: dict[str, list[float]]
    bound: float = LIMIT
    ratios: list[float] = field(init=False)
    same: list[float] = field(init=False)

    def __post_init__(self) -> None:
        costs = {side: [1 / one if self.higher else one for one in self.values[side]] for side in SIDES}
        rows = list(zip(*(costs[side] for side in SIDES), strict=True))
        self.ratios = [b / geometric_mean((a, a2)) for a, b, a2 in rows]
        self.same = [a2 / a for a, _, a2 in rows]

    @property
    def ratio(self) -> float:
        """B's cost to A's."""
        return median(self.ratios)

    @property
    def slower(self) -> bool:
        """Whether B costs more than chance explains."""
        return self.ratio > self.bound


# ---------------------------------------------------------------- trees


def git(root: Path, *arguments: str) -> bytes:
    """What git prints. VersusError."""
    program = shutil.which("git")
    if program is None:
        raise VersusError("git: expected in PATH, found nothing; install it")
    done = subprocess.run([program, *arguments], cwd=root, capture_output=True, check=False)
    if done.returncode:
        raise VersusError(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def revision_tree(root: Path, sha: str) -> Path:
    """The files of a commit, written once and kept under ``build/versus``."""
    found = root / "build" / "versus" / sha[:12]
    if not found.exists():
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent) as name:
            with tarfile.open(fileobj=io.BytesIO(git(root, "archive", sha))) as archive:
                archive.extractall(f"{name}/tree", filter="data")
            Path(name, "tree").rename(found)
    return found


@contextmanager
def working_tree(root: Path) -> Iterator[Path]:
    """A copy of the working tree as it is now, so that it may be edited meanwhile."""
    folder = root / "build" / "versus"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="working-", dir=folder) as name:
        listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
        for path in filter(None, listed.split("\0")):
            if (root / path).is_file():
                target = Path(name, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / path, target)
        yield Path(name)


def sources(tree: Path) -> list[Path]:
    """The folders that a tree's packages are imported from, as it is now and as it was before 0.2."""
    return [path for path in (*sorted(tree.glob("packages/*/src")), tree / "src") if path.is_dir()]


def dependencies(tree: Path) -> tuple[list[str], list[str]]:
    """What a tree needs, and the versions that it is set up with."""
    projects = [
        tomllib.loads(path.read_text()).get("project", {})
        for path in (tree / "pyproject.toml", *tree.glob("packages/*/pyproject.toml"))
    ]
    needed = {one for project in projects for one in project.get("dependencies", [])}
    constraints = tree / "constraints.txt"
    lines = constraints.read_text().splitlines() if constraints.exists() else []
    return sorted(one for one in needed if not one.startswith("clockwork-")), sorted(
        line for line in map(str.strip, lines) if line and not line.startswith("#")
    )


def check_dependencies(revision: Path, working: Path) -> None:
    """That one environment is right for both trees. VersusError."""
    for what, ours, theirs in zip(
        ("dependencies in pyproject.toml", "constraints.txt"), dependencies(working), dependencies(revision),
        strict=True,
    ):  # fmt: skip
        if ours != theirs:
            differing = ", ".join(sorted(set(ours) ^ set(theirs))[:6])
            raise VersusError(
                f"{what}: expected the same in both trees, found {differing}; install the revision into an "
                f"environment of its own (make setup in a checkout) and name it: --python PATH"
            )


# ---------------------------------------------------------------- runs


def command(asked: Asked, tree: Tree, result: Path) -> list[str]:
    """The benchmark as a tree runs it."""
    if asked.benchmark == "demo":
        words = ["-m", "clockwork_serve", "demo", "--cache", str(tree.cache)]
    else:
        words = ["-m", module_of(tree.path, asked.benchmark) or f"benchmarks.{asked.benchmark}"]
    return [tree.python, *words, *asked.arguments, "--json", str(result)]


def once(asked: Asked, tree: Tree, folder: Path) -> tuple[dict[str, float], str]:
    """The figures of one run, and why it proves nothing, if it says so. VersusError."""
    result, log = folder / "result.json", folder / "log"
    result.unlink(missing_ok=True)
    words = command(asked, tree, result)
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=tree.path, env=tree.environment(), stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            status = process.wait(asked.limit_s)
        except subprocess.TimeoutExpired:
            raise VersusError(
                f"{tree.name}: no end after {asked.limit_s:g} s; give it more: --limit"
            ) from None
        finally:
            _end(process)
    if status not in (0, 1, 2) or not result.exists():
        tail = log.read_text(errors="replace")[-2000:]
        raise VersusError(f"{tree.name}: exit status {status} of {' '.join(words)}\n{tail}")
    found = json.loads(result.read_text())
    if asked.benchmark == "demo":
        found = {"figures": demo_figures(found), "invalid": ""}
    return numbers(found.get("figures", {})), str(found.get("invalid") or ("invalid" if status == 2 else ""))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for it; after Ctrl-C, which it got as well, it cleans up, and longer than that nobody waits."""
    for number in (None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None and number is not None:
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def demo_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's report, with what came in time of all models."""
    return {**report, "ok": sum(row["ok"] for row in report["models"])}


def all_rounds(asked: Asked, trees: Mapping[str, Tree], say: Any = print) -> tuple[list[dict[str, Any]], str]:
    """Each round's figures by side; and why there are none, if the machine gives no peace.

    Ctrl-C ends it: with the rounds that are complete, if they are enough.
    """
    found: list[dict[str, Any]] = []
    repeats, turn = asked.rounds, 0
    with tempfile.TemporaryDirectory() as name:
        while len(found) < asked.rounds:
            order = [SIDES[(turn + at) % len(SIDES)] for at in range(len(SIDES))]
            turn += 1
            try:
                one, invalid = _round(asked, trees, order, f"round {len(found) + 1}", Path(name), say)
            except KeyboardInterrupt:
                if len(found) < ROUNDS_MIN:
                    raise
                say(f"\n  stopped: {len(found)} rounds are complete, and judged")
                break
            if not invalid:
                found.append(one)
            elif not (repeats := repeats - 1):
                return found, f"{asked.rounds} rounds proved nothing; the last one: {invalid}"
            else:
                say("  the round is repeated", flush=True)
    return found, ""


def _round(
    asked: Asked, trees: Mapping[str, Tree], order: Sequence[str], title: str, folder: Path, say: Any
) -> tuple[dict[str, Any], str]:
    """One run of each side, in that order; and which proves nothing, by its own word."""
    one: dict[str, Any] = {}
    for side in order:
        began_s = time.monotonic()
        one[side], why = once(asked, trees[side], folder)
        say(
            f"  {title} of {asked.rounds}, {side}: {time.monotonic() - began_s:.0f} s"
            f"{f', proves nothing: {why}' if why else ''}",
            flush=True,
        )
        if why and not asked.accept_invalid:
            return one, f"{side}: {why}"
    return one, ""


# ---------------------------------------------------------------- figures


def numbers(figures: object, path: str = "") -> dict[str, float]:
    """All numbers by where they stand, ``a/b/c``: of a list of numbers the median; records by their names."""
    if isinstance(figures, bool) or figures is None:
        return {}
    if isinstance(figures, int | float):
        return {path: float(figures)} if math.isfinite(figures) else {}
    found: dict[str, float] = {}
    if isinstance(figures, Mapping):
        for name, value in figures.items():
            found |= numbers(value, f"{path}/{name}" if path else str(name))
    elif isinstance(figures, list) and figures:
        if all(isinstance(one, Mapping) and "name" in one for one in figures):
            for one in figures:
                label = " ".join(str(one[key]) for key in ("name", "batch") if one.get(key))
                found |= numbers(
                    {key: value for key, value in one.items() if key != "batch"}, f"{path}/{label}"
                )
        else:
            each = [numbers(one, path) for one in figures]
            for name in set.intersection(*(set(one) for one in each)):
                found[name] = median(one[name] for one in each)
    return found


def direction(name: str, asked: Asked) -> bool | None:
    """Whether more of a figure is better; None if its name does not say.

    The last part of a path that says it decides: ``Client ms/0.5`` is milliseconds.
    """
    for higher, patterns in ((False, asked.lower), (True, asked.higher)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return higher
    for part in reversed(name.split("/")):
        last = part.lower().rsplit(" ", 1)[-1]
        if last in HIGHER_NAMES or last.endswith(HIGHER_SUFFIXES):
            return True
        if last in LOWER_NAMES or last.endswith(LOWER_SUFFIXES) or last.startswith(("us_", "ms_", "cpu_")):
            return False
    return None


def compare(asked: Asked, rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Compared]:
    """The figures that every run has, that are chosen, and of which a ratio can be taken. VersusError."""
    chosen = asked.figures or CHOSEN.get(asked.benchmark.removeprefix("benchmarks."), ("*",))
    names = [
        name
        for name in rounds[0]["A"]
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen)
        and all(one[side].get(name, 0.0) > 0 for one in rounds for side in SIDES)
    ]
    found = []
    for name in names:
        higher = direction(name, asked)
        if higher is None and asked.figures:
            raise VersusError(f"{name}: does more or less of it mean better? Say --higher or --lower PATTERN")
        if higher is not None:
            values = {side: [one[side][name] for one in rounds] for side in SIDES}
            found.append(Compared(name, higher, values))
    if not found:
        every = ", ".join(sorted(rounds[0]["A"])[:40])
        raise VersusError(
            f"--figure {' '.join(chosen)}: expected some figure above 0 in every run; found {every}"
        )
    for one in found:
        # Bonferroni: something of many figures seems slower sooner than one of them.
        one.bound = max(LIMIT, spread(one.same, CHANCE / len(found)))
    return found


def spread(same: Sequence[float], chance: float) -> float:
    """What the median of as many ratios of one revision to itself exceeds with this chance only.

    Which of A and A2 is above the other is chance, so each ratio is drawn with either sign of its logarithm.
    """
    logs = [math.log(one) for one in same]
    logs += [-one for one in logs]
    dice = random.Random(1)
    medians = sorted(median(dice.choices(logs, k=len(same))) for _ in range(DRAWS))
    return math.exp(medians[min(DRAWS - 1, math.ceil((1 - chance) * DRAWS))])


# ---------------------------------------------------------------- the result


def conclude(asked: Asked, compared: Sequence[Compared]) -> Outcome:
    """One row a figure."""
    outcome = Outcome("benchmarks.versus")
    rows = []
    for one in compared:
        middle = {side: median(one.values[side]) for side in SIDES}
        rows.append(
            (
                one.name, "more" if one.higher else "less", *(f"{middle[side]:.5g}" for side in SIDES),
                f"{one.ratio:.3f}", f"{min(one.same):.3f} to {max(one.same):.3f}", f"{one.bound:.3f}",
                "SLOWER" if one.slower else "not slower",
            )
        )  # fmt: skip
        outcome.judge(one.name, asked=f"<= {one.bound:.3f}x", found=f"{one.ratio:.3f}x", good=not one.slower)
        outcome.figures[one.name] = {
            "median": middle, "ratio": one.ratio, "ratios": one.ratios, "same": one.same, "bound": one.bound,
            "higher_is_better": one.higher, "values": one.values,
        }  # fmt: skip
    head = ("figure", "better", *SIDES, "B/A", "A2/A of rounds", "at most", "")
    print("\n" + table(head, rows))
    wide = max(compared, key=lambda one: one.bound)
    if wide.bound > WIDEST:
        outcome.invalid = (
            f"{wide.name}: two runs of one revision differ by {wide.bound:.2f} times, at most {WIDEST} is "
            f"allowed; take more --rounds, a quieter machine, or others alone with --figure"
        )
    return outcome


def judge(root: Path, revision: str, asked: Asked, python: str = "") -> Outcome:
    """Run and compare. VersusError."""
    sha = git(root, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    with ExitStack() as stack:
        paths = {"A": revision_tree(root, sha), "B": stack.enter_context(working_tree(root))}
        if python:
            python = str(Path(python).absolute())  # runs start in their trees
            if not os.access(python, os.X_OK):
                raise VersusError(f"--python: expected a Python to run A with, found none at {python}")
        else:
            check_dependencies(paths["A"], paths["B"])
        caches = root / "build" / "versus" / "cache"
        trees = {
            "A": Tree(f"A ({revision})", paths["A"], python or sys.executable, caches / sha[:12]),
            "B": Tree("B (working tree)", paths["B"], sys.executable, caches / "working"),
        }
        trees["A2"] = trees["A"]
        for side in ("A", "B"):
            trees[side].check()
            if asked.benchmark != "demo" and not module_of(trees[side].path, asked.benchmark):
                raise VersusError(
                    f"{trees[side].name}: expected {asked.benchmark} in {', '.join(FOLDERS)}; found none"
                )
        print(f"A and A2: {revision} ({sha[:12]}); B: the working tree; {asked.rounds} rounds", flush=True)
        rounds, invalid = all_rounds(asked, trees)
        if invalid:
            return Outcome("benchmarks.versus", invalid=invalid)
        return conclude(asked, compare(asked, rounds))


def module_of(tree: Path, benchmark: str) -> str:
    """The module of a benchmark in a tree, whichever folder its name begins with; "" if it has none."""
    folder, _, rest = benchmark.partition(".")
    for name in (benchmark, *[rest] * (folder in FOLDERS)):
        for place in FOLDERS:
            path = tree / place / name.replace(".", "/")
            if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file():
                return f"{place}.{name}"
    return ""


def options() -> argparse.ArgumentParser:
    """Of the command line; what follows the benchmark's name is the benchmark's."""
    made = parser((__doc__ or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--figure", action="append", default=[], metavar="PATTERN", help="look at these alone")
    made.add_argument("--lower", action="append", default=[], metavar="PATTERN", help="less is better")
    made.add_argument("--higher", action="append", default=[], metavar="PATTERN", help="more is better")
    made.add_argument("--python", default="", metavar="PATH", help="for A, if it needs other packages")
    made.add_argument("--limit", type=float, default=1800.0, metavar="SECONDS", help="for one run")
    made.add_argument(
        "--accept-invalid", action="store_true", help="take rounds, too, that prove nothing by their own word"
    )
    made.add_argument("revision", help="what the working tree is compared with")
    made.add_argument("benchmark", help="its name, or demo")
    made.add_argument("arguments", nargs=argparse.REMAINDER, help="for the benchmark")
    return made


def main() -> int:
    """Run it; returns the exit status."""
    made = options()
    given = made.parse_args()
    if "--json" in given.arguments:
        made.error("--json: expected before REVISION, found among the benchmark's own arguments")
    if given.rounds < ROUNDS_MIN:
        made.error(f"--rounds: expected at least {ROUNDS_MIN}, found {given.rounds}")
    asked = Asked(
        given.benchmark, tuple(given.arguments), given.rounds, given.limit, given.accept_invalid,
        tuple(given.figure), tuple(given.lower), tuple(given.higher),
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        outcome = judge(ROOT, given.revision, asked, given.python)
    except VersusError as error:
        outcome = Outcome("benchmarks.versus", invalid=str(error))
    except KeyboardInterrupt:
        print("\nstopped; nothing was judged", file=sys.stderr)
        return 130
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
