"""Isolation: what a tenant gets does not depend on how much another one asks for beyond its quota."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.messages import Answer, Infer, Load, Reason, Request, Result
from clockwork_serve.sim import Simulation
from clockwork_serve.units import MIB, NS_PER_S, ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario, TenantTable
from clockwork_serve.workload.tables import ClusterTable
from harness.seeds import Digest
from tests.sim.worlds import KIND, Steps, simulation

SECONDS = 4.0
QUOTA = TenantTable(name="greedy", device_ms_per_s=250, burst_s=0.05)
ALONE_MS = 2.63
"""What one request takes of a device, about."""
WITHIN_RPS = 60
"""Six tenths of the quota: chance makes a Poisson load exceed its mean."""
TEN_TIMES_RPS = 10 * 250 / ALONE_MS


def two(greedy_rps: float, *, quota: TenantTable = QUOTA, slo_ms: float = 15, copies: int = 2) -> Scenario:
    """A modest load that takes 0.4 of a device, and a greedy one whose SLO is tighter."""
    modest = LoadTable(name="modest", models=("mine",), arrivals="poisson", rate_rps=150, slo_ms=50)
    greedy = LoadTable(
        name="greedy", models=("theirs",), arrivals="poisson", rate_rps=max(1, greedy_rps), slo_ms=slo_ms,
        tenant="greedy",
    )  # fmt: skip
    sets = (ModelSet(name="mine", kind=KIND, copies=2), ModelSet(name="theirs", kind=KIND, copies=copies))
    return Scenario(
        name="two", seconds=SECONDS, models=sets, loads=(modest, greedy) if greedy_rps else (modest,),
        tenants=(quota,), cluster=ClusterTable(devices=1),
    )  # fmt: skip


def in_time(made: Simulation, load: int = 0) -> tuple[int, int]:
    """How many requests of a load were sent, and answered in time."""
    count = made.tally.loads[load]
    return count.offered, count.ok


def played(
    scenario: Scenario, seed: int, pages: int = 200, *, checks: bool = False
) -> tuple[Simulation, Steps]:
    made, steps = simulation(scenario, seed=seed, pages=pages, checks=checks)
    made.run()
    return made, steps


def most_at_once(uses: list[tuple[int, int]], rate: int) -> float:
    """The most that was used beyond ``rate`` a second, over all stretches of time."""
    debt, most, last_ns = 0.0, 0.0, 0
    for at_ns, used in sorted(uses):
        debt = max(0.0, debt - (at_ns - last_ns) * rate / NS_PER_S) + used
        most, last_ns = max(most, debt), at_ns
    return most


def device_uses(steps: Steps) -> list[tuple[int, int]]:
    """When the greedy tenant used how much of a device: its share of each batch, from the journal alone."""
    tenants = {event.request_id: event.tenant for _, event in steps.seen(Request)}
    actions = {effect.action_id: effect for _, effect in steps.done(Infer)}
    return [
        (now_ns, result.lane_ns // len(actions[result.action_id].calls))
        for now_ns, result in steps.seen(Result)
        if result.action_id in actions
        for call in actions[result.action_id].calls
        if tenants[call.request_id] == "greedy"
    ]


@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_times_a_quota_at_the_tightest_slo_leaves_anothers_goodput_unchanged(seed: int) -> None:
    worlds = [played(two(rate), seed, checks=seed == 1) for rate in (0, WITHIN_RPS, TEN_TIMES_RPS)]
    alone, within, beyond = [in_time(made) for made, _ in worlds]
    assert alone[0] == alone[1], "modest is served in full without the other"
    assert alone == within == beyond

    made, steps = worlds[2]
    refused = {answer.reason for _, answer in steps.done(Answer) if answer.reason}
    assert refused <= {Reason.TENANT_QUOTA, Reason.WOULD_MISS_DEADLINE}
    uses = device_uses(steps)
    assert most_at_once(uses, ms(250)) <= ms(250) * 0.05 + ms(ALONE_MS)
    assert sum(used for _, used in uses) >= 0.9 * ms(250) * SECONDS
    assert made.tally.loads[1].others.total() > 0.8 * made.tally.loads[1].offered


def test_without_the_quota_the_other_would_pay() -> None:
    made, _ = played(two(TEN_TIMES_RPS, quota=TenantTable(name="greedy")), seed=1)
    offered, ok = in_time(made)
    assert ok < 0.95 * offered


def load_uses(steps: Steps) -> list[tuple[int, int]]:
    """LOADs of the greedy tenant's models: nobody else asks for them."""
    return [
        (now_ns, load.weights.size) for now_ns, load in steps.done(Load) if load.model.startswith("theirs")
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_who_loads_one_model_after_another_displaces_no_more_than_its_quota(seed: int) -> None:
    """Memory for six models; the greedy one asks for two hundred in turn."""
    quota = TenantTable(name="greedy", loaded_bytes_per_s=400 * MIB, burst_s=0.5)
    plain = replace(quota, loaded_bytes_per_s=None)
    pages = 6 * 7
    alone = in_time(played(two(0), seed, pages)[0])
    held, steps = played(two(100, quota=quota, slo_ms=100, copies=200), seed, pages, checks=seed == 1)
    free, loose = played(two(100, quota=plain, slo_ms=100, copies=200), seed, pages)
    assert alone == in_time(held)
    size = load_uses(steps)[0][1]
    assert most_at_once(load_uses(steps), 400 * MIB) <= 200 * MIB + size
    assert len(load_uses(steps)) < 0.3 * len(load_uses(loose))
    assert held.tally.loads[0].cold <= free.tally.loads[0].cold


def test_a_seed_gives_one_journal() -> None:
    digests = []
    for _ in range(2):
        made, _ = simulation(two(TEN_TIMES_RPS), seed=7, pages=200, checks=False)
        digest = Digest()
        made.watchers.append(digest)
        made.run()
        digests.append(digest.hex())
    assert digests[0] == digests[1]
