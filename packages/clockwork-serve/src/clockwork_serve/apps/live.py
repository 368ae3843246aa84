"""The live page of one journal, finished or growing, on this machine's own address."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Final

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.http.live import LivePage, PageServer
from clockwork_serve.telemetry.following import JournalFollower, numbered
from clockwork_serve.telemetry.journal import JournalHead, Step, journal_bytes
from clockwork_serve.telemetry.live import LiveLimits, LiveView
from clockwork_serve.units import NS_PER_S

SLICE_S: Final = 0.01  # how long records are taken before readers are answered
POLL_S: Final = 0.1


def records(path: Path) -> Generator[JournalHead | Step | None, None, None]:
    """The records of a journal, then those that are added to it; None where there are no more by now.

    Raises :class:`ConfigError` where there is no journal.
    """
    journal_bytes(path)
    follower = JournalFollower(path)
    try:
        while True:
            for _, record in numbered(follower):
                yield record
            yield None
    finally:
        follower.close()


class JournalPlayer:
    """Feeds a view from a journal: as fast as it can be read or, with ``speed``, as it happened times that.

    Raises :class:`ConfigError` where there is no journal.
    """

    def __init__(self, path: Path, view: LiveView, speed: float | None = None) -> None:
        self._records = records(path)
        self._view = view
        self._speed = speed
        self._began_s = 0.0
        self._next: JournalHead | Step | None = next(self._records, None)

    async def run(self) -> None:
        """Until cancelled."""
        self._began_s = time.monotonic()
        with closing(self._records):
            while True:  # noqa: ASYNC110 - the journal is a file, and tells nobody
                await asyncio.sleep(self._slice())

    def _slice(self) -> float:
        """Take records for a moment; how long to wait until more can be had."""
        until_s = time.monotonic() + SLICE_S
        while (now_s := time.monotonic()) < until_s:
            record = self._next
            if record is None:
                self._next = next(self._records, None)
                if self._next is None:
                    return POLL_S
                continue
            if isinstance(record, Step) and (early_s := self._early_s(record, now_s)) > 0:
                return min(early_s, POLL_S)
            self._view.on_record(record)
            self._next = next(self._records, None)
        return 0.0

    def _early_s(self, step: Step, now_s: float) -> float:
        """How long before its time a step is."""
        if self._speed is None:
            return 0.0
        began_ns = step.now_ns if self._view.began_ns is None else self._view.began_ns
        played_s = (step.now_ns + self._view.offset_ns - began_ns) / NS_PER_S
        return played_s / self._speed - (now_s - self._began_s)


async def show(
    path: Path, *, port: int, limits: LiveLimits, speed: float | None, tell: Callable[[str], None],
    stop: asyncio.Event,
) -> None:  # fmt: skip
    """Serve the page of a journal until ``stop``; ``tell`` gets its address.

    Raises :class:`ConfigError` where there is no journal or the port cannot be had.
    """
    view = LiveView(limits)
    player = JournalPlayer(path, view, speed)
    key = secrets.token_urlsafe(16)
    server = PageServer(LivePage(view), key=key)
    try:
        found = await server.listen(port)
    except OSError as error:
        raise ConfigError(
            f"port: expected a free one; found {port}: {error.strerror}; choose another, or 0"
        ) from None
    tell(f"http://127.0.0.1:{found}/?key={key}")
    tasks = {asyncio.ensure_future(player.run()), asyncio.ensure_future(stop.wait())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        server.close()
