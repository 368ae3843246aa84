"""What a brain is: a machine that believes events, decides effects and asks for time.

A machine does no I/O, reads no clock and rolls no dice. A driver (``serve`` in real time, ``sim`` in
virtual time) feeds it and performs what it decides:

    for event in events_of_one_instant:
        machine.observe(event, now_ns)
    for effect in machine.decide(now_ns):
        perform(effect)
    wake_me_at(machine.next_wakeup_ns())
"""

from __future__ import annotations

from typing import Protocol, TypeVar

Event = TypeVar("Event", contravariant=True)
Effect = TypeVar("Effect")


class Machine(Protocol[Event, Effect]):
    """The one interface between brains and drivers; all times are ns on the controller's axis."""

    def observe(self, event: Event, now_ns: int) -> None:
        """Change belief by one event; ``now_ns`` never goes back. Decides nothing."""

    def decide(self, now_ns: int) -> list[Effect]:
        """Make every choice that is due; a second call at the same instant returns nothing."""

    def next_wakeup_ns(self) -> int | None:
        """When ``decide`` wants to run next if no event comes; later than the last ``decide``."""

    def check(self) -> None:
        """Assert every invariant of the state; for tests and simulations (slow)."""
