"""Lanes: when each will be free, and the queues whose heads are feasible on it."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS, Timer
from clockwork_serve.units import NS_PER_MS

if TYPE_CHECKING:
    from clockwork_serve.controller.cluster import Queue

STALE_MIN: Final = 64
"""Stale entries of a heap are dropped when it has this many more than twice those kept the last time."""

PAUSE_NS: Final = NS_PER_MS
"""A shorter time without work does not end a busy period of a lane."""


class LaneBelief(Record):
    """Predicts when a lane will be free. Actions on it run one after another, in the order sent."""

    __slots__ = (
        "behind_ns", "busy_since_ns", "dirty", "free_ns", "head_end_ns", "network_ns",
        "outstanding", "stalled", "watch",
    )  # fmt: skip

    def __init__(self, network_ns: int) -> None:
        self.network_ns = network_ns
        """Delay of a message to the worker; corrected by measurements if the policy measures."""
        self.outstanding: list[tuple[int, int]] = []
        """(action id, expected duration) of all actions sent and not ended; the first one runs."""
        self.head_end_ns = NEVER_NS
        """When the running action is expected to end; NEVER_NS without one."""
        self.behind_ns = 0
        """Sum of the expected durations of the others."""
        self.free_ns = 0
        """When all are expected to have ended; if there is none, when the last one ended."""
        self.busy_since_ns = 0
        """When its current busy period began."""
        self.stalled = False
        """The running action is so late that its end cannot be predicted; see ``hangs.Stalls``."""
        self.dirty = False
        """It was given work since ``feasibility`` last checked it; see ``Belief.dirty_lanes``."""
        self.watch: Watch | None = None
        """The watch of ``feasibility``; None where rejection is off."""

    @property
    def head_id(self) -> int:
        """The id of the running action."""
        return self.outstanding[0][0]

    @property
    def head_lasts_ns(self) -> int:
        """The expected duration of the running action."""
        return self.outstanding[0][1]

    def available_ns(self, now_ns: int) -> int:
        """When an action sent now could start; a running action that is late is assumed to end now."""
        free_ns = self.free_ns if now_ns <= self.head_end_ns else now_ns + self.behind_ns
        soonest_ns = now_ns + self.network_ns
        return max(soonest_ns, free_ns)

    def busy(self, now_ns: int) -> bool:
        """Whether an action sent now would have to wait for others."""
        return self.available_ns(now_ns) > now_ns + self.network_ns

    def overdue_ns(self, now_ns: int) -> int:
        """By how much the running action has exceeded its estimate; negative if it has not, or none runs."""
        return now_ns - self.head_end_ns

    def send(self, action_id: int, expected_ns: int, now_ns: int) -> None:
        """Add an action that is sent."""
        if self.outstanding:
            self.behind_ns += expected_ns
            self.free_ns += expected_ns
        else:
            if now_ns - self.free_ns >= PAUSE_NS:
                self.busy_since_ns = now_ns
            soonest_ns = now_ns + self.network_ns
            begin_ns = max(soonest_ns, self.free_ns)
            self.free_ns = self.head_end_ns = begin_ns + expected_ns
        self.outstanding.append((action_id, expected_ns))

    def end(self, action_id: int, ended_ns: int) -> None:
        """Remove an action that ended, or was refused, at ``ended_ns``."""
        outstanding = self.outstanding
        if outstanding and outstanding[0][0] == action_id:
            ended = outstanding.pop(0)
            self.stalled = False
            if outstanding:
                head_ns = outstanding[0][1]
                self.head_end_ns = ended_ns + head_ns
                self.behind_ns -= head_ns
                self.free_ns = self.head_end_ns + self.behind_ns
            else:
                begin_ns = self.head_end_ns - ended[1]
                self.free_ns = max(begin_ns, ended_ns)
                self.head_end_ns = NEVER_NS
            return
        for at, (other_id, expected_ns) in enumerate(outstanding):
            if other_id == action_id:
                del outstanding[at]
                self.behind_ns -= expected_ns
                self.free_ns -= expected_ns
                return
        raise AssertionError(f"action {action_id} is not on this lane")

    def check(self) -> None:
        """Assert the invariants."""
        expected = [expected_ns for _, expected_ns in self.outstanding]
        assert self.behind_ns == sum(expected[1:])
        assert (self.head_end_ns == NEVER_NS) == (not expected)
        assert not expected or self.free_ns == self.head_end_ns + self.behind_ns


class Watch(Timer):
    """The queues whose heads are feasible on this lane; the timer fires before the first becomes infeasible.

    A queue has at most one live entry over all lanes. Its key is a lower bound of the head's latest start.
    """

    __slots__ = ("behind_ns", "first_ns", "full", "heap", "lane")

    def __init__(self, lane: LaneBelief, order: int) -> None:
        super().__init__(order)
        self.lane = lane
        self.heap: list[tuple[int, int, Queue]] = []
        """(latest start, queue order, queue); stale unless the queue's ``watch`` and ``place_ns`` say so."""
        self.first_ns = NEVER_NS
        """The first key: if the lane is not free by then, a head has become infeasible here."""
        self.behind_ns = 0
        """The timer is early enough while no more work than this waits behind the running action."""
        self.full = STALE_MIN
        """The number of entries above which stale ones are dropped."""

    def place(self, queue: Queue, latest_ns: int) -> bool:
        """Watch a queue on this lane from now on; true if its entry is the first."""
        queue.watch = self
        queue.place_ns = latest_ns
        heap = self.heap
        heappush(heap, (latest_ns, queue.order, queue))
        if len(heap) > self.full:
            heap[:] = [entry for entry in heap if entry[2].watch is self and entry[2].place_ns == entry[0]]
            heapify(heap)
            self.full = 2 * len(heap) + STALE_MIN
        return latest_ns < self.first_ns

    def surface(self, start_ns: int) -> list[Queue]:
        """Remove and return the queues whose heads cannot start in time on a lane free at ``start_ns``."""
        surfaced: list[Queue] = []
        heap = self.heap
        while heap:
            latest_ns, _, queue = heap[0]
            if queue.watch is self and queue.place_ns == latest_ns:
                if queue.dues and latest_ns >= start_ns:
                    break
                queue.watch = None
                if queue.dues:
                    surfaced.append(queue)
            heappop(heap)
        return surfaced

    def clear(self) -> list[Queue]:
        """Remove and return all queues: the lane's device is lost."""
        found = []
        for latest_ns, _, queue in self.heap:
            if queue.watch is self and queue.place_ns == latest_ns:
                queue.watch = None
                found.append(queue)
        self.heap.clear()
        self.first_ns = NEVER_NS
        return found
