"""Devices whose exec lanes do not move: the models there are wanted elsewhere before anybody knows why.

A worker hung when an action is late by its patience (``hangs``), which is long: seconds. Until then what
waits for its weights would miss its deadline, though another device could load them. So an exec lane
*stalled* when its running action is late by as long as it was expected to take, and by ``LOOK_NS`` at least,
in two looks. Then the demand for its models counts as served by nobody there (``candidates``), until it is
done.
"""

from __future__ import annotations

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import LOOK_NS, Look


class Stalls:
    """See the module."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief

    def fired(self, look: Look, now_ns: int) -> None:
        """Look at a device that was given work."""
        lane = look.device.exec
        if not lane:
            return
        self._belief.timers.set(look, now_ns + LOOK_NS)
        if lane.stalled or lane.overdue_ns(now_ns) < max(LOOK_NS, lane.head_lasts_ns):
            return
        if look.late_id != lane.head_id:  # the controller itself may have slept till now
            look.late_id = lane.head_id
            return
        lane.stalled = True
        for residency in look.device.pages.holders():
            if residency.model.waiting:
                self._belief.stir(residency.model)
