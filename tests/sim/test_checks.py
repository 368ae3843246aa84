"""A check that cannot fail is none: each misdeed that a machine could commit is found."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.messages import (
    Answer,
    Call,
    Cancel,
    DeviceSpec,
    Drain,
    Extent,
    GatewayLost,
    Infer,
    Lane,
    Load,
    ModelRemoved,
    Outcome,
    Reason,
    Release,
    Request,
    Result,
    Status,
    Unload,
    Weights,
    Window,
    WorkerLost,
)
from clockwork_serve.sim.checks import FORGET_NS, CheckedHost, Checks, Truth
from clockwork_serve.sim.host import FAR_NS
from clockwork_serve.units import MIB, NS_PER_S
from clockwork_serve.worker.events import Start
from tests.sim.worlds import KIND, played, scenario, simulation

ALWAYS = Window(0, FAR_NS)
SPEC = DeviceSpec(
    device="gpu0", kind="emulated:v100", pages=16, page_bytes=16 * MIB, workspace_bytes=MIB, io_bytes=MIB
)  # fmt: skip
LOAD = Load(
    action_id=1, device="gpu0", model="m-0000/1", code_id=KIND, extent=Extent(0, 7), version=1, window=ALWAYS,
    weights=Weights(weights_id="m", path="", size=100 * MIB), expected_ns=8_330_000,
)  # fmt: skip
INFER = Infer(
    action_id=2, device="gpu0", model="m-0000/1", code_id=KIND, extent=LOAD.extent, version=1, batch=1,
    calls=(Call(request_id="x1", rows=1, tensors=b""),), window=ALWAYS, expected_ns=2_730_000,
)  # fmt: skip
UNLOAD = Unload(action_id=3, device="gpu0", model=LOAD.model, extent=LOAD.extent, version=1, window=ALWAYS)
REQUEST = Request(
    request_id="x1", gateway="g0", model="m-0000/1", arrival_ns=0, deadline_ns=NS_PER_S
)  # fmt: skip
OK = Answer(request_id="x1", gateway="g0", outcome=Outcome.OK)


def _loaded() -> Truth:
    truth = Truth(SPEC)
    truth.start(LOAD, Lane.LOAD)
    truth.end(1)
    return truth


def test_a_lane_does_one_thing_at_a_time():
    truth = _loaded()
    truth.start(INFER, Lane.EXEC)

    with pytest.raises(AssertionError, match="starts while"):
        truth.start(replace(INFER, action_id=9), Lane.EXEC)
    with pytest.raises(AssertionError, match="9 ends, and"):
        truth.end(9)
    with pytest.raises(AssertionError, match="1 ends, and"):
        truth.end(1)


@pytest.mark.parametrize(
    ("action", "lane", "why"),
    [
        (replace(LOAD, action_id=9, extent=Extent(6, 7)), Lane.LOAD, "pages that hold"),
        (replace(LOAD, action_id=9, extent=Extent(10, 7)), Lane.LOAD, "leaves memory"),
        (replace(LOAD, action_id=9, extent=Extent(8, 6)), Lane.LOAD, "does not fit its pages"),
        (replace(LOAD, action_id=9, extent=Extent(8, 7)), Lane.EXEC, "on lane"),
        (replace(INFER, version=2), Lane.EXEC, "not there"),
        (replace(INFER, extent=Extent(0, 6)), Lane.EXEC, "not there"),
        (replace(INFER, extent=Extent(1, 7)), Lane.EXEC, "not there"),
        (replace(INFER, model="other/1"), Lane.EXEC, "not there"),
        (replace(UNLOAD, version=2), Lane.LOAD, "not there"),
    ],
)
def test_pages_are_as_an_action_needs_them(action, lane, why):
    with pytest.raises(AssertionError, match=why):
        _loaded().start(action, lane)


def test_weights_are_not_used_while_they_move():
    truth = Truth(SPEC)
    truth.start(LOAD, Lane.LOAD)
    with pytest.raises(AssertionError, match="not there"):
        truth.start(INFER, Lane.EXEC)

    truth = _loaded()
    truth.start(UNLOAD, Lane.LOAD)
    with pytest.raises(AssertionError, match="not there"):
        truth.start(INFER, Lane.EXEC)

    truth = _loaded()
    truth.start(INFER, Lane.EXEC)
    with pytest.raises(AssertionError, match="while they are read"):
        truth.start(UNLOAD, Lane.LOAD)


def test_pages_are_free_after_an_unload():
    truth = _loaded()
    assert truth.has(LOAD.extent, 1) and not truth.has(LOAD.extent, 2) and not truth.has(Extent(0, 6), 1)

    truth.start(UNLOAD, Lane.LOAD)
    truth.end(3)

    truth.start(replace(LOAD, action_id=4, version=4), Lane.LOAD)


# Steps of the controller


def _checks() -> Checks:
    """Of a simulation in which the weights of ``LOAD`` are on the device, and no request is open."""
    made, _ = simulation(scenario(rate_rps=1))
    assert made.checks is not None
    host = made.hosts["w0"]
    assert isinstance(host, CheckedHost)
    host.truth["gpu0"] = _loaded()
    return made.checks


def _answer(outcome: Outcome, reason: Reason = Reason.NONE) -> Answer:
    return replace(OK, outcome=outcome, reason=reason)


def test_a_story_that_is_right_passes():
    checks = _checks()
    checks.on_step(1, [REQUEST], [INFER])
    checks.on_step(2, [Result(action_id=2, device="gpu0", status=Status.OK, started_ns=1, ended_ns=2)], [OK])


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([([], [OK])], "unknown request"),
        ([([REQUEST], [OK, OK])], "second response"),
        ([([replace(REQUEST, deadline_ns=0)], [OK])], "at 1 to"),
        ([([REQUEST], [_answer(Outcome.EXPIRED)])], "at 1 to"),
        ([([REQUEST], [_answer(Outcome.CANCELLED)])], "at 1 to"),
        ([([REQUEST, GatewayLost(gateway="g1")], [_answer(Outcome.CANCELLED)])], "at 1 to"),
        ([([REQUEST], [_answer(Outcome.INVALID, Reason.UNKNOWN_MODEL)])], "at 1 to"),
        ([([REQUEST], [_answer(Outcome.FAILED, Reason.DEVICE_FAULT)])], "at 1 to"),
        ([([REQUEST], [_answer(Outcome.REJECTED, Reason.DRAINING)])], "at 1 to"),
        ([([REQUEST], [_answer(Outcome.REJECTED, Reason.QUEUE_FULL)])], "at 1 to"),
        ([([REQUEST, ModelRemoved(model="m-0000/1")], [INFER])], "not served"),
        ([([ModelRemoved(model="m-0000/1")], [replace(LOAD, action_id=9)])], "not served"),
        ([([REQUEST], [INFER, OK])], "releases what a worker reads"),
        ([([REQUEST], [Release(request_id="x1", gateway="g0")])], "not held"),
        (
            [([REQUEST], [INFER, replace(OK, release=False), Release(request_id="x1", gateway="g0")])],
            "while a worker reads it",
        ),
        ([([REQUEST], [INFER, INFER])], "out already"),
        ([([REQUEST], [INFER, replace(INFER, action_id=9)])], "is not waiting"),
        ([([], [INFER])], "is not waiting"),
        ([([REQUEST], [replace(INFER, calls=(Call(request_id="x1", rows=2, tensors=b""),))])], "overfull"),
        ([([REQUEST], [replace(INFER, window=Window(0, 0))])], "too late already"),
        ([([REQUEST], [replace(INFER, expected_ns=4_000_000)])], "ns are expected"),
        ([([REQUEST], [replace(INFER, expected_ns=2_500_000)])], "ns are expected"),
        ([([], [replace(LOAD, expected_ns=1)])], "ns are expected"),
        (
            [([Result(action_id=7, device="gpu0", status=Status.OK, started_ns=1, ended_ns=2)], [])],
            "no action that is out",
        ),
        (
            [
                ([], [replace(LOAD, version=8)]),
                ([Result(action_id=1, device="gpu0", status=Status.OK, started_ns=1, ended_ns=2)], []),
            ],
            "the weights are not there",
        ),
    ],
)
def test_a_misdeed_of_the_controller_is_found(steps, why):
    checks = _checks()

    *good, (events, effects) = steps
    for step in good:
        checks.on_step(1, *step)

    with pytest.raises(AssertionError, match=why):
        checks.on_step(1, events, effects)


@pytest.mark.parametrize(
    ("event", "answer"),
    [
        (Cancel(request_id="x1"), _answer(Outcome.CANCELLED)),
        (GatewayLost(gateway="g0"), _answer(Outcome.CANCELLED)),
        (Drain(), _answer(Outcome.REJECTED, Reason.DRAINING)),
        (ModelRemoved(model="m-0000/1"), _answer(Outcome.REJECTED, Reason.NOT_SERVING)),
        (ModelRemoved(model="m-0000/1"), _answer(Outcome.INVALID, Reason.UNKNOWN_MODEL)),
        (WorkerLost(worker="w0"), _answer(Outcome.FAILED, Reason.WORKER_LOST)),
    ],
)
def test_what_happened_explains_an_answer(event, answer):
    _checks().on_step(1, [REQUEST, event], [answer])


def test_weights_of_a_model_that_is_not_served_do_not_stay():
    made, _ = simulation(scenario())
    made.run()
    assert made.checks is not None
    made.checks.open_requests.served.clear()
    made.checks.check(made.now_ns)

    with pytest.raises(AssertionError, match="is unknown since"):
        made.checks.check(made.now_ns + FORGET_NS)


def test_what_was_out_on_a_lost_worker_is_waited_for_no_more():
    checks = _checks()
    checks.on_step(1, [REQUEST], [INFER])
    made = checks._simulation
    del made.hosts["w0"], made.by_device["gpu0"]

    checks.on_step(2, [WorkerLost(worker="w0")], [OK])

    assert not checks._out and not checks._reading


def test_belief_that_is_not_the_truth_is_found():
    made, _ = simulation(scenario())
    made.run(NS_PER_S)
    assert made.checks is not None
    made.checks.check(made.now_ns)
    host = made.hosts["w0"]
    assert isinstance(host, CheckedHost)
    host.truth["gpu0"].stored.clear()

    with pytest.raises(AssertionError, match="is believed ready"):
        made.checks.check(made.now_ns)
    with pytest.raises(AssertionError, match="and its worker believes"):
        host.check(made.now_ns)


def test_weights_that_stay_unknown_are_found():
    made, _ = simulation(scenario())
    made.run(NS_PER_S)
    assert made.checks is not None
    host = made.hosts["w0"]
    assert isinstance(host, CheckedHost)
    extent = Extent(made.hosts["w0"].specs[0].pages - 7, 7)
    host.truth["gpu0"].start(replace(LOAD, extent=extent, version=999), Lane.LOAD)
    made.checks.check(made.now_ns)

    with pytest.raises(AssertionError, match="version 999 is unknown"):
        made.checks.check(made.now_ns + FORGET_NS)


def test_weights_believed_in_use_by_nobody_are_found():
    made, _ = simulation(scenario())
    made.run(NS_PER_S)
    assert made.checks is not None
    made.checks._out.clear()
    made.controller._belief.sent.clear()
    next(iter(made.controller._belief.devices["gpu0"].pages.holders())).in_flight += 1

    with pytest.raises(AssertionError, match="believed out"):
        made.checks.check(made.now_ns)


def test_a_request_costs_no_more_workers_than_it_may():
    checks = _checks()
    made = checks._simulation
    host = made.hosts["w0"]
    assert made.controller.config.retries == 1

    def out_and_lost(action_id: int) -> None:
        made.by_device["gpu0"] = host
        checks.on_step(1, [], [replace(INFER, action_id=action_id)])
        del made.by_device["gpu0"]
        checks.on_step(2, [WorkerLost(worker="w0")], [])

    checks.on_step(1, [REQUEST], [])
    out_and_lost(11)
    out_and_lost(12)
    with pytest.raises(AssertionError, match="workers"):
        out_and_lost(13)


def test_counters_that_do_not_add_up_are_found():
    made, _ = simulation(scenario())
    made.run(NS_PER_S)
    assert made.checks is not None
    made.tally.loads[0].ok -= 1

    with pytest.raises(AssertionError):
        made.checks.check(made.now_ns)


def test_a_request_without_an_answer_is_found_at_the_end():
    made, _ = played(scenario())
    assert made.checks is not None
    made.checks.check_end()
    made.tally.loads[0].offered += 1

    with pytest.raises(AssertionError):
        made.checks.check_end()


def _quiet() -> Checks:
    """Of a simulation that is over, some seconds later."""
    made, _ = played(scenario())
    made.run(5 * NS_PER_S)
    assert made.checks is not None
    made.checks.check_quiet()
    return made.checks


def test_when_all_is_over_nothing_is_under_way():
    checks = _quiet()
    checks._held.add("x1")

    with pytest.raises(AssertionError, match="still in flight"):
        checks.check_quiet()


def test_when_all_is_over_every_book_says_the_same():
    checks = _quiet()
    device = checks._simulation.controller._belief.devices["gpu0"]
    unknown = device.pages.holders()[0]
    device.pages.release(unknown.extent)

    with pytest.raises(AssertionError, match="other weights than believed"):
        checks.check_quiet()


def test_when_all_is_over_no_weights_of_removed_models_are_there():
    checks = _quiet()
    checks.open_requests.served.pop("m-0000/1")

    with pytest.raises(AssertionError, match="weights not served"):
        checks.check_quiet()


# Steps of a worker


def test_an_action_starts_inside_its_window_by_the_workers_own_clock():
    made, _ = simulation(scenario())
    host = made.hosts["w0"]
    start = Start(device="gpu0", lane=Lane.LOAD, action=replace(LOAD, window=Window(100, 200)))

    for now_ns, skew_ns in ((99, 0), (201, 0), (150, 51), (150, -51)):
        host.skew_ns = skew_ns
        with pytest.raises(AssertionError, match="starts at"):
            host._start(start, now_ns)


def test_an_action_that_nobody_waits_for_does_not_start():
    made, _ = simulation(scenario())

    with pytest.raises(AssertionError, match="no controller waits for it"):
        made.hosts["w0"]._start(Start(device="gpu0", lane=Lane.LOAD, action=LOAD), 1)


def test_a_worker_that_is_gone_or_stopped_does_nothing():
    made, _ = simulation(scenario())
    host = made.hosts["w0"]
    host.stop(0)
    with pytest.raises(AssertionError, match="is stopped, and decides"):
        host.decide(1)
    host.die()
    done = Result(action_id=1, device="gpu0", status=Status.OK, started_ns=1, ended_ns=1)
    with pytest.raises(AssertionError, match="has died, and observes"):
        host.observe(done, 1)


def test_checks_change_nothing():
    (one, watched), (two, unwatched) = (played(scenario(), checks=checks) for checks in (True, False))

    assert one.checks is not None and two.checks is None
    assert watched.events == unwatched.events and watched.effects == unwatched.effects
