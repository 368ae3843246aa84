"""Who does not answer is found by the watcher's own ticks; who is only kept from answering is not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from math import ceil

import pytest

from clockwork_serve.serve.supervisor.processes import (
    START_TIMES,
    STOPPED_SHARE,
    TICK_S,
    ProcessWatch,
    ThreadState,
    read_thread_state,
)

LIMIT_S = 3.0
TICKS = round(LIMIT_S / TICK_S)
TICKS_STOPPED = ceil(STOPPED_SHARE * LIMIT_S / TICK_S)
SLEEPS, STOPPED, TRACED, DISK = (ThreadState(state, 1.0) for state in ("S", "T", "t", "D"))


@dataclass
class Playing:
    """A watch of a child that is as a test says; ``answers``: it returns each beat before the next tick."""

    answers: bool = True
    sent: int = 0
    seen: ThreadState | None = SLEEPS
    watch: ProcessWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = ProcessWatch(7, LIMIT_S, self._send, lambda pid: self.seen)

    def _send(self) -> None:
        self.sent += 1

    def tick(self, *, paused: bool = False) -> str:
        why = self.watch.tick(paused=paused)
        if self.answers:
            self.watch.heard()
        return why

    def ticks_to_end(self, most: int = 1000) -> int | None:
        """How many ticks until it is to be ended."""
        return next((number for number in range(1, most + 1) if self.tick()), None)

    def started(self) -> Playing:
        """It has answered once."""
        self.tick()
        self.watch.heard()
        return self


def test_who_answers_is_left_alone_whatever_it_does() -> None:
    for seen in (SLEEPS, DISK, ThreadState("R", 1.0)):
        playing = Playing(seen=seen).started()
        assert playing.ticks_to_end() is None
        assert playing.sent > 900


def test_who_is_silent_is_ended_after_the_limit_and_sent_one_beat() -> None:
    playing = Playing().started()
    playing.answers, sent = False, playing.sent
    assert playing.ticks_to_end() == TICKS + 1, "the first tick sends the beat"
    assert playing.sent == sent + 1, "a stuck process is not sent more and more"


@pytest.mark.parametrize("seen", [STOPPED, TRACED])
def test_who_is_stopped_by_a_signal_is_ended_sooner(seen: ThreadState) -> None:
    playing = Playing(answers=False, seen=seen)
    assert playing.ticks_to_end() == TICKS_STOPPED + 1, "even while it starts"


def test_who_was_stopped_for_less_goes_on() -> None:
    playing = Playing().started()
    for _ in range(20):
        playing.answers, playing.seen = False, STOPPED
        assert playing.ticks_to_end(TICKS_STOPPED) is None
        playing.answers, playing.seen = True, SLEEPS
        assert not playing.tick()


def test_who_starts_has_much_longer() -> None:
    assert Playing(answers=False).ticks_to_end(10**6) == START_TIMES * TICKS + 1


def test_a_pause_of_the_watcher_gives_everybody_a_fresh_limit() -> None:
    for seen in (SLEEPS, STOPPED):
        playing = Playing().started()
        playing.answers, playing.seen = False, seen
        for _ in range(50):
            assert not playing.tick(paused=True)
            assert playing.ticks_to_end(TICKS_STOPPED - 2) is None


def test_who_gets_no_core_is_not_stuck_and_who_loops_is_as_far_as_it_ran() -> None:
    starved, looping = Playing().started(), Playing().started()
    starved.answers = looping.answers = False
    starved.seen = ThreadState("R", 5.0)
    assert starved.ticks_to_end() is None
    ended = None
    for number in range(1, 1000):  # a quarter of a core
        looping.seen = ThreadState("R", 5.0 + number * TICK_S / 4)
        if looping.tick():
            ended = number
            break
    assert ended == 4 * TICKS + 1


def test_who_waits_for_a_disk_is_not_stuck_nor_who_is_gone() -> None:
    for seen in (DISK, None):
        playing = Playing().started()
        playing.answers, playing.seen = False, seen
        assert playing.ticks_to_end() is None


def test_a_process_is_seen_as_it_is() -> None:
    own = read_thread_state(os.getpid())
    assert own is not None
    assert own.state == "R"
    assert own.ran_s > 0
    assert read_thread_state(1 << 22) is None
    with subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 19)"]) as child:
        os.waitpid(child.pid, os.WUNTRACED)
        seen = read_thread_state(child.pid)
        assert seen is not None
        assert seen.stopped
        child.kill()
