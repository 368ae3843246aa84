"""The controller as the supervisor's link sees it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clockwork_serve.messages import (
    Ask,
    Frame,
    Reply,
    Role,
)
from clockwork_serve.serve.transport import Link, Listener, hello, listen


class FakeController:
    """Answers STATE, and keeps the frames that it received."""

    def __init__(self) -> None:
        self.told: list[Frame] = []
        self.links: list[Link] = []
        self.silent = False

    async def listen(self, path: Path) -> Listener:
        return await listen(
            path, hello(Role.CONTROLLER, "controller"), self.links.append, self._on_frames, lambda link: None
        )

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        self.told += frames
        for frame in frames:
            if isinstance(frame, Ask) and not self.silent:
                link.send(Reply(ask_id=frame.ask_id, ok=True, body=msgspec.json.encode({"open": 3})))
