"""How an overload is judged: on hand-made samples and executions."""

from __future__ import annotations

from pathlib import Path

from benchmarks.overload.__main__ import conclude, judge, runs_of
from benchmarks.overload.oracle import Run
from clockwork_serve.messages import Status
from clockwork_serve.telemetry import Journal
from clockwork_serve.units import ms
from harness.http_load import Sample
from tests.telemetry import stories

REFUSED = (429, b'{"reason":"would_miss_deadline"}')
GOOD = (200, b"")


def sample(slo_ms: int, sent_ms: float, done_ms: float, end: tuple[int, bytes]) -> Sample:
    status, body = end
    return Sample(str(slo_ms), ms(sent_ms), ms(sent_ms), ms(done_ms), status, b"", body)


def run(start_ms: float, end_ms: float, name: str) -> Run:
    return Run(ms(start_ms), ms(end_ms), frozenset([name]))


def test_a_fair_run_passes() -> None:
    samples = [
        sample(1200, 0, 501, GOOD), sample(100, 10, 12, REFUSED), sample(600, 20, 22, REFUSED),
        sample(1200, 30, 1002, GOOD), sample(1200, 40, 505, REFUSED),
    ]  # fmt: skip
    found = judge(samples, [run(0, 500, "0"), run(501, 1001, "3")])
    assert found.lags_ns == [ms(2), ms(2), ms(505 - 501)]
    assert (found.good, found.best, found.late_ns, found.could_have_joined) == (2, 2, [], 0)
    assert conclude(found, len(samples)).verdict == "passed"


def test_saying_no_late_or_to_what_could_be_served_is_found() -> None:
    samples = [sample(1200, 0, 501, GOOD), sample(1200, 30, 700, REFUSED), sample(100, 100, 700, REFUSED)]
    found = judge(samples, [run(0, 500, "0")])
    assert found.lags_ns == [-ms(30), ms(600)]
    assert found.could_have_joined == 1
    verdicts = {one.question: one.good for one in conclude(found, len(samples)).verdicts}
    assert [question for question, good in verdicts.items() if not good] == [
        "hopeless requests told after, p99",
        "rejected, but could have been served",
        "goodput of the offline best",
    ]


def test_a_late_answer_is_found() -> None:
    samples = [sample(600, 0, 601, GOOD), sample(600, 1, 5, (504, b""))]
    found = judge(samples, [run(101, 601, "0")])
    assert (found.late_ns, found.good, dict(found.other_ends)) == ([ms(1)], 0, {"504": 1})
    assert conclude(found, 2).verdict == "missed"


def test_executions_come_from_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.on_step(0, [], [stories.infer(1, "id-1"), stories.infer(2, "id-0"), stories.infer(3, "warm-up")])
    refused = stories.result(4, status=Status.TOO_LATE)
    journal.on_step(1, [stories.result(1), stories.result(2, took_ms=20), stories.result(3), refused], [])
    journal.close()
    samples = [sample(600, 0, 1, GOOD), sample(100, 1, 2, GOOD)]
    for index, one in enumerate(samples):
        one.headers = b"Clockwork-Request-Id: id-%d" % index

    found = runs_of(tmp_path / "j", samples)
    assert [run.names for run in found] == [frozenset({"1"}), frozenset({"0"}), frozenset()]
    assert found[1].end_ns - found[1].start_ns == ms(20)
