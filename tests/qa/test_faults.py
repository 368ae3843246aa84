"""What is made of a run with faults: figures from records, promises judged; and some rows played for real."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from clockwork_lab.bench.job import SenderMessage
from clockwork_lab.bench.records import FIRST_ENDS, ROW, End, Kind, Records
from clockwork_serve.units import NS_PER_MS
from clockwork_serve.workload.scenario import read_scenario
from qa.faults import kills, measure
from qa.faults import result as table
from qa.faults import run as judge
from qa.faults.measure import Played, scenario
from qa.faults.result import BROKEN, KEPT, Holding, Result
from qa.faults.rows import ROWS, Row
from qa.faults.run import play_row
from qa.faults.stage import SETUPS

ENDS = (
    *FIRST_ENDS, End(Kind.RESET, "closed"), End(Kind.BROKEN, "no connection: ECONNREFUSED"),
    End(Kind.REJECTED, "503 not_serving"), End(Kind.FAILED, "404 unknown_model"),
)  # fmt: skip
OPEN, ANSWERED, _, RESET, REFUSED, REJECTED, UNKNOWN = range(7)
START_NS = 1_000_000 * NS_PER_MS
ROW_OF_TESTS = Row("name", "what", "when", lambda stage: None)


def played(*requests: tuple[float, float | None, int], unexpected: int = 0) -> Played:
    """(due, took, end) each, in ms; a request that found no connection was never sent."""
    rows = np.zeros(len(requests), ROW)
    for at, (due, took, end) in enumerate(requests):
        rows[at]["scheduled_ns"] = due * NS_PER_MS
        rows[at]["sent_ns"] = 0 if end == REFUSED else max(1, due * NS_PER_MS)
        rows[at]["last_ns"] = 0 if took is None else (due + took) * NS_PER_MS
        rows[at]["slo_ns"] = 100 * NS_PER_MS
        rows[at]["end"] = end
    return Played(Records(rows, ENDS), [SenderMessage(unexpected=unexpected)], START_NS)


def found(
    run: Played, *marks_ms: float, resets: tuple[tuple[float, float], ...] = (), row: Row = ROW_OF_TESTS
) -> Result:
    result = Result(name=row.name, what="", when="", setup="two")
    marks = [START_NS + round(mark * NS_PER_MS) for mark in marks_ms]
    windows = [(START_NS + round(a * NS_PER_MS), START_NS + round(b * NS_PER_MS)) for a, b in resets]
    measure.fill(result, measure.Seen(run, marks, windows), run)
    judge.conclude(result, row)
    return result


def steady(until_ms: float, gap: tuple[float, float] = (0, 0), end: int = REJECTED) -> Played:
    """A request every 10 ms, answered after 5, but in the gap."""
    return played(
        *((due, 5, end if gap[0] <= due < gap[1] else ANSWERED) for due in np.arange(0, until_ms, 10.0))
    )


def test_a_run_without_a_fault_keeps_every_promise() -> None:
    one = found(steady(4000), 1000)
    assert (one.status, one.wrong, one.ends.good, one.ends.sent) == (KEPT, [], 400, 400)
    assert (one.whole_ms, one.goodput.share) == (0, (1, 1, 1))


def test_the_time_without_goodput_is_measured_from_the_fault() -> None:
    one = found(steady(6000, (1000, 1500)), 1000)
    assert one.ends.rejected == 50
    assert one.first_good_ms == pytest.approx(505)
    assert one.whole_ms == pytest.approx(500, abs=60)
    assert one.goodput.share[1] == pytest.approx(0.5, abs=0.02)
    assert one.status == KEPT


def test_what_never_comes_back_is_told() -> None:
    one = found(steady(6000, (1000, 6000)), 1000)
    assert (one.first_good_ms, one.whole_ms, one.status) == (None, None, BROKEN)


def test_each_request_without_exactly_one_answer_is_told() -> None:
    whole = [(due, 5, ANSWERED) for due in np.arange(0, 4000, 10.0)]
    assert found(played(*whole, (1000, None, OPEN)), 1000).wrong == ["1 requests lost"]
    assert found(played(*whole, (1000, 5, RESET)), 1000).wrong == ["1 requests lost"]
    assert found(played(*whole, unexpected=2), 1000).wrong == ["2 answered twice"]
    assert found(played(*whole, (1000, 151, ANSWERED)), 1000).wrong == ["1 late answers sent as good ones"]
    assert found(played(*whole, (1000, 151, REJECTED)), 1000).wrong == [
        "1 heard more than 50 ms after their deadline"
    ]
    assert found(played(*whole, (1000, 5, REFUSED)), 1000).wrong == ["1 found no connection"]
    assert found(played(*whole, (1000, 5, UNKNOWN)), 1000).wrong == ["1 were told 404 unknown_model"]


def test_a_killed_gateway_may_reset_what_was_in_flight_and_nothing_else() -> None:
    row = ROWS["gateway-kill"]
    whole = [(due, 5, ANSWERED) for due in np.arange(0, 4000, 10.0)]
    died = ((1000.0, 1004.0),)
    one = found(played(*whole, (998, 4, RESET), (1002, 5, RESET)), 1000, resets=died, row=row)
    assert (one.wrong, one.ends.reset, one.in_flight) == ([], 2, 6)
    one = found(played(*whole, (900, 4, RESET), (1500, 4, RESET)), 1000, resets=died, row=row)
    assert one.wrong == ["2 requests lost"]


def test_growth_and_unequal_books_are_told() -> None:
    held = Holding(pid=(1, 1), rss_mib=(50, 50 + 2 * judge.GROWTH_MIB), files=(20, 21), threads=(3, 3))
    one = Result(
        name="", what="", when="", setup="", first_good_ms=1, whole_ms=1, holdings={"gateway-0": held},
        segments=(1, 2), books={"open": 1}, tracebacks=1,
    )  # fmt: skip
    judge.conclude(one, ROW_OF_TESTS)
    assert one.wrong == [
        "1 tracebacks in the log", "books: open: 1", "gateway-0 grew: +96 MiB, +1 files, +0 threads",
        "1 more segments of shared memory",
    ]  # fmt: skip


def test_what_is_possible_while_one_of_two_is_away() -> None:
    assert kills.possible(0.45, 2.0, 5.0) == 1
    assert kills.possible(0.7, 0.525, 5.0) == pytest.approx(0.97)
    assert kills.load_of("two") == pytest.approx(0.45)
    assert kills.load_of("two70") == pytest.approx(0.7)


def test_results_become_a_page_and_a_file_and_are_read_again(tmp_path: Path) -> None:
    one = found(steady(4000), 1000)
    record = table.Record(machine="m", command="c", short=True, results=[one, Result(
        name="clock", what="w", when="x", setup="two", notes=["not permitted"]
    )])  # fmt: skip
    page, file = tmp_path / "page.md", tmp_path / "result.json"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    table.write(file, record)
    table.into_page([file], page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| name | ,  | 400/400 | 0 |  |" in text
    assert "- lost: 0 in every row; twice: 0 in every row;" in text
    assert "`clock` was not measured: not permitted" in text
    assert "1 of 2 faults: every promise kept; broken: none" in table.text(record.results)


def test_every_row_has_a_set_up_and_a_load_that_can_be_drawn(tmp_path: Path) -> None:
    assert len(ROWS) >= 40
    assert sum(row.quick for row in ROWS.values()) >= 10
    for name, row in ROWS.items():
        assert name == row.name
        path = tmp_path / "scenario.toml"
        path.write_text(scenario(SETUPS[row.setup], 5.0, (1.0, 2.0) if row.idle else None))
        assert read_scenario(path).seconds == 5.0


PLAYED = (
    "worker-kill-load", "worker-kill-infer", "worker-kill-start", "gateway-kill", "gateway-kill-body",
    "two-gateway-controller", "cache-removed", "client-resets-answer", "link-cut", "observer-stop",
)  # fmt: skip

TIMES = re.compile("90 % of goodput|first good|late answers|heard more")


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(600)
def test_faults_done_to_real_processes_lose_no_request(tmp_path: Path) -> None:
    """How long anything took is not judged here: machines of tests are shared."""
    wrong = {}
    for name in PLAYED:
        one = play_row(ROWS[name], short=True, seed=1, cache=tmp_path, stopped=threading.Event())
        assert one.ends.good, name
        if left := [words for words in one.wrong if not TIMES.search(words)]:
            wrong[name] = (left, one.reasons)
    assert not wrong
