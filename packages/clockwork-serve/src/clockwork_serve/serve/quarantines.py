"""The models in quarantine, as other processes know them from the controller."""

from __future__ import annotations

import time
from collections.abc import Callable

from clockwork_serve.messages import Quarantined
from clockwork_serve.units import NS_PER_S


class Quarantines:
    """The models in quarantine, by key."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._by_key: dict[str, Quarantined] = {}

    def __bool__(self) -> bool:
        """Whether any model is in quarantine."""
        return bool(self._by_key)

    def __contains__(self, key: str) -> bool:
        """Whether the model of that key is in quarantine."""
        return key in self._by_key

    def update(self, frame: Quarantined) -> None:
        """Apply a frame of the controller: a model is in quarantine, or, without a ``why``, was released."""
        if frame.why:
            self._by_key[frame.model] = frame
        else:
            self._by_key.pop(frame.model, None)

    def frames(self) -> list[Quarantined]:
        """Frames for all models in quarantine, for a process that has just connected."""
        return list(self._by_key.values())

    @property
    def codes(self) -> set[str]:
        """The ids of codes that are not to be prepared."""
        return {frame.code_id for frame in self._by_key.values() if frame.code_id}

    def why(self, key: str) -> str:
        """When a model was put into quarantine (UTC, by this host's clock), and why; "" if it is not."""
        frame = self._by_key.get(key)
        if frame is None:
            return ""
        since_s = time.time() - (self._clock() - frame.since_ns) / NS_PER_S
        return f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime(since_s))}: {frame.why}"

    def reasons(self) -> dict[str, str]:
        """:meth:`why` for each model in quarantine, by key."""
        return {key: self.why(key) for key in self._by_key}
