"""Quotas: what a bucket gives and takes, who pays for what, and that nobody gets more than is his."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clockwork_serve.controller.tenants import Bucket
from clockwork_serve.messages import (
    AdmissionQuery,
    AdmissionReply,
    Cancel,
    Infer,
    Outcome,
    QuotasSet,
    Reason,
    Status,
)
from clockwork_serve.units import NS_PER_S, ms
from tests.controller.accounts import BOTH, accounts, quota, why, world
from tests.controller.clusters import belief, serve
from tests.controller.honest import device, profile, serving

# The bucket


def bucket(rate: int, burst_ns: int) -> Bucket:
    made = Bucket()
    made.set(rate, burst_ns, 0)
    return made


def test_what_was_taken_comes_back_with_time() -> None:
    full = bucket(ms(100), NS_PER_S)
    full.take(ms(100), now_ns=0)
    assert full.wait_ns(ms(10), now_ns=0) == ms(100)
    assert full.wait_ns(ms(10), now_ns=ms(40)) == ms(60)
    assert full.wait_ns(ms(10), now_ns=ms(100)) == 0


def test_time_without_use_fills_it_no_further_than_its_burst() -> None:
    full = bucket(ms(100), NS_PER_S)
    assert full.wait_ns(ms(100), now_ns=3600 * NS_PER_S) == 0
    full.held = 1
    assert full.wait_ns(ms(100), now_ns=3600 * NS_PER_S) > 0


def test_a_full_bucket_lends_to_what_is_larger_than_it_and_is_repaid() -> None:
    full = bucket(ms(100), ms(100))
    assert full.wait_ns(ms(50), now_ns=0) == 0
    full.take(ms(50), now_ns=0)
    assert full.wait_ns(ms(1), now_ns=0) == ms(410), "40 ms beyond the 10 that it holds, and the one"


def test_a_bucket_without_a_rate_gives_whatever_is_asked() -> None:
    open_ended = Bucket()
    open_ended.take(ms(1000), now_ns=0)
    assert open_ended.wait_ns(ms(1000), now_ns=0) == 0
    assert open_ended.used == ms(1000)


def test_another_rate_changes_how_fast_a_debt_is_repaid_and_not_the_debt() -> None:
    used = bucket(ms(100), NS_PER_S)
    used.take(ms(100), now_ns=0)
    used.set(ms(200), NS_PER_S, now_ns=ms(500))
    assert used.amounts(0, ms(1), ms(500)) == ["200", "200", "50", "0"]
    assert used.owed_ns(ms(500)) == ms(250)


def test_what_is_taken_comes_back_no_sooner_than_it_may() -> None:
    third = bucket(3, NS_PER_S)
    third.take(1, now_ns=0)
    assert third.owed_ns(0) == 333_333_334


class BucketMachine(RuleBasedStateMachine):
    """Never more than rate times time and a burst, in whatever stretch; never a no while enough is left."""

    @initialize(rate=st.integers(1, 10**12), burst_ns=st.integers(1, 10**11))
    def start(self, rate: int, burst_ns: int) -> None:
        self.rate, self.burst_ns = rate, burst_ns
        self.bucket = bucket(rate, burst_ns)
        self.now_ns = 0
        self.level = self.full = Fraction(rate * burst_ns, NS_PER_S)
        self.held: list[int] = []
        self.uses: list[tuple[int, int]] = []
        self.operations = 0
        self.largest = 0

    @rule(
        share=st.fractions(0, 1.5),
        delay_ns=st.one_of(st.just(0), st.integers(0, 10**9), st.integers(0, 10**12)),
    )
    def ask(self, share: Fraction, delay_ns: int) -> None:
        self._pass(delay_ns)
        amount = int(self.full * share)
        left = self.level - sum(self.held) - min(amount, self.full)
        wait_ns = self.bucket.wait_ns(amount, self.now_ns)
        fuzz = Fraction(self.rate * (self.operations + 3), NS_PER_S)  # each rounds up to a whole ns
        if left >= fuzz:
            assert wait_ns == 0
        if wait_ns == 0:
            assert left >= 0
            self.held.append(amount)
            self.bucket.held += amount
        else:
            assert (wait_ns - 1) * self.rate <= (fuzz - left) * NS_PER_S, "no longer than it takes"
            if not self.held:
                assert self.bucket.wait_ns(amount, self.now_ns + wait_ns) == 0, "true, if nothing comes"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), share=st.fractions(0, 1), delay_ns=st.integers(0, 10**9))
    def use(self, data: st.DataObject, share: Fraction, delay_ns: int) -> None:
        """What was held is over, and cost what it was expected to, or less."""
        self._pass(delay_ns)
        amount = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.bucket.held -= amount
        used = int(amount * share)
        if used:
            self.operations += 1
            self.bucket.take(used, self.now_ns)
            self.level -= used
            self.uses.append((self.now_ns, used))
            self.largest = max(self.largest, used)

    def _pass(self, delay_ns: int) -> None:
        self.now_ns += delay_ns
        self.level = min(self.full, self.level + Fraction(self.rate * delay_ns, NS_PER_S))

    @invariant()
    def no_stretch_has_too_much(self) -> None:
        if not hasattr(self, "uses"):
            return
        sum_ = 0
        for at_ns, used in reversed(self.uses[-30:]):
            sum_ += used
            allowed = self.full + Fraction(self.rate * (self.now_ns - at_ns), NS_PER_S)
            assert sum_ <= allowed + max(0, self.largest - self.full)


TestBucket = BucketMachine.TestCase
TestBucket.settings = settings(stateful_step_count=30)


# Who pays


def test_a_request_is_charged_its_share_of_what_its_batch_took() -> None:
    made = world(quota("t", device_ms=1000))
    for name in ("t", "", "t", "", "t"):
        made.request("a", slo_ms=200, tenant=name)
    made.run()
    batches = [action.batch for action in made.actions if isinstance(action, Infer)][-2:]
    assert batches == [1, 4]
    assert accounts(made)["device_ns"] == ms(10) + 2 * ms(22) // 4


def test_a_tenant_over_its_quota_is_refused_at_once_and_told_when_to_come_back() -> None:
    made = world(quota("t", device_ms=100, burst_ms=200))
    ids = [made.request("a", slo_ms=500, tenant="t") for _ in range(3)]
    assert why(made, ids[2]) == BOTH, "its bucket holds 20 ms, and two requests are on their way"
    answer = made.answers[ids[2]]
    assert answer.retry_after_ns == ms(100)
    assert answer.message == (
        "device_ms_per_s of tenant t: expected at most 100 ms of device time a second and 20 at once, "
        "found 20 in use and 10 more asked for; ask for less, or have the quota raised"
    )
    made.run(until_ms=150)
    later = made.ask("a", slo_ms=500, tenant="t")
    assert [made.answers[one].outcome for one in (*ids[:2], later)] == [Outcome.OK] * 3


def test_others_are_not_refused_for_it() -> None:
    made = world(quota("t", device_ms=1, burst_ms=1), quota("u", device_ms=100))
    ids = [made.request("a", slo_ms=500, tenant=name) for name in ("t", "t", "u", "nobody", "")]
    made.run()
    assert [why(made, one)[1] for one in ids] == [Reason.NONE, Reason.TENANT_QUOTA, *[Reason.NONE] * 3]


def test_nothing_is_charged_for_what_did_not_run() -> None:
    made = world(quota("t", device_ms=100, burst_ms=100))
    hopeless = made.request("a", slo_ms=5, tenant="t")
    assert why(made, hopeless)[1] is Reason.WOULD_MISS_DEADLINE
    made.request("b", slo_ms=500)
    gone = made.request("b", slo_ms=500, tenant="t")
    made.tell(Cancel(request_id=gone))
    assert why(made, gone)[0] is Outcome.CANCELLED
    last = made.ask("a", slo_ms=500, tenant="t")
    assert why(made, last)[0] is Outcome.OK
    assert accounts(made)["device_ns"] == ms(10)


def test_a_client_that_leaves_while_its_request_runs_pays_for_it() -> None:
    made = world(quota("t", device_ms=100))
    request_id = made.request("a", slo_ms=500, tenant="t")
    made.tell(Cancel(request_id=request_id))
    made.run()
    assert made.releases == [request_id]
    assert accounts(made)["device_ns"] == ms(10)


def test_what_took_longer_than_expected_is_repaid_before_more_is_admitted() -> None:
    made = world(quota("t", device_ms=100, burst_ms=200))
    made.slower = 5
    made.ask("a", slo_ms=500, tenant="t", until_ms=51)
    refused = made.request("a", slo_ms=500, tenant="t")
    assert why(made, refused) == BOTH
    assert ms(350) < made.answers[refused].retry_after_ns < ms(450), "50 ms, of which the bucket held 20"


def test_a_refused_action_costs_nothing_and_its_request_is_held_for_again() -> None:
    made = world(quota("t", device_ms=100))
    execute = made._execute

    def refuse(action: object) -> None:
        assert isinstance(action, Infer)
        made._execute = execute  # type: ignore[method-assign]
        made.reply(action, Status.TOO_LATE, made.now_ns, made.now_ns)

    made._execute = refuse  # type: ignore[method-assign]
    request_id = made.ask("a", slo_ms=500, tenant="t")
    assert why(made, request_id)[0] is Outcome.OK
    assert accounts(made)["device_ns"] == ms(10)


def test_what_a_lost_worker_was_doing_is_charged_as_expected() -> None:
    made = world(quota("t", device_ms=100))
    made.join(device("d1"), worker="w1")
    request_id = made.request("a", slo_ms=500, tenant="t")
    made.kill("w0", "d0")
    assert accounts(made)["device_ns"] == ms(10)
    made.run()
    assert why(made, request_id)[0] is Outcome.OK
    assert accounts(made)["device_ns"] == ms(20), "it ran again"


def test_more_rows_cost_more() -> None:
    made = world(quota("t", device_ms=100, burst_ms=300))
    ids = [made.request("a", slo_ms=500, rows=rows, tenant="t") for rows in (4, 1)]
    assert why(made, ids[1]) == BOTH, "22 of 30 ms are taken"


def test_what_is_over_quota_is_foretold() -> None:
    made = world(quota("t", device_ms=100, burst_ms=100))
    made.request("a", slo_ms=500, tenant="t")
    told: list[AdmissionReply] = []
    for tenant in ("t", ""):
        head = AdmissionQuery(
            announced_id=tenant, gateway="g0", model="a/1", arrival_ns=made.now_ns,
            deadline_ns=made.now_ns + ms(500), tenant=tenant,
        )  # fmt: skip
        made.controller.observe(head, made.now_ns)
        told += [one for one in made.controller.decide(made.now_ns) if isinstance(one, AdmissionReply)]
    assert [one.reason for one in told] == [Reason.TENANT_QUOTA, Reason.NONE]
    assert told[0].retry_after_ns > 0


def test_in_a_batch_each_holds_its_share() -> None:
    made = world(quota("t", device_ms=100))
    made.request("b", slo_ms=500)
    ids = [made.request("a", slo_ms=500, tenant="t") for _ in range(8)]
    made.run(until_ms=15)
    assert len(made.actions[-1].calls) == 8, "38 ms in all, and each alone is 10"  # type: ignore[union-attr]
    ids += [made.request("b", slo_ms=500, tenant="t") for _ in range(6)]
    made.run()
    assert {why(made, one)[0] for one in ids} == {Outcome.OK}


def test_what_a_request_costs_follows_its_rows() -> None:
    made = belief("d0")
    served = serve(made, "a")
    assert [made.cost_ns(served, rows) for rows in (1, 2, 3, 8)] == [ms(10), ms(14), ms(22), ms(38)]


# Reload


def test_a_tenant_that_stays_owes_what_it_owed_and_one_without_a_quota_is_free() -> None:
    made = world(quota("t", device_ms=100, burst_ms=100))
    made.request("a", slo_ms=500, tenant="t")
    made.tell(QuotasSet(quotas=(quota("t", device_ms=100, burst_ms=100),)))
    assert why(made, made.request("a", slo_ms=500, tenant="t")) == BOTH
    made.tell(QuotasSet(quotas=()))
    free = made.ask("a", slo_ms=500, tenant="t")
    assert why(made, free)[0] is Outcome.OK


@pytest.mark.parametrize("policy", ["default", "paper"])
def test_a_tenant_far_over_its_quota_with_the_tightest_slo_takes_no_more_than_its_quota(policy: str) -> None:
    made = serving("a", "b", times=profile(b1_ms=2, step_ms=1), policy=policy)
    for name in "ab":
        made.request(name, slo_ms=500)
    made.run()
    made.tell(QuotasSet(quotas=(quota("greedy", device_ms=200, burst_ms=50),)))
    mine = []
    for step in range(250):  # half a second
        for _ in range(2):  # twice as much as the device can do
            made.request("a", slo_ms=6, tenant="greedy")
        if step % 4 == 0:
            mine.append(made.request("b", slo_ms=20, tenant="modest"))
        made.run(until_ms=2)
    made.run()
    assert {made.answers[one].outcome for one in mine} == {Outcome.OK}
    assert ms(90) < accounts(made, "greedy")["device_ns"] <= ms(200 // 2 + 10 + 1)
