"""Calls of gRPC whose client is to speak, and for how long it has said nothing. It ends none by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Speaker = TypeVar("Speaker", bound=Hashable)


class Silence(Generic[Speaker]):
    """For the loop's thread; :meth:`begin` is for any. ``limit_s``: silence that is too long."""

    def __init__(self, limit_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._since_s: dict[Speaker, float] = {}

    def __len__(self) -> int:
        return len(self._since_s)

    def begin(self, speaker: Speaker) -> None:
        """It is its turn."""
        self._since_s[speaker] = self._clock()

    def renew(self, speaker: Speaker) -> None:
        """It was answered, and may think that over."""
        if speaker in self._since_s:
            self.begin(speaker)

    def end(self, speaker: Speaker) -> None:
        """It spoke, or is gone."""
        self._since_s.pop(speaker, None)

    def overdue(self) -> list[Speaker]:
        """Who was silent for too long."""
        limit_s = self._clock() - self.limit_s
        # A list at once, for another thread may add to it meanwhile.
        return [speaker for speaker, since_s in list(self._since_s.items()) if since_s < limit_s]
