"""Known graphs, each alone and in company: is it batched, and rightly, and are its answers right.

python -m qa.cases                       standard node cases, kinds written by hand, demo and examples
python -m qa.cases --short               the sixty that are tests, too
python -m qa.cases --only test_cumsum_1d
python -m qa.cases --baseline            writes which could be batched and are not now, to compare with later

Whether rows mix is asked of plain ONNX Runtime, row by row, beside poisoned neighbours.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.rows import asking
from clockwork_serve.units import MIB
from harness.report import Outcome, finish, parser, table
from qa.cases.case import Case, Played, play
from qa.cases.kinds import kinds
from qa.cases.known import batched_in_demo, models, node_cases, sixty

BASELINE = Path(__file__).with_name("one_by_one.txt")
"""Names of the cases that keep rows apart and are served one by one all the same, as far as is known."""


def main() -> int:
    """Play them all."""
    made = parser(__doc__ or "")
    made.add_argument("--short", action="store_true", help="the sixty that are tests, too")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    made.add_argument("--baseline", action="store_true", help=f"write {BASELINE.name}")
    made.add_argument("--no-fetch", action="store_true", help="only those models of the demo that are here")
    options = made.parse_args()
    lacking: list[str] = []
    if options.short:
        cases: list[Case] = list(sixty())
    else:
        whole, lacking = models(fetching=not options.no_fetch)
        cases = [*kinds(), *whole, *node_cases()]
    if options.only:
        cases = [case for case in cases if case.name in options.only]
    played = list(play_all(cases))
    if options.baseline:
        names = sorted(one.name for one in played if one.verdict == "not batched")
        BASELINE.write_text("\n".join(names) + "\n")
    known = set(BASELINE.read_text().splitlines())
    explain(played, known, lacking)
    return finish(judged(played, known), options.json)


def play_all(cases: Sequence[Case]) -> Iterator[Played]:
    """One after the other."""
    store = asking.Store()
    try:
        with asking.device(256 * MIB) as on:
            for number, case in enumerate(cases, 1):
                end = "" if sys.stderr.isatty() else "\n"
                if not end or number % 100 == 0:
                    print(f"\r{number} of {len(cases)}  {case.name:<70.70}", end=end, file=sys.stderr)
                yield play(case, store, on)
    finally:
        store.close()


def judged(played: Sequence[Played], known: set[str]) -> Outcome:
    """The promises. ``known``: cases that need not be batched."""
    outcome = Outcome("qa.cases")
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
    outcome.figures = {
        "cases": len(played),
        "usable": usable,
        "batched": count["batched"],
        "mixes": count["mixes"] + wrongly,
        "not_batched": count["not batched"],
        "wrongly_batched": [one.name for one in played if one.verdict == "WRONGLY BATCHED"],
        "lost": {one.name: one.why for one in lost},
    }
    return outcome


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
