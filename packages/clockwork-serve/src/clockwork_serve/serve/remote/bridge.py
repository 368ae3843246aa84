"""The bridge: workers and gateways on other machines join the server through it.

To the controller each of them is one of this machine. The tensors of remote gateways' requests are kept in
shared memory here, which workers map.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    AdmissionQuery,
    Answer,
    Ask,
    Beat,
    Cancel,
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
    Outcome,
    Readiness,
    Refused,
    Release,
    Request,
    RequestPiece,
    Role,
    TensorRef,
    Tensors,
    Undelivered,
)
from clockwork_serve.serve.remote.bridge_peers import Judge, Peer, Reach, WorkerPeer
from clockwork_serve.serve.remote.config import FAR_GATEWAY, FAR_NAME
from clockwork_serve.serve.remote.link import (
    HEADER,
    MachineLink,
    decode,
    encode,
    moved,
    on_the_way,
    pieces,
    placed,
    run_bytes,
)
from clockwork_serve.serve.shm import NO_EPOCH, Region, memory_of, write_epoch
from clockwork_serve.serve.transport import RETRY_S, Link, connect, hello
from clockwork_serve.units import align

# ------------------------------------------------------------
# Requests of one gateway on another machine, with their tensors in shared memory here.
#
# A request is forwarded to the controller once its inputs are complete.


@dataclass(slots=True)
class _Open:
    """One request. ``here`` of its ``inputs_end`` bytes of inputs have been received.

    ``request`` waits for its inputs; it is None once it was forwarded. Its memory is freed once its answer
    was ``sent`` with all outputs, and workers have ``released`` it.
    """

    start: int
    inputs_end: int
    tensors: Tensors
    request: Request | None
    here: int = 0
    sent: bool = False
    released: bool = False


class FarRequests:
    """The open requests of one remote gateway, and the memory of their tensors. For one thread."""

    def __init__(self, region_bytes: int) -> None:
        self.region = Region.create(region_bytes)
        self._epoch = NO_EPOCH
        self._open: dict[str, _Open] = {}  # all and only those that have memory here

    def __len__(self) -> int:
        return len(self._open)

    def take(self, request: Request) -> Request | Undelivered | None:
        """Accept a request and allocate its memory.

        Returns the request to forward, None while its inputs are incomplete, or an ``Undelivered`` to send
        back if there is no room. Raises :class:`TransportError` for a request that no gateway of ours sends.
        """
        request_id = request.request_id
        if request_id in self._open:
            raise TransportError(f"it sent request {request_id} twice")
        tensors = _described(request)
        here = placed(self.region, tensors, self._epoch + 1)
        if here is None:
            size = self.region.size
            why = f"no room among {size} bytes at the server, its gateway_memory, for one more request"
            return Undelivered(request_id=request_id, why=why)
        self._epoch = here.epoch
        start = here.header_offset + HEADER
        inputs_end = max([ref.offset + ref.nbytes - start for ref in here.refs if ref.nbytes], default=0)
        found = structs.replace(request, tensors=encode(here))
        opened = self._open[request_id] = _Open(start, inputs_end, here, found)
        return self._complete(opened)

    def write(self, piece: RequestPiece) -> Request | None:
        """Write a piece of inputs; returns the request to forward if it was the last one.

        Pieces of requests that have ended are ignored. Raises :class:`TransportError` if it is not the next.
        """
        opened = self._open.get(piece.request_id)
        if opened is None:
            return None
        end = piece.at + len(piece.data)
        if opened.request is None or piece.at != align(opened.here) or end > opened.inputs_end:
            raise TransportError(
                f"it sent inputs of {piece.request_id} from {piece.at} to {end}; expected them from "
                f"{align(opened.here)} to {opened.inputs_end} at most"
            )
        self.region.buffer[opened.start + piece.at : opened.start + end] = piece.data
        opened.here = end
        return self._complete(opened)

    def cancel(self, request_id: str) -> Undelivered | None:
        """Cancel a request; returns what to send back if it was not forwarded yet, and is dropped now."""
        opened = self._open.get(request_id)
        if opened is None or opened.request is None:
            return None
        self._free(request_id, opened)
        return Undelivered(request_id=request_id)

    def answer(self, answer: Answer) -> Iterator[Frame]:
        """The frames to send for an answer: its outputs, then the answer."""
        opened = self._open.get(answer.request_id)
        if opened is None:
            yield answer
            return
        opened.released |= answer.release
        outputs = b""
        if answer.outputs:
            try:
                refs, memory, first = self._outputs(opened.tensors, answer)
            except TransportError as error:
                message = f"its outputs cannot be read: {error}"
                answer = structs.replace(answer, outcome=Outcome.FAILED, message=message)
            else:
                targets = tuple([moved(ref, ref.offset - first) for ref in refs])
                outputs = on_the_way(targets)
                grown = 0 if memory is self.region.buffer else run_bytes(targets)
                for at, data in pieces(refs, targets, memory):
                    yield RequestPiece(request_id=answer.request_id, at=at, data=data, grown=grown)
        opened.sent = True
        self._settle(answer.request_id, opened)
        # Workers access memory of this machine only, so the gateway may free its own at once.
        yield structs.replace(answer, release=True, outputs=outputs)

    def release(self, request_id: str) -> None:
        """Note that no worker accesses the request's tensors any more."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.released = True
            self._settle(request_id, opened)

    def close(self) -> None:
        """Close the region; workers that still map it keep its memory."""
        self._open.clear()
        self.region.close()

    def _outputs(self, room: Tensors, answer: Answer) -> tuple[tuple[TensorRef, ...], memoryview, int]:
        """An answer's outputs, their memory, and where in it they begin. Raises :class:`TransportError`."""
        found = decode(answer.outputs)
        memory = memory_of(found, self.region)
        first, end = room.output_offset, room.output_offset + room.output_bytes
        if memory is not self.region.buffer:
            first, end = 0, len(memory)
        if not all(first <= ref.offset <= ref.offset + ref.nbytes <= end for ref in found.refs):
            raise TransportError("its worker wrote outputs elsewhere than in the room for them")
        return found.refs, memory, first

    def _complete(self, opened: _Open) -> Request | None:
        if opened.here < opened.inputs_end:
            return None
        request, opened.request = opened.request, None
        return request

    def _settle(self, request_id: str, opened: _Open) -> None:
        if opened.sent and opened.released:
            self._free(request_id, opened)

    def _free(self, request_id: str, opened: _Open) -> None:
        place = opened.tensors.header_offset
        write_epoch(self.region.buffer, place, NO_EPOCH)
        self.region.free(place)
        del self._open[request_id]


def _described(request: Request) -> Tensors:
    """The description of a request's tensors. Raises :class:`TransportError` if it is invalid."""
    tensors = decode(request.tensors)
    if tensors.output_bytes < 0 or any(ref.nbytes < 0 for ref in tensors.refs):
        raise TransportError(f"tensors of {request.request_id} take less than no bytes")
    return tensors


# ------------------------------------------------------------
# A gateway on another machine, as the bridge represents it.


class GatewayPeer(Peer):
    """A remote gateway (see :class:`Peer`). ``region_bytes``: shared memory for its requests in flight."""

    role: ClassVar[Role] = Role.GATEWAY

    def __init__(
        self, link: MachineLink, reach: Reach, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None], region_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(link, reach, models, judge, on_gone)
        self._region_bytes = region_bytes
        # Only ids of its own: with those of another gateway it could cancel that one's requests.
        self._own_id = re.compile(re.escape(self.name) + r"-[0-9a-f]+-a?\d+(?:-2)?", re.ASCII).fullmatch
        self._requests: FarRequests | None = None  # None before it was admitted, and at the end

    def close(self, why: str) -> None:
        """Close both links and the region."""
        super().close(why)
        requests, self._requests = self._requests, None
        if requests is not None:
            requests.close()

    # From there

    def introduction(self, frame: Frame) -> FarGateway | None:
        """The frame, if it introduces this gateway."""
        return frame if isinstance(frame, FarGateway) and frame.gateway == self.name else None

    def welcomed(self) -> None:
        """Allocate the region for its requests."""
        self._requests = FarRequests(self._region_bytes)

    def from_there(self, frame: Frame) -> bool:
        """Handle requests, their inputs, and questions."""
        assert self._requests is not None, "it joined"
        match frame:
            case Request():
                self._check(frame.request_id, frame.gateway)
                self._tell(self._requests.take(frame))
            case RequestPiece():
                self._tell(self._requests.write(frame))
            case Cancel():
                self._check(frame.request_id, self.name)
                self._tell(self._requests.cancel(frame.request_id) or frame)
            case AdmissionQuery():
                self._check(frame.announced_id, frame.gateway)
                self.inward(frame)
            case Delivered():
                for request_id in (*frame.in_time, *frame.late):
                    self._check(request_id, self.name)
                self.inward(frame)
            case (
                ModelsAskedFor() | Ask() | Beat() | CreditBlocked()
            ):  # the controller must answer beats, for they check it
                self.inward(frame)
            case _:
                return False
        return True

    def _check(self, request_id: str, gateway: str) -> None:
        if gateway != self.name or not self._own_id(request_id):
            raise TransportError(f"it sent request {request_id!r:.80} of gateway {gateway!r:.80}")

    def _tell(self, frame: Request | Cancel | Undelivered | None) -> None:
        if isinstance(frame, Undelivered):
            self.link.send(frame)
        elif frame is not None:
            self.inward(frame)

    # From the controller

    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """Forward answers, the catalogue, and replies to admission queries."""
        for frame in frames:
            if self._requests is None:
                return
            match frame:
                case Answer():
                    self.link.queue(self._requests.answer(frame))
                case Release():
                    self._requests.release(frame.request_id)
                case _:
                    self.link.send(frame)


# ------------------------------------------------------------
# The bridge itself. The controller and the server's own gateways and workers need no code for other machines:
# the work of the network is done in this process.


NAME: Final = "bridge"
_FORMS: Final = {Role.WORKER: FAR_NAME, Role.GATEWAY: FAR_GATEWAY}

_log = logging.getLogger(__name__)


class Bridge:
    """Admits processes of other machines, and represents each by a :class:`Peer`.

    ``judge`` returns why one may not join. ``region_bytes``: shared memory for each gateway's requests;
    ``spill_bytes``: for outputs of each worker that outgrow their slots. All links to controllers have one
    fence: nothing of a controller that was deposed reaches another machine.
    """

    def __init__(self, controller: Path, judge: Judge, region_bytes: int, spill_bytes: int) -> None:
        self.models: dict[str, Model] = {}
        self._reach: Reach = partial(connect, controller, fence=Fence())
        self._judge = judge
        self._region_bytes = region_bytes
        self._spill_bytes = spill_bytes
        self._peers: dict[Link, Peer] = {}
        self._complete = False  # the whole catalogue was received
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
                    pass  # other frames for gateways

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
        """Admit or refuse a process of another machine that connected."""
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
        given = link, self._reach, self.models, self._judge, self._on_gone
        if link.peer.role is Role.GATEWAY:
            return GatewayPeer(*given, self._region_bytes)
        return WorkerPeer(*given, self._spill_bytes)

    def _replaced(self, other: Peer, new: Hello) -> bool:
        """Whether the new link is of the same process, so that the other one was given up, and is closed."""
        if other.same_process != (new.pid, new.boot_id):
            return False
        other.close("it connected again")
        return True

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames of another machine."""
        if (peer := self._peers.get(link)) is not None:
            peer.on_frames(frames)

    def on_lost(self, link: Link) -> None:
        """Close the peer of a link that was lost."""
        if (peer := self._peers.get(link)) is not None:
            peer.close(link.lost_because)

    def _on_gone(self, peer: Peer) -> None:
        self._peers.pop(peer.link, None)


def judge_of(version: str, runtime: Mapping[str, str], kinds: Sequence[str]) -> Judge:
    """Returns the check of who may join a server of this ``version`` whose artefacts need this ``runtime``.

    ``kinds`` are the kinds of the server's devices, for which it has profiles. A gateway runs no model, so
    only its version is checked.
    """

    def judge(machine: MachineHello | FarGateway) -> Refused | None:
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
