"""A network that has nothing but loopback, for servers that listen on all interfaces."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from typing import Final

_MARK: Final = "PEERS_ISOLATED"
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1


def isolated() -> bool:
    """Whether this process has such a network."""
    return os.environ.get(_MARK) == "1"


def isolate(module: str = "comparison.peers") -> str:
    """Become a process that has one, by starting ``module`` anew. "" in one that has it, else why not."""
    if isolated():
        _loopback_up()
        return ""
    unshare = _unshare()
    if why := _why_not(unshare):
        return why
    os.environ[_MARK] = "1"
    return os.execvp(unshare[0], [*unshare, sys.executable, "-m", module, *sys.argv[1:]])  # noqa: S606


def _unshare() -> list[str]:
    path = shutil.which("unshare")
    if path is None:
        return []
    return [path, "--net"] if os.geteuid() == 0 else [path, "--map-root-user", "--net"]


def _why_not(unshare: list[str]) -> str:
    if not unshare:
        return "no network namespace can be made: there is no program unshare"
    done = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no network namespace can be made: {done.stderr.strip()}"


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(any_socket, _GET_FLAGS, asked), 16)[0]
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
