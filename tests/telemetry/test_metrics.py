"""The text is what Prometheus reads: judged by the parser of ``prometheus_client``."""

from __future__ import annotations

import msgspec
from msgspec import structs
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from clockwork_serve.messages import Outcome, Quarantined, Quota, QuotasSet, Reason
from clockwork_serve.telemetry import GatewayCounters, Recorder
from clockwork_serve.telemetry.counters import DevicesWanted, decode, model_statistics
from clockwork_serve.telemetry.metrics import render
from clockwork_serve.telemetry.spans import trace_ids
from clockwork_serve.units import ms
from tests.telemetry import stories


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def recorded(name: str = "net") -> Recorder:
    recorder = Recorder()
    recorder.on_step(0, [stories.worker_joined(), stories.model_added(name)], [])
    for index in range(3):
        recorder.on_step(0, [stories.request(f"r{index}", model=f"{name}/1")], [])
        recorder.on_step(1, [], [stories.answer(f"r{index}", Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE)])
    recorder.on_step(0, [stories.request("a", model=f"{name}/1")], [stories.infer(1, "a")])
    recorder.on_step(ms(15), [stories.result(1)], [stories.answer("a")])
    return recorder


def test_outcomes_are_counted_by_reason() -> None:
    found = samples(render(recorded().counters))
    rejected = (("outcome", "rejected"), ("reason", "would_miss_deadline"))
    assert found["clockwork_requests_total", rejected] == 3
    assert found["clockwork_requests_received_total", ()] == 4
    of_model = (("model", "net"), *rejected, ("version", "1"))
    assert found["clockwork_model_requests_total", of_model] == 3


def test_histograms_are_cumulative_and_end_at_their_count() -> None:
    found = samples(render(recorded().counters))
    buckets = [
        (float(dict(labels)["le"]), value)
        for (name, labels), value in found.items()
        if name == "clockwork_request_seconds_bucket" and ("outcome", "ok") in labels
    ]
    values = [value for _, value in sorted(buckets)]
    assert values == sorted(values)
    assert values[-1] == found["clockwork_request_seconds_count", (("outcome", "ok"),)] == 1
    assert dict(buckets)[0.01] == 0
    assert dict(buckets)[0.02] == 1
    assert found["clockwork_request_seconds_sum", (("outcome", "ok"),)] == 0.015


def test_late_wakeups_are_a_histogram_whose_bounds_hold_half_a_millisecond() -> None:
    recorder = recorded()
    for late_ns in (0, 400_000, 600_000):
        recorder.counters.wakeup.add(late_ns)
    found = samples(render(recorder.counters))
    assert found["clockwork_wakeup_lateness_seconds_bucket", (("le", "0.0005"),)] == 2
    assert found["clockwork_wakeup_lateness_seconds_count", ()] == 3
    assert found["clockwork_wakeup_lateness_seconds_sum", ()] == 0.001


def test_names_are_escaped() -> None:
    name = 'we"ird\\n\name'
    found = samples(render(recorded(name).counters))
    assert any(dict(labels).get("model") == name for _, labels in found)


def test_models_that_nobody_asked_for_take_no_line() -> None:
    recorder = recorded()
    before = render(recorder.counters).count(b"\n")
    recorder.on_step(2, [stories.model_added(f"idle{index}") for index in range(50)], [])
    assert render(recorder.counters).count(b"\n") == before
    assert samples(render(recorder.counters))["clockwork_models", ()] == 51


def test_a_gateway_adds_what_it_decided_itself() -> None:
    gateway = GatewayCounters(
        gateway="g0",
        received=9,
        outcomes={"invalid:bad_input": 2},
        unheard={"left": 3, "over": 1},
        refused_by_summary=5,
    )
    found = samples(render(recorded().counters, gateway))
    key = (("gateway", "g0"), ("outcome", "invalid"), ("reason", "bad_input"))
    assert found["clockwork_gateway_requests_total", key] == 2
    assert found["clockwork_gateway_unheard_answers_total", (("gateway", "g0"), ("why", "left"))] == 3
    assert found["clockwork_gateway_refused_by_summary_total", (("gateway", "g0"),)] == 5


def test_a_gateway_that_no_worker_reaches_is_not_ready_though_the_server_is() -> None:
    counters = recorded().counters
    counters.ready = True
    assert samples(render(counters, GatewayCounters(gateway="g0")))["clockwork_ready", ()] == 1
    assert samples(render(counters, GatewayCounters(gateway="g0", ready=False)))["clockwork_ready", ()] == 0


def test_triton_s_names_say_what_its_statistics_say() -> None:
    recorder = recorded()
    for index, (outcome, reason) in enumerate(
        (
            (Outcome.EXPIRED, Reason.LATE),
            (Outcome.CANCELLED, Reason.NONE),
            (Outcome.FAILED, Reason.MODEL_RAISED),
        )
    ):
        recorder.on_step(
            ms(20), [stories.request(f"x{index}", at_ms=20)], [stories.infer(9 + index, f"x{index}")]
        )
        recorder.on_step(ms(31), [stories.result(9 + index)], [stories.answer(f"x{index}", outcome, reason)])
    recorder.on_step(ms(40), [stories.request("waits", at_ms=40), stories.model_added("idle")], [])
    gateway = GatewayCounters(gateway="g0", invalid={"net/1": 2, "gone/1": 5})

    found = {
        # The parser ends the name of every counter as OpenMetrics does; Triton's do not.
        (name.removeprefix("nv_inference_").removesuffix("_total"), dict(labels).get("reason", "")): value
        for (name, labels), value in samples(render(recorder.counters, gateway, triton=True)).items()
        if name.startswith("nv_") and {("model", "net"), ("version", "1")} <= {*labels}
    }

    (record,) = model_statistics(recorder.counters, "net/1", 0)["model_stats"]
    told = record["inference_stats"]
    reasons = {"REJECTED": 3 + 1, "CANCELED": 1, "BACKEND": 1, "OTHER": 2}
    assert sum(reasons.values()) == told["fail"]["count"] + 2
    assert found == {
        **{("request_failure", reason): count for reason, count in reasons.items()},
        ("request_success", ""): told["success"]["count"],
        ("count", ""): record["inference_count"],
        ("exec_count", ""): record["execution_count"],
        ("request_duration_us", ""): told["success"]["ns"] // 1000,
        ("queue_duration_us", ""): told["queue"]["ns"] // 1000,
        **{
            (f"{phase}_duration_us", ""): told[phase]["ns"] // 1000
            for phase in ("compute_input", "compute_infer", "compute_output")
        },
        ("pending_request_count", ""): 1,
    }
    assert told["success"] == {"count": 1, "ns": ms(15)}
    assert record["inference_count"] == 4


def test_triton_s_names_are_there_only_if_they_are_asked_for() -> None:
    assert b"nv_" not in render(recorded().counters, GatewayCounters(gateway="g0"))
    assert b'nv_inference_request_success{model="net",version="1"} 1' in render(
        recorded().counters, triton=True
    )


def test_every_family_is_listed_in_the_docs() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "operate" / "metrics.md").read_text()
    own, counters = GatewayCounters(gateway="g0"), recorded().counters
    counters.wanted = DevicesWanted(0, 3, "load")
    text = render(counters, own, triton=True).decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 20
    assert [name for name in names if f"`{name}`" not in page] == []


def test_what_the_observer_says_of_devices_is_a_metric_with_its_cause() -> None:
    counters = recorded().counters
    assert b"devices_wanted" not in render(counters)
    counters.wanted = DevicesWanted(0, 3, "load", 'ne"t')
    text = render(counters).decode()
    assert "\nclockwork_devices_wanted 3\n" in text
    assert '\nclockwork_devices_wanted_info{cause="load",model="ne\\"t"} 1\n' in text


def test_tenants_with_a_quota_are_counted_and_nobody_else() -> None:
    recorder = recorded()
    recorder.on_step(0, [QuotasSet(quotas=(Quota(tenant="t", burst_ns=1, device_ns_per_s=ms(50)),))], [])
    for name in ("t", "other"):
        asked = msgspec.structs.replace(stories.request(f"of-{name}", model="net/1"), tenant=name)
        refused = stories.answer(f"of-{name}", Outcome.REJECTED, Reason.TENANT_QUOTA)
        recorder.on_step(0, [asked], [refused])
    account = {"device_ns": ms(70), "device_ns_per_s": ms(50), "loaded_bytes": 9, "loaded_bytes_per_s": 0}
    found = samples(render(decode(recorder.encoded({"t": account}))))
    of_tenants = {
        (name.removeprefix("clockwork_tenant_"), dict(labels)["tenant"]): value
        for (name, labels), value in found.items()
        if name.startswith("clockwork_tenant_")
    }
    assert of_tenants == {
        ("requests_total", "t"): 1, ("late_total", "t"): 0, ("device_seconds_total", "t"): 0.07,
        ("device_quota", "t"): 0.05, ("loaded_bytes_total", "t"): 9, ("loaded_bytes_quota", "t"): 0,
    }  # fmt: skip


def test_without_tenants_no_line_speaks_of_them() -> None:
    assert b"tenant_" not in render(recorded().counters).replace(b"tenant_quota", b"")


def test_models_in_quarantine_have_a_line_and_others_none() -> None:
    recorder = recorded()
    recorder.on_step(1, [], [Quarantined(model="net/1", why="it kills")])
    labels = (("model", "net"), ("version", "1"))
    assert samples(render(recorder.counters))["clockwork_model_quarantined", labels] == 1
    recorder.on_step(2, [], [Quarantined(model="net/1"), Quarantined(model="nobody/1")])
    found = samples(render(recorder.counters))
    assert ("clockwork_model_quarantined", labels) not in found
    assert found["clockwork_quarantines_total", ()] == 1


# OpenMetrics, and exemplars


def families(text: bytes) -> dict[str, Metric]:
    return {family.name: family for family in openmetrics_families(text.decode())}


def traced(share: float = 1.0) -> Recorder:
    recorder = Recorder(share)
    recorder.on_step(0, [stories.model_added()], [])
    return recorder


def asked(recorder: Recorder, name: str, at_ms: float, took_ms: float, outcome: Outcome = Outcome.OK) -> str:
    """A request, and its trace's id."""
    recorder.on_step(ms(at_ms), [stories.request(name, at_ms)], [])
    recorder.on_step(ms(at_ms + took_ms), [], [stories.answer(name, outcome)])
    return trace_ids(name).trace_id.hex()


def exemplars(recorder: Recorder) -> dict[tuple[str, str], tuple[str, float]]:
    counters = decode(recorder.encoded())
    return {
        (sample.labels["outcome"], sample.labels["le"]): (
            sample.exemplar.labels["trace_id"], sample.exemplar.value,
        )
        for family in families(render(counters, openmetrics=True)).values()
        for sample in family.samples if sample.exemplar is not None
    }  # fmt: skip


def test_openmetrics_say_what_the_text_format_says() -> None:
    recorder = recorded()
    gateway = GatewayCounters(gateway="g0", outcomes={"invalid:bad_input": 2}, unheard={"left": 1})
    plain = samples(render(recorder.counters, gateway, triton=True))
    found = families(render(recorder.counters, gateway, triton=True, openmetrics=True))

    # The parser of the text format gives all counters this ending.
    assert {
        (sample.name.removesuffix("_total"), tuple(sorted(sample.labels.items()))): sample.value
        for family in found.values()
        for sample in family.samples
    } == {(name.removesuffix("_total"), labels): value for (name, labels), value in plain.items()}
    assert found["clockwork_requests"].type == "counter"
    assert found["nv_inference_request_success"].type == "unknown"


def test_buckets_have_requests_whose_traces_are_kept() -> None:
    recorder = traced()
    fast, slow = asked(recorder, "fast", 1, 2), asked(recorder, "slow", 2, 90)
    refused = asked(recorder, "refused", 3, 4, Outcome.REJECTED)

    assert exemplars(recorder) == {
        ("ok", "0.002"): (fast, 0.002), ("ok", "0.1"): (slow, 0.09), ("rejected", "0.005"): (refused, 0.004),
    }  # fmt: skip
    assert b"trace_id" not in render(recorder.counters)


def test_without_traces_there_are_no_exemplars() -> None:
    recorder = Recorder()
    recorder.on_step(0, [stories.model_added()], [])
    asked(recorder, "a", 1, 2)

    assert exemplars(recorder) == {}


def test_a_trace_that_is_not_kept_is_no_exemplar() -> None:
    recorder = traced(0.0)
    asked(recorder, "good", 1, 2)
    refused = asked(recorder, "refused", 3, 4, Outcome.REJECTED)

    assert exemplars(recorder) == {("rejected", "0.005"): (refused, 0.004)}


def test_a_bucket_has_a_recent_one_and_the_old_ones_go() -> None:
    recorder = traced()
    first = asked(recorder, "first", 0, 2)
    asked(recorder, "second", 500, 2)
    assert exemplars(recorder) == {("ok", "0.002"): (first, 0.002)}
    third = asked(recorder, "third", 1100, 2)
    assert exemplars(recorder) == {("ok", "0.002"): (third, 0.002)}
    last = asked(recorder, "last", 400_000, 90)
    assert exemplars(recorder) == {("ok", "0.1"): (last, 0.09)}


def test_the_trace_of_a_client_is_the_exemplar_s() -> None:
    recorder = traced()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    request = structs.replace(stories.request("a"), trace=f"{trace}-00f067aa0ba902b7-01")
    recorder.on_step(0, [request], [])
    recorder.on_step(ms(300_000), [], [stories.answer("a")])

    assert exemplars(recorder) == {("ok", "+Inf"): (trace, 300.0)}
