"""The keeper: prepares a repository, supervises processes, loads and unloads, and tells the controller.

It serves no request.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_serve.errors import ClockworkError, RepositoryError, TransportError, printable
from clockwork_serve.messages import (
    ArtefactDamaged,
    Ask,
    Beat,
    CodeRemade,
    CodeRemoved,
    Drain,
    Frame,
    ModelRemoved,
    ProcessesEnded,
    Quarantined,
    Question,
    QuotasSet,
    Readiness,
    ReleaseFromQuarantine,
    Reply,
    Role,
    WorkerCrashed,
    WorkerHung,
)
from clockwork_serve.serve.gateway.access import check_access_files, read_keys
from clockwork_serve.serve.gateway.tls import REFRESH_S, Watched
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.remote.config import check_listening
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.serve.supervisor.preparation import (
    Catalogue,
    OnProgress,
    Preparation,
    PreparedRepository,
    Repairs,
    StartProgress,
    SuspectArtefact,
    prepare,
)
from clockwork_serve.serve.supervisor.processes import (
    LINE_MAX,
    Supervisor,
    crashed,
    healthy,
    launches,
    listens,
)
from clockwork_serve.serve.supervisor.run_dir import Ports, RunDir
from clockwork_serve.serve.transport import SOCKET_NAME, Link, connect, hello
from clockwork_serve.store.repository import model_names
from clockwork_serve.store.settings import shown
from clockwork_serve.telemetry import Counters

# ------------------------------------------------------------
# The keeper's link to the controller: held, re-made, and told everything each time. It decides nothing.


RETRY_S: Final = 0.02
REPLY_S: Final = 5.0
_log = logging.getLogger(__name__)


class KeeperLink:
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


# ------------------------------------------------------------
# Workers that run and never connect: stopped while the controller was replaced, or stuck before they joined.
#
# The controller cannot miss whom it never met; who started them can. It ends them, and nothing else.


LOOK_S: Final = 5.0
MISSED: Final = 24
"""Who is missing so often in a row, for two minutes, will not come: torch and a GPU take less to start."""


async def end_missing(
    supervisor: Supervisor, ask_state: Callable[[], Awaitable[dict[str, Any]]], look_s: float = LOOK_S
) -> None:
    """For ever: ask the controller who is connected, and end workers that are not, for long."""
    missed: Counter[tuple[str, int]] = Counter()
    while True:
        await asyncio.sleep(look_s)
        try:
            connected = set((await ask_state())["workers"])
        except TransportError:
            continue  # there is no controller that they could connect to
        before, missed = missed, Counter()
        for name in supervisor.names:
            pid = supervisor.pid(name)
            if not name.startswith("worker") or name in connected or pid is None:
                continue
            missed[name, pid] = before[name, pid] + 1
            if missed[name, pid] >= MISSED:
                _log.error("%s runs and does not connect: it is ended", name, extra={"pid": pid})
                supervisor.end(name)


# ------------------------------------------------------------
# What the controller is told of quotas: those of the file of keys, again when it changes.


class Quotas:
    """Quotas of one file; without one, nobody has any."""

    def __init__(self, path: str) -> None:
        """Raises :class:`ConfigError`."""
        self._file = Watched((path,), lambda: _quotas(path)) if path else None

    def frames(self) -> list[Frame]:
        """For a controller that knows nothing."""
        return [self._file.content] if self._file is not None and self._file.content.quotas else []

    async def keep_fresh(self, send: Callable[[Frame], None]) -> None:
        """Tell the controller whenever they change, for ever."""
        while self._file is not None:
            await asyncio.sleep(REFRESH_S)
            before = self._file.content
            if self._file.refresh() and self._file.content != before:
                _log.info("api_keys: %d tenants have a quota now", len(self._file.content.quotas))
                send(self._file.content)


def _quotas(path: str) -> QuotasSet:
    quotas = [tenant.quota for tenant in read_keys(path).tenants.values()]
    return QuotasSet(quotas=tuple([quota for quota in quotas if quota is not None]))


# ------------------------------------------------------------
# The keeper: prepares a repository, supervises processes, loads and unloads. It serves no request.


POLL_S: Final = 0.02
STOP_GRACE_S: Final = 5.0
PREPARE_S: Final = 60.0
LEAVE_S: Final = 5.0
"""How long a version that is replaced stays for those who wait for it."""
LOAD_NICE: Final = 10
"""Priority at which models are compiled while others serve."""


class StartError(ClockworkError):
    """The server did not become ready; the message holds the last words of the process to blame."""


class Keeper:
    """One server, from its repository to its end. All methods are for one loop."""

    def __init__(
        self, config: ServerConfig, on_progress: OnProgress = lambda progress: None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """``on_line`` gets what the other processes log; by default it goes to stderr.

        Raises :class:`ConfigError` for a port or a file that will not do.
        """
        settings = self.settings = config.settings
        check_access_files(settings)
        if settings.listen_machines:
            check_listening(settings)
        self.config = config
        self.ports = Ports(settings.host, settings.ports)
        self.catalogue = Catalogue()
        self.quotas = Quotas(settings.api_keys)
        self.warnings: tuple[str, ...] = ()
        self._run_dir = RunDir(config.run_dir)
        self.run_dir = self._run_dir.path
        self._on_progress = on_progress
        self._on_line = on_line or _to_stderr
        self.supervisor = Supervisor(self._on_line, self._on_end)
        self._link: KeeperLink | None = None
        self._hung: set[str] = set()  # workers that hung by themselves and were told to end
        self._refreshing: asyncio.Task[None] | None = None
        self._missing: asyncio.Task[None] | None = None
        self._preparing = asyncio.Lock()
        self.repairs = Repairs(self.catalogue, self._prepare_again, self._send, self._report)
        self._answers: set[asyncio.Task[None]] = set()  # tasks that answer questions now

    async def start(self) -> None:
        """Compile, profile, start all processes. Raises :class:`ClockworkError` if nothing can be served."""
        prepared = await self._prepare((), nice=0)
        self.warnings = prepared.warnings
        self._report(prepared)
        if not prepared.served:
            raise RepositoryError(_nothing_to_serve(self.settings.repository, prepared))
        self.catalogue.put(prepared.names, prepared.served, prepared.profiles, prepared.problems)
        self._link = KeeperLink(
            self.run_dir / SOCKET_NAME, self._catalogue, self._on_ask, self._on_quarantined, self._on_hung,
            self.repairs.on_damaged,
        )  # fmt: skip
        self._refreshing = asyncio.get_running_loop().create_task(self.quotas.keep_fresh(self._link.send))
        self._missing = asyncio.get_running_loop().create_task(
            end_missing(self.supervisor, partial(self._link.ask, Question.STATE))
        )
        for launch in launches(self.config, self.run_dir, self.ports.number_by_name):
            self.supervisor.start(launch)

    async def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return once a client would be served. Raises :class:`StartError` if that does not happen."""
        link = self._link
        assert link is not None, "start it first"
        deadline_s = time.monotonic() + timeout_s
        while not (link.readiness.ready and await self._gateways_ready(link)):
            why = self.supervisor.hopeless()
            if why is not None:
                raise StartError(why)
            if time.monotonic() > deadline_s:
                why = "its gateways do not answer" if link.readiness.ready else link.readiness.why
                raise StartError(f"not ready within {timeout_s:.0f} s: {why}")
            self._on_progress(StartProgress(stage="start", done=0, total=1, text=link.readiness.why))
            await asyncio.sleep(POLL_S)
        self._on_progress(StartProgress(stage="start", done=1, total=1, text="ready"))

    async def stop(self) -> None:
        """Take no new request, finish those in flight within ``drain_s``, and end all processes."""
        if self._link is not None:
            await self._drain(self._link)
        names = self.supervisor.names
        for prefix in ("gateway", "bridge", "worker", "controller"):
            group = [name for name in names if name.startswith(prefix)]
            await asyncio.gather(*(self.supervisor.stop(name, STOP_GRACE_S) for name in group))
        await self.close()

    async def close(self) -> None:
        """End everything at once."""
        await self.repairs.close()
        for task in self._answers:
            task.cancel()
        for running in (self._refreshing, self._missing):
            if running is not None:
                running.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None
        await self.supervisor.kill()
        self.ports.close()
        self._run_dir.close()

    async def state(self) -> dict[str, Any]:
        """What the controller believes now. Raises :class:`TransportError` if it does not answer."""
        if self._link is None:
            raise TransportError("the server is not running")
        return await self._link.ask(Question.STATE)

    async def counters(self) -> Counters:
        """What the controller counted. Raises :class:`TransportError` if it does not answer."""
        if self._link is None:
            raise TransportError("the server is not running")
        return msgspec.convert(await self._link.ask(Question.METRICS), Counters, strict=False)

    async def _gateways_ready(self, link: KeeperLink) -> bool:
        ports = self.ports.number_by_name
        host, port = self.settings.host, ports["http_port"]
        # The keeper has no certificate that a server could ask for.
        if not await (listens(host, port) if self.settings.tls_certificate else healthy(host, port)):
            return False
        # They share a port, where only one of them answered.
        try:
            there = (await link.ask(Question.STATE))["gateways"]
            if sum(name.startswith("gateway") for name in there) < self.settings.gateways:
                return False
        except TransportError:
            return False
        others = [port for name, port in ports.items() if name != "http_port"]
        return all([await listens(self.settings.host, port) for port in others])

    # Preparing

    async def _prepare_again(
        self, names: tuple[str, ...], suspects: tuple[SuspectArtefact, ...]
    ) -> PreparedRepository:
        return await self._prepare(names, LOAD_NICE, suspects)

    async def _prepare(
        self, names: tuple[str, ...], nice: int, suspects: tuple[SuspectArtefact, ...] = ()
    ) -> PreparedRepository:
        preparation = Preparation(
            settings=self.settings,
            store=self.config.store,
            devices=self.config.devices,
            result=str(self.run_dir / "prepared.msgpack"),
            names=names,
            suspects=suspects,
            nice=nice,
        )
        async with self._preparing:
            return await prepare(preparation, self._on_progress, self._on_line)

    def _report(self, prepared: PreparedRepository) -> None:
        self.repairs.count(prepared.damage)
        for problem in prepared.problems:
            _log.error("%s", problem)
        for warning in prepared.warnings:
            _log.warning("%s", warning)
        for each in prepared.served:
            for warning in each.model.warnings:
                _log.warning("model %s: %s", each.model.key, warning)

    def _catalogue(self) -> list[Frame]:
        return [*self.quotas.frames(), *self.catalogue.frames(), *self._unanswering(), self.repairs.counted]

    def _unanswering(self) -> list[Frame]:
        """Who was ended because it did not answer: the controller may be one, and cannot count that."""
        counts = self.supervisor.unanswering
        return [ProcessesEnded(unanswering=dict(counts))] if counts else []

    def _send(self, *frames: Frame) -> None:
        if self._link is not None:
            self._link.send(*frames)

    def _on_end(self, name: str, status: int) -> None:
        if self._link is not None:
            self._link.send(*self._unanswering())
        by_itself = name in self._hung
        self._hung.discard(name)
        if name.startswith("worker") and (crashed(status) or by_itself) and self._link is not None:
            self._link.send(WorkerCrashed(worker=name))

    def _on_hung(self, hung: WorkerHung) -> None:
        """End a worker that does not answer; unless somebody stopped it, it hung by itself."""
        ran = self.supervisor.end(hung.worker)
        if ran is None:
            _log.error("%s hung, and is no process of this keeper", hung.worker)
        elif ran:
            self._hung.add(hung.worker)
        else:
            _log.warning("%s was stopped by a signal; no model is to blame for that", hung.worker)

    def _on_quarantined(self) -> None:
        """What kills workers as soon as they start is not served to them any more."""
        self.supervisor.forgive("worker")

    # Questions

    def _on_ask(self, ask: Ask) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(ask))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, ask: Ask) -> None:
        try:
            asked = msgspec.json.decode(ask.body, type=dict[str, Any])
            match ask.what:
                case Question.INDEX:
                    body = await self._index(ready=bool(asked.get("ready", False)))
                case Question.LOAD:
                    body = await self._load(str(asked.get("model", "")))
                case Question.UNLOAD:
                    body = await self._unload(str(asked.get("model", "")))
                case _:
                    raise RepositoryError(f"the keeper does not know about {ask.what!r}")
            reply = Reply(ask_id=ask.ask_id, ok=True, body=body)
        except (ClockworkError, msgspec.MsgspecError, ValueError, RecursionError, OSError) as error:
            body = msgspec.json.encode({"error": str(error)})
            code = 404 if isinstance(error, _UnknownModel) else 400
            reply = Reply(ask_id=ask.ask_id, ok=False, body=body, code=code)
        if self._link is not None:
            self._link.send(reply)

    async def _index(self, *, ready: bool) -> bytes:
        known = await asyncio.to_thread(_names, self.settings.repository)
        entries = self.catalogue.index(known, {} if self._link is None else self._link.quarantines.whys())
        return msgspec.json.encode([entry for entry in entries if entry.state == "READY" or not ready])

    async def _load(self, name: str) -> bytes:
        if not name:
            raise RepositoryError("load: expected the name of a model; found none")
        await self._check_known(name)
        prepared = await self._prepare((name,), nice=LOAD_NICE)
        self._report(prepared)
        if not prepared.served:
            if name not in self.catalogue.names():
                self.catalogue.note((name,), prepared.problems)
            raise RepositoryError("; ".join(str(problem) for problem in prepared.problems))
        assert self._link is not None
        # Whoever loads a model wants it served, whatever it did before. Its code comes first: what is served
        # now goes on until devices are ready for what comes in its place.
        codes = self.catalogue.codes(prepared.served, prepared.profiles)
        wanted = {each.model.key: each.code.code_id for each in prepared.served}
        again = [CodeRemade(code_id=code_id) for code_id in dict.fromkeys(wanted.values())]
        self._link.send(ReleaseFromQuarantine(model=name), *codes, *again, self.repairs.counted)
        try:
            await self._until_prepared(wanted)
        except RepositoryError:
            self._link.send(*self.catalogue.unused(codes))
            raise
        frames = self.catalogue.put(prepared.names, prepared.served, prepared.profiles, prepared.problems)
        gone = [frame for frame in frames if isinstance(frame, ModelRemoved | CodeRemoved)]
        self._link.send(*[frame for frame in frames if frame not in gone])
        # By then all gateways have heard of it, and send nothing to versions that leave.
        await self._until_prepared(wanted)
        await self._until_unwanted([frame.model for frame in gone if isinstance(frame, ModelRemoved)])
        if self._link is not None:
            self._link.send(*self.catalogue.still(gone))
        return msgspec.json.encode({"loaded": [each.model.key for each in prepared.served]})

    async def _until_prepared(self, codes: dict[str, str]) -> None:
        """Return once every device has prepared what it was told; raise if a model's code failed on all."""
        deadline_s = time.monotonic() + PREPARE_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
            try:
                state = (await self.state())["controller"]
            except TransportError:
                continue  # another controller will be there
            devices, quarantined = state["devices"], state["quarantined"]
            if found := [key for key in codes if key in quarantined]:
                raise RepositoryError(f"model {found[0]} is in quarantine: {quarantined[found[0]]}")
            if not devices or any(device["pending_codes"] for device in devices):
                continue
            for code_id in codes.values():
                refusals = [device["failed_codes"].get(code_id) for device in devices]
                if refusals and all(refusals):
                    raise RepositoryError(f"no device can run it: {refusals[0]}")
            return
        raise RepositoryError(f"no device was ready to run it within {PREPARE_S:.0f} s")

    async def _until_unwanted(self, keys: list[str]) -> None:
        """Return once nobody waits for these any more, or has waited too long."""
        deadline_s = time.monotonic() + LEAVE_S
        while keys and time.monotonic() < deadline_s:
            try:
                if not (await self.state())["controller"]["waiting"].keys() & set(keys):
                    return
            except TransportError:
                return  # nobody waits for what is gone
            await asyncio.sleep(POLL_S)

    async def _unload(self, name: str) -> bytes:
        frames = self.catalogue.remove(name)
        if not frames:
            # One that is there and not served is as wished already.
            await self._check_known(name)
        assert self._link is not None
        self._link.send(*frames)
        return b"{}"

    async def _check_known(self, name: str) -> None:
        if name not in await asyncio.to_thread(_names, self.settings.repository):
            raise _UnknownModel(f"no model '{name}' in the repository; see its index")

    # Stopping

    async def _drain(self, link: KeeperLink) -> None:
        link.send(Drain())
        deadline_s = time.monotonic() + self.settings.drain_s
        try:
            while (waiting := (await link.ask(Question.STATE))["open"]) > 0:
                if time.monotonic() > deadline_s:
                    _log.warning("stopping although %d requests wait: drain_s is over", waiting)
                    return
                await asyncio.sleep(POLL_S)
        except TransportError as error:
            _log.warning("not drained: %s", error)


class _UnknownModel(RepositoryError):
    """The repository has no model of that name."""


def _names(repository: str) -> list[str]:
    return [shown(name) for name in model_names(repository)]


def _nothing_to_serve(repository: str, prepared: PreparedRepository) -> str:
    if prepared.problems:
        return "no model can be served:\n" + "\n".join(f"  {problem}" for problem in prepared.problems)
    return (
        f"repository: expected models in {repository}; found none; put one at {repository}/MODEL/1/model.onnx"
    )


def _to_stderr(line: str) -> None:
    """A line that another process wrote; a model in it may have written anything."""
    sys.stderr.write("\t".join(printable(part, LINE_MAX) for part in line.split("\t")) + "\n")
