"""What a refusal could say would have helped, by what the controller knows then, and whether it would have.

    python -m benchmarks.refusal_advice              25 refusals of each run of ``explain_truth``
    python -m benchmarks.refusal_advice --each 5

Each thing that is known at no cost when a request is refused is tried in the world itself, as there: an SLO
longer by what it was missed by, by the advice to come back, by more; the next class up, by whether anything
was sent since it came where it could have gone; memory for its weights where a device had time. It shows, and
judges nothing: why refusals say no more is in docs/use/outcomes.md.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from typing import Final

from benchmarks.explain_truth import (
    PLANS,
    Claim,
    Plan,
    Recorder,
    Sampled,
    cases,
    find_truth,
    sampled,
    simulation_of,
)
from clockwork_serve.controller import Controller
from clockwork_serve.messages import USUAL_PRIORITY, Answer, Infer, Load, Reason, Request
from clockwork_serve.sim.counterfactual import Change, Scene
from clockwork_serve.sim.remedies import MOST_URGENT, RequestCase
from clockwork_serve.units import NS_PER_MS
from harness import report

_MISSED: Final = re.compile(r"missed by ([\d.]+) ms")


def refused(scene: Scene, request: Request) -> tuple[Controller, int]:
    """The controller just before it refuses a request, and when."""
    controller = scene.controller.fork()
    for step in scene.steps:
        if any(isinstance(one, Answer) and one.request_id == request.request_id for one in step.effects):
            return controller, step.now_ns
        for event in step.events:
            controller.observe(event, step.now_ns)
        controller.decide(step.now_ns)
        controller.next_wakeup_ns()
    raise AssertionError(f"{request.request_id} has no answer")


def claims_of(one: Sampled, case: RequestCase) -> Iterator[Claim]:
    """All that could be said of a refusal, each with what it changes."""
    request, late = case.request, case.late
    controller, now_ns = refused(late, request)
    views = controller.outlooks(request, now_ns)
    where = "weights there" if any(view.weights == "ready" for view in views) else "weights absent"

    def claim(label: str, change: Change, scene: Scene = late) -> Claim:
        return Claim(one, f"{where}: {label}", scene.began_ns, change, 1.0)

    def slo(label: str, slo_ns: float) -> Claim:
        deadline_ns = request.arrival_ns + round(slo_ns)
        return claim(label, Change(edits={request.request_id: {"deadline_ns": deadline_ns}}))

    if (found := _MISSED.search(one.answer.message)) is not None:
        missed_ns = (float(found[1]) + 0.05) * NS_PER_MS
        yield slo("an SLO longer by what it was missed by", request.slo_ns + missed_ns)
        yield slo("that, and 25 % more", 1.25 * (request.slo_ns + missed_ns))
    if one.answer.retry_after_ns:
        yield slo("an SLO longer by the advice to come back", request.slo_ns + one.answer.retry_after_ns)
    yield slo("twice the SLO", 2.0 * request.slo_ns)
    yield slo("three times the SLO", 3.0 * request.slo_ns)
    if (priority := request.priority or USUAL_PRIORITY) > MOST_URGENT:
        kind = Infer if where == "weights there" else Load
        able = {view.device for view in views if view.end_ns and (kind is Load or view.weights == "ready")}
        since = any(
            isinstance(action, kind) and action.device in able
            and action.window.earliest_ns > request.arrival_ns
            for action in controller.in_flight()
        )  # fmt: skip
        label = f"the next class up, {'something' if since else 'nothing'} was sent since"
        yield claim(label, Change(edits={request.request_id: {"priority": priority - 1}}))
    model = controller.model(request.model)
    idle = any(view.end_ns and view.free_ns + view.infer_ns <= controller.due_ns(request) for view in views)
    if model is not None and idle and where == "weights absent":
        pages = max(
            spec.pages_of(model.weights.size) for each in controller.workers() for spec in each.devices
        )
        yield claim("memory for them, a device had time", Change(pages=pages), case.near)
    yield claim("one device more", Change(devices=1), case.near)


def examine(plan: Plan, seed: int, count: int) -> list[Claim]:
    """Try all that could be said of some refusals of one run."""
    recorder = Recorder()
    simulation = simulation_of(plan, seed, recorder)
    config = simulation.controller.config
    simulation.run()
    dice = random.Random(seed)
    found = [
        one
        for one in sampled(recorder.steps, sys.maxsize, dice)
        if one.answer.reason is Reason.WOULD_MISS_DEADLINE
    ]
    drawn = sorted(dice.sample(found, min(count, len(found))), key=lambda one: one.arrived)
    claims = [claim for one, case in cases(recorder.steps, config, drawn) for claim in claims_of(one, case)]
    find_truth(plan, seed, claims)
    print(f"{plan.name}: {len(found)} refused, {len(claims)} claims", flush=True)
    return claims


def main() -> int:
    """Run it; returns the exit status."""
    options = report.parser(__doc__)
    options.add_argument("--each", type=int, default=25, help="so many refusals of each run")
    given = options.parse_args()
    held: dict[str, list[bool]] = {}
    for at, plan in enumerate(PLANS):
        for claim in examine(plan, given.seed * 100 + at, given.each):
            held.setdefault(claim.label, []).append(claim.met)
    print()
    for label, found in sorted(held.items()):
        print(f"{label:60} {100 * sum(found) / len(found):3.0f} % of {len(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
