"""Requests that too many of their model wait before: who hears no when it comes, and who does not."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Answer, Infer, Outcome, Reason
from clockwork_serve.units import ms
from tests.controller.honest import CODE, World, device, model, profile

ALONE = {**{name: getattr(CODE, name) for name in CODE.__struct_fields__}, "batch_sizes": (1,)}


def world(*, devices: int = 1, together: bool = False, **settings: object) -> World:
    """A warm model that takes 10 ms; if ``together``, 8 of its requests take 17."""
    made = World(ControllerConfig(policy="default", **settings))  # type: ignore[arg-type]
    code = CODE if together else type(CODE)(**ALONE)
    made.serve(model("a"), code=code, times=profile(b1_ms=10, step_ms=1, load_ms=8))
    for at in range(devices):
        made.join(device(f"d{at}"), worker=f"w{at}")
    made.ask("a", slo_ms=500, until_ms=100)
    return made


def crowd(made: World, count: int, slo_ms: float = 100) -> list[str]:
    return [made.request("a", slo_ms) for _ in range(count)]


def told(made: World, ids: list[str]) -> list[Answer]:
    return [made.answers[each] for each in ids if each in made.answers]


def test_whose_turn_cannot_come_in_time_hears_so_at_once() -> None:
    made = world()
    refused = told(made, crowd(made, 30))
    assert len(refused) == 30 - 9, "nine of 10 ms fit into 100, less 2 ms of slack"
    assert {answer.reason for answer in refused} == {Reason.WOULD_MISS_DEADLINE}
    assert ms(0) < refused[0].retry_after_ns < ms(10)
    assert "requests are due before it" in refused[0].message


def test_all_who_were_not_refused_at_once_are_answered_well() -> None:
    made = world()
    ids = crowd(made, 30)
    waiting = [each for each in ids if each not in made.answers]
    made.run(until_ms=200)
    assert [made.answers[each].outcome for each in waiting] == [Outcome.OK] * len(waiting)


def test_whose_time_is_up_when_it_is_heard_is_told_that() -> None:
    made = world()
    late = made.ask("a", slo_ms=-0.5, until_ms=200)
    assert made.answers[late].outcome is Outcome.EXPIRED


def test_those_who_are_due_later_do_not_count() -> None:
    made = world()
    crowd(made, 40, slo_ms=1000)
    urgent = made.ask("a", slo_ms=60, until_ms=100)
    assert made.answers[urgent].outcome is Outcome.OK


def test_a_batch_may_wait_in_vain_for_policies_choose_by_who_could_fill_one() -> None:
    made = world(together=True)
    ids = crowd(made, 100)
    assert 100 - len(told(made, ids)) == 51, "8 each 17 ms fit 43 times into 98 ms less what runs, and 8 more"


def test_all_devices_that_could_run_it_count_even_without_its_weights() -> None:
    one, three = (len(told(made, crowd(made, 60))) for made in (world(), world(devices=3)))
    assert three <= one - 18, "twice as many again have hope"


def test_after_long_overload_some_time_is_left() -> None:
    made = world()
    for _ in range(60):
        crowd(made, 3)
        made.run(until_ms=10)
    ids = crowd(made, 3)
    made.run(until_ms=200)
    served = [each for each in ids if made.answers[each].outcome is Outcome.OK]
    assert all(made.answers[each].reason is Reason.WOULD_MISS_DEADLINE for each in ids if each not in served)
    ends = [made.answered_ns[each] for each in made.answers if made.answers[each].outcome is Outcome.OK]
    assert len(ends) >= 60, "the lane has not been idle"


def test_a_pace_is_learned_anew() -> None:
    made = world()
    made.slower = 3.0
    for _ in range(12):
        made.ask("a", slo_ms=500, until_ms=40)
    crowd(made, 30)
    made.run(until_ms=200)
    assert 30 - len(told(made, crowd(made, 30))) == 3, "three of 30 ms fit into 100"


def test_who_refuses_nothing_refuses_nobody_for_the_crowd_either() -> None:
    made = world(reject_infeasible=False)
    assert not told(made, crowd(made, 30))


def test_a_head_that_comes_alone_is_told_the_same() -> None:
    made = world()
    crowd(made, 30)
    made.controller.observe(
        AdmissionQuery(
            announced_id="x", gateway="g0", model="a/1", arrival_ns=made.now_ns,
            deadline_ns=made.now_ns + ms(100),
        ),
        made.now_ns,
    )  # fmt: skip
    (found,) = made.controller.decide(made.now_ns)
    assert isinstance(found, AdmissionReply)
    assert found.reason is Reason.WOULD_MISS_DEADLINE
    assert "would be missed by" in found.message


def test_the_lane_has_no_pause_under_a_crowd() -> None:
    made = world()
    made.actions.clear()
    for _ in range(100):
        crowd(made, 10)
        made.run(until_ms=10)
    assert sum(isinstance(one, Infer) for one in made.actions) >= 98, "of 100 times 10 ms"


def returning(clients: int) -> list[int]:
    """The batches of clients that ask again within 1 ms of an answer; 8 requests of 17 ms fit their 24 ms."""
    made = world(together=True)
    asked = [made.request("a", 24) for _ in range(clients)]
    since = 0
    for step in range(260):
        if step == 130:
            since = len(made.actions)
        made.run(until_ms=1)
        for at, request_id in enumerate(asked):
            if request_id in made.answers:
                asked[at] = made.request("a", 24)
    return [len(one.calls) for one in made.actions[since:] if isinstance(one, Infer)]


def test_who_came_too_early_for_the_next_full_batch_leaves_it_to_those_who_did_not() -> None:
    batches = returning(20)
    assert len(batches) > 5
    assert sum(batches) >= 6 * len(batches), "half as much if all wait until nothing is left to hope for"
