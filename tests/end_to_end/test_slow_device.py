"""A device becomes slower while it serves: what it still can do in time is served, nothing late is good."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from benchmarks.serving import total

from benchmarks import repositories
from clockwork_serve.messages import Infer, Result
from clockwork_serve.telemetry import read_journal
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.test_hangs import busiest, two_workers

SLEEPER = '''"""Echoes after a while, which a file for this process may make longer."""

import os
import pathlib
import time


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        slow = pathlib.Path("FOLDER", f"slow.{os.getpid()}").exists()
        time.sleep(0.02 if slow else 0.01)
        return {"y": inputs["x"]}

    def unload(self):
        pass
'''
CLIENTS, SLO_MS = 12, 60
PHASE_S = 4.0


@pytest.mark.slow
def test_durations_that_double_are_learned_within_a_window_and_the_other_device_is_left_alone(
    tmp_path: Path, cache: Path
) -> None:
    root, stop = tmp_path / "models", threading.Event()
    for number in range(2):
        source = SLEEPER.replace("FOLDER", str(tmp_path)) + f"# {number}\n"
        repositories.python_model(root, f"sleeper{number}", source)
    answers: list[tuple[float, int, float]] = []
    with two_workers(root, cache, [], journal=str(tmp_path / "journal")) as serving:

        def client(model: str) -> None:
            body = x_json([1.0] * 4, parameters={"slo_ms": SLO_MS})
            while not stop.is_set():
                asked_s = time.monotonic()
                status = call(serving.http_url, f"/v2/models/{model}/infer", body).status
                answers.append((asked_s, status, time.monotonic() - asked_s))
                time.sleep(0.002)

        clients = [threading.Thread(target=client, args=(f"sleeper{at % 2}",)) for at in range(CLIENTS)]
        for thread in clients:
            thread.start()
        time.sleep(PHASE_S)
        serving.worker = busiest(serving)
        (tmp_path / f"slow.{serving.worker_pid()}").touch()
        slowed_ns = time.monotonic_ns()
        time.sleep(PHASE_S)
        stop.set()
        for thread in clients:
            thread.join()
        assert total(serving.metrics(), "clockwork_workers_hung_total") == 0
        device = serving.worker.removeprefix("worker-")

    _check_estimates(tmp_path / "journal", device, slowed_ns)
    good = sum(status == 200 for asked_s, status, _ in answers if asked_s > slowed_ns / 1e9 + 1)
    assert good / (PHASE_S - 1) >= 30, "what a device of 20 ms can do is at most 50 a second"
    wrong = [took_s for _, status, took_s in answers if status == 200 and took_s > SLO_MS / 1000 + 0.2]
    assert not wrong, "nothing late is good"


def _check_estimates(journal: Path, device: str, slowed_ns: int) -> None:
    """The slow device's are right after a window of ten, the other's stay."""
    steps = list(read_journal(journal))
    sent = {one.action_id: one for step in steps for one in step.effects if isinstance(one, Infer)}
    results = [
        one
        for step in steps
        for one in step.events
        if isinstance(one, Result) and one.action_id in sent and one.started_ns > slowed_ns
    ]
    slowed = [one for one in results if one.device == device]
    assert len(slowed) > 30, "it is not given up"
    later = slowed[12:]  # a window of ten, and what was sent before its end
    expected = [sent[one.action_id].expected_ns for one in later]
    assert min(expected) >= 18_000_000, "the step is adopted, and stays"
    others = [sent[one.action_id].expected_ns for one in results if one.device != device]
    assert sorted(others)[len(others) // 2] < 18_000_000, "the other device is as it was"
