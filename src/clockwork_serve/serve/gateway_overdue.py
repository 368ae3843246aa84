"""Requests that a stuck controller leaves without an answer: found soon after their deadlines; it ends none.

A deadline is the controller's to keep. Only where its answer does not come either is the client told here, 40
to 45 ms after it: less than 50, with the way to the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from clockwork_serve.serve.gateway_endings import Pending
from clockwork_serve.units import NS_PER_MS, NS_PER_S

GRACE_NS: Final = 40 * NS_PER_MS
"""How long after a deadline the controller's answer is waited for."""
LOOK_S, LOOK_LEAST_S = 0.02, 0.005
"""Who waits is looked at so often; where somebody's grace is over sooner, then, but no sooner than that."""
READ_S: Final = 0.001
"""After so long all has been read that was in the link's socket."""


class Overdue:
    """See the module. ``end`` changes no mapping; ``stranded`` looks after its own: whether any is left."""

    def __init__(
        self,
        clock: Callable[[], int],
        open_requests: Callable[[], Mapping[str, Pending]],
        end: Callable[[str, Pending], None],
        stranded: Callable[[], bool],
    ) -> None:
        self._clock, self._open, self._end, self._stranded = clock, open_requests, end, stranded
        self._loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """There is a request."""
        if self.timer is None:
            self.timer = self._loop.call_later(LOOK_S, self._look)

    def close(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()

    def _look(self) -> None:
        self.timer = None
        stranded, pendings = self._stranded(), self._open()
        if not pendings and not stranded:
            return
        late_ns = self._clock() - GRACE_NS
        waiting = [one.deadline_ns for one in pendings.values() if one.inquiry is not None]
        left_s = (min(waiting) - late_ns) / NS_PER_S if waiting else LOOK_S
        if left_s < 0:
            # Who slept till now finds answers in the socket: they are read first.
            self.timer = self._loop.call_later(READ_S, self._end_late, late_ns)
        else:
            self.timer = self._loop.call_later(min(LOOK_S, max(LOOK_LEAST_S, left_s)), self._look)

    def _end_late(self, late_ns: int) -> None:
        for request_id, pending in self._open().items():
            if pending.inquiry is not None and pending.deadline_ns < late_ns:
                self._end(request_id, pending)
        self.timer = self._loop.call_later(LOOK_LEAST_S, self._look)
