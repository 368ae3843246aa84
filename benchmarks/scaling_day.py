"""As many devices as the scaling brain wants: are they enough, not too many, and steady? By the best known.

    python -m benchmarks.scaling_day [--short] [--json FILE]

On virtual time the serving code serves a day whose load swings by four times, the eight hours of the real
trace (where CLOCKWORK_TRACES has it), an hour of steady load, and one with a step of four times up and down.
Devices join a minute after they are wanted, and leave at once; both are counted from when they are ordered.
Held against the fewest devices that would do in each ten minutes, found by simulating these with any number.
Rates are scaled down, and models slowed down, so that a day can be simulated.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, Self

import numpy as np
from msgspec import Struct, structs

from clockwork_serve.apps.plan.demand import may_miss
from clockwork_serve.apps.scaling.brain import ScalingBrain, ScalingRules
from clockwork_serve.apps.scaling.demand import LikelyLoad, RecentDemand
from clockwork_serve.apps.scaling.future import FutureWorld, Judged, judge
from clockwork_serve.apps.simulate import SimulationQuestion, question_of, read_with_zoo
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Request
from clockwork_serve.sim import Simulation
from clockwork_serve.sim.faults import Faults
from clockwork_serve.sim.host import SimulatedWorker
from clockwork_serve.sim.tally import ReadyWeights
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.traces import MINUTE_NS
from harness import repositories
from harness.hosts import Host, Machine, certificates, words_of
from harness.ports import free_port
from harness.report import Outcome, finish, parser
from harness.serving import serve, total, until

RULES: Final = ScalingRules(target=0.999, lead_s=60, least=1, most=40)
EVERY_S: Final = 30
SLOT_S: Final = 600
SWING: Final = 4.0
HOURS_MOST: Final = 1.15
CHANGES_MOST: Final = 2
SERVICE_MS: Final = 50
"""Of the model on real processes, whose batches are of one request."""
LITTLE_RPS: Final = 9.0
FAR_MOST: Final = 3
MODELS: Final = 6
TRACE: Final = "maf2019/d01_500fn_min480-959_invocations.csv.gz"
ZOO: Final = """model,weights_mb,load_ms,infer_b1_ms,infer_b2_ms,infer_b4_ms,infer_b8_ms
net,64,15,120,180,300,540
"""
SCENARIO: Final = """name = "{name}"
seconds = {seconds}

[cluster]
zoo = "net.csv"
memory_mib = 16384

[[models]]
name = "net"
kind = "net"
copies = {models}

[[loads]]
name = "people"
models = ["net"]
arrivals = "azure"
trace = "{trace}"
slo_ms = 1000
mapping = "stripe"
{more}
"""


# ------------------------------------------------------------
# Loads.


def write_minutes(path: Path, rates_rps: Sequence[float]) -> None:
    """A trace of calls per minute at these rates, of models of which the first are the most popular."""
    weights = 1 / np.arange(1, MODELS + 1) ** 0.9
    minutes = np.outer(weights / weights.sum(), np.array(rates_rps) * 60)
    numbers = ",".join(str(at + 1) for at in range(len(rates_rps)))
    lines = [f"HashOwner,HashApp,HashFunction,Trigger,{numbers}"]
    for number, counts in enumerate(np.rint(minutes).astype(int).tolist()):
        lines.append(f"o,a,f{number},http,{','.join(map(str, counts))}")
    path.write_text("\n".join(lines) + "\n")


def day(minutes: int, mean_rps: float) -> list[float]:
    """One period: from the least load to the most, which is so many times as much, and back."""
    depth = (SWING - 1) / (SWING + 1)
    return [mean_rps * (1 - depth * math.cos(2 * math.pi * at / minutes)) for at in range(minutes)]


def question(folder: Path, name: str, seconds: float, trace: str, more: str = "") -> SimulationQuestion:
    """A scenario of a trace, made ready."""
    (folder / "net.csv").write_text(ZOO)
    path = folder / f"{name}.toml"
    path.write_text(SCENARIO.format(name=name, seconds=seconds, trace=trace, models=MODELS, more=more))
    scenario, zoo = read_with_zoo(path)
    traces = os.environ.get("CLOCKWORK_TRACES")
    return question_of(scenario, zoo, config=ControllerConfig(), seed=1, traces=traces)


# ------------------------------------------------------------
# A fleet that follows the brain.


class Change(Struct, frozen=True):
    """When, in seconds, how many devices were wanted from then on, and why."""

    at_s: float
    wanted: int
    reason: str


class Followed(Struct, frozen=True, kw_only=True):
    """How a run went: shares in time, hours of devices, and what changed when."""

    requests: int
    in_time: float
    device_h: float
    changes: tuple[Change, ...]
    took_s: float

    @property
    def changes_most(self) -> int:
        """The most changes in any ten minutes."""
        times = [change.at_s for change in self.changes]
        return max([sum(at <= one < at + 600 for one in times) for at in times], default=0)

    @property
    def turns(self) -> int:
        """How often it changed its direction."""
        counts = [change.wanted for change in self.changes]
        ways = [1 if after > before else -1 for before, after in pairwise(counts)]
        return sum(one != other for one, other in pairwise(ways))


class Fleet:
    """A simulated server whose devices join and leave as they are wanted."""

    def __init__(self, asked: SimulationQuestion, devices: int) -> None:
        cluster = structs.replace(asked.cluster, devices=devices)
        self.demand, self._weights = RecentDemand(), ReadyWeights()
        self.simulation = Simulation(
            workload=asked.workload, zoo=asked.zoo, cluster=cluster, config=asked.config, seed=asked.seed,
            constants=asked.constants, watchers=[self],
        )  # fmt: skip
        self._faults = self.simulation.faults = Faults(self.simulation, (), asked.seed)
        self._specs = cluster.specs(f"emulated:{asked.zoo.name}")[0]
        self._made = devices
        self._hosts = deque(self.simulation.hosts.values())
        self._coming: deque[list[SimulatedWorker]] = deque()
        self.device_ns = 0
        self.world = FutureWorld(
            kinds={f"{name}/1": kind for name, kind in asked.workload.models}, zoo=asked.zoo,
            cluster=asked.cluster, config=asked.config,
        )  # fmt: skip

    @property
    def ordered(self) -> int:
        """Devices that are there or coming."""
        return len(self._hosts) + len(self._coming)

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """See what the observer sees."""
        for event in events:
            if isinstance(event, Request):
                self.demand.observe(event)
        self._weights.on_step(events, effects)

    def likely(self) -> LikelyLoad | None:
        """What may come when a device has joined that is ordered now."""
        return self.demand.likely(self.simulation.now_ns, round(RULES.lead_s * NS_PER_S))

    def now(self) -> FutureWorld:
        """The world with what is loaded now."""
        return structs.replace(
            self.world, loaded=tuple(key for key, devices in self._weights.devices.items() if devices)
        )

    def want(self, wanted: int) -> None:
        """Order devices, cancel orders, let devices go."""
        while self.ordered < wanted:
            order: list[SimulatedWorker] = []
            self._coming.append(order)
            self._faults.later(round(RULES.lead_s * NS_PER_S), partial(self._arrive, order))
        while self.ordered > wanted:
            if self._coming:
                self._coming.pop()
            else:
                self._faults.leave(self._hosts.pop())

    def _arrive(self, order: list[SimulatedWorker]) -> Sequence[ControllerEvent]:
        if not any(order is one for one in self._coming):
            return ()  # cancelled
        self._coming = deque(one for one in self._coming if one is not order)
        specs = tuple(structs.replace(spec, device=f"gpu{self._made}") for spec in self._specs)
        host = self.simulation.host(f"w{self._made}", specs)
        self._made += 1
        self._hosts.append(host)
        return self._faults.join(host)

    def run(self, until_ns: int) -> None:
        """Go on until then."""
        self.device_ns += self.ordered * (until_ns - self.simulation.now_ns)
        self.simulation.run(until_ns=until_ns)


def followed(asked: SimulationQuestion, devices: int) -> Followed:
    """Serve a load with the devices that the brain wants, from so many on."""
    began = time.monotonic()
    fleet, brain, changes = Fleet(asked, devices), ScalingBrain(RULES), [Change(0.0, devices, "the start")]
    for at_s in range(EVERY_S, round(asked.scenario.seconds) + 1, EVERY_S):
        fleet.run(at_s * NS_PER_S)
        load = fleet.likely()
        if load is None:
            continue
        advice = brain.decide(at_s * NS_PER_S, fleet.ordered, partial(judge, load, fleet.now()))
        if advice.wanted != fleet.ordered:
            changes.append(Change(at_s, advice.wanted, advice.reason))
            fleet.want(advice.wanted)
    fleet.simulation.run()
    total = fleet.simulation.tally.total()
    return Followed(
        requests=total.offered, in_time=total.ok / total.offered, changes=tuple(changes[1:]),
        device_h=fleet.device_ns / NS_PER_S / 3600, took_s=time.monotonic() - began,
    )  # fmt: skip


# ------------------------------------------------------------
# The fewest that would do.


def _met(found: Judged) -> bool:
    return found.missed <= may_miss(RULES.target, found.requests)


def fewest(asked: SimulationQuestion) -> list[int]:
    """For each ten minutes, the fewest devices by which the target is met in them."""
    world = FutureWorld(
        kinds={f"{name}/1": kind for name, kind in asked.workload.models}, zoo=asked.zoo,
        cluster=asked.cluster, config=asked.config,
        loaded=tuple(f"{name}/1" for name, _ in asked.workload.models),
    )  # fmt: skip
    names = tuple(f"{name}/1" for name, _ in asked.workload.models)
    parts = list(asked.workload.open())
    columns = [
        np.concatenate([np.array(getattr(part, column), np.int64) for part in parts])
        for column in ("times_ns", "models", "slos_ns")
    ]
    found: list[int] = []
    count = 4
    for begin_s in range(0, round(asked.scenario.seconds), SLOT_S):
        begin_ns, window_ns = begin_s * NS_PER_S, SLOT_S * NS_PER_S
        own = (columns[0] >= begin_ns) & (columns[0] < begin_ns + window_ns)
        times, models, slos = (column[own] for column in columns)
        load = LikelyLoad(
            window_ns, times - begin_ns, models, slos, np.zeros_like(models), names, ((0, "", -1),)
        )
        met: dict[int, bool] = {}
        while not met.get(count):
            met[count] = _met(judge(load, world, count))
            count += not met[count]
        while count > 1 and met.get(count - 1) is not False:
            met[count - 1] = _met(judge(load, world, count - 1))
            count -= met[count - 1]
        found.append(count)
    return found


# ------------------------------------------------------------
# What is asked.


def long_run(outcome: Outcome, name: str, asked: SimulationQuestion) -> None:
    """A load held against the fewest devices that would do."""
    best = fewest(asked)
    best_h = sum(best) * SLOT_S / 3600
    found = followed(asked, best[0])
    outcome.figures[name] = {"found": structs.asdict(found), "fewest": best, "fewest_h": best_h}
    print(
        f"  {name}: {found.requests:,} requests, {min(best)} to {max(best)} devices would do; "
        f"{len(found.changes)} changes, took {found.took_s:.0f} s", flush=True,
    )  # fmt: skip
    outcome.at_least(f"{name}: in time", 99.9, 100 * found.in_time, "%", digits=3)
    outcome.at_most(
        f"{name}: device hours beside the fewest", HOURS_MOST, found.device_h / best_h, "x", digits=3,
        more=f"({found.device_h:.1f} h, {best_h:.1f} h)",
    )  # fmt: skip


def steady(outcome: Outcome, folder: Path, minutes: int, rate_rps: float) -> None:
    """A load that asks for no change."""
    write_minutes(folder / "steady.csv", [rate_rps] * minutes)
    asked = question(folder, "steady", minutes * 60, "steady.csv")
    found = followed(asked, max(fewest(asked)))
    outcome.figures["steady"] = structs.asdict(found)
    outcome.at_most("steady load: changes in ten minutes", CHANGES_MOST, found.changes_most, digits=0)


def step(outcome: Outcome, folder: Path, minutes: int, rate_rps: float) -> None:
    """A load makes a step up, and one down."""
    third = minutes // 3
    rates = [rate_rps] * third + [SWING * rate_rps] * third + [rate_rps] * third
    write_minutes(folder / "step.csv", rates)
    asked = question(folder, "step", len(rates) * 60, "step.csv")
    best = fewest(asked)
    found = followed(asked, best[0])
    outcome.figures["step"] = {"found": structs.asdict(found), "fewest": best}
    up_s, down_s = third * 60, 2 * third * 60
    ups = [one for one in found.changes if up_s <= one.at_s < down_s]
    needed = max(best[third * 60 // SLOT_S : 2 * third * 60 // SLOT_S])
    reached = [one.at_s - up_s for one in ups if one.wanted >= needed]
    outcome.at_most("a step of 4 times: seconds until enough are wanted", 60, min(reached, default=1e9), "s")
    outcome.at_most("a step of 4 times: most devices beside the fewest", 1.25,
                    max([one.wanted for one in ups], default=0) / needed, "x")  # fmt: skip
    outcome.at_most("a step of 4 times up and down: changes of direction", 1, found.turns, digits=0)


def virtual(outcome: Outcome, folder: Path, *, short: bool) -> None:
    """All that is simulated."""
    minutes = 180 if short else 1440
    steady(outcome, folder, 60 if short else 240, 35)
    step(outcome, folder, 90, 12)
    write_minutes(folder / "day.csv", day(minutes, 35))
    long_run(outcome, "a day", question(folder, "day", minutes * 60, "day.csv"))
    traces = os.environ.get("CLOCKWORK_TRACES")
    if traces and Path(traces, TRACE).is_file():
        length = 60 if short else 480
        more = f"drop_top = 1\nrate_rps = 35\nminutes = {length}"
        trace = question(folder, "real", length * MINUTE_NS // NS_PER_S, TRACE, more)
        long_run(outcome, "the real trace", trace)
    else:
        print(f"  no real trace: CLOCKWORK_TRACES has no {TRACE}")


# ------------------------------------------------------------
# Real processes: a server, and emulated workers that join as they are wanted and leave under load.


class Load:
    """Requests at a rate that may change, each by a thread of its own; it counts how they end, by status."""

    def __init__(self, url: str, slo_ms: float) -> None:
        self.rate_rps = 0.0
        self.ends: Counter[int] = Counter()
        """By HTTP status; 0: no answer."""
        self._url = f"{url}/v2/models/net/infer"
        tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]}
        self._body = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": slo_ms}}).encode()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._pool.shutdown()

    def _send(self) -> None:
        while not self._stopped.wait(1 / self.rate_rps if self.rate_rps else 0.1):
            if self.rate_rps:
                self._pool.submit(self._ask)

    def _ask(self) -> None:
        request = urllib.request.Request(self._url, data=self._body)  # noqa: S310 - a URL of ours
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                status = response.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        self.ends[status] += 1


class FarWorkers:
    """Workers of one emulated device each, which join and leave the server."""

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        self._folder, self._settings = folder, settings
        self.running: list[Machine] = []
        self.started = self.stopped = 0

    def want(self, count: int) -> None:
        """Start or end as many as are missing or too many."""
        while len(self.running) < count:
            self.started += 1
            name = f"far{self.started}"
            settings = {**self._settings, "machine_name": name, "log_level": "warning"}
            words = ["worker", *words_of(settings), "--device", "emulated:v100", "--cache"]
            log = self._folder / f"{name}.log"
            self.running.append(Machine(Host("127.0.0.1"), [*words, str(self._folder / "far")], log))
        while len(self.running) > count:
            self.stopped += 1
            self.running.pop().close()


def real(outcome: Outcome, folder: Path, seconds: float) -> None:
    """A quarter of the time one device has little to do, then four times as much comes, then little again."""
    repositories.emulated(folder / "models", "net", {1: SERVICE_MS})
    own, far = certificates(folder, 2)
    at, store = f"127.0.0.1:{free_port()}", str(folder / "store")
    Path(store).mkdir()
    workers = FarWorkers(folder, {"controller": at, "store": store, **far})
    settings = {
        "listen_machines": at, "scaling_target": 0.99, "scaling_lead_s": 5,
        "scaling_devices": (1, FAR_MOST + 1), "store": store, **own,
    }  # fmt: skip
    wanted: list[int] = []
    with (
        serve(folder / "models", device="emulated", **settings) as serving,
        Load(serving.http_url, 1000) as load,
    ):
        began = time.monotonic()
        try:
            while (now_s := time.monotonic() - began) < seconds:
                load.rate_rps = LITTLE_RPS * (SWING if 0.25 <= now_s / seconds < 0.7 else 1)
                wanted.append(round(total(serving.metrics(), "clockwork_devices_wanted")))
                workers.want(min(FAR_MOST, max(0, wanted[-1] - 1)))
                time.sleep(1)
            workers.want(0)  # under load
            load.rate_rps = 0.0
            until("all is answered", lambda: not total(serving.metrics(), "clockwork_requests_open"))
            metrics = serving.metrics()
            url = f"{serving.server.metrics_url.rpartition('/')[0]}/live/scaling"
            with urllib.request.urlopen(url) as told:  # noqa: S310 - a URL of ours
                said = json.load(told)
        finally:
            workers.want(0)
    ends = dict(load.ends)
    outcome.figures["real"] = {"ends": ends, "wanted": wanted, "said": said}
    lost = total(metrics, "clockwork_requests_total", outcome="failed")
    lost += total(metrics, "clockwork_answers_unmatched_total")
    lost += sum(ends.get(status, 0) for status in (0, 500, 503))
    outcome.at_most("real processes: requests lost", 0, lost, digits=0, more=f"of {sum(ends.values()):,}")
    outcome.at_least("real processes: devices wanted at four times the load", 2, max(wanted), digits=0)
    outcome.at_least("real processes: workers that joined, and left under load", 1, workers.started, digits=0)
    outcome.judge(
        "real processes: the advice has a reason", asked="a sentence", found=str(said.get("reason")),
        good=bool(said.get("reason")),
    )  # fmt: skip


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="three hours for the day, one for the trace")
    options.add_argument("--part", choices=("virtual", "real"), help="only that")
    given = options.parse_args()
    outcome = Outcome("benchmarks.scaling_day")
    with tempfile.TemporaryDirectory() as name:
        if given.part != "real":
            virtual(outcome, Path(name), short=given.short)
        if given.part != "virtual":
            real(outcome, Path(name), 120 if given.short else 600)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
