"""A worker that is up and does not answer: what it had when nothing was planned on it any more."""

from __future__ import annotations

from clockwork_serve.controller.cluster import DeviceBelief, Inherited, Residency, Sent
from clockwork_serve.controller.timers import Timer


class HungWorker(Timer):
    """See the module. It fires when its grace is over: then it is to be ended."""

    __slots__ = ("devices", "ended", "heads", "heard", "inherited", "kept", "name", "sent", "why")

    def __init__(self, name: str, why: str, devices: list[DeviceBelief], order: int) -> None:
        super().__init__(order)
        self.name = name
        self.why = why
        self.devices = devices
        """As they were believed; they come back as others."""
        self.sent: dict[int, Sent] = {}
        """All and only actions in flight there, by id; their requests may be answered or run elsewhere."""
        self.inherited: dict[tuple[str, int], Inherited] = {}
        """All and only actions of another controller that run there, by device and id."""
        self.heads: set[int] = set()
        """INFERs that were first on their lanes: they ran, by belief."""
        self.kept: list[Residency] = []
        """Weights that are or will be there: their states go on, and nothing else of them does."""
        self.heard = False
        """It owes nothing any more: it may come back."""
        self.ended = False
        """It is to be ended, and will not come back."""

    def device(self, name: str) -> DeviceBelief | None:
        """Its device of that name."""
        for device in self.devices:
            if device.name == name:
                return device
        return None
