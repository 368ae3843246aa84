"""The sending processes as their parent sees them: started, told when to begin, read without being asked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np

from clockwork_lab.bench.address import Unreachable
from clockwork_lab.bench.child import OPEN_S
from clockwork_lab.bench.job import Job, Said, write_job
from clockwork_lab.bench.plan import Plan
from clockwork_lab.bench.records import FIRST_ENDS, ROW, End, Kind, Records, Rows, Table
from clockwork_serve.errors import ClockworkError
from clockwork_serve.units import NS_PER_MS

AHEAD_NS: Final = 200 * NS_PER_MS
"""The run begins so long after the senders were told when."""
_READY_S: Final = OPEN_S + 50.0
_POLL_S: Final = 0.005


class SenderFailed(ClockworkError):
    """A sending process ended on its own."""


class Hand:
    """One sending process and its rows."""

    def __init__(self, job: Job, rows: Rows) -> None:
        self.job, self.rows = job, rows
        self.ends: list[End] = list(FIRST_ENDS)
        self.said: Said | None = None
        self.ready = False
        self._text = b""
        self._seen = 0
        self._log, self._counts = rows.array("ended"), rows.counts
        self.process = subprocess.Popen(
            [sys.executable, "-m", "clockwork_lab.bench.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(rows.fd,),
            start_new_session=True,  # Ctrl-C is for us, who tells it what to do
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        os.set_blocking(self._out.fileno(), False)

    def give(self) -> None:
        """Hand it its job."""
        with contextlib.suppress(BrokenPipeError):
            write_job(self._in, self.job)

    def begin(self, start_ns: int) -> None:
        """Tell it when the run begins."""
        self._in.write(b"%d\n" % start_ns)
        self._in.flush()

    def stop(self) -> None:
        """Tell it to send no more."""
        with contextlib.suppress(OSError):
            self._in.close()

    def close(self) -> None:
        """Let go of it; its rows can still be read."""
        self._out.close()
        os.close(self.rows.fd)

    def hear(self) -> None:
        """Read what it said. Raises :class:`SenderFailed` or :class:`Unreachable`."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out.fileno(), 1 << 16):
                self._text += data
            ended = True
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            said = msgspec.json.decode(line, type=Said)
            if said.error:
                raise Unreachable(f"url: expected connections to {self.job.host}, found: {said.error}")
            self.ready |= said.ready
            if said.code:
                assert said.code == len(self.ends)
                self.ends.append(End(Kind(said.kind), said.reason))
            if said.over:
                self.said = said
        if ended and self.said is None:
            raise SenderFailed(f"a sending process ended with status {self.process.wait()}")

    def news(self) -> np.ndarray:
        """The rows that ended since the last time."""
        until = self._counts[0]
        self.hear()  # what their ends mean
        seen, self._seen = self._seen, until
        return self._log[seen:until]

    @property
    def asked(self) -> int:
        """Requests that were due so far."""
        return int(self._counts[1] + self._counts[2])

    def table(self, number: int, code_of: dict[End, int]) -> Table:
        """All rows that were due, as records."""
        opened, closed = self._counts[1], self._counts[2]
        first = self.job.open_rows
        found = np.zeros(opened + closed, ROW)
        for name in ROW.names or ():
            if name not in ("end", "process"):
                column = self.rows.array(name)
                found[name][:opened] = column[:opened]
                found[name][opened:] = column[first : first + closed]
        status = self.rows.array("status")
        codes = np.array([code_of[end] for end in self.ends], np.int16)
        found["end"][:opened] = codes[status[:opened]]
        found["end"][opened:] = codes[status[first : first + closed]]
        found["process"] = number
        return found


class Crew:
    """All of them. Leaving the block ends them, whatever they do."""

    def __init__(self, plan: Plan) -> None:
        self.hands = [Hand(job, rows) for job, rows in zip(plan.jobs, plan.rows, strict=True)]
        self.start_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hand in self.hands:
            hand.stop()
            if hand.said is None:
                hand.process.kill()
            hand.process.wait()
            hand.close()

    def begin(self) -> None:
        """Have them make their connections, then tell them all the same instant."""
        for hand in self.hands:
            hand.give()
        give_up = time.monotonic() + _READY_S
        while not all(hand.ready for hand in self.hands):
            for hand in self.hands:
                hand.hear()
            if time.monotonic() > give_up:
                raise SenderFailed(f"a sending process did not begin within {_READY_S:g} s")
            time.sleep(_POLL_S)
        self.start_ns = time.monotonic_ns() + AHEAD_NS
        for hand in self.hands:
            hand.begin(self.start_ns)

    def stop(self) -> None:
        """Send no more; what is out is waited for."""
        for hand in self.hands:
            hand.stop()

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return all(hand.said is not None for hand in self.hands)

    def records(self) -> Records:
        """What became of all requests, in order of their schedule."""
        ends: dict[End, int] = {end: code for code, end in enumerate(FIRST_ENDS)}
        for hand in self.hands:
            for end in hand.ends:
                ends.setdefault(end, len(ends))
        table = np.concatenate([hand.table(number, ends) for number, hand in enumerate(self.hands)])
        order = np.argsort(table["scheduled_ns"], kind="stable")
        return Records(table[order], tuple(ends))
