"""The paper's policy where lanes are late or lost: what waits is looked at again, and at once."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Infer, Outcome
from clockwork_serve.units import ms
from tests.controller.honest import World, device, model


def warm(*names: str, **settings: object) -> World:
    """One device that has all weights, at batch size 1; INFERs take 10 ms."""
    made = World(ControllerConfig(policy="paper", max_batch=1, **settings))  # type: ignore[arg-type]
    made.serve(*[model(name) for name in names])
    made.join(device())
    for name in names:
        made.request(name, slo_ms=5000)
        made.run(until_ms=100)
    made.actions.clear()
    return made


def test_a_lane_that_was_late_takes_work_again_when_it_has_caught_up() -> None:
    made = warm("a", look_ahead_ns=ms(20))
    made.slower = 3.0
    ids = [made.request("a", slo_ms=500)]
    for pause_ms in (6, 15):
        made.run(until_ms=pause_ms)
        ids.append(made.request("a", slo_ms=500))
    assert len(made.actions) == 2, "30 ms for 10: more than the 10 ms at which a lane is given no more"
    made.run(until_ms=200)
    ids.append(made.request("a", slo_ms=500))
    made.run()
    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 4


def test_a_lane_that_is_free_early_takes_work_at_once() -> None:
    made = warm("a")
    made.slower = 0.2
    ids = [made.request("a", slo_ms=500) for _ in range(3)]
    made.run(until_ms=8)
    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 3, "2 ms each, not 10"
    assert len([one for one in made.actions if isinstance(one, Infer)]) == 3
