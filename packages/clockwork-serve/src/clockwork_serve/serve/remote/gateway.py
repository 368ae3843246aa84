"""A remote gateway's link to the controller, by way of the bridge."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from random import Random
from typing import Final

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.config.table import split_address
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import FarGateway, Frame, Refused, Role
from clockwork_serve.serve.remote.config import ClusterContext, cluster_files
from clockwork_serve.serve.remote.link import MachineLink, connect_machine
from clockwork_serve.serve.transport import RETRY_S, Link, hello

RETRY_S_MAX: Final = 1.0
"""The longest pause between attempts to connect; a link that lasted this long resets the pause."""

_log = logging.getLogger(__name__)

OnFrames = Callable[[list[Frame]], None]
OnLost = Callable[[str], None]


class FarConnector:
    """Connects to the controller on another machine, with a growing pause while links are lost at once.

    ``refused`` ends with a :class:`ConfigError` if the server refuses this gateway for good. ``on_host`` gets
    the address of this machine on the way there, before any frame is received.
    """

    def __init__(
        self, name: str, settings: Settings, on_host: Callable[[str], None] = lambda host: None
    ) -> None:
        """Raises :class:`ConfigError` naming the setting of a file that cannot be used."""
        self._on_host = on_host
        self._name = name
        self._settings = settings
        self._context = ClusterContext(cluster_files(settings), server=False)
        self._loop = asyncio.get_running_loop()
        self.refused: asyncio.Future[None] = self._loop.create_future()
        self._dice = Random()
        self._linked_s = -math.inf  # when the last link was opened
        self._pause_s = 0.0
        self._told = ""

    async def __call__(self, on_frames: OnFrames, on_lost: OnLost) -> FarController:
        """As :data:`~clockwork_serve.serve.gateway.controller_link.Connector`."""
        lasted_s = self._loop.time() - self._linked_s
        self._linked_s = math.inf
        well = lasted_s >= RETRY_S_MAX
        self._pause_s = 0.0 if well else min(RETRY_S_MAX, 2 * self._pause_s or RETRY_S)
        await asyncio.sleep(self._pause_s * self._dice.uniform(0.5, 1.0))
        try:
            found = await self._connect(on_frames, on_lost)
        except TransportError as error:
            if str(error) != self._told:
                self._told = str(error)
                _log.warning("no controller yet: %s", error)
            raise
        self._told, self._linked_s = "", self._loop.time()
        return found

    async def _connect(self, on_frames: OnFrames, on_lost: OnLost) -> FarController:
        controller = FarController(on_frames, on_lost)
        link = await connect_machine(
            split_address(self._settings.controller), self._context.now(), hello(Role.GATEWAY, self._name),
            controller.on_frames, controller.on_link_lost, self._settings.silence_s,
        )  # fmt: skip
        link.send(FarGateway(gateway=self._name, version=__version__))
        try:
            self._on_host(link.host)
            refused = await controller.begin(link)
        except BaseException:
            link.close()
            raise
        if refused is None:
            return controller
        link.close()
        if refused.final and not self.refused.done():
            self.refused.set_exception(ConfigError(f"the server does not take {self._name}: {refused.why}"))
        raise TransportError(f"the server does not take this gateway: {refused.why}")


class FarController:
    """A link to the controller over the network. All methods are for the loop's own thread."""

    def __init__(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._link: MachineLink | None = None  # from begin()
        self._verdict: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()

    async def begin(self, link: MachineLink) -> Refused | None:
        """Use this link, and wait until the server has admitted this gateway; returns its refusal, or None.

        Raises :class:`TransportError` if the link is lost before.
        """
        self._link = link
        if not link.is_open and not self._verdict.done():
            raise TransportError(link.lost_because)
        return await self._verdict

    @property
    def is_open(self) -> bool:
        """Whether frames can still be sent."""
        return self._link is not None and self._link.is_open

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        if self._link is not None:
            self._link.send(frame)

    def close(self) -> None:
        """Close after the queued frames were sent."""
        if self._link is not None:
            self._link.close()

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """Pass the server's frames on; its first one tells whether it admits this gateway."""
        if not self._verdict.done():
            refused = frames[0] if isinstance(frames[0], Refused) else None
            self._verdict.set_result(refused)
        if self._verdict.exception() is None and self._verdict.result() is None:
            self._on_frames(frames)

    def on_link_lost(self, link: Link) -> None:
        """The link was lost."""
        if not self._verdict.done():
            self._verdict.set_exception(TransportError(link.lost_because))
        elif self._verdict.exception() is None and self._verdict.result() is None:
            self._on_lost(link.lost_because)
