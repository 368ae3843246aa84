"""What records say, and what several runs say together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec import structs

from clockwork_lab.bench.records import Head
from comparison.peers import record
from comparison.peers.record import Played

MS = 1_000_000
ROW = np.dtype([(name, "<i8") for name in ("scheduled_ns", "sent_ns", "last_ns", "slo_ns", "load", "end")])
ENDS = ["none", "ok", "rejected", "expired", "failed"]
HEAD = Head(
    version="", scenario="", url="", seed=1, warmup_ns=1000 * MS, end_ns=3000 * MS, models=(), row=(), rows=0,
    loads=("requests",), ends=tuple((end, "") for end in ENDS),
)  # fmt: skip


def row(at_ms: int, age_ms: int, end: str, *, load: int = 0, slo_ms: int = 100) -> tuple[int, ...]:
    due = at_ms * MS
    return due, due + MS, due + age_ms * MS, slo_ms * MS, load, ENDS.index(end)


def figures(*rows: tuple[int, ...], **head: Any) -> dict[str, Any]:
    return record.figures(Played(structs.replace(HEAD, **head), np.array(list(rows), ROW), ENDS))


def test_an_answer_counts_until_its_deadline_and_a_refusal_never() -> None:
    found = figures(
        row(1000, 100, "ok"), row(1001, 101, "ok"), row(1002, 5, "rejected"), row(1003, 100, "expired"),
        row(1004, 5, "failed"), row(1005, 0, "none"),
    )  # fmt: skip

    wanted = {"asked": 6, "in_time": 1, "late": 1, "rejected": 1, "expired": 1, "failed": 1, "none": 1}
    assert {key: found[key] for key in wanted} == wanted
    assert found["in_time_per_s"] == 0.5
    assert found["in_time_share"] == pytest.approx(1 / 6)
    assert (found["p50_ms"], found["no_p50_ms"]) == (100, 5)


def test_requests_of_the_warm_up_do_not_count() -> None:
    assert figures(row(999, 1, "ok"), row(1000, 1, "ok"))["asked"] == 1


def test_few_values_have_no_p99() -> None:
    few = figures(*(row(1000 + at, 10, "ok") for at in range(19)))
    enough = figures(*(row(1000 + at, 10, "ok") for at in range(20)))

    assert few["p99_ms"] is None
    assert enough["p99_ms"] == 10


def test_a_table_is_about_the_hot_model_where_there_is_one() -> None:
    found = figures(row(1000, 1, "ok", load=0), row(1001, 1, "rejected", load=1), loads=("hot", "comers"))

    assert found["asked"] == 2
    assert record.main_figures({"figures": found})["asked"] == 1
    assert record.main_figures({"figures": figures(row(1000, 1, "ok"))})["asked"] == 1


def test_the_device_says_how_large_its_batches_were_and_how_late_it_was() -> None:
    found = record.device(["2 24 24.5", "4 32 32.1"])

    assert (found["executions"], found["rows"], found["mean_batch"]) == (2, 6, 3)
    assert found["oversleep_p99_ms"] == pytest.approx(0.5)
    assert record.device([]) == {}


def test_a_run_that_others_disturbed_says_so() -> None:
    quiet: dict[str, Any] = {
        "others_share": 0.01, "figures": {"asked": 1000},
        "generator": {"late_p99_ms": 0.5, "waited_for_connection": 0},
    }  # fmt: skip
    late = {"late_p99_ms": 50.0, "waited_for_connection": 0}

    assert record.noise(quiet) == []
    assert "others used 20%" in record.noise({**quiet, "others_share": 0.2})[0]
    assert "50.0 ms late" in record.noise({**quiet, "generator": late})[0]
    assert "too long" in record.noise({**quiet, "device": {"oversleep_p99_ms": 3.0}})[0]


def test_requests_that_wait_for_a_connection_are_late_because_of_the_server() -> None:
    waiting = {"late_p99_ms": 5000.0, "waited_for_connection": 500}

    assert record.noise({"others_share": 0.0, "figures": {"asked": 1000}, "generator": waiting}) == []


def test_most_frequent_ends_come_first_in_the_servers_words() -> None:
    table = np.array([row(0, 1, "ok"), row(0, 1, "rejected"), row(0, 1, "rejected")], ROW)

    assert record.reasons(Played(HEAD, table, ENDS)) == [("rejected", "", 2), ("ok", "", 1)]


def test_the_middle_of_runs_goes_with_their_extremes() -> None:
    assert record.spread([3.0, 1.0, None, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert record.spread([None, float("nan")]) is None
