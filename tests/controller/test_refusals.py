"""Whatever a worker refuses: its report corrects belief, and nobody else's request fails."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.messages import Infer, Load, Outcome, Status, Unload
from tests.controller.honest import model
from tests.controller.refusing import REASONS, Refusing

NAMES = ("a", "b", "c", "d", "e")
CHANCES = (0.0, 0.1, 0.5, 1.0)


class RefusalMachine(RuleBasedStateMachine):
    """Models that do not all fit, loads and refusals by chance."""

    @initialize(
        policy=st.sampled_from(list(POLICIES)), devices=st.integers(1, 2), pages=st.integers(4, 12),
        seed=st.integers(0, 1 << 30),
    )  # fmt: skip
    def start(self, policy: str, devices: int, pages: int, seed: int) -> None:
        models = [model(name, mib=2 + at % 3) for at, name in enumerate(NAMES)]
        self.world = Refusing(ControllerConfig(policy=policy), devices, pages, *models)
        self.world.random = random.Random(seed)
        self.asked: dict[str, str] = {}

    @rule(on_arrival=st.sampled_from(CHANCES), on_device=st.sampled_from(CHANCES))
    def refuse(self, on_arrival: float, on_device: float) -> None:
        self.world.on_arrival, self.world.on_device = on_arrival, on_device

    @rule(name=st.sampled_from(NAMES), slo_ms=st.sampled_from([30, 300, 5000]), count=st.integers(1, 6))
    def ask(self, name: str, slo_ms: float, count: int) -> None:
        for _ in range(count):
            self.asked[self.world.ask(name, slo_ms)] = f"{name}/1"

    @rule(for_ms=st.sampled_from([0.1, 1, 5, 50, 500]))
    def wait(self, for_ms: float) -> None:
        self.world.run(for_ms)

    @rule()
    def behave(self) -> None:
        """A second without refusals: belief is right, and every model answers."""
        self.world.on_arrival = self.world.on_device = 0.0
        self.world.run(1000)
        assert not self.world.differences()
        asked = [self.world.ask(name) for name in NAMES]
        self.world.run(1000)
        assert [self.world.answers[one].outcome for one in asked] == [Outcome.OK] * len(NAMES)
        assert not self.world.differences()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.behave()
        for request_id, name in self.asked.items():
            answer = self.world.answers[request_id]
            if answer.outcome is Outcome.FAILED:
                assert {request_id, name} & self.world.blamed, f"{request_id} failed: {answer.message}"


RefusalMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestRefusalMachine = RefusalMachine.TestCase


@pytest.mark.parametrize("status", REASONS)
@pytest.mark.parametrize("kind", [Load, Unload, Infer])
def test_one_refusal_of_any_action_for_any_reason_leaves_no_other_model_without_an_answer(
    kind: type, status: Status
):
    world = Refusing(ControllerConfig(policy="default"), 1, 4, model("a"), model("b"))
    world.refuse_once(kind, status)
    for name in ("a", "b"):
        world.ask(name)
        world.run(500)
    assert world.refusals == 1
    assert not world.differences()
    again = [world.ask(name) for name in ("a", "b")]
    world.run(1000)
    assert [world.answers[one].outcome for one in again] == [Outcome.OK] * 2
