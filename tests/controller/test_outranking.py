"""More urgent classes beside promises: these give way, and learn to leave time; nothing else does."""

from __future__ import annotations

import pytest

from clockwork_serve.controller.estimates import DRIFT_BITS, HEADROOM_MOST
from clockwork_serve.controller.promises import REFUSED_ALL
from clockwork_serve.messages import Cause, Infer, Outcome, Unload
from clockwork_serve.units import ms
from tests.controller.honest import World, device, profile, serving
from tests.controller.promised import broken, full_plan, world


@pytest.mark.parametrize("urgent", [False, True])
def test_a_more_urgent_class_outranks_promises_when_its_verdict_is_due(urgent: bool):
    made, ids = full_plan(decide_ms=0)
    later = [made.request("b", slo_ms=300, priority=4 if urgent else 8) for _ in range(8)]

    made.run()

    kept = [made.answers[one] for one in later if made.answers[one].promised]
    assert len(kept) == (8 if urgent else 0)
    assert all(answer.outcome is Outcome.OK for answer in kept)
    assert broken(made, ids) == [Cause.OUTRANKED] * (8 if urgent else 0), "no more than it needs"


@pytest.mark.parametrize("urgent", [False, True])
def test_a_more_urgent_request_that_cannot_wait_runs_before_its_verdict(urgent: bool):
    made, ids = full_plan(decide_ms=250)
    later = made.request("b", slo_ms=120, priority=4 if urgent else 8)

    made.run()

    assert (made.answers[later].outcome is Outcome.OK) is urgent
    assert set(broken(made, ids)) == ({Cause.OUTRANKED} if urgent else set())


@pytest.mark.parametrize("urgent", [False, True])
def test_weights_promised_to_less_urgent_classes_alone_give_way_to_those_of_a_more_urgent_one(urgent: bool):
    made = serving(*"abc", pages=8, times=profile(b1_ms=20, step_ms=4, load_ms=9), decide_ns=0, max_batch=8)
    ids = [made.request(name, slo_ms=1000) for name in "ab" * 40]
    made.run(until_ms=60)
    later = made.request("c", slo_ms=200, priority=4 if urgent else 8)

    made.run()

    assert (made.answers[later].outcome is Outcome.OK) is urgent
    assert set(broken(made, ids)) <= ({Cause.OUTRANKED} if urgent else set())


def test_who_lost_its_weights_to_a_more_urgent_class_was_outranked():
    made = serving(*"abc", pages=8, times=profile(b1_ms=20, step_ms=4, load_ms=9), decide_ns=0, max_batch=8)
    for name in "ab":
        made.ask(name, slo_ms=5000, until_ms=200)
    for _ in range(8):
        made.request("b", slo_ms=1000)
    made.run(until_ms=1)
    waits = made.ask("a", slo_ms=100, until_ms=12)
    urgent = made.request("c", slo_ms=90, priority=4)

    made.run()

    assert made.answers[urgent].outcome is Outcome.OK
    assert [one.model for one in made.actions if isinstance(one, Unload)] == ["a/1"]
    assert made.answers[waits].cause is Cause.OUTRANKED


def test_of_a_batch_that_is_outranked_as_many_as_can_find_another_place():
    made, ids = full_plan(decide_ms=0)
    urgent = made.request("b", slo_ms=300, priority=4)

    made.run()

    assert made.answers[urgent].outcome is Outcome.OK
    assert len(broken(made, ids)) == 4, "a batch of eight ends, and four of them find another place"


def test_a_more_urgent_request_that_can_wait_lets_promised_ones_run():
    made, ids = full_plan(decide_ms=250)
    made.actions.clear()
    made.request("b", slo_ms=600, priority=4)

    made.run(until_ms=150)

    assert made.actions and all(one.model == "a/1" for one in made.actions)
    assert broken(made, [one for one in ids if one in made.answers]) == []


def test_promised_requests_that_share_a_batch_of_a_more_urgent_class_give_their_time_back():
    made = world("a", "b", decide_ms=0)
    ids = [made.request("ab"[at % 2] if at < 14 else "b", slo_ms=1000) for at in range(157)]
    made.run(until_ms=40)
    made.actions.clear()
    urgent = made.request("a", slo_ms=200, priority=4)

    made.run()

    batches = [[call.request_id for call in one.calls] for one in made.actions if isinstance(one, Infer)]
    assert [len(batch) for batch in batches if urgent in batch] == [7]
    assert made.answers[urgent].outcome is Outcome.OK
    assert broken(made, ids) == [], "alone it would have taken the time of others"


@pytest.mark.parametrize("urgent", [False, True])
def test_a_more_urgent_class_needs_no_spare_time_beside_others(urgent: bool):
    made = world("a", "b", decide_ms=0)
    ids = [made.request("a", slo_ms=1000) for _ in range(30)]
    made.run(until_ms=25)
    made.controller._promises._refused = REFUSED_ALL
    later = made.request("b", slo_ms=70, priority=4 if urgent else 8)

    made.run()

    assert made.answers[later].promised is urgent
    assert broken(made, ids) == []


def test_a_load_for_a_more_urgent_class_does_not_wait_for_its_verdict():
    made = serving(
        *"abc", pages=8, times=profile(b1_ms=20, step_ms=4, load_ms=9), decide_ns=ms(500), max_batch=8
    )
    for name in "ab" * 40:
        made.request(name, slo_ms=1000, decide_ns=0)
    made.run(until_ms=60)
    made.ask("c", slo_ms=150, until_ms=5)
    later = made.request("c", slo_ms=200, priority=4)

    made.run(until_ms=240)

    assert made.answers[later].outcome is Outcome.OK


def test_a_device_learns_to_leave_headroom_for_a_more_urgent_class():
    made = world("a", "b", decide_ms=0)
    broken_of: list[int] = []
    for _ in range(12):  # a second each
        ids = []
        for _ in range(10):
            ids += [made.request("a", slo_ms=800) for _ in range(30)]
            made.request("b", slo_ms=200, priority=4)
            made.run(until_ms=100)
        broken_of.append(len(broken(made, [one for one in ids if one in made.answers])))
    assert sum(broken_of[-6:]) < sum(broken_of[:6]) // 4
    headroom = made.controller._belief.devices["d0"].delays.headroom
    assert list(headroom) == [8] and headroom[8] > 0
    learned = headroom[8]
    for _ in range(10):
        made.request("a", slo_ms=800)
    made.run()
    assert headroom[8] < learned, "kept promises of that class take it off again"


def promised(made: World, count: int) -> bool:
    """Whether so many requests with an SLO of 120 ms are promised together behind a batch that runs."""
    made.ask("b", slo_ms=5000, until_ms=2)
    ids = [made.request("a", slo_ms=120) for _ in range(count)]
    made.run()
    return {made.answers[one].promised for one in ids} == {True}


@pytest.mark.parametrize(("since_s", "yes"), [(None, True), (29, False), (31, True)])
def test_headroom_is_left_while_requests_of_a_more_urgent_class_come(since_s: int | None, yes: bool) -> None:
    made = world("a", "b", decide_ms=0)
    made.controller._belief.devices["d0"].delays.headroom[8] = 1 << DRIFT_BITS
    if since_s is not None:
        made.ask("b", slo_ms=200, priority=4, until_ms=since_s * 1000)

    assert promised(made, 8) is yes


@pytest.mark.parametrize(("share", "most"), [(0.5, 8), (1, 4), (2, 2), (4, 0)])
def test_headroom_grows_with_the_time_until_a_batch_is_planned_to_end(share: float, most: int) -> None:
    def made() -> World:
        made = world("a", "b", decide_ms=0)
        made.ask("b", slo_ms=200, priority=4, until_ms=100)
        made.controller._belief.devices["d0"].delays.headroom[8] = int(share * (1 << DRIFT_BITS))
        return made

    assert [count for count in (1, 2, 4, 8) if promised(made(), count)] == [
        count for count in (1, 2, 4, 8) if count <= most
    ]


def test_who_is_outranked_moves_to_another_device_that_has_room():
    made = serving("a", "b", times=profile(b1_ms=20, step_ms=4), decide_ns=0, max_batch=8)
    made.request("b", slo_ms=5000)
    for _ in range(20):
        made.request("a", slo_ms=5000)
    made.run(until_ms=400)
    ids = [made.request("a", slo_ms=1000) for _ in range(200)]
    made.run(until_ms=40)
    made.join(device("d1"), worker="w1")
    made.controller._belief.devices["d1"].delays.headroom[8] = (
        HEADROOM_MOST  # it is for who has no promise yet
    )
    urgent = [made.request("b", slo_ms=300, priority=4) for _ in range(8)]

    made.run()

    assert all(made.answers[one].outcome is Outcome.OK for one in urgent)
    assert broken(made, ids) == []
