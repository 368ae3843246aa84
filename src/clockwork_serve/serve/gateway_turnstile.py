"""Lets as many requests be on their way to the controller as that has announced; it chooses nothing.

Whatever else waits on the way would be heard late, and all that follows it too: past what the controller can
hear, it would hear of nothing but requests whose time is up. So the rest waits here, where refusing it costs
the controller nothing, and the newest goes first: where not all can be heard, those are that have time left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from msgspec import structs

from clockwork_serve.messages import Frame, Intake, Request

SWEEP_NS: Final = 2_000_000
"""Who has waited for too long is looked for as often as that."""


class Turnstile:
    """For one thread. ``refuse`` gets a request that is not passed on, and for how long it waited, in ns."""

    def __init__(
        self,
        send: Callable[[Frame], None],
        refuse: Callable[[Request, int], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._send = send
        self._refuse = refuse
        self._clock = clock
        self._rule = Intake(heard=0, most=0)
        self._unheard = 0  # sent and not heard, since there is a rule
        self._held: dict[str, tuple[Request, int]] = {}  # who waits, and since when; the oldest first

    @property
    def holds(self) -> bool:
        """Whether any request waits here."""
        return bool(self._held)

    def enter(self, request: Request) -> bool:
        """Send a request, now or when it is its turn, or refuse it later; whether any waits here then."""
        rule = self._rule
        if self._unheard < rule.most:
            self._unheard += 1
            self._send(request)
        elif not rule.most:
            self._send(request)
        else:
            held = self._held
            now_ns = self._clock()
            held[request.request_id] = (request, now_ns)
            if len(held) > rule.held:
                oldest, since_ns = held.pop(next(iter(held)))
                self._refuse(oldest, now_ns - since_ns)
        return bool(self._held)

    def take(self, rule: Intake) -> None:
        """What the controller says."""
        self._rule = rule
        self._unheard = max(0, self._unheard - rule.heard)
        held = self._held
        if not held:
            return
        self.sweep()
        while held and (self._unheard < rule.most or not rule.most):
            self._unheard += bool(rule.most)
            self._send(held.popitem()[1][0])

    def take_back(self) -> None:
        """One of those that were sent will not be heard."""
        self.take(structs.replace(self._rule, heard=1))

    def sweep(self) -> None:
        """Refuse who has waited for too long."""
        now_ns, patience = self._clock(), self._rule.patience
        overdue = [
            (request, now_ns - since_ns)
            for request, since_ns in self._held.values()
            if (now_ns - since_ns) * patience > request.deadline_ns - request.arrival_ns
        ]
        for request, _ in overdue:
            del self._held[request.request_id]
        for request, waited_ns in overdue:
            self._refuse(request, waited_ns)

    def withdraw(self, request_id: str) -> bool:
        """Nobody waits for a request any more; whether it was here still, and is gone without a trace."""
        return self._held.pop(request_id, None) is not None

    def reset(self) -> None:
        """The link is gone, and all that was sent."""
        self._held.clear()
        self._unheard = 0
        self._rule = Intake(heard=0, most=0)
