"""The observer: a process beside a server that reads its journal, and answers whoever wants to see.

It runs only when a core has nothing else to do, and the server is as well without it. Each of its *parts* is
fed with the journal's records by a reader of its own: one that raises is left out, and one that is slow
delays itself. One part is the historian, which makes the journal's index and checkpoints.

On a unix socket in the run directory it answers lines of JSON, ``{"ask": NAME, ...}``, each with a line, and
hands every other connection to the page. Its peers are processes of the same user, which say whose requests
may be shown: who has no administrator's rights is asked for as ``"tenant": NAME``.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import msgspec

from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.serve import child
from clockwork_serve.serve.child import ObserverConfig
from clockwork_serve.serve.transport import OBSERVER_SOCKET, bind, is_own_user
from clockwork_serve.units import GIB, MIB, NS_PER_S

if TYPE_CHECKING:  # imported once this process has become an idle one
    from clockwork_serve.config import Settings
    from clockwork_serve.serve.http.live import Explain, LivePage
    from clockwork_serve.telemetry import JournalFollower, JournalHead, Step

SLICE_S: Final = 0.02  # so long one part is fed before the next one, and the socket, have their turns
POLL_S: Final = 0.1  # how often it looks for records, while there are none
MEMORY_BYTES: Final = GIB  # the process may have so much; a part that wants more fails
LINE_BYTES: Final = MIB
START_NS: Final = 60 * NS_PER_S
"""It starts when others leave it a core: what ended this long before is traced, too."""
EXPORT_S: Final = 2.0  # what is left of traces has so long at the end
HISTORY_SHARE: Final = 2  # checkpoints may take the journal's bytes divided by this

_log = logging.getLogger(__name__)


class ObserverPart(Protocol):
    """Whatever is fed with a journal's records, from the oldest that is there on."""

    def on_record(self, record: JournalHead | Step) -> None:
        """The next record."""


Ask = Callable[[Mapping[str, Any]], object]
"""Answers a line: gets its object, returns what becomes JSON. It is called in a thread, one at a time.

An exception becomes the answer ``{"error": ...}``.
"""


class Feed:
    """Feeds one consumer, at its own pace, with the records of a journal from number ``first`` on.

    ``end`` is called at the end, with the number of the record that would be next; ``idle`` when all is read
    that was there at an instant, of the monotonic clock.
    """

    def __init__(
        self, name: str, path: Path, take: Callable[[int, JournalHead | Step], None],
        first: int | None = None, end: Callable[[int], None] = lambda number: None,
        *, idle: Callable[[int], None] = lambda now_ns: None,
    ) -> None:  # fmt: skip
        from clockwork_serve.telemetry import JournalFollower

        self.name = name
        self.failed = ""
        self.next = first or 0
        self._take = take
        self._end, self._idle = end, idle
        self._follower: JournalFollower = JournalFollower(path, first)
        self._records: Iterator[tuple[int, JournalHead | Step]] | None = None
        self._lost = 0
        self._began_ns = 0  # when it last began to read what is there

    @property
    def lost(self) -> int:
        """Records that were deleted before it came to them."""
        return self._follower.lost

    def work(self, until_s: float) -> bool:
        """Feed it until then (of ``time.monotonic``); returns whether there may be more."""
        from clockwork_serve.telemetry import numbered

        try:
            if self._records is None:
                self._began_ns = time.monotonic_ns()
                self._records = numbered(self._follower)
            for number, record in self._records:
                self._take(number, record)
                self.next = number + 1
                if time.monotonic() >= until_s:
                    return True
            self._records = None
            self._idle(self._began_ns)
        except Exception as error:  # noqa: BLE001 - whatever a part raises ends that part alone
            self.failed = repr(error)
            self._follower.close()
            _log.exception("%s is left out from now on: it failed at record %d", self.name, self.next)
        if self.lost > self._lost:
            _log.warning("%s was behind: %d records were deleted unread", self.name, self.lost - self._lost)
            self._lost = self.lost
        return False

    def close(self) -> None:
        """Read no more."""
        self._records = None
        self._follower.close()
        if not self.failed:
            self._end(self.next)


class Observer:
    """Feeds parts with a journal, and answers on a socket.

    ``page`` makes the protocol of a connection that is no line of JSON.
    """

    def __init__(
        self, path: Path, parts: Mapping[str, ObserverPart], asks: Mapping[str, Ask] | None = None
    ) -> None:
        self.path = path
        self.page: Callable[[], asyncio.Protocol] | None = None
        self.asks: dict[str, Ask] = {"status": lambda asked: self.status(), **(asks or {})}
        self._feeds = [Feed(name, path, _taker(part)) for name, part in parts.items()]
        self._asking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, feed: Feed) -> None:
        """Feed another consumer."""
        self._feeds.append(feed)

    def status(self) -> dict[str, dict[str, object]]:
        """How far each part is, by name."""
        return {
            feed.name: {"next": feed.next, "lost": feed.lost, "failed": feed.failed} for feed in self._feeds
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Feed all parts until ``stop``; those that are behind take turns."""
        while not stop.is_set():
            more = False
            for feed in self._feeds:
                if not feed.failed:
                    more |= feed.work(time.monotonic() + SLICE_S)
                    await asyncio.sleep(0)
            if not more:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), POLL_S)
        for feed in self._feeds:
            feed.close()

    async def listen(self, path: Path) -> asyncio.Server:
        """Answer on a new unix socket of mode 0600; a stale one there is replaced."""
        loop = asyncio.get_running_loop()
        return await loop.create_unix_server(lambda: _Connection(self), sock=bind(path))

    async def answer(self, line: bytes) -> bytes:
        """What is to be said to a line."""
        try:
            asked = msgspec.json.decode(line, type=dict[str, Any])
            ask = self._ask(str(asked.get("ask")))
            async with self._asking:
                return msgspec.json.encode(await asyncio.to_thread(ask, asked))
        except (ClockworkError, msgspec.MsgspecError, ValueError) as error:
            return msgspec.json.encode({"error": str(error)})
        except Exception as error:  # noqa: BLE001 - whatever an answer raises is no answer, and nothing else
            _log.warning("a question was not answered: %r", error)
            return msgspec.json.encode({"error": f"it cannot be answered: {error!r}"})

    def _ask(self, name: str) -> Ask:
        ask = self.asks.get(name)
        if ask is None:
            raise ConfigError(f"ask: expected one of {', '.join(sorted(self.asks))}")
        return ask

    def thread(self, work: Callable[[str, str | None, Sequence[str]], object]) -> Explain:
        """The same, called in a thread, one at a time with what is asked by lines; as an object of JSON."""

        async def called(
            request_id: str, tenant: str | None, changes: Sequence[str]
        ) -> Mapping[str, Any] | None:
            async with self._asking:
                found = await asyncio.to_thread(work, request_id, tenant, changes)
            return None if found is None else cast("dict[str, Any]", msgspec.to_builtins(found))

        return called

    def background(self, task: asyncio.Task[None]) -> None:
        """Keep a task until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _taker(part: ObserverPart) -> Callable[[int, JournalHead | Step], None]:
    on_record = part.on_record
    return lambda number, record: on_record(record)


class _Connection(asyncio.Protocol):
    """One peer: lines of JSON, or, if its first byte begins none, a reader of the page."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._transport: asyncio.Transport | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not is_own_user(transport):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        transport, page = self._transport, self._observer.page
        if transport is None:
            return
        if not self._rest and data[:1] != b"{":
            if page is None:
                transport.abort()
                return
            reader = page()
            transport.set_protocol(reader)
            reader.connection_made(transport)
            reader.data_received(data)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES:
            transport.abort()
        for line in lines:
            self._observer.background(asyncio.get_running_loop().create_task(self._answer(line)))

    async def _answer(self, line: bytes) -> None:
        answer = await self._observer.answer(line)
        if self._transport is not None:
            self._transport.write(answer + b"\n")


# ------------------------------------------------------------
# The process.


def become_idle() -> None:
    """Run only on cores that have nothing else to do, and be the first to go where memory is short."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


async def observe(config: ObserverConfig, stop: asyncio.Event) -> None:
    """Observe a server until ``stop``."""
    from clockwork_serve.serve.http.live import LivePage, PageServer
    from clockwork_serve.sim.explain import Explanation, case_in, explain
    from clockwork_serve.sim.history import Historian, History
    from clockwork_serve.telemetry.live import LiveView

    settings, run_dir = config.settings, Path(config.run_dir)
    path = settings.journal_path(config.run_dir)
    assert path is not None, "an observer without a journal"
    if not await _has_begun(path, stop):
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, resource.RLIM_INFINITY))
    history = History.open(path)

    def explained(request_id: str, tenant: str | None, changes: Sequence[str]) -> Explanation | None:
        case = case_in(history, request_id)
        if case is None or (tenant is not None and case.request.tenant != tenant):
            return None
        return explain(case, viewer=tenant, changes=changes)

    def explain_line(asked: Mapping[str, Any]) -> Explanation | None:
        changes = msgspec.convert(asked.get("if", []), list[str])
        return explained(str(asked["request_id"]), asked.get("tenant"), changes)

    parts: dict[str, ObserverPart] = {}
    page: LivePage | None = None
    if settings.live_page:
        parts["live page"] = view = LiveView(settings=settings.rows())
    asks: dict[str, Ask] = {"find": lambda asked: history.find(str(asked["request_id"]))}
    observer = Observer(path, parts, asks | {"explain": explain_line})
    if settings.live_page:
        page = LivePage(view, observer.thread(explained))
        observer.page = PageServer(page).connection
    with suppress(OSError):  # a folder that cannot be written: then there is no index
        historian = Historian(path, settings.journal_bytes // HISTORY_SHARE)
        observer.add(Feed("history", path, historian.take, historian.start, historian.flush))
    if settings.otlp_endpoint:
        _add_traces(observer, settings)
    if settings.scaling_target is not None:
        _add_scaling(observer, settings, run_dir, page)
    server = await observer.listen(run_dir / OBSERVER_SOCKET)
    gc.collect()
    gc.freeze()
    try:
        await observer.run(stop)
    finally:
        server.close()


async def _has_begun(journal: Path, stop: asyncio.Event) -> bool:
    """Wait for a journal's beginning; False if ``stop`` came before."""
    from clockwork_serve.telemetry.following import first_header

    def begun() -> bool:
        return journal.exists() and bool(first_header(journal))

    while not begun():
        if stop.is_set():
            return False
        await asyncio.sleep(POLL_S)
    return True


def _add_traces(observer: Observer, settings: Settings) -> None:
    """Send the requests that end from now on to a collector of traces, and those of just before."""
    from clockwork_serve.telemetry.otlp import OtlpExporter, otlp_target
    from clockwork_serve.telemetry.spans import RequestTraces, Spans, host_offset_ns

    target = otlp_target(settings.otlp_endpoint, os.environ)
    exporter = OtlpExporter(target)
    spans = Spans(exporter.offer, settings.trace_sample, host_offset_ns(), time.time_ns() - START_NS)
    traces = RequestTraces(observer.path, spans)

    def end(number: int) -> None:
        traces.close()
        exporter.close(EXPORT_S)

    def take(number: int, record: JournalHead | Step) -> None:
        traces.on_record(record)

    observer.add(Feed("traces", observer.path, take, end=end, idle=traces.on_idle))
    observer.asks["traces"] = lambda asked: {
        "requests": spans.requests, "missing_steps": spans.missing_steps, "sent": exporter.sent,
        "failed": exporter.failed, "dropped": exporter.dropped, "why": exporter.why,
    }  # fmt: skip


def _add_scaling(observer: Observer, settings: Settings, run_dir: Path, page: LivePage | None) -> None:
    """Say how many devices are wanted."""
    from clockwork_serve.apps.scaling.brain import ScalingRules
    from clockwork_serve.apps.scaling.part import ScalingPart

    assert settings.scaling_target is not None
    rules = ScalingRules(
        target=settings.scaling_target, lead_s=settings.scaling_lead_s, least=settings.scaling_devices[0],
        most=settings.scaling_devices[1],
    )  # fmt: skip
    part = ScalingPart(rules, run_dir, observer.background)
    observer.add(Feed("scaling", observer.path, part.take, end=part.close, idle=part.on_idle))
    observer.asks["scaling"] = lambda asked: part.answer()
    if page is not None:
        page.add("scaling", part.answer)


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    become_idle()
    config = msgspec.json.decode(argv[1], type=ObserverConfig)
    child.prepare("observer", config.settings)
    return child.run_until_stopped(lambda stop: observe(config, stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
