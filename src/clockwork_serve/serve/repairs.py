"""Artefacts that workers found damaged, made again from the repository; one batch at a time.

What is suspected is read anew, and set aside if it is damaged; then the models that need it are compiled, as
far as they are not there. What cannot be made again is a problem of its model, which is served no more. What
a record says of the artefact is never trusted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

from clockwork_serve.errors import ClockworkError
from clockwork_serve.messages import ArtefactDamaged, CodeRemade, DamageCounted, Frame
from clockwork_serve.serve.catalogue import Catalogue
from clockwork_serve.serve.preparation import Prepared, SuspectArtefact
from clockwork_serve.store import Damage

REST_MAX_S: Final = 60.0
"""What is damaged again and again is made again after 1, 2, 4 ... s, at most so long."""
FORGET_S: Final = 3600.0

_log = logging.getLogger(__name__)


class PrepareModels(Protocol):
    """Compiles some models after it looked at suspects."""

    def __call__(self, names: tuple[str, ...], suspects: tuple[SuspectArtefact, ...]) -> Awaitable[Prepared]:
        """What can be served of them."""


class Repairs:
    """For one loop. ``send`` tells the controller, ``report`` logs what was prepared."""

    def __init__(
        self,
        catalogue: Catalogue,
        prepare: PrepareModels,
        send: Callable[..., None],
        report: Callable[[Prepared], None],
    ) -> None:
        self._catalogue = catalogue
        self._prepare = prepare
        self._send = send
        self._report = report
        self._found: Counter[str] = Counter()
        self._remade = 0
        self._lost = 0
        self._suspects: dict[SuspectArtefact, None] = {}  # in the order they were reported
        self._repaired_s: dict[SuspectArtefact, tuple[int, float]] = {}  # how often in a row, and when last
        self._running: asyncio.Task[None] | None = None

    def on_damaged(self, damaged: ArtefactDamaged) -> None:
        """A worker cannot use an artefact; told again and again until it is whole."""
        self._suspects[SuspectArtefact(damaged.what, damaged.name)] = None
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    def count(self, damage: Iterable[Damage]) -> None:
        """Count what was set aside while models were prepared."""
        self._found.update(one.what for one in damage)

    @property
    def counted(self) -> DamageCounted:
        """All that was found since this began."""
        return DamageCounted(found=dict(self._found), remade=self._remade, lost=self._lost)

    async def close(self) -> None:
        """Repair no more; the compiler that runs for it is ended first."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))

    async def _run(self) -> None:
        try:
            while self._suspects:
                now_s = time.monotonic()
                rest_s = min(self._rest_s(suspect, now_s) for suspect in self._suspects)
                if rest_s > 0:
                    await asyncio.sleep(rest_s)
                    continue
                batch = tuple([one for one in self._suspects if self._rest_s(one, now_s) <= 0])
                try:
                    await self._repair(batch)
                except ClockworkError as error:
                    _log.error("damaged artefacts could not be made again: %s", error)
                for suspect in batch:
                    # What was reported meanwhile was read before it was whole, or is reported again.
                    self._suspects.pop(suspect, None)
        finally:
            self._running = None

    def _rest_s(self, suspect: SuspectArtefact, now_s: float) -> float:
        """How long to wait before an artefact is made once more."""
        times, last_s = self._repaired_s.get(suspect, (0, 0.0))
        return last_s + min(REST_MAX_S, 2.0 ** (times - 1)) - now_s if times else 0.0

    async def _repair(self, batch: tuple[SuspectArtefact, ...]) -> None:
        names = self._catalogue.users(batch)
        _log.warning("making again what is damaged: %s", ", ".join(f"{one.what} {one.name}" for one in batch))
        try:
            prepared = await self._prepare(names, batch)
        finally:
            self._note(batch)
        self._report(prepared)
        names = tuple(sorted(set(names) & self._catalogue.names()))  # unless it was unloaded meanwhile
        served = [each for each in prepared.served if each.model.name in names]
        gone = sorted(set(names) - {each.model.name for each in served})
        for name in gone:
            _log.error("model %s is served no more: it could not be made again", name)
        self._remade += len({(one.what, one.name) for one in prepared.damage if one.what != "record"})
        self._lost += len(gone)
        problems = [problem for problem in prepared.problems if problem.model in names]
        frames: list[Frame] = self._catalogue.put(names, served, prepared.profiles, problems)
        frames += [CodeRemade(code_id=one.name) for one in batch if one.what == "code"]
        self._send(*frames, self.counted)

    def _note(self, batch: tuple[SuspectArtefact, ...]) -> None:
        now_s = time.monotonic()
        for suspect in batch:
            times, last_s = self._repaired_s.get(suspect, (0, now_s))
            self._repaired_s[suspect] = (1 if now_s - last_s > FORGET_S else times + 1, now_s)
        for suspect in [one for one, (_, last_s) in self._repaired_s.items() if now_s - last_s > FORGET_S]:
            del self._repaired_s[suspect]
