"""Another policy goes on with a run: nothing is lost, and belief is whole before and after."""

from __future__ import annotations

import pytest

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.controller.policies import DefaultScheduler, PaperScheduler
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import ms
from tests.pure import NEEDS_PURE
from tests.sim.scenes import run_of, walked

pytestmark = NEEDS_PURE

OTHER = {"default": "paper", "paper": "default"}


@pytest.mark.parametrize("seed", range(12))
def test_belief_is_whole_whenever_it_takes_over(seed: int) -> None:
    config, steps = run_of(seed, policy=("default", "paper")[seed % 2])
    for at in range(4, len(steps), max(1, len(steps) // 5)):
        controller = walked(config, steps[:at])
        waiting, now_ns = set(controller._belief.waiters), steps[at - 1].now_ns
        for later_ns, policy in enumerate((OTHER[config.policy], config.policy), 1):
            controller.use_policy(policy)
            assert set(controller._belief.waiters) <= waiting
            controller.decide(now_ns + later_ns)
            assert controller.next_wakeup_ns() is None or controller.next_wakeup_ns() > now_ns + later_ns
            controller.check()
        again = Controller.restore(controller.save())
        assert again.decide(now_ns + ms(5)) == controller.decide(now_ns + ms(5))


def test_all_parts_ask_the_new_one_and_slack_is_as_it_assumes() -> None:
    config, steps = run_of(1, policy="default")
    controller = walked(config, steps[: len(steps) // 2])
    belief = controller._belief

    controller.use_policy("paper")

    parts = (controller._result_handler, controller._takeover, controller._fleet, controller._hangs)
    assert {id(one.scheduler) for one in parts} == {id(controller._scheduler)}
    assert type(controller._scheduler) is PaperScheduler
    assert not belief.measures and not belief.keeps_promises
    assert belief.slack_ns == config.slack_ns
    assert {one.exec.network_ns for one in belief.devices.values()} <= {config.network_ns}
    assert {one.pace_ns for one in belief.models.values()} <= {0}
    controller.use_policy("default")
    assert type(controller._scheduler) is DefaultScheduler
    assert belief.measures and belief.keeps_promises
    assert controller.config.policy == belief.config.policy == "default"


def test_the_same_policy_changes_nothing() -> None:
    config, steps = run_of(2, policy="paper")
    controller = walked(config, steps[: len(steps) // 2])
    scheduler = controller._scheduler

    controller.use_policy(config.policy)

    assert controller._scheduler is scheduler


def test_one_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"policy: expected one of default, paper.*; found 'best'"):
        Controller(ControllerConfig()).use_policy("best")
