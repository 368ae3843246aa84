"""The differences that are known, each with its reason, and the page that tells users of them.

python -m tests.end_to_end.triton.listed      writes the page
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.triton.asking import Case
from tests.end_to_end.triton.calls import calls
from tests.end_to_end.triton.http_control import control
from tests.end_to_end.triton.http_infer import deadly, inferences
from tests.end_to_end.triton.http_wire import wires

PAGE = Path(__file__).parents[3] / "docs" / "use" / "differences.md"
LIST = Path(__file__).with_name("differences.toml")
WIDTH = 118
CELL = 60
SHOWN = 4
"""Requests that a row of the page names; the list has all."""
HEAD = """\
# Differences from Triton

The same {asked} requests, good and bad, went to Triton 2.51 and to this server, both with the same
[model repository](model-repository.md). {equal} of them got the same answer, and {differ} another one. Each
difference is here with its reason; a row names at most {shown} requests. All of them are in
[a list](../../tests/end_to_end/triton/differences.toml) that a test compares with both servers. It fails if
a difference is missing, or is one no longer: `make triton` (x86-64, glibc 2.35 or later, Python 3.11 or
3.12), and `make test` where it can.

Compared are the status; of a good answer each field of its JSON, each byte of its tensors, `Content-Type`,
`Content-Encoding` and `Inference-Header-Content-Length`; of a bad one that there is an `error` with words.
Not compared are those words, clocks, and what this server adds to every answer: the durations among the
`parameters` of a good one, `outcome` and `reason` of a bad one, and the header `Clockwork-Request-Id`.
"""


@dataclass(frozen=True)
class Group:
    """Requests that the two servers answer in different ways for one reason: (Triton's, ours) by request."""

    title: str
    reason: str
    answers: dict[str, tuple[str, str]]


def cases() -> dict[str, Case]:
    """Every request that leaves both servers alive, by its name."""
    return _by_name([*control(), *inferences(), *wires(), *calls()])


def deadly_cases() -> dict[str, Case]:
    """Those that do not, by name."""
    return _by_name(deadly())


def groups() -> list[Group]:
    """What ``differences.toml`` holds."""
    found = tomllib.loads(LIST.read_text(encoding="utf-8"))["because"]
    return [
        Group(each["title"], each["reason"], {name: (a, b) for name, (a, b) in each["requests"].items()})
        for each in found
    ]


def listed() -> dict[str, tuple[str, str]]:
    """Triton's answer and ours, by request, where they differ."""
    every = [pair for group in groups() for pair in group.answers.items()]
    found = dict(every)
    assert len(found) == len(every), "one request is listed twice"
    return found


def page() -> str:
    """The page of the documentation."""
    asked, differ = len(cases()) + len(deadly_cases()), len(listed())
    parts = [HEAD.format(asked=asked, differ=differ, equal=asked - differ, shown=SHOWN)]
    for group in groups():
        parts.append(f"\n## {group.title}\n\n{_wrapped(group.reason)}\n")
        parts.append("\n| Triton | here | requests |\n|---|---|---|\n")
        parts += [f"| {_cell(a)} | {_cell(b)} | {names} |\n" for (a, b), names in _rows(group)]
    return "".join(parts)


def _by_name(every: Iterable[Case]) -> dict[str, Case]:
    every = list(every)
    found = {case.name: case for case in every}
    assert len(found) == len(every), "two requests of one name"
    return found


def _rows(group: Group) -> Iterator[tuple[tuple[str, str], str]]:
    """Requests with the same pair of answers, in one line."""
    for pair in dict.fromkeys(group.answers.values()):
        names = [name for name, answers in group.answers.items() if answers == pair]
        more = len(names) - SHOWN
        shown = [*names[:SHOWN], f"and {more} more"] if more > 0 else names
        yield pair, _plain("; ".join(shown))


def _cell(answer: str) -> str:
    short = answer if len(answer) <= CELL else f"{answer[:CELL]} …"
    return _plain(short)


def _plain(text: str) -> str:
    """With no mark that Markdown would take for its own."""
    return text.replace("|", "\\|").replace("*", "\\*")


def _wrapped(text: str) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
