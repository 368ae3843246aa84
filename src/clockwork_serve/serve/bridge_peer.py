"""A process on another machine as the bridge has it: two links, and what passes between them.

To the controller it is like any of its kind here. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    FarGateway,
    Frame,
    Machine,
    Model,
    ModelAdded,
    ModelRemoved,
    Refused,
    Role,
)
from clockwork_serve.serve.machine_link import MachineLink
from clockwork_serve.serve.transport import Link, connect, hello

_log = logging.getLogger(__name__)

Judge = Callable[[Machine | FarGateway], Refused | None]


class Peer(ABC):
    """See the module. ``judge`` tells why it may not join; ``on_gone`` is told once it is over."""

    role: ClassVar[Role]

    def __init__(
        self, link: MachineLink, controller: Path, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None],
    ) -> None:  # fmt: skip
        self.link = link
        self.name = link.peer.name
        self.models = models
        self._controller = controller
        self._judge = judge
        self._on_gone = on_gone
        self._inside: Link | None = None
        self._welcome = False  # it may join
        self._early: list[Frame] = []  # what it said before the controller was reached
        self._reaching: asyncio.Task[None] | None = None
        self._over = False

    @property
    def same_process(self) -> tuple[int, str]:
        """What a new link of the same process would say, too."""
        return self.link.peer.pid, self.link.peer.boot_id

    @property
    def inside_name(self) -> str:
        """What the controller knows it by."""
        return self.name

    def close(self, why: str) -> None:
        """End both links."""
        if self._over:
            return
        self._over = True
        _log.info("%s %s at %s is gone: %s", self.role, self.name, self.link.at, why)
        if self._reaching is not None:
            self._reaching.cancel()
        if self._inside is not None:
            self._inside.close()
        self.link.close()
        self._on_gone(self)

    def refuse(self, refused: Refused) -> None:
        """Tell it why it may not join, and end."""
        _log.error("%s %s at %s may not join: %s", self.role, self.name, self.link.at, refused.why)
        self.link.send(refused)
        self.close("refused")

    def on_catalogue(self, frame: ModelAdded | ModelRemoved) -> None:  # noqa: B027 - only some care
        """What is served changes."""

    # From there

    def on_frames(self, frames: list[Frame]) -> None:
        """Take in what it sent; one that sends what it may not is cut off."""
        for frame in frames:
            if self._over:
                return
            try:
                known = self.from_there(frame) if self._welcome else self._first(frame)
            except TransportError as error:
                _log.error("cut off %s %s: %s", self.role, self.name, error)
                self.close("cut off")
                return
            if not known:
                _log.error("cut off %s %s: it sent %r", self.role, self.name, type(frame).__name__)
                self.close("cut off")
                return

    @abstractmethod
    def introduction(self, frame: Frame) -> Machine | FarGateway | None:
        """Its first frame, if that is one."""

    @abstractmethod
    def from_there(self, frame: Frame) -> bool:
        """It sent something; False for what it may not send. Raises :class:`TransportError` for nonsense."""

    @abstractmethod
    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """The controller sent something."""

    def inward(self, frame: Frame) -> None:
        """Have the controller told."""
        if self._inside is None:
            self._early.append(frame)
        else:
            self._inside.send(frame)

    def welcomed(self) -> None:  # noqa: B027 - only some have something to say
        """It may join, and the controller does not know of it yet."""

    def _first(self, frame: Frame) -> bool:
        shown = self.introduction(frame)
        if shown is None:
            return False
        refused = self._judge(shown)
        if refused is not None:
            self.refuse(refused)
            return True
        self._welcome = True
        self.welcomed()
        self._reaching = asyncio.get_running_loop().create_task(self._reach())
        return True

    async def _reach(self) -> None:
        """Connect to the controller as that process."""
        own = hello(self.role, self.inside_name)
        try:
            inside = await connect(self._controller, own, self.from_controller, self._controller_lost)
        except TransportError as error:
            self.close(str(error))
            return
        self._inside = inside
        _log.info("%s %s joins from %s", self.role, self.name, self.link.at)
        early, self._early = self._early, []
        for frame in early:
            inside.send(frame)

    def _controller_lost(self, link: Link) -> None:
        self.close(link.lost_because)
