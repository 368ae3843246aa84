"""What our processes tell each other: frames, tensors in shared memory, what a dead worker left behind."""

from __future__ import annotations

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Call, Extent, Frame, Infer, Window
from clockwork_serve.serve.shm import Calls, RegionMap, SpilledOutputs
from clockwork_serve.serve.transport import FrameReader, FrameWriter
from clockwork_serve.serve.worker.crash_report import read_crash_report
from tests.fuzz import mutators
from tests.fuzz.engine import Target, scratch

_FOLDER = scratch()
_NOBODY = 1 << 22
"""More than any process's number is."""


def _frames(data: bytes) -> None:
    """A byte for how it is cut, then frames; what was understood can be sent on."""
    step, rest = 1 + (data[0] if data else 0), data[1:]
    reader, frames, writer = FrameReader(), list[Frame](), FrameWriter()
    try:
        for at in range(0, len(rest), step):
            part = rest[at : at + step]
            reader.room()[: len(part)] = part
            reader.received(len(part), frames)
    finally:
        for frame in frames:
            writer.add(frame)
        again = list[Frame]()
        content = writer.take()
        if 0 < len(content) < 100_000:
            other = FrameReader()
            other.room()[: len(content)] = content
            other.received(len(content), again)
        assert len(again) == len(frames)


class _OneRegion(RegionMap):
    """Region ``r`` is some memory of this process; others are looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memoryview(bytearray(4096))
        self.memory[0] = 7

    def view(self, name: str) -> memoryview:
        return self.memory if name == "r" else super().view(name)


_CALLS = Calls(_OneRegion(), SpilledOutputs(0))


def _tensor_calls(data: bytes) -> None:
    action = Infer(
        action_id=1, device="d", model="m/1", code_id="c", extent=Extent(first=0, count=1), version=1,
        batch=1, calls=(Call(request_id="r1", rows=1, tensors=data),),
        window=Window(earliest_ns=0, latest_ns=1), expected_ns=1,
    )  # fmt: skip
    for call in _CALLS.open(action):
        for array in call.inputs.values():
            array.tolist()


def _region_names(data: bytes) -> None:
    regions = RegionMap()
    regions.view(data.decode(errors="replace"))


def _crash_report(data: bytes) -> None:
    (_FOLDER / f"w.{_NOBODY}.box").write_bytes(data)
    msgspec.msgpack.encode(read_crash_report(_FOLDER, "w", _NOBODY))


TARGETS = (
    Target("frames", _frames, (TransportError,), mutators.headed(1, mutators.framed(mutators.as_msgpack))),
    Target("tensor_calls", _tensor_calls, (TransportError,), mutators.as_msgpack),
    Target("region_names", _region_names, (TransportError,), mutators.text),
    Target("crash_report", _crash_report, (), mutators.raw),
)
