"""The text is what Prometheus reads: judged by the parser of ``prometheus_client``."""

from __future__ import annotations

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from clockwork_serve.messages import Outcome, Quarantined, Quota, QuotasSet, Reason
from clockwork_serve.telemetry import GatewayCounters, Recorder
from clockwork_serve.telemetry.counters import decode, model_statistics
from clockwork_serve.telemetry.metrics import render
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
    text = render(recorded().counters, GatewayCounters(gateway="g0"), triton=True).decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 20
    assert [name for name in names if f"`{name}`" not in page] == []


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
