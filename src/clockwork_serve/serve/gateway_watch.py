"""Files that are read again when they change, and keep what they said while a change will not do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from clockwork_serve.errors import ConfigError

REFRESH_S: Final = 2.0
"""How often files are looked at."""

Content = TypeVar("Content")
_log = logging.getLogger(__name__)


class Watched(Generic[Content]):
    """``content`` is what ``read`` last made of the files. Not safe for threads."""

    def __init__(self, paths: Sequence[str], read: Callable[[], Content]) -> None:
        """Raises what ``read`` raises."""
        self._paths = paths
        self._read = read
        self._stamp = self._now()
        self._complained = ""
        self.content = read()

    def refresh(self) -> bool:
        """Whether there is new content. What is wrong with a change is logged, and changes nothing."""
        stamp = self._now()
        if stamp == self._stamp:
            return False
        try:
            self.content = self._read()
        except ConfigError as error:
            if str(error) != self._complained:
                self._complained = str(error)
                _log.error("%s; what it said before stays in force", error)
            return False
        self._stamp = stamp
        self._complained = ""
        return True

    def _now(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
