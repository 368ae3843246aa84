"""Why promises are broken: what happened since the request had its place, and what devices learn from it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import Queue, Residency, ServedModel
from clockwork_serve.controller.estimates import DRIFT_UP
from clockwork_serve.controller.promises import Promises
from clockwork_serve.messages import Cause, ModelAdded, Outcome, Reason, Status
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, promise, serve
from tests.controller.honest import World, model, profile, serving


class Moved:
    """A promise that lost its place on d0 for a cause, and got another one, on d1, at 12 ms.

    ``joins``: it is in a batch with another one there.
    """

    def __init__(self, cause: Cause, *, joins: bool = False) -> None:
        self.belief: Belief = belief("d0", "d1", config=ControllerConfig(decide_ns=0))
        self.belief.keeps_promises = True
        self.model: ServedModel = serve(self.belief, "a")
        first: Residency = place(self.belief, self.model, "d0")
        second = place(self.belief, self.model, "d1")
        there = promise(ask(self.belief, self.model, slo_ms=70), second) if joins else None
        self.queue: Queue = ask(self.belief, self.model, slo_ms=60)
        gone = promise(self.queue, first)
        (self.waiter,) = gone.waiters
        self.d0, self.d1 = self.belief.devices.values()
        self.d0.exec.send(1, ms(300), ms(10))
        self.belief.displace([gone], cause)
        Promises(self.belief).judge(ms(12))
        self.belief.now_ns = ms(50)
        assert self.waiter.device is self.d1
        assert self.waiter.place is (there or self.d1.reserved[0])

    def broken(self, reason: Reason = Reason.NONE) -> Cause:
        """Its deadline passes."""
        return self.belief.break_promise(self.waiter, reason)


JOINS = pytest.mark.parametrize("joins", [False, True], ids=["alone", "in a batch"])
DISPLACED = pytest.mark.parametrize("displaced", [Cause.OUTRANKED, Cause.DEVICE_LOST])


@JOINS
@DISPLACED
def test_who_has_a_place_again_and_is_late_is_so_for_what_happened_since(displaced: Cause, joins: bool):
    moved = Moved(displaced, joins=joins)
    drift = moved.d1.delays.drift
    moved.d1.slowed_ns = ms(40)

    assert moved.broken() is Cause.DEVICE_SLOWED
    assert moved.d1.delays.drift == drift + DRIFT_UP
    assert not moved.d0.delays.headroom and not moved.d1.delays.headroom


@JOINS
@DISPLACED
def test_a_device_that_was_slow_before_a_promise_came_there_is_no_cause(displaced: Cause, joins: bool):
    moved = Moved(displaced, joins=joins)
    moved.d1.slowed_ns = ms(12)  # the promise was made at 10 ms

    assert moved.broken() is Cause.UNEXPLAINED


@DISPLACED
def test_who_was_sent_though_it_lost_its_place_is_late_for_the_device(displaced: Cause):
    moved = Moved(displaced)
    assert moved.waiter.place is not None
    moved.belief.displace([moved.waiter.place], displaced)
    strategy = moved.queue.strategies[1]
    moved.belief.send_infer(strategy, strategy.batches[0], 0, ms(50), ms(50))

    assert moved.broken(Reason.LATE) is Cause.DEVICE_SLOWED


def test_what_was_sent_to_a_device_that_does_not_move_tells_nothing_of_how_fast_it_is():
    moved = Moved(Cause.OUTRANKED)
    strategy = moved.queue.strategies[1]
    moved.belief.send_infer(strategy, strategy.batches[0], 0, ms(50), ms(50))
    drift = moved.d1.delays.drift
    moved.d1.exec.stalled = True

    assert moved.broken(Reason.LATE) is Cause.DEVICE_STALLED
    assert moved.d1.delays.drift == drift


def test_a_promise_that_waits_for_a_load_that_does_not_end_tells_nothing_of_how_fast_the_device_is():
    moved = Moved(Cause.OUTRANKED)
    drift = moved.d1.delays.drift
    moved.d1.load.stalled = True

    assert moved.broken() is Cause.DEVICE_STALLED
    assert moved.d1.delays.drift == drift


def warm(*names: str) -> World:
    """Models on a device that is idle."""
    made = serving(*names, times=profile(b1_ms=20, step_ms=4, load_ms=60), decide_ns=0, max_batch=8)
    for name in names:
        made.ask(name, slo_ms=5000, until_ms=200)
    return made


def test_a_version_that_comes_too_late_to_keep_promises_is_the_cause():
    made = warm("a", "b")
    for _ in range(9):
        made.request("b", slo_ms=1000)
    made.run(until_ms=21)
    waits = made.ask("a", slo_ms=72, until_ms=10)
    drift = made.controller._belief.devices["d0"].delays.drift

    made.tell(ModelAdded(model=model("a", mib=5)))
    made.run()

    assert made.answers[waits].outcome is Outcome.EXPIRED
    assert made.answers[waits].cause is Cause.MODEL_REMOVED
    assert made.controller._belief.devices["d0"].delays.drift == drift


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (Status.TOO_LATE, Cause.DEVICE_SLOWED), (Status.SHUTTING_DOWN, Cause.DEVICE_LOST),
        (Status.WEIGHTS_MISSING, Cause.DEVICE_LOST), (Status.MODEL_RAISED, Cause.MODEL_FAILED),
    ],
)  # fmt: skip
def test_a_batch_that_did_not_run_is_late_for_what_its_worker_said(status: Status, cause: Cause):
    made = warm("a")
    made.ask("a", slo_ms=5000, until_ms=1)
    late = [made.request("a", slo_ms=70) for _ in range(4)]
    made.run(until_ms=30)
    ((at_ns, number, result),) = made._inbox
    assert len(result.outputs) == 4
    made._inbox = [(at_ns, number, replace(result, status=status, outputs=()))]

    made.run()

    assert [made.answers[one].cause for one in late] == [cause] * 4
