"""Links with what they delivered, the controller as the supervisor's link sees it, and messages as frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clockwork_serve.messages import Ask, Cancel, Frame, Hello, Reply, Role
from clockwork_serve.serve.transport import FrameWriter, Link, Listener, connect, hello, listen

# Links between processes: what one end received, and waiting for it.


CONTROLLER = hello(Role.CONTROLLER, "controller")


class Side:
    """Records what one side of a link receives."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.reads: list[list[Frame]] = []
        self.lost: list[Link] = []
        self.reply: Callable[[Link, Frame], None] | None = None

    def on_link(self, link: Link) -> None:
        self.links.append(link)

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        self.reads.append(frames)
        for frame in frames:
            if self.reply is not None:
                self.reply(link, frame)

    def on_lost(self, link: Link) -> None:
        self.lost.append(link)

    @property
    def frames(self) -> list[Frame]:
        return [frame for read in self.reads for frame in read]

    async def listen(self, path: Path, own: Hello = CONTROLLER) -> Listener:
        return await listen(path, own, self.on_link, self.on_frames, self.on_lost)

    async def connect(self, path: Path, role: Role = Role.WORKER, **fields: Any) -> Link:
        own = msgspec.structs.replace(hello(role, "peer"), **fields)
        return await connect(path, own, self.on_frames, self.on_lost)


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def cancels(count: int) -> list[Frame]:
    return [Cancel(request_id=f"r{i}") for i in range(count)]


# The controller as the supervisor's link sees it.


class FakeController:
    """Answers STATE, and keeps the frames that it received."""

    def __init__(self) -> None:
        self.told: list[Frame] = []
        self.links: list[Link] = []
        self.silent = False

    async def listen(self, path: Path, epoch: int = 0) -> Listener:
        own = hello(Role.CONTROLLER, "controller", epoch)
        return await listen(path, own, self.links.append, self._on_frames, lambda link: None)

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        self.told += frames
        for frame in frames:
            if isinstance(frame, Ask) and not self.silent:
                link.send(Reply(ask_id=frame.ask_id, ok=True, body=msgspec.json.encode({"open": 3})))


# Messages as frames on a link.


def bytes_of(frames: list[Frame]) -> bytes:
    writer = FrameWriter()
    for frame in frames:
        writer.add(frame)
    return bytes(writer.take())
