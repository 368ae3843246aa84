"""Tenants with quotas, and a controller that knows them."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Outcome, Quota, QuotasSet, Reason
from clockwork_serve.units import MIB, ms
from tests.controller.honest import World, device, model

BOTH = (Outcome.REJECTED, Reason.TENANT_QUOTA)


def quota(tenant: str, device_ms: float = 0, loaded_mib: float = 0, burst_ms: float = 1000) -> Quota:
    """What a tenant may use a second."""
    return Quota(
        tenant=tenant, burst_ns=ms(burst_ms), device_ns_per_s=ms(device_ms) or None,
        loaded_bytes_per_s=round(loaded_mib * MIB) or None,
    )  # fmt: skip


def world(*quotas: Quota, names: str = "ab", warm: bool = True, pages: int = 16) -> World:
    """Models of 10 ms and 4 MiB on one device, and tenants."""
    made = World(ControllerConfig())
    made.serve(*[model(name) for name in names])
    made.join(device(pages=pages))
    if warm:
        for name in names:
            made.request(name, slo_ms=500)
        made.run()
    made.tell(QuotasSet(quotas=quotas))
    return made


def why(made: World, request_id: str) -> tuple[Outcome, Reason]:
    answer = made.answers[request_id]
    return answer.outcome, answer.reason


def accounts(made: World, tenant: str = "t") -> dict[str, int]:
    return made.controller.accounts()[tenant]
