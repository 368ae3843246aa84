"""One row, from an empty folder to a verdict: server, load, fault, what is left, what was promised."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from msgspec import structs

from clockwork_serve.units import MIB, NS_PER_S
from harness.server import Held, Server, may_mount
from harness.serving import until
from qa.books import NOT_PASSED_ON, books, ports
from qa.faults import measure
from qa.faults.acts_clients import Proxy
from qa.faults.result import BROKEN, KEPT, NOT_MEASURED, Holding, Result
from qa.faults.rows import Row
from qa.faults.stage import SETUPS, NotMeasured, Stage

# ------------------------------------------------------------
# What a row promises, held against what it showed.


GROWTH_MIB: Final = 48.0
"""More than any process's memory differs by itself: the C library may keep 32 MiB of what one body took."""
GROWTH_FILES: Final = 8
"""A worker keeps a file open for each model in its memory."""
GROWTH_THREADS: Final = 4
FIRST_MS: Final = 2000.0
_KNOWN: Final = re.compile(r"failed: 500 (worker_lost|model_raised|device_fault|quarantined)")
"""What a request of a good model may be told while workers die; an invalid or unknown one it never is."""


def conclude(result: Result, row: Row) -> None:
    """Add what is wrong, and the status."""
    ends = result.ends
    result.wrong += [
        f"{count} {words}"
        for count, words in (
            (ends.lost, "requests lost"),
            (result.twice, "answered twice"),
            (0 if row.cuts else ends.refused, "found no connection"),
            (max(0, ends.reset - result.in_flight), "more reset than were in flight"),
            (0 if row.slow else result.late_as_good, "late answers sent as good ones"),
            (0 if row.slow else result.overdue, "heard more than 50 ms after their deadline"),
            (result.tracebacks, "tracebacks in the log"),
        )
        if count
    ]
    for words, count in result.reasons.items():
        if words.startswith("failed") and not _KNOWN.match(words):
            result.wrong.append(f"{count} were told {words.removeprefix('failed: ')}")
    for what, count in result.books.items():
        if count:
            result.wrong.append(f"books: {what}: {count}")
    limit_ms = max(FIRST_MS, row.whole_s * 1000)
    if result.first_good_ms is None or result.first_good_ms > limit_ms:
        result.wrong.append(f"first good answer {shown_ms(result.first_good_ms)}")
    if result.whole_ms is None or result.whole_ms > row.whole_s * 1000:
        result.wrong.append(f"90 % of goodput {shown_ms(result.whole_ms)}, asked: {row.whole_s:g} s")
    result.wrong += grown(result)
    result.status = BROKEN if result.wrong else KEPT


def grown(result: Result) -> list[str]:
    """Processes that hold more than before."""
    found = []
    for name, held in result.holdings.items():
        more = [after - before for before, after in (held.rss_mib, held.files, held.threads)]
        if held.pid[0] != held.pid[1]:
            more[0] = 0.0  # a new process takes its memory as it warms
        if name.startswith("controller") and result.setup == "standby":
            more[1] = 0  # who stood by has links once it leads
        if more[0] > GROWTH_MIB or more[1] > GROWTH_FILES or more[2] > GROWTH_THREADS:
            found.append(f"{name} grew: {more[0]:+.0f} MiB, {more[1]:+.0f} files, {more[2]:+.0f} threads")
    before, after = result.segments
    if after > before:
        found.append(f"{after - before} more segments of shared memory")
    return found


def shown_ms(found: float | None) -> str:
    """Milliseconds, or never."""
    return "not within the run" if found is None else f"after {found:.0f} ms"


BEFORE_S: Final = (1.6, 2.5)
AFTER_S: Final = (2.6, 4.5)
"""Of the load before and after a fault: short, and whole."""
IDLE_S: Final = 0.5
LONGEST_S: Final = 75.0
"""The load that is drawn; it is stopped when the act and its time after are over."""
"""A gateway reads on from who was refused for 2 s; then it lets go."""


def play_row(
    row: Row, *, short: bool, seed: int, cache: Path, stopped: threading.Event, longest_s: float = LONGEST_S
) -> Result:
    """Do it. What a machine does not permit is a result too."""
    result = Result(name=row.name, what=row.what, when=row.when, setup=row.setup)
    began = time.monotonic()
    if row.small and not may_mount():
        result.notes.append("it needs the right to mount a small file system (CAP_SYS_ADMIN)")
        return result
    with tempfile.TemporaryDirectory(prefix="f-") as name:
        folder = Path(name)
        root = folder / "models"
        setup = SETUPS[row.setup]
        setup.write(root)
        own = folder / "cache" if row.own_cache else cache
        own.mkdir(exist_ok=True)
        small = {where or str(own): size for where, size in row.small}
        server = Server(setup.start(root, own, folder, small), folder / "log")
        stage = Stage(server, setup, root, own, short=short, stopped=stopped)
        try:
            server.wait_ready()
            with contextlib.suppress(NotMeasured):
                _play(row, stage, result, folder, seed, longest_s)
        finally:
            stage.server.close()
            server.close()
        if stage.extra.get("not_measured"):
            result.status, result.notes = NOT_MEASURED, [stage.extra["not_measured"]]
        elif not stopped.is_set():
            conclude(result, row)
    result.seconds = time.monotonic() - began
    return result


def _play(row: Row, stage: Stage, result: Result, folder: Path, seed: int, longest_s: float) -> None:
    server, short = stage.server, stage.short
    before_s, after_s = BEFORE_S[not short], AFTER_S[not short] + row.after_s * (0.6 if short else 1.0)
    before = server.held()  # again when the fault is done, for what is warm by then
    quiet = (before_s - IDLE_S, before_s + IDLE_S) if row.idle else None
    stage.restart = lambda: _restart(stage, folder)
    act = threading.Thread(target=_do, args=(row, stage, before_s, before), name="act", daemon=True)
    finished = threading.Event()

    def began(start_ns: int) -> None:
        stage.start_ns = start_ns
        act.start()

    def over() -> bool:
        """The load ends so long after the act; an act that takes long has load until its end."""
        if act.is_alive() or not stage.start_ns:
            return stage.stopped.is_set()
        if not finished.is_set():
            finished.set()
            stage.extra["until"] = time.monotonic() + after_s
        return stage.stopped.is_set() or time.monotonic() > stage.extra["until"]

    text = measure.scenario(stage.setup, longest_s, quiet)
    with contextlib.ExitStack() as stack:
        url = server.http_url
        if row.proxy:
            stage.extra["proxy"] = stack.enter_context(Proxy(server.http_port))
            url = stage.extra["proxy"].url
        played = measure.play(url, text, folder, seed, began=began, stopped=over)
    act.join()
    if stage.extra.get("not_measured"):
        raise NotMeasured
    again_ns = 0 if quiet is None else round(quiet[1] * NS_PER_S)
    measure.fill(result, measure.Seen(played, stage.marks, stage.resets, again_ns), played)
    _look_back(row, stage, result, before)
    result.wrong += stage.wrong
    result.notes += stage.notes
    result.restarts_ms = [seconds * 1000 for seconds in stage.restarts_s]


def _do(row: Row, stage: Stage, at_s: float, before: dict[str, Held]) -> None:
    """The act itself, at its instant. What it stumbles over is wrong too."""
    stage.sleep(max(0.0, (stage.start_ns - time.monotonic_ns()) / NS_PER_S + at_s - 0.1))
    for name, found in stage.server.held().items():
        # Connections of clients are files too, and these will be gone.
        before[name] = replace(found, files=before[name].files) if name.startswith("gateway") else found
    stage.sleep(max(0.0, (stage.start_ns - time.monotonic_ns()) / NS_PER_S + at_s))
    try:
        row.act(stage)
    except NotMeasured as error:
        stage.extra["not_measured"] = str(error)
    except (OSError, RuntimeError, TimeoutError) as error:
        stage.wrong.append(f"doing it failed: {error}")


def _restart(stage: Stage, folder: Path) -> None:
    """The same server again, on the same ports and files, after its supervisor died."""
    start, facts = stage.server.start, stage.server.facts

    http, grpc, metrics = ports(facts)
    settings = structs.replace(start.server.settings, http_port=http, grpc_port=grpc, metrics_port=metrics)
    config = structs.replace(start.server, settings=settings)
    stage.server = Server(structs.replace(start, server=config), folder / "log")
    stage.server.wait_ready()


def _look_back(row: Row, stage: Stage, result: Result, before: dict[str, Held]) -> None:
    """What is held after it, and whether the books are equal; then its end."""
    server = stage.server
    names = [name for name in before if name == "keeper" or name[:3] in ("con", "wor", "gat")]
    after: dict[str, Held] = {}

    def settled() -> bool:
        after.clear()
        after.update(server.held())
        result.holdings = {n: _holding(before[n], after[n]) for n in names if n in after}
        result.segments = (_segments(before), _segments(after))
        result.books = books(server.http_url, stage.setup.gateways)
        if not _same(before, after):  # who is new has not counted what came before
            result.books.pop(NOT_PASSED_ON, None)
        return len(result.holdings) == len(names) and not grown(result) and not any(result.books.values())

    with contextlib.suppress(TimeoutError):
        until("it is as before", settled, row.settle_s, 0.2)
    result.wrong += [f"{name} does not run" for name in names if name not in after]
    result.wrong += server.stop()
    left = [path.name for path in Path(server.start.server.run_dir).glob("clockwork-*")]
    killed = stage.server.process.pid != before["keeper"].pid
    if len(left) > killed:
        result.wrong.append(f"left behind: {', '.join(left)}")
    log = server.log.read_text(errors="replace")
    result.tracebacks = sum(line.startswith("Traceback") for line in log.splitlines())
    if result.tracebacks:
        result.notes.append("log: " + log[log.index("Traceback") :].partition("\n\n")[0][-600:])


def _holding(before: Held, after: Held) -> Holding:
    return Holding(
        pid=(before.pid, after.pid), rss_mib=(before.rss_bytes / MIB, after.rss_bytes / MIB),
        files=(before.files, after.files), threads=(before.threads, after.threads),
    )  # fmt: skip


def _segments(found: dict[str, Held]) -> int:
    return len(frozenset().union(*(one.regions for one in found.values())))


def _same(before: dict[str, Held], after: dict[str, Held]) -> bool:
    """Whether those that count requests are still the same processes."""
    counting = [name for name in before if name.startswith(("controller", "gateway"))]
    return all(name in after and before[name].pid == after[name].pid for name in counting)
