"""What is in flight on one machine's worker: INFERs with their tensors, in regions of gateways here.

It decides nothing. Nothing is written for an action that has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import structs

from clockwork_serve.errors import DeviceError, TransportError
from clockwork_serve.messages import Frame, Infer, Load, Piece, Result, Status, TensorRef, Unload
from clockwork_serve.serve.bridge_timing import Key, LaneTiming, not_after
from clockwork_serve.serve.calls import BadTensors, Calls, OpenCall, check_epochs, encode_outputs
from clockwork_serve.serve.piece_layout import decode, on_the_way, packed, pieces, run_bytes
from clockwork_serve.serve.region import RegionGone, RegionMap


@dataclass(slots=True)
class _Sent:
    """An action without a result. ``calls`` of an INFER, ``packed`` its inputs as they travel."""

    action: Load | Unload | Infer
    at_ns: int
    calls: list[OpenCall] = field(default_factory=list)
    packed: list[tuple[TensorRef, ...]] = field(default_factory=list)
    key: Key = ("", 0, 0)


class Actions:
    """Of one worker. For one thread."""

    def __init__(self) -> None:
        self.regions = RegionMap()
        self._calls = Calls(self.regions)
        self._sent: dict[int, _Sent] = {}  # all and only actions in flight
        self._timing: dict[str, LaneTiming] = {}  # by device

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, action: Load | Unload, now_ns: int) -> None:
        """It is passed on as it is."""
        self._sent[action.action_id] = _Sent(action, now_ns)

    def send_infer(self, action: Infer, now_ns: int) -> Infer | Result:
        """What to send there, before the :meth:`inputs`; or, if its tensors are gone, its result."""
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
        """The inputs of an INFER, as long as it is in flight."""
        sent = self._sent.get(action_id)
        for at, call in enumerate(sent.calls if sent is not None else ()):
            assert sent is not None
            refs, run = call.tensors.refs, sent.packed[at]
            yield from pieces(action_id, at, refs, run, call.memory, lambda: action_id in self._sent)

    def write(self, piece: Piece) -> None:
        """Outputs came. Raises :class:`TransportError` if they lie outside of their room."""
        sent = self._sent.get(piece.action_id)
        if sent is None or not 0 <= piece.call < len(sent.calls):
            raise TransportError(f"it sent outputs of action {piece.action_id}, which it was not given")
        room = sent.calls[piece.call].buffers.output
        end = piece.at + len(piece.data)
        if piece.at < 0 or end > len(room):
            raise TransportError(
                f"it sent outputs of {len(piece.data)} bytes at {piece.at}, the room is {len(room)}"
            )
        room[piece.at : end] = piece.data

    def end(self, result: Result, now_ns: int) -> Result:
        """The result as the controller gets it. Raises :class:`TransportError` if none was due."""
        sent = self._sent.pop(result.action_id, None)
        if sent is None or sent.action.device != result.device:
            raise TransportError(f"it sent a result of action {result.action_id}, which it was not given")
        if not isinstance(sent.action, Infer):
            return not_after(result, now_ns)
        if result.status is Status.OK:
            try:
                result = structs.replace(result, outputs=_outputs(sent, result))
            except RegionGone as error:
                result = _refusal(sent.action, Status.INPUT_GONE, str(error), now_ns)
            except DeviceError as error:
                result = _refusal(sent.action, Status.DEVICE_FAULT, str(error), now_ns)
        written = sum([ref.nbytes for call in sent.calls for ref in call.buffers.outputs])
        return self._of(result.device).ended(result, sent.key, sent.at_ns, now_ns, written)

    def _of(self, device: str) -> LaneTiming:
        return self._timing.setdefault(device, LaneTiming())


def _outputs(sent: _Sent, result: Result) -> tuple[bytes, ...]:
    if len(result.outputs) != len(sent.calls):
        raise DeviceError(f"outputs: expected those of {len(sent.calls)} calls, found {len(result.outputs)}")
    for call, encoded in zip(sent.calls, result.outputs, strict=True):
        try:
            call.buffers.outputs.extend(decode(encoded).refs)
        except TransportError as error:
            raise DeviceError(f"outputs: {error}") from None
    check_epochs(sent.calls)
    return encode_outputs(sent.calls)


def _refusal(action: Infer, status: Status, message: str, now_ns: int) -> Result:
    return Result(
        action_id=action.action_id, device=action.device, status=status, started_ns=now_ns, ended_ns=now_ns,
        message=message,
    )  # fmt: skip
