"""What gateways are told of the soonest ends: it refuses nothing that an admission query would accept."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.placement import ahead_ns, usual_cost_ns
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Reason, Request, SoonestEnd, SoonestEnds
from clockwork_serve.serve.flow_control import KnownEnds
from clockwork_serve.units import ms
from tests.controller.honest import World, device, model, profile

NAMES = ("a", "b", "c")
asked = st.tuples(
    st.sampled_from(NAMES), st.sampled_from([60, 100, 100, 100, 120]), st.sampled_from([0, 0, 0, 1, 9]),
    st.integers(1, 25),
)  # fmt: skip


def cluster(devices: int = 1, pages: int = 16, **settings: object) -> World:
    made = World(ControllerConfig(policy="default", **settings))  # type: ignore[arg-type]
    made.serve(*[model(name) for name in NAMES], times=profile(b1_ms=10, step_ms=1))
    for at in range(devices):
        made.join(device(f"d{at}", pages), worker=f"w{at}")
    return made


def accepts(made: World, name: str, due_ns: int) -> bool:
    query = AdmissionQuery(
        announced_id="x", gateway="g0", model=f"{name}/1", arrival_ns=made.now_ns, deadline_ns=due_ns
    )
    made.controller.observe(query, made.now_ns)
    replies = [one for one in made.controller.decide(made.now_ns) if isinstance(one, AdmissionReply)]
    return not replies[0].reason


def ends(made: World, *names: str) -> dict[str, SoonestEnd]:
    return made.controller.soonest_ends([f"{name}/1" for name in names or NAMES], made.now_ns)


def wait(made: World, request_id: str, name: str, due_ns: int) -> None:
    """A request is queued; nothing is decided yet."""
    request = Request(
        request_id=request_id, gateway="g0", model=f"{name}/1", arrival_ns=made.now_ns, deadline_ns=due_ns
    )
    controller = made.controller
    waiter = controller._belief.admit(request, controller._belief.models[request.model])
    controller._scheduler.queued(waiter.queue)


def crowd(made: World, name: str = "a", count: int = 60) -> None:
    for _ in range(count):
        made.request(name, slo_ms=100)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([4, 8, 16]), st.lists(asked, min_size=1, max_size=8), st.floats(0, 40),
    st.lists(st.tuples(st.sampled_from(NAMES), st.floats(50, 160)), min_size=10, max_size=40),
)  # fmt: skip
def test_what_is_refused_by_it_a_query_refuses_too(
    devices: int,
    pages: int,
    before: list[tuple[str, float, int, int]],
    later_ms: float,
    offered: list[tuple[str, float]],
) -> None:
    made = cluster(devices, pages)
    for name in NAMES:
        made.request(name, slo_ms=500)
    made.run(until_ms=60)
    for name, slo_ms, priority, count in before:
        for _ in range(count):
            made.request(name, slo_ms=slo_ms, priority=priority)
    made.run(until_ms=later_ms)
    known = KnownEnds()
    known.update(SoonestEnds(ends=ends(made), until_ns=NEVER_NS))
    for number, (name, slo_ms) in enumerate(offered):
        due_ns = made.now_ns + ms(slo_ms)
        if known.shortage_ns(f"{name}/1", due_ns, made.now_ns) > 0:
            belief, query = made.controller._belief, made.controller._feasibility.earliest_finish
            main = belief.models[f"{name}/1"].main
            assert main is not None
            assert query(main, due_ns - belief.slack_ns, made.now_ns) is not None, "nothing is decided yet"
        else:
            wait(made, f"p{number}", name, due_ns)


def test_a_queue_whose_urgency_is_again_what_it_was_is_counted_once() -> None:
    made = cluster()
    made.ask("a", slo_ms=500, until_ms=60)
    wait(made, "p", "a", made.now_ns + ms(100))
    (strategy,) = made.controller._belief.models["a/1"].main.strategies
    agenda, usual_ns = strategy.agenda, strategy.key_ns
    agenda.push(strategy, usual_ns - 1)
    agenda.pop()

    agenda.push(strategy, usual_ns)

    assert len(agenda.heap) == 2, "the entry with which it began is live again"
    assert ahead_ns(agenda, strategy.queue.level, NEVER_NS, NEVER_NS) == usual_cost_ns(strategy.batches)


def test_who_is_due_last_ends_after_all_that_wait() -> None:
    made = cluster()
    made.ask("a", slo_ms=500, until_ms=100)
    crowd(made)
    soonest = ends(made)["a/1"]
    assert soonest.due_ns == made.now_ns + ms(100)
    assert not accepts(made, "a", soonest.end_ns - ms(0.1))
    assert accepts(made, "a", soonest.end_ns + ms(1))
    assert 0 < soonest.each_ns < ms(10), "in the largest batch"
    assert soonest.other_end_ns == NEVER_NS, "the only device has the weights"


def test_a_device_that_they_do_not_wait_for_may_serve_it_sooner() -> None:
    made = cluster(devices=2)
    made.ask("a", slo_ms=500, until_ms=100)
    for number in range(60):
        wait(made, f"p{number}", "a", made.now_ns + ms(100))
    soonest = ends(made)["a/1"]
    assert soonest.other_end_ns - made.now_ns < ms(22) < soonest.end_ns - made.now_ns


def test_models_that_nobody_waits_for_are_left_out() -> None:
    made = cluster()
    assert ends(made, "a", "none") == {}
    made.ask("a", slo_ms=500, until_ms=100)
    assert ends(made) == {}


def test_nothing_is_told_where_hopeless_requests_are_not_rejected() -> None:
    made = cluster(reject_infeasible=False)
    crowd(made)
    assert ends(made) == {}


def test_what_it_tells_changes_no_decision() -> None:
    answers = []
    for tells in (False, True):
        made = cluster(devices=2)
        for _ in range(6):
            for name in NAMES:
                crowd(made, name, count=20)
                if tells:
                    ends(made)
            made.run(until_ms=15)
        made.run()
        answers.append(made.answers)
    assert answers[0] == answers[1]
    assert {one.reason for one in answers[0].values()} >= {Reason.WOULD_MISS_DEADLINE}


def test_those_that_a_gateway_passes_on_count_until_the_next_summary() -> None:
    made = cluster()
    made.ask("a", slo_ms=500, until_ms=100)
    crowd(made, count=20)
    known = KnownEnds()
    known.update(SoonestEnds(ends=ends(made), until_ns=NEVER_NS))
    passed = 0
    while not known.shortage_ns("a/1", made.now_ns + ms(100 + passed / 1000), made.now_ns):
        wait(made, f"p{passed}", "a", made.now_ns + ms(100 + passed / 1000))
        passed += 1
    assert passed > 10
    assert not accepts(made, "a", made.now_ns + ms(100 + passed / 1000))


def test_of_a_model_that_no_device_has_nothing_is_told_for_its_requests_are_worth_a_load() -> None:
    made = World(ControllerConfig(policy="default"))
    made.serve(*[model(name, mib=9) for name in "ab"], times=profile(b1_ms=10, load_ms=42))
    made.join(device(pages=10))
    for name in "ab":
        made.ask(name, slo_ms=500, until_ms=100)
    wait(made, "p", "a", made.now_ns + ms(45))
    assert not accepts(made, "a", made.now_ns + ms(5))
    assert ends(made, "a") == {}
