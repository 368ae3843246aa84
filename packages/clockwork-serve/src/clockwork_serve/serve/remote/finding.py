"""Finding who leads: how workers and gateways of this machine reach one of the server's controllers."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from random import Random
from typing import Final, NamedTuple

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.config.values import split_addresses
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import FarGateway, Frame, Hello, Refused, Role
from clockwork_serve.serve.remote.config import ClusterContext, cluster_files
from clockwork_serve.serve.remote.link import MachineLink, connect_machine
from clockwork_serve.serve.transport import RETRY_S, Link, OnFrames, OnLost, hello

RETRY_S_MAX: Final = 1.0
"""The longest pause between attempts to connect; a link that lasted this long resets the pause."""
RESOLVE_S: Final = 0.2
"""How long is waited for the first addresses of names: a name server may have died with the leader."""
TAKEOVER_S: Final = 5.0
"""For so long after a link was lost the pause does not grow where there are other controllers."""

_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """One address of a controller."""

    host: str
    port: int


class LeaderFinder:
    """Connects to whichever of ``settings.controller`` leads; who does not turns away who connects.

    All addresses are tried at once, those of a name too, and each again as soon as it has refused. While
    links are lost at once, the pause between attempts grows.
    """

    def __init__(
        self, settings: Settings, own: Hello, on_frames: OnFrames, on_lost: OnLost, fence: Fence
    ) -> None:
        """``on_lost`` is called for a link that was returned. Raises :class:`ConfigError` naming a file."""
        self.host = ""  # the address by which the last link was made
        self._addresses = split_addresses(settings.controller)
        self._silence_s = settings.silence_s
        self._context = ClusterContext(cluster_files(settings), server=False)
        self._own = own
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._fence = fence
        self._loop = asyncio.get_running_loop()
        self._dice = Random()
        self._several = len(self._addresses) > 1
        self._known: dict[tuple[str, int], list[_Place]] = {}  # by address, as last looked up
        self._resolving: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._trying: dict[_Place, asyncio.Task[MachineLink]] = {}  # attempts that have not been looked at
        self._unwanted: set[asyncio.Task[MachineLink]] = set()  # attempts that are to end by themselves
        self._link: MachineLink | None = None  # the last one that was returned
        self._linked_s = -math.inf  # when that was
        self._lost_s = -math.inf  # when it was found to be lost
        self._pause_s = 0.0
        self._told: set[str] = set()  # since a link that lasted

    async def connect(self) -> MachineLink:
        """A link to who leads, after a pause. Raises :class:`TransportError` if there is none now."""
        try:
            await asyncio.sleep(self._next_pause_s() * self._dice.uniform(0.5, 1.0))
            await self._resolve()
            for place in self._places():
                if place not in self._trying:
                    self._trying[place] = self._loop.create_task(self._connect(place))
            await asyncio.wait(self._trying.values(), return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self.close()
            raise
        link = self._link = self._first_open()
        self._linked_s = self._loop.time()
        return link

    def close(self) -> None:
        """Want no attempt any more; those under way end by themselves, for a handshake ends badly halfway."""
        for task in self._trying.values():
            self._unwanted.add(task)
            task.add_done_callback(self._drop)
        self._trying.clear()

    def _drop(self, task: asyncio.Task[MachineLink]) -> None:
        self._unwanted.discard(task)
        if not task.cancelled() and task.exception() is None:
            task.result().close()

    def say(self, why: str) -> None:
        """Log why there is no controller, once."""
        if why not in self._told:
            self._told.add(why)
            _log.warning("no controller yet: %s", why)

    def _next_pause_s(self) -> float:
        now_s = self._loop.time()
        if now_s - self._linked_s >= RETRY_S_MAX:
            self._pause_s, self._lost_s = 0.0, now_s
            self._told.clear()
        elif self._several and now_s - self._lost_s < TAKEOVER_S:
            self._pause_s = RETRY_S
        else:
            self._pause_s = min(RETRY_S_MAX, 2 * self._pause_s or RETRY_S)
        self._linked_s = math.inf
        return self._pause_s

    async def _resolve(self) -> None:
        """Look up all names, and wait a little if no address is known yet. Raises :class:`TransportError`."""
        for address in self._addresses:
            if address not in self._resolving:
                self._resolving[address] = self._loop.create_task(self._look_up(address))
        if not self._known:
            await asyncio.wait(self._resolving.values(), timeout=RESOLVE_S)
        if not self._known and not self._trying:
            raise TransportError("no address of a controller is known")

    async def _look_up(self, address: tuple[str, int]) -> None:
        name, port = address
        try:
            found = await self._loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as error:
            self.say(f"{name}: {error.strerror or error}")
        else:
            self._known[address] = [_Place(str(at[0]), port) for *_, at in found]
        finally:
            del self._resolving[address]

    def _places(self) -> list[_Place]:
        found = dict.fromkeys(each for places in self._known.values() for each in places)
        self._several = len(found) > 1
        return list(found)

    async def _connect(self, place: _Place) -> MachineLink:
        return await connect_machine(
            (place.host, place.port), self._context.now(), self._own, self._on_frames, self._on_link_lost,
            self._silence_s, fence=self._fence,
        )  # fmt: skip

    def _on_link_lost(self, link: Link) -> None:
        if link is self._link:
            self._on_lost(link)

    def _first_open(self) -> MachineLink:
        """The link of an attempt that succeeded; ends all others. Raises the errors of those that failed."""
        why = []
        for place, task in list(self._trying.items()):
            if not task.done():
                continue
            del self._trying[place]
            error = task.exception()
            if error is None and task.result().is_open:
                self.host = place.host
                self.close()
                return task.result()
            if error is not None and not isinstance(error, TransportError):
                raise error
            why.append(str(error or task.result().lost_because))
            self.say(why[-1])
        raise TransportError("; ".join(why))


# ------------------------------------------------------------
# A process that joins: the first frame that it is sent says whether it may.


class Joiner:
    """Joins the controller on another machine: see :class:`LeaderFinder`.

    ``on_frames`` and ``on_lost`` are called for links on which it was admitted. ``refused`` ends with a
    :class:`ConfigError` if the server refuses it for good.
    """

    def __init__(
        self, own: Hello, settings: Settings, on_frames: OnFrames, on_lost: OnLost, fence: Fence
    ) -> None:
        """Raises :class:`ConfigError` naming the setting of a file that cannot be used."""
        self._own = own
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.refused: asyncio.Future[None] = self._loop.create_future()
        self._finder = LeaderFinder(settings, own, self._on_link_frames, self._on_link_lost, fence)
        # Of the last link: what the server said first.
        self._verdict: asyncio.Future[Refused | None] = self._loop.create_future()
        self._admitted = False

    @property
    def host(self) -> str:
        """The address by which the last link was made."""
        return self._finder.host

    async def join(
        self, introduction: Frame, on_open: Callable[[MachineLink], None] = lambda link: None
    ) -> MachineLink:
        """A link on which this process was admitted. ``on_open`` gets it before any frame is received.

        Raises :class:`TransportError` if there is none now, or if ``on_open`` does.
        """
        self._verdict, self._admitted = self._loop.create_future(), False
        link = await self._finder.connect()
        link.send(introduction)
        try:
            on_open(link)
            refused = await self._verdict
        except BaseException as error:
            link.close()
            if isinstance(error, TransportError):
                self._finder.say(str(error))
            raise
        if refused is None:
            return link
        link.close()
        if refused.final and not self.refused.done():
            why = f"the server does not take {self._own.name}: {refused.why}"
            self.refused.set_exception(ConfigError(why))
        self._finder.say(why := f"the server does not take this {self._own.role}: {refused.why}")
        raise TransportError(why)

    def _on_link_frames(self, link: Link, frames: list[Frame]) -> None:
        if not self._verdict.done():
            first = frames[0]
            self._admitted = not isinstance(first, Refused)
            self._verdict.set_result(first if isinstance(first, Refused) else None)
        if self._admitted:
            self._on_frames(link, frames)

    def _on_link_lost(self, link: Link) -> None:
        if not self._verdict.done():
            self._verdict.set_exception(TransportError(link.lost_because))
        elif self._admitted:
            self._on_lost(link)


class FarConnector(Joiner):
    """Connects a gateway. ``on_host`` gets the address of this machine on the way to the server."""

    def __init__(
        self, name: str, settings: Settings, on_host: Callable[[str], None] = lambda host: None
    ) -> None:
        super().__init__(hello(Role.GATEWAY, name), settings, self._deliver, self._lose, Fence())
        self._introduction = FarGateway(gateway=name, version=__version__)
        self._on_host = on_host
        self._receive: Callable[[list[Frame]], None] = lambda frames: None
        self._lost: Callable[[str], None] = lambda why: None

    async def __call__(
        self, on_frames: Callable[[list[Frame]], None], on_lost: Callable[[str], None]
    ) -> MachineLink:
        """As :data:`~clockwork_serve.serve.gateway.controller_link.Connector`."""
        self._receive, self._lost = on_frames, on_lost
        return await self.join(self._introduction, lambda link: self._on_host(link.host))

    def _deliver(self, link: Link, frames: list[Frame]) -> None:
        self._receive(frames)

    def _lose(self, link: Link) -> None:
        self._lost(link.lost_because)
