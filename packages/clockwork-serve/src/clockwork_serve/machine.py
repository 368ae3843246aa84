"""The interface of a brain: a state machine that observes events, decides effects and asks for wake-ups.

A brain has no I/O, clock or randomness. A driver (``serve`` in real time, ``sim`` in virtual time) feeds it
events and performs its effects:

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
    """The interface between brains and drivers; all instants are ns on the controller's clock."""

    def observe(self, event: Event, now_ns: int) -> None:
        """Note an event; ``now_ns`` never decreases. Choices and effects follow in ``decide``."""

    def decide(self, now_ns: int) -> list[Effect]:
        """Make every decision that is due; a second call at the same instant returns no effects."""

    def next_wakeup_ns(self) -> int | None:
        """When ``decide`` is to be called next if no event arrives; later than its last call. None: never."""

    def check(self) -> None:
        """Assert every invariant of the state; for tests and simulations (slow)."""
