"""Both brains with one thing broken at a time: what share tests, and then seeds, notice.

make mutants                                              a sample of 400, from seed 1
build/mutants/bin/python -m qa.mutants --full     all of them: hours
... --seed 2 --only worker/lanes --json FILE              another sample, of some modules
... --again FILE                                          those that survived in an earlier run (no sample)
python -m qa.mutants --planted                    bugs written by hand into the code that recovers

A mutant lives in a forked process alone: no file is written, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import resource
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis.stateful  # noqa: F401  -- loaded once, before any fork
import numpy as np  # noqa: F401  -- as above
import pytest
import pytest_asyncio  # noqa: F401  -- as above
from hypothesis import HealthCheck, Phase, settings

from harness.report import Outcome, finish, parser, percent, table
from qa.mutants.planted import SOURCE, Mutant, planted

BRAINS = ("controller", "worker")
SAMPLE = 400
SCORE_MIN = 0.80
SEEDS = range(20)
SEEDS_OF_PLANTED = range(60)
SEED_REQUESTS = 400
SLOWER_MAX = 10
"""A mutant that takes so many times as long as the brains themselves runs in circles."""

MEMORY_BYTES = 8 << 30
COARSE = frozenset({"argument None", "argument dropped", "assigned None"})
"""What a type checker refuses in most cases; the others are subtle."""

TESTS, BY_SEEDS, TIMED_OUT, SURVIVED = "tests", "seeds", "timed out", "survived"


class Broken(SourceFileLoader):
    """Finds one module: the mutant. All others are found as always."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(
            "clockwork_serve." + mutant.module.replace("/", "."), str(SOURCE / f"{mutant.module}.py")
        )
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        """The code of the mutant."""
        return compile(self.mutant.source, self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As a finder of modules."""
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None


class FirstFailure:
    """A plugin of the test runner that remembers what failed first."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for each phase of each test."""
        self.name = self.name or (report.nodeid if report.failed else "")

    pytest_collectreport = pytest_runtest_logreport


def _files(module: str) -> list[str]:
    """The tests of the module itself, those of its brain, those of the other brain."""
    brain, _, rest = module.partition("/")
    name = module.rpartition("/")[2]
    if brain not in BRAINS:
        folder = Path("tests", brain) if rest else Path("tests")
        mirrored = sorted(str(path) for path in folder.rglob(f"test_{name}*.py"))
        return mirrored or sorted(str(path) for path in Path("tests", module).parent.rglob("test_*.py"))
    found = [str(path) for folder in BRAINS for path in Path("tests", folder).rglob("test_*.py")]
    return sorted(
        found, key=lambda at: (f"test_{name}.py" not in at, f"/{brain}/" not in at, "state" in at, at)
    )


def _judge(module: str, planted: bool) -> tuple[str, str, str]:  # noqa: FBT001
    """In the mutant's process: what noticed, which one of these, and which seed."""
    brain = module.startswith((*BRAINS, "fence"))
    told = _judge_by_seeds(SEEDS_OF_PLANTED) if planted and brain else ""
    fate, by = _judge_by_tests(module)
    if fate == SURVIVED:
        told = told or (_judge_by_seeds(SEEDS) if brain and not planted else "")
        fate, by = (BY_SEEDS, told) if told else (SURVIVED, "")
    return fate, by, told


def _judge_by_tests(module: str) -> tuple[str, str]:
    first = FirstFailure()
    status = pytest.main(
        ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=120",
         "--assert=plain", "--hypothesis-profile=mutants", *_files(module)], [first]
    )  # fmt: skip
    assert status not in {pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED}, status
    return (TESTS, first.name) if status else (SURVIVED, "")


def _judge_by_seeds(seeds: range) -> str:
    """What the first seed that notices says."""
    try:
        from harness.seeds import play_seed
    except Exception as error:  # noqa: BLE001
        return repr(error)
    for seed in seeds:
        try:
            play_seed(seed, SEED_REQUESTS)
        except Exception as error:  # noqa: BLE001
            return str(error)
    return ""


def _live(mutant: Mutant | None, send: int, limit_s: float) -> None:
    """A forked process from its beginning to its end, which the kernel makes after ``limit_s`` of CPU."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        cpu_s = math.ceil(limit_s)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        if mutant is not None:
            sys.meta_path.insert(0, Broken(mutant))
        module = mutant.module if mutant else "controller/controller"
        fate, by, seed = _judge(module, mutant is not None and mutant.kind == "planted")
        os.write(send, json.dumps((fate, by[:1500], seed[:1500])).encode())
    finally:
        os._exit(0)


def attempt(mutant: Mutant | None, limit_s: float) -> tuple[str, str, str]:
    """The fate of a mutant, what decided it, and what a seed said; of the brains as they are for None.

    ``limit_s`` is of CPU: on a machine that others use, or that stands still, it has as much as elsewhere.
    What waits for something is ended after ten times as long.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        _live(mutant, send, limit_s)
    os.close(send)
    if not select.select([receive], [], [], 10 * limit_s)[0]:
        os.kill(child, signal.SIGKILL)
    said = os.read(receive, 4096)
    _, status = os.waitpid(child, 0)
    os.close(receive)
    if said:
        fate, by, seed = json.loads(said)
        return fate, by, seed
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in {signal.SIGXCPU, signal.SIGKILL}:
        return TIMED_OUT, f"after {limit_s:.0f} s of CPU", ""
    return TESTS, "the process died", ""


def chosen(given: Any) -> tuple[list[Mutant], int]:
    """The mutants to try, and how many there are."""
    if given.planted:
        made = planted(given.only)
        return made, len(made)
    from qa.mutants.mutations import Module

    asked = {"serve"} if any(part.startswith("serve") for part in given.only or ()) else BRAINS
    paths = sorted(path for folder in asked for path in (SOURCE / folder).rglob("*.py"))
    modules = [Module.read(path) for path in paths if path.name != "__init__.py"]
    found = [(one, number) for one in modules for number in range(len(one.mutations))]
    wanted = [at for at in found if not given.only or any(part in at[0].name for part in given.only)]
    if given.again:
        left = json.loads(given.again.read_text())["figures"]["survivors"]
        survivors = {(one["module"], one["number"]) for one in left}
        wanted = [at for at in wanted if (at[0].name, at[1]) in survivors]
    elif not given.full and given.count < len(wanted):
        wanted = random.Random(given.seed).sample(wanted, given.count)
    return [module.mutant(number) for module, number in wanted], len(found)


def _shares(title: str, tried: list[Mutant], of: Callable[[Mutant], str]) -> None:
    counts = Counter((of(one), one.fate) for one in tried)
    rows: list[list[str]] = []
    for name in [*sorted({of(one) for one in tried}), "all"]:
        fates = [sum(n for (at, f), n in counts.items() if f == fate and name in {at, "all"})
                 for fate in (TESTS, BY_SEEDS, TIMED_OUT, SURVIVED)]  # fmt: skip
        rows.append([name, *map(str, [sum(fates), *fates]), percent(sum(fates[:-1]), sum(fates))])
    print(table([title, "tried", TESTS, BY_SEEDS, TIMED_OUT, SURVIVED, "noticed"], rows) + "\n")


def planted_line(one: Mutant) -> str:
    """Who found a bug that was written by hand."""
    seed = one.seed.partition(" --requests")[0].split(" ")[-1] if one.seed else "no seed"
    who = {TESTS: one.by.split("/")[-1]}.get(one.fate, one.fate)
    return f"  {one.module}:{one.line}: {one.before}: {who}; {f'seed {seed}' if one.seed else seed}"


def _record(one: Mutant) -> dict[str, object]:
    record = asdict(one)
    del record["source"]
    return record


def _tell(outcome: Outcome, tried: list[Mutant], there_are: int) -> None:
    """Tables, verdicts and figures."""
    _shares("module", tried, lambda one: one.module)
    _shares("what is broken", tried, lambda one: one.kind)
    _shares("of which kind", tried, lambda one: "coarse" if one.kind in COARSE else "subtle")
    alive = sum(one.fate == SURVIVED for one in tried)
    share = 1 - alive / max(1, len(tried))
    least = 1.0 if tried and tried[0].kind == "planted" else SCORE_MIN
    outcome.judge(
        f"noticed, of {len(tried)} of {there_are}", asked=f">= {percent(least, 1)}",
        found=f"{percent(share, 1)}, {alive} survive", good=share >= least,
    )  # fmt: skip
    order = sorted(tried, key=lambda one: (one.module, one.line))
    outcome.figures = {
        "fates": dict(Counter(one.fate for one in tried)),
        "survivors": [_record(one) for one in order if one.fate == SURVIVED],
        "noticed": [_record(one) for one in order if one.fate != SURVIVED],
    }


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=SAMPLE, help="how many to try, picked by chance")
    options.add_argument("--full", action="store_true", help="try all")
    options.add_argument(
        "--only", nargs="*", default=[], metavar="PART", help="modules whose path has this in it"
    )
    options.add_argument("--again", type=Path, metavar="FILE", help="try the survivors of a result once more")
    options.add_argument("--planted", action="store_true", help="those of qa/mutants/planted.py")
    options.add_argument("--part", default="1/1", metavar="K/N", help="every N-th of them, from the K-th on")
    given = options.parse_args()
    outcome = Outcome("qa.mutants")
    settings.register_profile(
        "mutants", deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    tried, there_are = chosen(given)
    part, parts = map(int, given.part.split("/"))
    tried = tried[part - 1 :: parts]
    gc.freeze()
    began = time.monotonic()
    whole, by, _ = attempt(None, 600.0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    limit_s = SLOWER_MAX * (used.ru_utime + used.ru_stime)
    if whole != SURVIVED:
        outcome.invalid = f"the brains themselves are noticed by {whole}: {by}"
        return finish(outcome, given.json)
    for count, one in enumerate(tried, start=1):
        one.fate, one.by, one.seed = attempt(one, limit_s)
        if given.planted:
            print(planted_line(one), flush=True)
        if one.fate == SURVIVED:
            where = f"\r{one.module}.py:{one.line} {one.kind}"
            print(f"{where}\n  - {one.before}\n  + {one.after}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{count} of {len(tried)}", end="", file=sys.stderr, flush=True)
    _tell(outcome, tried, there_are)
    outcome.figures["seconds"] = round(time.monotonic() - began)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
