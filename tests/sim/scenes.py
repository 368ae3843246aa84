"""Runs of seeds, kept step by step, and scenes from the middle of them."""

from __future__ import annotations

from collections.abc import Sequence

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import Answer, ControllerEffect, ControllerEvent, Outcome, Request
from clockwork_serve.sim.counterfactual import Scene
from clockwork_serve.sim.remedies import RequestCase
from clockwork_serve.telemetry import Step
from harness.seeds import random_scenario, simulation_of


class KeptSteps:
    """A watcher that keeps the steps of the first controller."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._over = False

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        if not self._over:
            self.steps.append(Step(now_ns, tuple(events), tuple(effects)))

    def on_controller(self, config: ControllerConfig) -> None:
        self._over = True


def run_of(seed: int, requests: int = 300, policy: str | None = None) -> tuple[ControllerConfig, list[Step]]:
    """The steps of a seed, faults and all; by its own policy, or that one."""
    chance = random_scenario(seed, requests, policy, frozen=True)
    kept = KeptSteps()
    simulation_of(chance, checks=False, watchers=[kept]).run()
    return chance.config, kept.steps


def walked(config: ControllerConfig, steps: Sequence[Step]) -> Controller:
    """The controller after some steps."""
    controller = Controller(config)
    for step in steps:
        for event in step.events:
            controller.observe(event, step.now_ns)
        controller.decide(step.now_ns)
        controller.next_wakeup_ns()
    return controller


def scene_of(config: ControllerConfig, steps: Sequence[Step], at: int) -> Scene:
    """The scene that begins with a step."""
    return Scene(walked(config, steps[:at]), steps[at:])


def case_of(config: ControllerConfig, steps: Sequence[Step], request_id: str) -> RequestCase:
    """A request in its surroundings, from the second step on."""
    arrived = next(
        at
        for at, step in enumerate(steps)
        if any(isinstance(one, Request) and one.request_id == request_id for one in step.events)
    )
    request = next(
        one for one in steps[arrived].events if isinstance(one, Request) and one.request_id == request_id
    )
    return RequestCase(
        request,
        scene_of(config, steps, 1),
        arrived - 1,
        good=answers(steps)[request_id].outcome is Outcome.OK,
    )


def answers(steps: Sequence[Step]) -> dict[str, Answer]:
    """All answers, by request."""
    return {one.request_id: one for step in steps for one in step.effects if isinstance(one, Answer)}
