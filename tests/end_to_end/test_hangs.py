"""Workers that stop or hang: found, planned around, taken back if they answer after all, ended if not."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import pytest

from clockwork_serve.messages import WorkerHung
from clockwork_serve.serve.supervisor.server import RunningServer
from clockwork_serve.telemetry import read_journal
from harness import repositories
from harness.http_load import closed_loop, infer_message, run
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import WIDE, call, x_json
from tests.end_to_end.two_workers import SOON, busiest, two_workers
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]

HANGING = repositories.echoing(
    "import pathlib, time",
    """
    if mood == 666.0:
        while True:
            pass
    if mood == 667.0:
        time.sleep(1000)
    if mood == 668.0 and not pathlib.Path("MARK").exists():
        pathlib.Path("MARK").touch()
        time.sleep(1000)
    """,
)
"""Some numbers are never answered."""
RECOVERY_S = 30.0
"""Far above what is promised: these machines are shared."""
LONG = {"slo_ms": 20000}


def ask(url: str, model: str, first: float = 0.0, slo_ms: float = 20000) -> tuple[int, str]:
    """The status and reason of one request."""
    numbers = [first, *[0.0] * (WIDE - 1 if model.startswith("m") else 3)]
    response = call(url, f"/v2/models/{model}/infer", x_json(numbers, parameters={"slo_ms": slo_ms}))
    return response.status, (response.json or {}).get("reason", "")


def note(text: str) -> None:
    """For who runs it with ``-s``: what was measured."""
    sys.stderr.write(f"{text}\n")


def ready(url: str) -> bool:
    """Whether the server says that it serves."""
    return call(url, "/v2/health/ready").status == 200


def pids(server: RunningServer) -> list[int]:
    """Of the workers that run."""
    found = [server.pid(name) for name in server.names if name.startswith("worker")]
    return [pid for pid in found if pid is not None]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Four matrices, and a class that may hang."""
    root = tmp_path / "models"
    for index in range(4):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, 16))
    repositories.python_model(root, "hanging", HANGING.replace("MARK", str(tmp_path / "mark")))
    return root


def balanced(serving: Serving) -> None:
    """Every request came to one end."""
    until("all are over", lambda: not total(serving.metrics(), "clockwork_requests_open"), RECOVERY_S)
    metrics = serving.metrics()
    assert total(metrics, "clockwork_requests_received_total") == total(metrics, "clockwork_requests_total")
    assert total(metrics, "clockwork_answers_unmatched_total") == 0


class Background:
    """One client that asks a model all the time."""

    def __init__(self, url: str, model: str) -> None:
        self.answers: list[tuple[float, int, str]] = []
        self._url, self._model = url, model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            status, reason = ask(self._url, self._model, slo_ms=2000)
            self.answers.append((time.monotonic(), status, reason))
            time.sleep(0.01)


def test_a_stopped_worker_under_load_costs_no_client_its_one_response(
    models: Path, cache: Path, caplog: pytest.LogCaptureFixture, timing: Timing
) -> None:
    lines: list[str] = []
    with two_workers(models, cache, lines) as serving:
        for index in range(4):
            assert ask(serving.http_url, f"m{index}") == (200, "")
        serving.worker = busiest(serving)
        victim, stopped_s = serving.worker_pid(), [0.0]
        message = {
            index: infer_message(
                serving.http_url, f"m{index}", [("x", "FP32", (1, WIDE), bytes(4 * WIDE))], slo_ms=2000
            )
            for index in range(4)
        }

        def messages(index: int) -> bytes:
            if index == 1500:
                stopped_s[0] = time.monotonic()
                os.kill(victim, signal.SIGSTOP)
            return message[index % 4]

        report = run(closed_loop(serving.http_url, messages, requests=6000, connections=40))
        assert len(report.samples) == 6000
        assert (report.unanswered, report.unexpected_bytes) == (0, 0)
        with timing.judged():
            assert report.ends()["200"] >= 5000, report.ends()
        until("it is ended", lambda: serving.server.pid(serving.worker) not in (None, victim), RECOVERY_S)
        until("both are warm", lambda: total(serving.metrics(), "clockwork_device_up") == 2, RECOVERY_S)
        note(f"another worker is up {time.monotonic() - stopped_s[0]:.2f} s after the stop; {report.ends()}")
        metrics = serving.metrics()
        with timing.judged():  # no other was stopped for as long
            assert total(metrics, "clockwork_workers_hung_total") == 1
            assert total(metrics, "clockwork_workers_ended_total") == 1
        assert total(metrics, "clockwork_quarantines_total") == 0
        balanced(serving)
    assert any("INFER" in line and "late" in line for line in lines), lines
    assert any("was stopped by a signal" in record.message for record in caplog.records)


def _stop_for(serving: Serving, client: Background, timing: Timing, stop_s: float, ends: int) -> None:
    """Stop the busy worker for a while, and wait until all is well."""
    until("it answers", lambda: len(client.answers) > 20, RECOVERY_S)
    serving.worker = busiest(serving)
    victim = serving.worker_pid()
    other = next(pid for pid in pids(serving.server) if pid != victim)
    os.kill(victim, signal.SIGSTOP)
    time.sleep(stop_s)
    try:
        os.kill(victim, signal.SIGCONT)
    except ProcessLookupError:
        with timing.judged():
            assert ends
    until("both are up", lambda: total(serving.metrics(), "clockwork_device_up") == 2, RECOVERY_S)
    seen = len(client.answers)
    until("it answers", lambda: len(client.answers) > seen + 20, RECOVERY_S)
    with timing.judged():
        assert {status for _, status, _ in client.answers[-10:]} == {200}
        assert other in pids(serving.server), "the other worker was left alone"
        assert (victim not in pids(serving.server)) == bool(ends)


@pytest.mark.parametrize(("stop_s", "hangs", "ends"), [(0.05, 0, 0), (0.7, 1, 0), (10.0, 1, 1)])
@pytest.mark.slow
def test_a_worker_that_goes_on_comes_back_without_a_restart_if_it_is_soon(
    models: Path, cache: Path, timing: Timing, stop_s: float, hangs: int, ends: int
) -> None:
    with two_workers(models, cache, []) as serving:
        with Background(serving.http_url, "m0") as client:
            _stop_for(serving, client, timing, stop_s, ends)
        metrics = serving.metrics()
        with timing.judged():
            assert total(metrics, "clockwork_workers_ended_total") == ends
            assert total(metrics, "clockwork_workers_hung_total") == hangs
        balanced(serving)


def test_the_only_worker_stopped_idle_is_found_by_its_silence_and_clients_hear_at_once(
    models: Path, start: Start, timing: Timing
) -> None:
    with start(models, controller=SOON) as serving:
        assert ask(serving.http_url, "m0") == (200, "")
        victim = serving.worker_pid()
        os.kill(victim, signal.SIGSTOP)
        stopped_s = time.monotonic()
        until("it is not ready", lambda: not ready(serving.http_url), RECOVERY_S)
        found_s = time.monotonic() - stopped_s
        asked_s = time.monotonic()
        answer = ask(serving.http_url, "m0")
        took_s = time.monotonic() - asked_s
        until("it is ready again", lambda: ready(serving.http_url), RECOVERY_S)
        note(f"found after {found_s:.2f} s, served again after {time.monotonic() - stopped_s:.2f} s")
        assert ask(serving.http_url, "m0") == (200, "")
        assert serving.worker_pid() != victim
        with timing.judged():  # it was not ready yet when it was asked
            assert answer == (503, "not_serving")
            assert took_s < 2.0, "nobody waits for a no"
        assert total(serving.metrics(), "clockwork_quarantines_total") == 0
        balanced(serving)


@pytest.mark.parametrize("deadly", [666.0, 667.0])
@pytest.mark.slow
def test_a_model_that_hangs_is_quarantined_after_three_workers_and_others_go_on(
    models: Path, start: Start, tmp_path: Path, deadly: float, timing: Timing
) -> None:
    with start(models, controller=SOON, journal=tmp_path / "journal") as serving:
        url = serving.http_url
        answers = []
        for _ in range(6):
            until("it serves", lambda: ask(url, "m0", slo_ms=1000) == (200, ""), RECOVERY_S)
            answers.append(ask(url, "hanging", deadly, slo_ms=1000))
            if answers[-1] == (500, "quarantined"):
                break
        until("it serves", lambda: ask(url, "m0", slo_ms=1000) == (200, ""), RECOVERY_S)
        with timing.judged():  # nothing else seemed to hang
            assert ask(url, "hanging", 1.0) == (500, "quarantined"), answers
            assert total(serving.metrics(), "clockwork_workers_ended_total") == 3
        body = x_json([1.0] * 4, parameters=LONG)
        said = call(url, "/v2/models/hanging/infer", body).json["error"]
        assert "it took a device down 3 times" in said
        assert "running a request, where it hung" in said
        assert total(serving.metrics(), "clockwork_model_quarantined") == 1
        assert call(url, "/v2/repository/models/hanging/load", b"{}").status == 200
        assert ask(url, "hanging", 1.0) == (200, "")
        balanced(serving)

    told = [one for step in read_journal(tmp_path / "journal") for one in step.effects]
    hung = [one for one in told if isinstance(one, WorkerHung)]
    with timing.judged():
        assert Counter(one.end for one in hung) == {False: 3, True: 3}
        assert all("INFER of hanging/1" in one.why for one in hung)


def test_a_model_that_hangs_once_costs_one_worker_and_is_served_again(
    models: Path, start: Start, timing: Timing
) -> None:
    with start(models, controller=SOON) as serving:
        url, victim = serving.http_url, serving.worker_pid()
        status, reason = ask(url, "hanging", 668.0)
        assert (status, reason) in {(503, "not_serving"), (200, "")}
        until("it serves", lambda: ask(url, "hanging", 668.0) == (200, ""), RECOVERY_S)
        assert serving.worker_pid() != victim
        metrics = serving.metrics()
        with timing.judged():
            assert total(metrics, "clockwork_workers_ended_total") == 1
        assert total(metrics, "clockwork_quarantines_total") == 0
        balanced(serving)


def test_a_model_that_hangs_while_the_controller_dies_is_found_by_the_next(
    models: Path, start: Start, tmp_path: Path, timing: Timing
) -> None:
    with start(models, controller=SOON) as serving:
        url, victim = serving.http_url, serving.worker_pid()
        controller = serving.server.pid("controller")
        assert controller is not None
        asking = threading.Thread(target=ask, args=(url, "hanging", 668.0))
        asking.start()
        until("it hangs", (tmp_path / "mark").exists, RECOVERY_S)
        os.kill(controller, signal.SIGKILL)
        until(
            "another is there", lambda: serving.server.pid("controller") not in (None, controller), RECOVERY_S
        )
        until("it serves", lambda: ask(url, "hanging", 668.0, slo_ms=1000) == (200, ""), RECOVERY_S)
        asking.join()
        assert serving.worker_pid() != victim
        with timing.judged():
            assert total(serving.metrics(), "clockwork_workers_ended_total") == 1
        balanced(serving)
