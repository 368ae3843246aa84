"""The sending process itself: a job from standard input, lines on standard output, rows in shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
import time
from typing import Final

import msgspec

from clockwork_serve.bench.address import tls_context
from clockwork_serve.bench.connection import Connection
from clockwork_serve.bench.ends import End, Ends
from clockwork_serve.bench.job import Job, Said, read_job
from clockwork_serve.bench.rows import Rows
from clockwork_serve.bench.sender import Sender
from clockwork_serve.bench.wire_grpc import GrpcConnection, PreparedCalls
from clockwork_serve.bench.wire_http import HttpConnection, Prepared

OPEN_S: Final = 10.0
_PR_SET_TIMERSLACK: Final = 29


def main() -> None:
    """Do the job, until it is done or standard input says something or ends."""
    job = read_job(sys.stdin.buffer)
    _raise_limits()
    failed = _settle(job)
    if failed:
        _say(Said(error=failed))
        return
    sender = _sender(job)
    failed = sender.open(OPEN_S)
    if failed:
        _say(Said(error=failed))
        return
    _say(Said(ready=True))
    start = sys.stdin.buffer.readline()
    if not start:
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    cpu_s = time.process_time()
    sender.run(int(start))
    _say(
        Said(
            over=True, cpu_s=time.process_time() - cpu_s, waited=sender.waited, full=sender.full,
            connections=sender.most_connections, unexpected_bytes=sender.unexpected_bytes,
        )
    )  # fmt: skip


def _sender(job: Job) -> Sender:
    def tell(code: int, end: End) -> None:
        _say(Said(code=code, kind=end.kind, reason=end.reason))

    grpc = job.protocol == "grpc"
    wire: type[Connection] = GrpcConnection if grpc else HttpConnection
    prepared = PreparedCalls(job.messages, job.bodies) if grpc else Prepared(job.messages, job.bodies)
    rows = Rows(job.rows_fd, job.rows_size)
    tls = tls_context(job.ca, http2=grpc) if job.tls else None
    return Sender(job, rows, Ends(tell), wire=wire, prepared=prepared, tls=tls, stop_fd=0)


def _raise_limits() -> None:
    """As many sockets as the system lets us have; timers that are not rounded (50 us is Linux's usual)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _settle(job: Job) -> str:
    """Take the core and the niceness that the job names; what is wrong, if that is not allowed."""
    try:
        if job.core is not None:
            os.sched_setaffinity(0, {job.core})
        if job.nice:
            os.setpriority(os.PRIO_PROCESS, 0, job.nice)
            # In a session of its own, the niceness of its group is what counts, where there are groups.
            with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
                group.write(str(job.nice))
    except OSError as error:
        return f"cores and nice: {error.strerror}: this system does not let us"
    return ""


def _say(said: Said) -> None:
    os.write(1, msgspec.json.encode(said) + b"\n")


if __name__ == "__main__":
    main()
