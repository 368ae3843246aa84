"""The torch device on an NVIDIA GPU: answers, lanes, tail, prediction, copies, goodput; ten minutes.

    python -m benchmarks.gpu                               cuda:0
    python -m benchmarks.gpu --device torch-cpu --short    the same code on the CPU, with small models

It writes a page and a JSON, again after each part: what was measured is kept, however the run ends. Compiling
takes minutes the first time; what is compiled is kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from benchmarks.gpu.machine import NoGpuError, facts, state, target
from benchmarks.gpu.page import Part, Results, page, write
from benchmarks.gpu.rig import FULL, MAIN, SHORT, Rig
from harness.report import Outcome

BUDGET_S: Final = 540.0
STRETCH: Final = 1.5
"""A part gets at most so much more than its share, when parts before it took less."""
SLICE_S: Final = 5.0
"""What a share of 1 is, in a run that has the time: shares add up to a run without compiling."""
LEAST: Final = 0.3
"""Of its share: with less time, a part would show nothing."""
OTHERS: Final = {"mobilenet_v3": "MobileNetV3", "encoder": "a transformer's encoder", "lstm": "an LSTM"}
CORES: Final = 12
"""With so many, all networks are compiled at once; with fewer, the others at the end, if there is time."""


@dataclass(slots=True)
class Session:
    """What parts share beside the rig: copies of the main model, written once."""

    rig: Rig
    ends_s: float
    _writer: object = None
    compiled_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.ends_s - time.monotonic()

    @property
    def writer(self) -> object:
        """Writes copies; its files are used by all parts that need some."""
        if self._writer is None:
            from benchmarks.gpu.copies import Writer

            self._writer = Writer(self.rig, self.rig.folder / "copies")
        return self._writer


Work = Callable[[Session, Outcome, float], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A part: its share of the time, and the work, which gets so many seconds."""

    name: str
    title: str
    share: float
    work: Work


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; the exit status: 0 all goals met, 1 some missed, 2 not complete."""
    given = _options().parse_args(argv)
    try:
        found = target(given.device)
    except NoGpuError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    cache = given.cache or _cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    plan = [part for part in PLAN if not given.parts or part.name in given.parts]
    command = f"python -m benchmarks.gpu {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
    results = Results(
        command=command, device=found.name, short=given.short, budget_s=given.budget_s, facts=facts(found),
        parts=[Part(each.name, each.title, Outcome(f"benchmarks.gpu {each.name}")) for each in plan],
        before=state(found),
    )  # fmt: skip
    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
    rig = Rig(
        target=found, sizes=SHORT if given.short else FULL, folder=folder, cache_dir=cache, seed=given.seed,
        tell=_tell,
    )  # fmt: skip
    session = Session(rig, started_s + given.budget_s)
    try:
        for number, part in enumerate(plan):
            _run(session, results, part, [each.share for each in plan[number:]])
            results.seconds = time.monotonic() - started_s
            write(results, given.json, given.page)
    except KeyboardInterrupt:
        results.interrupted = "it was interrupted"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        results.after, results.seconds = state(found), time.monotonic() - started_s
        write(results, given.json, given.page)
    print(f"\n{page(results)}\nwritten: {given.page}, {given.json}")
    return 2 if not results.complete else int(results.missed > 0)


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda:0", help="cuda:N or torch-cpu; default: %(default)s")
    options.add_argument("--short", action="store_true", help="small models and counts: a minute or two")
    options.add_argument("--budget-s", type=float, default=BUDGET_S, help="default: %(default)g")
    options.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="%(default)s")
    options.add_argument("--page", type=Path, default=Path("gpu.md"), metavar="FILE", help="%(default)s")
    options.add_argument("--cache", type=Path, metavar="FOLDER", help="for what is compiled, and for copies")
    options.add_argument("--seed", type=int, default=1)
    names = [part.name for part in PLAN]
    options.add_argument(
        "--parts", nargs="+", choices=names, metavar="PART", help=f"some of {', '.join(names)}; default: all"
    )
    return options


def _cache_dir() -> Path:
    cache = os.environ.get("CLOCKWORK_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "clockwork-serve") / "benchmark-gpu"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tell(text: str) -> None:
    print(f"    {text}", flush=True)


def _run(session: Session, results: Results, planned: Planned, shares: Sequence[float]) -> None:
    """One part, whatever comes of it; an interruption goes on to whoever called."""
    part = next(part for part in results.parts if part.name == planned.name)
    seconds = SLICE_S * planned.share * (0.1 if session.rig.sizes.short else STRETCH)
    seconds = min(seconds, session.left_s * planned.share / (sum(shares) or 1.0))
    why = _why_not(session, planned, seconds)
    print(f"[{results.seconds:4.0f} s] {planned.title}{f': not measured, {why}' if why else ''}", flush=True)
    if why:
        part.why_not = why
        return
    part.why_not = "it was interrupted"
    started_s = time.monotonic()
    try:
        planned.work(session, part.outcome, seconds)
        part.why_not = ""
    except Exception as error:  # noqa: BLE001 - whatever a strange machine sets off, the other parts are measured
        part.failed, part.why_not = True, f"it failed: {type(error).__name__}: {error}"
        print(f"    {part.why_not}", flush=True)
    finally:
        part.seconds = time.monotonic() - started_s
        part.clocks = state(session.rig.target)
    if part.outcome.invalid:
        print(f"    not measured: {part.outcome.invalid}", flush=True)
        return
    for one in part.outcome.verdicts:
        goal = f"  (goal {one.asked}: {'met' if one.good else 'MISSED'})" if one.asked else ""
        print(f"    {one.question}: {one.found}{goal}", flush=True)


def _why_not(session: Session, planned: Planned, seconds: float) -> str:
    """What keeps a part from being measured now; empty if nothing does."""
    if planned.name != "compile" and MAIN not in session.rig.served:
        return f"{MAIN} is not compiled"
    least_s = 0.0 if session.rig.sizes.short else LEAST * SLICE_S * planned.share
    if planned.share and seconds <= least_s:
        return "the time is over (--budget-s)"
    name = planned.name.removeprefix("answers_")
    if name in OTHERS and name not in session.rig.served and session.left_s < session.compiled_s:
        return (
            f"compiling may take {session.compiled_s:.0f} s and {session.left_s:.0f} s are left; run it again"
        )
    return ""


def _compile(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.rig import compile_model, compile_models

    started_s = time.monotonic()
    if session.rig.target.gpu and (os.cpu_count() or 1) >= CORES:
        compile_models(session.rig, (MAIN, *OTHERS))
    served = session.rig.served.get(MAIN) or compile_model(session.rig, MAIN)
    session.compiled_s = time.monotonic() - started_s
    sizes = ", ".join(map(str, served.code.batch_sizes))
    nbytes = served.model.weights.size
    outcome.judge(
        f"{MAIN}: made, exported and compiled", asked="", good=True,
        found=f"{session.compiled_s:.0f} s; batch sizes {sizes}; weights {nbytes / 1e6:.1f} MB",
    )  # fmt: skip
    outcome.figures = {"seconds": session.compiled_s, "batch_sizes": served.code.batch_sizes, "bytes": nbytes}


def _answers(name: str, session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.answers import answers

    answers(session.rig, outcome, name)


def _load(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.lanes import load

    load(session.rig, outcome, seconds)


def _infer(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.lanes import infer

    infer(session.rig, outcome, seconds)


def _graphs(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.lanes import graphs

    graphs(session.rig, outcome, seconds)


def _steadiness(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.steady import steadiness

    steadiness(session.rig, outcome, seconds)


def _prediction(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.steady import prediction

    prediction(session.rig, outcome)


def _interference(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.steady import interference

    interference(session.rig, outcome, seconds)


def _copies(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.copies import Writer, paging

    counts = session.rig.sizes.copies
    assert isinstance(session.writer, Writer)
    for count in counts:
        paging(session.rig, outcome, session.writer, count, seconds / len(counts))


def _goodput(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.copies import Writer
    from benchmarks.gpu.serving import goodput

    assert isinstance(session.writer, Writer)
    goodput(session.rig, outcome, session.writer, seconds)


def _thousand(session: Session, outcome: Outcome, seconds: float) -> None:
    from benchmarks.gpu.copies import Writer
    from benchmarks.gpu.serving import thousand

    assert isinstance(session.writer, Writer)
    thousand(session.rig, outcome, session.writer, seconds)


PLAN: Final = (
    Planned("compile", "Compiling ResNet50", 0, _compile),
    Planned("answers", "Answers of ResNet50 against double precision", 2, functools.partial(_answers, MAIN)),
    Planned("load", "LOAD against a plain copy", 2, _load),
    Planned("infer", "INFER against the package alone", 4, _infer),
    Planned("graphs", "CUDA graphs on and off", 3, _graphs),
    Planned("steadiness", "The tail of INFER", 10, _steadiness),
    Planned("prediction", "Prediction errors of the controller's estimator", 2, _prediction),
    Planned("interference", "INFER beside LOADs", 4, _interference),
    Planned("copies", "Thousands of copies on one device, asked at random", 16, _copies),
    Planned(
        "goodput",
        "Goodput against SLO, as in the paper's Fig 5 (by a gateway's link, without HTTP)",
        8,
        _goodput,
    ),
    Planned("thousand", "A thousand copies served at 100 ms", 10, _thousand),
    *(
        Planned(f"answers_{name}", f"Answers of {title}", 2, functools.partial(_answers, name))
        for name, title in OTHERS.items()
    ),
)


if __name__ == "__main__":
    sys.exit(main())
