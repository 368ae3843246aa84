"""``launch.py CORE,... COMMAND ...``: becomes the command, on these cores, and parent of its orphans."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_SET_CHILD_SUBREAPER: Final = 36


def adopt() -> None:
    """Become the parent of orphans among one's descendants."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> None:
    """Never returns."""
    cores, *command = sys.argv[1:]
    os.sched_setaffinity(0, set(map(int, cores.split(","))))
    adopt()
    os.execvp(command[0], command)  # noqa: S606 (a list, no shell)


if __name__ == "__main__":
    main()
