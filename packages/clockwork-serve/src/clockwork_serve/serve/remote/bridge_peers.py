"""A worker on another machine as the bridge represents it: two links, actions in flight, their durations."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from statistics import median_low
from typing import ClassVar

from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Action,
    Admitted,
    ArtefactDamaged,
    Beat,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    DeviceNumbers,
    FarGateway,
    Frame,
    Hello,
    Infer,
    Load,
    MachineHello,
    Model,
    ModelAdded,
    ModelRemoved,
    Refused,
    Result,
    RetainWeights,
    Role,
    Status,
    TensorsOffered,
    TensorsReached,
    Unload,
    WeightsReady,
    WorkerJoined,
)
from clockwork_serve.serve.remote.link import Complaints, MachineLink
from clockwork_serve.serve.remote.tensor_link import decode
from clockwork_serve.serve.remote.tensors import FEW
from clockwork_serve.serve.transport import Link, OnFrames, OnLost, hello

# ------------------------------------------------------------
# A process on another machine as the bridge represents it: a link to the process, and one to the controller,
# over which it looks like a process of this machine.


_log = logging.getLogger(__name__)

Judge = Callable[[MachineHello | FarGateway], Refused | None]
Reach = Callable[[Hello, OnFrames, OnLost], Awaitable[Link]]
"""Connects to the controller, as :func:`~clockwork_serve.serve.transport.connect` does, behind the bridge's
fence."""


class Peer(ABC):
    """A remote process. ``judge`` returns why it may not join; ``on_gone`` is called once it is closed."""

    role: ClassVar[Role]

    def __init__(
        self, link: MachineLink, reach: Reach, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None], complaints: Complaints,
    ) -> None:  # fmt: skip
        self.link = link
        self.name = link.peer.name
        self.models = models
        self._reach_controller = reach
        self._judge = judge
        self._on_gone = on_gone
        self._complaints = complaints
        self._inside: Link | None = None
        self.introduced = False  # it said what it runs, and was admitted
        self._early: list[Frame] = []  # frames for the controller until that is connected
        self._reaching: asyncio.Task[None] | None = None
        self._over = False

    @property
    def same_process(self) -> tuple[int, str]:
        """What identifies the process, so that a new link of the same one is recognized."""
        return self.link.peer.pid, self.link.peer.boot_id

    @property
    def inside_name(self) -> str:
        """Its name at the controller."""
        return self.name

    def close(self, why: str) -> None:
        """Close both links."""
        if self._over:
            return
        self._over = True
        if self.introduced:
            _log.info("%s %s at %s is gone: %s", self.role, self.name, self.link.at, why)
        if self._reaching is not None:
            self._reaching.cancel()
        if self._inside is not None:
            self._inside.close()
        self.link.close()
        self._on_gone(self)

    def refuse(self, refused: Refused) -> None:
        """Send why it may not join, and close the link."""
        host = self.link.at.rpartition(":")[0]
        if self._complaints.new(said := f"{self.role} {self.name} at {host} may not join: {refused.why}"):
            _log.error("%s", said)
        self.link.send(refused)
        self.close("refused")

    def on_catalogue(self, frame: ModelAdded | ModelRemoved) -> None:  # noqa: B027 - optional
        """Handle a change of the served models."""

    # From there

    def on_frames(self, frames: list[Frame]) -> None:
        """Handle frames of the process; its links are closed at the first that it may not send."""
        for frame in frames:
            if self._over:
                return
            try:
                known = self.from_there(frame) if self.introduced else self._first(frame)
            except TransportError as error:
                _log.error("cut off %s %s: %s", self.role, self.name, error)
                self.close("cut off")
                return
            if not known:
                _log.error("cut off %s %s: it sent %r", self.role, self.name, type(frame).__name__)
                self.close("cut off")
                return

    @abstractmethod
    def introduction(self, frame: Frame) -> MachineHello | FarGateway | None:
        """The process's first frame, if it is a valid introduction."""

    @abstractmethod
    def from_there(self, frame: Frame) -> bool:
        """Handle a frame of the process; False if it may not send that.

        Raises :class:`TransportError` if the frame is invalid.
        """

    @abstractmethod
    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames of the controller for the process."""

    def inward(self, frame: Frame) -> None:
        """Send a frame to the controller, or keep it until that is connected."""
        if self._inside is None:
            self._early.append(frame)
        else:
            self._inside.send(frame)

    def welcomed(self) -> None:  # noqa: B027 - optional
        """Called once the process was admitted, before the controller is connected."""

    def _first(self, frame: Frame) -> bool:
        shown = self.introduction(frame)
        if shown is None:
            return False
        refused = self._judge(shown)
        if refused is not None:
            self.refuse(refused)
            return True
        self.introduced = True
        self.welcomed()
        self._reaching = asyncio.get_running_loop().create_task(self._reach())
        return True

    async def _reach(self) -> None:
        """Connect to the controller in the name of the process."""
        own = hello(self.role, self.inside_name)
        try:
            inside = await self._reach_controller(own, self.from_controller, self._controller_lost)
        except TransportError as error:
            self.close(str(error))
            return
        if self.link.own.epoch not in (0, inside.peer.epoch):
            inside.close()
            self.close("the controller that it joined leads no longer")
            return
        self._inside = inside
        _log.info("%s %s joins from %s", self.role, self.name, self.link.at)
        early, self._early = self._early, []
        for frame in early:
            inside.send(frame)

    def _controller_lost(self, link: Link) -> None:
        self.close(link.lost_because)


# ------------------------------------------------------------
# The actions in flight on one remote worker. Tensors go straight between it and gateways.


def between(result: Result, sent_ns: int, now_ns: int) -> Result:
    """A result, moved so that it neither begins before its action was sent nor ends in the future.

    Clocks of two hosts are aligned with an error.
    """
    late_ns = max(0, sent_ns - result.started_ns)
    offset_ns = min(late_ns, now_ns - result.ended_ns)  # the end counts where both cannot be
    if offset_ns == 0:
        return result
    return structs.replace(
        result, started_ns=result.started_ns + offset_ns, ended_ns=result.ended_ns + offset_ns
    )


class Actions:
    """The actions in flight on one worker, which has one device. For one thread.

    What messages take is added to the time that tensors took: the controller plans with both.
    """

    def __init__(self) -> None:
        self._sent: dict[int, tuple[Action, int]] = {}  # all and only actions in flight from here, and when
        self._alone_id = 0  # the last INFER that was sent to an idle lane
        self._way_ns = deque[int](maxlen=FEW)  # what messages of such took there and back
        self._adopted: dict[int, str] = {}  # devices of those that run since an earlier controller, by action

    def __len__(self) -> int:
        return len(self._sent) + len(self._adopted)

    def sent(self, action: Action, now_ns: int) -> None:
        """The worker is to execute an action."""
        if isinstance(action, Infer) and not any(isinstance(one, Infer) for one, _ in self._sent.values()):
            self._alone_id = action.action_id
        self._sent[action.action_id] = (action, now_ns)

    def adopt(self, joined: WorkerJoined) -> None:
        """The worker runs actions that an earlier controller sent, and will send their results here."""
        for state in joined.states:
            self._adopted.update((running.action_id, state.device) for running in state.running)

    def end(self, result: Result, now_ns: int) -> Result:
        """The result for the controller. Raises :class:`TransportError` if no such action is in flight."""
        if self._adopted.pop(result.action_id, None) == result.device:
            return between(structs.replace(result, outputs=()), 0, now_ns)  # it answers nobody
        action, sent_ns = self._sent.pop(result.action_id, (None, 0))
        if action is None or action.device != result.device:
            raise TransportError(f"it sent a result of action {result.action_id}, which it was not given")
        if isinstance(action, Infer) and result.status is Status.OK:
            try:
                _check_outputs(action, result)
            except TransportError as error:
                message = f"outputs: {error}"
                result = structs.replace(result, status=Status.DEVICE_FAULT, message=message, outputs=())
            result = self._with_messages(result, now_ns - sent_ns)
        return between(result, sent_ns, now_ns)

    def _with_messages(self, result: Result, took_ns: int) -> Result:
        in_ns, out_ns = (
            max(0, min(took_ns, value_ns)) for value_ns in (result.transfer_in_ns, result.transfer_out_ns)
        )
        if result.action_id == self._alone_id:  # nothing was before it, so what is unexplained are messages
            self._way_ns.append(max(0, took_ns - in_ns - result.lane_ns - out_ns))
        each_ns = median_low(self._way_ns or (0,)) // 2
        return structs.replace(result, transfer_in_ns=in_ns + each_ns, transfer_out_ns=out_ns + each_ns)


def _check_outputs(action: Infer, result: Result) -> None:
    """Raise :class:`TransportError` if an output may be elsewhere than in its room."""
    if len(result.outputs) != len(action.calls):
        raise TransportError(f"expected those of {len(action.calls)} calls, found {len(result.outputs)}")
    found = [decode(encoded) for encoded in result.outputs]
    if any(tensors.region for tensors in found):
        raise TransportError("expected them in the rooms of their requests, found others")


# ------------------------------------------------------------
# A worker on another machine, as the bridge represents it.


class WorkerPeer(Peer):
    """A remote worker (see :class:`Peer`)."""

    role: ClassVar[Role] = Role.WORKER

    def __init__(
        self, link: MachineLink, reach: Reach, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None], complaints: Complaints,
    ) -> None:  # fmt: skip
        super().__init__(link, reach, models, judge, on_gone, complaints)
        self._actions = Actions()

    @property
    def inside_name(self) -> str:
        """Its name at the controller, of the same form as those of the server's own workers."""
        return f"worker-{self.name}"

    def on_catalogue(self, frame: ModelAdded | ModelRemoved) -> None:
        """Forward it: the worker takes the weights of all served models from the store."""
        self.link.send(frame)

    # From there

    def introduction(self, frame: Frame) -> MachineHello | None:
        """The frame, if it introduces this worker."""
        return frame if isinstance(frame, MachineHello) and frame.worker == self.name else None

    def welcomed(self) -> None:
        """Send the models before any code, so that the worker has their weights before it is ready."""
        self.link.send(Admitted())
        for model in self.models.values():
            self.link.send(ModelAdded(model=model))

    def from_there(self, frame: Frame) -> bool:
        """Handle results, and what else a worker reports."""
        match frame:
            case Result():
                self.inward(self._actions.end(frame, time.monotonic_ns()))
            case CodeReady() | WeightsReady() | DeviceNumbers() | ArtefactDamaged() | TensorsReached():
                self.inward(frame)
            case WorkerJoined():
                of = [spec.device for spec in frame.devices]
                if of != [self.name] or [state.device for state in frame.states] not in ([], of):
                    raise TransportError(f"it has not one device that is called {self.name}")
                self._actions.adopt(frame)
                self.inward(structs.replace(frame, worker=self.inside_name))
            case _:
                return False
        return True

    # From the controller

    def from_controller(self, link: Link, frames: list[Frame]) -> None:
        """Handle actions and codes."""
        now_ns = time.monotonic_ns()
        for frame in frames:
            match frame:
                case Beat():
                    link.send(frame)  # answered here: the link to the worker has heartbeats of its own
                case Load() | Unload() | Infer():
                    self._actions.sent(frame, now_ns)
                    self.link.send(frame)
                case RetainWeights() | TensorsOffered() | CodeAdded() | CodeRemoved():
                    self.link.send(frame)
                case ModelAdded():
                    pass  # the bridge has them from its own link
                case _:
                    _log.error("the controller sent a %s, which no worker takes", type(frame).__name__)
