"""Tells whether the server can serve, when that changed."""

from __future__ import annotations

from clockwork_serve.controller.belief import Belief
from clockwork_serve.messages import Readiness


class Teller:
    """See the module."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self.may_change = True
        """Something happened that readiness depends on."""
        self._was_ready = False
        self._told: Readiness | None = None

    def take_over(self) -> None:
        """Another controller was there before: it, too, was ready once."""
        self._was_ready = True

    def tell(self, *, draining: bool) -> None:
        """Look again; once it was ready, one warm device is enough."""
        self.may_change = False
        devices = self._belief.devices.values()
        # Long before anybody knows whether its worker hung.
        still = [device.name for device in devices if device.warm and not device.look.serves]
        warm = sum(device.warm for device in devices) - len(still)
        wanted = 1 if self._was_ready else self._belief.config.expected_devices
        if draining:
            readiness = Readiness(ready=False, why="draining")
        elif warm >= wanted:
            readiness, self._was_ready = Readiness(ready=True), True
        else:
            pending = sum(len(device.pending_codes) for device in devices)
            why = f"{warm} of {wanted} devices are warm"
            if pending:
                why = f"{why}; {pending} codes are being prepared"
            late = [f"{name} does not answer" for name in still]
            hung = [f"{one.name} hung: {one.why}" for one in self._belief.hung.values()]
            readiness = Readiness(ready=False, why="; ".join([why, *late, *hung]))
        if self._told is None or readiness.ready != self._told.ready:
            self._told = readiness
            self._belief.effects.append(readiness)
