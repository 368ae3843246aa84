"""The page and the JSON of the GPU benchmark: what was asked, what was measured, what was not and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.report import INVALID, MISSED, PASSED, Outcome


@dataclass(slots=True)
class Part:
    """One part of a run: ``why_not`` says why it is not measured, in whole or in part."""

    name: str
    title: str
    outcome: Outcome
    seconds: float = 0.0
    why_not: str = "not reached yet"
    failed: bool = False
    clocks: dict[str, Any] = field(default_factory=dict)
    """The GPU's state after it."""

    @property
    def verdict(self) -> str:
        """``passed``, ``missed``, or ``invalid`` if something of it was not measured."""
        if any(not one.good for one in self.outcome.verdicts) and not self.outcome.invalid:
            return MISSED
        return INVALID if self.why_not or self.outcome.invalid else PASSED


@dataclass(slots=True)
class Results:
    """A whole run, complete or not."""

    command: str
    device: str
    short: bool
    budget_s: float
    facts: dict[str, Any]
    parts: list[Part]
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: str = ""

    @property
    def complete(self) -> bool:
        """Whether every part was reached, and none failed."""
        return not self.interrupted and not any(part.failed for part in self.parts)

    @property
    def missed(self) -> int:
        """Goals that were missed."""
        return sum(
            not one.good for part in self.parts if not part.outcome.invalid for one in part.outcome.verdicts
        )


def record(results: Results) -> dict[str, Any]:
    """For programs."""
    return {
        "benchmark": "benchmarks.gpu", "command": results.command, "device": results.device,
        "short": results.short, "budget_s": results.budget_s, "seconds": results.seconds,
        "interrupted": results.interrupted, "complete": results.complete, "missed": results.missed,
        "facts": results.facts, "state_before": results.before, "state_after": results.after,
        "parts": [
            {
                "name": part.name, "title": part.title, "verdict": part.verdict, "seconds": part.seconds,
                "not_measured": part.why_not or part.outcome.invalid, "failed": part.failed,
                "figures": part.outcome.figures, "state": part.clocks,
                "verdicts": [
                    {"question": one.question, "goal": one.asked, "measured": one.found, "met": met(one)}
                    for one in part.outcome.verdicts
                ],
            }
            for part in results.parts
        ],
    }  # fmt: skip


def met(one: Any) -> bool | None:
    """Whether a goal was met; None if there is none."""
    return one.good if one.asked else None


def page(results: Results) -> str:
    """For people: Markdown."""
    lines = [f"# {_heading(results)}", "", *_preface(results), "", *_facts(results), ""]
    for part in results.parts:
        lines += [f"## {part.title}", "", *_body(part), ""]
    return "\n".join(lines).rstrip() + "\n"


def write(results: Results, json_path: Path, page_path: Path) -> None:
    """Both files, each whole or as it was before."""
    texts = {
        json_path: json.dumps(_known(record(results)), indent=1, default=str) + "\n",
        page_path: page(results),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.part")
        draft.write_text(text, encoding="utf-8")
        draft.rename(path)


def _known(value: Any) -> Any:
    """JSON has no number for what there was none of."""
    if isinstance(value, dict):
        return {str(key): _known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _heading(results: Results) -> str:
    gpu = results.device.startswith("cuda")
    return f"The torch device on {results.facts.get('gpu', results.device) if gpu else 'the CPU'}"


def _preface(results: Results) -> list[str]:
    lines = [f"`{results.command}`, {results.seconds:.0f} s of {results.budget_s:.0f} s."]
    if not results.device.startswith("cuda"):
        lines.append(
            "This is the CPU: it shows that the benchmark runs. The goals are for GPUs, and what is met or "
            "missed here says nothing about one."
        )
    if results.short:
        lines.append("Short form: small models, small counts.")
    if results.interrupted:
        lines.append(f"**Not complete: {results.interrupted}.**")
    return lines


def _facts(results: Results) -> list[str]:
    pairs = [(name, str(value)) for name, value in results.facts.items()]
    rows = [(name, before, str(results.after.get(name, ""))) for name, before in _strings(results.before)]
    found = _table(("", ""), pairs)
    return [*found, "", *_table(("", "before", "after"), rows)] if rows else found


def _strings(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in values.items()]


def _body(part: Part) -> list[str]:
    why = part.why_not or part.outcome.invalid
    some = part.outcome.verdicts and not part.outcome.invalid
    lines = [f"{'Not all' if some else 'Not'} measured: {why}."] if why else []
    if part.outcome.invalid:
        return lines
    rows = [
        (one.question, one.asked or "-", one.found, {None: "-", True: "yes", False: "**no**"}[met(one)])
        for one in part.outcome.verdicts
    ]
    if rows:
        lines += [*([""] if lines else []), *_table(("", "goal", "measured", "met"), rows)]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]
