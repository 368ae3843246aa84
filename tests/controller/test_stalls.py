"""A device whose exec lane does not move serves nothing: what is loaded there is loaded elsewhere, too."""

from __future__ import annotations

from collections import Counter

from clockwork_serve.controller.cluster import LOOK_NS
from clockwork_serve.messages import Infer, Load, Outcome
from clockwork_serve.units import NS_PER_MS, ms
from tests.controller.honest import device
from tests.controller.test_hangs import Stubborn, world_of

LOOK_MS = LOOK_NS / NS_PER_MS
INFER_MS = 10
EVERY_MS = 20


def asks(world: Stubborn, times: int, *, slo_ms: float = 50) -> Counter[Outcome]:
    """A request for ``b`` every 20 ms; how they ended."""
    asked = []
    for _ in range(times):
        asked.append(world.request("b", slo_ms=slo_ms))
        world.run(until_ms=EVERY_MS)
    world.run(until_ms=slo_ms)
    return Counter(world.answers[one].outcome for one in asked)


def loads(world: Stubborn) -> list[tuple[str, str]]:
    return [(one.model.split("/")[0], one.device) for one in world.actions if isinstance(one, Load)]


def stuck(**settings: object) -> Stubborn:
    """Models ``a`` and ``b`` are on ``d0``, whose exec lane is stuck at ``a``; ``d1`` is idle and empty."""
    world = world_of("d0", settings={"hang_ns": ms(2000), **settings})
    world.join(device("d1"), worker="w1")
    world.run(until_ms=20)
    world.actions.clear()
    world.stuck_infers.add("d0")
    world.request("a", slo_ms=50)
    world.run(until_ms=1)
    return world


def test_other_models_are_served_elsewhere_long_before_anybody_hung() -> None:
    world = stuck()

    ends = asks(world, 50)

    missed_ms = EVERY_MS * (50 - ends[Outcome.OK])
    assert missed_ms <= INFER_MS + 3 * LOOK_MS + EVERY_MS
    assert loads(world) == [("b", "d1")]
    assert not world.hung()


def test_without_a_time_to_hang_too() -> None:
    assert asks(stuck(hang_ns=0), 50)[Outcome.OK] > 40


def test_what_is_a_little_late_moves_nothing() -> None:
    world = stuck()
    asked = world.request("b", slo_ms=100)
    world.run(until_ms=INFER_MS + LOOK_MS - 2)
    world.stuck_infers.clear()
    world.release("d0")

    assert asks(world, 20) == {Outcome.OK: 20}
    assert world.answers[asked].outcome is Outcome.OK
    assert loads(world) == []


def test_a_lane_that_moves_again_is_used_as_before() -> None:
    world = stuck()
    asks(world, 20)
    world.stuck_infers.clear()
    world.release("d0")
    world.run(until_ms=50)
    world.actions.clear()

    asked = world.request("a", slo_ms=50)
    world.run(until_ms=50)

    assert world.answers[asked].outcome is Outcome.OK
    assert [(type(one), one.device) for one in world.actions] == [(Infer, "d0")]


def test_who_has_no_other_device_is_loaded_nowhere() -> None:
    world = world_of("d0")
    world.actions.clear()
    world.stuck_infers.add("d0")
    world.request("a", slo_ms=50)

    ends = asks(world, 4)

    assert not ends[Outcome.OK]
    assert loads(world) == []


def test_a_device_that_stays_slow_keeps_no_model_to_itself() -> None:
    world = world_of("d0", settings={})
    world.join(device("d1"), worker="w1")
    world.run(until_ms=20)
    world.actions.clear()
    world.slow["d0"] = 10.0

    ends = asks(world, 100)

    assert ends[Outcome.OK] >= 90
    assert loads(world) == [("b", "d1")]
