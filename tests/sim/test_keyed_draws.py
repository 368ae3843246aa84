"""Luck that follows from what draws it: two runs that differ in one thing have the same."""

from __future__ import annotations

from statistics import mean

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Call, Extent, Infer, Request, Result, Window
from clockwork_serve.sim import Cluster, Simulation, read_constants
from clockwork_serve.sim.constants import Draws, KeyedDraws
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.sim.worlds import Steps, scenario


def infer(action_id: int, request_id: str) -> Infer:
    return Infer(
        action_id=action_id, device="gpu0", model="m", code_id="c", extent=Extent(0, 1), version=1, batch=1,
        calls=(Call(request_id=request_id, rows=1, tensors=b""),), window=Window(0, 1), expected_ns=1,
    )  # fmt: skip


def test_the_same_action_draws_the_same_whatever_its_number() -> None:
    one, other = KeyedDraws(1, read_constants()), KeyedDraws(2, read_constants())

    assert one.extra_ns(infer(1, "r7")) == one.extra_ns(infer(99, "r7"))
    assert len({one.extra_ns(infer(1, f"r{at}")) for at in range(100)}) > 90
    assert one.extra_ns(infer(1, "r7")) != other.extra_ns(infer(1, "r7"))


def test_with_other_dice_only_what_is_not_known_draws_otherwise() -> None:
    draws = KeyedDraws(1, read_constants())
    known = draws.extra_ns(infer(1, "r7"))
    drawn = frozenset(draws.drawn)
    new = draws.extra_ns(infer(2, "r8"))

    draws.reroll(2, drawn)

    assert draws.extra_ns(infer(3, "r7")) == known
    assert draws.extra_ns(infer(4, "r8")) != new


def test_they_are_spread_like_those_of_a_stream() -> None:
    constants = read_constants()
    keyed, stream = KeyedDraws(1, constants), Draws(1, 1, constants.noise.infer_us)

    found = sorted(keyed.extra_ns(infer(1, f"r{at}")) for at in range(4000))
    asked = sorted(stream.next() for _ in range(4000))

    assert abs(mean(found) - mean(asked)) < 500
    assert all(abs(found[at] - asked[at]) < 1500 for at in (40, 400, 2000, 3600))


def test_a_request_that_is_edited_changes_no_luck_of_others() -> None:
    kept = []
    for edits in ({}, {"r50": {"priority": 3}}):
        steps = Steps()
        table = scenario(seconds=1.0)
        made = Simulation(
            workload=build(table, 1), zoo=Zoo.read("v100"), cluster=Cluster(), seed=1, keyed=True,
            config=ControllerConfig(), watchers=(steps,),
        )  # fmt: skip
        made.edits = edits
        made.run()
        kept.append(steps)

    ran = [
        {
            (event.started_ns, event.ended_ns, event.device)
            for _, event in steps.events
            if isinstance(event, Result)
        }
        for steps in kept
    ]
    assert len(ran[0]) > 100
    assert ran[0] == ran[1]
    asked = [[event.priority for _, event in steps.seen(Request)] for steps in kept]
    assert asked[0] != asked[1]
