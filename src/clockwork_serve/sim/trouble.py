"""What is wrong with the link between the controller and a worker. It never puts messages out of order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clockwork_serve.sim.host import Host


class Trouble:
    """What is wrong with one link: messages are late by ``delay_ns``, or lost."""

    __slots__ = ("cut", "cut_link", "delay_ns", "dice", "loss")

    def __init__(self, dice: np.random.Generator, cut_link: Callable[[], None]) -> None:
        self.delay_ns = 0
        self.loss = 0.0
        """The share of messages that is lost."""
        self.cut = False
        """One was lost: none arrives any more."""
        self.dice = dice
        self.cut_link = cut_link

    def arrival_ns(self, when_ns: int) -> int | None:
        """When a message arrives that would arrive at ``when_ns``; None: never."""
        if not self.cut and self.loss and self.dice.random() < self.loss:
            self.cut = True
            self.cut_link()
        return None if self.cut else when_ns + self.delay_ns


def is_cut(host: Host) -> bool:
    """Whether nothing arrives on its link any more."""
    return isinstance(host.trouble, Trouble) and host.trouble.cut
