"""A worker on another machine as the bridge represents it: two links, actions in flight, network time."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

from msgspec import structs

from clockwork_serve.errors import DeviceError, ModelError, TransportError
from clockwork_serve.messages import (
    ArtefactDamaged,
    Beat,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    DeviceNumbers,
    FarGateway,
    Fetch,
    Frame,
    Hello,
    Infer,
    Load,
    MachineHello,
    Model,
    ModelAdded,
    ModelRemoved,
    Piece,
    Refused,
    Result,
    Role,
    Status,
    TensorRef,
    Unload,
    Window,
    WorkerJoined,
)
from clockwork_serve.serve.remote.link import MachineLink, decode, on_the_way, packed, pieces, run_bytes
from clockwork_serve.serve.remote.transfer import code_parts, no_parts, weights_parts
from clockwork_serve.serve.shm import (
    BadTensors,
    Calls,
    OpenCall,
    RegionGone,
    RegionMap,
    SpilledOutputs,
    check_epochs,
    encode_outputs,
)
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
        on_gone: Callable[[Peer], None],
    ) -> None:  # fmt: skip
        self.link = link
        self.name = link.peer.name
        self.models = models
        self._reach_controller = reach
        self._judge = judge
        self._on_gone = on_gone
        self._inside: Link | None = None
        self._welcome = False  # it was admitted
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
        _log.info("%s %s at %s is gone: %s", self.role, self.name, self.link.at, why)
        if self._reaching is not None:
            self._reaching.cancel()
        if self._inside is not None:
            self._inside.close()
        self.link.close()
        self._on_gone(self)

    def refuse(self, refused: Refused) -> None:
        """Send why it may not join, and close the link."""
        _log.error("%s %s at %s may not join: %s", self.role, self.name, self.link.at, refused.why)
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
                known = self.from_there(frame) if self._welcome else self._first(frame)
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
        self._welcome = True
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
        self._inside = inside
        _log.info("%s %s joins from %s", self.role, self.name, self.link.at)
        early, self._early = self._early, []
        for frame in early:
            inside.send(frame)

    def _controller_lost(self, link: Link) -> None:
        self.close(link.lost_because)


# ------------------------------------------------------------
# The duration of an INFER on another machine as the controller should see it: with the time that its inputs
# and outputs take on the network, so that this becomes part of the estimates.


KEYS_MAX: Final = 1024
"""For how many kinds of INFERs the network time is remembered."""
_FADE: Final = 8
"""The longest network time decays by this part with each sample that is shorter."""

Key = tuple[str, int, int]
"""The kind of an INFER: code, batch size, bytes of inputs."""


class LaneTiming:
    """The timing of the INFERs of one device."""

    def __init__(self) -> None:
        self._ended_ns = 0  # when the last result was received
        self._way_ns: dict[Key, int] = {}  # how long inputs took lately

    def ordered(self, action: Infer, key: Key) -> Infer:
        """An INFER with its window extended by the time that its inputs take on the network."""
        way_ns = self._way_ns.get(key, 0)
        if not way_ns:
            return action
        window = Window(action.window.earliest_ns, action.window.latest_ns + way_ns)
        return structs.replace(action, window=window)

    def ended(self, result: Result, key: Key, sent_ns: int, now_ns: int, output_bytes: int) -> Result:
        """The result, complete at ``now_ns``, of an INFER sent at ``sent_ns``, with instants of our clock."""
        if result.status is not Status.OK:
            return structs.replace(result, started_ns=now_ns, ended_ns=now_ns)
        lane_ns = max(0, result.lane_ns)
        # Since the result before this one it had the lane, or the network, for itself.
        started_ns = min(max(sent_ns, self._ended_ns), now_ns - lane_ns)
        self._ended_ns = now_ns
        over_ns = now_ns - started_ns - lane_ns
        in_ns = over_ns * (key[2] + 1) // (key[2] + output_bytes + 2)
        self._learn(key, in_ns)
        return structs.replace(
            result, started_ns=started_ns, ended_ns=now_ns, input_ns=result.input_ns + in_ns,
            output_ns=result.output_ns + over_ns - in_ns,
        )  # fmt: skip

    def _learn(self, key: Key, in_ns: int) -> None:
        old_ns = self._way_ns.pop(key, 0)
        if len(self._way_ns) >= KEYS_MAX:
            del self._way_ns[next(iter(self._way_ns))]
        self._way_ns[key] = max(in_ns, old_ns - old_ns // _FADE)


def not_after(result: Result, now_ns: int) -> Result:
    """The result of a LOAD or UNLOAD, moved so that it does not end in the future: clocks have an error."""
    ahead_ns = result.ended_ns - now_ns
    if ahead_ns <= 0:
        return result
    return structs.replace(result, started_ns=result.started_ns - ahead_ns, ended_ns=now_ns)


# ------------------------------------------------------------
# The actions in flight on one remote worker, and the tensors of INFERs, in regions of gateways here.
#
# Outputs of an action that has ended are not written.


@dataclass(slots=True)
class _Sent:
    """An action without a result. ``calls`` of an INFER, ``packed`` its inputs as they travel.

    ``excess`` says that there was no room for its outputs.
    """

    action: Load | Unload | Infer
    at_ns: int
    calls: list[OpenCall] = field(default_factory=list)
    packed: list[tuple[TensorRef, ...]] = field(default_factory=list)
    key: Key = ("", 0, 0)
    excess: str = ""


class Actions:
    """The actions in flight on one worker, ``spill_bytes`` for large outputs. For one thread."""

    def __init__(self, spill_bytes: int) -> None:
        self.regions = RegionMap()
        self.spill = SpilledOutputs(spill_bytes)
        self._calls = Calls(self.regions, self.spill)
        self._sent: dict[int, _Sent] = {}  # all and only actions in flight
        self._timing: dict[str, LaneTiming] = {}  # by device

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, action: Load | Unload, now_ns: int) -> None:
        """Register a LOAD or UNLOAD, which the caller forwards unchanged."""
        self._sent[action.action_id] = _Sent(action, now_ns)

    def send_infer(self, action: Infer, now_ns: int) -> Infer | Result:
        """The INFER to send, followed by its :meth:`inputs`; or its result, if its tensors are gone."""
        try:
            calls = self._calls.open(action)
        except (RegionGone, BadTensors) as error:
            status = Status.INPUT_GONE if isinstance(error, RegionGone) else Status.BAD_ACTION
            return _refusal(action, status, str(error), now_ns)
        runs = [packed(call.tensors.refs) for call in calls]
        key = (action.code_id, action.batch, sum(map(run_bytes, runs)))
        self._sent[action.action_id] = _Sent(action, now_ns, calls, runs, key)
        bare = tuple(
            [
                structs.replace(call, tensors=on_the_way(run, opened.tensors.output_bytes))
                for call, run, opened in zip(action.calls, runs, calls, strict=True)
            ]
        )
        return self._of(action.device).ordered(structs.replace(action, calls=bare), key)

    def inputs(self, action_id: int) -> Iterator[Frame]:
        """The inputs of an INFER in pieces; ends early once it is no longer in flight."""
        sent = self._sent.get(action_id)
        for at, call in enumerate(sent.calls if sent is not None else ()):
            assert sent is not None
            refs, run = call.tensors.refs, sent.packed[at]
            for offset, data in pieces(refs, run, call.memory, lambda: action_id in self._sent):
                yield Piece(action_id=action_id, call=at, at=offset, data=data)

    def write(self, piece: Piece) -> None:
        """Write a piece of outputs. Raises :class:`TransportError` if it is outside of the output memory."""
        sent = self._sent.get(piece.action_id)
        if sent is None or not 0 <= piece.call < len(sent.calls):
            raise TransportError(f"it sent outputs of action {piece.action_id}, which it was not given")
        call = sent.calls[piece.call]
        if piece.grown > len(call.output) and not sent.excess:
            try:
                call.grow(piece.grown)
            except ModelError as error:
                sent.excess = str(error)
        if sent.excess:
            return
        end = piece.at + len(piece.data)
        if piece.at < 0 or end > len(call.output):
            raise TransportError(
                f"it sent outputs of {len(piece.data)} bytes at {piece.at}, the room is {len(call.output)}"
            )
        call.output[piece.at : end] = piece.data

    def end(self, result: Result, now_ns: int) -> Result:
        """The result for the controller. Raises :class:`TransportError` if no such action is in flight."""
        sent = self._sent.pop(result.action_id, None)
        if sent is None or sent.action.device != result.device:
            raise TransportError(f"it sent a result of action {result.action_id}, which it was not given")
        if not isinstance(sent.action, Infer):
            return not_after(result, now_ns)
        if result.status is Status.OK and sent.excess:
            result = _refusal(sent.action, Status.MODEL_RAISED, sent.excess, now_ns)
        elif result.status is Status.OK:
            try:
                result = structs.replace(result, outputs=_outputs(sent, result))
            except RegionGone as error:
                result = _refusal(sent.action, Status.INPUT_GONE, str(error), now_ns)
            except DeviceError as error:
                result = _refusal(sent.action, Status.DEVICE_FAULT, str(error), now_ns)
        written = sum([ref.nbytes for call in sent.calls for ref in call.outputs])
        return self._of(result.device).ended(result, sent.key, sent.at_ns, now_ns, written)

    def _of(self, device: str) -> LaneTiming:
        return self._timing.setdefault(device, LaneTiming())


def _outputs(sent: _Sent, result: Result) -> tuple[bytes, ...]:
    if len(result.outputs) != len(sent.calls):
        raise DeviceError(f"outputs: expected those of {len(sent.calls)} calls, found {len(result.outputs)}")
    for call, encoded in zip(sent.calls, result.outputs, strict=True):
        try:
            call.outputs.extend(decode(encoded).refs)
        except TransportError as error:
            raise DeviceError(f"outputs: {error}") from None
    check_epochs(sent.calls)
    return encode_outputs(sent.calls)


def _refusal(action: Infer, status: Status, message: str, now_ns: int) -> Result:
    return Result(
        action_id=action.action_id, device=action.device, status=status, started_ns=now_ns, ended_ns=now_ns,
        message=message,
    )  # fmt: skip


# ------------------------------------------------------------
# A worker on another machine, as the bridge represents it.


class WorkerPeer(Peer):
    """A remote worker (see :class:`Peer`). ``spill_bytes``: memory for outputs that outgrow their slots."""

    role: ClassVar[Role] = Role.WORKER

    def __init__(
        self, link: MachineLink, reach: Reach, models: Mapping[str, Model], judge: Judge,
        on_gone: Callable[[Peer], None], spill_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(link, reach, models, judge, on_gone)
        self._actions = Actions(spill_bytes)
        self._codes: dict[str, CodeAdded] = {}  # that the controller sent for it

    @property
    def inside_name(self) -> str:
        """Its name at the controller, of the same form as those of the server's own workers."""
        return f"worker-{self.name}"

    def close(self, why: str) -> None:
        """Close both links, and free outputs."""
        super().close(why)
        self._actions.spill.close()

    def on_catalogue(self, frame: ModelAdded | ModelRemoved) -> None:
        """Forward it: the worker fetches the weights of all served models."""
        self.link.send(frame)

    # From there

    def introduction(self, frame: Frame) -> MachineHello | None:
        """The frame, if it introduces this worker."""
        return frame if isinstance(frame, MachineHello) and frame.worker == self.name else None

    def welcomed(self) -> None:
        """Send the models before any code, so that the worker fetches their weights before it is ready."""
        for model in self.models.values():
            self.link.send(ModelAdded(model=model))

    def from_there(self, frame: Frame) -> bool:
        """Handle outputs, results, and requests for artefacts."""
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
        """Handle actions and codes."""
        now_ns = time.monotonic_ns()
        for frame in frames:
            match frame:
                case Beat():
                    link.send(frame)  # answered here: the link to the worker has heartbeats of its own
                    self._actions.spill.free_unused()
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
        """Send an artefact, if it is a code that the controller sent for it, or weights of a served model."""
        parts = no_parts(asked, f"{asked.what} {asked.name} is not served here")
        if asked.what == "code" and (added := self._codes.get(asked.name)) is not None:
            parts = code_parts(asked, added.code)
        elif asked.what == "weights":
            for model in self.models.values():
                if model.weights.weights_id == asked.name:
                    parts = weights_parts(asked, model.weights)
                    break
        self.link.queue(parts, bulk=True)
