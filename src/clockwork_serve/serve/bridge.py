"""Lets workers on other machines join: to the controller each is a worker here. It decides nothing.

The controller, gateways and local workers know nothing of it: what a network costs, costs this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Frame,
    Hello,
    Machine,
    Model,
    ModelAdded,
    ModelRemoved,
    Readiness,
    Refused,
    Role,
)
from clockwork_serve.serve.bridge_peer import Peer
from clockwork_serve.serve.machine_config import FAR_NAME
from clockwork_serve.serve.machine_link import MachineLink
from clockwork_serve.serve.transport import Link, connect, hello

RECONNECT_S: Final = 0.05
NAME: Final = "bridge"

_log = logging.getLogger(__name__)


class Bridge:
    """All workers on other machines. ``judge`` tells why one may not join."""

    def __init__(self, controller: Path, judge: Callable[[Machine], Refused | None]) -> None:
        self.models: dict[str, Model] = {}
        self._controller = controller
        self._judge = judge
        self._peers: dict[Link, Peer] = {}
        self._complete = False  # the catalogue has been told
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Keep the catalogue, until cancelled. Who wants to know what is served connects as gateways do."""
        while True:
            self._lost.clear()
            try:
                await connect(
                    self._controller, hello(Role.GATEWAY, NAME), self._on_catalogue, self._on_catalogue_lost
                )
            except TransportError as error:
                _log.debug("%s", error)
            else:
                await self._lost.wait()
            await asyncio.sleep(RECONNECT_S)

    def close(self) -> None:
        """Let go of all."""
        for peer in list(self._peers.values()):
            peer.close("the server stops")

    def _on_catalogue(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            match frame:
                case ModelAdded():
                    self.models[frame.model.key] = frame.model
                    self._tell(frame)
                case ModelRemoved():
                    self.models.pop(frame.model, None)
                    self._tell(frame)
                case Readiness():
                    self._complete = True
                case _:
                    pass  # what else gateways are told

    def _on_catalogue_lost(self, link: Link) -> None:
        _log.warning("link lost: %s", link.lost_because)
        self._complete = False
        self.models.clear()
        self._lost.set()

    def _tell(self, frame: Frame) -> None:
        for peer in self._peers.values():
            peer.link.send(frame)

    # Machines

    def on_link(self, link: Link) -> None:
        """A machine connected."""
        assert isinstance(link, MachineLink)
        peer = Peer(link, self._controller, self.models, self._judge, self._on_gone)
        if link.peer.role is not Role.WORKER or not FAR_NAME.fullmatch(peer.name):
            found = f"{link.peer.role} {peer.name!r}"
            peer.refuse(Refused(why=f"expected a worker that is called NAME.DEVICE:NUMBER, found {found}"))
            return
        if not self._complete:
            peer.refuse(Refused(why="the server has no controller now", final=False))
            return
        for other in list(self._peers.values()):
            if other.name == peer.name and not self._replaced(other, link.peer):
                why = f"another worker of this server is called {peer.name}; give it --worker-name"
                peer.refuse(Refused(why=why, final=False))
                return
        self._peers[link] = peer

    def _replaced(self, other: Peer, new: Hello) -> bool:
        """Whether a link is one that its own process has given up already."""
        if other.same_process != (new.pid, new.boot_id):
            return False
        other.close("it connected again")
        return True

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """A machine sent something."""
        if (peer := self._peers.get(link)) is not None:
            peer.on_frames(frames)

    def on_lost(self, link: Link) -> None:
        """A machine is gone."""
        if (peer := self._peers.get(link)) is not None:
            peer.close(link.lost_because)

    def _on_gone(self, peer: Peer) -> None:
        self._peers.pop(peer.link, None)


def judge_of(
    version: str, runtime: Mapping[str, str], kinds: Sequence[str]
) -> Callable[[Machine], Refused | None]:
    """Who may join a server of this ``version``, whose artefacts are for this ``runtime``.

    ``kinds`` are those of the server's devices, for which it knows how long models take.
    """

    def judge(machine: Machine) -> Refused | None:
        if machine.version != version:
            return Refused(why=f"clockwork-serve: expected {version}, found {machine.version}; install that")
        differ = sorted(
            name for name in {**runtime, **machine.runtime} if runtime.get(name) != machine.runtime.get(name)
        )
        if differ:
            pairs = [
                f"{name} {runtime.get(name)!s:.40} here, {machine.runtime.get(name)!s:.40} there"
                for name in differ
            ]
            return Refused(
                why=f"{', '.join(differ)}: expected what the server's models were compiled for, found "
                f"another one ({'; '.join(pairs)}); use machines with the same ONNX Runtime and CPU"
            )
        strange = [kind for kind in machine.kinds if kind not in kinds]
        if strange:
            return Refused(
                why=f"device: expected one of kind {', '.join(kinds)}, for which the server has measured its "
                f"models; found {', '.join(strange)}; give the server a device of that kind, too"
            )
        return None

    return judge
