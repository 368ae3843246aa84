"""In which order promises are measured, what is kept, and what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from comparison.peers.measure import cores
from comparison.peers.run import write_result
from comparison.promises import __main__ as program
from comparison.promises.cost import between, by_role, total_s
from comparison.promises.question import (
    MARKS,
    Question,
    Row,
    Runs,
    at_least,
    at_most,
    column,
    machines,
    missed,
    paired,
    write_page,
)
from comparison.promises.rig import Rig

ROOT = Path(__file__).parents[3]


def measure(rig: Rig, variant: str, repeat: int) -> dict[str, Any]:
    if variant == "broken":
        raise RuntimeError("it fell\nover")
    return {"value": 10.0 * repeat, "others_share": 0.01 * repeat}


def rows(runs: Runs) -> list[Row]:
    return [Row("how much | of it", column(runs, "a", "value"), "{:.0f} ms", at_most(15))]


SMALL = Question("small", "A small one", ("a", "b", "c"), measure, rows)


def keep(out: Path, *repeats: int) -> None:
    for repeat in repeats:
        point = program.Point(SMALL, "a", repeat)
        result = {
            "status": "measured",
            "variant": "a",
            "repeat": repeat,
            "figures": measure(Rig(out), "a", repeat),
        }
        write_result(point.path(out), result)


def test_variants_take_turns_and_each_repeat_begins_with_another() -> None:
    other = Question("other", "", ("x",), measure, rows)
    order = [(one.repeat, one.question.name, one.variant) for one in program.points([SMALL, other], 2)]

    assert order == [
        (1, "small", "a"), (1, "small", "b"), (1, "small", "c"), (1, "other", "x"),
        (2, "small", "b"), (2, "small", "c"), (2, "small", "a"), (2, "other", "x"),
    ]  # fmt: skip


def test_all_questions_have_names_of_their_own_and_rows_before_anything_is_measured() -> None:
    assert len({one.name for one in program.QUESTIONS}) == len(program.QUESTIONS) == 6
    for question in program.QUESTIONS:
        assert question.rows({})
        assert all(row.verdict == "nothing to judge" for row in question.rows({}))


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    result = program.run(program.Point(SMALL, "broken", 1), Rig(tmp_path), 0.0)

    assert (result["status"], result["why"]) == ("failed", "it fell\nover")


@pytest.mark.parametrize(
    ("goal", "values", "verdict"),
    [
        (at_most(10), [9, 10, 30], "met"), (at_most(10), [9, 11, 30], "missed"),
        (at_least(10), [1, 10, 10], "met"), (at_least(10), [1, 9, 10], "missed"),
        (at_most(0, every=True), [0, 0, 1], "missed"), (at_most(0, every=True), [0, 0, 0], "met"),
        (None, [1], ""), (at_most(1), [None, float("nan")], "nothing to judge"),
    ],
)  # fmt: skip
def test_the_median_is_judged_or_every_repeat(goal: Any, values: list[float], verdict: str) -> None:
    assert Row("", values, "{:.0f}", goal).verdict == verdict


def test_a_table_shows_medians_the_goal_and_the_share_of_others(tmp_path: Path) -> None:
    keep(tmp_path, 1, 2, 3)
    write_result(tmp_path / "results" / "small" / "b-1.json", {"status": "failed", "why": "x"})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    write_page(page, tmp_path, [SMALL])

    wanted = "| how much / of it | at most 15 ms | 20 ms (10 ms to 30 ms) | missed | 3.0 |"
    assert wanted in page.read_text().splitlines()
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    told = machines(tmp_path, [SMALL])["questions"]["small"]["rows"][0]
    assert (told["values"], told["verdict"], told["found"]["median"]) == ([10, 20, 30], "missed", 20)
    assert missed(tmp_path, [SMALL]) == ["how much | of it"]
    json.dumps(machines(tmp_path, [SMALL]), allow_nan=False)


def test_variants_are_paired_by_repeat() -> None:
    runs = {"a": {1: {"v": 8}, 2: {"v": 6}}, "b": {2: {"v": 3}, 3: {"v": 1}}}

    assert paired(runs, "a", "b", lambda one, other: one["v"] / other["v"]) == [2]


def test_processes_without_a_reading_before_count_whole_and_whoever_has_no_name_is_the_keeper() -> None:
    before = {"worker": {"user_s": 1.0, "system_s": 2.0}}
    after = {"worker": {"user_s": 3.0, "system_s": 2.5}, "gateway": {"user_s": 1.0, "system_s": 0.0}}
    used = between(before, after)
    assert used["worker"] == {"user_s": 2, "system_s": 0.5}
    assert total_s(used) == 3.5
    assert total_s(by_role([os.getpid()])) > 0
    assert list(by_role([os.getpid()])) == ["keeper"]


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "QUESTIONS", (Question("small", "", ("a",), measure, rows),))
    keep(tmp_path, 1)

    assert program.main(["--out", str(tmp_path), "--repeats", "1", "--only", "small"]) == 0


def test_an_unknown_question_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--only", "zipf,nosuch"])

    assert "expected some of zipf, worst" in capsys.readouterr().err


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.skipif(bool(cores()), reason=f"needs two cores: {cores()}")
def test_clients_that_hang_up_are_measured_on_a_real_server(tmp_path: Path) -> None:
    code = (
        "import sys; from comparison.promises import __main__ as program, abandoned;"
        "abandoned.SECONDS, abandoned.MODELS, abandoned.RATE, abandoned.GRACE_S = 2, 2, 400, 1;"
        "sys.exit(program.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--out", str(tmp_path), "--only", "abandoned", "--repeats", "1"]
    path = os.pathsep.join(map(str, (ROOT, *ROOT.glob("packages/*/src"))))
    process = subprocess.Popen(
        [*command, "--patience", "0"], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=100)
    finally:
        process.terminate()
        process.wait(60)
    for variant in ("http", "grpc"):
        told = json.loads((tmp_path / "results" / "abandoned" / f"{variant}-1.json").read_text())
        assert told["status"] == "measured", told
        figures = told["figures"]
        answered = figures["ends"].get("200", 0) + figures["ends"].get("OK", 0)
        assert figures["hung_up"] > 0
        # As many as were asked have an end (on a busy machine some are a no), and the device told of those
        # that were answered.
        assert sum(figures["ends"].values()) == figures["asked"]
        assert figures["answered_and_ran"] == answered > 0, figures
    assert "executions begun more than 20 ms after" in said
