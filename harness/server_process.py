"""The server of one row: ``serve.server.run`` in a process of its own, which may be killed like any other.

It prints one line of JSON when it is ready, and stops at the end of its standard input, when its parent has
ended. Small file systems are mounted in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ClockworkError
from clockwork_serve.serve import child as logs
from clockwork_serve.serve.supervisor.server import Server, ServerConfig, run

_CLONE_NEWNS: Final = 0x20000
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000


class Start(Struct, frozen=True, kw_only=True):
    """``small``: folders by how many bytes there may be in them."""

    server: ServerConfig
    small: dict[str, int] = {}


def mount_small(folders: Mapping[str, int]) -> None:
    """Memory of so many bytes at each folder, for this process and its children. OSError if not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(code: int) -> None:
        if code:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    call(libc.unshare(_CLONE_NEWNS))
    call(libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
    for folder, size in folders.items():
        call(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()))


def may_mount() -> bool:
    """Whether this user may do that; tried in a child."""
    pid = os.fork()
    if not pid:
        try:
            mount_small({})
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _stop_at_end_of_input() -> None:
    while os.read(0, 1 << 12):  # not sys.stdin, whose lock it would hold at the interpreter's end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the server whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    start = msgspec.json.decode(sys.argv[1], type=Start)
    if start.small:
        mount_small(start.small)
    logs.configure("keeper", start.server.settings.log_level)
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()

    def announce(server: Server) -> None:
        facts = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
        sys.stdout.write(json.dumps({**facts, "run_dir": str(server.run_dir)}) + "\n")
        sys.stdout.flush()

    try:
        return run(start.server, on_ready=announce)
    except ClockworkError as error:
        sys.stderr.write(f"cannot start: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
