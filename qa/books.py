"""What a server says of itself once nobody asks anything: whether its books are equal, what it has logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from harness.serving import Metrics, read_metrics, total

LOOKS: Final = 200
"""Pages that are read at most until each gateway has shown its own."""
NOT_PASSED_ON: Final = "received at gateways and not passed on"
SILENT: Final = "gateways that do not answer"


def pages(http_url: str, gateways: int) -> dict[str, Metrics]:
    """The metrics of each of so many gateways, by its name, that read last as the last. OSError if none."""
    found: dict[str, Metrics] = {}
    for _ in range(LOOKS):
        page = read_metrics(f"{http_url}/metrics", 5)  # of whichever gateway is reached
        labels = (dict(labels) for name, labels in page if name == "clockwork_gateway_open")
        name = next(labels, {"gateway": "?"})["gateway"]
        found.pop(name, None)
        found[name] = page
        if len(found) >= gateways:
            break
    return found


def books(http_url: str, gateways: int) -> dict[str, int]:
    """Differences, and what is open or held: all of it must be 0."""
    try:
        by_gateway = pages(http_url, gateways)
    except OSError:
        return {SILENT: gateways}
    last = list(by_gateway.values())[-1]

    def at_gateways(name: str, **labels: str) -> float:
        return sum(total(page, name, **labels) for page in by_gateway.values())

    received = total(last, "clockwork_requests_received_total")
    ended_early = at_gateways("clockwork_gateway_requests_total")
    found = {
        "received without an outcome": received - total(last, "clockwork_requests_total"),
        "open": total(last, "clockwork_requests_open"),
        "answers unmatched": total(last, "clockwork_answers_unmatched_total"),
        "open at gateways": at_gateways("clockwork_gateway_open"),
        "tensor memory taken": at_gateways("clockwork_gateway_region_bytes", state="taken"),
        NOT_PASSED_ON: at_gateways("clockwork_gateway_received_total") - ended_early - received,
        SILENT: gateways - len(by_gateway),
    }
    return {what: int(count) for what, count in found.items()}


def gateways_of(names: Sequence[str]) -> int:
    """How many gateways there are among processes."""
    return sum(name.startswith("gateway") for name in names)


def ports(facts: Mapping[str, str]) -> tuple[int, int, int]:
    """Of HTTP, gRPC and metrics, from what a server says when it is ready."""
    http, grpc, metrics = (
        int(facts[name].removesuffix("/metrics").rpartition(":")[2]) for name in ("http", "grpc", "metrics")
    )
    return http, grpc, metrics


def tracebacks(log: Sequence[str]) -> list[str]:
    """What was logged with a traceback: the line before each, and the last of it."""
    starts = [at for at, line in enumerate(log) if line.startswith("Traceback")]
    found = []
    for at in starts:
        ends = (line for line in log[at + 1 :] if not line.startswith(" "))
        found.append(f"{log[at - 1]}: {next(ends, '')}" if at else log[at])
    return found
