"""The verdict on a request: its reasons, and which comes first where several apply."""

from __future__ import annotations

from typing import Any

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.admission import Admission, Verdict
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import ServedModel
from clockwork_serve.controller.feasibility import Feasibility
from clockwork_serve.controller.promises import Promises
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.messages import AdmissionQuery, Outcome, Quota, QuotasSet, Reason, Request
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve

NOW_NS = ms(20)


class Door:
    """One device has model a, which takes 10 ms; a request of it waits. Others are judged at ``NOW_NS``."""

    def __init__(self, **settings: Any) -> None:
        self.belief: Belief = belief("d0", config=ControllerConfig(**settings))
        self.model: ServedModel = serve(self.belief, "a")
        feasibility = Feasibility(self.belief)
        feasibility.device_joined(self.belief.devices["d0"])
        place(self.belief, self.model, "d0")
        ask(self.belief, self.model)
        self.admission = Admission(self.belief, feasibility, Quarantine(self.belief), Promises(self.belief))

    def verdict(self, slo_ms: float = 100, *, announced: bool = False, **fields: Any) -> Verdict | None:
        """What a request, or its query, is told now."""
        model = self.belief.models.get(fields.setdefault("model", "a/1"))
        times = {"arrival_ns": NOW_NS, "deadline_ns": NOW_NS + ms(slo_ms), "tenant": "t", **fields}
        asked = (
            AdmissionQuery(announced_id="q", gateway="g", **times)
            if announced
            else Request(request_id="r", gateway="g", **times)
        )
        return self.admission.verdict(asked, model, NOW_NS)

    def reason(self, slo_ms: float = 100, **fields: Any) -> Reason:
        """Why it is told no; ``Reason.NONE`` if it is not."""
        found = self.verdict(slo_ms, **fields)
        return Reason.NONE if found is None else found.reason

    # What makes each reason apply, with those after it

    def be_slow(self) -> None:
        self.belief.devices["d0"].exec.send(self.belief.next_id(), ms(200), NOW_NS)

    def be_behind(self) -> None:
        ask(self.belief, self.model, count=16)
        self.model.pace_ns = self.model.pace_at_ns = ms(10)

    def have_no_quota(self) -> None:
        quota = Quota(tenant="t", device_ns_per_s=1, burst_ns=ms(1))
        self.belief.tenants.set_quotas(QuotasSet(quotas=(quota,)), 0)
        self.belief.tenants.accounts["t"].device.take(ms(100), NOW_NS)

    def be_full(self) -> None:
        self.model.queue_limit = 1

    def be_drained(self) -> None:
        self.admission.draining = True


def test_without_a_reason_a_request_is_admitted() -> None:
    door = Door()
    assert door.verdict() is None
    assert door.verdict(announced=True) is None


def test_reasons_of_an_arrival_come_in_their_order() -> None:
    door = Door()
    door.have_no_quota()
    found = [door.reason()]
    for what in (door.be_behind, door.be_full):
        what()
        found.append(door.reason())
    found.append(door.reason(rows=99))
    door.be_drained()
    found += [door.reason(rows=99), door.reason(model="b/1")]
    assert found == [
        Reason.TENANT_QUOTA, Reason.WOULD_MISS_DEADLINE, Reason.QUEUE_FULL, Reason.BAD_INPUT, Reason.DRAINING,
        Reason.UNKNOWN_MODEL,
    ]  # fmt: skip


def test_reasons_of_a_query_come_in_the_same_order() -> None:
    door = Door()
    found = []
    for what in (door.be_slow, door.have_no_quota, door.be_full, door.be_drained):
        what()
        found.append(door.reason(announced=True))
    assert found == [
        Reason.WOULD_MISS_DEADLINE, Reason.TENANT_QUOTA, Reason.QUEUE_FULL, Reason.DRAINING,
    ]  # fmt: skip


def test_an_arrival_is_queued_before_it_is_asked_whether_a_lane_is_free_in_time() -> None:
    door = Door()
    door.be_slow()
    assert door.verdict() is None


def test_one_past_its_deadline_is_no_matter_of_the_backlog() -> None:
    door = Door()
    door.be_behind()
    assert door.verdict(slo_ms=-1) is None


def test_a_head_is_told_when_to_return_by_what_it_waits_for() -> None:
    door = Door()
    door.be_slow()
    (head,) = door.belief.waiters.values()
    found = door.admission.hopeless(head, NOW_NS)
    assert found is not None
    assert (found.outcome, found.reason) == (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE)
    assert found.retry_after_ns > ms(100), "200 ms of work, and a deadline 90 ms from now"


@pytest.mark.parametrize("slo_ms", [5, 11])
def test_who_could_never_be_in_time_gets_no_advice(slo_ms: float) -> None:
    door = Door()
    door.be_slow()
    found = door.verdict(slo_ms, announced=True)
    assert found is not None
    assert found.retry_after_ns == 0
