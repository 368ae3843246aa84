"""A controller's part in tests of workers: accepts them, orders what the test says, keeps the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from clockwork_serve.messages import Frame, Role
from clockwork_serve.serve.transport import Link, Listener, hello, listen

Wanted = TypeVar("Wanted", bound=Frame)
PATIENCE_S = 120.0


class Orders:
    """Listens where a controller would; one worker at a time."""

    def __init__(self, run_dir: Path, role: Role = Role.CONTROLLER, epoch: int = 0) -> None:
        self.path = run_dir / "controller.sock"
        self.role = role
        self.epoch = epoch
        self.heard: asyncio.Queue[Frame] = asyncio.Queue()
        self.lost = asyncio.Event()
        self._linked: asyncio.Queue[Link] = asyncio.Queue()
        self._listener: Listener | None = None
        self._link: Link | None = None

    async def open(self) -> None:
        own = hello(self.role, "controller", self.epoch)
        self._listener = await listen(self.path, own, self._on_link, self._on_frames, self._on_lost)

    def close(self) -> None:
        """Die: every link breaks."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def linked(self) -> Link:
        self._link = await asyncio.wait_for(self._linked.get(), PATIENCE_S)
        return self._link

    def send(self, *frames: Frame) -> None:
        assert self._link is not None
        for frame in frames:
            self._link.send(frame)

    async def hear(self, kind: type[Wanted]) -> Wanted:
        """The next frame, which must be of this kind."""
        frame = await asyncio.wait_for(self.heard.get(), PATIENCE_S)
        assert isinstance(frame, kind), f"expected {kind.__name__}, heard {frame}"
        return frame

    async def ask(self, frame: Frame, kind: type[Wanted]) -> Wanted:
        self.send(frame)
        return await self.hear(kind)

    def _on_link(self, link: Link) -> None:
        self._linked.put_nowait(link)

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            self.heard.put_nowait(frame)

    def _on_lost(self, link: Link) -> None:
        self.lost.set()


@asynccontextmanager
async def orders(run_dir: Path) -> AsyncIterator[Orders]:
    made = Orders(run_dir)
    await made.open()
    try:
        yield made
    finally:
        made.close()
