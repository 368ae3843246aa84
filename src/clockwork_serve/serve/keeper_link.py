"""The keeper's link to the controller: held, re-made, and told everything each time. It decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    ArtefactDamaged,
    Ask,
    Beat,
    Drain,
    Frame,
    Quarantined,
    Question,
    Readiness,
    Reply,
    Role,
    WorkerHung,
)
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.transport import Link, connect, hello

RETRY_S: Final = 0.02
REPLY_S: Final = 5.0
_log = logging.getLogger(__name__)


class ControllerLink:
    """A link that is connected again whenever it is lost.

    ``catalogue`` gives the frames that each new controller is told first; ``on_ask`` gets its questions,
    ``on_quarantined`` word of each model that comes into quarantine, ``on_hung`` of workers to end,
    ``on_damaged`` of artefacts that a worker cannot use.
    """

    def __init__(
        self,
        path: Path,
        catalogue: Callable[[], list[Frame]],
        on_ask: Callable[[Ask], None],
        on_quarantined: Callable[[], None] = lambda: None,
        on_hung: Callable[[WorkerHung], None] = lambda hung: None,
        on_damaged: Callable[[ArtefactDamaged], None] = lambda damaged: None,
    ) -> None:
        self.quarantines = Quarantines()
        self.readiness = Readiness(ready=False, why="starting")
        self.connected = asyncio.Event()
        self._path = path
        self._catalogue = catalogue
        self._on_ask = on_ask
        self._on_quarantined = on_quarantined
        self._on_hung = on_hung
        self._on_damaged = on_damaged
        self._lost = asyncio.Event()
        self._link: Link | None = None
        self._replies: dict[int, asyncio.Future[Reply]] = {}  # all and only asks without a reply
        self._asks = 0
        self._drain: Drain | None = None  # once it was sent: every controller from then on is to drain
        self._lost_level = logging.WARNING  # a lost link is news, unless we are stopping
        self._task = asyncio.get_running_loop().create_task(self._hold())

    def send(self, *frames: Frame) -> None:
        """Send, if there is a controller; one that comes later is told the catalogue instead."""
        for frame in frames:
            if isinstance(frame, Drain):
                self._drain = frame
                self._lost_level = logging.INFO
            if self._link is not None:
                self._link.send(frame)

    async def ask(self, what: Question, body: bytes = b"{}") -> dict[str, Any]:
        """The answer of the controller itself. Raises :class:`TransportError` if none comes."""
        if self._link is None:
            raise TransportError("the controller is not connected")
        self._asks = ask_id = self._asks + 1
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[ask_id] = reply
        self._link.send(Ask(ask_id=ask_id, what=what, body=body))
        try:
            answer = await asyncio.wait_for(reply, REPLY_S)
        except TimeoutError:
            raise TransportError(f"the controller did not answer within {REPLY_S:.0f} s") from None
        finally:
            self._replies.pop(ask_id, None)
        found: dict[str, Any] = msgspec.json.decode(answer.body)
        return found

    def close(self) -> None:
        """Let go of the controller."""
        self._task.cancel()
        self._forget()

    async def _hold(self) -> None:
        own = hello(Role.KEEPER, "keeper")
        while True:
            self._lost.clear()
            try:
                link = await connect(self._path, own, self._on_frames, self._on_lost)
            except TransportError as error:
                _log.debug("%s", error)
                await asyncio.sleep(RETRY_S)
                continue
            self._link = link
            self.send(*self._catalogue())
            if self._drain is not None:
                self.send(self._drain)
            try:
                # A question tells the controller that the catalogue is complete.
                await self.ask(Question.STATE)
            except TransportError as error:
                _log.warning("%s", error)
                if not self._lost.is_set():
                    link.close()
                    self._forget()
                    continue
            else:
                self.connected.set()
            await self._lost.wait()

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            match frame:
                case Readiness():
                    self.readiness = frame
                case Quarantined():
                    self.quarantines.take(frame)
                    if frame.why:
                        self._on_quarantined()
                case Reply():
                    reply = self._replies.get(frame.ask_id)
                    if reply is not None and not reply.done():
                        reply.set_result(frame)
                case Ask():
                    self._on_ask(frame)
                case WorkerHung():
                    self._on_hung(frame)
                case Beat():
                    link.send(frame)
                case ArtefactDamaged():
                    self._on_damaged(frame)
                case _:
                    _log.warning(
                        "the controller sent %s, which the keeper does not expect", type(frame).__name__
                    )

    def _on_lost(self, link: Link) -> None:
        _log.log(self._lost_level, "link lost: %s", link.lost_because)
        self._forget()
        self._lost.set()

    def _forget(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self.connected.clear()
        self.quarantines = Quarantines()  # whoever comes next knows of none
        self.readiness = Readiness(ready=False, why="the controller is gone")
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(TransportError("the controller went away"))
