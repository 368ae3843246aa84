"""Processes of a server that are stopped (SIGSTOP) under load: reports of it, and losses.

Clients with their own clocks send all the time, some over persistent connections and some over new ones, and
readiness is queried every 50 ms. Stopped processes are never resumed, except where the whole server is
stopped: then no process may be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import repositories
from harness.http_load import infer_message
from harness.report import Outcome, finish, parser
from harness.server import Server, started
from harness.serving import read_metrics, total

STAYING, COMING = 6, 6
"""Clients whose connections stay, and clients that connect for each request."""
PAUSE_S: Final = 0.02
PROBE_S: Final = 0.05
PATIENCE_S: Final = 12.0
"""Who has no answer by then will get none."""
SLO_MS: Final = 200
SAID_S: Final = 2.0
SERVED_S: Final = 5.0
AFTER_S: Final = 3.0
"""How long the load goes on once all serve again."""
X: Final = [("x", "FP32", (1, 4), bytes(16))]


@dataclass(slots=True)
class Ask:
    """One request, or one probe. ``how``: its HTTP status, or why there was none: ``refused``, ``lost``.

    ``gateway`` is the one that answered, or that had answered over this connection before.
    """

    sent_s: float
    ended_s: float = 0.0
    how: str = ""
    gateway: str = ""


@dataclass(slots=True)
class Load:
    """What clients saw, in the order in which it ended."""

    port: int
    asks: list[Ask] = field(default_factory=list)
    probes: list[Ask] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Clients and probes, for the time of a block."""
        message = infer_message(f"http://127.0.0.1:{self.port}", "m0", X, slo_ms=SLO_MS)
        tasks = [
            asyncio.create_task(self._client(message, stays=at < STAYING)) for at in range(STAYING + COMING)
        ]
        tasks.append(asyncio.create_task(self._probes()))
        try:
            yield
        finally:
            self.over.set()
            await asyncio.gather(*tasks)

    async def _client(self, message: bytes, *, stays: bool) -> None:
        connection: Connection | None = None
        gateway = ""
        while not self.over.is_set():
            connection, ask = await self._ask(connection, message, gateway)
            gateway = ask.gateway
            self.asks.append(ask)
            if connection is not None and (not stays or not ask.how.isdigit()):
                connection.close()
                connection, gateway = None, ""
            await asyncio.sleep(PAUSE_S)

    async def _ask(
        self, connection: Connection | None, message: bytes, gateway: str = ""
    ) -> tuple[Connection | None, Ask]:
        """Ask once, over a new connection if there is none; the connection, if it could be made."""
        ask = Ask(time.monotonic(), gateway=gateway)
        try:
            connection = connection or await Connection.open(self.port)
            ask.how, ask.gateway = await connection.ask(message)
        except ConnectionRefusedError:
            ask.how = "refused"
        except (OSError, EOFError, TimeoutError):
            ask.how = "lost"
        ask.ended_s = time.monotonic()
        return connection, ask

    async def _probes(self) -> None:
        probe = b"GET /v2/health/ready HTTP/1.1\r\nHost: here\r\n\r\n"

        async def one() -> None:
            connection, ask = await self._ask(None, probe)
            if connection is not None:
                connection.close()
            self.probes.append(ask)

        asked = []
        while not self.over.is_set():
            asked.append(asyncio.create_task(one()))
            await asyncio.sleep(PROBE_S)
        await asyncio.gather(*asked)


class Connection:
    """One to the HTTP port, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @staticmethod
    async def open(port: int) -> Connection:
        """Connect. Raises OSError."""
        async with asyncio.timeout(PATIENCE_S):
            return Connection(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, message: bytes) -> tuple[str, str]:
        """The status, and the gateway that answered. Raises OSError, EOFError or TimeoutError."""
        async with asyncio.timeout(PATIENCE_S):
            self._writer.write(message)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            await self._reader.readexactly(int(lines.get("content-length", "0")))
        request_id = lines.get("clockwork-request-id", "")
        return head.split()[1], request_id.rsplit("-", 2)[0]

    def close(self) -> None:
        """Let go of it."""
        self._writer.close()


@contextmanager
def served(folder: Path, gateways: int) -> Iterator[Server]:
    """A server of two emulated devices, in processes of its own."""
    root = folder / "models"
    if not root.exists():
        repositories.emulated(root, "m0", {1: 10.0}, load_ms=2)
    devices = tuple(
        DeviceConfig(device=f"emulated:{n}", kind="emulated", apart=True, memory_bytes=64 * MIB)
        for n in (0, 1)
    )
    config = ServerConfig(
        settings=Settings(
            repository=str(root), http_port=0, grpc_port=0, metrics_port=0, gateways=gateways,
            log_level="warning", drain_s=2.0,
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=devices,
        run_dir=str(folder),
    )  # fmt: skip
    with started(config, folder / "log") as server:
        yield server


@dataclass(slots=True)
class Stop:
    """One process stopped once; times in seconds since. ``said_s``: till nobody heard that it is ready."""

    said_s: float
    replaced_s: float
    served_s: float
    inside: int
    """Requests lost with what was stopped."""
    elsewhere: int
    """Others that were lost, or refused a connection where another gateway was there."""
    refused: int
    answered: int


async def stopped_once(server: Server, name: str, gateways: int) -> Stop:
    """Stop that process, and let the load go on until another one has served for a while."""
    load = Load(server.http_port)
    # Where there is another gateway, an answer must come from the new one.
    wanted = name if gateways > 1 else ""
    async with load.running():
        await asyncio.sleep(1.0)
        stop_s = time.monotonic()
        victim = server.signal(name, signal.SIGSTOP)
        replaced_s = await _until(lambda: server.pids().get(name) not in {None, victim})

        def again() -> list[Ask]:
            since_s = replaced_s if wanted else stop_s
            return [a for a in load.asks if a.how == "200" and a.sent_s > since_s and wanted in a.gateway]

        await _until(again)
        served_s = min(ask.ended_s for ask in again())
        await asyncio.sleep(AFTER_S)
    return judged(load, name, gateways, stop_s, replaced_s, served_s)


def judged(load: Load, name: str, gateways: int, stop_s: float, replaced_s: float, served_s: float) -> Stop:
    """What clients saw of it."""
    wrong = [
        ask.ended_s
        for ask in load.probes
        if ask.how == "200" and stop_s < ask.sent_s and ask.ended_s < min(served_s, replaced_s)
    ]
    after = [ask for ask in load.asks if ask.ended_s > stop_s]
    lost, refused = ([ask for ask in after if ask.how == how] for how in ("lost", "refused"))
    # Whose a connection was that never answered the kernel alone knows: as it was lost, the stopped one's.
    inside = [ask for ask in lost if name.startswith("gateway") and ask.gateway in {"", name}]
    alone = name.startswith("gateway") and gateways == 1
    return Stop(
        said_s=(max(wrong, default=stop_s) if name == "controller" else replaced_s) - stop_s,
        replaced_s=replaced_s - stop_s, served_s=served_s - stop_s, inside=len(inside),
        elsewhere=len(lost) - len(inside) + (0 if alone else len(refused)),
        refused=len(refused), answered=sum(ask.how.isdigit() for ask in after),
    )  # fmt: skip


async def _until(condition: Callable[[], object], timeout_s: float = 20.0) -> float:
    """When it came true, by our clock."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it is another process that makes it true
            await asyncio.sleep(0.01)
    return time.monotonic()


def one_stopped(outcome: Outcome, folder: Path, name: str, gateways: int, times: int) -> None:
    """Rows on one process that is stopped so many times, each time under load."""
    what = f"{name} stopped" + (f", one of {gateways}" if gateways > 1 else "")
    stops = []
    with served(folder, gateways) as server:
        for _ in range(times):
            stops.append(asyncio.run(stopped_once(server, name, gateways)))
            time.sleep(3.0)  # what lives for less than five seconds was never well
        ended = total(read_metrics(server.facts["metrics"]), "clockwork_processes_ended_total", process=name)
    said, again = max(stop.said_s for stop in stops), max(stop.served_s for stop in stops)
    said_so = "ready is 503" if name == "controller" else "replaced"
    outcome.at_most(f"{what}: {said_so} after (most of {times})", SAID_S, said, "s")
    outcome.at_most(f"{what}: served again after (most)", SERVED_S, again, "s")
    elsewhere, inside, refused, answered = (
        sum(getattr(stop, field) for stop in stops)
        for field in ("elsewhere", "inside", "refused", "answered")
    )
    outcome.judge(
        f"{what}: requests lost that were not inside it ({answered} answered)",
        asked="0", found=f"{elsewhere}; inside it {inside}; refused while none listened {refused}",
        good=elsewhere == 0,
    )  # fmt: skip
    outcome.judge(
        f"{what}: counted as ended", asked=f"{times}", found=f"{ended:.0f}", good=ended == times
    )  # fmt: skip
    outcome.figures[what] = [asdict(stop) for stop in stops]


def workers_stopped(outcome: Outcome, folder: Path) -> None:
    """All workers are stopped under load; they go on long before they would be ended."""
    with served(folder, 1) as server:
        workers = [pid for name, pid in server.pids().items() if name.startswith("worker")]
        load = Load(server.http_port)

        async def stop() -> float:
            async with load.running():
                await asyncio.sleep(1.0)
                stop_s = time.monotonic()
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    for pid in workers:
                        os.kill(pid, number)
                    await asyncio.sleep(4.0)
            return stop_s

        stop_s = asyncio.run(stop())
    said = [ask.ended_s - stop_s for ask in load.probes if ask.how == "503" and ask.sent_s > stop_s]
    found_s = min(said, default=float("inf"))
    outcome.at_most("all workers stopped: ready is 503 after", SAID_S, found_s, "s")
    good = sum(ask.how == "200" for ask in load.asks[-20:])
    what = "all workers stopped for 4 s: the last 20 requests, 4 s after they went on"
    outcome.at_least(what, 18, good, "with 200", digits=0)


def all_paused(outcome: Outcome, folder: Path, seconds: float) -> None:
    """The whole server is stopped for so long: nobody is ended."""
    with served(folder, 2) as server:
        before = server.pids()
        load = Load(server.http_port)

        async def pause() -> None:
            async with load.running():
                await asyncio.sleep(1.0)
                for pid in before.values():
                    os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(seconds)
                for pid in before.values():
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(6.0)

        asyncio.run(pause())
        after = server.pids()
    ended = sorted(name for name in before if before[name] != after.get(name))
    good = sum(ask.how == "200" for ask in load.asks[-50:])
    what = f"the whole server paused for {seconds:g} s"
    outcome.none(f"{what}: processes ended", ended)
    outcome.at_least(f"{what}: the last 50 requests, seconds later", 45, good, "with 200", digits=0)


def keeper_stopped(outcome: Outcome, folder: Path) -> None:
    """Who loads a model hears that nobody is there to do it."""
    with served(folder, 1) as server:
        pid = server.signal("keeper", signal.SIGSTOP)
        begun_s = time.monotonic()
        said = subprocess.run(
            [sys.executable, "-m", "clockwork_serve", "models", "--url", server.http_url, "load", "m0"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        took_s = time.monotonic() - begun_s
        os.kill(pid, signal.SIGCONT)
    named = said.returncode != 0 and f"the supervisor (process {pid})" in said.stderr
    outcome.judge(
        "keeper stopped: `clockwork models load` says so, the command's start included",
        asked="<= 5 s", found=f"{took_s:.2f} s" if named else f"not: {said.stderr[-200:]!r}",
        good=named and took_s <= 5.0,
    )  # fmt: skip


def busy(outcome: Outcome, folder: Path, seconds: float) -> None:
    """Four programs want the cores, too: nobody is ended for that."""
    with served(folder, 2) as server, contextlib.ExitStack() as stack:
        before = server.pids()
        for _ in range(4):
            burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(burner.wait)
            stack.callback(burner.kill)
        load = Load(server.http_port)

        async def last() -> None:
            async with load.running():
                await asyncio.sleep(seconds)

        asyncio.run(last())
        after = server.pids()
    ended = sorted(name for name in before if before[name] != after.get(name))
    outcome.none(f"beside four programs that burn cores for {seconds:g} s: processes ended", ended)
    ready = sum(ask.how == "200" for ask in load.probes)
    outcome.judge(
        "there, said to be ready", asked="always", found=f"{ready} of {len(load.probes)}",
        good=ready == len(load.probes),
    )  # fmt: skip


def rows(outcome: Outcome, *, short: bool) -> None:
    """All of it: short, about three minutes."""
    times = 2 if short else 8
    with tempfile.TemporaryDirectory(prefix="cw") as name:
        folder = Path(name)
        one_stopped(outcome, folder, "controller", 1, times)
        one_stopped(outcome, folder, "gateway-0", 1, times)
        one_stopped(outcome, folder, "gateway-1", 2, times)
        workers_stopped(outcome, folder)
        all_paused(outcome, folder, 5.0)
        if not short:
            all_paused(outcome, folder, 20.0)
        keeper_stopped(outcome, folder)
        busy(outcome, folder, 20.0 if short else 60.0)


def main() -> int:
    """Run it alone; the exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--short", action="store_true")
    given = arguments.parse_args()
    outcome = Outcome("benchmarks.stalls.stuck")
    rows(outcome, short=given.short)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
