"""What must always be true of belief as a whole; it changes nothing."""

from __future__ import annotations

from collections import Counter

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.life import ANSWERED, READY, SENT, SPENT, WAITING
from clockwork_serve.messages import Infer


def check_belief(belief: Belief) -> None:
    """Assert every invariant that relates the parts."""
    for model in belief.models.values():
        waiters = [waiter for queue in model.queues.values() for waiter in queue.waiters]
        assert model.waiting == len(waiters)
        assert model.demand_ns == sum(waiter.demand_ns for waiter in waiters)
        ready = sum(residency.state == READY for residency in model.residencies.values())
        for queue in model.queues.values():
            queue.check()
            assert model.queues[queue.signature, queue.rows, queue.alone, queue.level] is queue
            assert len(queue.strategies) == ready
    waiting = sum(model.waiting for model in belief.models.values())
    states = [waiter.state for waiter in belief.waiters.values()]
    assert states.count(WAITING) == waiting
    assert ANSWERED not in states
    flying = Counter([id(waiter) for sent in belief.sent.values() for waiter in sent.waiters])
    owed = Counter(
        [id(one) for hung in belief.hung.values() for sent in hung.sent.values() for one in sent.waiters]
    )
    for waiter in belief.waiters.values():
        flies = flying.pop(id(waiter), 0)
        assert flies == (waiter.state == SENT) or (flies <= 1 and waiter.state == SPENT)
        held = owed.pop(id(waiter), 0) + (flies if waiter.state == SPENT else 0)
        assert waiter.held == held, f"{waiter.request.request_id}: {waiter.held} is not {held}"
        assert waiter.state != SPENT or waiter.held
    assert not flying and not owed, "requests that are over are in flight"
    for device in belief.devices.values():
        device.check()
        shares_ns = sum(one.model.share_ns(one) for one in device.pages.holders())
        assert device.load_ns == shares_ns, f"{device.name}: {device.load_ns} is not {shares_ns}"
    for sent in belief.sent.values():
        assert belief.devices[sent.action.device] is sent.device
        assert isinstance(sent.action, Infer) == bool(sent.waiters)
        if sent.residency is not None and sent.waiters:
            assert sent.residency.state == READY
            assert sent.residency.in_flight > 0
    assert all(model.stirred for model in belief.stirred)
    assert all(queue.doubted for queue in belief.doubted)
    belief.tenants.check(set(belief.waiters))
