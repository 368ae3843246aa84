"""Graphs made by chance, half of which mix rows: the store must batch those, and only those, that do not.

python -m benchmarks.rows                        100,000 graphs
python -m benchmarks.rows --short                2,000
python -m benchmarks.rows --seed 1 --only 4711   one of them again, with its text

What mixes is known by construction, and by asking plain ONNX Runtime row by row beside poisoned neighbours;
either is enough. Graphs that ONNX Runtime refuses are not counted. Of those that are batched some are served
by the device, in company, and their answers compared with those of plain ONNX Runtime, alone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import onnx

from benchmarks.rows.generator import graph_of
from benchmarks.rows.judge import judge, session_of
from benchmarks.rows.trials import SEEDS_APART, Prober, Tried, probe_all
from harness.report import Outcome, finish, parser, percent, table

GRAPHS, SHORT = 100_000, 2_000
WANTED_PERCENT = 95
SHOWN = 12


@dataclass(slots=True)
class Tally:
    """What all graphs came to."""

    mixing: int = 0
    apart: int = 0
    apart_batched: int = 0
    refused: int = 0
    silent: int = 0
    faint: int = 0
    unsettled: int = 0
    optimised: int = 0
    served: int = 0
    answers: int = 0
    wrongly: list[Tried] = field(default_factory=list)
    surprises: list[Tried] = field(default_factory=list)
    wrong: list[Tried] = field(default_factory=list)
    unopened: list[Tried] = field(default_factory=list)
    lost: list[Tried] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    example: dict[str, int] = field(default_factory=dict)
    with_operator: Counter[str] = field(default_factory=Counter)
    vetoed_with: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)

    def enter(self, found: Tried) -> None:
        """One more graph."""
        if found.ended:
            self.lost.append(found)
            return
        if found.refused:
            self.refused += 1
            return
        self.operators.update(found.operators)
        if found.served:
            self.served += 1
            self.answers += found.company.answers - found.company.refused
            self.unsettled += found.company.unsettled
            self.optimised += found.company.optimised
            if found.company.unopened:
                self.unopened.append(found)
            if found.company.wrong:
                self.wrong.append(found)
        if found.mixes:
            self._mixing(found)
            return
        if found.faint:
            self.faint += 1
            return
        self.apart += 1
        self.apart_batched += found.batched
        self.with_operator.update(found.operators)
        if not found.batched:
            self.vetoed_with.update(found.operators)
            reason = _plain(found.why)
            self.reasons[reason] += 1
            self.example.setdefault(reason, found.number)

    def _mixing(self, found: Tried) -> None:
        self.mixing += 1
        self.silent += not found.seen
        if not found.built:
            self.surprises.append(found)
        if found.batched:
            self.wrongly.append(found)


def _plain(why: str) -> str:
    """A reason without names and numbers, so that equal ones are counted together."""
    text = re.sub(r"'[^']*'", "'..'", why)
    text = re.sub(r"\bv\d+\b", "v", text)
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text)[:150] or "(no reason given)"


def main() -> int:
    """Make, ask, print."""
    options = _options()
    if options.only is not None:
        return again(options.seed, options.only)
    count = options.graphs or (SHORT if options.short else GRAPHS)
    tally, began = Tally(), time.monotonic()
    shown = began
    each = probe_all(
        list(range(count)), seed=options.seed, jobs=options.jobs, served_share=options.served_share
    )
    done = 0
    try:
        for done, found in enumerate(each, 1):
            tally.enter(found)
            if time.monotonic() - shown > 1 or done == count:
                shown = time.monotonic()
                _progress(done, count, tally, shown - began)
    except KeyboardInterrupt:
        each.close()
    print(file=sys.stderr)
    seconds = time.monotonic() - began
    outcome = judged(tally, done, seconds)
    if done < count:
        outcome.invalid = f"stopped after {done:,} of {count:,}; what follows is true of those"
    explain(tally, options.seed)
    return finish(outcome, options.json)


def _options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--graphs", type=int, metavar="N", help=f"how many; default: {GRAPHS:,}")
    made.add_argument("--short", action="store_true", help=f"{SHORT:,} graphs")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    made.add_argument("--only", type=int, metavar="K", help="graph K again, with its text")
    made.add_argument(
        "--served-share", type=float, default=0.1, help="share of batched graphs that are served"
    )
    return made.parse_args()


def _progress(done: int, count: int, tally: Tally, seconds: float) -> None:
    text = (
        f"{done:,} of {count:,}  {done / seconds:.0f}/s  mixing {tally.mixing:,}, batched "
        f"{len(tally.wrongly):,}  apart {tally.apart:,}, batched {percent(tally.apart_batched, tally.apart)}"
    )
    print(
        f"\r{text:<100}" if sys.stderr.isatty() else text,
        end="" if sys.stderr.isatty() else "\n",
        file=sys.stderr,
    )


def judged(tally: Tally, count: int, seconds: float) -> Outcome:
    """The promises."""
    outcome = Outcome("benchmarks.rows")
    outcome.judge(
        "graphs that mix rows and are batched", asked="0",
        found=f"{len(tally.wrongly):,} of {tally.mixing:,}", good=not tally.wrongly,
    )  # fmt: skip
    batched = 100 * tally.apart_batched / max(1, tally.apart)
    what = "graphs that keep rows apart and are batched"
    outcome.at_least(what, WANTED_PERCENT, batched, "%", more=f"of {tally.apart:,}")
    outcome.judge(
        "wrong answers of batched graphs, in company", asked="0",
        found=f"{sum(one.company.wrong for one in tally.wrong):,} of {tally.answers:,}", good=not tally.wrong,
    )  # fmt: skip
    if not tally.mixing or not tally.apart:
        outcome.invalid = "no graphs of both kinds"
    outcome.figures = {
        "graphs": count, "seconds": round(seconds, 1), "mixing": tally.mixing, "apart": tally.apart,
        "refused": tally.refused, "apart_batched": tally.apart_batched, "served": tally.served,
        "mixing_batched": [one.number for one in tally.wrongly],
        "mixing_not_seen": tally.silent, "faint": tally.faint,
        "unsettled_answers": tally.unsettled, "optimised_answers": tally.optimised,
        "mixing_not_built": [one.number for one in tally.surprises],
        "unopened": [one.number for one in tally.unopened],
        "ended": {one.number: one.ended for one in tally.lost},
        "reasons": dict(tally.reasons.most_common()), "operators": len(tally.operators),
    }  # fmt: skip
    return outcome


def explain(tally: Tally, seed: int) -> None:
    """What helps whoever mends it."""
    print(
        f"\n{tally.mixing + tally.apart:,} graphs of {len(tally.operators)} operators judged, "
        f"{tally.refused:,} refused by ONNX Runtime; {tally.silent:,} mix by construction and "
        f"did not show it; of {tally.faint:,} neighbours change the rounding, or the input's last bits do, "
        f"which counts neither way. {tally.unsettled:,} answers differ by no more than they do alone with "
        f"such bits, {tally.optimised:,} are what ONNX Runtime's own optimisation makes of them, alone"
    )
    if tally.wrongly:
        print("\nmix rows and are batched, by how:")
        how = Counter(one.built or "(not built to)" for one in tally.wrongly)
        unseen = Counter(one.built for one in tally.wrongly if not one.seen)
        first = {one.built or "(not built to)": one.number for one in reversed(tally.wrongly)}
        rows = [
            (kind, n, unseen[kind], f"--seed {seed} --only {first[kind]}") for kind, n in how.most_common()
        ]
        print(table(("how", "graphs", "never shown", "replay"), rows))
    for title, some in (
        ("mix rows, though not built to", tally.surprises), ("answered wrongly in company", tally.wrong),
        ("compiled, and the device does not open them", tally.unopened),
        ("ended or held up the process", tally.lost),
    ):  # fmt: skip
        if some:
            print(f"\n{title}:")
        for one in some[:SHOWN]:
            print(f"  --seed {seed} --only {one.number}: {_what(one)}")
    if tally.reasons:
        print("\nkeep rows apart and are not batched, by reason:")
        lines = [(n, f"--only {tally.example[why]}", why) for why, n in tally.reasons.most_common(25)]
        print(table(("graphs", "replay", "reason"), lines))
        print("\n... by operator in the graph, those with the largest share first:")
        ranked = sorted(
            tally.vetoed_with, key=lambda each: -tally.vetoed_with[each] / tally.with_operator[each]
        )
        rows = [
            (each, tally.vetoed_with[each], tally.with_operator[each],
             percent(tally.vetoed_with[each], tally.with_operator[each]))
            for each in ranked[:25]
        ]  # fmt: skip
        print(table(("operator", "not batched", "graphs", "share"), rows))


def _what(one: Tried) -> str:
    return one.ended or one.company.first or one.company.unopened[-200:] or one.seen


def again(seed: int, number: int) -> int:
    """One graph, with everything that is known of it; 1 if it is wrongly batched or answered."""
    made = graph_of(seed * SEEDS_APART + number)
    print(onnx.printer.to_text(made.model))
    prober = Prober(seed, 1.0)
    try:
        found = prober.probe(number, lambda _: None)
    finally:
        prober.close()
    if not found.refused and not found.seen:
        found.seen = judge(session_of(made.model.SerializeToString()), seed=number, thorough=True).mixes
    rows = [
        ("refused", found.refused), ("mixes by construction", found.built), ("mixes by asking", found.seen),
        ("batched", found.batched), ("the store says", found.why), ("answers in company", found.company),
    ]  # fmt: skip
    print(table(("", ""), rows))
    return int(found.batched and (found.mixes or bool(found.company.wrong)))


if __name__ == "__main__":
    sys.exit(main())
