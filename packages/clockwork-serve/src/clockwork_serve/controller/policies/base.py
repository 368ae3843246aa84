"""What a scheduling policy is: it is called for every change, and once per instant it may send actions.

A policy reads ``Belief`` and changes it only by ``send_infer``, ``send_load``, ``send_unload`` and
``require``. It answers no requests; those it does not send stay queued, and are answered at their deadlines
(unless it sets ``belief.keeps_deadlines``: then it answers each by ``belief.answer`` when it expires).

What it reads:

- ``device.agenda``: its own heap of that device's strategies, flags and timers (``cluster.Agenda``). What
  waits is to stay in it, by its latest start: ``Candidates`` sees there how long a lane is busy
- ``queue.band_ns``: lower for a more urgent class, which users are promised to go first
- ``queue.strategies``: one per device that has the queue's weights ready; ``strategy.batches`` are the ways
  to run the queue there, ascending, ``batch.samples.estimate_ns`` how long each takes
- ``queue.dues``: the due times of its waiting requests, ascending; ``queue.waiters`` the requests
- ``device.exec``, ``device.load``: ``available_ns(now_ns)`` is when an action sent now could start
- ``lane.network_ns``: the delay to the worker, measured on the exec lane alone. A lane has to be topped up so
  long before it is free, or longer: ``paper`` does it ``look_ahead_ms`` before, which is to be more than any
  delay, ``default`` by this delay. One that looks ahead less never sends, and has its timer set 1 ns ahead
  again and again
- ``model.residencies``: devices that have, or are loading, its weights; ``Candidates``: models that need a
  LOAD
- ``belief.timers``: where it sets ``device.agenda``'s timers, or a ``Timer`` that it has made, to be called
  again if nothing happens
- ``belief.dirty_models``: models whose demand or residencies changed since the policy last cleared it

``belief.require(queue, size)`` tells admission alone that the policy runs the queue at that batch size
(``BatchChoice.size``) or above from now on, so that it rejects what only a smaller one could save.

Promises (``decide_ms``) are made only if the policy sets ``belief.keeps_promises``. It then sends nothing
that makes ``plans.missed`` more than before; ``default._kept`` is how.

A policy is any class with these methods. Another package brings one by an entry point of the group
``clockwork_serve.policies``. It need not be a subclass of ours, and cannot where those are compiled by mypyc:
a compiled class has no interpreted subclasses. For the same reason this module is not compiled: of a compiled
protocol only compiled classes could be instances.

A controller can be forked and saved only if its policy is a ``record.Record``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import (
    DeviceBelief,
    LaneTimer,
    Queue,
    Residency,
)


@runtime_checkable
class Scheduler(Protocol):
    """One policy. Calls between two ``schedule`` calls may come in any order and number."""

    def queued(self, queue: Queue) -> None:
        """A request joined this queue."""

    def loaded(self, residency: Residency) -> None:
        """Weights became ready: there is a strategy now for each queue of the model."""

    def exec_changed(self, device: DeviceBelief) -> None:
        """An INFER ended: the exec lane's belief changed, and weights are less in use."""

    def load_changed(self, device: DeviceBelief) -> None:
        """A LOAD or UNLOAD ended."""

    def device_changed(self, device: DeviceBelief) -> None:
        """A device was added, or a code became ready there."""

    def device_lost(self, device: DeviceBelief) -> None:
        """A device was removed (``device.up`` is false), and its weights and actions with it."""

    def schedule(self, now_ns: int) -> None:
        """Send every action that is due now; a second call at the same instant sends nothing."""

    def fired(self, timer: LaneTimer) -> None:
        """A timer of the policy fired (``agenda.exec_timer`` or ``agenda.load_timer``)."""

    def check(self) -> None:
        """Assert the policy's invariants."""


SchedulerFactory = Callable[[Belief], Scheduler]
