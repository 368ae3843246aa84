"""Messages as frames on a link."""

from __future__ import annotations

from clockwork_serve.messages import Frame
from clockwork_serve.serve.transport import FrameWriter


def bytes_of(frames: list[Frame]) -> bytes:
    writer = FrameWriter()
    for frame in frames:
        writer.add(frame)
    return bytes(writer.take())
