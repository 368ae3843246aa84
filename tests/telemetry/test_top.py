"""What a server does now, by two readings of its metrics."""

from __future__ import annotations

import pytest

from clockwork_serve.messages import Outcome, Readiness, Reason
from clockwork_serve.telemetry import GatewayCounters, Recorder
from clockwork_serve.telemetry.counters import DevicesWanted
from clockwork_serve.telemetry.metrics import render
from clockwork_serve.telemetry.top import read_metrics, server_now
from clockwork_serve.units import ms
from tests.telemetry import stories


def reading(recorder: Recorder, refused: int = 0):
    gateway = GatewayCounters(gateway="g0", outcomes={"rejected:queue_full": refused})
    return read_metrics(render(recorder.counters, gateway, triton=True).decode())


def test_rates_are_what_happened_between_the_readings() -> None:
    recorder = Recorder()
    recorder.on_step(0, [stories.worker_joined(), stories.model_added()], [Readiness(ready=True)])
    recorder.on_step(0, [stories.request("old")], [stories.answer("old")])
    before = reading(recorder, 3)
    recorder.on_step(1, [stories.request("a"), stories.request("b"), stories.request("c")], [])
    recorder.on_step(2, [], [stories.infer(1, "a")])
    recorder.on_step(ms(15), [stories.result(1)], [stories.answer("a", cold=True)])
    refused = stories.answer("b", Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE)
    recorder.on_step(ms(16), [], [refused])

    now = server_now(before, reading(recorder, 7), 2.0)

    assert (now.ready, now.models, now.open, now.queued) == (True, 1, 1, 1)
    assert (now.good_per_s, now.received_per_s) == (0.5, 1.5)
    assert now.ends == {"rejected:queue_full": 2.0, "rejected:would_miss_deadline": 0.5}
    assert (now.p50_ms, now.p99_ms) == (20, 20)
    (device,) = now.devices
    assert (device.device, device.up, device.batches_per_s) == ("cpu:0", True, 0.5)
    assert device.exec_busy == pytest.approx(0.01 / 2)
    (model,) = now.busiest
    assert (model.model, model.version, model.queued) == ("net", "1", 1)
    assert (model.good_per_s, model.refused_per_s, model.cold_per_s) == (0.5, 0.5, 0.5)


def test_a_counter_that_began_anew_counts_from_nothing() -> None:
    old, new = Recorder(), Recorder()
    for number in range(10):
        old.on_step(0, [stories.request(f"r{number}")], [stories.answer(f"r{number}")])
    new.on_step(0, [stories.request("a")], [stories.answer("a")])

    assert server_now(reading(old), reading(new), 1.0).good_per_s == 1


def test_wanted_devices_are_known_where_the_server_says_them() -> None:
    recorder = Recorder()
    recorder.counters.wanted = DevicesWanted(0, 3, "load")
    assert server_now({}, reading(recorder), 1.0).devices_wanted == 3
    assert server_now({}, {}, 1.0).devices_wanted is None


def test_nothing_is_shown_as_nothing() -> None:
    now = server_now({}, {}, 1.0)

    assert (now.ready, now.p99_ms, now.devices, now.busiest, now.ends) == (False, None, [], [], {})


def test_foreign_names_and_lines_do_not_break_it() -> None:
    name = 'we"ird\\n\name{},# '
    recorder = Recorder()
    recorder.on_step(0, [stories.model_added(name)], [])
    recorder.on_step(0, [stories.request("a", model=f"{name}/1")], [])
    text = render(recorder.counters, openmetrics=True).decode() + "garbage {\nclockwork_ready x\nother_x 1\n"

    (model,) = server_now({}, read_metrics(text), 1.0).busiest

    assert model.model == name


def test_the_busiest_models_come_first_and_as_many_as_are_wanted() -> None:
    recorder = Recorder()
    for number in range(5):
        key = f"m{number}/1"
        recorder.on_step(0, [stories.model_added(f"m{number}")], [])
        for at in range(number):
            name = f"{number}-{at}"
            recorder.on_step(0, [stories.request(name, model=key)], [stories.answer(name)])
    recorder.on_step(0, [stories.request("w", model="m0/1")], [])

    now = server_now(reading(Recorder()), reading(recorder), 1.0, most=3)

    assert [one.model for one in now.busiest] == ["m4", "m3", "m2"]
