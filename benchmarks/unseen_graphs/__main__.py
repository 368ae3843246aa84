"""Generated graphs whose truth is known: whether company or a copy's weights change an answer.

*Rule*: would this graph be batched though nobody declared it? *Server*: some are served, and each is asked
alone and in company. *Copies*: architectures that compute with their weights, in copies with weights of very
different magnitudes. *Declared*: graphs that mix rows, declared as if they did not, which is reported and
never judged. The judge is plain ONNX Runtime.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.unseen_graphs import copies
from benchmarks.unseen_graphs.cases import Case, Feeds, far, made, row_of, session
from benchmarks.unseen_graphs.draft import Array
from benchmarks.unseen_graphs.serving import CLIENTS, Answers, Clients, Reply, served
from harness.report import Outcome, finish, parser, percent

GRAPHS, SHORT_GRAPHS = 20_000, 1_000
SERVED, SHORT_SERVED, AT_ONCE = 2_000, 100, 200
ARCHITECTURES, SHORT_ARCHITECTURES = 500, 20
DECLARED, SHORT_DECLARED = 100, 20
ACCEPTED_SHARE = 0.35
ANSWERED_SHARE = 0.99
PARTS = ("rule", "server", "copies", "declared")
Ask = Callable[[bytes], bool]


def batched(model: bytes) -> bool:
    """Whether the product would batch a model whose owner declares nothing."""
    from clockwork_serve.store.onnx.graph import interface_of
    from clockwork_serve.store.onnx.row_rule import objection

    graph = onnx.load_from_string(model)
    return not objection(graph, interface_of(graph, ()))


# The rule


@dataclass(slots=True)
class Rule:
    """What was accepted."""

    count: Counter[str] = field(default_factory=Counter)
    mixing: list[str] = field(default_factory=list)
    safe: list[str] = field(default_factory=list)
    """Safe graphs that were not accepted."""


def ruled(seed: int, ask: Ask, number: int) -> tuple[str, bool, bool]:
    """A graph: its name, whether it mixes, whether it is accepted."""
    case = made(seed, number)
    return case.name, case.mixes, ask(case.model.SerializeToString())


def rule(seed: int, count: int, ask: Ask = batched, processes: int = 2) -> Rule:
    """Ask of each graph whether it is accepted."""
    found, began = Rule(), time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(partial(ruled, seed, ask), range(count), chunksize=50)
        for number, (name, mixes, accepted) in enumerate(results, start=1):
            found.count[f"{'mixing' if mixes else 'safe'}, {'accepted' if accepted else 'not accepted'}"] += 1
            if mixes and accepted:
                found.mixing.append(name)
            if not mixes and not accepted:
                found.safe.append(name)
            if number % 2_000 == 0:
                print(f"  rule: {number} of {count}, {time.monotonic() - began:.0f} s", flush=True)
    return found


def judge_rule(outcome: Outcome, seed: int, found: Rule) -> None:
    """Its promises."""
    mixing = found.count["mixing, accepted"] + found.count["mixing, not accepted"]
    accepted = found.count["safe, accepted"]
    safe = accepted + found.count["safe, not accepted"]
    outcome.none("rule: mixing graphs accepted", found.mixing, more=f"of {mixing}, seed {seed}")
    outcome.judge(
        "rule: safe graphs accepted", asked=f">= {ACCEPTED_SHARE:.0%}",
        found=f"{percent(accepted, safe)} of {safe}, seed {seed}", good=accepted >= ACCEPTED_SHARE * safe,
    )  # fmt: skip
    for name in found.mixing[:10]:
        print(f"  accepted, though it mixes: {name}")
    outcome.figures["rule"] = {
        "seed": seed, **found.count, "accepted_wrongly": found.mixing[:10], "not_accepted": found.safe[:10],
    }  # fmt: skip


# Servers


class Truth:
    """What plain ONNX Runtime answers."""

    def __init__(self, model: bytes, rtol: float, floor: float) -> None:
        self.plain, self.rtol, self.floor = session(model, optimised=True), rtol, floor
        self.model = model
        self.names = [output.name for output in self.plain.get_outputs()]

    def compare(self, reply: Reply, row: Feeds, name: str, answers: Answers) -> None:
        """Tally one answer."""
        answers.asked += 1
        if reply.error:
            answers.refusals.append(f"{name}: {reply.error}")
            return
        answers.answered += 1
        answers.in_company += reply.batch_size > 1
        wanted = self.plain.run(None, row)
        if not self.differs(reply, wanted):
            return
        other = session(self.model).run(None, row)
        if any(far(one, two, self.rtol, floor=self.floor) for one, two in zip(wanted, other, strict=True)):
            answers.uncertain += 1
        else:
            answers.wrong[name] += 1

    def differs(self, reply: Reply, wanted: Sequence[Array]) -> bool:
        """Whether any output differs beyond rounding."""
        return any(
            name not in reply.outputs or far(reply.outputs[name], array, self.rtol, floor=self.floor)
            for name, array in zip(self.names, wanted, strict=True)
        )


def company(case: Case, dice: random.Random) -> list[Feeds]:
    """Rows sent at once: the witness's, ordinary ones, and ones with what hidden steps wait for."""
    rows: list[Feeds] = []
    if case.witness is not None:
        feeds, _ = case.witness
        rows += [row_of(feeds, row) for row in range(len(next(iter(feeds.values()))))]
    length = case.hint.length or 7
    for size, spiced in ((length, True), (11, True), (length, False)):
        feeds = case.feeds(dice, 8, spiced=spiced, length=size)
        rows += [row_of(feeds, row) for row in range(8)]
    return rows[: 2 * CLIENTS]


def ask_cases(cases: Sequence[Case], seed: int, answers: Answers, declared: int | None = None) -> None:
    """Serve some graphs, and ask each alone and in company."""
    models = {f"m{case.number}": case.model.SerializeToString() for case in cases}
    with served(models, declared=declared) as (serving, sizes):
        clients = Clients(serving)
        answers.models += len(cases)
        answers.served += len(sizes)
        for case in cases:
            name = f"m{case.number}"
            if name not in sizes:
                answers.refusals.append(f"{case.name}: not served")
                continue
            if sizes[name] > 0:
                answers.batched.append(case.name)
            dice = random.Random(f"{seed}/{case.number}/company")
            truth = Truth(models[name], 2 * case.rtol, floor=1e-6)
            together = company(case, dice)
            for row in together[:3]:
                truth.compare(clients.ask(name, [row])[0], row, case.name, answers)
            for _ in range(2):
                dice.shuffle(together)
                for reply, row in zip(clients.ask(name, together), together, strict=True):
                    truth.compare(reply, row, case.name, answers)
        clients.close()


def server(seed: int, count: int) -> Answers:
    """Undeclared, half of them mixing."""
    answers, began = Answers(), time.monotonic()
    for first in range(0, count, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, count))
        ask_cases([made(seed, number) for number in numbers], seed, answers)
        print(f"  server: {answers.models} of {count}, {time.monotonic() - began:.0f} s", flush=True)
    return answers


def judge_answers(outcome: Outcome, part: str, answers: Answers) -> None:
    """No answer is wrong, and enough were answered to say so."""
    more = f"of {answers.served} models, {answers.wrong.total()} of {answers.answered} answers"
    outcome.none(f"{part}: models whose answers differ beyond rounding", list(answers.wrong), more=more)
    enough = answers.answered >= ANSWERED_SHARE * answers.asked
    enough = enough and answers.served >= ANSWERED_SHARE * answers.models
    missing = answers.models - answers.served
    outcome.judge(
        f"{part}: requests answered", asked=f">= {ANSWERED_SHARE:.0%}",
        found=f"{percent(answers.answered, answers.asked)}; {missing} models not served",
        good=enough,
    )  # fmt: skip
    outcome.figures[part] = answers.figures()


# Copies


def copied(seed: int, count: int) -> Answers:
    """Architectures in copies, each asked alone."""
    answers, began = Answers(), time.monotonic()
    for first in range(0, count, AT_ONCE // 2):
        models: dict[str, bytes] = {}
        said: dict[str, str] = {}
        for number in range(first, min(first + AT_ONCE // 2, count)):
            some, what = copies.architecture(seed, number)
            for copy, model in enumerate(some):
                models[f"a{number}c{copy}"] = model.SerializeToString()
                said[f"a{number}c{copy}"] = f"--seed {seed} architecture {number} copy {copy} ({what})"
        with served(models) as (serving, sizes):
            clients = Clients(serving, 1)
            answers.models += len(models)
            answers.served += len(sizes)
            for name, data in models.items():
                rng = np.random.default_rng([seed, *name.encode()])
                truth = Truth(data, 1e-4, floor=1e-38)
                rows = [{"x": rng.standard_normal((1, copies.WIDTH)).astype(np.float32)} for _ in range(3)]
                for row in rows if name in sizes else ():
                    truth.compare(clients.ask(name, [row])[0], row, said[name], answers)
            clients.close()
        print(f"  copies: {answers.models}, {time.monotonic() - began:.0f} s", flush=True)
    return answers


# Declared falsely


def declared_falsely(seed: int, count: int) -> Answers:
    """Graphs that mix rows, declared with ``max_batch_size = 8``."""
    answers = Answers()
    ask_cases([made(seed, 2 * index + 1) for index in range(count)], seed, answers, declared=8)
    return answers


def save(seed: int, number: int, path: Path | None) -> int:
    """One graph again: its text, its witness, its file."""
    case = made(seed, number)
    print(onnx.printer.to_text(case.model))
    print(f"{case.name}\nwitness: {case.witness}")
    if path is not None:
        onnx.save(case.model, path)
    return 0


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="1,000 graphs, 100 served, 20 architectures")
    options.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options.add_argument("--only", type=int, metavar="NUMBER", help="show this graph, and run nothing")
    options.add_argument("--save", type=Path, metavar="FILE", help="write the graph of --only there")
    given = options.parse_args()
    logging.disable(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    if given.only is not None:
        return save(given.seed, given.only, given.save)
    parts: Sequence[str] = given.part or PARTS
    outcome, short, seed = Outcome("benchmarks.unseen_graphs"), given.short, given.seed
    if "rule" in parts:
        judge_rule(outcome, seed, rule(seed, SHORT_GRAPHS if short else GRAPHS))
    if "server" in parts:
        answers = server(seed, SHORT_SERVED if short else SERVED)
        judge_answers(outcome, "server", answers)
        mixing = [name for name in answers.batched if not name.endswith("(safe)")]
        outcome.none(
            "server: mixing graphs batched", mixing,
            more=f"{len(answers.batched)} batched, {answers.in_company} answers came in company",
        )  # fmt: skip
    if "copies" in parts:
        judge_answers(outcome, "copies", copied(seed, SHORT_ARCHITECTURES if short else ARCHITECTURES))
    if "declared" in parts:
        answers = declared_falsely(seed, SHORT_DECLARED if short else DECLARED)
        told: dict[str, Any] = {"refused_batches": answers.served - len(answers.batched)}
        outcome.figures["declared"] = answers.figures() | told
        print(
            f"  {answers.served} graphs whose owner declared falsely: {told['refused_batches']} of them not "
            f"batched all the same; {answers.wrong.total()} of {answers.answered} answers wrong (not judged)"
        )
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
