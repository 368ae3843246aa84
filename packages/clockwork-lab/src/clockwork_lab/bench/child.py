"""The sending process: reads its job from stdin, writes messages to stdout and rows to shared memory."""

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

from clockwork_lab.bench.job import Job, SenderMessage, read_job
from clockwork_lab.bench.records import End, Ends, Rows
from clockwork_lab.bench.sender import LoadConnection, Sender
from clockwork_lab.bench.server import tls_context
from clockwork_lab.bench.wire_grpc import GrpcLoadConnection, PreparedCalls
from clockwork_lab.bench.wire_http import HttpLoadConnection, PreparedRequests

OPEN_S: Final = 10.0
SLICE_NS: Final = 100_000
_PR_SET_TIMERSLACK: Final = 29
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""The number of the system call, for which not every C library has a function."""


def main() -> None:
    """Run the job until it is done, or until standard input is readable or closed."""
    job = read_job(sys.stdin.buffer)
    _raise_limits()
    failed = _set_scheduling(job)
    if failed:
        _send_line(SenderMessage(error=failed))
        return
    sender = _sender(job)
    failed = sender.open(OPEN_S)
    if failed:
        _send_line(SenderMessage(error=failed))
        return
    _send_line(SenderMessage(ready=True))
    start = sys.stdin.buffer.readline()
    if not start:
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    cpu_s = time.process_time()
    sender.run(int(start))
    _send_line(
        SenderMessage(
            over=True, cpu_s=time.process_time() - cpu_s, waited=sender.waited, full=sender.full,
            connections=sender.most_connections, unexpected=sender.unexpected,
            unexpected_bytes=sender.unexpected_bytes,
        )
    )  # fmt: skip


def _sender(job: Job) -> Sender:
    def announce(code: int, end: End) -> None:
        _send_line(SenderMessage(code=code, kind=end.kind, reason=end.reason))

    grpc = job.protocol == "grpc"
    wire: type[LoadConnection] = GrpcLoadConnection if grpc else HttpLoadConnection
    prepared = PreparedCalls(job.messages, job.bodies) if grpc else PreparedRequests(job.messages, job.bodies)
    rows = Rows(job.rows_fd, job.rows_size)
    tls = tls_context(job.tls_files, http2=grpc) if job.tls else None
    return Sender(job, rows, Ends(announce), wire=wire, prepared=prepared, tls=tls, stop_fd=0)


def _raise_limits() -> None:
    """Raise the limit of sockets to its maximum; set the timer slack to 1 ns (Linux defaults to 50 us)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _set_scheduling(job: Job) -> str:
    """Apply the core and the priority of the job; the error text if that is not permitted."""
    try:
        if job.core is not None:
            os.sched_setaffinity(0, {job.core})
        if job.realtime:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError as error:
        return f"no permission for core {job.core} or real-time priority ({error.strerror})"
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None and not job.realtime:
        # Of tasks that wake together, Linux 6.12 and later run the one with the shortest slice first.
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        wanted = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, wanted, 0)
    return ""


def _send_line(message: SenderMessage) -> None:
    os.write(1, msgspec.json.encode(message) + b"\n")


if __name__ == "__main__":
    main()
