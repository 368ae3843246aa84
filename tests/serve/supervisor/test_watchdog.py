"""The watchdog finds a child that does not answer, and spares one that was kept from answering."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from math import ceil

import pytest

from clockwork_serve.serve.supervisor.processes import (
    START_LIMIT_FACTOR,
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
class Watched:
    """A watchdog of a scripted child; ``answers``: it returns each beat before the next tick."""

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
            self.watch.beat_received()
        return why

    def ticks_to_end(self, most: int = 1000) -> int | None:
        """How many ticks until the child is to be ended."""
        return next((number for number in range(1, most + 1) if self.tick()), None)

    def started(self) -> Watched:
        """Let the child answer once."""
        self.tick()
        self.watch.beat_received()
        return self


def test_a_child_that_answers_is_not_stuck_in_any_state() -> None:
    for seen in (SLEEPS, DISK, ThreadState("R", 1.0)):
        playing = Watched(seen=seen).started()
        assert playing.ticks_to_end() is None
        assert playing.sent > 900


def test_a_child_that_does_not_answer_is_stuck_after_the_limit_and_sent_one_beat() -> None:
    playing = Watched().started()
    playing.answers, sent = False, playing.sent
    assert playing.ticks_to_end() == TICKS + 1, "the first tick sends the beat"
    assert playing.sent == sent + 1, "a stuck process is not sent more and more"


@pytest.mark.parametrize("seen", [STOPPED, TRACED])
def test_a_child_stopped_by_a_signal_is_stuck_sooner(seen: ThreadState) -> None:
    playing = Watched(answers=False, seen=seen)
    assert playing.ticks_to_end() == TICKS_STOPPED + 1, "even while it starts"


def test_a_child_that_was_stopped_briefly_is_not_stuck() -> None:
    playing = Watched().started()
    for _ in range(20):
        playing.answers, playing.seen = False, STOPPED
        assert playing.ticks_to_end(TICKS_STOPPED) is None
        playing.answers, playing.seen = True, SLEEPS
        assert not playing.tick()


def test_a_starting_child_has_a_longer_limit() -> None:
    assert Watched(answers=False).ticks_to_end(10**6) == START_LIMIT_FACTOR * TICKS + 1


def test_a_pause_of_the_watchdog_restarts_the_limit() -> None:
    for seen in (SLEEPS, STOPPED):
        playing = Watched().started()
        playing.answers, playing.seen = False, seen
        for _ in range(50):
            assert not playing.tick(paused=True)
            assert playing.ticks_to_end(TICKS_STOPPED - 2) is None


def test_a_child_without_a_core_is_not_stuck_and_a_looping_one_is_as_far_as_it_ran() -> None:
    starved, looping = Watched().started(), Watched().started()
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


def test_a_child_that_waits_for_a_disk_or_has_ended_is_not_stuck() -> None:
    for seen in (DISK, None):
        playing = Watched().started()
        playing.answers, playing.seen = False, seen
        assert playing.ticks_to_end() is None


def test_a_child_that_is_asked_for_no_beats_may_be_silent_and_may_not_be_stopped() -> None:
    seen = SLEEPS
    watch = ProcessWatch(7, LIMIT_S, None, lambda pid: seen)
    assert not any(watch.tick() for _ in range(1000))
    seen = STOPPED
    assert [bool(watch.tick()) for _ in range(TICKS_STOPPED)] == [*[False] * (TICKS_STOPPED - 1), True]


def test_the_state_of_a_real_process_is_read() -> None:
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
