"""What must be equal in /metrics once nobody asks anything."""

from __future__ import annotations

from typing import Any

from harness.server import Server
from harness.serving import Metrics, read_metrics, total


def books(server: Server, gateways: int, same: bool) -> dict[str, int]:  # noqa: FBT001
    """Differences that must be 0. ``same``: who counts was not replaced, so all of them agree."""
    pages: dict[str, Metrics] = {}
    for _ in range(60):
        try:
            page = read_metrics(f"{server.http_url}/metrics", 5)  # of whichever gateway is reached
        except OSError:
            return {"metrics cannot be read": 1}
        pages[_gateway(page)] = page
        if len(pages) >= gateways:
            break
    last = list(pages.values())[-1]
    received = total(last, "clockwork_requests_received_total")
    found: dict[str, Any] = {
        "received without an outcome": received - total(last, "clockwork_requests_total"),
        "open": total(last, "clockwork_requests_open"),
        "answers unmatched": total(last, "clockwork_answers_unmatched_total"),
        "open at gateways": sum(total(page, "clockwork_gateway_open") for page in pages.values()),
        "tensor memory taken": sum(
            total(page, "clockwork_gateway_region_bytes", state="taken") for page in pages.values()
        ),
    }
    if same and len(pages) == gateways:
        came = sum(total(page, "clockwork_gateway_received_total") for page in pages.values())
        own = sum(total(page, "clockwork_gateway_requests_total") for page in pages.values())
        found["received at gateways and not passed on"] = came - own - received
    return {what: int(count) for what, count in found.items()}


def _gateway(page: Metrics) -> str:
    return next((dict(labels)["gateway"] for name, labels in page if name == "clockwork_gateway_open"), "?")
