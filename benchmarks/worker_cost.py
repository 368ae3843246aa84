"""What the worker's machine costs to drive: CPU per action, of honest lanes that are never without work.

    python -m benchmarks.worker_cost [--actions 20000] [--json FILE]

A made-up controller keeps one to three INFERs queued on each lane, and a lane ends after its time. Such a
run is recorded once; then its events are replayed to a fresh worker, so that ``observe``, ``decide`` and
``next_wakeup_ns`` alone are measured (the loop that calls them, measured with an empty stand-in, is taken
off). ``warm``: all weights are resident, an INFER has one request. ``batched``: as many requests as its
batch. ``mixed``: for one INFER in ten, weights are unloaded and loaded first, and it waits for them.
"""

from __future__ import annotations

import gc
import heapq
import random
import time
from dataclasses import dataclass, field
from typing import Any

from clockwork_serve.messages import (
    Action,
    Call,
    CodeAdded,
    DeviceSpec,
    Extent,
    Infer,
    Load,
    Result,
    Status,
    TensorSpec,
    Unload,
    Weights,
    Window,
)
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_US
from clockwork_serve.worker import Prepare, Prepared, Start, Worker, WorkerEvent
from clockwork_serve.worker import worker as worker_module
from harness import records
from harness.report import Outcome, finish, parser, table

COMPILED = not worker_module.__file__.endswith(".py")
GOAL_NS = 1500 if COMPILED else 4000
"""For the whole life of one warm INFER."""

REPEATS = 5
SLOTS, SLOT_PAGES = 8, 7
SIZES = (1, 2, 4, 8, 16)
X = TensorSpec(name="x", datatype="FP32", shape=(3, 224, 224))
CODE = records.code("net", SIZES, inputs=(X,), outputs=(X,))
PROFILE = records.profile(
    "net", {size: size * NS_PER_MS for size in SIZES}, load_ns=8 * NS_PER_MS, device_kind="emulated:toy",
    workspace_bytes=dict.fromkeys(SIZES, MIB), io_bytes=dict.fromkeys(SIZES, MIB),
)  # fmt: skip

Step = tuple[WorkerEvent | None, int]
"""What is observed, if not just the time that was asked for, and when."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one worker."""

    name: str
    devices: int
    sizes: tuple[int, ...] = (1,)
    cold_share: float = 0.0

    @property
    def title(self) -> str:
        """For the table."""
        return f"{self.name}, {self.devices} device{'s' if self.devices > 1 else ''}"


CASES = tuple(
    case
    for devices in (1, 50)
    for case in (
        Case("warm", devices),
        Case("batched", devices, sizes=SIZES),
        Case("mixed", devices, cold_share=0.1),
    )
)


@dataclass(slots=True)
class Side:
    """One device as its controller sees it."""

    name: str
    versions: list[int] = field(default_factory=lambda: [1] * SLOTS)
    out: list[int] = field(default_factory=lambda: [0] * SLOTS)
    """Actions under way, by slot of memory."""
    infers: int = 0


@dataclass(slots=True)
class Script:
    """A recorded run: ``steps[:warm]`` make the weights resident, the rest is measured."""

    specs: tuple[DeviceSpec, ...]
    steps: list[Step]
    warm: int
    actions: dict[str, int]


class World:
    """The controller and the lanes around one worker, in virtual time, while its events are recorded."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.specs = tuple(
            DeviceSpec(
                device=f"gpu:{at}", kind=PROFILE.device_kind, pages=SLOTS * SLOT_PAGES, page_bytes=16 * MIB,
                workspace_bytes=MIB, io_bytes=MIB,
            )
            for at in range(case.devices)
        )  # fmt: skip
        self.worker = Worker(self.specs)
        self.sides = {spec.device: Side(spec.device) for spec in self.specs}
        self.rng = random.Random(seed)
        self.coming: list[tuple[int, int, WorkerEvent | None]] = []
        self.steps: list[Step] = []
        self.slots: dict[int, int] = {}
        self.sent = {"INFER": 0, "LOAD": 0, "UNLOAD": 0}
        self.count = 0

    def record(self, infers: int) -> Script:
        """Run until so many INFERs have been sent."""
        self.post(0, CodeAdded(code=CODE, profiles=(PROFILE,)))
        self.run(stop_after=0)
        for side in self.sides.values():
            for slot in range(SLOTS):
                self.load(side, slot, self.steps[-1][1])
        self.run(stop_after=0)
        warm, self.sent = len(self.steps), dict.fromkeys(self.sent, 0)
        for side in self.sides.values():
            self.infer(side, self.steps[-1][1])
        self.run(stop_after=infers)
        return Script(self.specs, self.steps, warm, self.sent)

    def post(self, at_ns: int, event: WorkerEvent | None) -> None:
        """Have the worker hear of it then."""
        self.count += 1
        heapq.heappush(self.coming, (at_ns, self.count, event))

    def run(self, stop_after: int) -> None:
        """Until nothing comes any more."""
        asked_ns: int | None = None
        while self.coming:
            now_ns, _, event = heapq.heappop(self.coming)
            if event is None and now_ns != asked_ns:
                continue
            self.steps.append((event, now_ns))
            if event is not None:
                self.worker.observe(event, now_ns)
            for effect in self.worker.decide(now_ns):
                if isinstance(effect, Start):
                    self.start(effect, now_ns)
                elif isinstance(effect, Prepare):
                    self.post(now_ns, Prepared(device=effect.device, code_id=effect.code.code_id))
                elif isinstance(effect, Result):
                    assert effect.status is Status.OK, effect
                    self.ended(effect, now_ns, more=self.sent["INFER"] < stop_after)
            wake_ns = self.worker.next_wakeup_ns()
            if wake_ns is not None and wake_ns != asked_ns:
                self.post(wake_ns, None)
            asked_ns = wake_ns

    def start(self, start: Start, now_ns: int) -> None:
        """The lane takes its time, give or take 1 %."""
        action = start.action
        if isinstance(action, Infer):
            takes_ns = PROFILE.infer_ns[action.batch]
        else:
            takes_ns = PROFILE.load_base_ns if isinstance(action, Load) else 2 * NS_PER_US
        end_ns = now_ns + round(takes_ns * self.rng.uniform(0.99, 1.01))
        outputs = (b"y",) * len(action.calls) if isinstance(action, Infer) else ()
        self.post(
            end_ns,
            Result(
                action_id=action.action_id, device=start.device, status=Status.OK, started_ns=now_ns,
                ended_ns=end_ns, run_ns=end_ns - now_ns, outputs=outputs,
            ),
        )  # fmt: skip

    def ended(self, result: Result, now_ns: int, *, more: bool) -> None:
        """Fill the exec lane up again."""
        side = self.sides[result.device]
        side.out[self.slots.pop(result.action_id)] -= 1
        side.infers -= result.run_ns > 0 and bool(result.outputs)
        wanted = self.rng.choice((2, 3, 4))  # the one that runs, and those that wait
        while more and side.infers < wanted:
            self.infer(side, now_ns)

    def infer(self, side: Side, now_ns: int) -> None:
        """Order an INFER, perhaps of weights that have to come first."""
        slot = self.rng.randrange(SLOTS)
        if self.rng.random() < self.case.cold_share:
            free = [at for at in range(SLOTS) if not side.out[at]]
            if free:
                slot = self.rng.choice(free)
                self.unload(side, slot, now_ns)
                side.versions[slot] += 1
                self.load(side, slot, now_ns)
        batch = self.rng.choice(self.case.sizes)
        calls = tuple(Call(request_id=f"r{at}", rows=1, tensors=b"") for at in range(batch))
        side.infers += 1
        self.send(
            side, slot, now_ns, "INFER",
            Infer(
                action_id=self.count, device=side.name, model=f"m{slot}", code_id="net", extent=extent(slot),
                version=side.versions[slot], batch=batch, calls=calls, window=self.window(now_ns),
                expected_ns=PROFILE.infer_ns[batch],
            ),
        )  # fmt: skip

    def load(self, side: Side, slot: int, now_ns: int) -> None:
        """Order a LOAD."""
        weights = Weights(weights_id=f"m{slot}", path="", size=100 * MIB)
        self.send(
            side, slot, now_ns, "LOAD",
            Load(
                action_id=self.count, device=side.name, model=f"m{slot}", code_id="net", weights=weights,
                extent=extent(slot), version=side.versions[slot], window=self.window(now_ns), expected_ns=0,
            ),
        )  # fmt: skip

    def unload(self, side: Side, slot: int, now_ns: int) -> None:
        """Order an UNLOAD."""
        self.send(
            side, slot, now_ns, "UNLOAD",
            Unload(
                action_id=self.count, device=side.name, model=f"m{slot}", extent=extent(slot),
                version=side.versions[slot], window=self.window(now_ns),
            ),
        )  # fmt: skip

    def window(self, now_ns: int) -> Window:
        """Open when it arrives, as a controller's is."""
        return Window(now_ns, now_ns + 10_000 * NS_PER_MS)

    def send(self, side: Side, slot: int, now_ns: int, kind: str, action: Action) -> None:
        """It arrives after a hop on the network."""
        side.out[slot] += 1
        self.sent[kind] += 1
        self.slots[action.action_id] = slot
        self.post(now_ns + 100 * NS_PER_US, action)


def extent(slot: int) -> Extent:
    """Where the weights of a slot are."""
    return Extent(slot * SLOT_PAGES, SLOT_PAGES)


class Idle:
    """Stands in for a worker that costs nothing."""

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """Nothing."""

    def decide(self, now_ns: int) -> None:
        """Nothing."""

    def next_wakeup_ns(self) -> None:
        """Nothing."""


def replay(worker: Any, steps: list[Step]) -> float:
    """CPU seconds of telling a worker everything."""
    observe, decide, next_wakeup_ns = worker.observe, worker.decide, worker.next_wakeup_ns
    begun = time.process_time()
    for event, now_ns in steps:
        if event is not None:
            observe(event, now_ns)
        decide(now_ns)
        next_wakeup_ns()
    return time.process_time() - begun


def fresh(script: Script) -> Worker:
    """A worker with all weights resident."""
    worker = Worker(script.specs)
    replay(worker, script.steps[: script.warm])
    return worker


def measure(case: Case, infers: int, seed: int) -> dict[str, Any]:
    """One case: the least of some replays, which others can only make longer."""
    script = World(case, seed).record(infers)
    steps = script.steps[script.warm :]
    gc.collect()
    gc.disable()
    loop_s = min(replay(Idle(), steps) for _ in range(REPEATS))
    worker_s = min(replay(fresh(script), steps) for _ in range(REPEATS))
    gc.enable()
    return {
        "case": case.title, "actions": script.actions, "steps": len(steps),
        "ns_per_action": (worker_s - loop_s) * 1e9 / sum(script.actions.values()),
        "loop_ns_per_action": loop_s * 1e9 / sum(script.actions.values()),
    }  # fmt: skip


def main() -> int:
    """Measure and judge."""
    arguments = parser(__doc__)
    arguments.add_argument("--actions", type=int, default=20_000, help="INFERs in each case")
    given = arguments.parse_args()
    outcome = Outcome("benchmarks.worker_cost")
    found = [measure(case, given.actions, given.seed) for case in CASES]
    print(f"worker compiled: {'yes' if COMPILED else 'no'}; CPU, ns\n")
    rows = [(one["case"], f"{one['ns_per_action']:.0f}", f"{one['loop_ns_per_action']:.0f}") for one in found]
    print(table(("", "an action", "(loop)"), rows))
    for one in found:
        if one["case"].startswith("warm"):
            outcome.at_most(f"one INFER, {one['case']}", GOAL_NS / 1e3, one["ns_per_action"] / 1e3, "us")
    outcome.figures = {"compiled": COMPILED, "cases": found}
    return finish(outcome, given.json)


if __name__ == "__main__":
    raise SystemExit(main())
