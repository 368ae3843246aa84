"""A Python model that ends its worker on some inputs is quarantined after three; others are served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Quarantined
from clockwork_serve.telemetry import read_journal
from harness import repositories
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.killers import KILLER

Start = Callable[..., AbstractContextManager[Serving]]

SLO = {"slo_ms": 20000}
RECOVERY_S = 30.0


@pytest.fixture
def serving(tmp_path: Path, start: Start) -> Iterator[Serving]:
    root = tmp_path / "models"
    repositories.python_model(root, "killer", KILLER)
    repositories.one_matrix(root, "m", repositories.matrix_of(1, 64, 16))
    # Requests wait for the worker to be back, rather than hear that there is none.
    controller = ControllerConfig(reject_infeasible=False)
    with start(root, controller=controller, journal=tmp_path / "journal") as serving:
        yield serving


def ask(serving: Serving, model: str, first: float) -> tuple[int, str]:
    """The status and reason of one request."""
    numbers = [first, *[0.0] * (63 if model == "m" else 3)]
    response = call(serving.http_url, f"/v2/models/{model}/infer", x_json(numbers, parameters=SLO))
    return response.status, (response.json or {}).get("reason", "")


def state(serving: Serving, model: str) -> tuple[str, str]:
    """What the index says of it."""
    index = call(serving.http_url, "/v2/repository/index", b"{}").json
    (entry,) = [entry for entry in index if entry["name"] == model]
    return entry["state"], entry.get("reason", "")


@pytest.mark.parametrize("deadly", [666.0, 667.0])
def test_three_kills_quarantine_a_model_until_it_is_loaded_again(
    serving: Serving, tmp_path: Path, deadly: float
) -> None:
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            answers.append(ask(serving, "m", 0.0))
            time.sleep(0.01)

    other = threading.Thread(target=others)
    other.start()
    try:
        first = ask(serving, "killer", deadly)
        assert ask(serving, "killer", 1.0) == (200, ""), "it answers what does not kill"
        second = ask(serving, "killer", deadly)
        assert (first, second) == ((500, "worker_lost"), (500, "quarantined"))
        assert total(serving.metrics(), "clockwork_workers_lost_total") == 3

        assert ask(serving, "killer", 1.0) == (500, "quarantined")
        body = x_json([1.0] * 4, parameters=SLO)
        said = call(serving.http_url, "/v2/models/killer/infer", body).json["error"]
        assert "took a device down 3 times" in said
        assert "clockwork models load killer" in said
        assert total(serving.metrics(), "clockwork_workers_lost_total") == 3
        assert total(serving.metrics(), "clockwork_model_quarantined", model="killer") == 1
        assert total(serving.metrics(), "clockwork_quarantines_total") == 1
        name, reason = state(serving, "killer")
        assert (name, "in quarantine" in reason) == ("UNAVAILABLE", True)
        assert state(serving, "m")[0] == "READY"
        assert call(serving.http_url, "/v2/models/killer/ready").status == 503
        ready = "/v2/models/m/ready"
        until("others are ready", lambda: call(serving.http_url, ready).status == 200, RECOVERY_S)

        assert call(serving.http_url, "/v2/repository/models/killer/load", b"{}").status == 200
        assert state(serving, "killer") == ("READY", "")
        assert ask(serving, "killer", 1.0) == (200, "")
        assert total(serving.metrics(), "clockwork_model_quarantined") == 0
    finally:
        stop.set()
        other.join()
    assert set(answers) == {(200, "")}, "every other request is answered"

    def told() -> list[Quarantined]:
        steps = read_journal(tmp_path / "journal")
        return [one for step in steps for one in step.effects if isinstance(one, Quarantined)]

    until("the journal shows both", lambda: len(told()) == 2, 60)
    assert [bool(one.why) for one in told()] == [True, False]


def test_a_model_that_answers_well_in_between_is_found_out_all_the_same(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "models"
    repositories.python_model(root, "killer", KILLER)
    with start(root) as serving:
        for _ in range(3):
            until("it answers", lambda: ask(serving, "killer", 1.0) == (200, ""), RECOVERY_S)
            status, reason = ask(serving, "killer", 666.0)
        assert (status, reason) == (500, "quarantined")
        assert total(serving.metrics(), "clockwork_workers_lost_total") == 3


ONCE = repositories.echoing(
    """
    import ctypes, pathlib

    if pathlib.Path("MARK").exists():
        ctypes.string_at(0)
    """
)
"""Where a file tells so, it ends whoever imports it, as some new library might."""


@pytest.mark.slow
def test_codes_that_kill_who_prepares_them_are_withheld_and_the_server_becomes_ready(
    tmp_path: Path, start: Start
) -> None:
    root, mark = tmp_path / "models", tmp_path / "mark"
    for name in ("first", "second"):
        repositories.python_model(root, name, ONCE.replace("MARK", str(mark)) + f"# {name}\n")
    repositories.one_matrix(root, "m", repositories.matrix_of(1, 64, 16))
    with start(root) as serving:
        assert ask(serving, "first", 1.0) == (200, "")
    mark.touch()
    with start(root) as serving:  # its profile is in the cache: the worker is the first to import it
        assert total(serving.metrics(), "clockwork_workers_lost_total") == 6
        for name in ("first", "second"):
            assert state(serving, name)[0] == "UNAVAILABLE"
            assert "preparing its code" in state(serving, name)[1]
            assert ask(serving, name, 1.0) == (500, "quarantined")
        assert ask(serving, "m", 0.0) == (200, "")

        refused = call(serving.http_url, "/v2/repository/models/first/load", b"{}")
        assert (refused.status, "in quarantine" in refused.json["error"]) == (400, True)
        assert total(serving.metrics(), "clockwork_workers_lost_total") == 9
        mark.unlink()
        assert call(serving.http_url, "/v2/repository/models/first/load", b"{}").status == 200
        assert ask(serving, "first", 1.0) == (200, "")
        assert ask(serving, "second", 1.0) == (500, "quarantined")
