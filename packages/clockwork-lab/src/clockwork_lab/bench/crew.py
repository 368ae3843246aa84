"""The sending processes as their parent sees them: it starts, synchronises, monitors and ends them."""

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
from clockwork_lab.bench.job import Job, SenderMessage, write_job
from clockwork_lab.bench.plan import Plan
from clockwork_lab.bench.records import FIRST_ENDS, ROW, End, Kind, Records, Rows, Table
from clockwork_serve.errors import ClockworkError
from clockwork_serve.units import NS_PER_MS

AHEAD_NS: Final = 200 * NS_PER_MS
"""How far ahead of the start of the run its instant is sent to the senders."""
_READY_S: Final = OPEN_S + 50.0
_POLL_S: Final = 0.005


class SenderFailed(ClockworkError):
    """A sending process ended on its own."""


class SenderProcess:
    """One sending process and its rows. ``final`` is its last message, once it has ended."""

    def __init__(self, job: Job, rows: Rows) -> None:
        self.job, self.rows = job, rows
        self.ends: list[End] = list(FIRST_ENDS)
        self.final: SenderMessage | None = None
        self.ready = False
        self._text = b""
        self._seen = 0
        self._log, self._counts = rows.array("ended"), rows.counts
        self.child = subprocess.Popen(
            [sys.executable, "-m", "clockwork_lab.bench.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(rows.fd,),
            start_new_session=True,  # Ctrl-C reaches the parent only, which stops its senders
        )  # fmt: skip
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self._in, self._out = self.child.stdin, self.child.stdout
        os.set_blocking(self._out.fileno(), False)

    def send_job(self) -> None:
        """Send it its job."""
        with contextlib.suppress(BrokenPipeError):
            write_job(self._in, self.job)

    def begin(self, start_ns: int) -> None:
        """Send it the instant at which the run begins."""
        self._in.write(b"%d\n" % start_ns)
        self._in.flush()

    def stop(self) -> None:
        """Have it stop sending: it sees the end of its standard input."""
        with contextlib.suppress(OSError):
            self._in.close()

    def close(self) -> None:
        """Close its descriptors; its rows can still be read."""
        self._out.close()
        os.close(self.rows.fd)

    def poll(self) -> None:
        """Read its messages. Raises :class:`SenderFailed` or :class:`Unreachable`."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out.fileno(), 1 << 16):
                self._text += data
            ended = True
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            message = msgspec.json.decode(line, type=SenderMessage)
            if message.error:
                raise Unreachable(f"url: expected connections to {self.job.host}, found: {message.error}")
            self.ready |= message.ready
            if message.code:
                assert message.code == len(self.ends)
                self.ends.append(End(Kind(message.kind), message.reason))
            if message.over:
                self.final = message
        if ended and self.final is None:
            raise SenderFailed(f"a sending process ended with status {self.child.wait()}")

    def new_rows(self) -> np.ndarray:
        """The rows that ended since the last call."""
        until = self._counts[0]
        self.poll()  # receives the meaning of new codes first
        seen, self._seen = self._seen, until
        return self._log[seen:until]

    @property
    def due(self) -> int:
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
    """All sending processes. Leaving the block ends them, if necessary by SIGKILL."""

    def __init__(self, plan: Plan) -> None:
        self.processes = [SenderProcess(job, rows) for job, rows in zip(plan.jobs, plan.rows, strict=True)]
        self.start_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.stop()
            if process.final is None:
                process.child.kill()
            process.child.wait()
            process.close()

    def begin(self) -> None:
        """Have them open their connections, then send all of them the instant of the start."""
        for process in self.processes:
            process.send_job()
        give_up_at = time.monotonic() + _READY_S
        while not all(process.ready for process in self.processes):
            for process in self.processes:
                process.poll()
            if time.monotonic() > give_up_at:
                raise SenderFailed(f"a sending process did not begin within {_READY_S:g} s")
            time.sleep(_POLL_S)
        self.start_ns = time.monotonic_ns() + AHEAD_NS
        for process in self.processes:
            process.begin(self.start_ns)

    def stop(self) -> None:
        """Have all stop sending; requests in flight are awaited."""
        for process in self.processes:
            process.stop()

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return all(process.final is not None for process in self.processes)

    def records(self) -> Records:
        """The records of all requests, in order of their schedule."""
        ends: dict[End, int] = {end: code for code, end in enumerate(FIRST_ENDS)}
        for process in self.processes:
            for end in process.ends:
                ends.setdefault(end, len(ends))
        table = np.concatenate([process.table(number, ends) for number, process in enumerate(self.processes)])
        order = np.argsort(table["scheduled_ns"], kind="stable")
        return Records(table[order], tuple(ends))
