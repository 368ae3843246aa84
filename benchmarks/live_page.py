"""What the live page costs: frame times in a browser, bytes, clicks, CPU of a server that is looked at.

A stand-in for a server's observer makes up what 64 devices did for ten minutes and go on doing. A headless
Chromium shows it; readers without a browser take its stream through the gateway of a real server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Final

from msgspec import Struct, structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    Answer,
    Call,
    ControllerEffect,
    ControllerEvent,
    Extent,
    Infer,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
    Window,
    WorkerJoined,
)
from clockwork_serve.serve.http.live import FILES, LivePage, PageServer
from clockwork_serve.serve.transport import OBSERVER_SOCKET
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.telemetry import Step, head_of
from clockwork_serve.telemetry.live import LiveView
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import ClusterTable
from clockwork_serve.workload.zoo import Zoo
from harness import machine, records, repositories
from harness.browser import ABSENT, CHROMIUM, Browser
from harness.http_load import closed_loop, infer_message, run
from harness.process_tree import descendants
from harness.report import Outcome as Found
from harness.report import finish, parser, quantile
from harness.serving import serve

FRAME_MS: Final = 20.0
PAGE_BYTES: Final = 200_000
CLICKS: Final = 3
LOOKED_AT: Final = 0.02
RATE_RPS: Final = 5000
GROWTH_MIB: Final = 8.0
CPU_MS: Final = 8.0
OTHERS: Final = 0.5
"""Cores that others may use beside a browser, whose frames are judged."""
MEMORY_MIB: Final = 256.0
MODELS: Final = 24
BATCH: Final = 4
LEAD_NS: Final = 20 * NS_PER_MS
REFUSED_EVERY: Final = 50
TABLES_S: Final = 3.0
"""How often the page asks for the table that is shown."""


# ------------------------------------------------------------
# The stand-in for an observer.


class MadeUp:
    """Devices that run batches one after the other, and requests of which every fiftieth is refused."""

    def __init__(self, devices: int, rate_rps: float) -> None:
        self.view = LiveView()
        self._devices = devices
        self._every_ns = (
            round(NS_PER_S * BATCH / rate_rps) if devices else NS_PER_S * 3600
        )  # between batches, of all devices
        self._numbers = count()
        self._at_ns = 0
        self._free_ns = [0] * devices
        specs = tuple(records.device(f"gpu{at}", 64) for at in range(devices))
        self.view.on_record(Step(0, (WorkerJoined(worker="w0", devices=specs),), ()))

    def until(self, until_ns: int) -> None:
        """Make up what happens until then."""
        while self._at_ns < until_ns:
            self._batch(next(self._numbers))
            self._at_ns += self._every_ns

    def _batch(self, number: int) -> None:
        now_ns, device = self._at_ns, number % self._devices
        model = f"model-{(number * 7) % MODELS:02}/1"
        names = [f"{number}-{at}" for at in range(BATCH)]
        asked = tuple(
            Request(
                request_id=name, gateway="g0", model=model, arrival_ns=now_ns,
                deadline_ns=now_ns + 100 * NS_PER_MS,
            )
            for name in names
        )  # fmt: skip
        lasts_ns = self._every_ns * self._devices * 4 // 5
        start_ns = max(now_ns + NS_PER_MS, self._free_ns[device])
        end_ns = self._free_ns[device] = start_ns + lasts_ns * (90 + number * 13 % 20) // 100
        infer = Infer(
            action_id=number, device=f"gpu{device}", model=model, code_id="c", extent=Extent(0, 1), version=1,
            batch=BATCH, calls=tuple(Call(request_id=name, rows=1, tensors=b"") for name in names),
            window=Window(start_ns, start_ns + LEAD_NS), expected_ns=lasts_ns,
        )  # fmt: skip
        result = Result(
            action_id=number, device=f"gpu{device}", status=Status.OK, started_ns=start_ns, ended_ns=end_ns
        )
        answers = tuple(
            Answer(request_id=name, gateway="g0", outcome=Outcome.OK, batch=BATCH, queue_ns=NS_PER_MS)
            for name in names
        )
        self.view.on_record(Step(now_ns, asked, (infer,)))
        if number % REFUSED_EVERY == 0:
            name = f"{number}-no"
            refused = Request(
                request_id=name, gateway="g0", model=model, arrival_ns=now_ns, deadline_ns=now_ns + NS_PER_MS
            )
            no = Answer(
                request_id=name, gateway="g0", outcome=Outcome.REJECTED, reason=Reason.WOULD_MISS_DEADLINE,
                message="the deadline would be missed by 5 ms",
            )  # fmt: skip
            self.view.on_record(Step(now_ns, (refused,), (no,)))
        self.view.on_record(Step(now_ns, (result,), answers))


class Watcher:
    """Shows a view the steps of a simulation."""

    def __init__(self, view: LiveView) -> None:
        self._view = view

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Follow a step."""
        self._view.on_record(Step(now_ns, tuple(events), tuple(effects)))


def scene() -> LiveView:
    """Twenty seconds of six devices, simulated: a burst of one kind of model is more than they can do."""
    view, config = LiveView(), ControllerConfig()
    kinds = {"vision": "resnet50_v2", "small": "resnet18_v2", "dense": "densenet121"}
    models = tuple(ModelSet(name=name, kind=kind, copies=4) for name, kind in kinds.items())
    loads = [("steady", ("vision", "small"), 2000, 60, 0.0, None), ("waves", ("dense",), 450, 80, 4.0, None),
             ("burst", ("vision",), 4200, 40, 12.0, 16.0)]  # fmt: skip
    tables = tuple(
        LoadTable(name=name, models=who, arrivals="poisson", rate_rps=rps, slo_ms=slo, start_s=on, stop_s=off)
        for name, who, rps, slo, on, off in loads
    )
    cluster = ClusterTable(devices=6)
    scenario = Scenario(name="scene", seconds=20, models=models, cluster=cluster, loads=tables)
    view.on_record(head_of(config))
    Simulation(
        workload=build(scenario, 1), zoo=Zoo.read("v100"), cluster=Cluster(devices=6), config=config, seed=1,
        watchers=(Watcher(view),),
    ).run()  # fmt: skip
    return view


async def observe(devices: int, rate_rps: float, history_s: float, path: str) -> None:
    """Make up a history, tell where the page is, and go on in real time; without devices, show a scene."""
    made = MadeUp(devices, rate_rps)
    made.until(round(history_s * NS_PER_S))
    view = made.view if devices else scene()
    server = PageServer(LivePage(view), key="key")
    print(f"http://127.0.0.1:{await server.listen(0)}/?key=key", flush=True)
    beside = PageServer(LivePage(view))
    if path:
        await beside.listen_unix(Path(path))
    began_s = time.monotonic()
    while True:
        if devices:
            made.until(round((history_s + time.monotonic() - began_s) * NS_PER_S))
        await asyncio.sleep(0.02)


@contextmanager
def observer(
    devices: int, rate_rps: float, history_s: float, path: Path | None = None
) -> Iterator[tuple[int, str]]:
    """It runs as a process of its own; its pid and the address of its page."""
    with subprocess.Popen(
        [
            sys.executable, "-m", "benchmarks.live_page", "observe", str(devices), str(rate_rps),
            str(history_s), "" if path is None else str(path),
        ],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield process.pid, process.stdout.readline().strip()
        finally:
            process.kill()


# ------------------------------------------------------------
# In a browser.


WATCH: Final = """new Promise((done) => {
  const times = [], works = []; let last = performance.now(), work = 0; const until = last + %d;
  for (const one of [livePage.charts, livePage.lanes]) {
    const draw = Object.getPrototypeOf(one).draw;
    one.draw = (...given) => {
      const at = performance.now(); draw.apply(one, given); work += performance.now() - at;
    };
  }
  const step = (now) => {
    times.push(now - last); last = now; works.push(work); work = 0;
    %s
    if (now < until) requestAnimationFrame(step); else done([times.slice(5), works.slice(5)]);
  };
  requestAnimationFrame(step);
})"""
PAN: Final = "livePage.view.following = false; livePage.view.from -= livePage.view.span * 0.004;"
BAR: Final = """(() => {
  const bin = [...livePage.store.bins.values()].filter((one) => Object.keys(one.ends).length)
    .filter((one) => one.at > livePage.view.from && one.at + one.lasts < livePage.view.to).pop();
  if (!bin) return null;
  const box = document.getElementById("charts").getBoundingClientRect(), v = livePage.view;
  return [box.left + 132 + (bin.at + bin.lasts / 2 - v.from) / v.pixel, box.top + 60];
})()"""
ROW: Final = """(() => {
  const row = document.querySelector("#pane tr.open .bad")?.closest("tr");
  if (!row) return null;
  const box = row.getBoundingClientRect();
  return [box.left + 20, box.top + box.height / 2];
})()"""


class Watched(Struct):
    """Frames of a view: milliseconds between them, and what drawing each took; CPU of the page a frame."""

    times: list[float]
    works: list[float]
    cpu_ms: float
    others: float
    """Cores that anything else used meanwhile."""


def watched(browser: Browser, observer_pid: int, seconds: float, each: str) -> Watched:
    """Watch a view for some seconds, with ``each`` done in every frame."""

    def cpu_s() -> float:
        metrics = browser.call("Performance.getMetrics")["metrics"]
        return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

    browser.call("Performance.enable", timeDomain="threadTicks")
    watch = machine.Watch([os.getpid(), observer_pid, *descendants(browser.process.pid)])
    before = cpu_s()
    times, works = browser.run(WATCH % (round(seconds * 1e3), each))
    cpu_ms = 1e3 * (cpu_s() - before) / len(times)
    disturbance = watch.read()
    browser.call("Performance.disable")
    return Watched(times, works, cpu_ms, disturbance.others_s / disturbance.seconds)


def in_browser(outcome: Found, devices: int, rate_rps: float, minutes: float, seconds: float) -> None:
    """Frames and clicks."""
    with observer(devices, rate_rps, 60 * minutes) as (pid, url), Browser() as browser:
        browser.prefer("light")
        browser.open(url)
        views = {
            "live, 30 s": (30e6, ""), "live, all of it": (60e6 * minutes, ""), "going back": (30e6, PAN),
        }  # fmt: skip
        for name, (us, each) in views.items():
            browser.run(f"livePage.view.following = true, livePage.span({us})")
            browser.until(
                f"livePage.store.covered && livePage.store.covered.from <= livePage.store.now - {us * 0.99}"
            )
            browser.run("new Promise((done) => setTimeout(done, 3000))")
            found = watched(browser, pid, seconds, each)
            judge_frames(outcome, name, found)
            outcome.figures[name] = structs.asdict(found)
        what = f"memory of the observer that keeps {minutes:g} minutes of {devices} devices"
        outcome.at_most(what, MEMORY_MIB, machine.rss_bytes(pid) / (1 << 20), "MiB", digits=0)
        browser.run("livePage.view.following = true, livePage.span(30e6)")
        browser.click(*browser.until(BAR))
        browser.click(*browser.until(ROW))
        sentence = browser.until("document.querySelector('dialog[open] .sentence')?.innerText")
        outcome.at_most("clicks from a red bar to the sentence", CLICKS, 2, digits=0, more=f"({sentence})")
        outcome.none("errors of the page", [one for one in browser.said if "501" not in one])


def judge_frames(outcome: Found, name: str, found: Watched) -> None:
    """Frames of a view, which say little where others want the cores, and their CPU, which does."""
    times, works = found.times, found.works
    beside = (
        f"(median {quantile(times, 0.5):.1f}, worst {max(times):.0f}, {len(times)} frames; drawing: median "
        f"{quantile(works, 0.5):.1f}, p95 {quantile(works, 0.95):.1f}; others used {found.others:.1f} cores)"
    )
    p95 = quantile(times, 0.95)
    outcome.at_most(f"p95 of frame times, {name}", FRAME_MS, p95, "ms", digits=1, more=beside)
    outcome.at_most(f"CPU of the page a frame, {name}", CPU_MS, found.cpu_ms, "ms", digits=1)
    if found.others > OTHERS:
        outcome.invalid = f"frames: others used {found.others:.1f} cores"


def draw(picture: Path) -> None:
    """The picture of docs/operate/live.md: a scene, a stretch of it selected."""
    with observer(0, 1, 0) as (_, url), Browser(width=1280, height=720) as browser:
        browser.prefer("light")
        browser.open(url)
        browser.until("livePage.store.covered && livePage.store.now > 1e7")
        browser.run("livePage.span(8e5), livePage.view.following = false, livePage.view.from = 11.75e6")
        browser.run("livePage.select(12.2e6, 12.4e6)")
        browser.run("new Promise((done) => setTimeout(done, 4000))")
        browser.picture(picture)


class Reader:
    """Reads a stream and asks for tables, as the page does; or opens it and reads nothing."""

    def __init__(self, address: tuple[str, int], *, reads: bool = True) -> None:
        self._address = address
        self._socket = socket.create_connection(address, timeout=10)
        if not reads:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.sendall(self._asking("stream?pixel=24000"))
        self.read_bytes = 0
        self._left = threading.Event()
        if reads:
            for work in (self._read, self._ask):
                threading.Thread(target=work, daemon=True).start()

    def _asking(self, what: str) -> bytes:
        host = f"{self._address[0]}:{self._address[1]}"
        return f"GET /live/{what} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()

    def _read(self) -> None:
        try:
            while data := self._socket.recv(1 << 16):
                self.read_bytes += len(data)
        except OSError:
            return

    def _ask(self) -> None:
        while not self._left.wait(TABLES_S):
            with socket.create_connection(self._address, timeout=10) as asking:
                asking.sendall(self._asking("panels"))
                while asking.recv(1 << 16):
                    pass

    def close(self) -> None:
        """Leave."""
        self._left.set()
        self._socket.close()


def looked_at(outcome: Found, folder: Path, seconds: float, rounds: int) -> None:
    """CPU of a server's observer and gateway with one who looks, less that without."""
    repositories.emulated(folder / "models", "m", {1: 0.2, 2: 0.3, 4: 0.4, 8: 0.6})
    with ExitStack() as stack:
        serving = stack.enter_context(serve(folder / "models", device="emulated"))
        path = Path(serving.server.server.run_dir) / OBSERVER_SOCKET
        observed, _ = stack.enter_context(observer(8, RATE_RPS, 60, path))
        message = infer_message(serving.http_url, "m", [("x", "FP32", (1, 4), bytes(16))], slo_ms=1000)
        pids = serving.pids()

        def work(requests: int) -> float:
            before = sum(map(machine.cpu_ns, pids))
            run(closed_loop(serving.http_url, lambda _: message, requests=requests, connections=16))
            return (sum(map(machine.cpu_ns, pids)) - before) / requests / 1e3

        work(1000)
        request_us = work(10_000)
        gateway = serving.server.pid("gateway-0")
        assert gateway is not None
        metrics = serving.server.metrics_url.split("/")[2].split(":")
        address = (metrics[0], int(metrics[1]))
        used: dict[str, list[float]] = {"without": [], "with": []}
        read_bytes = 0
        for _ in range(rounds):
            for name, taken in used.items():
                reader = Reader(address) if name == "with" else None
                time.sleep(1)
                before = machine.cpu_ns(observed) + machine.cpu_ns(gateway)
                time.sleep(seconds)
                taken.append((machine.cpu_ns(observed) + machine.cpu_ns(gateway) - before) / seconds / 1e9)
                if reader is not None:
                    read_bytes = reader.read_bytes
                    reader.close()
                    assert read_bytes > 1000, "the reader was sent nothing"
        more = sorted(b - a for a, b in zip(used["without"], used["with"], strict=True))[rounds // 2]
        server = request_us * 1e-6 * RATE_RPS
        beside = (
            f"({1e3 * more:.1f} ms a second of {server:.2f} s: {request_us:.0f} us a request; "
            f"{read_bytes / (seconds + 1) / 1e3:.0f} kB/s)"
        )
        what = f"one who looks at {RATE_RPS:,} requests/s, of the server's CPU"
        outcome.at_most(what, 100 * LOOKED_AT, 100 * more / server, "%", digits=2, more=beside)
        outcome.figures["looked_at"] = {"cpu_s_of_a_second": used, "request_us": request_us}
        stopped(outcome, address, (observed, gateway), seconds)


def stopped(outcome: Found, address: tuple[str, int], pids: tuple[int, int], seconds: float) -> None:
    """Memory of observer and gateway while readers have stopped reading."""
    readers = [Reader(address, reads=False) for _ in range(10)]
    time.sleep(2)
    before_bytes = sum(map(machine.rss_bytes, pids))
    time.sleep(max(seconds, 10))
    grown = (sum(map(machine.rss_bytes, pids)) - before_bytes) / (1 << 20)
    for one in readers:
        one.close()
    what = "memory of observer and gateway, with ten readers who stopped reading"
    outcome.at_most(what, GROWTH_MIB, grown, "MiB more", digits=1)


def measure(given: argparse.Namespace, folder: Path) -> Found:
    """All of it."""
    outcome = Found("benchmarks.live_page")
    size = sum(path.stat().st_size for path in FILES.iterdir())
    outcome.at_most("bytes of the page in all", PAGE_BYTES, size, digits=0)
    looked_at(outcome, folder, 5 if given.short else 20, 1 if given.short else 3)
    if CHROMIUM is None:
        outcome.invalid = ABSENT
    else:
        minutes, seconds = (1, 5) if given.short else (10, 20)
        in_browser(outcome, given.devices, given.rate, minutes, seconds)
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    if sys.argv[1:2] == ["observe"]:
        devices, rate, history, path = sys.argv[2:]
        asyncio.run(observe(int(devices), float(rate), float(history), path))
        return 0
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="a minute of history, and seconds of watching")
    options.add_argument("--devices", type=int, default=64)
    options.add_argument("--rate", type=float, default=6400, help="requests a second in the browser")
    options.add_argument("--picture", type=Path, metavar="FILE", help="only draw a picture of the page")
    given = options.parse_args()
    if given.picture is not None:
        draw(given.picture)
        return 0
    with tempfile.TemporaryDirectory() as name:
        outcome = measure(given, Path(name))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
