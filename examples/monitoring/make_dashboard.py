"""Writes ``grafana-dashboard.json``; run it after changing a panel here.

It wants ``pip install 'grafana-foundation-sdk==1769699379!11.6.0'``, the schema of Grafana 11.6. Or change
the dashboard in Grafana and export it: nothing reads this file. Panels ask for what a server exposes and for
nothing that ``clockwork.rules.yml`` records, so they are whole without those rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import stat, timeseries
from grafana_foundation_sdk.builders.common import StackingConfig
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

FILE: Final = Path(__file__).with_name("grafana-dashboard.json")
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
SERVER: Final = 'instance="$instance"'
DEVICE: Final = SERVER + ',device=~"$device"'
MODEL: Final = SERVER + ',model=~"$model"'
TENANT: Final = SERVER + ',tenant=~"$tenant"'
GOOD: Final = ',outcome="ok"'
MISSED: Final = ',outcome!="ok"'
COUNTED: Final = ',outcome=~"ok|rejected|expired|failed",reason!~"tenant_quota|draining"'


def value(metric: str, labels: str = SERVER) -> str:
    """A gauge, or a counter as it stands."""
    return f"clockwork_{metric}{{{labels}}}"


def rate(metric: str, labels: str = SERVER) -> str:
    """Events of a counter a second."""
    return f"rate({value(metric, labels)}[$__rate_interval])"


def ended(labels: str) -> str:
    """Requests that ended a second, at the controller or at the gateway that is scraped."""
    return f"{rate('requests_total', SERVER + labels)} or {rate('gateway_requests_total', SERVER + labels)}"


def total(by: str, expression: str) -> str:
    """The sum by some labels."""
    return f"sum by ({by}) ({expression})"


def top(expression: str) -> str:
    """The ten largest."""
    return f"topk(10, {expression})"


def quantiles(metric: str, what: str = "", labels: str = SERVER) -> list[tuple[str, str]]:
    """The median and p99 of a histogram in seconds, each with the name of its line."""
    buckets = total("le", rate(f"{metric}_bucket", labels))
    return [(f"histogram_quantile({q / 100}, {buckets})", f"{what} p{q}".strip()) for q in (50, 99)]


def share(metric: str, labels: str, part: str) -> str:
    """What a state of a gauge is of ``all``."""
    state = labels + ',state="'
    whole = value(metric, f'{state}all"')
    found = value(metric, f'{state}{part}"')
    return f"{found} / ignoring (state) {whole}"


def number(title: str, unit: str, tells: str, expression: str, *bounds: tuple[float, str]) -> stat.Panel:
    """A panel of one number, green but for each bound: a value, and the colour from there on."""
    steps = [
        Threshold(value=None, color="green"),  # what Grafana wants first: from below
        *(Threshold(value=at, color=color) for at, color in bounds),
    ]
    colors = ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    panel = stat.Panel().title(title).description(tells).unit(unit).datasource(SOURCE).height(4).span(4)
    return panel.thresholds(colors).with_target(Dataquery().expr(expression).instant().ref_id("A"))


def lines(
    title: str, unit: str, tells: str, *queries: tuple[str, str], stacked: bool = False
) -> timeseries.Panel:
    """A panel of lines; each query is an expression, and what its lines are called."""
    panel = timeseries.Panel().title(title).description(tells).unit(unit).datasource(SOURCE).height(8).span(8)
    panel.min(0).fill_opacity(30 if stacked else 5)
    if stacked:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A"))
    for letter, (expression, name) in zip("ABCDEF", queries, strict=False):
        panel.with_target(Dataquery().expr(expression).legend_format(name).ref_id(letter))
    return panel


NOW: Final = (
    number(
        "In time", "percentunit",
        "Share of requests that were answered well within their deadlines. Not counted: cancelled and "
        "invalid ones, and those refused by a quota or by a server that stops.",
        f"(sum({rate('requests_total', SERVER + GOOD)}) or vector(0)) / sum({ended(COUNTED)})",
        (0, "red"), (0.97, "orange"), (0.99, "green"),
    ),
    number(
        "Goodput", "reqps", "Good answers in time, a second.",
        f"sum({rate('requests_total', SERVER + GOOD)})",
    ),
    number(
        "Late", "short", "Sent to a device, and not answered by the deadline. It should be 0.",
        f"increase({value('requests_late_total')}[$__range])", (1, "red"),
    ),
    number("Waiting", "short", "Requests that wait for a device.", value("requests_queued")),
    number(
        "Devices up", "short", "Devices whose workers answer.", f"sum({value('device_up')})",
        (0, "red"), (1, "green"),
    ),
    number(
        "Ready", "bool_yes_no", "Whether it can serve all that it started with.", value("ready"),
        (0, "red"), (1, "green"),
    ),
    lines(
        "Requests by outcome", "reqps", "As the controller and the gateway that is scraped ended them.",
        (total("outcome", ended("")), "{{outcome}}"), stacked=True,
    ),
    lines(
        "Not answered well, by reason", "reqps",
        "would_miss_deadline: devices are full, or SLOs too tight. queue_full: more requests wait than may.",
        (total("outcome, reason", ended(MISSED)), "{{outcome}} {{reason}}"), stacked=True,
    ),
    lines(
        "Latency of good answers", "s", "Arrival at the gateway to the controller's answer.",
        *quantiles("request_seconds", labels=SERVER + GOOD),
    ),
    lines(
        "Where the time goes", "s", "Of good answers: arrival to start, and time on the execution lane.",
        *quantiles("queue_seconds", "wait"), *quantiles("execution_seconds", "run"),
    ),
    lines(
        "Open and waiting", "short", "Open requests, and those of them that wait for a device.",
        (value("requests_open"), "open"), (value("requests_queued"), "waiting"),
    ),
    lines(
        "Batches", "ops", "Batches that ran well, by their size.",
        (total("batch", rate("executions_total")), "{{batch}}"), stacked=True,
    ),
)  # fmt: skip
DEVICES: Final = (
    lines(
        "Busy", "percentunit", "Share of the time that the execution lane is taken.",
        (rate("lane_busy_seconds_total", DEVICE + ',lane="exec"'), "{{device}}"),
    ),
    lines(
        "Busy with LOADs", "percentunit",
        "Share of the time that the load lane is taken. High with full memory: models push each other out.",
        (rate("lane_busy_seconds_total", DEVICE + ',lane="load"'), "{{device}}"),
    ),
    lines(
        "Memory for weights", "percentunit", "Share of pages that are claimed. Full is as it should be.",
        (share("device_pages", DEVICE, "claimed"), "{{device}}"),
    ),
    lines(
        "LOADs", "ops", "LOADs that ended well.",
        (total("device", rate("actions_total", DEVICE + ',action="load",status="ok"')), "{{device}}"),
    ),
    lines(
        "Actions refused or failed", "ops", "Results but for ok. What is refused is planned again.",
        (
            total("device, action, status", rate("actions_total", DEVICE + ',status!="ok"')),
            "{{device}} {{action}} {{status}}",
        ),
    ),
    lines(
        "Prediction error, p99", "s",
        "under: it took longer than expected, which makes answers late; over: it did not.",
        (
            "histogram_quantile(0.99, "
            + total("le, action, direction", rate("prediction_error_seconds_bucket")) + ")",
            "{{action}} {{direction}}",
        ),
    ),
)  # fmt: skip
MODELS: Final = (
    lines(
        "Goodput, the ten largest", "reqps", "Good answers in time.",
        (top(total("model, version", rate("model_requests_total", MODEL + GOOD))), "{{model}}/{{version}}"),
    ),
    lines(
        "Not answered well, the ten largest", "reqps", "Refused, expired, failed or cancelled.",
        (
            top(total("model, outcome, reason", rate("model_requests_total", MODEL + MISSED))),
            "{{model}} {{outcome}} {{reason}}",
        ),
    ),
    lines(
        "Waiting, the ten largest", "short", "Open requests that wait for a device.",
        (top(value("model_queued", MODEL)), "{{model}}/{{version}}"),
    ),
    lines(
        "Batches that took longer than expected", "percentunit",
        "The share of the others is how reliable estimates are.",
        (
            f"{rate('model_overruns_total', MODEL)} / ({rate('model_executions_total', MODEL)} > 0)",
            "{{model}}/{{version}}",
        ),
    ),
    lines(
        "Good answers that waited for a LOAD", "reqps", "Cold starts, the ten largest.",
        (top(f"{rate('model_cold_starts_total', MODEL)} > 0"), "{{model}}/{{version}}"),
    ),
    lines(
        "Promises broken, by cause", "reqps", "Where decide_ms is set. unexplained: a fault of the server's.",
        (total("model, cause", rate("model_promises_broken_total", MODEL)), "{{model}} {{cause}}"),
    ),
)  # fmt: skip
TENANTS: Final = (
    lines(
        "Requests by outcome", "reqps", "Of tenants that have a quota.",
        (total("tenant, outcome", rate("tenant_requests_total", TENANT)), "{{tenant}} {{outcome}}"),
    ),
    lines(
        "Use of device time", "percentunit", "Share of its quota. At 1, more is refused with tenant_quota.",
        (
            f"{rate('tenant_device_seconds_total', TENANT)} / ({value('tenant_device_quota', TENANT)} > 0)",
            "{{tenant}}",
        ),
    ),
    lines(
        "Refused by quota", "reqps", "Reason tenant_quota.",
        (total("tenant", rate("tenant_requests_total", TENANT + ',reason="tenant_quota"')), "{{tenant}}"),
    ),
)  # fmt: skip
HEALTH: Final = (
    lines(
        "Wake-up lateness of the controller", "s", "Above slack_ms, 2 ms by default, it makes answers late.",
        *quantiles("wakeup_lateness_seconds"),
    ),
    lines(
        "Lost and started again", "short", "Since each process's counters began.",
        (value("gateways_lost_total"), "gateways lost"), (value("workers_lost_total"), "workers lost"),
        (value("workers_hung_total"), "workers hung"), (value("processes_ended_total"), "{{process}} ended"),
    ),
    lines(
        "What is served", "short", "Models; those that wait are still being prepared since the start.",
        (value("models"), "served"), (value("models_resident"), "on a device"),
        (value("models_waiting"), "waiting"), (f"sum({value('model_quarantined')})", "in quarantine"),
    ),
    lines(
        "Connections and open requests", "short", "Of the gateway that is scraped.",
        (value("gateway_connections"), "connections of {{gateway}}"),
        (value("gateway_open"), "open at {{gateway}}"),
    ),
    lines(
        "Tensor memory", "percentunit", "Share taken at the gateway that is scraped. If full: queue_full.",
        (share("gateway_region_bytes", SERVER, "taken"), "{{gateway}}"),
    ),
    lines(
        "Cache", "short", "Files that were found damaged, what was made again, and models that could not be.",
        (value("cache_damaged_total"), "{{what}} damaged"),
        (value("cache_artefacts_remade_total"), "made again"),
        (value("cache_models_lost_total"), "models lost"),
    ),
)  # fmt: skip
ROWS: Final = {"Now": NOW, "Devices": DEVICES, "Models": MODELS, "Tenants": TENANTS, "Health": HEALTH}


def variable(name: str, metric: str, labels: str) -> QueryVariable:
    """A choice among the values of a label that a metric has."""
    made = QueryVariable(name).datasource(SOURCE).query(f"label_values({value(metric, labels)}, {name})")
    return made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)


def dashboard() -> str:
    """The dashboard as JSON: a row for each part of the server."""
    made = Dashboard("Clockwork Serve").uid("clockwork-serve").tags(["clockwork"]).editable()
    made.description("One server: what is asked of it, what becomes of that, and why.")
    made.refresh("30s").time("now-1h", "now").tooltip(DashboardCursorSync.CROSSHAIR)
    made.with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    made.with_variable(variable("instance", "ready", ""))
    for name, metric in (
        ("device", "device_up"), ("model", "model_requests_total"), ("tenant", "tenant_device_quota"),
    ):  # fmt: skip
        several = variable(name, metric, SERVER).multi(multi=True).include_all(include_all=True)
        made.with_variable(several.all_value(".*"))
    for number_of_row, (title, row) in enumerate(ROWS.items(), 1):
        made.with_row(Row(title).id(100 * number_of_row))
        for number_in_row, panel in enumerate(row, 1):
            made.with_panel(panel.id(100 * number_of_row + number_in_row))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(dashboard(), encoding="utf-8")
