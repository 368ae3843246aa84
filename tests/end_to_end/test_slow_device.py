"""A device becomes slower while it serves: what it still can do in time is served, nothing late is good."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from clockwork_serve.messages import Answer, Infer, Outcome, Request, Result
from clockwork_serve.telemetry import Step, read_journal
from harness import repositories
from harness.serving import total
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.two_workers import busiest, two_workers
from tests.timing import Timing

SLEEPER = repositories.echoing(
    """
    import os, pathlib, time

    USUAL_S, SLOW_S = 0.04, 0.08  # NUMBER
    """,
    """
    slow = pathlib.Path("FOLDER", f"slow.{os.getpid()}").exists()
    time.sleep(SLOW_S if slow else USUAL_S)
    """,
)
"""Takes a while, which a file for its process may make longer."""
CLIENTS, SLO_MS = 12, 240
SLOW_S = 0.08
BETWEEN_NS = 72_000_000
"""Of both durations, and far from either: a busy machine makes every sleep longer."""
BEFORE_S, AFTER_S = 4.0, 7.0


@pytest.mark.slow
def test_durations_that_double_are_learned_within_a_window_and_the_other_device_is_left_alone(
    tmp_path: Path, cache: Path, timing: Timing
) -> None:
    root, stop = tmp_path / "models", threading.Event()
    for number in range(2):
        source = SLEEPER.replace("FOLDER", str(tmp_path)).replace("NUMBER", str(number))
        repositories.python_model(root, f"sleeper{number}", source)
    answers: list[tuple[float, int, float]] = []
    with two_workers(root, cache, [], journal=str(tmp_path / "journal")) as serving:

        def client(model: str) -> None:
            body = x_json([1.0] * 4, parameters={"slo_ms": SLO_MS})
            while not stop.is_set():
                asked_s = time.monotonic()
                status = call(serving.http_url, f"/v2/models/{model}/infer", body).status
                answers.append((asked_s, status, time.monotonic() - asked_s))
                time.sleep(0.01)

        clients = [threading.Thread(target=client, args=(f"sleeper{at % 2}",)) for at in range(CLIENTS)]
        for thread in clients:
            thread.start()
        time.sleep(BEFORE_S)
        serving.worker = busiest(serving)
        (tmp_path / f"slow.{serving.worker_pid()}").touch()
        slowed_ns = time.monotonic_ns()
        time.sleep(AFTER_S)
        stop.set()
        for thread in clients:
            thread.join()
        assert total(serving.metrics(), "clockwork_workers_hung_total") == 0
        device = serving.worker.removeprefix("worker-")

    steps = list(read_journal(tmp_path / "journal"))
    _check_answers(steps)
    with timing.judged():
        _check_estimates(steps, device, slowed_ns)
        good = sum(status == 200 for asked_s, status, _ in answers if asked_s > slowed_ns / 1e9 + 1)
        assert good / (AFTER_S - 1) >= 0.6 / SLOW_S, "of what a device can do that is slow"
        wrong = [took_s for _, status, took_s in answers if status == 200 and took_s > SLO_MS / 1000 + 0.2]
        assert not wrong, "nothing late is good, by the clients' clock"


def _check_answers(steps: list[Step]) -> None:
    """Nothing late is good, by the server's own clock."""
    deadlines = {
        one.request_id: one.deadline_ns for step in steps for one in step.events if isinstance(one, Request)
    }
    late = [
        step.now_ns - deadlines[one.request_id]
        for step in steps
        for one in step.effects
        if isinstance(one, Answer) and one.outcome is Outcome.OK and step.now_ns > deadlines[one.request_id]
    ]
    assert not late


def _check_estimates(steps: list[Step], device: str, slowed_ns: int) -> None:
    """The slow device's are right after a window of ten, the other's stay."""
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
    assert min(expected) >= BETWEEN_NS, "the step is adopted, and stays"
    others = [sent[one.action_id].expected_ns for one in results if one.device != device]
    assert sorted(others)[len(others) // 2] < BETWEEN_NS, "the other device is as it was"
