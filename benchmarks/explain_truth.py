"""Whether explanations are true: what they say would have helped is tried in the world that they cannot see.

    python -m benchmarks.explain_truth                1,000 requests of ten runs
    python -m benchmarks.explain_truth --short        200 of them
    python -m benchmarks.explain_truth --only slow    runs whose names begin so

Ten mixed runs on virtual time, each with a fault of its own kind: one to four devices, memory for all models
or for some, classes and tenants, LOADs; half of them with the noise of the paper's Fig 10, half without any.
Of each, requests by chance: served fast and slow, refused, late. From the run's journal alone each is decided
again, and remedies are looked for. Then the same run begins anew, with its hidden durations, delays and dice,
is stopped where a remedy would begin, and goes on with it in a process of its own. What an action draws
follows from what it is, so the same action has the same luck in both worlds. "Met" is what the controller
answers: OK.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Final

from msgspec.structs import replace

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Answer,
    Cancel,
    ControllerEffect,
    ControllerEvent,
    Outcome,
    Profile,
    Request,
    WorkerJoined,
)
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.sim.counterfactual import Change, Scene, play
from clockwork_serve.sim.host import CALL
from clockwork_serve.sim.remedies import (
    BELOW,
    LIKELY,
    SLO_TIMES,
    STEPS_UP,
    UNLIKELY,
    RemedyKind,
    RequestCase,
    other_remedies,
    smallest_slo,
)
from clockwork_serve.telemetry import Step
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.tables import FaultTable, TenantTable
from clockwork_serve.workload.zoo import Zoo
from harness import report

REQUESTS: Final = 6_000
"""Of each run, about."""
LEAD_NS: Final = 2 * NS_PER_S
AFTER_NS: Final = NS_PER_S
"""A case's steps begin so long before the arrival, and end so long after the deadline or 4 SLOs."""
SLOS_TRIED: Final = (1.0, *STEPS_UP)
NOISY, EXACT = "noisy", "exact"
ASKED: Final = {NOISY: 0.90, EXACT: 0.99}
MISSED: Final = 0.05
PERHAPS: Final = 0.25
"""So many remedies may be said to depend on luck,"""
CALIBRATED: Final = 0.1
"""and as often as is said of them they shall help."""
AGAIN: Final = 0.999
ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: ``rate`` in parts of what the devices serve one by one, ``pages`` of what all models need.

    ``noise``: durations are noisy. ``slower``: how many times as long as profiles say INFERs really take.
    """

    fault: FaultTable
    devices: int
    kinds: tuple[str, ...]
    copies: int
    rate: float
    pages: float
    slos_ms: tuple[float, ...]
    noise: bool
    urgent: bool = False
    tenants: bool = False
    slower: float = 1.0

    @property
    def name(self) -> str:
        """The kind of its fault."""
        return self.fault.kind


SMALL: Final = ("resnet18_v2", "mobile_pose_mobilenet1_0", "googlenet")
MIXED: Final = ("resnet50_v2", "resnet18_v2", "densenet121", "googlenet")
AT_S: Final = 3.0
"""When faults begin."""
M0: Final = "m0-0000"

PLANS: Final = (  # what begins or ends at an instant that no journal tells of is noisy in any case
    Plan(
        FaultTable(kind="crash", at_s=AT_S, for_s=0.3, worker=0),
        devices=2, kinds=MIXED, copies=4, rate=1.3, pages=1.2, slos_ms=(50, 100), noise=True,
    ),
    Plan(
        FaultTable(kind="hang", at_s=AT_S, for_s=0.2, worker=0),
        devices=2, kinds=SMALL, copies=6, rate=1.0, pages=0.6, slos_ms=(30, 200), noise=True,
    ),
    Plan(
        FaultTable(kind="stop", at_s=AT_S, for_s=0.15, worker=1),
        devices=3, kinds=MIXED, copies=6, rate=1.2, pages=0.5, slos_ms=(40, 80), noise=True, urgent=True,
    ),
    Plan(
        FaultTable(kind="slow", at_s=AT_S, for_s=2.0, device=0, factor=2.5),
        devices=1, kinds=MIXED, copies=3, rate=1.1, pages=1.5, slos_ms=(60, 150), noise=True,
    ),
    Plan(
        FaultTable(kind="delay", at_s=AT_S, for_s=2.0, worker=0, ms=3.0),
        devices=2, kinds=SMALL, copies=10, rate=1.4, pages=0.4, slos_ms=(25, 100), noise=True, tenants=True,
    ),
    Plan(
        FaultTable(kind="skew", at_s=AT_S, for_s=2.0, worker=0, ms=2.0),
        devices=2, kinds=MIXED, copies=4, rate=1.2, pages=0.7, slos_ms=(50, 100), noise=False, urgent=True,
    ),
    Plan(
        FaultTable(kind="remove_model", at_s=AT_S, for_s=1.0, model=M0),
        devices=4, kinds=MIXED, copies=8, rate=1.5, pages=0.3, slos_ms=(40, 100), noise=False,
    ),
    Plan(
        FaultTable(kind="add_model", at_s=AT_S, model=M0),
        devices=2, kinds=MIXED, copies=4, rate=1.2, pages=1.2, slos_ms=(50, 100), noise=False, tenants=True,
    ),
    Plan(
        FaultTable(kind="gateway", at_s=AT_S),
        devices=1, kinds=SMALL, copies=5, rate=1.3, pages=0.5, slos_ms=(20, 60), noise=False, slower=1.2,
    ),
    Plan(
        FaultTable(kind="cancel", at_s=2.0, for_s=3.0, factor=0.2),
        devices=3, kinds=MIXED, copies=5, rate=1.4, pages=0.4, slos_ms=(50, 100), noise=False, urgent=True,
    ),
)  # fmt: skip


class Recorder:
    """A watcher that keeps all steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Keep one."""
        self.steps.append(Step(now_ns, tuple(events), tuple(effects)))


class Answered(Exception):
    """The request that is waited for has its answer."""


class Waiting:
    """A watcher that ends a simulation with the answer to a request."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Look for it."""
        for effect in effects:
            if isinstance(effect, Answer) and effect.request_id == self._request_id:
                raise Answered(effect.outcome is Outcome.OK)


def simulation_of(plan: Plan, seed: int, *watchers: Recorder) -> Simulation:
    """The run's simulation, at its start."""
    zoo = Zoo.read("v100")
    sets = tuple(ModelSet(name=f"m{at}", kind=kind, copies=plan.copies) for at, kind in enumerate(plan.kinds))
    mean_s = sum(zoo[kind].infer_ns[1] for kind in plan.kinds) / len(plan.kinds) / NS_PER_S
    rate_rps = plan.rate * plan.devices / mean_s
    names = tuple(one.name for one in sets)
    loads = [
        LoadTable(
            name=f"load{at}", models=names, arrivals="poisson", rate_rps=rate_rps / len(plan.slos_ms),
            popularity="zipf", zipf_s=0.9, slo_ms=slo_ms, priority=4 if plan.urgent and not at else 0,
            tenant=f"t{at}" if plan.tenants else None,
        )
        for at, slo_ms in enumerate(plan.slos_ms)
    ]  # fmt: skip
    tenants = tuple(
        TenantTable(name=f"t{at}", burst_s=1.0, device_ms_per_s=900.0 * plan.devices)
        for at in range(len(loads) if plan.tenants else 0)
    )
    scenario = Scenario(
        name=plan.name, seconds=max(6.0, REQUESTS / rate_rps), models=sets, loads=tuple(loads),
        tenants=tenants,
    )  # fmt: skip
    page_bytes = 16 * MIB
    sizes = [-(-zoo[kind].weights_bytes // page_bytes) for kind in plan.kinds]
    pages = max(max(sizes) + 1, round(plan.pages * plan.copies * sum(sizes) / plan.devices))
    return Simulation(
        workload=build(scenario, seed), zoo=zoo, seed=seed, keyed=True, noise=plan.noise,
        cluster=Cluster(devices=plan.devices, pages=pages, page_bytes=page_bytes),
        config=ControllerConfig(expected_devices=plan.devices), faults=(plan.fault,), watchers=watchers,
        truth={kind: slowed(zoo.profile(kind), plan.slower) for kind in plan.kinds},
    )  # fmt: skip


def slowed(profile: Profile, times: float) -> Profile:
    """A profile of so many times the durations."""
    longer = {size: round(lasts_ns * times) for size, lasts_ns in profile.infer_ns.items()}
    return replace(profile, infer_ns=longer)


# ------------------------------------------------------------
# From the journal alone.


@dataclass(slots=True)
class Sampled:
    """A request that was drawn: how it ended, where its steps are."""

    request: Request
    answer: Answer
    kind: str
    arrived: int
    """The step it came in."""


def sampled(steps: Sequence[Step], count: int, rng: random.Random) -> list[Sampled]:
    """Requests by chance, as many of each kind of end as there are, by arrival."""
    came: dict[str, tuple[Request, int]] = {}
    by_kind: dict[str, list[Sampled]] = {}
    cancelled = {
        event.request_id for step in steps for event in step.events if isinstance(event, Cancel)
    }  # when their clients leave follows from their SLOs
    for at, step in enumerate(steps):
        for event in step.events:
            if isinstance(event, Request):
                came[event.request_id] = event, at
        for effect in step.effects:
            if isinstance(effect, Answer) and (found := came.get(effect.request_id)) is not None:
                request, arrived = found
                if request.arrival_ns > LEAD_NS // 4 and effect.request_id not in cancelled:
                    kind = kind_of(request, effect, step.now_ns)
                    by_kind.setdefault(kind, []).append(Sampled(request, effect, kind, arrived))
    drawn: list[Sampled] = []
    for left, kind in zip(
        range(len(by_kind), 0, -1), sorted(by_kind, key=lambda one: len(by_kind[one])), strict=True
    ):
        share = min(len(by_kind[kind]), (count - len(drawn)) // left)
        drawn += rng.sample(by_kind[kind], share)
    return sorted(drawn, key=lambda one: one.arrived)


def kind_of(request: Request, answer: Answer, now_ns: int) -> str:
    """How a request ended, in one word."""
    if answer.outcome is not Outcome.OK:
        return str(answer.outcome)
    return "slow" if now_ns - request.arrival_ns > request.slo_ns // 2 else "fast"


def cases(
    steps: Sequence[Step], config: ControllerConfig, drawn: Sequence[Sampled]
) -> Iterator[tuple[Sampled, RequestCase]]:
    """Each request that was drawn in its surroundings, with controllers as they were."""
    controller = Controller(config)
    wanted: deque[tuple[int, Sampled]] = deque(
        sorted(((begin(steps, one), one) for one in drawn), key=lambda each: each[0])
    )
    for at, step in enumerate(steps):
        while wanted and wanted[0][0] == at:
            _, one = wanted.popleft()
            request = one.request
            last_ns = request.deadline_ns + max(AFTER_NS, 4 * request.slo_ns)
            end = next((n for n in range(one.arrived, len(steps)) if steps[n].now_ns > last_ns), len(steps))
            early = Scene(controller.fork(), steps[at:end])
            good = one.answer.outcome is Outcome.OK
            yield one, RequestCase(request, early, one.arrived - at, good=good)
        for event in step.events:
            controller.observe(event, step.now_ns)
        controller.decide(step.now_ns)
        controller.next_wakeup_ns()


def begin(steps: Sequence[Step], one: Sampled) -> int:
    """The step that a request's early scene begins with: the second at the soonest."""
    from_ns = one.request.arrival_ns - LEAD_NS
    at = one.arrived
    while at > 1 and steps[at - 1].now_ns >= from_ns:
        at -= 1
    return max(1, at)


@dataclass(slots=True)
class Claim:
    """What an explanation says of a request: with the change, it is met with that ``chance``.

    The change begins at ``began_ns``. ``met``: whether it is, in the hidden world; ``others``: in hidden
    worlds with other dice for all that the journal does not tell of.
    """

    sampled: Sampled
    label: str
    began_ns: int
    change: Change
    chance: float
    rests_on: str = ""
    met: bool = False
    others: tuple[bool, ...] = ()

    @property
    def good(self) -> bool:
        """It says that it helps."""
        return self.chance >= LIKELY

    @property
    def perhaps(self) -> bool:
        """It says that it may help."""
        return UNLIKELY <= self.chance < LIKELY

    @property
    def wrong(self) -> bool:
        """It says that it helps or that it does not, and that is not so."""
        return not self.perhaps and self.good != self.met


def claims_of(one: Sampled, case: RequestCase) -> list[Claim]:
    """All that an explanation of a case says."""
    request = case.request
    limit_ns = case.late.steps[-1].now_ns - request.arrival_ns - NS_PER_MS
    limit_ns = min(limit_ns, round(SLO_TIMES * request.slo_ns))
    claims: list[Claim] = []
    slo = smallest_slo(case, limit_ns, lambda: None)
    slo_ns, rests_on = (request.slo_ns, "") if slo is None else (slo.slo_ns, slo.rests_on)
    for times in (2.0, 4.0) if slo is None else (BELOW, *SLOS_TRIED):  # none is said to be enough, or that
        edits = {request.request_id: {"deadline_ns": request.arrival_ns + round(slo_ns * times)}}
        label, good = ("slo, 2 % less" if times < 1 else "slo"), slo is not None and times >= 1
        claims.append(Claim(one, label, case.late.began_ns, Change(edits=edits), float(good), rests_on))
    others = [] if case.good else other_remedies(case, lambda: None)
    return claims + [
        Claim(one, each.kind, case.scene(each.kind).began_ns, each.change, each.chance, each.rests_on)
        for each in others
    ]


# ------------------------------------------------------------
# In the world that they cannot see.


def find_truth(
    plan: Plan, seed: int, claims: Sequence[Claim], known: frozenset[str] = frozenset(), dice: int = 0
) -> None:
    """Run it again, and find for each claim what comes of its change: once, and with so many other ``dice``.

    ``known``: what drew in the run that the journal tells of draws as there in any case.
    """
    simulation = simulation_of(plan, seed)
    for claim in sorted(claims, key=lambda one: one.began_ns):
        if claim.began_ns - 2 > simulation.now_ns:
            simulation.run(until_ns=claim.began_ns - 2)
        claim.met = in_child(claim, partial(comes_true, simulation, claim))
        others = dice if plan.noise and not claim.label.startswith("slo") else 0
        claim.others = tuple([
            in_child(claim, partial(rerolled, simulation, claim, die, known))
            for die in range(1, others + 1)
        ])  # fmt: skip


def in_child(claim: Claim, work: Callable[[], bool]) -> bool:
    """What ``work`` returns, called in a copy of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"1" if work() else b"0")
        os._exit(0)
    os.close(writing)
    found = os.read(reading, 1)
    os.close(reading)
    os.waitpid(child, 0)
    assert found, f"{claim}: the simulation broke"
    return found == b"1"


def rerolled(simulation: Simulation, claim: Claim, die: int, known: frozenset[str]) -> bool:
    """Whether the request is met with the change, if all that is not known has other luck."""
    draws = simulation.world.keyed
    assert draws is not None, "a run without noise"
    draws.reroll(-die, known)
    return comes_true(simulation, claim)


def comes_true(simulation: Simulation, claim: Claim) -> bool:
    """Whether the request is met with the change; called once, in a process of its own."""
    at_ns = claim.began_ns - 1
    simulation.edits = claim.change.edits
    simulation.world.at(at_ns, CALL, None, lambda: begun(simulation, claim.change))
    request = claim.sampled.request
    simulation.watchers.append(Waiting(request.request_id))
    deadline_ns = claim.change.edits.get(request.request_id, {}).get("deadline_ns", request.deadline_ns)
    try:
        simulation.run(until_ns=deadline_ns + NS_PER_S)
    except Answered as answered:
        return bool(answered.args[0])
    return False


def begun(simulation: Simulation, change: Change) -> list[ControllerEvent]:
    """A change begins: what the controller is told."""
    events: list[ControllerEvent] = []
    if change.pages:
        for host in simulation.hosts.values():
            host.machine.add_pages(change.pages)
    for told in change.begin(simulation.controller):
        event = told
        if isinstance(told, WorkerJoined):
            host = simulation.host(told.worker, told.devices)
            simulation.hosts[host.name] = host
            simulation.by_device.update((spec.device, host) for spec in host.specs)
            simulation.prepare(host)
            event = host.connect(simulation.now_ns)
        events.append(event)
    return events


# ------------------------------------------------------------
# How it went.


@dataclass(slots=True)
class Seen:
    """All claims, and how the cases went, by whether durations are noisy."""

    claims: dict[str, list[Claim]] = field(default_factory=lambda: {NOISY: [], EXACT: []})
    kinds: Counter[str] = field(default_factory=Counter)
    cases: int = 0
    again: int = 0
    took_s: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def examine(plan: Plan, seed: int, count: int, seen: Seen, dice: int = 0) -> None:
    """Explain requests of one run, and find whether it is true; with so many other ``dice``, too."""
    recorder = Recorder()
    simulation = simulation_of(plan, seed, recorder)
    config = simulation.controller.config
    simulation.run()
    claims: list[Claim] = []
    for one, case in cases(recorder.steps, config, sampled(recorder.steps, count, random.Random(seed))):
        began = time.process_time()
        claims += claims_of(one, case)
        seen.took_s.append(time.process_time() - began)
        same = play(case.early, until=one.request.request_id)
        _, answer = same.answers.get(one.request.request_id, (0, None))
        seen.again += answer == one.answer and same.from_ns is None
        seen.cases += 1
        seen.kinds[one.kind] += 1
    draws = simulation.world.keyed
    find_truth(plan, seed, claims, frozenset() if draws is None else frozenset(draws.drawn), dice)
    seen.claims[NOISY if plan.noise else EXACT] += claims
    wrong = Counter(f"{one.label}{'' if one.good else ' (no)'}" for one in claims if one.wrong)
    print(f"{plan.name}: {len(claims)} claims, wrong {dict(wrong)}", flush=True)
    seen.lines += [
        f"{plan.name} {one.sampled.request.request_id} ({one.sampled.kind}) {one.label}: said "
        f"{'met' if one.good else 'not met'}, {one.rests_on or '-'}; {one.change}"
        for one in claims
        if one.wrong
    ]


def judge(outcome: report.Outcome, seen: Seen) -> None:
    """Add what is asked."""
    outcome.at_least(
        f"decided again from the journal alone, of {seen.cases:,}",
        AGAIN,
        seen.again / max(1, seen.cases),
        digits=4,
    )
    for how, claims in seen.claims.items():
        asked = ASKED[how]
        for label, question in (
            ("slo", "an SLO of T, T + 5, 10, 20 % is enough"),
            ("slo, 2 % less", "an SLO of T - 2 % is not enough"),
        ):
            found = [not one.wrong for one in claims if one.label == label and one.good == (label == "slo")]
            if found:
                outcome.at_least(
                    f"{how}: {question}, of {len(found):,}", asked, sum(found) / len(found), digits=4
                )
        judge_others(outcome, how, [one for one in claims if not one.label.startswith("slo")])
    outcome.at_most("longest answer, of CPU", ANSWER_S, max(seen.took_s, default=0.0), "s")


def judge_others(outcome: report.Outcome, how: str, others: Sequence[Claim]) -> None:
    """What is asked of remedies other than SLOs."""
    named = [one.met for one in others if one.good]
    if named:
        outcome.at_least(
            f"{how}: other remedies that are named help, of {len(named):,}",
            ASKED[how],
            sum(named) / len(named),
            digits=4,
        )
    for kind in RemedyKind:
        helping = [one for one in others if one.label == kind and one.met]
        missed = [one for one in helping if one.wrong]
        if helping:
            outcome.at_most(
                f"{how}: {kind} would have helped and was missed, of {len(helping):,}",
                MISSED,
                len(missed) / len(helping),
                digits=4,
            )
    perhaps = [one for one in others if one.perhaps]
    if perhaps:
        outcome.at_most(
            f"{how}: neither said to help nor not to, of {len(others):,}",
            PERHAPS,
            len(perhaps) / len(others),
            digits=4,
        )
        said, met = fmean([one.chance for one in perhaps]), fmean([one.met for one in perhaps])
        outcome.at_most(
            f"{how}: of these it is met as often as said ({said:.2f}; {met:.2f}), but for",
            CALIBRATED,
            abs(said - met),
        )


def share(found: Sequence[bool]) -> float:
    """The share of those that are true; 0 of none."""
    return fmean(found) if found else 0.0


def limit(claims: Sequence[Claim]) -> list[str]:
    """What anyone could say who knows all about the hidden worlds but the dice, in lines."""
    lines: list[str] = []
    for kind in RemedyKind:
        rolled = [one for one in claims if one.label == kind and one.others]
        if not rolled:
            continue
        chances = [(fmean(one.others), one.met) for one in rolled]
        sure = [not UNLIKELY <= chance < LIKELY for chance, _ in chances]
        named = [met for chance, met in chances if chance >= LIKELY]
        helping = [chance for chance, met in chances if met]
        lines.append(
            f"  {kind}: of {len(rolled):,} {share(sure):.1%} do not depend on dice; of those named "
            f"{share(named):.1%} help; missed {share([one < UNLIKELY for one in helping]):.1%}, "
            f"{share([one < LIKELY for one in helping]):.1%} without a perhaps"
        )
    return lines


def main() -> int:
    """Run it; returns the exit status."""
    options = report.parser(__doc__)
    options.add_argument("--short", action="store_true", help="200 requests instead of 1,000")
    options.add_argument("--requests", type=int, help="so many requests")
    options.add_argument("--only", metavar="WORDS", default="", help="runs whose names begin so, by commas")
    options.add_argument("--failures", action="store_true", help="list every claim that is not true")
    options.add_argument("--dice", type=int, default=0, metavar="N", help="the limit: try N other dice, too")
    given = options.parse_args()
    count = given.requests or (200 if given.short else 1000)
    seen = Seen()
    for at, plan in enumerate(PLANS):
        if plan.name.startswith(tuple(given.only.split(","))):
            examine(plan, given.seed * 100 + at, count // len(PLANS), seen, given.dice)
    outcome = report.Outcome("benchmarks.explain_truth")
    judge(outcome, seen)
    outcome.figures = {
        "kinds": dict(seen.kinds),
        "wrong": seen.lines,
        "answer_s": report.quantile(seen.took_s, 0.5),
    }
    print(f"\nrequests: {dict(seen.kinds)}; median answer {report.quantile(seen.took_s, 0.5):.2f} s of CPU")
    if lines := limit(seen.claims[NOISY]):
        print("who knows all but the dice says:", *lines, sep="\n")
    for line in seen.lines if given.failures else seen.lines[:10]:
        print(f"  {line}")
    return report.finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())
