"""Counters in Prometheus' text format; it counts nothing, and never runs in the controller's process.

The text is written here and not by ``prometheus_client``, which takes five times as long: a scrape of a
thousand models would hold a gateway's loop for 20 ms. Tests read the text with that library's parser.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from clockwork_serve.telemetry.counters import BOUNDS_NS, Counters, GatewayCounters, Histogram
from clockwork_serve.units import NS_PER_S

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SHOWN: Final = tuple(
    (index, f"{bound / NS_PER_S:.9f}".rstrip("0").rstrip("."))
    for index, bound in enumerate(BOUNDS_NS)
    if str(bound).rstrip("0") in {"1", "2", "5"}
)
"""The 1-2-5 bounds among the finer ones, as (bucket, label)."""

Samples = Iterable[tuple[str, float | int]]
"""(labels as they stand inside braces, value)."""


def render(counters: Counters, gateway: GatewayCounters | None = None) -> bytes:
    """All metrics as text; ``gateway`` adds what the answering gateway counted itself."""
    lines: list[str] = []
    for part in (_requests, _histograms, _tenants, _models, _devices):
        lines.extend(part(counters))
    if gateway is not None:
        lines.extend(_gateway(gateway))
    lines.append("")
    return "\n".join(lines).encode()


def _requests(counters: Counters) -> Iterator[str]:
    yield from _family(
        "clockwork_requests_total", "counter", "Requests by how they ended, and why.",
        _ends(counters.outcomes),
    )  # fmt: skip
    for name, kind, text, value in (
        ("requests_received_total", "counter", "Requests that reached the controller.", counters.received),
        ("requests_late_total", "counter", "Executed, but finished after the deadline.", counters.late),
        ("requests_open", "gauge", "Requests without an answer.", counters.open),
        ("requests_queued", "gauge", "Open requests in no INFER.", counters.queued),
        ("answers_unmatched_total", "counter", "Answers to no open request: 0.", counters.unmatched),
        ("workers_lost_total", "counter", "Workers that died or left.", counters.workers_lost),
        ("workers_hung_total", "counter", "Workers that did not answer in time.", counters.workers_hung),
        ("workers_ended_total", "counter", "Workers ended because they hung.", counters.workers_ended),
        ("quarantines_total", "counter", "Models that came into quarantine.", counters.quarantines),
        (
            "cache_artefacts_remade_total",
            "counter",
            "Damaged artefacts made again from the repository.",
            counters.artefacts_remade,
        ),
        (
            "cache_models_lost_total",
            "counter",
            "Models that could not be made again from the repository.",
            counters.models_lost,
        ),
        ("gateways_lost_total", "counter", "Gateways that died or left.", counters.gateways_lost),
        ("ready", "gauge", "Whether the server can serve.", int(counters.ready)),
        ("keeper_up", "gauge", "Whether the keeper answers.", int(counters.keeper_up)),
    ):
        yield from _family(f"clockwork_{name}", kind, text, [("", value)])
    yield from _family(
        "clockwork_processes_ended_total", "counter", "Processes ended because they did not answer.",
        [(f'process="{name}"', count) for name, count in sorted(counters.processes_ended.items())],
    )  # fmt: skip
    yield from _family(
        "clockwork_cache_damaged_total", "counter", "Files of the cache found damaged, and set aside.",
        [(f'what="{what}"', count) for what, count in sorted(counters.damaged_files.items())],
    )  # fmt: skip


def _histograms(counters: Counters) -> Iterator[str]:
    yield from _histogram(
        "clockwork_request_seconds", "Arrival to answer, by outcome.",
        {f'outcome="{outcome}"': histogram for outcome, histogram in sorted(counters.latency.items())},
    )  # fmt: skip
    yield from _histogram(
        "clockwork_queue_seconds", "Arrival to start of good answers.", {"": counters.queue}
    )
    yield from _histogram(
        "clockwork_execution_seconds", "Time on the lane of good answers.", {"": counters.execution}
    )
    yield from _histogram("clockwork_load_seconds", "Time that LOADs took.", {"": counters.load})
    yield from _histogram(
        "clockwork_wakeup_lateness_seconds", "How much later than it had asked the controller decided.",
        {"": counters.wakeup},
    )  # fmt: skip
    yield from _histogram(
        "clockwork_prediction_error_seconds",
        "Measured against expected lane time: under, it took longer; over, it did not.",
        {
            f'action="{kind}",direction="{direction}"': histogram
            for kind, errors in sorted(counters.prediction.items())
            for direction, histogram in (("under", errors.under), ("over", errors.over))
        },
    )
    yield from _family(
        "clockwork_executions_total", "counter", "Batches that ran well, by batch size.",
        ((f'batch="{batch}"', count) for batch, count in sorted(counters.batches.items())),
    )  # fmt: skip


def _tenants(counters: Counters) -> Iterator[str]:
    """Those that have a quota: a file names them, so clients cannot make more."""
    tenants = [(f'tenant="{_escape(name)}"', tenant) for name, tenant in sorted(counters.tenants.items())]
    if not tenants:
        return
    yield from _family(
        "clockwork_tenant_requests_total", "counter", "Requests of a tenant by how they ended, and why.",
        ((f"{labels},{end}", count) for labels, tenant in tenants for end, count in _ends(tenant.outcomes)),
    )  # fmt: skip
    for name, kind, text, values in (
        ("late_total", "counter", "Its requests that finished after their deadline.",
         [tenant.late for _, tenant in tenants]),
        ("device_seconds_total", "counter", "Device time that it was charged.",
         [tenant.device_ns / NS_PER_S for _, tenant in tenants]),
        ("device_quota", "gauge", "Seconds of device time a second that it may use; 0: no limit.",
         [tenant.device_ns_per_s / NS_PER_S for _, tenant in tenants]),
        ("loaded_bytes_total", "counter", "Bytes of weights loaded that it was charged.",
         [tenant.loaded_bytes for _, tenant in tenants]),
        ("loaded_bytes_quota", "gauge", "Bytes a second that may be loaded for it; 0: no limit.",
         [tenant.loaded_bytes_per_s for _, tenant in tenants]),
    ):  # fmt: skip
        samples = [(labels, value) for (labels, _), value in zip(tenants, values, strict=True)]
        yield from _family(f"clockwork_tenant_{name}", kind, text, samples)


def _models(counters: Counters) -> Iterator[str]:
    """Models appear with their first request: what was never asked for costs no line."""
    models = [
        (f'model="{_escape(model.name)}",version="{_escape(model.version)}"', model)
        for model in counters.models.values()
    ]
    used = [(labels, model) for labels, model in models if model.received]
    yield from _family(
        "clockwork_model_requests_total", "counter", "Requests of a model by how they ended, and why.",
        ((f"{labels},{end}", count) for labels, model in used for end, count in _ends(model.outcomes)),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_late_total", "counter", "Requests of a model that finished after their deadline.",
        ((labels, model.late) for labels, model in used if model.late),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_queued", "gauge", "Open requests of a model in no INFER.",
        ((labels, model.queued) for labels, model in used),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_queue_seconds_total", "counter", "Arrival to start, summed over good answers.",
        ((labels, model.queue.ns / NS_PER_S) for labels, model in used),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_run_seconds_total", "counter", "Run time of a model's batches.",
        (
            (labels, sum(batch.run_ns for batch in model.batches.values()) / NS_PER_S)
            for labels, model in used
        ),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_executions_total", "counter", "Batches of a model that ran well.",
        ((labels, sum(batch.executions for batch in model.batches.values())) for labels, model in used),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_cold_starts_total", "counter", "Good answers that waited for a LOAD.",
        ((labels, model.cold_starts) for labels, model in used),
    )  # fmt: skip
    yield from _family(
        "clockwork_model_quarantined", "gauge", "Models that take devices down, and are not served.",
        ((labels, 1) for labels, model in models if model.quarantined),
    )  # fmt: skip
    yield from _family("clockwork_models", "gauge", "Models that are served.", [("", len(counters.models))])
    yield from _family(
        "clockwork_models_resident", "gauge", "Models whose weights are on a device.",
        [("", sum(1 for model in counters.models.values() if model.resident))],
    )  # fmt: skip


def _devices(counters: Counters) -> Iterator[str]:
    devices = [(f'device="{_escape(name)}"', device) for name, device in sorted(counters.devices.items())]
    yield from _family(
        "clockwork_device_up", "gauge", "Whether a device's worker is there.",
        ((labels, int(device.up)) for labels, device in devices),
    )  # fmt: skip
    yield from _family(
        "clockwork_actions_total", "counter", "Results of actions, by kind and status.",
        (
            (f'{labels},action="{kind}",status="{status}"', count)
            for labels, device in devices
            for key, count in sorted(device.actions.items())
            for kind, _, status in [key.partition(":")]
        ),
    )  # fmt: skip
    yield from _family(
        "clockwork_actions_lost_total", "counter", "Actions that ended with their worker.",
        ((labels, device.lost_actions) for labels, device in devices),
    )  # fmt: skip
    yield from _family(
        "clockwork_lane_busy_seconds_total", "counter", "Time that a lane was taken.",
        (
            (f'{labels},lane="{lane}"', busy_ns / NS_PER_S)
            for labels, device in devices
            for lane, busy_ns in (("exec", device.exec_busy_ns), ("load", device.load_busy_ns))
        ),
    )  # fmt: skip
    yield from _family(
        "clockwork_device_number", "gauge", "What a device counts of itself.",
        (
            (f'{labels},number="{_escape(name)}"', value)
            for labels, device in devices
            for name, value in sorted(device.numbers.items())
        ),
    )  # fmt: skip
    yield from _family(
        "clockwork_device_pages", "gauge", "Pages of weights memory, all and claimed.",
        (
            (f'{labels},state="{state}"', pages)
            for labels, device in devices
            for state, pages in (("all", device.pages), ("claimed", device.pages_used))
        ),
    )  # fmt: skip


def _gateway(gateway: GatewayCounters) -> Iterator[str]:
    name = f'gateway="{_escape(gateway.gateway)}"'
    yield from _family(
        "clockwork_gateway_received_total", "counter", "Inference requests that came to this gateway.",
        [(name, gateway.received)],
    )  # fmt: skip
    yield from _family(
        "clockwork_gateway_requests_total", "counter", "Requests that it answered by itself, and why.",
        ((f"{name},{end}", count) for end, count in _ends(gateway.outcomes)),
    )  # fmt: skip
    yield from _family(
        "clockwork_gateway_open", "gauge", "Requests without a response.", [(name, gateway.open)]
    )
    yield from _family(
        "clockwork_gateway_connections", "gauge", "Open client connections.", [(name, gateway.connections)]
    )
    yield from _family(
        "clockwork_gateway_region_bytes", "gauge", "Tensor memory, all and taken.",
        [
            (f'{name},state="all"', gateway.region_bytes),
            (f'{name},state="taken"', gateway.region_used_bytes),
        ],
    )  # fmt: skip
    yield from _family(
        "clockwork_gateway_input_bytes_total", "counter", "Bytes of inputs, received in place or copied.",
        [
            (f'{name},how="in_place"', gateway.received_in_place_bytes),
            (f'{name},how="copied"', gateway.copied_bytes),
        ],
    )  # fmt: skip
    yield from _family(
        "clockwork_gateway_unheard_answers_total", "counter", "Good answers for whom nobody waited any more.",
        ((f'{name},why="{why}"', count) for why, count in sorted(gateway.unheard.items())),
    )  # fmt: skip


def _ends(outcomes: Mapping[str, int]) -> Samples:
    for key, count in sorted(outcomes.items()):
        outcome, _, reason = key.partition(":")
        yield f'outcome="{outcome}",reason="{reason}"', count


def _family(name: str, kind: str, text: str, samples: Samples) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def _histogram(name: str, text: str, histograms: Mapping[str, Histogram]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} histogram"
    for labels, histogram in histograms.items():
        comma = "," if labels else ""
        below, start = 0, 0
        for index, label in _SHOWN:
            below += sum(histogram.counts[start : index + 1])
            start = index + 1
            yield f'{name}_bucket{{{labels}{comma}le="{label}"}} {below}'
        yield f'{name}_bucket{{{labels}{comma}le="+Inf"}} {histogram.count}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {histogram.sum_ns / NS_PER_S}"
        yield f"{name}_count{braces} {histogram.count}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
