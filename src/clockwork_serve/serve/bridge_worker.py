"""One worker on another machine, as the bridge has it. It decides nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    ArtefactDamaged,
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
    ModelRemoved,
    Piece,
    Result,
    Role,
    Unload,
    WorkerJoined,
)
from clockwork_serve.serve.artefact_parts import code_parts, no_parts, weights_parts
from clockwork_serve.serve.bridge_actions import Actions
from clockwork_serve.serve.bridge_peer import Judge, Peer
from clockwork_serve.serve.machine_link import MachineLink
from clockwork_serve.serve.transport import Link

_log = logging.getLogger(__name__)


class WorkerPeer(Peer):
    """See :class:`Peer`."""

    role: ClassVar[Role] = Role.WORKER

    def __init__(
        self, link: MachineLink, controller: Path, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None],
    ) -> None:  # fmt: skip
        super().__init__(link, controller, models, judge, on_gone)
        self._actions = Actions()
        self._codes: dict[str, CodeAdded] = {}  # that the controller wants there

    @property
    def inside_name(self) -> str:
        """As a worker of the server's own would be called."""
        return f"worker-{self.name}"

    def on_catalogue(self, frame: ModelAdded | ModelRemoved) -> None:
        """It wants the weights of all that is served."""
        self.link.send(frame)

    # From there

    def introduction(self, frame: Frame) -> Machine | None:
        """What it runs."""
        return frame if isinstance(frame, Machine) and frame.worker == self.name else None

    def welcomed(self) -> None:
        """Before any code: what is asked of it first is fetched before it is ready."""
        for model in self.models.values():
            self.link.send(ModelAdded(model=model))

    def from_there(self, frame: Frame) -> bool:
        """Outputs, results, what it lacks."""
        match frame:
            case Piece():
                self._actions.write(frame)
            case Result():
                self.inward(self._actions.end(frame, time.monotonic_ns()))
            case CodeReady() | DeviceNumbers() | ArtefactDamaged():
                self.inward(frame)
            case WorkerJoined():
                if [spec.device for spec in frame.devices] != [self.name]:
                    raise TransportError(f"it has not one device that is called {self.name}")
                self.inward(structs.replace(frame, worker=self.inside_name))
            case Fetch():
                self._fetch(frame)
            case _:
                return False
        return True

    # From the controller

    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """Actions and codes."""
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
                case ModelAdded():
                    pass  # the bridge has them from its own link
                case _:
                    _log.error("the controller sent a %s, which no worker takes", type(frame).__name__)

    def _infer(self, action: Infer, now_ns: int) -> None:
        found = self._actions.send_infer(action, now_ns)
        if isinstance(found, Result):
            self.inward(found)
            return
        self.link.send(found)
        self.link.queue(self._actions.inputs(action.action_id))

    # Artefacts

    def _fetch(self, asked: Fetch) -> None:
        """Send what it lacks, if it is among what the controller wants there or serves."""
        parts = no_parts(asked, f"{asked.what} {asked.name} is not served here")
        if asked.what == "code" and (added := self._codes.get(asked.name)) is not None:
            parts = code_parts(asked, added.code)
        elif asked.what == "weights":
            for model in self.models.values():
                if model.weights.weights_id == asked.name:
                    parts = weights_parts(asked, model.weights)
                    break
        self.link.queue(parts, bulk=True)
