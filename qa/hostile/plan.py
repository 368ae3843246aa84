"""What an attack sends, as plain data. It opens no socket."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Final

RESET: Final = "reset"
BOMB_BYTES: Final = 80 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """``pieces`` with ``pause_s`` between them, then up to ``hold_s`` for what comes, then the ``end``.

    ``end``: "close"; "reset"; "half" (only our side, then read); "unread" (closed without a look).
    """

    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    hold_s: float = 0.1
    end: str = "close"


@cache
def fit(name: str) -> bytes:
    """What takes long to make, made once: bombs that become larger than any limit."""
    if name == "gzip_bomb":
        return gzip.compress(bytes(BOMB_BYTES), 9)
    if name == "deflate_bomb":
        return zlib.compress(bytes(BOMB_BYTES), 9)
    raise KeyError(name)
