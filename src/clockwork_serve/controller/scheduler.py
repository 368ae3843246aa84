"""What a scheduling policy is: it is told what changed, and once per instant it may send actions.

A policy reads ``Belief`` and changes it only by ``send_infer``, ``send_load`` and ``send_unload``. It never
answers requests: that it leaves them waiting is how it passes them over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Residency
from clockwork_serve.controller.queues import Queue, ServedModel


class Scheduler(Protocol):
    """One policy. Calls between two ``schedule`` calls may come in any order and number."""

    def queued(self, queue: Queue) -> None:
        """A request joined this queue."""

    def left(self, model: ServedModel) -> None:
        """Requests of this model left without being sent (rejected, expired, cancelled)."""

    def loaded(self, residency: Residency) -> None:
        """Weights became ready."""

    def device_changed(self, device: DeviceBelief) -> None:
        """A device came, a lane's belief changed, or a code became ready there."""

    def device_lost(self, device: DeviceBelief) -> None:
        """A device is gone; its weights and actions are forgotten already."""

    def schedule(self, now_ns: int) -> None:
        """Send every action that is due now; doing so again at once would send nothing."""

    def next_wakeup_ns(self) -> int | None:
        """When ``schedule`` wants to run next if nothing changes."""

    def check(self) -> None:
        """Assert the policy's invariants."""


SchedulerFactory = Callable[[Belief], Scheduler]
