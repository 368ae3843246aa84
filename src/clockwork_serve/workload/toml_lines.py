"""Finds the lines of a TOML file's keys, for messages; it never judges or reads values."""

from __future__ import annotations

import re
from typing import Final

_HEADER: Final = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.\-\"' ]+?)\s*\]\]?\s*(?:#.*)?\r?$")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_\-]+|\"[^\"]*\"|'[^']*')\s*(?:\.[^=]*)?=")
_FENCES: Final = ('"""', "'''")


def lines_of(text: str) -> dict[str, int]:
    """Line numbers, from 1, by path: ``seconds``, ``loads[1]`` (its header), ``loads[1].slo_ms``.

    A key of a dotted or inline table is found by its first part's line; what looks like a key inside a string
    of several lines is passed over.
    """
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if fence:
            fence = "" if fence in line else fence
            continue
        if header := _HEADER.match(line):
            name = header.group(2).replace('"', "").replace("'", "").replace(" ", "")
            if header.group(1) == "[[":
                counts[name] = counts.get(name, -1) + 1
                name = f"{name}[{counts[name]}]"
            else:
                first, _, rest = name.partition(".")
                name = f"{first}[{counts[first]}].{rest}" if rest and first in counts else name
            table = f"{name}."
            lines.setdefault(name, number)
        elif key := _KEY.match(line):
            lines.setdefault(table + key.group(1).strip("\"'"), number)
            fence = next((mark for mark in _FENCES if line.count(mark) % 2), "")
    return lines
