"""A model whose input can end its worker."""

from __future__ import annotations

from harness.repositories import echoing

KILLER = echoing(
    "import ctypes, os, time",
    """
    if mood > 600.0:
        time.sleep(0.3)  # in which the other model's LOAD ends, so that nothing else could be to blame
    if mood == 666.0:
        ctypes.string_at(0)  # as a crash in native code
    if mood == 667.0:
        os._exit(3)
    """,
)
