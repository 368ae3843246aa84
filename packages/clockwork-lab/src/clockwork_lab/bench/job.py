"""The messages between the parent and a sending process, as records."""

from __future__ import annotations

from typing import IO

import msgspec
from msgspec import Struct

from clockwork_lab.bench.messages import Message
from clockwork_lab.bench.server import ClientTlsFiles

_LENGTH_BYTES = 8


class ClosedClients(Struct, frozen=True, kw_only=True):
    """Clients of one closed load that send to one model, alike except for their start.

    ``steps``: changes of SLO and message over the run: (from ns, SLO in ns, message). After anything but a
    successful response they wait ``retry_ns``, or the server's retry advice if ``retry_after``.
    """

    load: int
    model: int
    starts_ns: tuple[int, ...]
    stop_ns: int
    steps: tuple[tuple[int, int, int], ...]
    retry_after: bool
    retry_ns: int


class Job(Struct, frozen=True, kw_only=True):
    """All that one process does. Rows are in the file ``rows_fd``; the first ``open_rows`` are filled in."""

    protocol: str
    host: str
    ip: str
    port: int
    tls: bool
    tls_files: ClientTlsFiles
    messages: list[Message]
    bodies: list[bytes]
    rows_fd: int
    rows_size: int
    open_rows: int
    clients: tuple[ClosedClients, ...]
    connections: int
    first_connections: int
    reserve: int
    abandon: bool
    end_ns: int
    drain_ns: int
    core: int | None = None
    realtime: bool = False


class SenderMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a sender: ``ready``, a new ``code`` of an end, ``over`` with totals, or an ``error``."""

    ready: bool = False
    code: int = 0
    kind: int = 0
    reason: str = ""
    over: bool = False
    cpu_s: float = 0.0
    waited: int = 0
    connections: int = 0
    unexpected: int = 0
    unexpected_bytes: int = 0
    full: bool = False
    error: str = ""


def write_job(file: IO[bytes], job: Job) -> None:
    """Write a job to a sender's standard input."""
    content = msgspec.msgpack.encode(job)
    file.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
    file.write(content)
    file.flush()


def read_job(file: IO[bytes]) -> Job:
    """Read the job from standard input. Raises :class:`EOFError`."""
    content = file.read(int.from_bytes(file.read(_LENGTH_BYTES), "big"))
    if not content:
        raise EOFError
    return msgspec.msgpack.decode(content, type=Job)
