"""Links between processes: what one end received, and waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clockwork_serve.messages import (
    Cancel,
    Frame,
    Hello,
    Role,
)
from clockwork_serve.serve.transport import Link, Listener, connect, hello, listen

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


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def cancels(count: int) -> list[Frame]:
    return [Cancel(request_id=f"r{i}") for i in range(count)]
