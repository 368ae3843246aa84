"""A remote gateway's link to the controller, by way of the bridge.

A request is sent without its tensors, and its inputs follow in pieces; its outputs are written to its slot
before its answer is delivered.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from msgspec import structs

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.config.table import split_address
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import (
    Answer,
    FarGateway,
    Frame,
    Outcome,
    Refused,
    Request,
    RequestPiece,
    Role,
    Tensors,
    Undelivered,
)
from clockwork_serve.serve.remote.config import ClusterContext, cluster_files
from clockwork_serve.serve.remote.link import (
    MachineLink,
    connect_machine,
    decode,
    encode,
    moved,
    on_the_way,
    packed,
    pieces,
)
from clockwork_serve.serve.shm import RegionMap
from clockwork_serve.serve.transport import RETRY_S, Link, hello

FULL: Final = (
    "outputs: no room for them among this gateway's gateway_memory; ask for less, try again, or raise it"
)
RETRY_S_MAX: Final = 1.0
"""The longest pause between attempts to connect; a link that lasted this long resets the pause."""

_log = logging.getLogger(__name__)

OnFrames = Callable[[list[Frame]], None]
OnLost = Callable[[str], None]
Grow = Callable[[str, int], Tensors | None]
"""Gives the request of an id room for that many bytes of outputs, in its slot; None if there is none."""


class FarConnector:
    """Connects to the controller on another machine, with a growing pause while links are lost at once.

    ``refused`` ends with a :class:`ConfigError` if the server refuses this gateway for good. ``grow`` is the
    gateway's.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        """Raises :class:`ConfigError` naming the setting of a file that cannot be used."""
        self.grow: Grow = lambda request_id, nbytes: None
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
        controller = FarController(on_frames, on_lost, self.grow)
        link = await connect_machine(
            split_address(self._settings.controller), self._context.now(), hello(Role.GATEWAY, self._name),
            controller.on_frames, controller.on_link_lost, self._settings.silence_s,
        )  # fmt: skip
        link.send(FarGateway(gateway=self._name, version=__version__))
        try:
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


@dataclass(slots=True)
class _Sent:
    """A request without an answer: its tensors, and the memory that holds them; ``full``: all of it."""

    tensors: Tensors
    memory: memoryview
    full: bool = False


class FarController:
    """A link to the controller over the network. All methods are for the loop's own thread."""

    def __init__(self, on_frames: OnFrames, on_lost: OnLost, grow: Grow) -> None:
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._grow = grow
        self._regions = RegionMap()
        self._link: MachineLink | None = None  # from begin()
        self._sent: dict[str, _Sent] = {}  # all and only requests without an answer
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
        """Send a frame; a request's inputs follow it as fast as the network accepts them."""
        link = self._link
        if link is None:
            return
        if type(frame) is not Request:
            link.send(frame)
            return
        request_id, tensors = frame.request_id, decode(frame.tensors)
        memory = self._regions.view(tensors.region)
        self._sent[request_id] = _Sent(tensors, memory)
        targets = packed(tensors.refs)
        link.send(structs.replace(frame, tensors=on_the_way(targets, tensors.output_bytes)))
        inputs = pieces(tensors.refs, targets, memory, lambda: request_id in self._sent)
        link.queue(RequestPiece(request_id=request_id, at=at, data=data) for at, data in inputs)

    def close(self) -> None:
        """Close after the queued frames were sent."""
        self._sent.clear()
        if self._link is not None:
            self._link.close()

    # Received frames

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames of the server; the link is closed at the first that is invalid."""
        told: list[Frame] = []
        for frame in frames:
            try:
                self._take(frame, told)
            except TransportError as error:
                _log.error("%s", error)
                link.abort(str(error))
                return
        if told:
            if not self._verdict.done():
                self._verdict.set_result(None)
            self._on_frames(told)

    def on_link_lost(self, link: Link) -> None:
        """Forget all requests: the link was lost."""
        self._sent.clear()
        if not self._verdict.done():
            self._verdict.set_exception(TransportError(link.lost_because))
        elif self._verdict.exception() is None and self._verdict.result() is None:
            self._on_lost(link.lost_because)

    def _take(self, frame: Frame, told: list[Frame]) -> None:
        match frame:
            case RequestPiece():
                self._write(frame)
            case Answer():
                told.append(self._answered(frame))
            case Undelivered():
                self._sent.pop(frame.request_id, None)
                told.append(frame)
            case Refused():
                if not self._verdict.done():
                    self._verdict.set_result(frame)
            case _:
                told.append(frame)

    def _write(self, piece: RequestPiece) -> None:
        sent = self._sent.get(piece.request_id)
        if sent is None:
            raise TransportError(f"the server sent outputs of {piece.request_id}, which is not open")
        if piece.grown > sent.tensors.output_bytes and not sent.full:
            tensors = self._grow(piece.request_id, piece.grown)
            sent.tensors, sent.full = tensors or sent.tensors, tensors is None
        if sent.full:
            return
        first, end = sent.tensors.output_offset + piece.at, piece.at + len(piece.data)
        if not 0 <= piece.at <= end <= sent.tensors.output_bytes:
            raise TransportError(f"the server sent outputs of {piece.request_id} beyond the room for them")
        sent.memory[first : first + len(piece.data)] = piece.data

    def _answered(self, answer: Answer) -> Answer:
        """The answer with references into the request's slot, where its outputs were written."""
        sent = self._sent.pop(answer.request_id, None)
        if sent is None or not answer.outputs or answer.outcome is not Outcome.OK:
            return answer
        if sent.full:
            return structs.replace(answer, outcome=Outcome.FAILED, message=FULL, outputs=b"")
        tensors = sent.tensors
        found = decode(answer.outputs).refs
        if not all(0 <= ref.offset <= ref.offset + ref.nbytes <= tensors.output_bytes for ref in found):
            raise TransportError(f"outputs of {answer.request_id} lie outside of the room for them")
        refs = tuple([moved(ref, tensors.output_offset + ref.offset) for ref in found])
        return structs.replace(answer, outputs=encode(structs.replace(tensors, refs=refs)))
