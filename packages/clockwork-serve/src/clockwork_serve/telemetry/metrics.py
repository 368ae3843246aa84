"""Counters in Prometheus' text format; it counts nothing, and never runs in the controller's process.

The text is written here and not by ``prometheus_client``, for a scrape holds the loop of the gateway that
answers it. CPU time of a scrape of 1,000 models on a core of an AMD EPYC, Python 3.11, median of 7 rounds in
turn: with 14 outcomes and reasons a model (20,868 samples) 10 to 12 ms here, 101 to 104 ms by a collector and
``generate_latest`` of prometheus_client 0.26; with 6 (12,700 samples) 6, and 54 to 56 ms. Tests read the text
with that library's parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from clockwork_serve.telemetry.counters import BOUNDS_NS, Counters, GatewayCounters, Histogram
from clockwork_serve.units import NS_PER_S, NS_PER_US

PREFIX: Final = "clockwork_"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_SHOWN: Final = tuple(
    (index, repr(bound / NS_PER_S))  # as Prometheus' own libraries write a number: "1e-05", "0.001", "1.0"
    for index, bound in enumerate(BOUNDS_NS)
    if str(bound).rstrip("0") in {"1", "2", "5"}
)
"""The 1-2-5 bounds among the finer ones, as (bucket, label)."""

Samples = Iterable[tuple[str, float | int]]  # (labels as they stand inside braces, value)
Family = tuple[str, str, str, Samples | Mapping[str, Histogram]]
"""(name without its prefix, type, help, samples); those of a histogram are histograms by their labels."""

_TRITON_REASONS: Final = {
    "rejected": "REJECTED",
    "expired": "REJECTED",  # so Triton calls what waited for too long
    "cancelled": "CANCELED",
    "failed": "BACKEND",
    "invalid": "OTHER",
}
"""Triton's reason of a failure, by our outcome."""


def render(
    counters: Counters, gateway: GatewayCounters | None = None, *, triton: bool = False,
    openmetrics: bool = False,
) -> bytes:  # fmt: skip
    """All metrics as text; ``gateway`` adds what the answering gateway counted itself.

    ``triton`` adds what Triton's metrics of requests say, under its names. ``openmetrics`` writes
    OpenMetrics, with the exemplars that there are.
    """
    lines: list[str] = []
    exemplars = _exemplars(counters) if openmetrics else {}
    write = partial(_lines, openmetrics=openmetrics, exemplars=exemplars)
    # A gateway that no worker reaches is not ready, though the controller is.
    lines.extend(write(_requests(counters, ready=counters.ready and (gateway is None or gateway.ready))))
    for part in (_times, _tenants, _models, _devices, _wanted):
        lines.extend(write(part(counters)))
    if gateway is not None:
        lines.extend(write(_gateway(gateway)))
    if triton:
        invalid = {} if gateway is None else gateway.invalid
        lines.extend(write(_triton(counters, invalid), "nv_inference_"))
    lines.append("# EOF\n" if openmetrics else "")
    return "\n".join(lines).encode()


def render_standby(*, openmetrics: bool = False) -> bytes:
    """The metrics of a controller that stands by for one on another host: it has no others."""
    text = "Whether this controller stands by, and another one leads."
    families: list[Family] = [("standing_by", "gauge", text, [("", 1)])]
    lines = list(_lines(families, openmetrics=openmetrics, exemplars={}))
    lines.append("# EOF\n" if openmetrics else "")
    return "\n".join(lines).encode()


def _requests(counters: Counters, *, ready: bool) -> Iterator[Family]:
    yield "requests_total", "counter", "Requests by how they ended, and why.", _ends(counters.outcomes)
    for name, kind, text, value in (
        ("requests_received_total", "counter", "Requests that reached the controller.", counters.received),
        ("requests_late_total", "counter", "Sent to a device, and not answered by the deadline.",
         counters.late),
        ("requests_open", "gauge", "Requests without an answer.", counters.open),
        ("requests_queued", "gauge", "Open requests in no INFER.", counters.queued),
        ("answers_unmatched_total", "counter", "Answers to no open request: 0.", counters.unmatched),
        ("workers_lost_total", "counter", "Workers that died or left.", counters.workers_lost),
        ("workers_hung_total", "counter", "Workers that did not answer in time.", counters.workers_hung),
        ("workers_ended_total", "counter", "Workers ended because they hung.", counters.workers_ended),
        ("quarantines_total", "counter", "Models that came into quarantine.", counters.quarantines),
        ("cache_artefacts_remade_total", "counter", "Damaged artefacts made again from the repository.",
         counters.artefacts_remade),
        ("cache_models_lost_total", "counter", "Models that could not be made again from the repository.",
         counters.models_lost),
        ("gateways_lost_total", "counter", "Gateways that died or left.", counters.gateways_lost),
        ("ready", "gauge", "Whether the server can serve, and all that it started with is prepared.",
         int(ready and not counters.models_waiting)),
        ("models_waiting", "gauge", "Models that are still to be prepared since the start.",
         counters.models_waiting),
        ("keeper_up", "gauge", "Whether the supervisor answers.", int(counters.keeper_up)),
        ("controller_epoch", "gauge", "How many controllers have led so far.", counters.epoch),
        ("controllers_standing_by", "gauge", "Controllers that would take over at once.", counters.standbys),
    ):  # fmt: skip
        yield name, kind, text, [("", value)]
    yield (
        "processes_ended_total", "counter", "Processes ended because they did not answer.",
        [(f'process="{name}"', count) for name, count in sorted(counters.processes_ended.items())],
    )  # fmt: skip
    yield (
        "cache_damaged_total", "counter", "Files of the cache found damaged, and set aside.",
        [(f'what="{what}"', count) for what, count in sorted(counters.damaged_files.items())],
    )  # fmt: skip


def _wanted(counters: Counters) -> Iterator[Family]:
    said = counters.wanted
    if said is not None:
        yield "devices_wanted", "gauge", "Devices that the load wants.", [("", said.wanted)]
        labels = f'cause="{_escape(said.cause)}",model="{_escape(said.model)}"'
        text = "Why so many are wanted, and whose requests would miss with fewer."
        yield "devices_wanted_info", "gauge", text, [(labels, 1)]


def _times(counters: Counters) -> Iterator[Family]:
    ends = {f'outcome="{outcome}"': times for outcome, times in sorted(counters.latency.items())}
    errors = {
        f'action="{kind}",direction="{direction}"': times
        for kind, found in sorted(counters.prediction.items())
        for direction, times in (("under", found.under), ("over", found.over))
    }
    for name, text, histograms in (
        ("request_seconds", "Arrival to answer, by outcome.", ends),
        ("queue_seconds", "Arrival to start of good answers.", {"": counters.queue}),
        ("execution_seconds", "Time on the lane of good answers.", {"": counters.execution}),
        ("load_seconds", "Time that LOADs took.", {"": counters.load}),
        ("wakeup_lateness_seconds", "How much later than it had asked the controller decided.",
         {"": counters.wakeup}),
        ("prediction_error_seconds",
         "Measured against expected lane time: under, it took longer; over, it did not.", errors),
    ):  # fmt: skip
        yield name, "histogram", text, histograms
    yield (
        "executions_total", "counter", "Batches that ran well, by batch size.",
        ((f'batch="{batch}"', count) for batch, count in sorted(counters.batches.items())),
    )  # fmt: skip


def _tenants(counters: Counters) -> Iterator[Family]:
    """Those that have a quota: a file names them, so clients cannot make more."""
    tenants = [(f'tenant="{_escape(name)}"', tenant) for name, tenant in sorted(counters.tenants.items())]
    if not tenants:
        return
    yield (
        "tenant_requests_total", "counter", "Requests of a tenant by how they ended, and why.",
        ((f"{labels},{end}", count) for labels, tenant in tenants for end, count in _ends(tenant.outcomes)),
    )  # fmt: skip
    yield from _each(
        tenants,
        ("tenant_late_total", "counter", "Its requests that finished after their deadline.",
         lambda tenant: tenant.late),
        ("tenant_device_seconds_total", "counter", "Device time that it was charged.",
         lambda tenant: tenant.device_ns / NS_PER_S),
        ("tenant_device_quota", "gauge", "Seconds of device time a second that it may use; 0: no limit.",
         lambda tenant: tenant.device_ns_per_s / NS_PER_S),
        ("tenant_loaded_bytes_total", "counter", "Bytes of weights loaded that it was charged.",
         lambda tenant: tenant.loaded_bytes),
        ("tenant_loaded_bytes_quota", "gauge", "Bytes a second that may be loaded for it; 0: no limit.",
         lambda tenant: tenant.loaded_bytes_per_s),
    )  # fmt: skip


def _models(counters: Counters) -> Iterator[Family]:
    """Models appear with their first request: what was never asked for costs no line."""
    models = [
        (f'model="{_escape(model.name)}",version="{_escape(model.version)}"', model)
        for model in counters.models.values()
    ]
    used = [(labels, model) for labels, model in models if model.received]
    yield (
        "model_requests_total", "counter", "Requests of a model by how they ended, and why.",
        ((f"{labels},{end}", count) for labels, model in used for end, count in _ends(model.outcomes)),
    )  # fmt: skip
    yield (
        "model_late_total", "counter", "Requests of a model that finished after their deadline.",
        ((labels, model.late) for labels, model in used if model.late),
    )  # fmt: skip
    yield from _each(
        used,
        ("model_queued", "gauge", "Open requests of a model in no INFER.", lambda model: model.queued),
        ("model_queue_seconds_total", "counter", "Arrival to start, summed over good answers.",
         lambda model: model.queue.ns / NS_PER_S),
        ("model_run_seconds_total", "counter", "Run time of a model's batches.",
         lambda model: sum(each.run_ns for each in model.batches.values()) / NS_PER_S),
        ("model_executions_total", "counter", "Batches of a model that ran well.",
         lambda model: sum(each.executions for each in model.batches.values())),
        ("model_overruns_total", "counter", "Batches of a model that took longer than expected.",
         lambda model: model.overruns),
        ("model_cold_starts_total", "counter", "Good answers that waited for a LOAD.",
         lambda model: model.cold_starts),
    )  # fmt: skip
    yield (
        "model_promises_total", "counter", "Requests of a model that were promised an answer in time.",
        ((labels, model.promises) for labels, model in used if model.promises),
    )  # fmt: skip
    yield (
        "model_promises_broken_total", "counter", "Promises that were not kept, by cause.",
        (
            (f'{labels},cause="{cause}"', count)
            for labels, model in used
            for cause, count in sorted(model.broken.items())
        ),
    )  # fmt: skip
    yield (
        "model_quarantined", "gauge", "Models that take devices down, and are not served.",
        ((labels, 1) for labels, model in models if model.quarantined),
    )  # fmt: skip
    yield "models", "gauge", "Models that are served.", [("", len(models))]
    resident = sum(1 for _, model in models if model.resident)
    yield "models_resident", "gauge", "Models whose weights are on a device.", [("", resident)]


def _devices(counters: Counters) -> Iterator[Family]:
    devices = [(f'device="{_escape(name)}"', device) for name, device in sorted(counters.devices.items())]
    yield from _each(
        devices,
        ("device_up", "gauge", "Whether a device's worker is there.", lambda device: int(device.up)),
        ("actions_lost_total", "counter", "Actions that ended with their worker.",
         lambda device: device.lost_actions),
    )  # fmt: skip
    yield (
        "actions_total", "counter", "Results of actions, by kind and status.",
        (
            (f'{labels},action="{kind}",status="{status}"', count)
            for labels, device in devices
            for key, count in sorted(device.actions.items())
            for kind, _, status in [key.partition(":")]
        ),
    )  # fmt: skip
    for name, kind, text, label, values in (
        ("lane_busy_seconds_total", "counter", "Time that a lane was taken.", "lane",
         lambda device: (("exec", device.exec_busy_ns / NS_PER_S), ("load", device.load_busy_ns / NS_PER_S))),
        ("device_number", "gauge", "What a device counts of itself.", "number",
         lambda device: sorted(device.numbers.items())),
        ("device_pages", "gauge", "Pages of weights memory, all and claimed.", "state",
         lambda device: (("all", device.pages), ("claimed", device.pages_used))),
        ("device_page_bytes", "gauge", "Bytes of such a page, with the kind of device.", "kind",
         lambda device: ((device.kind, device.page_bytes),)),
    ):  # fmt: skip
        yield (
            name,
            kind,
            text,
            [
                (f'{labels},{label}="{_escape(which)}"', value)
                for labels, device in devices
                for which, value in values(device)
            ],
        )


def _gateway(gateway: GatewayCounters) -> Iterator[Family]:
    name = f'gateway="{_escape(gateway.gateway)}"'
    yield (
        "gateway_requests_total", "counter", "Requests that it answered by itself, and why.",
        ((f"{name},{end}", count) for end, count in _ends(gateway.outcomes)),
    )  # fmt: skip
    for short, kind, text, value in (
        ("received_total", "counter", "Inference requests that came to this gateway.", gateway.received),
        ("open", "gauge", "Requests without a response.", gateway.open),
        ("connections", "gauge", "Open client connections.", gateway.connections),
        (
            "refused_by_summary_total",
            "counter",
            "Requests refused by the controller's summary.",
            gateway.refused_by_summary,
        ),
    ):
        yield f"gateway_{short}", kind, text, [(name, value)]
    memory = {"all": gateway.region_bytes, "taken": gateway.region_used_bytes}
    inputs = {"in_place": gateway.received_in_place_bytes, "copied": gateway.copied_bytes}
    for short, kind, text, label, values in (
        ("region_bytes", "gauge", "Tensor memory, all and taken.", "state", memory),
        ("input_bytes_total", "counter", "Bytes of inputs, received in place or copied.", "how", inputs),
        ("unheard_answers_total", "counter", "Good answers for whom nobody waited any more.", "why",
         dict(sorted(gateway.unheard.items()))),
    ):  # fmt: skip
        yield (
            f"gateway_{short}",
            kind,
            text,
            [(f'{name},{label}="{which}"', value) for which, value in values.items()],
        )


def _triton(counters: Counters, invalid: Mapping[str, int]) -> Iterator[Family]:
    """What ``counters.model_statistics`` has, under the names of Triton's metrics.

    Only the gateway knows of ``invalid`` requests. As everywhere, a model appears with its first request.
    """
    used = [
        (f'model="{_escape(model.name)}",version="{_escape(model.version)}"', key, model)
        for key, model in counters.models.items()
        if model.received or key in invalid
    ]
    yield (
        "request_failure", "counter", "Requests that were not answered well, by Triton's reasons.",
        (
            (f'{labels},reason="{reason}"', count)
            for labels, key, model in used
            for reason, count in _triton_failures(model.outcomes, invalid.get(key, 0)).items()
        ),
    )  # fmt: skip
    yield from _each(
        [(labels, model) for labels, _, model in used],
        ("request_success", "counter", "Requests that were answered well.",
         lambda model: model.success.count),
        ("count", "counter", "Rows that were executed: a request of n rows counts n times.",
         lambda model: model.rows),
        ("exec_count", "counter", "Batches that were executed.",
         lambda model: sum(each.executions for each in model.batches.values())),
        ("request_duration_us", "counter", "Arrival to answer, summed over good answers.",
         lambda model: model.success.ns // NS_PER_US),
        ("queue_duration_us", "counter", "Arrival to start, summed over good answers.",
         lambda model: model.queue.ns // NS_PER_US),
        ("compute_input_duration_us", "counter", "Time for inputs, summed over executed requests.",
         lambda model: model.compute_input.ns // NS_PER_US),
        ("compute_infer_duration_us", "counter", "Time that batches ran, summed over executed requests.",
         lambda model: model.compute_infer.ns // NS_PER_US),
        ("compute_output_duration_us", "counter", "Time for outputs, summed over executed requests.",
         lambda model: model.compute_output.ns // NS_PER_US),
        ("pending_request_count", "gauge", "Requests that wait for a device.", lambda model: model.queued),
    )  # fmt: skip


def _triton_failures(outcomes: Mapping[str, int], invalid: int) -> dict[str, int]:
    """Requests by Triton's reason of their failure; all its reasons are there, as in Triton."""
    found = dict.fromkeys(_TRITON_REASONS.values(), 0)
    found["OTHER"] += invalid
    for key, count in outcomes.items():
        if reason := _TRITON_REASONS.get(key.partition(":")[0]):
            found[reason] += count
    return found


def _each(
    rows: Sequence[tuple[str, Any]], *families: tuple[str, str, str, Callable[[Any], float]]
) -> Iterator[Family]:
    """Families that have one sample for each of some counters, which come with their labels."""
    for name, kind, text, value in families:
        yield name, kind, text, [(labels, value(counters)) for labels, counters in rows]


def _ends(outcomes: Mapping[str, int]) -> Samples:
    for key, count in sorted(outcomes.items()):
        outcome, _, reason = key.partition(":")
        yield f'outcome="{outcome}",reason="{reason}"', count


Exemplars = Mapping[str, Mapping[int, str]]
"""What stands behind a histogram's sample, by its labels and the bucket as it is shown."""


def _exemplars(counters: Counters) -> Exemplars:
    """Those of the finer buckets, each at the one shown that holds it; the latest, if there are several."""
    found: dict[str, dict[int, str]] = {}
    for outcome, exemplars in counters.exemplars.items():
        shown = found.setdefault(f'outcome="{outcome}"', {})
        for bucket, exemplar in sorted(exemplars.items(), key=lambda one: one[1].ended_ns):
            at = next((index for index, _ in _SHOWN if index >= bucket), len(BOUNDS_NS))
            seconds = max(0, exemplar.duration_ns) / NS_PER_S
            shown[at] = f' # {{trace_id="{exemplar.trace_id}"}} {seconds}'
    return found


def _lines(
    families: Iterable[Family], prefix: str = PREFIX, *, openmetrics: bool, exemplars: Exemplars
) -> Iterator[str]:
    for short, kind, text, samples in families:
        name = f"{prefix}{short}"
        family, type_ = name, kind
        if openmetrics and kind == "counter":
            # There a counter's samples end so; those that have Triton's names do not.
            family, type_ = (name[:-6], kind) if name.endswith("_total") else (name, "unknown")
        yield f"# HELP {family} {text}"
        yield f"# TYPE {family} {type_}"
        if isinstance(samples, Mapping):
            for labels, histogram in samples.items():
                behind = exemplars.get(labels, {}) if short == "request_seconds" else {}
                yield from _histogram(name, labels, histogram, behind)
        else:
            for labels, value in samples:
                yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def _histogram(name: str, labels: str, histogram: Histogram, behind: Mapping[int, str]) -> Iterator[str]:
    comma = "," if labels else ""
    below, start = 0, 0
    for index, label in _SHOWN:
        below += sum(histogram.counts[start : index + 1])
        start = index + 1
        yield f'{name}_bucket{{{labels}{comma}le="{label}"}} {below}{behind.get(index, "")}'
    last = behind.get(len(BOUNDS_NS), "")
    yield f'{name}_bucket{{{labels}{comma}le="+Inf"}} {histogram.count}{last}'
    braces = f"{{{labels}}}" if labels else ""
    yield f"{name}_sum{braces} {histogram.sum_ns / NS_PER_S}"
    yield f"{name}_count{braces} {histogram.count}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
