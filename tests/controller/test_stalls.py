"""A device of which a lane does not move: what waits for that lane is loaded elsewhere, too."""

from __future__ import annotations

from collections import Counter

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief
from clockwork_serve.controller.fleet import ReadinessTracker
from clockwork_serve.controller.hangs import UNRESPONSIVE_NS, Stalls
from clockwork_serve.controller.timers import STALL_CHECK_NS
from clockwork_serve.messages import Infer, Load, Outcome, Readiness, WorkerHeard, WorkerSilent
from clockwork_serve.units import NS_PER_MS, ms
from tests.controller.honest import device, model
from tests.controller.stubborn import Stubborn, world_of

LOOK_MS = STALL_CHECK_NS / NS_PER_MS
INFER_MS, LOAD_MS = 10, 8
EVERY_MS = 20


def asks(
    world: Stubborn, times: int, name: str = "b", *, slo_ms: float = 50, pairs: bool = False
) -> Counter[Outcome]:
    """A request every 20 ms, or ``pairs``: another one that waits for its lane; how they ended."""
    asked = []
    for _ in range(times):
        asked.append(world.request(name, slo_ms=slo_ms))
        world.run(until_ms=1)
        if pairs:
            asked.append(world.request(name, slo_ms=slo_ms))
        world.run(until_ms=EVERY_MS - 1)
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
    world.ask("a", slo_ms=50, until_ms=1)
    return world


def test_other_models_are_served_elsewhere_long_before_anybody_hung() -> None:
    world = stuck()

    ends = asks(world, 50)

    missed_ms = EVERY_MS * (50 - ends[Outcome.OK])
    assert missed_ms <= INFER_MS + 3 * LOOK_MS + EVERY_MS
    assert loads(world) == [("b", "d1")]
    assert not world.hung()


def test_who_is_asked_for_later_is_served_too() -> None:
    world = stuck()
    world.run(until_ms=200)

    assert asks(world, 10) == {Outcome.OK: 10}
    assert loads(world) == [("b", "d1")]


def test_without_a_time_to_hang_too() -> None:
    assert asks(stuck(hang_ns=0), 50)[Outcome.OK] > 40


def test_what_is_a_little_late_moves_nothing() -> None:
    world = stuck()
    asked = world.ask("b", slo_ms=100, until_ms=INFER_MS + LOOK_MS - 2)
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

    ends = asks(world, 10, "a", pairs=True)

    assert ends == {Outcome.OK: 20}
    assert {(type(one), one.device) for one in world.actions} == {(Infer, "d0")}


def test_who_has_no_other_device_is_loaded_nowhere() -> None:
    world = world_of("d0")
    world.actions.clear()
    world.stuck_infers.add("d0")
    world.request("a", slo_ms=50)

    ends = asks(world, 4)

    assert not ends[Outcome.OK]
    assert loads(world) == []


def told(world: Stubborn) -> list[bool]:
    """What was said of readiness."""
    return [one.ready for _, one in world.said if isinstance(one, Readiness)]


def test_where_no_lane_moves_the_server_is_not_ready_until_one_does() -> None:
    world = world_of("d0", settings={"hang_ns": 0})
    world.stuck_infers.add("d0")
    world.said.clear()
    world.ask("a", slo_ms=50, until_ms=INFER_MS + UNRESPONSIVE_NS / NS_PER_MS - LOOK_MS)
    assert told(world) == []
    world.run(until_ms=3 * LOOK_MS)
    assert told(world) == [False]
    assert "d0 does not answer" in next(o.why for _, o in world.said if isinstance(o, Readiness))
    world.stuck_infers.clear()
    world.release("d0")
    world.run(until_ms=2 * LOOK_MS)
    assert told(world) == [False, True]
    assert asks(world, 5) == {Outcome.OK: 5}


def test_where_every_worker_is_silent_the_server_is_not_ready_whatever_they_are_at() -> None:
    world = stuck(hang_ns=ms(60_000))
    world.stuck.add("d1")
    asks(world, 10)  # d1 is to load what is on d0 alone
    assert loads(world) == [("b", "d1")]
    world.said.clear()
    world.tell(WorkerSilent(worker="w0", for_ns=ms(1400)))
    assert told(world) == []
    world.tell(WorkerSilent(worker="w1", for_ns=ms(1400)))
    assert told(world) == [False]
    assert not world.hung(), "which takes longer to know"
    world.tell(WorkerHeard(worker="w1"))
    assert told(world) == [False, True]


def test_a_silent_worker_that_does_what_it_should_serves() -> None:
    world = world_of("d0", settings={"hang_ns": ms(60_000)})
    world.said.clear()
    world.ask("a", slo_ms=50, until_ms=1)
    world.tell(WorkerSilent(worker="w0", for_ns=ms(1400)))
    assert told(world) == []


def test_where_another_lane_moves_the_server_is_ready() -> None:
    world = stuck(hang_ns=0)
    world.said.clear()
    world.run(until_ms=2 * UNRESPONSIVE_NS / NS_PER_MS)
    assert told(world) == []


def slow_at(factor: float) -> Stubborn:
    """Models ``a`` and ``b`` are on ``d0``, where all takes so many times as long; ``d1`` is empty."""
    world = world_of("d0", settings={})
    world.join(device("d1"), worker="w1")
    world.run(until_ms=20)
    world.actions.clear()
    world.slow["d0"] = factor
    return world


def test_a_device_that_stays_slow_keeps_no_model_to_itself() -> None:
    world = slow_at(10.0)

    ends = asks(world, 100)

    assert ends[Outcome.OK] >= 90
    assert loads(world) == [("b", "d1")]


def test_a_device_that_is_too_slow_and_moves_keeps_no_model_to_itself() -> None:
    world = slow_at(3.0)

    ends = asks(world, 50, slo_ms=28)

    assert ends[Outcome.OK] >= 45
    assert loads(world) == [("b", "d1")]


def test_one_that_is_quick_again_is_believed_to_serve() -> None:
    world = slow_at(3.0)
    asks(world, 50, slo_ms=28)
    world.kill("w1", "d1")
    world.slow.clear()
    asks(world, 100, slo_ms=28)  # it is tried again after a second
    world.join(device("d1"), worker="w1")
    world.actions.clear()

    ends = asks(world, 20, slo_ms=28)

    assert ends == {Outcome.OK: 20}
    assert loads(world) == []


def test_an_action_is_late_at_two_looks_or_not_at_all() -> None:
    belief = Belief(ControllerConfig())
    one = DeviceBelief(device("d0"), "w0", 1, belief.config)
    stalls, lane = Stalls(belief, ReadinessTracker(belief)), one.exec
    lane.send(1, ms(10), 0)
    stalls.fired(one.stall_timer, ms(50))
    lane.end(1, ms(60))
    lane.send(2, ms(10), ms(60))
    stalls.fired(one.stall_timer, ms(100))
    assert not lane.stalled, "each was late at one look, for which the controller may be to blame"

    stalls.fired(one.stall_timer, ms(125))

    assert lane.stalled


def loading(**settings: object) -> Stubborn:
    """Model ``c`` is on its way to ``d0``, which is stuck at that LOAD; ``d1`` is idle and empty.

    The policy is one that makes no copies in idle memory: a device whose memory is full gets none either.
    """
    world = world_of("d0", settings={"hang_ns": ms(2000), "policy": "paper", **settings})
    world.serve(model("c"))
    world.join(device("d1"), worker="w1")
    world.run(until_ms=20)
    world.actions.clear()
    world.stuck.add("d0")
    world.ask("c", slo_ms=50, until_ms=1)
    assert loads(world) == [("c", "d0")]
    return world


def test_a_model_whose_load_is_overdue_is_loaded_and_served_elsewhere() -> None:
    world = loading()

    ends = asks(world, 50, "c")

    missed_ms = EVERY_MS * (50 - ends[Outcome.OK])
    assert missed_ms <= LOAD_MS + 3 * LOOK_MS + EVERY_MS
    assert loads(world) == [("c", "d0"), ("c", "d1")]
    assert not world.hung()


def test_a_load_that_is_a_little_late_moves_nothing() -> None:
    world = loading()
    world.run(until_ms=LOAD_MS + LOOK_MS - 2)
    world.release("d0")

    assert asks(world, 10, "c") == {Outcome.OK: 10}
    assert loads(world) == [("c", "d0")]


def test_an_overdue_load_that_ends_after_all_leaves_two_copies_that_both_serve() -> None:
    world = loading()
    asks(world, 10, "c")
    world.release("d0")
    world.run(until_ms=20)
    world.kill("w1", "d1")
    world.actions.clear()

    assert asks(world, 10, "c") == {Outcome.OK: 10}
    assert {(type(one), one.device) for one in world.actions} == {(Infer, "d0")}


def test_a_stalled_load_lane_is_sent_no_further_load_though_the_other_one_is_busy() -> None:
    world = loading()
    world.serve(model("e"), model("f"))
    world.run(until_ms=LOAD_MS + 3 * LOOK_MS)
    asked = [world.request(name, slo_ms=50) for name in ("e", "f")]
    world.run(until_ms=50)

    assert [world.answers[one].outcome for one in asked] == [Outcome.OK, Outcome.OK]
    assert loads(world)[1:] == [("e", "d1"), ("f", "d1")]


def test_weights_that_are_ready_serve_on_beside_an_overdue_load() -> None:
    world = loading()
    world.stuck.clear()  # the LOAD that was kept stays overdue
    world.run(until_ms=LOAD_MS + 3 * LOOK_MS)

    assert asks(world, 20, "b") == {Outcome.OK: 20}
    assert ("b", "d1") not in loads(world)


@pytest.mark.parametrize("name", ["c", "e"])
def test_no_answer_is_promised_behind_a_load_that_does_not_end(name: str) -> None:
    world = world_of("d0", settings={"hang_ns": ms(2000)})
    world.serve(model("c"), model("e"))
    world.stuck.add("d0")
    world.ask("c", slo_ms=50, until_ms=LOAD_MS + 3 * LOOK_MS)
    asked = world.ask(name, slo_ms=100, until_ms=100, decide_ns=ms(1))

    assert (world.answers[asked].outcome, world.answers[asked].promised) == (Outcome.REJECTED, False)


def test_a_model_of_an_overdue_load_that_is_asked_for_later_is_served_elsewhere_too() -> None:
    world = loading()
    world.run(until_ms=200)

    assert asks(world, 10, "c") == {Outcome.OK: 10}
