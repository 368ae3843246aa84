"""Replays a journal through a new controller, and compares its effects with the recorded ones.

A journal holds every event, and which events preceded which decision. A controller has no other input, so
its effects must be the same. The first difference is reported, and ends the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.controller import Controller
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import ControllerEffect, ControllerEvent
from clockwork_serve.telemetry import JournalHead, Step, Torn, read_records
from clockwork_serve.telemetry.journal import journal_bytes

TELL_EVERY: Final = 256
"""Records between two reports of progress."""

Tell = Callable[[int, int], None]
"""Called with (bytes read, decisions that agree)."""


class Difference(Struct, frozen=True, kw_only=True):
    """Where a replay first differs: at effect ``at`` of record ``record`` (records count from 1).

    ``expected`` or ``found`` is None where that side has fewer effects. ``broke`` is the exception that the
    controller raised, if any.
    """

    record: int
    run: int
    now_ns: int
    events: tuple[ControllerEvent, ...]
    at: int = 0
    expected: ControllerEffect | None = None
    found: ControllerEffect | None = None
    broke: str = ""


class Run(Struct, kw_only=True):
    """One controller process in a journal, and how much of it was replayed.

    ``other_build`` says how its code differs from this one. ``gap`` counts the steps that are missing after
    the last one that could be replayed; ``torn_bytes`` the bytes that are missing of its last record.
    """

    head: JournalHead
    other_build: str
    first_record: int
    decisions: int = 0
    events: int = 0
    effects: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    gap: int = 0
    torn_bytes: int = 0


class Replayed(Struct, kw_only=True):
    """The result of a replay; ``cut``: it was stopped before the end."""

    runs: list[Run]
    difference: Difference | None = None
    cut: bool = False

    @property
    def agrees(self) -> bool:
        """Whether every decision of the journal was replayed and agrees."""
        return self.difference is None and not self.cut and not any(run.gap for run in self.runs)

    @property
    def decisions(self) -> int:
        """How many decisions agree."""
        return sum(run.decisions for run in self.runs)


def replay(
    path: Path,
    *,
    checks: bool = False,
    tell: Tell = lambda done_bytes, decisions: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Replayed:
    """Replay a journal; ``checks``: assert every invariant of the controller after each step.

    Raises :class:`ConfigError` where the file is no journal, or lacks what a replay needs.
    """
    journal_bytes(path)
    player = _Player(checks=checks)
    for number, (done_bytes, record) in enumerate(read_records(path), start=1):
        player.take(number, record)
        if player.replayed.difference is not None:
            break
        if number % TELL_EVERY == 0:
            tell(done_bytes, player.replayed.decisions)
            if stopped():
                player.replayed.cut = True
                break
    if not player.replayed.runs:
        raise ConfigError(f"journal: expected records; found none in {path}; let the server run on")
    return player.replayed


def decided_again(controller: Controller, step: Step) -> list[ControllerEffect]:
    """Have a controller observe a recorded step; returns what it decides."""
    for event in step.events:
        controller.observe(event, step.now_ns)
    found = controller.decide(step.now_ns)
    controller.next_wakeup_ns()  # a driver calls it after each decision, and it changes the heaps
    return found


class _Player:
    """Feeds one record after another to the controller of the run that they are in."""

    def __init__(self, *, checks: bool) -> None:
        self.replayed = Replayed(runs=[])
        self._checks = checks
        self._controller: Controller | None = None

    def take(self, number: int, record: JournalHead | Step | Torn) -> None:
        """Replay the next record, which is the ``number``-th."""
        if isinstance(record, JournalHead) and not record.continues:
            self._controller = Controller(record.controller_config())
            self.replayed.runs.append(Run(head=record, other_build=record.other_build(), first_record=number))
        elif not self.replayed.runs:
            raise ConfigError(_NO_HEAD)
        elif isinstance(record, Torn):
            self.replayed.runs[-1].torn_bytes = record.missing_bytes
        elif self._controller is not None and isinstance(record, Step):
            self._step(number, record)

    def _step(self, number: int, step: Step) -> None:
        run, controller = self.replayed.runs[-1], self._controller
        assert controller is not None
        if step.dropped:
            run.gap, self._controller = step.dropped, None
            return
        found: list[ControllerEffect] = []
        broke = ""
        try:
            found = decided_again(controller, step)
            if self._checks:
                controller.check()
        except Exception as error:  # noqa: BLE001 - whatever a broken brain raises
            broke = repr(error)
        at = first_difference(step.effects, found)
        if broke or at is not None:
            at = at or 0
            self.replayed.difference = Difference(
                record=number, run=len(self.replayed.runs), now_ns=step.now_ns, events=step.events, at=at,
                expected=step.effects[at] if at < len(step.effects) else None,
                found=found[at] if at < len(found) else None, broke=broke,
            )  # fmt: skip
            return
        run.began_ns = run.began_ns if run.decisions else step.now_ns
        run.ended_ns = step.now_ns
        run.decisions += 1
        run.events += len(step.events)
        run.effects += len(found)


_NO_HEAD: Final = (
    "journal: expected the record that begins a run; found a step. Its first file was deleted because it "
    "grew too large, or a version that wrote none made it: there is nothing to start a replay from"
)


def first_difference(expected: tuple[ControllerEffect, ...], found: list[ControllerEffect]) -> int | None:
    """The first effect that differs; None if none does."""
    if len(expected) == len(found) and all(map(_same, expected, found)):
        return None
    for at, (one, other) in enumerate(zip(expected, found, strict=False)):
        if not _same(one, other):
            return at
    return min(len(expected), len(found))


def _same(one: ControllerEffect, other: ControllerEffect) -> bool:
    """Whether two effects are equal once encoded: a list in place of a tuple is no difference."""
    return one == other or msgspec.msgpack.encode(one) == msgspec.msgpack.encode(other)
