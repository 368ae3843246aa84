"""The models in quarantine, or that no device can run, as other processes know them from the controller."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from clockwork_serve.messages import Quarantined, Unservable
from clockwork_serve.units import NS_PER_S


class Quarantines:
    """The models that are served and cannot run, by key: in quarantine, or ``unservable`` on any device."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._by_key: dict[str, Quarantined] = {}
        self.unservable: dict[str, Unservable] = {}

    def __bool__(self) -> bool:
        """Whether any model cannot run."""
        return bool(self._by_key or self.unservable)

    def __contains__(self, key: str) -> bool:
        """Whether the model of that key cannot run."""
        return key in self._by_key or key in self.unservable

    def update(self, frame: Quarantined | Unservable) -> None:
        """Apply a frame of the controller: a model cannot run, or, without a ``why``, it can again."""
        known: dict[str, Any] = self._by_key if isinstance(frame, Quarantined) else self.unservable
        if frame.why:
            known[frame.model] = frame
        else:
            known.pop(frame.model, None)

    def frames(self) -> list[Quarantined | Unservable]:
        """Frames for all models that cannot run, for a process that has just connected."""
        return [*self._by_key.values(), *self.unservable.values()]

    @property
    def codes(self) -> set[str]:
        """The ids of codes that are not to be prepared."""
        return {frame.code_id for frame in self._by_key.values() if frame.code_id}

    def why(self, key: str) -> str:
        """Why a model cannot run, with when it was put into quarantine (UTC, by this host's clock), or ""."""
        frame = self._by_key.get(key)
        if frame is None:
            unservable = self.unservable.get(key)
            return "" if unservable is None else unservable.why
        since_s = time.time() - (self._clock() - frame.since_ns) / NS_PER_S
        return f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime(since_s))}: {frame.why}"

    def reasons(self) -> dict[str, str]:
        """:meth:`why` for each model that cannot run, by key."""
        return {key: self.why(key) for key in self._by_key | self.unservable}
