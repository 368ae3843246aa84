"""One gateway on another machine, as the bridge has it. It decides nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Announced,
    Answer,
    Ask,
    Beat,
    Cancel,
    Delivered,
    FarGateway,
    Frame,
    Model,
    Release,
    Request,
    RequestPiece,
    Role,
    Unheard,
)
from clockwork_serve.serve.bridge_peer import Judge, Peer
from clockwork_serve.serve.bridge_requests import Requests
from clockwork_serve.serve.machine_link import MachineLink
from clockwork_serve.serve.transport import Link


class GatewayPeer(Peer):
    """See :class:`Peer`. ``region_bytes`` hold the tensors of all its requests in flight."""

    role: ClassVar[Role] = Role.GATEWAY

    def __init__(
        self, link: MachineLink, controller: Path, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None], region_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(link, controller, models, judge, on_gone)
        self._region_bytes = region_bytes
        # As its own ids are: with another gateway's it could cancel, or be answered, for that one.
        self._own_id = re.compile(re.escape(self.name) + r"-[0-9a-f]+-a?\d+(?:-2)?", re.ASCII).fullmatch
        self._requests: Requests | None = None  # from when it may join to the end

    def close(self, why: str) -> None:
        """End both links, and give its memory up."""
        super().close(why)
        requests, self._requests = self._requests, None
        if requests is not None:
            requests.close()

    # From there

    def introduction(self, frame: Frame) -> FarGateway | None:
        """What it runs."""
        return frame if isinstance(frame, FarGateway) and frame.gateway == self.name else None

    def welcomed(self) -> None:
        """Room for its requests."""
        self._requests = Requests(self._region_bytes)

    def from_there(self, frame: Frame) -> bool:
        """Requests, their inputs, questions."""
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
            case Announced():
                self._check(frame.announced_id, frame.gateway)
                self.inward(frame)
            case Delivered():
                for request_id in (*frame.in_time, *frame.late):
                    self._check(request_id, self.name)
                self.inward(frame)
            case Ask() | Beat():  # the controller's to answer: we may well be there, and it not
                self.inward(frame)
            case _:
                return False
        return True

    def _check(self, request_id: str, gateway: str) -> None:
        if gateway != self.name or not self._own_id(request_id):
            raise TransportError(f"it sent request {request_id!r:.80} of gateway {gateway!r:.80}")

    def _tell(self, frame: Request | Cancel | Unheard | None) -> None:
        if isinstance(frame, Unheard):
            self.link.send(frame)
        elif frame is not None:
            self.inward(frame)

    # From the controller

    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """Answers, the catalogue, what is foretold."""
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
