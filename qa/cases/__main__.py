"""Known graphs, each alone and in company: is it batched, and rightly, and are its answers right.

python -m qa.cases                       standard node cases, kinds written by hand, demo and examples
python -m qa.cases --as-they-are         the standard node cases alone, each as the onnx package makes it
python -m qa.cases --short               the sixty that are tests, too, and some as they are
python -m qa.cases --only test_cumsum_1d
python -m qa.cases --baseline            writes which could be batched and are not now, to compare with later

Whether rows mix is asked of plain ONNX Runtime, row by row, beside poisoned neighbours; standard node cases
get a free axis 0 for that. As they are, their shapes are fixed: each must be served, and answered as by plain
ONNX Runtime, whatever shapes the values of inputs give to the outputs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks.rows import asking
from clockwork_serve.devices import Device
from clockwork_serve.units import MIB
from harness.report import Outcome, finish, parser, table
from qa.cases.case import Case, Played, play
from qa.cases.kinds import kinds
from qa.cases.known import batched_in_demo, models, node_cases, sixty, standard_cases
from qa.cases.standard import SHORT, SHORT_MODULES, Answered, answer

BASELINE = Path(__file__).with_name("one_by_one.txt")
"""Names of the cases that keep rows apart and are served one by one all the same, as far as is known."""

SERVED = 1_260
"""Standard cases that are served at least."""


class Named(Protocol):
    """A case."""

    @property
    def name(self) -> str:
        """Its name."""


Each = TypeVar("Each", bound=Named)
Found = TypeVar("Found")


def main() -> int:
    """Play them all."""
    made = parser(__doc__ or "")
    made.add_argument("--short", action="store_true", help="the sixty that are tests, too")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    made.add_argument("--baseline", action="store_true", help=f"write {BASELINE.name}")
    made.add_argument("--no-fetch", action="store_true", help="only those models of the demo that are here")
    made.add_argument("--as-they-are", action="store_true", help="the standard node cases alone")
    options = made.parse_args()
    cases, lacking = chosen(options)
    standard = standard_cases(SHORT_MODULES if options.short else ())
    if options.short or options.only:
        standard = [case for case in standard if case.name in (options.only or SHORT)]
    answered = list(each_of(standard, answer))
    played = list(each_of(cases, play))
    if options.baseline:
        names = sorted(one.name for one in played if one.verdict == "not batched")
        BASELINE.write_text("\n".join(names) + "\n")
    known = set(BASELINE.read_text().splitlines())
    outcome = Outcome("qa.cases")
    if answered:
        explain_answers(answered)
        judge_answers(outcome, answered, whole=not (options.short or options.only))
    if played:
        explain(played, known, lacking)
        judge(outcome, played, known)
    return finish(outcome, options.json)


def chosen(options: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """The cases of rows, and what is lacking."""
    if options.as_they_are:
        return [], []
    lacking: list[str] = []
    if options.short:
        cases: list[Case] = list(sixty())
    else:
        whole, lacking = models(fetching=not options.no_fetch)
        cases = [*kinds(), *whole, *node_cases()]
    return [case for case in cases if not options.only or case.name in options.only], lacking


def each_of(
    cases: Sequence[Each], play_one: Callable[[Each, asking.Store, Device], Found]
) -> Iterator[Found]:
    """What comes of each, one after the other."""
    store = asking.Store()
    try:
        with asking.device(256 * MIB) as on:
            for number, case in enumerate(cases, 1):
                end = "" if sys.stderr.isatty() else "\n"
                if not end or number % 100 == 0:
                    print(f"\r{number} of {len(cases)}  {case.name:<70.70}", end=end, file=sys.stderr)
                yield play_one(case, store, on)
    finally:
        store.close()


def judge_answers(outcome: Outcome, answered: Sequence[Answered], *, whole: bool) -> None:
    """The promises of the standard cases as they are."""
    usable = [one for one in answered if not one.unusable]
    served = [one for one in usable if one.served]
    of = f"of {len(usable):,} that ONNX Runtime runs"
    if whole:
        outcome.at_least("standard cases served", SERVED, len(served), digits=0, more=of)
    refused = [one.name for one in usable if one.refused and not one.outside]
    outcome.none("standard cases refused that the protocol can carry", refused, more=of)
    answers = sum(one.answers for one in served)
    wrong = [one.name for one in served if one.wrong]
    outcome.none("answers that are not ONNX Runtime's", wrong, more=f"of {answers:,}")
    outcome.figures |= {
        "standard_cases": len(answered), "standard_usable": len(usable), "standard_served": len(served),
        "standard_answers": answers,
        "not_served": {one.name: one.outside or one.refused for one in usable if not one.served},
        "wrong": {one.name: one.wrong for one in served if one.wrong},
    }  # fmt: skip


def explain_answers(answered: Sequence[Answered]) -> None:
    """Which are not served, or wrongly, and why."""
    print(file=sys.stderr)
    usable = [one for one in answered if not one.unusable]
    lost = [(one.name, one.outside or one.refused[:120]) for one in usable if not one.served]
    if lost:
        print(f"\nrun by ONNX Runtime and not served:\n{table(('case', 'why'), lost)}")
    wrong = [(one.name, one.wrong[:120]) for one in usable if one.wrong]
    if wrong:
        print(f"\nanswered wrongly:\n{table(('case', 'how'), wrong)}")
    print(
        f"\n{len(answered)} standard cases: ONNX Runtime runs {len(usable)}, {len(usable) - len(lost)} served"
    )


def judge(outcome: Outcome, played: Sequence[Played], known: set[str]) -> None:
    """The promises of rows. ``known``: cases that need not be batched."""
    count = Counter(one.verdict for one in played)
    usable = len(played) - count["refused"]
    wrongly = count["WRONGLY BATCHED"]
    outcome.judge("cases that mix rows and are batched", asked="0", found=str(wrongly), good=not wrongly)
    answers = sum(one.company.answers - one.company.refused for one in played)
    wrong = sum(one.company.wrong for one in played)
    outcome.judge("wrong answers in company", asked="0", found=f"{wrong:,} of {answers:,}", good=not wrong)
    demo = {one.name for one in played} & batched_in_demo()
    kept = {one.name for one in played if one.verdict == "batched"} & demo
    if demo:
        outcome.judge(
            "models of the demo that keep their batches", asked=str(len(demo)), found=str(len(kept)),
            good=kept == demo,
        )  # fmt: skip
    if not usable:
        outcome.invalid = "no case runs here"
    lost = [one for one in played if one.verdict == "not batched" and one.name not in known]
    outcome.figures |= {
        "cases": len(played),
        "usable": usable,
        "batched": count["batched"],
        "mixes": count["mixes"] + wrongly,
        "not_batched": count["not batched"],
        "wrongly_batched": [one.name for one in played if one.verdict == "WRONGLY BATCHED"],
        "lost": {one.name: one.why for one in lost},
    }


def explain(played: Sequence[Played], known: set[str], lacking: Sequence[str]) -> None:
    """Which, and why."""
    print(file=sys.stderr)
    for text in lacking:
        print(f"not tried: {text}")
    mixed = [(one.name, one.mixes[:90]) for one in played if one.verdict == "WRONGLY BATCHED"]
    if mixed:
        print(f"\nmix rows and are batched:\n{table(('case', 'how it mixes'), mixed)}")
    wrong = [one for one in played if one.company.wrong]
    if wrong:
        print("\nanswered wrongly in company:")
        print(table(("case", "first"), [(one.name, one.company.first) for one in wrong]))
    lost = [one for one in played if one.verdict == "not batched" and one.name not in known]
    if lost:
        print("\nkeep rows apart, and are batched no more:")
        print(table(("case", "why"), [(one.name, one.why[:120]) for one in lost]))
    never = Counter(one.why[:100] for one in played if one.verdict == "not batched" and one.name in known)
    if never:
        print("\nkeep rows apart, and were never batched:")
        print(table(("cases", "why"), [(n, why) for why, n in never.most_common(20)]))
    count = Counter(one.verdict for one in played)
    print(f"\n{len(played)} cases: " + ", ".join(f"{n} {word}" for word, n in count.most_common()))


if __name__ == "__main__":
    sys.exit(main())
