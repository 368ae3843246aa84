"""Lets workers and gateways on other machines join: to the controller each is one here. It decides nothing.

The controller, and the server's own gateways and workers, know nothing of it: what a network costs, costs
this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    FarGateway,
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
from clockwork_serve.serve.bridge_gateway import GatewayPeer
from clockwork_serve.serve.bridge_peer import Judge, Peer
from clockwork_serve.serve.bridge_worker import WorkerPeer
from clockwork_serve.serve.machine_config import FAR_GATEWAY, FAR_NAME
from clockwork_serve.serve.machine_link import MachineLink
from clockwork_serve.serve.transport import Link, connect, hello

RECONNECT_S: Final = 0.05
NAME: Final = "bridge"
_FORMS: Final = {Role.WORKER: FAR_NAME, Role.GATEWAY: FAR_GATEWAY}

_log = logging.getLogger(__name__)


class Bridge:
    """All processes on other machines. ``judge`` tells why one may not join.

    ``region_bytes`` hold the tensors of each gateway's requests in flight.
    """

    def __init__(self, controller: Path, judge: Judge, region_bytes: int) -> None:
        self.models: dict[str, Model] = {}
        self._controller = controller
        self._judge = judge
        self._region_bytes = region_bytes
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

    def _tell(self, frame: ModelAdded | ModelRemoved) -> None:
        for peer in self._peers.values():
            peer.on_catalogue(frame)

    # Machines

    def on_link(self, link: Link) -> None:
        """A machine connected."""
        assert isinstance(link, MachineLink)
        peer = self._peer_of(link)
        form = _FORMS.get(link.peer.role)
        if form is None or not form.fullmatch(peer.name):
            why = (
                "expected a worker that is called NAME.DEVICE:NUMBER, or a gateway that is called "
                f"NAME.gateway-NUMBER, found {link.peer.role} {peer.name!r:.80}"
            )
            peer.refuse(Refused(why=why))
            return
        if not self._complete:
            peer.refuse(Refused(why="the server has no controller now", final=False))
            return
        for other in list(self._peers.values()):
            if other.name == peer.name and not self._replaced(other, link.peer):
                why = f"another {peer.role} of this server is called {peer.name}; give it --machine-name"
                peer.refuse(Refused(why=why, final=False))
                return
        self._peers[link] = peer

    def _peer_of(self, link: MachineLink) -> Peer:
        given = link, self._controller, self.models, self._judge, self._on_gone
        if link.peer.role is Role.GATEWAY:
            return GatewayPeer(*given, self._region_bytes)
        return WorkerPeer(*given)

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


def judge_of(version: str, runtime: Mapping[str, str], kinds: Sequence[str]) -> Judge:
    """Who may join a server of this ``version``, whose artefacts are for this ``runtime``.

    ``kinds`` are those of the server's devices, for which it knows how long models take. A gateway runs no
    model: it need not have them.
    """

    def judge(machine: Machine | FarGateway) -> Refused | None:
        if machine.version != version:
            return Refused(why=f"clockwork-serve: expected {version}, found {machine.version}; install that")
        if isinstance(machine, FarGateway):
            return None
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
