"""The sending process itself: a job from standard input, lines on standard output, rows in shared memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import struct
import sys
import time
from typing import Final

import msgspec

from clockwork_lab.bench.address import tls_context
from clockwork_lab.bench.connection import Connection
from clockwork_lab.bench.job import Job, Said, read_job
from clockwork_lab.bench.records import End, Ends, Rows
from clockwork_lab.bench.sender import Sender
from clockwork_lab.bench.wire_grpc import GrpcConnection, PreparedCalls
from clockwork_lab.bench.wire_http import HttpConnection, Prepared

OPEN_S: Final = 10.0
SLICE_NS: Final = 100_000
_PR_SET_TIMERSLACK: Final = 29
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The number of that system call, for which not every C library has a function."""


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
            connections=sender.most_connections, unexpected=sender.unexpected,
            unexpected_bytes=sender.unexpected_bytes,
        )
    )  # fmt: skip


def _sender(job: Job) -> Sender:
    def tell(code: int, end: End) -> None:
        _say(Said(code=code, kind=end.kind, reason=end.reason))

    grpc = job.protocol == "grpc"
    wire: type[Connection] = GrpcConnection if grpc else HttpConnection
    prepared = PreparedCalls(job.messages, job.bodies) if grpc else Prepared(job.messages, job.bodies)
    rows = Rows(job.rows_fd, job.rows_size)
    tls = tls_context(job.tls_files, http2=grpc) if job.tls else None
    return Sender(job, rows, Ends(tell), wire=wire, prepared=prepared, tls=tls, stop_fd=0)


def _raise_limits() -> None:
    """As many sockets as the system lets us have; timers that are not rounded (50 us is Linux's usual)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _settle(job: Job) -> str:
    """Take the core and the priority that the job names; what is wrong, if that is not allowed."""
    try:
        if job.core is not None:
            os.sched_setaffinity(0, {job.core})
        if job.realtime:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError as error:
        return f"no leave to take core {job.core} or real-time priority ({error.strerror})"
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None and not job.realtime:
        # Of those that wake at once, Linux 6.12 and later run first who wants the core for the shortest time.
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        wanted = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, wanted, 0)
    return ""


def _say(said: Said) -> None:
    os.write(1, msgspec.json.encode(said) + b"\n")


if __name__ == "__main__":
    main()
