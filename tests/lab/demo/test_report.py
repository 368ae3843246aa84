"""What happened is counted once, and shown as it was counted."""

from __future__ import annotations

import io
import json
from collections import Counter

import msgspec
import pytest
from rich.console import Console

from clockwork_lab.demo.client import Hit, Shot
from clockwork_lab.demo.judgement import Judgement
from clockwork_lab.demo.report import Counted, DemoReport, PredictionError, model_row, prediction_error, read
from clockwork_lab.demo.screen import show
from clockwork_lab.demo.tiny import MODELS

PAGE = """\
# TYPE clockwork_actions counter
clockwork_actions_total{device="cpu:0",action="load",status="ok"} 12
clockwork_actions_total{device="cpu:0",action="load",status="too_late"} 3
clockwork_actions_total{device="cpu:0",action="unload",status="ok"} 5
# TYPE clockwork_model_cold_starts counter
clockwork_model_cold_starts_total{model="mlp",version="1"} 2
clockwork_model_cold_starts_total{model="mlp_01",version="1"} 1
# TYPE clockwork_model_requests counter
clockwork_model_requests_total{model="mlp",version="1",outcome="ok",reason=""} 40
clockwork_model_requests_total{model="mlp",version="1",outcome="rejected",reason="queue_full"} 4
clockwork_model_requests_total{model="mlp_01",version="1",outcome="rejected",reason="queue_full"} 1
"""


def hits(*outcomes):
    shot = Shot(0.0, "mlp", "mlp", 0, 100.0, http=True)
    return [
        Hit(shot, outcome, "" if outcome in ("ok", "rejected") else outcome, 10.0 * (i + 1))
        for i, outcome in enumerate(outcomes)
    ]


SERVED = Counted(cold_starts=3, rejected=Counter(queue_full=1))


def report(row):
    return DemoReport(
        models=(row,), instances=3, loads=12, unloads=5,
        prediction_error=PredictionError(p50=0.5, p99=None, lane_p50=2.0, lane_p99=200.0),
        duration_s=61.0, device_bytes=1 << 20, weights_bytes=5 << 20, rate=50.0, utilisation=0.55,
        load_s=30.0, slo_floor_ms=120.0, client_lag_p99_ms=1.5, busy=0.1, offline=False,
    )  # fmt: skip


def row(judgement=None, outcomes=("ok", "ok", "ok", "rejected", "late"), errors=(1e-7, 3e-6)):
    return model_row(MODELS[1], judgement or Judgement("yes", ok=True), hits(*outcomes), list(errors), SERVED)


def test_a_row_adds_up():
    found = row()
    assert found.requests == found.ok + found.rejected + found.late + found.failed == 5
    assert (found.ok, found.rejected, found.late, found.failed) == (3, 1, 1, 0)
    assert found.reasons == {"queue_full": 1, "late": 1}
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
    for part in ("✓", "0 xor 1 = 1", "60.0%", "12 loads, 5 unloads", "1 queue_full", "3.0e-06"):
        assert part in text, text


def test_other_work_on_the_machine_is_mentioned():
    for busy, mentioned in ((0.1, False), (1.5, True)):
        stream = io.StringIO()
        show(msgspec.structs.replace(report(row()), busy=busy), Console(file=stream, width=140))
        assert ("other tasks per core" in stream.getvalue()) == mentioned


@pytest.mark.parametrize("width", [80, 140])
def test_every_answer_is_on_the_screen_whole(width):
    stream = io.StringIO()
    show(report(row()), Console(file=stream, width=width))
    assert "a network of two layers: yes" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= width


def test_a_wrong_answer_is_marked():
    stream = io.StringIO()
    show(report(row(Judgement("0 xor 1 = 0", ok=False))), Console(file=stream, width=140))
    assert "✗" in stream.getvalue()


def test_the_metrics_page_is_read():
    meters = read(PAGE, {"mlp": "mlp", "mlp_01": "mlp", "words": "words"})
    assert (meters.loads, meters.unloads) == (12, 5)
    assert meters.by_base["mlp"] == Counted(cold_starts=3, rejected=Counter(queue_full=5))
    assert meters.by_base["words"] == Counted()


def test_prediction_errors_count_either_way():
    found = prediction_error([(10.0, 9.0), (20.0, 23.0), (30.0, 30.0)])
    assert (found.p50, found.lane_p50) == (1.0, 20.0)
    assert prediction_error([]).p99 is None
