"""What a person sees of a soak: one live screen on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final, Self

from qa.soak.verdict import Findings
from qa.soak.watch import Held, Watch

PLAIN_EVERY_S: Final = 10.0
_WIDE: Final = 40


class Screen:
    """Shows how it goes on standard error."""

    def __init__(self, seconds: float, watch: Watch, found: Findings) -> None:
        self._seconds, self._watch, self._found = seconds, watch, found
        self.doing = "starting"
        self._first: dict[int, Held] = {}
        self._told = 0.0
        self._live: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, asked: int) -> None:
        """Show it; ``asked`` requests of the leg that is on are not in the findings yet."""
        if self._live is not None:
            self._live.update(self._panel(asked), refresh=True)
        elif time.monotonic() - self._told >= PLAIN_EVERY_S:
            self._told = time.monotonic()
            print(self._line(asked), file=sys.stderr, flush=True)

    def _line(self, asked: int) -> str:
        found = self._found
        own = ", ".join(f"{name} {one.own_kib / 1024:.0f} MiB" for name, one in self._watch.latest.items())
        return (
            f"{self._watch.now_s:.0f} of {self._seconds:.0f} s: {found.requests + asked:,} requests, "
            f"{len(found.violations)} violations; {self.doing}; {own}"
        )

    def _panel(self, asked: int) -> Any:
        from rich.panel import Panel
        from rich.table import Table

        found, now_s = self._found, self._watch.now_s
        done = min(1.0, now_s / self._seconds)
        filled = round(done * _WIDE)
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", justify="right")
        facts.add_column()
        facts.add_row("time", f"{'━' * filled}{'╌' * (_WIDE - filled)} {now_s:.0f} of {self._seconds:.0f} s")
        facts.add_row("now", self.doing)
        total = found.requests + asked
        facts.add_row(
            "requests", f"{total:,}, {total / max(1.0, now_s):,.0f} a second; {found.ends.good:,} good"
        )
        facts.add_row(
            "changes", ", ".join(f"{count} {what}" for what, count in found.changes.items()) or "none"
        )
        facts.add_row(
            "faults", ", ".join(f"{count} {what}" for what, count in found.faults.items()) or "none"
        )
        said = f"[red]{found.violations[-1]}[/red]" if found.violations else "none"
        facts.add_row("violations", f"{len(found.violations)}: {said}" if found.violations else said)
        table = Table(box=None, padding=(0, 2))
        for column in ("process", "MiB", "since seen", "files", "threads"):
            table.add_column(column, justify="left" if column == "process" else "right", style="dim")
        for name, held in self._watch.latest.items():
            first = self._first.setdefault(held.pid, held)
            more = f"{(held.own_kib - first.own_kib) / 1024:+.1f}"
            table.add_row(name, f"{held.own_kib / 1024:.1f}", more, str(held.files), str(held.threads))
        outer = Table.grid(padding=(1, 0))
        outer.add_row(facts)
        outer.add_row(table)
        return Panel(outer, title="soak", border_style="dim")
