"""Quotas of tenants: token buckets for device time and loaded bytes, and what each request is charged.

The expected cost of a request is *held* (reserved) from its admission on; its measured cost is *taken* from
the bucket at its result. So within any time t a tenant uses at most its rate times t plus the bucket's size,
as far as estimates are right; a cost above the estimate is a debt that is repaid before more is admitted.

A request that finds its model's weights on no device makes a *claim* for its tenant. When the LOAD is sent,
its bytes are divided among the tenants with a claim; without one, the tenant whose request is due first pays
for all of them. They are held until the result, and taken if it is good.

It refuses nobody: ``admission`` asks it, and decides.
"""

from __future__ import annotations

from clockwork_serve.controller.cluster import ServedModel, Waiter
from clockwork_serve.controller.record import Record
from clockwork_serve.messages import Quota, QuotasSet, Request
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S


class Bucket(Record):
    """A token bucket: filled at ``rate`` a second (0: unlimited); its size is what ``burst_ns`` fills."""

    __slots__ = ("burst_ns", "full_ns", "held", "rate", "used")

    def __init__(self) -> None:
        self.rate = 0
        self.burst_ns = 0
        self.full_ns = 0
        """When it is full again if nothing more is taken; in the past if it is full."""
        self.held = 0
        """Reserved for admitted requests."""
        self.used = 0
        """All that was ever taken."""

    def set(self, rate: int, burst_ns: int, now_ns: int) -> None:
        """Change the rate; what is missing from a full bucket stays missing."""
        owed = self.owed_ns(now_ns) * self.rate
        self.full_ns = now_ns + -(-owed // rate) if rate else 0
        self.rate = rate
        self.burst_ns = burst_ns

    def owed_ns(self, now_ns: int) -> int:
        """How long it takes until it is full."""
        return self.full_ns - now_ns if self.full_ns > now_ns else 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        """The least time until ``amount`` more can be held; a full bucket admits any amount."""
        if not self.rate:
            return 0
        needed_ns = min(self._lasts_ns(amount), self.burst_ns)
        wait_ns = self.owed_ns(now_ns) + self._lasts_ns(self.held) + needed_ns - self.burst_ns
        return max(0, wait_ns)

    def take(self, amount: int, now_ns: int) -> None:
        """Take an amount, even if it is more than there is."""
        self.used += amount
        if self.rate:
            self.full_ns = now_ns + self.owed_ns(now_ns) + self._lasts_ns(amount)

    def amounts(self, asked: int, unit: int, now_ns: int) -> list[str]:
        """Its rate and size, what is in use (held, or missing from a full bucket), and what is asked for."""
        size = self.burst_ns * self.rate // NS_PER_S
        in_use = self.owed_ns(now_ns) * self.rate // NS_PER_S + self.held
        return [f"{one / unit:.4g}" for one in (self.rate, size, in_use, asked)]

    def _lasts_ns(self, amount: int) -> int:
        """How long it takes to fill an amount."""
        return -(-amount * NS_PER_S // self.rate)


class Account(Record):
    """One tenant's buckets: ns of devices, and bytes of weights loaded."""

    __slots__ = ("device", "loaded", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.device = Bucket()
        self.loaded = Bucket()

    def set(self, quota: Quota, now_ns: int) -> None:
        """Change the quota."""
        self.device.set(quota.device_ns_per_s or 0, quota.burst_ns, now_ns)
        self.loaded.set(quota.loaded_bytes_per_s or 0, quota.burst_ns, now_ns)


class Claim(Record):
    """A tenant's requests that wait for weights which were on no device when the first of them arrived."""

    __slots__ = ("account", "count", "model", "size")

    def __init__(self, account: Account, model: ServedModel) -> None:
        self.account = account
        self.model = model
        self.size = model.model.weights.size
        self.count = 0
        """How many of these requests are not over."""


class Charge(Record):
    """What one request reserves of its tenant's buckets."""

    __slots__ = ("account", "claim", "held_ns")

    def __init__(self, account: Account, held_ns: int, claim: Claim | None) -> None:
        self.account = account
        self.held_ns = held_ns
        self.claim = claim

    def hold(self, held_ns: int) -> None:
        """Replace the amount of device time that is held."""
        self.account.device.held += held_ns - self.held_ns
        self.held_ns = held_ns


class Tenants(Record):
    """Accounts of all tenants with quotas, and the charges of their requests."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        """Of all and only tenants that have a quota, by name."""
        self.charges: dict[str, Charge] = {}
        """By request id: of requests that were admitted under a quota and are not ANSWERED."""
        self.claims: dict[ServedModel, list[Claim]] = {}
        """By model: all and only claims of requests that wait for a LOAD which is not sent."""
        self.loads: dict[int, tuple[list[Account], int]] = {}
        """By id of a LOAD in flight: the accounts that pay for it, and the bytes for each."""

    def set_quotas(self, event: QuotasSet, now_ns: int) -> None:
        """Replace all quotas; a tenant that keeps one keeps its account."""
        before = dict(self.accounts)
        self.accounts.clear()
        for quota in event.quotas:
            account = before.get(quota.tenant) or Account(quota.tenant)
            account.set(quota, now_ns)
            self.accounts[quota.tenant] = account

    def shortage(
        self, account: Account, model: ServedModel, cost_ns: int, now_ns: int
    ) -> tuple[int, str] | None:
        """How long a request of that expected cost has to wait for its quota, and why; None: not at all."""
        device, loaded = account.device, account.loaded
        wait_ns = device.wait_ns(cost_ns, now_ns)
        if wait_ns:
            found = device.amounts(cost_ns, NS_PER_MS, now_ns)
            return wait_ns, _exceeded(account, "device_ms_per_s", "ms of device time", found)
        if not model.residencies and self._claim(account, model) is None:
            size = model.model.weights.size
            wait_ns = loaded.wait_ns(size, now_ns)
            if wait_ns:
                found = loaded.amounts(size, MIB, now_ns)
                return wait_ns, _exceeded(account, "loaded_bytes_per_s", "MiB of weights", found)
        return None

    def admit(self, request: Request, account: Account, model: ServedModel, cost_ns: int) -> None:
        """Hold a request's expected cost; call it before the request is queued."""
        claim: Claim | None = None
        if not model.residencies:
            claim = self._claim(account, model)
            if claim is None:
                claim = Claim(account, model)
                self.claims.setdefault(model, []).append(claim)
                account.loaded.held += claim.size
            claim.count += 1
        charge = self.charges[request.request_id] = Charge(account, 0, claim)
        charge.hold(cost_ns)

    def sent(self, waiters: list[Waiter], expected_ns: int) -> None:
        """Requests were sent as one batch: each holds its share of the batch's expected duration."""
        share_ns = -(-expected_ns // len(waiters))
        for waiter in waiters:
            charge = self.charges.get(waiter.request.request_id)
            if charge is not None:
                charge.hold(share_ns)

    def measured(self, waiters: list[Waiter], lane_ns: int, now_ns: int) -> None:
        """A batch ended: take each request's share of its duration."""
        share_ns = -(-lane_ns // len(waiters))
        for waiter in waiters:
            charge = self.charges.get(waiter.request.request_id)
            if charge is not None:
                charge.hold(0)
                charge.account.device.take(share_ns, now_ns)

    def ended(self, request_id: str) -> None:
        """A request is over: free what it still holds."""
        charge = self.charges.pop(request_id, None)
        if charge is None:
            return
        charge.hold(0)
        claim = charge.claim
        if claim is not None:
            claim.count -= 1
            claims = self.claims.get(claim.model)
            if not claim.count and claims is not None and claim in claims:
                claims.remove(claim)
                if not claims:
                    del self.claims[claim.model]
                claim.account.loaded.held -= claim.size

    def returned(self, waiter: Waiter, cost_ns: int) -> None:
        """A request waits again: it holds the expected cost of a new one."""
        charge = self.charges.get(waiter.request.request_id)
        if charge is not None:
            charge.hold(cost_ns)

    def loading(self, model: ServedModel, action_id: int) -> None:
        """A LOAD is sent: hold its bytes in the accounts that pay for it."""
        accounts = [claim.account for claim in self.claims.get(model, ())]
        if accounts:
            for claim in self.claims.pop(model):
                claim.account.loaded.held -= claim.size
        else:
            first: Waiter | None = None
            for queue in model.queues.values():
                if queue.waiters and (first is None or queue.dues[0] < first.due_ns):
                    first = queue.waiters[0]
            charge = None if first is None else self.charges.get(first.request.request_id)
            if charge is None:
                return
            accounts = [charge.account]
        share = -(-model.model.weights.size // len(accounts))
        for account in accounts:
            account.loaded.held += share
        self.loads[action_id] = (accounts, share)

    def loaded(self, action_id: int, now_ns: int, *, good: bool) -> None:
        """A LOAD ended or was lost: free its bytes, and take them if it was good."""
        found = self.loads.pop(action_id, None)
        if found is None:
            return
        accounts, share = found
        for account in accounts:
            account.loaded.held -= share
            if good:
                account.loaded.take(share, now_ns)

    def _claim(self, account: Account, model: ServedModel) -> Claim | None:
        for claim in self.claims.get(model, ()):
            if claim.account is account:
                return claim
        return None

    def snapshot(self) -> dict[str, dict[str, int]]:
        """All quotas and what was taken, by tenant, as plain data."""
        return {
            account.tenant: {
                "device_ns": account.device.used, "device_ns_per_s": account.device.rate,
                "loaded_bytes": account.loaded.used, "loaded_bytes_per_s": account.loaded.rate,
                "burst_ns": account.device.burst_ns,
            }
            for account in self.accounts.values()
        }  # fmt: skip

    def check(self, open_ids: set[str]) -> None:
        """Assert the invariants; ``open_ids`` are the requests that are not ANSWERED."""
        assert self.charges.keys() <= open_ids
        held: dict[int, list[int]] = {}
        for charge in self.charges.values():
            assert charge.held_ns >= 0
            held.setdefault(id(charge.account), [0, 0])[0] += charge.held_ns
        for model, claims in self.claims.items():
            assert claims, f"{model.key}: an empty list of claims"
            for claim in claims:
                assert claim.count > 0
                held.setdefault(id(claim.account), [0, 0])[1] += claim.size
        for accounts, share in self.loads.values():
            for account in accounts:
                held.setdefault(id(account), [0, 0])[1] += share
        for account in self.accounts.values():
            found = held.get(id(account), [0, 0])
            assert found == [account.device.held, account.loaded.held], f"{account.tenant}: {found}"


def _exceeded(account: Account, quota: str, unit: str, amounts: list[str]) -> str:
    """The message for a quota that is used up."""
    rate, at_once, in_use, asked = amounts
    return (
        f"{quota} of tenant {account.tenant}: expected at most {rate} {unit} a second and {at_once} at once, "
        f"found {in_use} in use and {asked} more asked for; ask for less, or have the quota raised"
    )
