"""Promises at the door: when the yes or no comes, and that a yes is kept."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Queue
from clockwork_serve.controller.estimates import DRIFT_LEAST, DRIFT_MOST, HEADROOM_MOST
from clockwork_serve.controller.life import WAITING
from clockwork_serve.controller.plans import fits_in_any_order, is_next, margin_ns, plan_of, planned_ns
from clockwork_serve.controller.promises import AT_ONCE_NS, REFUSED_ALL, Promises
from clockwork_serve.messages import (
    Cancel,
    Cause,
    Drain,
    Infer,
    Load,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Reason,
    Request,
    Status,
    Unload,
)
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, promise, serve
from tests.controller.honest import CODE, World, device, model, profile, serving
from tests.controller.promised import SLO, broken, full_plan, took_ms, world


def test_in_overload_the_no_comes_at_the_door_and_every_yes_is_kept():
    made = world("a", "b", "c")
    sent_ns = made.now_ns
    ids = [made.request("abc"[at % 3], slo_ms=SLO) for at in range(60)]

    made.run()

    answers = [made.answers[one] for one in ids]
    refused = [one for one, answer in zip(ids, answers, strict=True) if answer.outcome is Outcome.REJECTED]
    assert refused and all(took_ms(made, one, sent_ns) <= AT_ONCE_NS / ms(1) for one in refused)
    kept = [answer for answer in answers if answer.promised]
    assert len(kept) == len(ids) - len(refused) > 20
    assert all(answer.outcome is Outcome.OK for answer in kept)


def test_without_a_time_to_decide_nothing_is_promised():
    made = world("a", decide_ms=None)
    ids = [made.request("a", slo_ms=SLO) for _ in range(60)]

    made.run()

    assert not any(made.answers[one].promised for one in ids)


def test_a_request_says_itself_how_long_its_verdict_may_take():
    made = world("a", decide_ms=None)
    for _ in range(40):
        made.request("a", slo_ms=SLO, decide_ns=0)
    sent_ns = made.now_ns
    hasty = made.request("a", slo_ms=SLO, decide_ns=0)
    patient = made.request("a", slo_ms=SLO, decide_ns=ms(50))

    made.run()

    assert took_ms(made, hasty, sent_ns) <= AT_ONCE_NS / ms(1)
    assert AT_ONCE_NS / ms(1) < took_ms(made, patient, sent_ns) <= 50


def test_who_was_promised_gives_way_to_no_one_who_comes_later_and_is_due_sooner():
    made = world("a", "b")
    first = [made.request("a", slo_ms=100) for _ in range(8)]
    made.run(until_ms=AT_ONCE_NS / ms(1))
    for _ in range(30):
        made.request("b", slo_ms=60)

    made.run()

    yes = [made.answers[one] for one in first if made.answers[one].promised]
    assert len(yes) >= 4 and all(answer.outcome is Outcome.OK for answer in yes)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another one"])
def test_who_lost_its_place_needs_no_headroom_and_joins_a_batch_of_its_model(beside: bool):
    made = belief("d0", "d1", config=ControllerConfig(decide_ns=0))
    made.keeps_promises, served = True, serve(made, "a")
    on_d0, on_d1 = place(made, served, "d0"), place(made, served, "d1")
    for name in ("d0", "d1"):
        made.devices[name].delays.headroom[8] = HEADROOM_MOST
    there = promise(ask(made, served, slo_ms=18), on_d1) if beside else None
    gone = promise(ask(made, served, slo_ms=18), on_d0)
    (waiter,) = gone.waiters
    made.displace([gone], Cause.DEVICE_LOST)

    promises = Promises(made)
    promises._last_ns[1] = ms(11)  # a more urgent request came
    assert promises.judge(ms(11)) == []

    assert waiter.place is not None and waiter.promised_ns >= 0
    assert (waiter.place is there) == beside
    assert [len(device.reserved) for device in made.devices.values()] == ([0, 1] if beside else [1, 0])
    late = ask(made, served, slo_ms=18).waiters[-1]
    promises.arrived(late, ms(12))
    assert promises.judge(ms(12)) == [late], "who has no promise yet needs it"


@pytest.mark.parametrize("headroom", [0, HEADROOM_MOST])
def test_who_joins_leaves_headroom_too(headroom: int):
    made = belief("d0", config=ControllerConfig(decide_ns=0))
    made.keeps_promises, busy, served = True, serve(made, "b"), serve(made, "a")
    promise(ask(made, busy, slo_ms=90, count=8), place(made, busy, "d0"))
    batch = promise(ask(made, served, slo_ms=100), place(made, served, "d0", first=4))
    made.devices["d0"].delays.headroom[8] = headroom  # four times what is planned until then: 43 ms
    promises = Promises(made)
    promises._last_ns[1] = ms(10)  # a more urgent request came
    later = ask(made, served, slo_ms=100).waiters[-1]
    promises.arrived(later, ms(10))

    promises.judge(ms(10))

    assert (later.place is batch) == (not headroom)


def test_who_is_due_too_soon_for_a_batch_keeps_no_other_one_out_of_it():
    made = belief("d0", config=ControllerConfig(decide_ns=0))
    made.keeps_promises, busy, served = True, serve(made, "b"), serve(made, "a")
    promise(ask(made, busy, slo_ms=90, count=8), place(made, busy, "d0"))
    batch = promise(ask(made, served, slo_ms=100), place(made, served, "d0", first=4))
    promises = Promises(made)
    queue = ask(made, served, slo_ms=120)
    later = queue.waiters[-1]
    promises.arrived(later, ms(10))
    sooner = ask(made, served, slo_ms=55).waiters[0]
    promises.arrived(sooner, ms(10))

    promises.judge(ms(10))

    assert later.place is batch and sooner.promised_ns < 0


def test_a_load_is_part_of_the_promise_and_its_weights_are_not_evicted_for_another():
    made = serving(
        *"abcdef", pages=8, times=profile(b1_ms=20, step_ms=4, load_ms=9), decide_ns=0, max_batch=8
    )

    ids = [made.request(name, slo_ms=SLO) for name in "abcdef"]
    made.run()

    loads = [action.model for action in made.actions if isinstance(action, Load)]
    assert loads[0] == "a/1"
    yes = [one for one in ids if made.answers[one].promised]
    assert len(yes) >= 2 and all(made.answers[one].outcome is Outcome.OK for one in yes)


def test_who_lost_its_weights_to_a_promise_is_loaded_elsewhere_at_once():
    made = World(ControllerConfig(max_batch=8))
    made.serve(*[model(name, mib=4) for name in "abc"], times=profile(b1_ms=20, step_ms=4, load_ms=9))
    slow = replace(CODE, code_id="slow")
    made.serve(model("d", "slow", mib=60), code=slow, times=profile("slow", b1_ms=60))
    for name, pages, held in (("d0", 8, "ab"), ("d1", 64, "d")):
        made.join(device(name, pages), worker=name)
        for each in held:
            made.ask(each, slo_ms=5000, until_ms=200)
    made.request("a", slo_ms=5000)
    made.request("d", slo_ms=5000)
    for _ in range(12):
        made.request("b", slo_ms=500)
    made.actions.clear()
    made.request("c", slo_ms=47, decide_ns=0)  # d1 is free too late for it

    made.run(until_ms=4.1)

    assert [(type(one), one.model, one.device) for one in made.actions] == [
        (Unload, "b/1", "d0"), (Load, "c/1", "d0"), (Load, "b/1", "d1"),
    ]  # fmt: skip


def test_a_lane_waits_for_promised_weights_rather_than_run_what_would_make_them_late():
    made = serving("cold", "warm", times=profile(b1_ms=40, step_ms=4, load_ms=40), decide_ns=0, max_batch=8)
    made.ask("warm", slo_ms=5000, until_ms=300)
    promised = made.ask("cold", slo_ms=100, until_ms=20)
    late = made.request("warm", slo_ms=70)

    made.run()

    assert made.answers[promised].outcome is Outcome.OK
    assert made.answers[late].outcome is Outcome.REJECTED


def loading(load_ms: float = 40) -> tuple[World, str, str]:
    """A promise that needs a LOAD, which takes so long instead of 40 ms, and one that is to run after it."""
    made = serving("cold", "warm", times=profile(b1_ms=40, step_ms=4, load_ms=40), decide_ns=0, max_batch=8)
    made.ask("warm", slo_ms=5000, until_ms=300)
    made.durations["c"] = profile(b1_ms=40, step_ms=4, load_ms=load_ms)
    cold = made.ask("cold", slo_ms=100, until_ms=20)
    warm = made.ask("warm", slo_ms=130, until_ms=12)
    assert {waiter.promised_ns > 0 for waiter in made.controller._belief.waiters.values()} == {True}
    return made, cold, warm


def test_a_promise_that_can_wait_runs_after_weights_that_another_one_waits_for():
    made, cold, warm = loading()
    made.request("warm", slo_ms=210)

    made.run()

    assert made.answers[cold].outcome is made.answers[warm].outcome is Outcome.OK


def test_a_lane_waits_for_promised_weights_as_long_as_these_can_keep_the_promise():
    made, cold, warm = loading(load_ms=400)

    made.run()

    assert made.answers[cold].cause is Cause.DEVICE_SLOWED
    assert made.answers[warm].outcome is Outcome.OK


def test_a_lane_does_not_wait_for_weights_that_could_not_be_loaded():
    made, cold, warm = loading()
    ((_, number, result),) = made._inbox
    made._inbox = [
        (made.now_ns + ms(1), number, replace(result, status=Status.DEVICE_FAULT, ended_ns=made.now_ns))
    ]
    made.actions.clear()

    made.run(until_ms=2)

    assert [one.model for one in made.actions if isinstance(one, Infer)] == ["warm/1"]
    made.run()
    assert made.answers[cold].outcome is Outcome.FAILED and made.answers[warm].outcome is Outcome.OK


def test_a_lost_device_breaks_promises_that_no_other_can_keep_and_is_named_as_the_cause():
    made = world("a", devices=1)
    ids = [made.request("a", slo_ms=SLO) for _ in range(24)]
    made.run(until_ms=30)

    made.kill("w0", "d0")
    made.run()

    broken = [made.answers[one] for one in ids if made.answers[one].cause is not Cause.NONE]
    assert broken and {answer.cause for answer in broken} == {Cause.DEVICE_LOST}
    assert all(answer.promised and answer.outcome is not Outcome.OK for answer in broken)
    waited = [answer for answer in broken if answer.reason is Reason.PROMISE_BROKEN]
    assert waited and all(answer.outcome is Outcome.EXPIRED for answer in waited)


def test_another_device_takes_over_what_a_lost_one_had_promised():
    made = serving("a", times=profile(b1_ms=20, step_ms=4), decide_ns=0, max_batch=8)
    made.join(device("d1"), worker="w1")
    for _ in range(6):
        made.request("a", slo_ms=5000)
    made.run(until_ms=400)
    ids = [made.request("a", slo_ms=SLO) for _ in range(6)]
    made.run(until_ms=5)

    made.kill("w0", "d0", known=True)
    made.run()

    assert [made.answers[one].outcome for one in ids] == [Outcome.OK] * 6


def test_a_model_that_leaves_is_the_cause():
    made = world("a", "b")
    for _ in range(8):
        made.request("b", slo_ms=SLO)
    waits = made.request("a", slo_ms=SLO)
    made.run(until_ms=10)

    made.tell(ModelRemoved(model="a/1"))
    made.run()

    answer = made.answers[waits]
    assert (answer.outcome, answer.reason) == (Outcome.EXPIRED, Reason.PROMISE_BROKEN)
    assert answer.cause is Cause.MODEL_REMOVED


def test_a_device_that_became_slow_is_the_cause():
    made = world("a")
    ids = [made.request("a", slo_ms=SLO) for _ in range(24)]
    made.slower = 3.0

    made.run()

    causes = {made.answers[one].cause for one in ids}
    assert Cause.DEVICE_SLOWED in causes and Cause.UNEXPLAINED not in causes


def test_promises_broken_by_a_slow_device_make_its_next_ones_more_careful():
    made = world("a", "b", devices=2)
    d0, d1 = made.controller._belief.devices.values()
    careful, calm = d0.delays.drift, d1.delays.drift
    made.slower = 3.0
    for _ in range(24):
        made.request("a", slo_ms=SLO)
    made.run()
    broken = sum(answer.cause is Cause.DEVICE_SLOWED for answer in made.answers.values())
    assert broken and d0.delays.drift + d1.delays.drift > careful + calm

    made.slower = 1.0
    learned = d0.delays.drift + d1.delays.drift
    for _ in range(24):
        made.ask("a", slo_ms=1000, until_ms=100)
    made.run()
    assert d0.delays.drift + d1.delays.drift < learned


def test_a_device_that_broke_promises_makes_fewer():
    def promised(drift: int | None) -> int:
        made = world("a", "b", "c")
        if drift is not None:
            made.controller._belief.devices["d0"].delays.drift = drift
        for at in range(60):
            made.request("abc"[at % 3], slo_ms=SLO)
        made.run()
        return sum(answer.promised for answer in made.answers.values())

    assert promised(DRIFT_LEAST) == promised(None) > promised(DRIFT_MOST) > 0


def test_a_device_that_shares_its_cores_is_careful_from_the_first_promise_on():
    made = World(ControllerConfig())
    made.join(device("own", 16), replace(device("shared", 16), lanes_share=True))

    own, shared = made.controller._belief.devices.values()
    assert shared.delays.drift_ns(ms(200)) == ms(25) > own.delays.drift_ns(ms(200))


def test_a_promise_broken_by_a_model_that_leaves_says_nothing_about_the_device():
    made = world("a")
    made.request("a", slo_ms=SLO)
    made.request("a", slo_ms=SLO)
    made.run(until_ms=12)
    drift = made.controller._belief.devices["d0"].delays.drift

    made.tell(ModelRemoved(model="a/1"))
    made.run()

    assert any(answer.cause is Cause.MODEL_REMOVED for answer in made.answers.values())
    assert made.controller._belief.devices["d0"].delays.drift == drift


def test_requests_of_several_slos_exchange_places_so_that_those_due_first_run_first():
    made = world("a")
    slos = (SLO, 120.0, 160.0, 90.0, SLO, 110.0) * 2
    ids = [made.request("a", slo_ms=slo) for slo in slos]
    made.run(until_ms=9)
    (reserved,) = [one.reserved for one in made.controller._belief.devices.values()]

    dues_ns = [waiter.due_ns for one in reserved for waiter in one.waiters]
    assert dues_ns == sorted(dues_ns)
    made.run()
    assert all(made.answers[one].outcome is Outcome.OK for one in ids if made.answers[one].promised)


def test_a_client_that_cancels_frees_its_place():
    made = world("a")
    ids = [made.request("a", slo_ms=SLO) for _ in range(40)]
    made.run(until_ms=10)
    promised = [one for one in ids if one not in made.answers]
    before = [made.request("a", slo_ms=150) for _ in range(8)]
    made.run(until_ms=AT_ONCE_NS / ms(1))
    made.tell(*[Cancel(request_id=one) for one in promised[8:]])

    after = [made.request("a", slo_ms=150) for _ in range(8)]
    made.run()

    assert {made.answers[one].outcome for one in before} >= {Outcome.REJECTED}
    assert {made.answers[one].outcome for one in after} == {Outcome.OK}


@pytest.mark.parametrize(
    ("gap_ms", "start_ms", "size"),
    [(1000, 150, 1), (60, 150, 4), (10, 150, 8), (60, 10, 1)],
    ids=["nobody else", "some", "many", "it starts soon"],
)
def test_a_planned_batch_has_room_for_those_who_are_expected_until_it_starts(
    gap_ms: float, start_ms: float, size: int
) -> None:
    made = world("a")
    belief = made.controller._belief
    served = belief.models["a/1"]
    served.arrived_ns, served.gap_ns = made.now_ns, ms(gap_ms)
    batches = next(iter(served.residencies.values())).code.batches("", served.main.sizes)

    lasts_ns = planned_ns(served, batches, 1, made.now_ns + ms(start_ms), made.now_ns)

    assert lasts_ns == next(one.samples.estimate_ns for one in batches if one.size == size)


def test_a_batch_that_is_believed_to_be_shorter_than_a_smaller_one_shortens_no_plan():
    made = world("a")
    served = made.controller._belief.models["a/1"]
    served.arrived_ns, served.gap_ns = made.now_ns, ms(10)
    batches = next(iter(served.residencies.values())).code.batches("", served.main.sizes)
    batches[0].samples.restart(0)
    batches[0].samples.learn(ms(90), made.now_ns)

    assert planned_ns(served, batches, 1, made.now_ns + ms(150), made.now_ns) == ms(90)


def test_a_yes_given_with_a_later_verdict_of_the_same_instant_is_no_refusal():
    made = world("a", "b", "c", "d")
    for _ in range(60):  # so much is refused that a batch leaves room for better ones
        made.request("d", slo_ms=60)
    made.run(until_ms=10)
    ids = [made.request("abc"[at % 3], slo_ms=SLO) for at in range(60)]

    made.run()

    assert not [
        one for one in ids if made.answers[one].promised and made.answers[one].cause is not Cause.NONE
    ]


@pytest.mark.parametrize(("priority", "refused"), [(8, "a"), (12, "b")], ids=["its class", "one below"])
def test_a_batch_is_promised_only_beside_better_ones_of_others_who_wait_for_their_verdict(
    priority: int, refused: str
) -> None:
    made = world("a", "b", "c", decide_ms=10)
    busy = [made.request("c", slo_ms=120, decide_ns=0) for _ in range(60)]
    made.run(until_ms=30)
    alone = made.request("a", slo_ms=148)
    several = [made.request("b", slo_ms=140, decide_ns=ms(60), priority=priority) for _ in range(8)]

    made.run()

    assert {made.answers[one].outcome for one in busy} == {Outcome.OK, Outcome.REJECTED}, "it is overload"
    told = {"a": {made.answers[alone].outcome}, "b": {made.answers[one].outcome for one in several}}
    assert told.pop(refused) == {Outcome.REJECTED}
    assert list(told.values()) == [{Outcome.OK}]


def test_a_rival_may_have_come_back_from_a_device_that_was_lost():
    made = world("a", "b", decide_ms=500)
    made.controller._promises._refused = REFUSED_ALL
    made.request("a", slo_ms=2000)
    back = made.request("b", slo_ms=2000, priority=4)
    queue = made.controller._belief.waiters[back].queue
    assert queue.undecided
    queue.undecided.clear()  # as it is when a request returns to its queue
    last = made.request("a", slo_ms=2000, decide_ns=0)

    made.run()

    assert made.answers[back].outcome is made.answers[last].outcome is Outcome.OK


def test_a_planned_batch_takes_along_who_waits_between_two_of_its_requests():
    made = world("a", "b", "c", decide_ms=None)
    made.ask("b", slo_ms=5000, until_ms=1)
    yes = [made.request("a", slo_ms=70, decide_ns=0)]
    made.request("a", slo_ms=70)
    yes.append(made.request("a", slo_ms=70, decide_ns=0))
    yes += [made.request("b", slo_ms=112, decide_ns=0) for _ in range(8)]
    made.run(until_ms=10)
    made.request("c", slo_ms=45)

    made.run()

    assert all(made.answers[one].promised for one in yes)
    assert all(made.answers[one].outcome is Outcome.OK for one in yes)


def test_the_first_batch_of_a_plan_is_next_only_if_it_starts_as_planned():
    made = world("a", "b")
    for at in range(16):
        made.request("ab"[at % 2], slo_ms=SLO)
    made.run(until_ms=12)
    (planned,) = made.controller._belief.devices.values()
    start_ns = plan_of(planned, made.now_ns)[0][0]
    first = planned.reserved[0]

    assert is_next(planned, first.waiters, start_ns, first.lasts_ns)
    assert not is_next(planned, first.waiters, start_ns + ms(1), first.lasts_ns)
    assert not is_next(planned, first.waiters, start_ns, first.lasts_ns + 1)
    assert not is_next(planned, first.waiters[1:], start_ns, first.lasts_ns)


def test_no_order_is_as_good_as_another_while_weights_are_loading():
    made = serving("cold", times=profile(b1_ms=20, step_ms=4, load_ms=40), decide_ns=0, max_batch=8)
    made.ask("cold", slo_ms=500, until_ms=20)
    (planned,) = made.controller._belief.devices.values()

    assert not fits_in_any_order(planned, made.now_ns, ms(1), made.now_ns + ms(400))
    made.run(until_ms=60)
    assert fits_in_any_order(planned, made.now_ns, ms(1), made.now_ns + ms(400))


def test_batches_are_sent_as_they_are_planned_in_overload():
    made = world("a", "b", "c")
    for at in range(90):
        made.request("abc"[at % 3], slo_ms=SLO)

    made.run()

    sizes = [action.batch for action in made.actions if isinstance(action, Infer)]
    assert sizes.count(8) >= 3


def test_a_request_that_moves_to_another_version_has_its_verdict_there():
    made = world("a", "b", decide_ms=None)
    for _ in range(9):
        made.request("b", slo_ms=100)
    moved = made.request("a", slo_ms=300, decide_ns=ms(50))
    made.run(until_ms=10)
    made.tell(ModelAdded(model=model("a", mib=5)))
    waiter = made.controller._belief.waiters[moved]

    made.run(until_ms=40)

    assert waiter.state == WAITING and waiter.place is not None
    made.run()
    assert made.answers[moved].promised and made.answers[moved].outcome is Outcome.OK


def test_a_promise_is_loaded_where_the_code_is_prepared():
    made = belief("d0", config=ControllerConfig(decide_ns=0))
    made.keeps_promises, promises = True, Promises(made)
    unprepared = DeviceBelief(device("d1"), "w1", made.next_id(), made.config)
    made.devices = {"d1": unprepared, **made.devices}
    (waiter,) = ask(made, serve(made, "a")).waiters
    promises.arrived(waiter, ms(10))

    assert promises.judge(ms(19)) == []

    assert waiter.device is made.devices["d0"]
    assert [(type(one), one.device) for one in made.effects] == [(Load, "d0")]


def rivals_of(made: Belief, promises: Promises, queue: Queue) -> list[int]:
    """How long each rival of a lone request takes on d0, best first."""
    found = promises._rivals(made.devices["d0"], queue, 1, ms(10))
    return [lasts_ns for _, lasts_ns in found]


def test_rivals_are_those_who_wait_for_their_verdict_each_model_once():
    made = belief("d0", config=ControllerConfig(decide_ns=ms(50)))
    made.keeps_promises, promises = True, Promises(made)
    queues = [ask(made, serve(made, name), slo_ms=200 + at) for at, name in enumerate("abcd")]
    for at, queue in enumerate(queues):
        place(made, queue.model, "d0", first=4 * at)
    own, promised, sent, twice = queues
    ask(made, twice.model, slo_ms=204)
    for queue in (promised, sent, twice, own):
        for waiter in queue.waiters:
            promises.arrived(waiter, ms(10))
    promises.judge(ms(10))
    assert rivals_of(made, promises, own) == [ms(14), ms(10), ms(10)], "two in 14 ms are best"
    ((due_ns, _), *_) = promises._rivals(made.devices["d0"], own, 1, ms(10))
    samples = twice.strategies[0].batches[0].samples
    assert due_ns == twice.dues[0] - margin_ns(made.devices["d0"], ms(203), samples)

    promise(promised, promised.model.residencies["d0"])
    assert rivals_of(made, promises, own) == [ms(14), ms(10)]
    strategy = sent.strategies[0]
    made.send_infer(strategy, strategy.batches[0], 0, ms(10), ms(10))
    assert rivals_of(made, promises, own) == [ms(14)]


# ------------------------------------------------------------
# Requests that awaited failover until their verdict was due: the yes is not sent, so silence was one.


def awaited(made: World, model_name: str, *, slo_ms: float, for_ms: float, decide_ms: float = -1) -> str:
    """A request that came so long ago, and has had no controller since; its id."""
    decide_ns, since_ns = (ms(decide_ms) if decide_ms >= 0 else -1), made.now_ns - ms(for_ms)
    made.tell(
        Request(
            request_id="old-2", gateway="g0", model=f"{model_name}/1", arrival_ns=since_ns,
            deadline_ns=since_ns + ms(slo_ms), decide_ns=decide_ns, awaited=True,
        )
    )  # fmt: skip
    return "old-2"


def test_who_took_silence_for_a_yes_is_answered_though_no_new_promise_would_be_made():
    other, _ = full_plan(decide_ms=0)
    new = other.ask("a", slo_ms=1100)
    made, busy = full_plan(decide_ms=0)
    old = awaited(made, "a", slo_ms=1700, for_ms=600)

    made.run()

    assert other.answers[new].outcome is Outcome.REJECTED, "it has as much time left"
    assert (made.answers[old].outcome, made.answers[old].promised) == (Outcome.OK, True)
    assert not broken(made, busy)


def test_who_took_silence_for_a_yes_and_cannot_be_answered_is_told_that_its_promise_broke():
    made, busy = full_plan(decide_ms=0)
    old = awaited(made, "b", slo_ms=700, for_ms=600)

    made.run()

    answer = made.answers[old]
    assert (answer.outcome, answer.reason) == (Outcome.EXPIRED, Reason.PROMISE_BROKEN)
    assert (answer.promised, answer.cause) == (True, Cause.CONTROLLER_LOST)
    assert "no promise can be kept" not in answer.message
    assert not broken(made, busy), "it costs no other one its promise"


@pytest.mark.parametrize("why", ["the server stops", "the queue is full"])
def test_a_no_at_the_door_to_who_took_silence_for_a_yes_breaks_a_promise(why: str):
    made = world("a")
    if why == "the server stops":
        made.tell(Drain())
    else:
        made.controller._belief.models["a/1"].queue_limit = 0
    old = awaited(made, "a", slo_ms=2000, for_ms=100)

    answer = made.answers[old]
    assert (answer.outcome, answer.reason) == (Outcome.EXPIRED, Reason.PROMISE_BROKEN)
    assert (answer.promised, answer.cause) == (True, Cause.CONTROLLER_LOST)


@pytest.mark.parametrize(("decide_ms", "for_ms"), [(None, 600), (100, 50)], ids=["never", "not yet"])
def test_who_awaited_failover_and_whose_verdict_was_not_due_is_judged_as_any_other(
    decide_ms: float | None, for_ms: float
):
    made = world("a", decide_ms=decide_ms)
    made.tell(Drain())
    old = awaited(made, "a", slo_ms=2000, for_ms=for_ms)

    assert (made.answers[old].outcome, made.answers[old].reason) == (Outcome.REJECTED, Reason.DRAINING)
