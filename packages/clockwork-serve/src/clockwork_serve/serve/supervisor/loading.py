"""Loading of models: those present at the start in batches, the most asked for first; others when asked.

It decides what is prepared next, and when what was prepared is served. It compiles and measures nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import msgspec
from msgspec.structs import replace

from clockwork_serve.errors import ClockworkError, RepositoryError, TransportError
from clockwork_serve.messages import (
    CodeRemade,
    CodeRemoved,
    Frame,
    ModelRemoved,
    ModelsAskedFor,
    Preparing,
    Question,
    ReleaseFromQuarantine,
)
from clockwork_serve.serve.supervisor.catalogue import Catalogue, Repairs
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.serve.supervisor.link import SupervisorLink
from clockwork_serve.serve.supervisor.preparation import (
    OnPart,
    OnProgress,
    PreparedRepository,
    StartProgress,
    Steering,
)
from clockwork_serve.store import Problem, StoreConfig, opened
from clockwork_serve.store.repository import model_names
from clockwork_serve.store.settings import shortened

POLL_S: Final = 0.02
SETTLE_S: Final = 60.0  # how long devices may take to prepare the codes that they were sent
REPLACED_GRACE_S: Final = 5.0  # how long a version that was replaced is kept for requests that wait for it
LOST_MAX: Final = 3  # how often preparing a repository may end unexpectedly, and is begun again
FOLLOW_S: Final = 5.0  # how often a controller that stands by looks whether the store has another catalogue
REFINE_POLL_S: Final = 5.0
REFINE_IDLE_S: Final = 20.0
"""Profiles that were measured beside other work are measured again once no request came for so long."""
REFINE_CODES: Final = 8  # how many are measured again between two looks whether requests come

_log = logging.getLogger(__name__)


class PrepareNamed(Protocol):
    """See ``__call__``."""

    async def __call__(
        self, names: tuple[str, ...], *, on_progress: OnProgress | None = None, again: bool = False
    ) -> PreparedRepository:
        """Compile and profile the models of these names, in a child process."""


PrepareAll = Callable[[OnProgress, OnPart, Steering], Awaitable[PreparedRepository]]
"""Compiles and profiles the whole repository in a child process, in parts; returns the last of them."""


class NotInRepository(RepositoryError):
    """The repository has no model of that name."""


class Loader:
    """Loads models into ``catalogue``, and tells the controller over ``link``.

    ``report`` logs what was prepared, ``check_running`` raises if a process keeps failing.
    """

    def __init__(
        self, config: ServerConfig, catalogue: Catalogue, link: SupervisorLink, repairs: Repairs, *,
        prepare: PrepareNamed, prepare_all: PrepareAll, report: Callable[[PreparedRepository], None],
        check_running: Callable[[], None],
    ) -> None:  # fmt: skip
        self._repository = config.settings.repository
        self._store = config.store
        self._catalogue = catalogue
        self._link = link
        self._repairs = repairs
        self._prepare = prepare
        self._prepare_all = prepare_all
        self._report = report
        self._check_running = check_running
        # At a start, models do not wait for devices of other machines.
        self._own_devices = frozenset(device.device for device in config.devices)
        # How often each model was asked for that was present at the start, and waits to be prepared.
        self._waiting: dict[str, int] = {}
        self._total = 0
        self._problems: list[Problem] = []
        self._steering = Steering()
        self._rough: set[str] = set()  # ids of codes that were measured beside other work

    # Those present at the start

    @property
    def preparing(self) -> Preparing:
        """What is still to be prepared of the models present at the start."""
        return Preparing(waiting=tuple(self._waiting), total=self._total)

    async def find_all(self) -> None:
        """Find the models that are present. Raises :class:`RepositoryError` if there are none."""
        names, misplaced = await asyncio.to_thread(_present, self._repository, self._store)
        self._problems += misplaced
        for problem in misplaced:
            _log.error("%s", problem)
        if not names:
            raise RepositoryError(_nothing_to_serve(self._problems))
        self._waiting = dict.fromkeys(sorted(names), 0)
        self._total = len(self._waiting)

    async def load_all(self, on_progress: OnProgress) -> None:
        """Prepare and serve all that were found; returns once each is served or has a problem.

        Raises :class:`RepositoryError` if none can be served.
        """

        def report(child: StartProgress) -> None:
            what = "compiling" if child.stage == "compile" else "profiling"
            on_progress(self._progress(f"{what} {child.done} of {child.total}: {child.text}"))

        parts: asyncio.Queue[PreparedRepository | None] = asyncio.Queue()
        serving = asyncio.ensure_future(self._serve_parts(parts))
        preparing = asyncio.ensure_future(self._prepare_parts(report, parts.put_nowait))
        try:
            await asyncio.wait((preparing, serving), return_when=asyncio.FIRST_EXCEPTION)
            for ended in (serving, preparing):
                if ended.done():
                    ended.result()
            await serving
        finally:
            for task in (preparing, serving):
                task.cancel()
            await asyncio.wait((preparing, serving))
        self._done(tuple(self._waiting))  # whose folders are no more
        on_progress(self._progress("done"))
        if not self._catalogue.models and self._problems:
            raise RepositoryError(_nothing_to_serve(self._problems))

    def asked_for(self, asked: ModelsAskedFor) -> None:
        """Prepare the models that clients ask for before others, the most asked for first."""
        for name, requests in asked.requests.items():
            if name in self._waiting:
                self._waiting[name] += requests
        wanted = [name for name, requests in self._waiting.items() if requests]
        self._steering.set_urgent(sorted(wanted, key=lambda name: -self._waiting[name]))

    def _progress(self, text: str) -> StartProgress:
        return StartProgress(stage="prepare", done=self.preparing.done, total=self._total, text=text)

    async def _prepare_parts(
        self, report: OnProgress, on_part: Callable[[PreparedRepository | None], None]
    ) -> None:
        """Prepare the repository; begin again if that ends unexpectedly, and something was prepared."""
        for attempt in range(LOST_MAX):
            before = len(self._waiting)
            try:
                on_part(await self._prepare_all(report, on_part, self._steering))
                break
            except RepositoryError as error:
                if attempt == LOST_MAX - 1 or len(self._waiting) == before:
                    raise
                _log.error("preparing models begins again: %s", error)
        on_part(None)

    async def _serve_parts(self, parts: asyncio.Queue[PreparedRepository | None]) -> None:
        while (part := await parts.get()) is not None:
            # What was loaded or unloaded meanwhile, on request, stays as it is.
            names = tuple([name for name in part.names if name in self._waiting])
            part = replace(
                part, names=names,
                served=tuple([each for each in part.served if each.model.name in names]),
                problems=tuple([problem for problem in part.problems if problem.model in names]),
            )  # fmt: skip
            self._report(part)
            await self._serve(part)

    async def _serve(self, part: PreparedRepository) -> None:
        """Serve what was prepared; it waits no more once devices have prepared its codes.

        The controller is told of the models before, so that it knows which one kills those that prepare it.
        One without devices here may stand by, and is told all once it leads.
        """
        while self._own_devices and not self._link.connected.is_set():
            self._check_running()
            await asyncio.sleep(POLL_S)
        self._rough |= part.measured
        self._problems += part.problems
        frames = self._catalogue.put(part)
        self._link.send(*frames)
        if frames and self._own_devices and not await self._settled(self._own_devices):
            _log.warning("devices have not prepared all codes within %.0f s", SETTLE_S)
        self._done(part.names)
        if self._catalogue.models:
            self._steering.give_way()

    def _done(self, names: Iterable[str]) -> None:
        """These models wait no more: they are served, unloaded, or have a problem."""
        before = len(self._waiting)
        for name in names:
            self._waiting.pop(name, None)
        if len(self._waiting) < before:
            self._link.send(self.preparing)

    async def follow(self) -> None:
        """Keep to the catalogue as builders change it, while this controller stands by; never returns."""
        from clockwork_serve.store.catalogue import newest_of

        newest = newest_of(self._store.shared)
        known = await asyncio.to_thread(newest)
        while True:
            await asyncio.sleep(FOLLOW_S)
            found = await asyncio.to_thread(newest)
            if found in ("", known) or self._waiting or self._link.connected.is_set():
                continue
            parts: list[PreparedRepository] = []
            with suppress(ClockworkError):
                parts.append(await self._prepare_all(lambda _: None, parts.append, Steering()))
                for part in parts:
                    self._report(part)
                    self._link.send(*self._catalogue.put(part))
                for name in self._catalogue.names() - {name for part in parts for name in part.names}:
                    self._link.send(*self._catalogue.remove(name))
                known = found
                _log.info("the catalogue is %s now, with %d models", found, len(self._catalogue.models))

    # Profiles that were measured beside other work

    async def refine(self) -> None:
        """Measure them again whenever no request has come for long; never returns."""
        received, since_s = -1, 0.0
        while True:
            await asyncio.sleep(REFINE_POLL_S)
            if self._waiting or not self._rough:
                continue
            with suppress(ClockworkError):  # no controller now, or the model is no more
                before, received = received, await self._received()
                if received != before:
                    since_s = time.monotonic()
                elif time.monotonic() - since_s >= REFINE_IDLE_S:
                    await self._measure_again(received)

    async def _measure_again(self, received: int) -> None:
        """Measure a few codes; the profiles are used if still no request but those ``received`` has come."""
        users = {model.code_id: model.name for model in self._catalogue.models}
        self._rough.intersection_update(users)
        codes = sorted(self._rough)[:REFINE_CODES]
        names = tuple(dict.fromkeys([users[code_id] for code_id in codes]))
        if not names:
            return
        try:
            prepared = await self._prepare(names, on_progress=lambda _: None, again=True)
        except RepositoryError:
            self._rough.difference_update(codes)
            raise
        if await self._received() != received:
            return
        self._rough.difference_update(prepared.measured or codes)
        self._link.send(*self._catalogue.refine(prepared.profiles))
        _log.info("profiles measured again: %d, left: %d", len(prepared.measured), len(self._rough))

    async def _received(self) -> int:
        """How many requests have reached the controller. Raises :class:`TransportError`."""
        return int((await self._link.ask(Question.METRICS))["received"])

    # Questions

    async def index(self, *, ready: bool) -> bytes:
        """The repository index as JSON; ``ready``: only what can be asked."""
        known = await asyncio.to_thread(_names, self._repository, self._store)
        entries = self._catalogue.index(known, self._link.quarantines.reasons(), self._waiting)
        return msgspec.json.encode([entry for entry in entries if entry.state == "READY" or not ready])

    async def load(self, name: str) -> bytes:
        """Load a model, or load it again. Raises :class:`RepositoryError` if it cannot be served."""
        if not name:
            raise RepositoryError("load: expected the name of a model; found none")
        await self._check_known(name, "load")
        if name in self._waiting:
            self.asked_for(ModelsAskedFor(requests={name: 1}))
        while name in self._waiting:  # noqa: ASYNC110 - no event has a name each
            await asyncio.sleep(POLL_S)
        prepared = await self._prepare((name,))
        self._report(prepared)
        self._rough |= prepared.measured
        if not prepared.served:
            self._catalogue.keep(name, prepared.problems)
            self._done((name,))
            raise RepositoryError(_not_loaded(name, prepared.problems))
        # An explicit load releases the model from quarantine. The new code is sent first: the version that is
        # served now stays until devices have prepared the code of the one that replaces it.
        codes = self._catalogue.codes(prepared)
        wanted = {each.model.key: each.code.code_id for each in prepared.served}
        again = [CodeRemade(code_id=code_id) for code_id in dict.fromkeys(wanted.values())]
        self._link.send(ReleaseFromQuarantine(model=name), *codes, *again, self._repairs.counted)
        try:
            await self._until_prepared(wanted)
        except RepositoryError as error:
            self._link.send(*self._catalogue.unused(codes))
            raise RepositoryError(f"load failed for model '{name}': {error}") from error
        frames = self._catalogue.put(prepared)
        removed = [frame for frame in frames if isinstance(frame, ModelRemoved | CodeRemoved)]
        self._link.send(*[frame for frame in frames if frame not in removed])
        self._done((name,))
        # By then all gateways know the new version, and send no requests to the replaced one.
        await self._until_prepared(wanted)
        await self._until_unused([frame.model for frame in removed if isinstance(frame, ModelRemoved)])
        self._link.send(*self._catalogue.still_removed(removed))
        held = self._link.quarantines.reasons()
        if found := [key for key in wanted if key in held]:
            raise RepositoryError(f"load failed for model '{name}': {held[found[0]]}")
        if prepared.problems:
            served = ", ".join(each.model.version for each in prepared.served)
            raise RepositoryError(f"{_not_loaded(name, prepared.problems)} (served now: {served})")
        return msgspec.json.encode({"loaded": [each.model.key for each in prepared.served]})

    async def unload(self, name: str) -> bytes:
        """Serve a model no more."""
        frames: list[Frame] = self._catalogue.remove(name)
        if not frames:
            # A model of the repository that is not served is unloaded already.
            await self._check_known(name, "unload")
        self._link.send(*frames)
        self._done((name,))
        return b"{}"

    async def _check_known(self, name: str, verb: str) -> None:
        if name not in await asyncio.to_thread(_names, self._repository, self._store):
            raise NotInRepository(
                f"failed to {verb} '{name}', failed to poll from model repository: no model of that name; "
                "what there is: clockwork models list"
            )

    # Devices

    async def _settled(self, own: frozenset[str] | None = None) -> dict[str, Any]:
        """The controller's state once every device, or each of ``own``, has prepared its codes.

        Empty after ``SETTLE_S``.
        """
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
            if own is not None:
                self._check_running()
            try:
                state: dict[str, Any] = (await self._link.ask(Question.STATE))["controller"]
            except TransportError:
                continue  # until the next controller is connected
            devices = [device for device in state["devices"] if own is None or device["device"] in own]
            if devices and not any(device["pending_codes"] for device in devices):
                return state
        return {}

    async def _until_prepared(self, codes: dict[str, str]) -> None:
        """Return once every device has prepared its codes, given as code ids by model key.

        Raises :class:`RepositoryError` if a code failed on all devices, or a model is in quarantine.
        """
        state = await self._settled()
        if not state:
            raise RepositoryError(f"no device was ready to run it within {SETTLE_S:.0f} s")
        quarantined = state["quarantined"]
        if found := [key for key in codes if key in quarantined]:
            raise RepositoryError(f"model {found[0]} is in quarantine: {quarantined[found[0]]}")
        for code_id in codes.values():
            refusals = [device["failed_codes"].get(code_id) for device in state["devices"]]
            if refusals and all(refusals):
                raise RepositoryError(f"no device can run it: {refusals[0]}")

    async def _until_unused(self, keys: list[str]) -> None:
        """Return once no request waits for these models any more, or after ``REPLACED_GRACE_S``."""
        deadline_s = time.monotonic() + REPLACED_GRACE_S
        while keys and time.monotonic() < deadline_s:
            try:
                if not (await self._link.ask(Question.STATE))["controller"]["waiting"].keys() & set(keys):
                    return
            except TransportError:
                return  # no controller, so no request waits
            await asyncio.sleep(POLL_S)


def _names(repository: str, store: StoreConfig) -> list[str]:
    in_store = not repository and store.shared
    names = [entry.name for entry in opened("", store).entries] if in_store else model_names(repository)
    return [shortened(name) for name in names]


def _present(repository: str, store: StoreConfig) -> tuple[list[str], list[Problem]]:
    """The names of its models, and what is wrong with the repository itself."""
    found = opened(repository, store)
    return _names(repository, store), found.find_misplaced()


def _not_loaded(name: str, problems: Sequence[Problem]) -> str:
    """Why a load failed, or part of it, with the words of Triton that scripts look for."""
    texts = [
        f"version {each.version} is at UNAVAILABLE state: {each}"
        if each.version
        else f"failed to load '{name}', failed to poll from model repository: {each}"
        for each in problems
    ]
    return f"load failed for model '{name}': {'; '.join(texts)}"


def _nothing_to_serve(problems: Sequence[Problem]) -> str:
    return "no model can be served:\n" + "\n".join(f"  {problem}" for problem in problems)
