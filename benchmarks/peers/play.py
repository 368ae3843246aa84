"""The load generator of the comparison: a scenario's schedule to one server, one record per request; it judges no server.

    python -m benchmarks.peers.play PLAN.json

It says one line of JSON when the load begins, one when it is over, and writes its records to the plan's file. Every
request has the same inputs; some good answers are compared with the right one. A client waits ten times the SLO,
then it hangs up.
"""  # fmt: skip

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import uvloop
from msgspec import Struct

from benchmarks.peers.peer import Peer, Request, Setup, differs
from benchmarks.peers.registry import peer
from benchmarks.peers.wires import NO_ANSWER, Wire, wire
from clockwork_serve.workload.scenario import read_scenario
from clockwork_serve.workload.stream import ClosedLoad, Workload, build

PATIENCE: Final = 10
CHECK_EVERY: Final = 16
WRONG: Final = 1e-3
START_S: Final = 0.2
LEAST_WAIT_S: Final = 0.001


class Plan(Struct, frozen=True, kw_only=True):
    """What to play to whom; ``expected`` is a file of the right outputs in the order of the models."""

    peer: str
    scenario: str
    seed: int
    port: int
    path: str
    headers: tuple[tuple[str, str], ...]
    body: str
    expected: str
    records: str
    core: int
    messages: dict[str, str] = {}  # noqa: RUF012 (msgspec copies it)
    leave_out: tuple[str, ...] = ()
    """Loads that are not played."""
    load_calls: tuple[str, ...] = ()
    """Models to be loaded and unloaded by calls, in turn."""
    load_calls_per_s: float = 0.0
    held: int = 20
    """So many of them stay loaded."""


class Record(Struct, frozen=True, array_like=True):
    """One request. Instants in ns from the start of the load; ``end`` is a verdict's kind, ``wrong`` or ``none``."""

    load: int
    model: int
    due_ns: int
    sent_ns: int
    done_ns: int
    slo_ns: int
    end: str


class Player:
    """Plays one plan."""

    def __init__(self, plan: Plan, workload: Workload, asked: Peer, line: Wire) -> None:
        self._plan = plan
        self._workload = workload
        self._peer = asked
        self._wire = line
        self._expected = np.load(plan.expected)
        self._start_ns = 0
        self._good = 0
        self.records: list[Record] = []
        self.tasks: set[asyncio.Task[Any]] = set()

    async def warm(self) -> None:
        """Each model twice, one request at a time."""
        for _ in range(2):
            for index in range(len(self._workload.models)):
                await self._one(-1, index, time.monotonic_ns(), int(30e9), patience_s=30.0)
        self.records.clear()

    async def play(self, end_ns: int) -> None:
        """The whole load, and what is out at its end."""
        self._start_ns = time.monotonic_ns() + round(START_S * 1e9)
        for load in self._workload.closed:
            if self._workload.loads[load.load] not in self._plan.leave_out:
                for index in load.models:
                    for _ in range(load.concurrency):
                        self._begin(self._client(load, int(index), end_ns))
        await self._open()
        await self._until(end_ns)
        while self.tasks:
            await asyncio.wait(self.tasks)

    async def _open(self) -> None:
        for arrivals in self._workload.open():
            rows = zip(arrivals.times_ns, arrivals.models, arrivals.slos_ns, arrivals.loads, strict=True)
            for at_ns, model, slo_ns, load in rows:
                if self._workload.loads[load] not in self._plan.leave_out:
                    await self._until(at_ns)
                    self._begin(self._one(load, model, self._start_ns + at_ns, slo_ns))

    async def _client(self, load: ClosedLoad, index: int, end_ns: int) -> None:
        """One client of a closed load: it sends when it has an answer, and waits after a no."""
        while (now_ns := time.monotonic_ns()) < self._start_ns + end_ns:
            wait_ms = await self._one(load.load, index, max(now_ns, self._start_ns), load.slo_at(now_ns - self._start_ns))
            if wait_ms is not None:
                told = load.retry == "retry_after" and wait_ms > 0
                fixed_s = LEAST_WAIT_S if load.retry_ns is None else load.retry_ns / 1e9
                await asyncio.sleep(wait_ms / 1e3 if told else fixed_s)

    async def _one(
        self, load: int, model: int, due_ns: int, slo_ns: int, *, patience_s: float | None = None
    ) -> float | None:
        """Ask once. None if it was answered well; else how long the server says to wait, 0 if it does not say."""
        name = self._workload.models[model][0]
        answer, sent_ns = await self._wire.ask(name, patience_s or PATIENCE * slo_ns / 1e9)
        done_ns = time.monotonic_ns()
        wait_ms: float | None = None
        if answer is NO_ANSWER:
            end, wait_ms = "none", 0.0
        else:
            verdict = self._peer.judge(answer)
            end = verdict.kind
            if end == "ok":
                self._good += 1
                if self._good % CHECK_EVERY == 1 and differs(self._peer.output(answer), self._expected[model]) > WRONG:
                    end = "wrong"
            else:
                wait_ms = verdict.wait_ms or 0.0
        start = self._start_ns
        self.records.append(Record(load, model, due_ns - start, sent_ns - start, done_ns - start, slo_ns, end))
        return wait_ms

    async def load_calls(self, end_ns: int) -> tuple[int, int]:
        """Have models loaded, and others unloaded, at a steady rate; how many loads went well, and how many not."""
        import aiohttp

        names, every_ns = self._plan.load_calls, round(1e9 / self._plan.load_calls_per_s)
        done = [0, 0]
        await self._until(0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{self._plan.port}") as session:

            async def call(number: int) -> None:
                if number >= self._plan.held:
                    gone = names[(number - self._plan.held) % len(names)]
                    async with session.post(self._peer.load_path(gone, unload=True)):
                        pass
                async with session.post(self._peer.load_path(names[number % len(names)])) as response:
                    done[response.status != 200] += 1

            number = 0
            while (at_ns := number * every_ns) < end_ns:
                await self._until(at_ns)
                self._begin(call(number))
                number += 1
        return done[0], done[1]

    async def _until(self, at_ns: int) -> None:
        """Until an instant of the load, at least giving others their turn."""
        while not self._start_ns:
            await asyncio.sleep(0.001)
        await asyncio.sleep(max(0.0, (self._start_ns + at_ns - time.monotonic_ns()) / 1e9))

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def run(plan: Plan) -> None:
    """Play it."""
    scenario = read_scenario(plan.scenario)
    workload = build(scenario, plan.seed)
    asked = peer(plan.peer)
    messages = {name: Path(path).read_bytes() for name, path in plan.messages.items()}
    body = Path(plan.body).read_bytes() if plan.body else b""
    request = Request(plan.path, plan.headers, body, messages)
    names = tuple(name for name, _ in workload.models)
    line = wire(asked.protocol, request, plan.port, names)
    player = Player(plan, workload, asked, line)
    if not plan.load_calls:
        await player.warm()
    gc.collect()
    gc.freeze()
    gc.disable()
    _tell({"begun": True})
    end_ns = round(scenario.seconds * 1e9)
    cpu_s = time.process_time()
    calls = asyncio.ensure_future(player.load_calls(end_ns)) if plan.load_calls else None
    await player.play(end_ns)
    loaded = await calls if calls else (0, 0)
    _tell({"over": True, "cpu_s": time.process_time() - cpu_s, "loads": loaded[0], "loads_failed": loaded[1]})
    Path(plan.records).write_bytes(msgspec.json.encode(sorted(player.records, key=lambda one: one.due_ns)))
    await line.close()


def _tell(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def main() -> None:
    """Play the plan that ``argv`` names."""
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)
    os.sched_setaffinity(0, {plan.core})
    uvloop.run(run(plan))


def write_plan(setup: Setup, asked: Peer, scenario: Path, x: Any, more: dict[str, Any]) -> Path:
    """The plan's file, and what it names."""
    request = asked.request(setup, x)
    body = setup.folder / "body"
    body.write_bytes(request.body)
    messages = {}
    for name, message in request.messages.items():
        path = setup.folder / f"message-{name}"
        path.write_bytes(message)
        messages[name] = str(path)
    plan = Plan(
        peer=asked.name, scenario=str(scenario), port=setup.port, path=request.path, headers=request.headers,
        body=str(body) if request.body else "", messages=messages, **more,
    )  # fmt: skip
    path = setup.folder / "plan.json"
    path.write_bytes(msgspec.json.encode(plan))
    return path


if __name__ == "__main__":
    main()
