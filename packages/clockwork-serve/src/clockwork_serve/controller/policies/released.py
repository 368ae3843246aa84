"""The policy of the code that the paper's authors released (INFER5), for comparison.

Differences to ``paper``, for INFERs:

- A strategy is a queue *and a batch size* on one device. Its key, the due time of the first request there
  minus the estimate, is never updated: a new request changes nothing if its queue has strategies.
- When the most urgent strategy is tried, all others of its queue on that device are removed with it. If too
  few requests wait for it, those of smaller batches are added again; if an action is sent, those of all
  batches that a request waits for. So only a queue's most urgent strategy is kept: its key, and its batch in
  ``strategy.count``.
- Each batch size has a queue of its own (``queue.floors``), shared by all devices. A request that would be
  too late at that size, on the device at hand, is removed from it for good. When a batch is sent, the
  requests before it are removed from the queues of all sizes, and wait until they expire.
- Devices are served in turn, one action each.

Where requests of one model have different SLOs, earliest deadline comes first; in the released code it is
first come, first served.

It is a subclass of ``PaperScheduler`` and sends the same LOADs; so it is compiled with it and is here, not in
the laboratory that compares policies. There it would have to repeat those LOADs, and its other differences
are in the brain anyway (``config.released``: internal deadlines, floors of queues, rejection).
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop
from typing import Final

from clockwork_serve.controller.cluster import Agenda, Queue, Strategy
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.policies.paper import Fit, PaperScheduler
from clockwork_serve.controller.timers import NEVER_NS

ANY: Final = 1 << 30
"""More requests than any batch has."""


class ReleasedScheduler(PaperScheduler):
    """The released code's policy; see the module for the differences to its base class."""

    _turn = 0

    def queued(self, queue: Queue) -> None:
        """A request was queued: add strategies where its queue has none."""
        if len(queue.dues) == 1:
            queue.floors.clear()
        for strategy in queue.strategies:
            self._enqueue(strategy)
            self._mark_exec_dirty(strategy.agenda)

    def _enqueue(self, strategy: Strategy) -> None:
        if strategy.key_ns == NEVER_NS:
            self._add(strategy, ANY)

    def _add(self, strategy: Strategy, below: int) -> None:
        """Add the most urgent of a queue's strategies whose batches are below ``below`` requests."""
        dues, floors = strategy.queue.dues, strategy.queue.floors
        urgent_ns = NEVER_NS
        for batch in strategy.batches:
            if batch.count >= below:
                break
            first = bisect_left(dues, floors.get(batch.count, 0))
            if first < len(dues) and dues[first] - batch.samples.estimate_ns < urgent_ns:
                urgent_ns = dues[first] - batch.samples.estimate_ns
                strategy.count = batch.count
        if urgent_ns != NEVER_NS:
            strategy.agenda.push(strategy, urgent_ns)

    def schedule(self, now_ns: int) -> None:
        """Top up the lanes of every device that changed, in turns."""
        changed = self._changed
        if changed:
            self._turn += 1
            at = self._turn % len(changed)
            agendas, self._changed = changed[at:] + changed[:at], []
            for agenda in agendas:
                agenda.changed = False
            while agendas:
                agendas = [agenda for agenda in agendas if self._send_one(agenda, now_ns)]
        super().schedule(now_ns)

    def _send_one(self, agenda: Agenda, now_ns: int) -> bool:
        """Send an INFER to a device if its lane has room; true if one was sent."""
        lane, heap = agenda.device.exec, agenda.heap
        start_ns = lane.available_ns(now_ns)
        late_ns = now_ns - lane.head_end_ns
        full = start_ns >= now_ns + self._look_ahead_ns or (
            late_ns > self._lag_ns and len(lane.outstanding) > 1
        )
        while agenda.top() is not None:
            if full:
                agenda.exec_full = True
                if late_ns <= 0:  # else its next result says when there is room again
                    self._timers.set(agenda.exec_timer, start_ns - self._look_ahead_ns + 1)
                return False
            strategy = heappop(heap)[2]
            strategy.key_ns = NEVER_NS
            fit = self._choose(strategy, start_ns)
            if fit is not None:
                self._send(strategy, fit, start_ns, now_ns)
                return True
            self._add(strategy, strategy.count)
        return False

    def _send(self, strategy: Strategy, fit: Fit, start_ns: int, now_ns: int) -> None:
        """Send a batch; the requests before it are given up at all sizes."""
        queue = strategy.queue
        batch, first, _ = fit
        if first:
            gone_ns = queue.dues[first - 1] + 1
            for count, _ in queue.sizes:
                if queue.floors.get(count, 0) < gone_ns:
                    queue.floors[count] = gone_ns
        self._belief.send_infer(strategy, batch, first, start_ns, now_ns)
        self._add(strategy, ANY)

    def _choose(self, strategy: Strategy, start_ns: int) -> Fit | None:
        """The largest batch that can be filled, trying sizes upwards; None if it is below the strategy's."""
        dues, floors = strategy.queue.dues, strategy.queue.floors
        chosen: BatchChoice | None = None
        place = 0
        filled = True
        for batch in strategy.batches:
            first = bisect_left(dues, start_ns + batch.samples.estimate_ns)
            if first and floors.get(batch.count, 0) <= dues[first - 1]:
                floors[batch.count] = dues[first - 1] + 1
            first = bisect_left(dues, floors.get(batch.count, 0))
            filled = filled and len(dues) - first >= batch.count
            if filled:
                chosen, place = batch, first
        if chosen is None or chosen.count < strategy.count:
            return None
        return chosen, place, dues[place] - chosen.samples.estimate_ns
