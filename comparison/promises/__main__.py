"""What this server promises of itself, measured.

python -m comparison.promises --out DIR                     all questions, three times in turns
python -m comparison.promises --out DIR --only zipf,hot     some of them
python -m comparison.promises --out DIR --page docs/develop/promises.md

What is in DIR is not measured again, so what was stopped goes on with the same command.
It needs cores 0 and 1, and nothing else running.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from comparison.peers.measure import cores
from comparison.peers.run import PATIENCE_S, attempt, done, run_all, turns, why_in_a_line
from comparison.promises import abandoned, cost, many_models, question, rejections
from comparison.promises.question import Question
from comparison.promises.rig import Rig

QUESTIONS: Final = (
    many_models.ZIPF_QUESTION, many_models.WORST, many_models.HOT, rejections.QUESTION, abandoned.QUESTION,
    cost.QUESTION,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One run."""

    question: Question
    variant: str
    repeat: int

    def path(self, out: Path) -> Path:
        """Of its result."""
        return out / "results" / self.question.name / f"{self.variant}-{self.repeat}.json"


def points(questions: Sequence[Question], repeats: int) -> list[Point]:
    """All runs: variants take turns, and each repeat begins with another."""
    return [
        Point(question, variant, repeat)
        for repeat in range(1, repeats + 1)
        for question in questions
        for variant in turns(question.variants, repeat)
    ]


def run(point: Point, rig: Rig, patience_s: float) -> dict[str, Any]:
    """Measure one, or say why not."""
    facts = {
        "question": point.question.name, "variant": point.variant, "repeat": point.repeat,
        "at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }  # fmt: skip
    measure = point.question.measure
    return attempt(facts, lambda: {"figures": measure(rig, point.variant, point.repeat)}, patience_s)


def _names(text: str) -> list[Question]:
    known = {one.name: one for one in QUESTIONS}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; found {', '.join(unknown)}")
    return [known[name] for name in text.split(",")]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m comparison.promises", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = ", ".join(one.name for one in QUESTIONS)
    made.add_argument("--only", type=_names, default=list(QUESTIONS), metavar="NAMES", help=f"of {known}")
    made.add_argument("--repeats", type=_count, default=3)
    made.add_argument("--out", type=Path, help="folder of results; what is there is not measured again")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    made.add_argument("--page", type=Path, help="put the table into this page, between its marks")
    made.add_argument(
        "--patience", type=float, default=PATIENCE_S, metavar="SECONDS",
        help="wait at most so long for the machine to be left alone, before each run",
    )  # fmt: skip
    return made


def measure_all(given: argparse.Namespace, out: Path) -> int:
    """All that is not there yet; the exit status: 0, or 1 if a run failed, or 130 after Ctrl-C."""
    left = [point for point in points(given.only, given.repeats) if not done(point.path(out))]
    rig = Rig(out)
    return run_all(
        left,
        lambda point: run(point, rig, given.patience),
        lambda point: f"{point.question.name:<11} {point.variant:<10} {point.repeat}",
        lambda point: point.path(out),
        lambda result: why_in_a_line(result) if "why" in result else str(result["status"]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 all goals were met, 1 some were not or a run failed, 130 after Ctrl-C."""
    given = _parser().parse_args(arguments)
    if why := cores():
        print(f"error: {why}", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        out = (given.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        status = measure_all(given, out)
        print(question.text(out, given.only))
        if given.json is not None:
            given.json.write_text(json.dumps(question.machines(out, given.only), indent=1) + "\n")
        if given.page is not None:
            question.write_page(given.page, out, given.only)
        return status or int(bool(question.missed(out, given.only)))


if __name__ == "__main__":
    sys.exit(main())
