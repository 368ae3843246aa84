"""The supervisor's link to the controller, and what needs it: quotas, and workers that never connect."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    Ask,
    Beat,
    Drain,
    Frame,
    Quarantined,
    Question,
    QuotasSet,
    Readiness,
    Reply,
    Role,
    Unservable,
)
from clockwork_serve.serve.gateway.access import read_keys
from clockwork_serve.serve.gateway.tls import REFRESH_S, Watched
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.supervisor.processes import Supervisor
from clockwork_serve.serve.transport import Link, connect, hello, retry_s

# ------------------------------------------------------------
# The supervisor's link to the controller: connected again whenever it is lost, with the whole catalogue sent
# first.


REPLY_S: Final = 5.0
_log = logging.getLogger(__name__)


class SupervisorLink:
    """A link that, once started, is connected again whenever it is lost.

    ``catalogue`` returns the frames that each new controller is sent first. ``handlers`` get the controller's
    frames by type, but those that the link is for itself.
    """

    def __init__(self, path: Path, catalogue: Callable[[], list[Frame]]) -> None:
        self.quarantines = Quarantines()
        self.readiness = Readiness(ready=False, why="starting")
        self.connected = asyncio.Event()
        self._path = path
        self._catalogue = catalogue
        self.handlers: dict[type[Frame], Callable[[Any], None]] = {}
        self._lost = asyncio.Event()
        self._fence = Fence()
        self._link: Link | None = None
        self._replies: dict[int, asyncio.Future[Reply]] = {}  # all and only asks without a reply
        self._asks = 0
        self._drain: Drain | None = None  # once it was sent: repeated to each controller from then on
        self._lost_level = logging.WARNING  # of lost links; INFO while the server drains
        self._task: asyncio.Task[None] | None = None

    @property
    def leader(self) -> str:
        """The name of the controller that is connected; "" if none is."""
        return "" if self._link is None else self._link.peer.name

    def start(self) -> None:
        """Connect from now on."""
        self._task = asyncio.get_running_loop().create_task(self._hold())

    def send(self, *frames: Frame) -> None:
        """Send frames if a controller is connected; a later one is sent the whole catalogue instead."""
        for frame in frames:
            if isinstance(frame, Drain):
                self._drain = frame
                self._lost_level = logging.INFO
            if self._link is not None:
                self._link.send(frame)

    async def ask(self, what: Question, body: bytes = b"{}") -> dict[str, Any]:
        """Ask the controller a question; returns its decoded reply.

        Raises :class:`TransportError` if no controller is connected, or it does not reply within 5 s.
        """
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
        """Close the link, and connect no more."""
        if self._task is not None:
            self._task.cancel()
        self._reset()

    async def _hold(self) -> None:
        own, tries = hello(Role.SUPERVISOR, "keeper"), 0
        while True:
            self._lost.clear()
            try:
                link = await connect(self._path, own, self._on_frames, self._on_lost, self._fence)
            except TransportError as error:
                _log.debug("%s", error)
                tries += 1
                await asyncio.sleep(retry_s(tries))
                continue
            tries = 0
            self._link = link
            self.send(*self._catalogue())
            if self._drain is not None:
                self.send(self._drain)
            try:
                # For the controller the first question marks the end of the catalogue.
                await self.ask(Question.STATE)
            except TransportError as error:
                _log.warning("%s", error)
                if not self._lost.is_set():
                    link.close()
                    self._reset()
                    continue
            else:
                self.connected.set()
            await self._lost.wait()

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            handler = self.handlers.get(type(frame))
            match frame:
                case Readiness():
                    self.readiness = frame
                case Quarantined() | Unservable():
                    self.quarantines.update(frame)
                    if handler is not None:
                        handler(frame)
                case Reply():
                    reply = self._replies.get(frame.ask_id)
                    if reply is not None and not reply.done():
                        reply.set_result(frame)
                case Beat():
                    link.send(frame)
                case _ if handler is None:
                    kind = type(frame).__name__
                    _log.warning("the controller sent %s, which the supervisor does not expect", kind)
                case _:
                    handler(frame)

    def _on_lost(self, link: Link) -> None:
        _log.log(self._lost_level, "link lost: %s", link.lost_because)
        self._reset()
        self._lost.set()

    def _reset(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self.connected.clear()
        self.quarantines = Quarantines()  # the next controller sends its own
        self.readiness = Readiness(ready=False, why="no controller is connected")
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(TransportError("the controller went away"))


# ------------------------------------------------------------
# Workers that run and never connect: stopped while the controller was replaced, or stuck before they joined.
#
# The controller watches only workers that have connected to it, so the supervisor must find the others.


CHECK_INTERVAL_S: Final = 5.0
CHECKS_MISSED: Final = 24
"""A worker that is not connected at this many checks in a row, for two minutes, is killed: even with torch
and a GPU a start takes less."""


async def end_unconnected_workers(
    supervisor: Supervisor,
    ask_state: Callable[[], Awaitable[dict[str, Any]]],
    interval_s: float = CHECK_INTERVAL_S,
) -> None:
    """Check periodically which workers are connected, and kill those that are not for long; never returns."""
    missed: Counter[tuple[str, int]] = Counter()
    while True:
        await asyncio.sleep(interval_s)
        try:
            connected = set((await ask_state())["workers"])
        except TransportError:
            continue  # there is no controller to connect to
        before, missed = missed, Counter()
        for name in supervisor.names:
            pid = supervisor.pid(name)
            if not name.startswith("worker") or name in connected or pid is None:
                continue
            missed[name, pid] = before[name, pid] + 1
            if missed[name, pid] >= CHECKS_MISSED:
                _log.error("%s runs and does not connect: it is ended", name, extra={"pid": pid})
                supervisor.end(name)


# ------------------------------------------------------------
# The quotas of tenants, read from the file of keys, and sent to the controller again when it changes.


class Quotas:
    """The quotas in the file of keys at ``path``; none if that is empty."""

    def __init__(self, path: str) -> None:
        """Raises :class:`ConfigError`."""
        self._file = Watched((path,), lambda: _quotas(path)) if path else None

    def frames(self) -> list[Frame]:
        """The frames for a controller that has just connected."""
        return [self._file.content] if self._file is not None and self._file.content.quotas else []

    async def keep_fresh(self, send: Callable[[Frame], None]) -> None:
        """Reload the file when it changes, and send the quotas to the controller; never returns."""
        while self._file is not None:
            await asyncio.sleep(REFRESH_S)
            before = self._file.content
            if self._file.refresh() and self._file.content != before:
                _log.info("api_keys: %d tenants have a quota now", len(self._file.content.quotas))
                send(self._file.content)


def _quotas(path: str) -> QuotasSet:
    quotas = [tenant.quota for tenant in read_keys(path).tenants.values()]
    return QuotasSet(quotas=tuple([quota for quota in quotas if quota is not None]))
