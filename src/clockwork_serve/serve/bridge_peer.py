"""One worker on another machine, as the bridge has it: two links, and what passes between them.

To the controller it is a worker like any other here. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Beat,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    DeviceNumbers,
    Fetch,
    Frame,
    Infer,
    Load,
    Machine,
    Model,
    ModelAdded,
    Piece,
    Refused,
    Result,
    Role,
    Unload,
    WorkerJoined,
)
from clockwork_serve.serve.artefact_parts import code_parts, no_parts, weights_parts
from clockwork_serve.serve.bridge_actions import Actions
from clockwork_serve.serve.machine_link import MachineLink
from clockwork_serve.serve.transport import Link, connect, hello

_log = logging.getLogger(__name__)

Judge = Callable[[Machine], Refused | None]


class Peer:
    """See the module. ``judge`` tells why a machine may not join; ``on_gone`` is told once it is over."""

    def __init__(
        self, link: MachineLink, controller: Path, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None],
    ) -> None:  # fmt: skip
        self.link = link
        self.name = link.peer.name
        self._controller = controller
        self._models = models
        self._judge = judge
        self._on_gone = on_gone
        self._actions = Actions()
        self._codes: dict[str, CodeAdded] = {}  # that the controller wants there
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
    def _inside_name(self) -> str:
        return f"worker-{self.name}"

    def close(self, why: str) -> None:
        """End both links."""
        if self._over:
            return
        self._over = True
        _log.info("worker %s at %s is gone: %s", self.name, self.link.at, why)
        if self._reaching is not None:
            self._reaching.cancel()
        if self._inside is not None:
            self._inside.close()
        self.link.close()
        self._on_gone(self)

    def refuse(self, refused: Refused) -> None:
        """Tell it why it may not join, and end."""
        _log.error("worker %s at %s may not join: %s", self.name, self.link.at, refused.why)
        self.link.send(refused)
        self.close("refused")

    # From there

    def on_frames(self, frames: list[Frame]) -> None:
        """Take in what it sent; one that sends what it may not is cut off."""
        for frame in frames:
            if self._over:
                return
            try:
                known = self._from_there(frame)
            except TransportError as error:
                _log.error("cut off worker %s: %s", self.name, error)
                self.close("cut off")
                return
            if not known:
                _log.error("cut off worker %s: it sent %r", self.name, type(frame).__name__)
                self.close("cut off")
                return

    def _from_there(self, frame: Frame) -> bool:
        if not self._welcome:
            return self._first(frame)
        match frame:
            case Piece():
                self._actions.write(frame)
            case Result():
                self._inward(self._actions.end(frame, time.monotonic_ns()))
            case CodeReady() | DeviceNumbers():
                self._inward(frame)
            case WorkerJoined():
                if [spec.device for spec in frame.devices] != [self.name]:
                    raise TransportError(f"it has not one device that is called {self.name}")
                self._inward(structs.replace(frame, worker=self._inside_name))
            case Fetch():
                self._fetch(frame)
            case _:
                return False
        return True

    def _first(self, frame: Frame) -> bool:
        if not isinstance(frame, Machine) or frame.worker != self.name:
            return False
        refused = self._judge(frame)
        if refused is not None:
            self.refuse(refused)
            return True
        self._welcome = True
        # Before any code: what is asked of it first is fetched before it is ready.
        for model in self._models.values():
            self.link.send(ModelAdded(model=model))
        self._reaching = asyncio.get_running_loop().create_task(self._reach())
        return True

    def _inward(self, frame: Frame) -> None:
        if self._inside is None:
            self._early.append(frame)
        else:
            self._inside.send(frame)

    async def _reach(self) -> None:
        """Connect to the controller as that worker."""
        try:
            own = hello(Role.WORKER, self._inside_name)
            inside = await connect(self._controller, own, self._from_controller, self._controller_lost)
        except TransportError as error:
            self.close(str(error))
            return
        self._inside = inside
        _log.info("worker %s joins from %s", self.name, self.link.at)
        early, self._early = self._early, []
        for frame in early:
            inside.send(frame)

    # From the controller

    def _from_controller(self, link: Link, frames: list[Frame]) -> None:
        now_ns = time.monotonic_ns()
        for frame in frames:
            match frame:
                case Beat():
                    link.send(frame)  # the silence of the other link is watched there
                case Infer():
                    self._infer(frame, now_ns)
                case Load() | Unload():
                    self._actions.send(frame, now_ns)
                    self.link.send(frame)
                case CodeAdded():
                    self._codes[frame.code.code_id] = frame
                    self.link.send(frame)
                case CodeRemoved():
                    self._codes.pop(frame.code_id, None)
                    self.link.send(frame)
                case _:
                    _log.error("the controller sent a %s, which no worker takes", type(frame).__name__)

    def _infer(self, action: Infer, now_ns: int) -> None:
        found = self._actions.send_infer(action, now_ns)
        if isinstance(found, Result):
            self._inward(found)
            return
        self.link.send(found)
        self.link.queue(self._actions.inputs(action.action_id))

    def _controller_lost(self, link: Link) -> None:
        self.close(link.lost_because)

    # Artefacts

    def _fetch(self, asked: Fetch) -> None:
        """Send what it lacks, if it is among what the controller wants there or serves."""
        parts = no_parts(asked, f"{asked.what} {asked.name} is not served here")
        if asked.what == "code" and (added := self._codes.get(asked.name)) is not None:
            parts = code_parts(asked, added.code)
        elif asked.what == "weights":
            for model in self._models.values():
                if model.weights.weights_id == asked.name:
                    parts = weights_parts(asked, model.weights)
                    break
        self.link.queue(parts, bulk=True)
