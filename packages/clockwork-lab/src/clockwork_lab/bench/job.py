"""What a parent tells a sending process, and what it hears from it: records, one message each."""

from __future__ import annotations

from typing import IO

import msgspec
from msgspec import Struct

from clockwork_lab.bench.address import TlsFiles
from clockwork_lab.bench.messages import Message

_LENGTH_BYTES = 8


class Clients(Struct, frozen=True, kw_only=True):
    """Clients of one closed load that ask one model, alike but for when they start.

    ``steps``: from when on which SLO and message hold: (ns of the run, SLO in ns, message). After anything
    but an answer they wait ``retry_ns``, or what the refusal says if ``retry_after``.
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
    tls_files: TlsFiles
    messages: list[Message]
    bodies: list[bytes]
    rows_fd: int
    rows_size: int
    open_rows: int
    clients: tuple[Clients, ...]
    connections: int
    first_connections: int
    reserve: int
    abandon: bool
    end_ns: int
    drain_ns: int
    core: int | None = None
    realtime: bool = False


class Said(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a sender: it is ready, an end has a code from now on, it is over, or it cannot."""

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
    """To a sender's standard input."""
    content = msgspec.msgpack.encode(job)
    file.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
    file.write(content)
    file.flush()


def read_job(file: IO[bytes]) -> Job:
    """From standard input. Raises :class:`EOFError`."""
    head = file.read(_LENGTH_BYTES)
    content = file.read(int.from_bytes(head, "big"))
    if not content:
        raise EOFError
    return msgspec.msgpack.decode(content, type=Job)
