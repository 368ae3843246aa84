"""Requests whose controller died: those that the next one can still answer wait here for it; others do not.

Each is asked twice at most, so that one that kills controllers does not go on to do so. Its tensors are
copied to memory that no worker knows of, for what the dead one sent may still write to the old. The second
time it has another id: where the link alone was lost, the controller may still know the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import structs

from clockwork_serve.serve.gateway_endings import Pending
from clockwork_serve.serve.gateway_slots import Slots
from clockwork_serve.units import NS_PER_MS, NS_PER_S

LEAST_NS: Final = 100 * NS_PER_MS
"""No controller is back sooner: what is due before that hears at once that it cannot be answered."""
PATIENCE_NS: Final = 3 * NS_PER_S
"""If none is back then, it will take long, and a client may rather ask another server."""

AGAIN: Final = "-2"
"""Added to the id of a request that is asked again."""

Pendings = dict[str, Pending]


class Stranded:
    """By id, in the order in which they came. It tells no client anything."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._waiting: Pendings = {}
        self._until_ns = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, pendings: Pendings, slots: Slots) -> Pendings:
        """A controller died before it answered these: keep some of them; return the others, to be ended."""
        now_ns = self._clock()
        self._until_ns = now_ns + PATIENCE_NS
        waiting = self._waiting | {
            request_id: pending
            for request_id, pending in pendings.items()
            if pending.inquiry is not None
            and not pending.asked_again
            and pending.deadline_ns - now_ns >= LEAST_NS
        }
        moved = slots.renew([pending.slot for pending in waiting.values()])
        self._waiting = {}
        for (request_id, pending), slot in zip(waiting.items(), moved, strict=True):
            if slot is not None:
                pending.slot = slot
                self._waiting[request_id] = pending
        together = waiting | pendings
        return {one: pending for one, pending in together.items() if one not in self._waiting}

    def release(self) -> Pendings:
        """There is a controller that can be asked: all, to be sent to it, by the ids that they have there."""
        released, self._waiting = self._waiting, {}
        for request_id, pending in released.items():
            pending.asked_again = True
            pending.request = structs.replace(pending.request, request_id=request_id + AGAIN)
        return {request_id + AGAIN: pending for request_id, pending in released.items()}

    def overdue(self) -> Pendings:
        """Those that have waited for as long as they can, which do so no more."""
        now_ns = self._clock()
        if now_ns >= self._until_ns:
            found, self._waiting = self._waiting, {}
            return found
        found = {one: pending for one, pending in self._waiting.items() if pending.deadline_ns <= now_ns}
        for one in found:
            del self._waiting[one]
        return found

    def withdraw(self, request_id: str) -> Pending | None:
        """Its client went away."""
        return self._waiting.pop(request_id, None)
