"""More requests than the controller or its devices can process, on virtual time: goodput, and that of others.

The controller's brain, the credit, the summaries and the gateway's refusals are the server's own; only the
CPU time of the controller's turns is made up (``COSTS_US``), the workers are exact and the network takes
50 us. So the figures are exact, whatever else the machine does. Each case is also run without refusals by the
controller's summary. In *all*, every model is asked for equally; in *slow*, by a gateway that is so busy that
each turn of its loop takes 5 ms; in *one*, one model besides them, far more than can be served, and the
goodput is that of the others.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Answer,
    CodeAdded,
    CodeReady,
    ControllerEffect,
    ControllerEvent,
    CreditBlocked,
    Frame,
    Infer,
    Load,
    ModelAdded,
    Outcome,
    Reason,
    Request,
    RequestCredit,
    Result,
    SoonestEnds,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.serve.flow_control import SWEEP_NS, CreditGate, CreditIssuer, KnownEnds, SummaryIssuer
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import NS_PER_S, NS_PER_US, ms
from harness import records
from harness.report import Outcome as Judged
from harness.report import finish, parser, percent, table

INFER_MS: Final = {1: 2.6, 2: 3.8, 4: 5.9, 8: 9.2}
"""ResNet50 on a V100, by batch size."""
LOAD_MS, SLO_MS, NETWORK_NS = 8.0, 100.0, 50 * NS_PER_US
COSTS_US: Final = {"turn": 20, "event": 32, "action": 32, "answer": 8, "summary": 40, "end": 16}
"""CPU time of a controller on a busy machine: a turn, an event, an effect, a summary, each model in it."""
DRAINED_NS: Final = ms(400)
RATES: Final = {32: (8_000.0, 12_000.0, 18_000.0, 36_000.0), 4: (3_000.0, 4_000.0, 6_000.0, 12_000.0)}
"""By devices: less than the best rate, then this, 1.5 and 3 times it. Of 32 the controller is the limit."""
TURN_NS: Final = ms(5)
"""Of a slow gateway."""
OTHERS: Final = {32: 6_000.0, 4: 1_500.0}
CROWD: Final = 36_000.0
LEAST: Final = 0.9


@dataclass(slots=True)
class Counts:
    """What became of requests for one kind of models."""

    offered: int = 0
    good: int = 0


@dataclass(slots=True)
class Sides:
    """Devices' lanes: when each is free."""

    exec_ns: int = 0
    load_ns: int = 0


@dataclass(slots=True, eq=False)
class _Wire:
    """The controller's end of the link: frames of this turn, and how they are sent before it ends."""

    flush: Callable[[], None]
    frames: list[Frame] = field(default_factory=list)

    def send(self, frame: Frame) -> None:
        self.frames.append(frame)


class World:
    """One gateway, one controller whose turns take time, and exact workers."""

    def __init__(self, devices: int, *, refuses: bool, turn_ns: int = 1) -> None:
        self.counts = {False: Counts(), True: Counts()}
        self.busy_ns = self.heard = self.by_summary = self.for_credit = 0
        self._ran_ns = 0
        self._refuses, self._turn_ns = refuses, turn_ns
        self._models = 4 * devices
        self._now_ns = ms(1000)
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._brain = Controller(ControllerConfig(max_batch=8))
        self._inbox: list[ControllerEvent] = []
        self._free_ns = 0
        self._turn_due = False
        self._lanes: dict[str, Sides] = {}
        self._open: dict[str, tuple[int, bool]] = {}
        self._wire = _Wire(lambda: self._flush(0))
        self._credit = CreditIssuer(self._event, lambda: self._now_ns, lambda: self._ran_ns)
        self._summaries = SummaryIssuer(self._brain.soonest_ends, self._wire.send, lambda: 0)
        self._gate = CreditGate(self._to_controller, self._refused, lambda: self._now_ns)
        self._sweeps = False
        self._ends = KnownEnds()
        self._profile = records.profile(
            "c", {size: ms(took) for size, took in INFER_MS.items()}, load_ns=ms(LOAD_MS)
        )
        self._start(devices)

    def _start(self, devices: int) -> None:
        specs = tuple([records.device(f"d{at}", 4 * self._models) for at in range(devices)])
        self._lanes = {spec.device: Sides() for spec in specs}
        events: list[ControllerEvent] = [CodeAdded(code=records.code(), profiles=(self._profile,))]
        events += [ModelAdded(model=records.model(f"m{at}")) for at in range(self._models)]
        events.append(WorkerJoined(worker="w", devices=specs))
        events += [CodeReady(device=spec.device, code_id="c") for spec in specs]
        for event in events:
            self._brain.observe(event, self._now_ns)
        self._perform(self._brain.decide(self._now_ns), 0)
        self._credit.add_gateway(cast("Link", self._wire))
        self._flush(0)

    def offer(self, rates_rps: dict[bool, float], seconds: float, seed: int) -> None:
        """Offer Poisson streams: to all models but the first (False), and to the first (True); and drain."""
        rng = np.random.default_rng(seed)
        for crowd, rate_rps in rates_rps.items():
            count = rng.poisson(rate_rps * seconds)
            models = np.zeros(count, int) if crowd else rng.integers(1, self._models, count)
            at_ns = (rng.random(count) * seconds * NS_PER_S).astype(int)
            for when, model in zip(at_ns.tolist(), models.tolist(), strict=True):
                self._at(self._in_turn(self._now_ns + when), self._arrive, f"m{model}/1", crowd)
        end_ns = self._now_ns + round(seconds * NS_PER_S) + DRAINED_NS
        while self._heap and self._heap[0][0] <= end_ns:
            self._now_ns, _, work, given = heapq.heappop(self._heap)
            work(*given)
        self._now_ns = end_ns

    def _at(self, at_ns: int, work: Callable[..., None], *given: object) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_ns, self._count, work, given))

    # The gateway

    def _in_turn(self, at_ns: int) -> int:
        return -(-at_ns // self._turn_ns) * self._turn_ns

    def _arrive(self, model: str, crowd: bool) -> None:  # noqa: FBT001
        counts, deadline_ns = self.counts[crowd], self._now_ns + ms(SLO_MS)
        counts.offered += 1
        if self._refuses and self._ends.shortage_ns(model, deadline_ns, self._now_ns) > 0:
            self.by_summary += 1
            return
        self._count += 1
        request = Request(
            request_id=str(self._count), gateway="g", model=model, arrival_ns=self._now_ns,
            deadline_ns=deadline_ns,
        )  # fmt: skip
        self._open[request.request_id] = deadline_ns, crowd
        if self._gate.submit(request) and not self._sweeps:
            self._sweeps = True
            self._at(self._now_ns + SWEEP_NS, self._sweep)

    def _sweep(self) -> None:
        self._gate.sweep()
        self._sweeps = self._gate.holds
        if self._sweeps:
            self._at(self._now_ns + SWEEP_NS, self._sweep)

    def _refused(self, request: Request, waited_ns: int) -> None:
        del self._open[request.request_id]
        self.for_credit += 1

    def _to_controller(self, frame: Frame) -> None:
        if isinstance(frame, CreditBlocked):
            self._at(self._now_ns + NETWORK_NS, self._credit.blocked, self._wire)
        else:
            self._at(self._now_ns + NETWORK_NS, self._event, frame)

    def _from_controller(self, frame: Frame) -> None:
        if isinstance(frame, RequestCredit):
            self._gate.on_credit(frame)
        elif isinstance(frame, SoonestEnds):
            self._ends.update(frame)
        elif isinstance(frame, Answer):
            deadline_ns, crowd = self._open.pop(frame.request_id)
            self.counts[crowd].good += frame.outcome is Outcome.OK and self._now_ns <= deadline_ns

    # The controller

    def _event(self, event: ControllerEvent) -> None:
        self._inbox.append(event)
        self._wake()

    def _wake(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._at(max(self._now_ns, self._free_ns), self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        events, self._inbox = self._inbox, []
        requests = [event for event in events if isinstance(event, Request)]
        self.heard += len(requests)
        if requests:
            self._credit.received(cast("Link", self._wire), requests)
        if self._summaries.active:
            for request in requests:
                self._summaries.asked_for(request.model)
        for event in events:
            self._brain.observe(event, self._now_ns)
        effects = self._brain.decide(self._now_ns)
        cost_us = COSTS_US["turn"] + COSTS_US["event"] * len(events)
        for effect in effects:
            cost_us += COSTS_US["answer" if isinstance(effect, Answer) else "action"]
            if isinstance(effect, Answer) and effect.reason is Reason.WOULD_MISS_DEADLINE:
                self._summaries.rejected(self._now_ns)
        if self._summaries.active:
            self._summaries.publish(self._now_ns)
        for frame in self._wire.frames:
            if isinstance(frame, SoonestEnds):
                cost_us += COSTS_US["summary"] + COSTS_US["end"] * len(frame.ends)
        cost_ns = cost_us * NS_PER_US
        self._free_ns = self._now_ns + cost_ns
        self.busy_ns += cost_ns
        self._ran_ns += cost_ns
        self._perform(effects, cost_ns)
        self._flush(cost_ns)
        wakeup_ns = self._brain.next_wakeup_ns()
        if wakeup_ns is not None:
            self._at(max(wakeup_ns, self._free_ns), self._wake_at, wakeup_ns)

    def _wake_at(self, wakeup_ns: int) -> None:
        if self._brain.next_wakeup_ns() == wakeup_ns:
            self._wake()

    def _flush(self, cost_ns: int) -> None:
        for frame in self._wire.frames:
            self._at(self._in_turn(self._now_ns + cost_ns + NETWORK_NS), self._from_controller, frame)
        self._wire.frames.clear()

    def _perform(self, effects: list[ControllerEffect], cost_ns: int) -> None:
        for effect in effects:
            if isinstance(effect, Answer):
                self._wire.send(effect)
            elif isinstance(effect, Infer | Load | Unload):
                self._at(self._now_ns + cost_ns + NETWORK_NS, self._execute, effect)

    # The workers

    def _execute(self, action: Infer | Load | Unload) -> None:
        lanes, infers = self._lanes[action.device], isinstance(action, Infer)
        free_ns = lanes.exec_ns if infers else lanes.load_ns
        start_ns = max(self._now_ns, free_ns, action.window.earliest_ns)
        end_ns, status = start_ns, Status.OK
        if start_ns > action.window.latest_ns:
            status = Status.TOO_LATE
        elif isinstance(action, Infer):
            end_ns += self._profile.infer_ns[action.batch]
        elif isinstance(action, Load):
            end_ns += ms(LOAD_MS)
        if infers:
            lanes.exec_ns = max(free_ns, end_ns) if status is Status.OK else free_ns
        elif status is Status.OK:
            lanes.load_ns = end_ns
        good = isinstance(action, Infer) and status is Status.OK
        outputs = tuple([b""] * len(action.calls)) if isinstance(action, Infer) and good else ()
        result = Result(
            action_id=action.action_id, device=action.device, status=status, started_ns=start_ns,
            ended_ns=end_ns, outputs=outputs,
        )  # fmt: skip
        self._at(end_ns + NETWORK_NS, self._event, result)


Case = tuple[str, int, dict[bool, float]]


def run(case: Case, seconds: float, seed: int, *, refuses: bool) -> World:
    """One case, after a second in which weights are loaded."""
    kind, devices, rates_rps = case
    world = World(devices, refuses=refuses, turn_ns=TURN_NS if kind == "slow" else 1)
    world.offer({False: 1_000.0}, 1.0, seed)
    world.counts = {False: Counts(), True: Counts()}
    world.busy_ns = world.heard = 0
    world.offer(rates_rps, seconds, seed)
    return world


def name_of(case: Case) -> str:
    """How a case is called in the results."""
    kind, devices, rates_rps = case
    return f"{devices} devices, {kind}, {sum(rates_rps.values()):,.0f}/s"


def conclude(judged: Judged, cases: list[Case], good_rps: dict[str, float]) -> None:
    """The promise for each case from the best rate on; more than the best goodput can be left beyond it."""
    for case in cases:
        kind, devices, rates_rps = case
        whole = rates_rps[False]
        if kind != "one":
            whole = max([good_rps[name_of((kind, devices, {False: rate}))] for rate in RATES[devices][:2]])
        found = good_rps[name_of(case)]
        judged.judge(
            name_of(case), asked=f">= {LEAST:.0%} of {whole:,.0f}/s",
            found=f"{found:,.0f}/s, {percent(found, whole)}", good=found >= LEAST * whole,
        )  # fmt: skip


def main() -> int:
    """Run all; the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=2.0, help="of each case, of virtual time")
    given = options.parse_args()
    cases: list[Case] = [
        (kind, devices, {False: rate_rps})
        for kind in ("all", "slow")
        for devices, rates_rps in RATES.items()
        for rate_rps in rates_rps
    ]
    cases += [("one", devices, {False: rate_rps, True: CROWD}) for devices, rate_rps in OTHERS.items()]
    judged, rows = Judged("benchmarks.crowd"), []
    good_rps: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for refuses, found in good_rps.items():
        for case in cases:
            world = run(case, given.seconds, given.seed, refuses=refuses)
            counts = world.counts[False]
            found[name_of(case)] = counts.good / given.seconds
            rows.append((
                name_of(case), "yes" if refuses else "no", f"{counts.good / given.seconds:,.0f}",
                percent(counts.good, counts.offered), f"{world.heard / given.seconds:,.0f}",
                f"{world.busy_ns / NS_PER_S / given.seconds:.2f}", world.by_summary, world.for_credit,
            ))  # fmt: skip
    heads = "case", "gateway refuses", "good/s", "of offered", "heard/s", "controller", "by summary"
    print(table((*heads, "for credit"), rows))
    conclude(judged, [case for case in cases if case[2][False] != RATES[case[1]][0]], good_rps[True])
    judged.figures = {"with": good_rps[True], "without": good_rps[False]}
    return finish(judged, given.json)


if __name__ == "__main__":
    sys.exit(main())
