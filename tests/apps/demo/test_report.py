"""What happened is counted once, and shown as it was counted."""

from __future__ import annotations

import io
import json

from rich.console import Console

from clockwork_serve.apps.demo.judgement import Judgement
from clockwork_serve.apps.demo.load import Hit, Shot
from clockwork_serve.apps.demo.meters import quantile, read
from clockwork_serve.apps.demo.report import PredictionError, Report, cold_starts_of, model_row
from clockwork_serve.apps.demo.screen import show
from clockwork_serve.apps.demo.tiny import MODELS

PAGE = """\
# TYPE clockwork_actions counter
clockwork_actions_total{device="cpu:0",action="load",status="ok"} 12
clockwork_actions_total{device="cpu:0",action="load",status="too_late"} 3
clockwork_actions_total{device="cpu:0",action="unload",status="ok"} 5
# TYPE clockwork_model_cold_starts counter
clockwork_model_cold_starts_total{model="mlp",version="1"} 2
clockwork_model_cold_starts_total{model="mlp_01",version="1"} 1
# TYPE clockwork_prediction_error_seconds histogram
clockwork_prediction_error_seconds_bucket{action="infer",direction="under",le="0.001"} 6
clockwork_prediction_error_seconds_bucket{action="infer",direction="under",le="+Inf"} 7
clockwork_prediction_error_seconds_bucket{action="infer",direction="over",le="0.001"} 2
clockwork_prediction_error_seconds_bucket{action="infer",direction="over",le="+Inf"} 3
clockwork_prediction_error_seconds_bucket{action="load",direction="over",le="0.001"} 90
clockwork_prediction_error_seconds_bucket{action="load",direction="over",le="+Inf"} 90
"""


def hits(*outcomes):
    shot = Shot(0.0, "mlp", "mlp", 0, 100.0, http=True)
    return [
        Hit(shot, outcome, "" if outcome == "ok" else f"{outcome}!", 10.0 * (i + 1))
        for i, outcome in enumerate(outcomes)
    ]


def report(row):
    return Report(
        models=(row,), instances=3, loads=12, unloads=5,
        prediction_error=PredictionError(p50=0.5, p99=None, lane_p50=2.0, lane_p99=200.0),
        duration_s=61.0, device_bytes=1 << 20, weights_bytes=5 << 20, rate=50.0, utilisation=0.55,
        load_s=30.0, slo_floor_ms=120.0, client_lag_p99_ms=1.5, offline=False,
    )  # fmt: skip


def row(judgement=None, outcomes=("ok", "ok", "ok", "rejected", "late"), errors=(1e-7, 3e-6)):
    return model_row(MODELS[1], judgement or Judgement("yes", ok=True), hits(*outcomes), list(errors), 3)


def test_a_row_adds_up():
    found = row()
    assert found.requests == found.ok + found.rejected + found.late + found.failed == 5
    assert (found.ok, found.rejected, found.late, found.failed) == (3, 1, 1, 0)
    assert found.reasons == {"rejected!": 1, "late!": 1}
    assert found.p50_ms == 20.0
    assert found.worst_error == 3e-6


def test_a_report_is_good_only_if_every_answer_is():
    assert report(row()).good
    assert not report(row(Judgement("no", ok=False))).good
    assert not report(row(errors=[1e-4])).good
    assert not report(row(errors=[float("inf")])).good
    assert not report(row(outcomes=["ok", "failed"])).good


def test_the_json_has_what_was_promised():
    found = json.loads(report(row(errors=[float("inf")])).to_json())
    assert {"models", "instances", "loads", "unloads", "prediction_error", "duration_s"} <= found.keys()
    assert {
        "name", "kind", "answer", "answer_ok", "requests", "ok", "rejected", "late", "p50_ms", "p99_ms",
        "cold_starts",
    } <= found["models"][0].keys()  # fmt: skip
    assert found["prediction_error"]["p50"] == 0.5


def test_the_screen_shows_answer_and_numbers():
    stream = io.StringIO()
    show(report(row(Judgement("0 xor 1 = 1", ok=True))), Console(file=stream, width=140))
    text = stream.getvalue()
    for part in ("✓", "0 xor 1 = 1", "60.0%", "12 loads, 5 unloads", "1 rejected!", "3.0e-06"):
        assert part in text, text


def test_a_wrong_answer_is_marked():
    stream = io.StringIO()
    show(report(row(Judgement("0 xor 1 = 0", ok=False))), Console(file=stream, width=140))
    assert "✗" in stream.getvalue()


def test_the_metrics_page_is_read():
    meters = read(PAGE)
    assert (meters.loads, meters.unloads) == (12, 5)
    assert meters.cold_starts == {"mlp": 2, "mlp_01": 1}
    assert meters.errors_ms == [(1.0, 8.0), (float("inf"), 10.0)]
    assert cold_starts_of({"mlp": "mlp", "mlp_01": "mlp"}, meters.cold_starts)["mlp"] == 3


def test_quantiles_are_upper_ends_of_buckets():
    buckets = [(1.0, 8.0), (2.0, 9.0), (4.0, 10.0)]
    assert [quantile(buckets, share) for share in (0.5, 0.85, 0.99)] == [1.0, 2.0, 4.0]
    assert quantile([], 0.5) is None
    assert quantile([(1.0, 0.0)], 0.5) is None
