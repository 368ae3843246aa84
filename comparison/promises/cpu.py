"""CPU time by process of a server, user and system apart: reads /proc, changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.machine import TICK_S

_ROLE: Final = re.compile(r"clockwork_serve\.serve\.\w+\.(\w+?)(?:_process)?(?!\w)")
KEEPER: Final = "keeper"
"""The first process, which starts the others, and whatever else it started."""


@dataclass(frozen=True, slots=True)
class Used:
    """Seconds."""

    user_s: float = 0.0
    system_s: float = 0.0

    def __add__(self, other: Used) -> Used:
        return Used(self.user_s + other.user_s, self.system_s + other.system_s)

    def __sub__(self, other: Used) -> Used:
        return Used(self.user_s - other.user_s, self.system_s - other.system_s)


def by_role(pids: Iterable[int]) -> dict[str, Used]:
    """What gateway, controller, worker and keeper have used so far."""
    found: dict[str, Used] = {}
    for pid in pids:
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used = Used(int(fields[11]) * TICK_S, int(fields[12]) * TICK_S)
            role = role_of(line)
            found[role] = found.get(role, Used()) + used
    return found


def role_of(line: str) -> str:
    """Which process it is, by its command line."""
    told = _ROLE.search(line)
    return told.group(1) if told else KEEPER


def between(before: Mapping[str, Used], after: Mapping[str, Used]) -> dict[str, dict[str, float]]:
    """What each used between two readings."""
    return {
        role: {"user_s": used.user_s, "system_s": used.system_s}
        for role in sorted(after)
        for used in [after[role] - before.get(role, Used())]
    }


def total_s(used: Mapping[str, Mapping[str, float]]) -> float:
    """Of all processes."""
    return sum(one["user_s"] + one["system_s"] for one in used.values())
