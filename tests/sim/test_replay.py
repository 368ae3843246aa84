"""A journal decides again what it decided, whatever the seed; what differs is named where it begins."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import integers

import clockwork_serve
from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Infer, Outcome, Request
from clockwork_serve.sim.replay import replay
from clockwork_serve.telemetry import Journal, JournalHead, Step, head_of, read_records
from clockwork_serve.telemetry.journal import PYTHON, sources_hash
from tests.sim.journals import SEED, written
from tests.telemetry import stories

WRITE = (
    "import sys; from pathlib import Path; from tests.sim.journals import written; "
    "written(Path(sys.argv[1]), int(sys.argv[2]))"
)
ROOT = Path(__file__).parents[2]


def rewritten(path: Path, change) -> Path:
    """The same journal with each step changed by ``change(number, step)``; None leaves it out."""
    records = [record for _, record in read_records(path)]
    path.unlink()
    assert isinstance(records[0], JournalHead)
    journal = Journal(path, records[0])
    for number, step in enumerate(records[1:], start=2):
        if isinstance(step, JournalHead):
            journal._append(step)
        elif (changed := change(number, step)) is not None:
            journal._unsaid = changed.dropped
            journal.on_step(changed.now_ns, changed.events, changed.effects)
    journal.close()
    return path


@settings(max_examples=12, deadline=None)
@given(integers(0, 1 << 20))
@example(SEED)
def test_the_journal_of_any_seed_replays_the_same(seed):
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "journal", seed)
        steps = sum(isinstance(record, Step) for _, record in read_records(path))

        replayed = replay(path, checks=True)

    assert replayed.agrees, replayed.difference
    assert replayed.decisions == steps > 0
    assert replayed.runs[0].other_build == ""


@pytest.mark.parametrize("writer", ["as it is here", "without mypyc"])
def test_another_process_and_another_build_wrote_it_and_it_replays_the_same(tmp_path, writer):
    here = Path(clockwork_serve.__file__).parents[1]
    sources = [here] if writer == "as it is here" else sorted(ROOT.glob("packages/*/src"))
    path = os.pathsep.join(map(str, (*sources, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", WRITE, str(tmp_path / "journal"), str(SEED)]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)

    replayed = replay(tmp_path / "journal")

    assert replayed.agrees, replayed.difference
    here = head_of(ControllerConfig()).build
    assert replayed.runs[0].head.build == (PYTHON if writer == "without mypyc" else here)


def test_the_first_difference_is_named_with_record_time_event_and_both_effects(tmp_path):
    def change(number: int, step: Step) -> Step:
        effects = tuple(
            Answer(request_id=one.request_id, gateway=one.gateway, outcome=Outcome.CANCELLED)
            if isinstance(one, Answer) and number > 100
            else one
            for one in step.effects
        )
        return Step(step.now_ns, step.events, effects)

    path = written(tmp_path / "journal")
    first = next(
        (number, step)
        for number, (_, step) in enumerate(read_records(path), start=1)
        if number > 100 and any(isinstance(one, Answer) for one in step.effects)
    )
    found = replay(rewritten(path, change)).difference

    assert found is not None
    assert (found.record, found.now_ns, found.events) == (first[0], first[1].now_ns, first[1].events)
    assert isinstance(found.expected, Answer)
    assert found.expected.outcome is Outcome.CANCELLED
    assert found.found == first[1].effects[found.at]


def test_an_effect_too_many_or_too_few_is_a_difference(tmp_path):
    path = written(tmp_path / "journal")

    def more(number: int, step: Step) -> Step:
        return Step(
            step.now_ns, step.events, (*step.effects, stories.infer(1, "x")) if number == 50 else step.effects
        )

    found = replay(rewritten(path, more)).difference
    assert found is not None
    assert (found.record, found.found, type(found.expected)) == (50, None, Infer)


def test_an_event_left_out_is_noticed(tmp_path):
    def without_workers(number: int, step: Step) -> Step:
        return Step(step.now_ns, step.events[1:] if number > 60 else step.events, step.effects)

    assert not replay(rewritten(written(tmp_path / "journal"), without_workers)).agrees


def test_a_controller_that_broke_breaks_again_and_it_is_said_where(tmp_path):
    def twice(number: int, step: Step) -> Step:
        requests = [one for one in step.events if isinstance(one, Request)]
        return Step(step.now_ns, (*step.events, *requests), step.effects)

    found = replay(rewritten(written(tmp_path / "journal"), twice)).difference

    assert found is not None
    assert "came twice" in found.broke
    assert isinstance(found.events[-1], Request)


def test_a_torn_chunk_is_told_and_all_before_it_is_replayed(tmp_path, monkeypatch):
    monkeypatch.setattr("clockwork_serve.telemetry.journal.CHUNK_BYTES", 1000)
    path = written(tmp_path / "journal")
    whole = replay(path).decisions
    path.write_bytes(path.read_bytes()[:-3])

    replayed = replay(path)

    assert replayed.agrees
    assert whole - 20 < replayed.decisions < whole
    assert replayed.runs[0].torn_bytes == 3


def test_runs_that_follow_one_another_are_each_replayed_even_after_a_torn_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("clockwork_serve.telemetry.journal.CHUNK_BYTES", 1000)
    path = written(tmp_path / "journal")
    first = replay(path)
    last = len(first.runs) - 1
    path.write_bytes(path.read_bytes()[:-3])
    written(path, SEED + 1)

    replayed = replay(path)

    assert replayed.agrees
    assert first.runs[last].decisions - 20 < replayed.runs[last].decisions < first.runs[last].decisions
    assert len(replayed.runs) > last + 1
    before = sum(run.decisions for run in replayed.runs[: last + 1])
    assert replayed.runs[last + 1].first_record == before + last + 2


def test_steps_missing_in_the_middle_end_the_replay_without_a_verdict(tmp_path):
    def gap(number: int, step: Step) -> Step | None:
        if number == 70:
            return None
        return Step(step.now_ns, step.events, step.effects, dropped=1 if number == 71 else 0)

    replayed = replay(rewritten(written(tmp_path / "journal"), gap))

    assert replayed.difference is None
    assert not replayed.agrees
    assert (replayed.decisions, replayed.runs[0].gap) == (68, 1)


def test_a_journal_without_its_beginning_says_so(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.on_step(1, [stories.request("a")], [])
    journal.close()

    with pytest.raises(ConfigError, match="the record that begins a run"):
        replay(tmp_path / "journal")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": 3}, "expected format 2; found 3, of clockwork 9.9"),
        ({"config": {"policy": "default", "magic": 3}}, "found magic, of clockwork 9.9"),
        (
            {"config": {"policy": "oracle"}},
            f"policy: expected one of {', '.join(POLICIES)}.*; found 'oracle'",
        ),
        ({"config": {"max_batch": "many"}}, "its settings of the controller are wrong"),
    ],
)
def test_a_journal_that_this_version_cannot_replay_says_why(tmp_path, fields, said):
    here = head_of(ControllerConfig())
    head = JournalHead(**{
        "version": "9.9", "sources": here.sources, "build": PYTHON, "python": "3.99", "started": "",
        "config": here.config, **fields,
    })  # fmt: skip
    Journal(tmp_path / "journal", head).close()

    with pytest.raises(ConfigError, match=said):
        replay(tmp_path / "journal")


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"version": "9.9"}, "clockwork 9.9 wrote it"), ({"sources": "abc"}, "other code wrote it")],
)
def test_another_version_and_other_code_are_told_and_replayed(tmp_path, fields, said):
    here = head_of(ControllerConfig())
    head = JournalHead(**{
        "version": here.version, "sources": here.sources, "build": PYTHON, "python": "", "started": "",
        "config": here.config, **fields,
    })  # fmt: skip
    Journal(tmp_path / "journal", head).close()

    replayed = replay(tmp_path / "journal")

    assert replayed.agrees
    assert said in replayed.runs[0].other_build


def test_the_hash_of_sources_is_that_of_what_decides(tmp_path):
    package = Path(clockwork_serve.__file__).parent
    assert head_of(ControllerConfig()).sources == sources_hash(package)
    assert sources_hash(tmp_path) == ""
    (tmp_path / "controller").mkdir()
    (tmp_path / "controller" / "a.py").write_text("1")
    one = sources_hash(tmp_path)
    (tmp_path / "controller" / "a.py").write_text("2")
    assert "" != one != sources_hash(tmp_path)
