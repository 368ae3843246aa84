"""The bridge: workers and gateways on other machines join the server through it.

To the controller each of them is one of this machine. Tensors go straight between gateways and workers.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    AdmissionQuery,
    Answer,
    Ask,
    Beat,
    Cancel,
    CodeAdded,
    CreditBlocked,
    Delivered,
    FarGateway,
    Frame,
    Hello,
    MachineHello,
    Model,
    ModelAdded,
    ModelRemoved,
    ModelsAskedFor,
    Readiness,
    Refused,
    Release,
    Request,
    Role,
    StandbysCounted,
    TensorsOffered,
)
from clockwork_serve.serve.remote.bridge_peers import Judge, Peer, Reach, WorkerPeer
from clockwork_serve.serve.remote.config import FAR_GATEWAY, FAR_NAME
from clockwork_serve.serve.remote.link import Complaints, MachineLink
from clockwork_serve.serve.remote.tensor_link import SERVER, decode
from clockwork_serve.serve.transport import RETRY_S, Link, connect, hello

# ------------------------------------------------------------
# A gateway on another machine, as the bridge represents it.


Asked = TypeVar("Asked", Request, AdmissionQuery)


class GatewayPeer(Peer):
    """A remote gateway (see :class:`Peer`)."""

    role: ClassVar[Role] = Role.GATEWAY

    def __init__(
        self, link: MachineLink, reach: Reach, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None], complaints: Complaints,
    ) -> None:  # fmt: skip
        super().__init__(link, reach, models, judge, on_gone, complaints)
        # Only ids of its own: with those of another gateway it could cancel that one's requests.
        self._own_id = re.compile(re.escape(self.name) + r"-[0-9a-f]+-a?\d+(?:-2)?", re.ASCII).fullmatch
        self._open: set[str] = set()  # ids of requests that the controller may know

    # From there

    def introduction(self, frame: Frame) -> FarGateway | None:
        """The frame, if it introduces this gateway."""
        return frame if isinstance(frame, FarGateway) and frame.gateway == self.name else None

    def from_there(self, frame: Frame) -> bool:
        """Forward requests and questions."""
        match frame:
            case Request():
                self._check(frame.request_id, frame.gateway)
                _check_tensors(frame)
                if frame.request_id in self._open:
                    raise TransportError(f"it sent request {frame.request_id} twice")
                self._open.add(frame.request_id)
                frame = not_ahead(frame, time.monotonic_ns())
            case Cancel():
                self._check(frame.request_id, self.name)
            case AdmissionQuery():
                self._check(frame.announced_id, frame.gateway)
                frame = not_ahead(frame, time.monotonic_ns())
            case Delivered():
                for request_id in (*frame.in_time, *frame.late):
                    self._check(request_id, self.name)
            case TensorsOffered():
                if frame.gateway != self.name or not _is_far(frame.server):
                    raise TransportError(
                        f"it offered tensors of {frame.gateway!r:.80} at {frame.server!r:.80}"
                    )
            case ModelsAskedFor() | Ask() | Beat() | CreditBlocked():
                pass  # the controller must answer beats, for they check it
            case _:
                return False
        self.inward(frame)
        return True

    def _check(self, request_id: str, gateway: str) -> None:
        if gateway != self.name or not self._own_id(request_id):
            raise TransportError(f"it sent request {request_id!r:.80} of gateway {gateway!r:.80}")

    # From the controller

    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """Forward answers, the catalogue, and replies to admission queries."""
        for frame in frames:
            if isinstance(frame, Release) or (isinstance(frame, Answer) and frame.release):
                self._open.discard(frame.request_id)
            self.link.send(frame)


def not_ahead(frame: Asked, now_ns: int) -> Asked:
    """The frame, with arrival and deadline moved so that it does not arrive in the future.

    The clocks of two hosts are aligned with an error, by which its deadline would be too late, too.
    """
    ahead_ns = frame.arrival_ns - now_ns
    if ahead_ns <= 0:
        return frame
    return structs.replace(frame, arrival_ns=now_ns, deadline_ns=frame.deadline_ns - ahead_ns)


def _is_far(server: str) -> bool:
    """Whether that is an address of tensors that names its host."""
    return SERVER.fullmatch(server) is not None and not server.startswith(":")


def _check_tensors(request: Request) -> None:
    """Raise :class:`TransportError` if a request's tensors may be elsewhere than at its gateway."""
    tensors = decode(request.tensors)
    if tensors.region or not _is_far(tensors.server):
        raise TransportError(
            f"tensors of {request.request_id}: expected HOST:PORT of their gateway; found region "
            f"{tensors.region!r:.80}, server {tensors.server!r:.80}"
        )


# ------------------------------------------------------------
# The bridge itself. The controller and the server's own gateways and workers need no code for other machines:
# the work of the network is done in this process.


NAME: Final = "bridge"
_FORMS: Final = {Role.WORKER: FAR_NAME, Role.GATEWAY: FAR_GATEWAY}
_STANDBY: Final = re.compile(r"controller(-\d)?")

_log = logging.getLogger(__name__)


class Bridge:
    """Admits processes of other machines, and represents each by a :class:`Peer`.

    ``judge`` returns why one may not join. ``leads`` is told the epoch of the controller here, and 0 once
    that is lost. ``kinds`` are those of devices for which there are profiles; those of the catalogue are
    added. All links to controllers have one fence: nothing of one that was deposed reaches another machine.
    """

    def __init__(
        self, controller: Path, judge: Judge, kinds: set[str] | None = None,
        leads: Callable[[int], None] = lambda epoch: None,
    ) -> None:  # fmt: skip
        self.models: dict[str, Model] = {}
        self._reach: Reach = partial(connect, controller, fence=Fence())
        self._judge = judge
        self._leads = leads
        self._kinds = set[str]() if kinds is None else kinds
        self._complaints = Complaints()
        self._peers: dict[Link, Peer] = {}
        self._standbys: set[Link] = set()  # controllers elsewhere, which want to know when this one ends
        self._complete = False  # the whole catalogue was received
        self._link: Link | None = None  # to the controller
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Keep the catalogue up to date, until cancelled: it is received over a link like a gateway's."""
        while True:
            self._lost.clear()
            try:
                await self._reach(hello(Role.GATEWAY, NAME), self._on_catalogue, self._on_catalogue_lost)
            except TransportError as error:
                _log.debug("%s", error)
            else:
                await self._lost.wait()
            await asyncio.sleep(RETRY_S)

    def close(self) -> None:
        """Close all peers."""
        self._close_standbys()
        for peer in list(self._peers.values()):
            peer.close("the server stops")

    def _on_catalogue(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            match frame:
                case CodeAdded():
                    self._kinds.update(profile.device_kind for profile in frame.profiles)
                case ModelAdded():
                    self.models[frame.model.key] = frame.model
                    self._tell(frame)
                case ModelRemoved():
                    self.models.pop(frame.model, None)
                    self._tell(frame)
                case Readiness() if not self._complete:
                    self._complete = True
                    self._link = link
                    self._leads(link.peer.epoch)
                case _:
                    pass  # other frames for gateways

    def _on_catalogue_lost(self, link: Link) -> None:
        _log.warning("link lost: %s", link.lost_because)
        self._complete = False
        self._link = None
        self._leads(0)
        self.models.clear()
        self._close_standbys()
        for peer in list(self._peers.values()):
            peer.close("its controller ended")
        self._lost.set()

    def _tell(self, frame: ModelAdded | ModelRemoved) -> None:
        for peer in self._peers.values():
            peer.on_catalogue(frame)

    # Machines

    def on_link(self, link: Link) -> None:
        """Admit or refuse a process of another machine that connected."""
        assert isinstance(link, MachineLink)
        if link.peer.role is Role.CONTROLLER and _STANDBY.fullmatch(link.peer.name) and self._complete:
            _log.info("controller %s at %s stands by", link.peer.name, link.at)
            self._standbys.add(link)
            self._count_standbys()
            return
        kind = GatewayPeer if link.peer.role is Role.GATEWAY else WorkerPeer
        peer: Peer = kind(link, self._reach, self.models, self._judge, self._on_gone, self._complaints)
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
        self._peers[link] = peer

    def _may_join(self, peer: Peer) -> bool:
        """Whether it has its name for itself, now that it introduces itself; else it is refused."""
        for other in list(self._peers.values()):
            if other.name == peer.name and other.introduced and not self._replaced(other, peer.link.peer):
                why = f"another {peer.role} of this server is called {peer.name}; give it --machine-name"
                peer.refuse(Refused(why=why, final=False))
                return False
        return True

    def _replaced(self, other: Peer, new: Hello) -> bool:
        """Whether the new link is of the same process, so that the other one was given up, and is closed."""
        if other.same_process != (new.pid, new.boot_id):
            return False
        other.close("it connected again")
        return True

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames of another machine."""
        if (peer := self._peers.get(link)) is not None:
            if peer.introduced or self._may_join(peer):
                peer.on_frames(frames)
        elif link in self._standbys:
            _log.error("cut off controller %s: it sent %r", link.peer.name, type(frames[0]).__name__)
            self.on_lost(link)
            link.close()

    def on_lost(self, link: Link) -> None:
        """Close the peer of a link that was lost."""
        if link in self._standbys:
            self._standbys.discard(link)
            self._count_standbys()
        if (peer := self._peers.get(link)) is not None:
            peer.close(link.lost_because)

    def _count_standbys(self) -> None:
        if self._link is not None:
            self._link.send(StandbysCounted(ready=len(self._standbys)))

    def _close_standbys(self) -> None:
        for link in self._standbys:
            link.close()
        self._standbys.clear()

    def _on_gone(self, peer: Peer) -> None:
        self._peers.pop(peer.link, None)


def judge_of(
    runtime: Mapping[str, str], kinds: Collection[str], *, grow: bool = False, store: bool = True
) -> Judge:
    """Returns the check of which worker may join a server whose artefacts need this ``runtime``.

    ``kinds`` are those of devices for which it has profiles; unless they ``grow``, who has another one is
    refused for good. So is every worker of a server without a ``store``. A gateway runs no model. Whether
    builds understand each other their Hellos have said.
    """

    def judge(machine: MachineHello | FarGateway) -> Refused | None:
        if isinstance(machine, FarGateway):
            return None
        if not store:
            return Refused(
                why="store: expected the server to have a shared store, from which workers on other machines "
                "take models; found none; start the server (clockwork serve) with --store, and the worker "
                "with the same"
            )
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
                f"another one ({'; '.join(pairs)}); use machines with the same ONNX Runtime and CPU, "
                "and builds with the same layout"
            )
        strange = [kind for kind in machine.kinds if kind not in kinds]
        if strange:
            known = ", ".join(sorted(kinds)) or "(none yet)"
            return Refused(
                why=f"device: expected one of kind {known}, for which the server has measured its "
                f"models; found {', '.join(strange)}; have a builder measure them on such a device "
                "(clockwork profile REPO --store STORE --device); a server with devices of its own may also "
                "be given one of that kind",
                final=not grow,
            )
        return None

    return judge
