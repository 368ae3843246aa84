"""Devices whose exec lanes do not move: the models there are wanted elsewhere before anybody knows why.

A worker hung when an action is late by its patience (``hangs``), which is long: seconds. Until then what
waits for its weights would miss its deadline, though another device could load them. So an exec lane
*stalled* when its running action is late by as long as it was expected to take, and by ``LOOK_NS`` at least,
in two looks. Then the demand for its models counts as served by nobody there (``candidates``), until it is
done. One that does not move for ``STILL_NS`` serves nobody, and where none else is, the server is not ready.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import LOOK_NS, Look
from clockwork_serve.controller.readiness import Teller
from clockwork_serve.units import ms

STILL_NS: Final = ms(1500)
"""And as long as the action was expected to take: where models are slow, late is later."""


class Stalls:
    """See the module."""

    def __init__(self, belief: Belief, readiness: Teller) -> None:
        self._belief = belief
        self._readiness = readiness

    def fired(self, look: Look, now_ns: int) -> None:
        """Look at a device that was given work."""
        lane = look.device.exec
        late = bool(lane) and lane.stalled
        still = late and lane.overdue_ns(now_ns) >= max(STILL_NS, lane.head_lasts_ns)
        if still != look.still:
            look.still = still
            self._readiness.may_change = True
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
