"""Who pays for LOADs."""

from __future__ import annotations

from clockwork_serve.controller.cluster import ServedModel, Waiter
from clockwork_serve.controller.tenants import Account, Tenants
from clockwork_serve.messages import Cancel, Load, Outcome, QuotasSet, Request, Status
from clockwork_serve.units import MIB, NS_PER_S, ms
from tests.controller.accounts import BOTH, accounts, quota, why, world
from tests.controller.honest import CODE, device, model


def a_request(name: str, due_ms: float = 100, signature: str = "") -> Request:
    return Request(
        request_id=name, gateway="g0", model="a/1", arrival_ns=0, deadline_ns=ms(due_ms), signature=signature
    )


def two() -> tuple[Tenants, Account, Account, ServedModel]:
    """Two tenants, and a model of 4 MiB that is nowhere."""
    tenants = Tenants()
    tenants.set_quotas(QuotasSet(quotas=(quota("t", 100, 100), quota("u", 100, 100))), 0)
    return tenants, tenants.accounts["t"], tenants.accounts["u"], ServedModel(model("a"), CODE, 1)


def test_a_claim_that_was_settled_leaves_a_later_one_alone() -> None:
    tenants, t, u, served = two()
    tenants.admit(a_request("r1"), t, served, ms(1))
    tenants.loading(served, action_id=1)
    tenants.loaded(1, 0, good=False)
    tenants.admit(a_request("r2"), u, served, ms(1))
    tenants.ended("r1")
    assert [claim.account for claim in tenants.claims[served]] == [u]
    tenants.check({"r2"})


def test_who_waits_again_holds_again() -> None:
    tenants, t, _, served = two()
    request = a_request("r1")
    tenants.admit(request, t, served, ms(5))
    waiter = Waiter(request, ms(90), request.slo_ns, 1, served.open("", 1, 2, alone=False))
    tenants.measured([waiter], 0, now_ns=0)
    assert t.device.held == 0
    tenants.returned(waiter, ms(5))
    assert t.device.held == ms(5)


def test_of_several_queues_whose_request_is_due_first_pays_for_another_copy() -> None:
    tenants, t, u, served = two()
    for account, name, due_ms, signature in ((t, "r1", 70, ""), (u, "r2", 50, "X:3")):
        request = a_request(name, due_ms, signature)
        queue = served.open(signature, 1, 2, alone=False)
        queue.add(Waiter(request, request.deadline_ns, request.slo_ns, 1, queue))
        tenants.admit(request, account, served, ms(1))
    tenants.loading(served, action_id=1)
    tenants.loading(served, action_id=2)
    for action_id in (1, 2):
        tenants.loaded(action_id, 0, good=True)
    assert [t.loaded.used, u.loaded.used] == [2 * MIB, 6 * MIB], "they shared the first"
    tenants.check({"r1", "r2"})


def test_one_claim_is_enough_for_all_requests_of_a_tenant_and_lasts_as_long_as_they() -> None:
    made = world(quota("t", loaded_mib=4), warm=False, names="abc")
    made.request("a", slo_ms=500)
    ids = [made.request("b", slo_ms=500, tenant="t") for _ in range(2)]
    made.tell(Cancel(request_id=ids[0]))
    assert why(made, made.request("c", slo_ms=500, tenant="t")) == BOTH
    made.tell(Cancel(request_id=ids[1]))
    last = made.ask("c", slo_ms=500, tenant="t")
    assert why(made, last)[0] is Outcome.OK


def test_a_load_is_charged_to_whose_request_came_first_and_found_no_weights() -> None:
    made = world(quota("t", loaded_mib=100), quota("u", loaded_mib=100), warm=False)
    for tenant in ("t", "t", "u"):
        made.request("a", slo_ms=500, tenant=tenant)
    made.run()
    assert accounts(made, "t")["loaded_bytes"] == 4 * MIB
    assert accounts(made, "u")["loaded_bytes"] == 0, "the LOAD was on its way"


def test_tenants_that_wait_for_one_load_share_it() -> None:
    made = world(quota("t", loaded_mib=100), quota("u", loaded_mib=100), warm=False, names="abcd", pages=4)
    made.request("b", slo_ms=500)
    for tenant in ("t", "u", "u"):
        made.request("a", slo_ms=900, tenant=tenant)
    made.run()
    assert [accounts(made, tenant)["loaded_bytes"] for tenant in "tu"] == [2 * MIB] * 2


def test_who_asks_for_one_cold_model_after_another_is_refused() -> None:
    made = world(quota("t", loaded_mib=4), names="abcd", warm=False)
    ids = [made.request(name, slo_ms=900, tenant="t") for name in "abcd"]
    others = [made.request(name, slo_ms=900) for name in "cd"]
    assert [why(made, one) for one in ids[1:]] == [BOTH] * 3
    assert made.answers[ids[1]].message.startswith(
        "loaded_bytes_per_s of tenant t: expected at most 4 MiB of"
    )
    assert made.answers[ids[1]].retry_after_ns == NS_PER_S
    made.run(until_ms=100)
    warm = [made.request(name, slo_ms=500, tenant="t") for name in "cd"]
    made.run(until_ms=1000)
    later = made.ask("b", slo_ms=500, tenant="t")
    assert [made.answers[one].outcome for one in (ids[0], *others, *warm, later)] == [Outcome.OK] * 6


def test_a_claim_for_weights_that_are_not_loaded_is_free_again() -> None:
    made = world(quota("t", loaded_mib=4), warm=False, names="abc")
    made.request("a", slo_ms=500)
    gone = made.request("b", slo_ms=500, tenant="t")
    refused = made.request("c", slo_ms=500, tenant="t")
    made.tell(Cancel(request_id=gone))
    again = made.ask("c", slo_ms=500, tenant="t")
    assert [action.model for action in made.actions if isinstance(action, Load)] == ["a/1", "c/1"]
    assert [why(made, one)[0] for one in (refused, again)] == [Outcome.REJECTED, Outcome.OK]


def test_a_load_that_fails_is_held_for_until_then_and_costs_nothing() -> None:
    made = world(quota("t", loaded_mib=4), warm=False)
    execute = made._execute

    def refuse(action: object) -> None:
        assert isinstance(action, Load)
        made._execute = execute  # type: ignore[method-assign]
        made.reply(action, Status.TOO_LATE, made.now_ns, made.now_ns)

    made._execute = refuse  # type: ignore[method-assign]
    first = made.request("a", slo_ms=500, tenant="t")
    refused = made.request("b", slo_ms=500, tenant="t")
    made.run()
    assert [why(made, one)[0] for one in (first, refused)] == [Outcome.OK, Outcome.REJECTED]
    assert accounts(made)["loaded_bytes"] == 4 * MIB, "once"


def test_a_second_copy_is_charged_to_whose_request_is_due_first() -> None:
    made = world(quota("t", loaded_mib=100), quota("u", loaded_mib=100), names="a")
    made.join(device("d1"), worker="w1")
    for slo_ms, tenant in [(500, "u"), (60, "t"), *[(slo_ms, "u") for slo_ms in range(61, 100)]]:
        made.request("a", slo_ms=slo_ms, tenant=tenant)
    loads = len([action for action in made.actions if isinstance(action, Load)])
    made.run()
    assert loads == 2, "d0 alone cannot serve them"
    assert [accounts(made, tenant)["loaded_bytes"] for tenant in "tu"] == [4 * MIB, 0]
