"""What the recorder adds up from steps; it drives no machine."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.messages import (
    Delivered,
    GatewayLost,
    ModelRemoved,
    Outcome,
    Readiness,
    Reason,
    Status,
    WorkerHung,
    WorkerLost,
)
from clockwork_serve.telemetry import Recorder, decode
from clockwork_serve.units import MIB, ms
from tests.telemetry import stories


def serving() -> Recorder:
    recorder = Recorder()
    recorder.on_step(0, [stories.worker_joined(), stories.model_added()], [Readiness(ready=True)])
    return recorder


def test_a_good_request_is_counted_from_arrival_to_answer() -> None:
    recorder = serving()

    recorder.on_step(0, [stories.request("a")], [stories.load(1), stories.infer(2, "a")])
    recorder.on_step(ms(4), [stories.result(1, took_ms=4)], [])
    recorder.on_step(ms(15), [stories.result(2)], [stories.answer("a", cold=True)])

    counters = recorder.counters
    model = counters.models[stories.MODEL]
    assert (counters.received, counters.open, counters.queued) == (1, 0, 0)
    assert counters.outcomes == {"ok": 1} == model.outcomes
    assert counters.latency["ok"].sum_ns == ms(15)
    assert (model.cold_starts, model.loads, model.rows) == (1, 1, 1)
    assert (model.queue.count, model.queue.ns) == (1, ms(5))
    assert model.resident == {"cpu:0": 3 * MIB}
    assert counters.ready


def test_every_reason_is_counted_apart() -> None:
    recorder = serving()
    ends = [
        (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE),
        (Outcome.REJECTED, Reason.QUEUE_FULL),
        (Outcome.FAILED, Reason.MODEL_RAISED),
        (Outcome.CANCELLED, Reason.NONE),
        (Outcome.EXPIRED, Reason.LATE),
    ]
    for index, (outcome, reason) in enumerate(ends):
        recorder.on_step(index, [stories.request(str(index))], [stories.answer(str(index), outcome, reason)])

    assert recorder.counters.outcomes == {
        "rejected:would_miss_deadline": 1,
        "rejected:queue_full": 1,
        "failed:model_raised": 1,
        "cancelled": 1,
        "expired:late": 1,
    }
    assert recorder.counters.late == 1
    assert recorder.counters.models[stories.MODEL].fail.count == 5


def told() -> Recorder:
    """By a gateway that tells what becomes of answers."""
    recorder = serving()
    recorder.on_delivered("g0", Delivered(), 0)
    for name in ("a", "b"):
        recorder.on_step(0, [stories.request(name)], [])
    recorder.on_step(ms(1), [], [stories.answer("a")])
    recorder.on_step(ms(2), [], [stories.answer("b", Outcome.REJECTED, Reason.QUEUE_FULL)])
    return recorder


def test_an_answer_counts_when_its_gateway_has_given_it_to_the_client() -> None:
    recorder = told()
    counters = recorder.counters
    assert (counters.received, counters.open, counters.queued, counters.outcomes) == (2, 2, 0, {})
    recorder.on_delivered("g0", Delivered(in_time=("a", "b", "nobody")), ms(9))
    recorder.on_delivered("g0", Delivered(in_time=("a",), late=("b",)), ms(9))
    assert counters.outcomes == {"ok": 1, "rejected:queue_full": 1}
    assert (counters.open, counters.queued, counters.late, counters.unmatched) == (0, 0, 0, 0)
    assert counters.latency["ok"].sum_ns == ms(1), "to the controller's answer"


def test_what_came_too_late_has_expired_whatever_its_answer_was() -> None:
    recorder = told()
    recorder.on_delivered("g0", Delivered(late=("a", "b")), ms(500))
    counters, model = recorder.counters, recorder.counters.models[stories.MODEL]
    assert counters.outcomes == {"expired:late": 1, "expired": 1} == model.outcomes
    assert (counters.late, counters.open, model.late) == (1, 0, 1), "one of them ran"
    assert (model.success.count, model.fail.count) == (0, 2)


def test_a_gateway_may_tell_before_the_step_that_answered_is_counted() -> None:
    """The driver's listeners hear of a step when its answers were sent."""
    recorder = serving()
    recorder.on_delivered("g0", Delivered(), 0)
    recorder.on_delivered("g0", Delivered(in_time=("a",), late=("b", "unknown")), ms(2))
    requests = [stories.request("a"), stories.request("b"), stories.request("c")]
    recorder.on_step(ms(1), requests, [stories.answer("a"), stories.answer("b"), stories.answer("c")])
    assert recorder.counters.outcomes == {"ok": 1, "expired:late": 1}
    assert recorder.counters.open == 1
    recorder.on_step(ms(3), [stories.request("unknown")], [stories.answer("unknown")])
    assert recorder.counters.open == 2, "what was told early of others is forgotten"


def test_an_answer_given_twice_is_unmatched_before_it_is_delivered_too() -> None:
    recorder = told()
    recorder.on_step(ms(3), [], [stories.answer("a")])
    assert recorder.counters.unmatched == 1


def test_good_answers_of_a_gateway_that_died_are_nobodys() -> None:
    recorder = told()
    recorder.on_step(ms(3), [GatewayLost(gateway="g0")], [])
    assert recorder.counters.outcomes == {"cancelled": 1, "rejected:queue_full": 1}
    assert recorder.counters.open == 0


def test_a_good_answer_that_leaves_after_its_deadline_counts_as_late() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a", slo_ms=10)], [stories.infer(1, "a")])
    recorder.on_step(ms(11), [stories.result(1)], [stories.answer("a")])

    assert recorder.counters.outcomes == {"ok": 1}
    assert recorder.counters.late == 1


def test_a_second_answer_is_seen() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a")], [stories.answer("a"), stories.answer("a")])

    assert recorder.counters.unmatched == 1
    assert recorder.counters.outcomes == {"ok": 1}


def test_queued_counts_requests_in_no_infer() -> None:
    recorder = serving()
    counters = recorder.counters
    recorder.on_step(0, [stories.request("a"), stories.request("b"), stories.request("c")], [])
    assert counters.queued == 3
    recorder.on_step(1, [], [stories.infer(1, "a", "b")])
    assert counters.queued == 1
    recorder.on_step(2, [stories.result(1, status=Status.TOO_LATE)], [])
    assert counters.queued == counters.models[stories.MODEL].queued == 3
    recorder.on_step(3, [], [stories.infer(2, "a"), stories.answer("b", Outcome.EXPIRED)])
    assert counters.queued == 1
    recorder.on_step(4, [], [stories.answer("a", Outcome.EXPIRED)])
    recorder.on_step(5, [stories.result(2)], [])
    assert (counters.queued, counters.open) == (1, 1)


def test_prediction_errors_over_and_under_are_apart() -> None:
    recorder = serving()
    for action_id, took_ms in enumerate((9, 12)):
        recorder.on_step(0, [], [stories.infer(action_id, "x", expected_ms=10)])
        recorder.on_step(0, [stories.result(action_id, took_ms=took_ms)], [])

    errors = recorder.counters.prediction["infer"]
    assert (errors.over.sum_ns, errors.under.sum_ns) == (ms(1), ms(2))
    assert recorder.counters.prediction["load"].quantile_ns(0.5) is None


def test_pages_are_claimed_by_a_load_and_returned_by_failure_and_unload() -> None:
    recorder = serving()
    device = recorder.counters.devices["cpu:0"]
    recorder.on_step(0, [], [stories.load(1)])
    assert device.pages_used == 3
    recorder.on_step(1, [stories.result(1, status=Status.NO_ROOM)], [])
    assert device.pages_used == 0
    recorder.on_step(2, [], [stories.load(2)])
    recorder.on_step(3, [stories.result(2)], [])
    recorder.on_step(4, [], [stories.unload(3)])
    assert device.pages_used == 0
    assert device.actions == {"load:no_room": 1, "load:ok": 1}
    assert recorder.counters.models[stories.MODEL].resident == {}


def test_a_lost_worker_takes_its_actions_and_weights_along() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a")], [stories.load(1), stories.infer(2, "a")])
    recorder.on_step(1, [stories.result(1)], [])
    recorder.on_step(2, [WorkerLost(worker="w0")], [])

    device = recorder.counters.devices["cpu:0"]
    assert (device.up, device.lost_actions, device.pages_used) == (False, 1, 0)
    assert recorder.counters.models[stories.MODEL].resident == {}
    assert recorder.counters.queued == 1
    recorder.on_step(3, [stories.worker_joined()], [])
    assert device.up


def test_requests_of_a_lost_gateway_are_cancelled_unless_answered() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a"), stories.request("b"), stories.request("c", gateway="g1")], [])
    recorder.on_step(1, [GatewayLost(gateway="g0")], [stories.answer("a", Outcome.CANCELLED)])

    assert recorder.counters.outcomes == {"cancelled": 2}
    assert (recorder.counters.open, recorder.counters.unmatched) == (1, 0)


def test_an_unknown_model_gets_no_counters_of_its_own() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a", model="ghost/1")], [stories.answer("a", Outcome.INVALID)])

    assert list(recorder.counters.models) == [stories.MODEL]
    assert recorder.counters.outcomes == {"invalid": 1}


def test_a_removed_model_is_forgotten_but_its_requests_are_not() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a"), ModelRemoved(model=stories.MODEL)], [])
    recorder.on_step(1, [], [stories.answer("a", Outcome.REJECTED, Reason.NOT_SERVING)])

    assert recorder.counters.models == {}
    assert recorder.counters.outcomes == {"rejected:not_serving": 1}


def test_statistics_have_tritons_shape() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a"), stories.request("b")], [stories.infer(1, "a", "b")])
    recorder.on_step(ms(15), [stories.result(1)], [stories.answer("a"), stories.answer("b")])

    (record,) = json.loads(recorder.statistics("net", wall_offset_ns=ms(1000)))["model_stats"]
    assert record["last_inference"] == 1015
    assert (record["inference_count"], record["execution_count"]) == (2, 1)
    assert record["inference_stats"]["success"] == {"count": 2, "ns": 2 * ms(15)}
    assert record["inference_stats"]["compute_infer"] == {"count": 2, "ns": 2 * ms(8)}
    assert record["batch_stats"] == [
        {
            "batch_size": 2,
            "compute_input": {"count": 1, "ns": ms(1)},
            "compute_infer": {"count": 1, "ns": ms(8)},
            "compute_output": {"count": 1, "ns": ms(1)},
        }
    ]
    assert json.loads(recorder.statistics("ghost")) == {"model_stats": []}
    assert len(json.loads(recorder.statistics())["model_stats"]) == 1
    assert json.loads(recorder.statistics("net/1"))["model_stats"][0]["name"] == "net"


def test_the_encoded_counters_come_back_equal() -> None:
    recorder = serving()
    recorder.on_step(0, [stories.request("a")], [stories.infer(1, "a")])
    recorder.on_step(1, [stories.result(1)], [stories.answer("a")])

    assert decode(recorder.encoded()) == recorder.counters
    assert json.loads(recorder.encoded())["models"][stories.MODEL]["batches"]["1"]["executions"] == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["request", "infer", "fail", "ok", "reject", "cancel"]), st.integers(0, 5))
    )
)
def test_received_is_outcomes_plus_open_whatever_happens(steps: list[tuple[str, int]]) -> None:
    recorder, sent = serving(), {}
    for now_ns, (what, which) in enumerate(steps):
        name = f"{which}"
        if what == "request" and name not in recorder._open:
            recorder.on_step(now_ns, [stories.request(name)], [])
        elif what == "infer" and name not in sent.values():
            sent[now_ns] = name
            recorder.on_step(now_ns, [], [stories.infer(now_ns, name)])
        elif what in ("fail", "ok") and sent:
            action_id = next(iter(sent))
            del sent[action_id]
            status = Status.OK if what == "ok" else Status.MODEL_RAISED
            recorder.on_step(now_ns, [stories.result(action_id, status=status)], [])
        elif what in ("reject", "cancel"):
            outcome = Outcome.REJECTED if what == "reject" else Outcome.CANCELLED
            recorder.on_step(now_ns, [], [stories.answer(name, outcome)])
        counters = recorder.counters
        in_infer = sum(1 for name in sent.values() if name in recorder._open)
        unseen = sum(
            1 for name, opened in recorder._open.items() if name in sent.values() and not opened.sent
        )
        assert counters.received == sum(counters.outcomes.values()) + counters.open
        assert counters.open == len(recorder._open)
        assert counters.queued == counters.open - in_infer + unseen == counters.models[stories.MODEL].queued


def test_workers_that_hang_are_counted_and_their_devices_are_not_up_until_they_are_back() -> None:
    recorder = serving()
    for hung, up, counted in (
        (WorkerHung(worker="w0", why="late"), False, (1, 0)),
        (WorkerHung(worker="w0", why="late", end=True), False, (1, 1)),
        (WorkerHung(worker="w0"), True, (1, 1)),
        (WorkerHung(worker="other", why="late"), True, (2, 1)),
    ):
        recorder.on_step(ms(1), [], [hung])
        counters = recorder.counters
        assert (counters.workers_hung, counters.workers_ended) == counted
        assert [device.up for device in counters.devices.values()] == [up]
