"""What is judged of a server on Ray whose roles were killed; and the short form of that, on a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from clockwork_serve.units import NS_PER_S
from harness.http_load import Report, Sample
from harness.report import Outcome
from qa.engine import BACK_S, Hit, Stage, judge_addresses, judge_load

ROOT = Path(__file__).parents[2]


def sample(due_s: float, status: int = 200, took_s: float = 0.01) -> Sample:
    due_ns = round(due_s * NS_PER_S)
    return Sample("", due_ns, due_ns, due_ns + round(took_s * NS_PER_S), status)


def hit(kind: str, at_s: float, back_s: float = 2.0) -> Hit:
    return Hit("process", kind, round(at_s * NS_PER_S), round((at_s + back_s) * NS_PER_S))


def missed(report: Report, *hits: Hit) -> list[str]:
    outcome = Outcome("qa.engine")
    judge_load(outcome, report, list(hits))
    return [one.question for one in outcome.verdicts if not one.good]


HITS = (hit("controller", 20), hit("worker", 40))


def test_what_a_lost_controller_cannot_answer_is_no_miss() -> None:
    assert missed(Report([sample(10), sample(21, status=503), sample(41)]), *HITS) == []


@pytest.mark.parametrize(
    ("word", "report"),
    [
        ("no kill touched", Report([sample(30, status=503)])),
        ("could wait", Report([sample(41, status=503)])),
        ("without a response", Report([sample(21, status=0)])),
        ("answered twice", Report([sample(10)], unexpected_bytes=1)),
    ],
)
def test_each_promise_can_be_missed(word: str, report: Report) -> None:
    assert any(word in question for question in missed(report, *HITS))


def test_who_comes_back_late_is_told() -> None:
    assert len(missed(Report(), hit("worker", 1, back_s=2 * BACK_S + 1))) == 1


def test_where_no_network_may_be_made_it_says_why(tmp_path: Path) -> None:
    outcome = Outcome("qa.engine")

    judge_addresses(outcome, Stage(tmp_path, None, 0, 1, on_loopback="no right"))

    assert [one.found for one in outcome.verdicts] == ["not run: no right"]


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed, for it is large: make engine does it"
)
def test_a_server_is_brought_up_on_ray_hit_and_ended(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "qa.engine", "--short", "--json", str(told)]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert told.is_file(), ended.stderr[-2000:]
    found = json.loads(told.read_text())
    assert found["invalid"] == "", found
    late = {one["question"] for one in found["verdicts"] if not one["good"]}
    # How long things take on a machine that others use is for `make engine` to judge.
    assert {question for question in late if "all is back" not in question} == set(), found["verdicts"]
