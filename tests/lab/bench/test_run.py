"""Whole runs against a server that follows a script: every count must be the script's."""

from __future__ import annotations

import ssl
from pathlib import Path

import numpy as np
import pytest
import trustme

from clockwork_lab.bench.plan import Options, make_plan
from clockwork_lab.bench.server import Unreachable
from clockwork_serve.errors import ConfigError
from tests.lab.bench.loads import CLOSED, STEADY, ran, written
from tests.lab.bench.scripted import scripted
from tests.timing import Timing

pytestmark = pytest.mark.system  # a run starts processes, and takes seconds

LATE = ("ok", 2.5)
MISS, FULL, TIME, BUG = (
    (429, "would_miss_deadline"),
    (429, "queue_full"),
    (504, "late"),
    (500, "device_fault"),
)
MIXED = ["ok", LATE, MISS, "ok", FULL, TIME, "ok", BUG, "reset", "never", "garbage", "close", "chunked"]


def mixed(number: int, model: str) -> object:
    return MIXED[number % len(MIXED)]


@pytest.mark.parametrize("processes", [1, 3])
def test_every_end_is_counted_as_the_server_did_it(tmp_path: Path, processes: int) -> None:
    with scripted(mixed) as played:
        found = ran(tmp_path, played.url, STEADY.replace("100", "130"), processes=processes)

    done, total = played.done, found.report.total
    reasons = {(one.kind, one.reason): one.count for one in found.report.reasons}
    assert total.offered == 130 == sum(done.values())
    assert total.good == done["ok"] + done["close"] + done["chunked"]
    assert total.late == done[LATE]
    assert total.rejected == done[MISS] + done[FULL]
    assert total.expired == done[TIME]
    assert total.failed == done[BUG]
    assert total.unanswered == done["never"]
    assert reasons == {
        ("rejected", "429 would_miss_deadline"): done[MISS],
        ("rejected", "429 queue_full"): done[FULL],
        ("expired", "504 late"): done[TIME],
        ("failed", "500 device_fault"): done[BUG],
        ("reset", "ECONNRESET"): done["reset"],
        ("broken", "not HTTP"): done["garbage"],
    }
    assert found.report.sending.processes == processes


@pytest.mark.parametrize("action", ["twice", ("twice", 0.03)])
def test_a_second_response_is_seen_at_once_and_later_and_at_the_very_end(
    tmp_path: Path, action: object
) -> None:
    with scripted(lambda number, model: action if number % 33 == 0 else "ok") as played:
        found = ran(tmp_path, played.url)

    assert played.done[action] == 4, "the last one is the last request of all"
    assert found.report.sending.unexpected == 4
    assert found.report.total.good == found.report.total.offered == 100


def test_a_pause_of_the_server_counts_for_all_who_would_have_come_in_it(
    tmp_path: Path, timing: Timing
) -> None:
    """A closed client would have sent one request in that second, and seen one slow answer."""
    with scripted(pause=(0.5, 1.5)) as played:
        text = STEADY.replace("seconds = 1", "seconds = 3").replace("2000", "300")
        found = ran(tmp_path, played.url, text)

    table = found.records.table
    waited_ms = (table["last_ns"] - table["scheduled_ns"]) / 1e6
    total = found.report.total
    assert total.offered == total.answers.count == 300
    # One request every 10 ms fell into the pause, and each waited for its end.
    in_pause = (table["scheduled_ns"] > 0.52e9) & (table["scheduled_ns"] < 1.48e9)
    left_ms = 1500 - table["scheduled_ns"][in_pause] / 1e6
    assert np.count_nonzero(in_pause) >= 90
    with timing.judged():
        assert (waited_ms[in_pause] > left_ms - 60).all()
        assert 60 <= total.late <= 110
    assert total.answers.p99_ms is not None
    assert total.answers.p99_ms > 900
    assert max(one.p99_ms or 0 for one in found.report.stretches) > 900


def test_a_late_answer_is_not_good_and_is_no_refusal_either(tmp_path: Path) -> None:
    with scripted(lambda number, model: ("ok", 2.5)) as played:
        total = ran(tmp_path, played.url).report.total
    assert (total.good, total.late, total.satisfaction, total.rejected) == (0, 100, 0.0, 0)


def test_rejections_have_an_age(tmp_path: Path) -> None:
    with scripted(lambda number, model: MISS) as played:
        report = ran(tmp_path, played.url).report
    assert report.total.refusals.count == report.total.rejected == 100
    assert report.reasons[0].age.count == 100
    assert report.reasons[0].age.max_ms is not None
    assert report.refusals_curve is not None
    assert report.answers_curve is None


@pytest.mark.parametrize("kind", ["chunked", "until_end", "interim", "bytewise", "close"])
def test_every_form_of_a_good_response_is_one(tmp_path: Path, kind: str) -> None:
    with scripted(lambda number, model: kind) as played:
        total = ran(tmp_path, played.url).report.total
    assert total.good == played.done[kind] == 100


def test_one_connection_carries_one_request_at_a_time_and_none_is_lost(tmp_path: Path) -> None:
    with scripted(lambda number, model: ("ok", 0.05)) as played:
        found = ran(tmp_path, played.url, connections=2, drain_s=10.0)
    report = found.report
    assert (np.diff(found.records.table["sent_ns"]) > 0).all(), "who waits longest is next"
    assert played.connections == 4  # one asked whether it is there, one for the model
    assert report.sending.connections == 2
    assert report.sending.waited_for_connection > 50
    # Two connections of 50 ms are 40 requests a second of 100: the wait is the generator's own lateness.
    assert report.total.offered == report.total.answers.count == 100
    assert report.lateness.max_ms is not None
    assert report.lateness.max_ms > 1000


def test_what_waits_for_a_connection_makes_the_run_invalid(tmp_path: Path) -> None:
    with scripted(lambda number, model: ("ok", 0.05)) as played:
        report = ran(tmp_path, played.url, connections=2, max_lateness_ms=500.0).report
    assert not report.valid
    assert "raise --connections" in report.invalid
    assert report.total.offered == 100


def test_large_bodies_arrive_whole_and_may_be_refused_before_that(tmp_path: Path) -> None:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 500_000]}]
    text = STEADY.replace("100", "20")
    with scripted(models={"m": inputs}) as played:
        assert ran(tmp_path, played.url, text).report.total.answers.count == 20
    assert {len(body) for body in played.bodies} == {len(played.bodies[0])}
    assert len(played.bodies[0]) > 2_000_000
    with scripted(lambda number, model: MISS, models={"m": inputs}, early=1000) as played:
        assert ran(tmp_path, played.url, text).report.total.rejected == 20


def test_a_server_that_resets_everything_fails_requests_and_not_the_run(tmp_path: Path) -> None:
    with scripted(lambda number, model: "reset") as played:
        report = ran(tmp_path, played.url).report
    assert report.total.reset == played.done["reset"] == report.total.offered == 100
    assert report.valid


def test_abandoned_requests_are_given_up_at_their_deadline(tmp_path: Path) -> None:
    with scripted(lambda number, model: "never" if number % 2 else "ok") as played:
        found = ran(tmp_path, played.url, abandon=True)
    assert found.report.total.abandoned == played.done["never"] == 50
    assert found.report.total.good == 50
    given_up = found.records.table[found.records.table["end"] == 2]
    waited_ms = (given_up["last_ns"] - given_up["scheduled_ns"]) / 1e6
    assert (waited_ms >= 2000).all()


def test_closed_clients_send_when_they_are_answered(tmp_path: Path, timing: Timing) -> None:
    with scripted(lambda number, model: ("ok", 0.05)) as played:
        found = ran(tmp_path, played.url, CLOSED)
    total = found.report.total
    assert total.offered == total.good == sum(played.done.values())
    with timing.judged():
        assert 10 <= total.offered <= 40
    table = found.records.table
    assert max(count_open(table)) == 2


def count_open(table: np.ndarray) -> list[int]:
    """How many requests were out after each was sent."""
    return [
        int(np.count_nonzero((table["sent_ns"] <= at) & (table["last_ns"] > at))) for at in table["sent_ns"]
    ]


@pytest.mark.parametrize(
    ("retry", "refusal", "least", "most"),
    [
        ("retry_ms = 200", MISS, 4, 12),
        ("retry_ms = 5", MISS, 40, 420),
        ('retry = "retry_after"', (429, "queue_full", 250), 4, 10),
        ('retry = "retry_after"\nretry_ms = 200', MISS, 4, 12),
    ],
)
def test_closed_clients_come_back_when_the_scenario_says(
    tmp_path: Path, retry: str, refusal: tuple[object, ...], least: int, most: int, timing: Timing
) -> None:
    with scripted(lambda number, model: refusal) as played:
        total = ran(tmp_path, played.url, CLOSED + retry).report.total
    assert total.offered == total.rejected == played.done[refusal] <= most
    with timing.judged():
        assert total.offered >= least


def test_requests_say_their_deadline_as_told(tmp_path: Path) -> None:
    heads = {}
    for deadline in ("header", "timeout", "none"):
        with scripted() as played:
            ran(tmp_path, played.url, STEADY.replace("100", "10"), deadline=deadline)
        heads[deadline] = played.heads[0], played.bodies[0]
    assert b"\r\nx-slo-ms: 2000\r\n" in heads["header"][0]
    assert b"x-slo-ms" not in heads["timeout"][0] + heads["none"][0]
    assert b'"timeout":2000000' in heads["timeout"][1]
    assert b"timeout" not in heads["none"][1] + heads["header"][1]


def test_a_raw_server_is_asked_by_path(tmp_path: Path) -> None:
    with scripted(models={}) as played:
        found = ran(
            tmp_path, played.url, protocol="raw", path="/predict/{model}/now", body="random:100",
            models=("a b",), headers=(("X-One", "1"), ("Content-Type", "image/png")),
        )  # fmt: skip
    assert found.report.total.good == 100
    assert played.heads[0].startswith(b"POST /predict/a%20b/now HTTP/1.1\r\n")
    assert played.heads[0].lower().count(b"content-type") == 1
    assert {len(body) for body in played.bodies} == {100}


def test_over_tls_it_is_the_same(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with scripted(mixed, tls=context) as played:
        report = ran(tmp_path, played.url, STEADY.replace("100", "65"), ca=str(tmp_path / "ca.pem")).report
        assert report.total.good == played.done["ok"] + played.done["close"] + played.done["chunked"]
        assert report.total.rejected == played.done[MISS] + played.done[FULL]
        with pytest.raises(Unreachable, match="certificate"):
            ran(tmp_path, played.url)
        with pytest.raises(Unreachable, match="if it speaks TLS, write https://"):
            ran(tmp_path, played.url.replace("https", "http"))
    with (
        scripted(mixed) as plain,
        pytest.raises(Unreachable, match=r"TLS at https://.*does the server use TLS"),
    ):
        ran(tmp_path, plain.url.replace("http", "https"))


def test_models_go_by_name_or_as_mapped(tmp_path: Path) -> None:
    text = STEADY.replace('name = "m"', 'name = "m"\ncopies = 3').replace("100", "30")
    inputs = [{"name": "x", "datatype": "INT64", "shape": [2]}]
    asked: list[str] = []

    def script(number: int, model: str) -> str:
        asked.append(model)
        return "ok"

    names = [f"n{number}" for number in range(3)]
    with scripted(script, models=dict.fromkeys(names, inputs)) as played:
        with pytest.raises(ConfigError, match="does not have m-0000, m-0001, m-0002; say which"):
            ran(tmp_path, played.url, text)
        ran(tmp_path, played.url, text, renamed={"m": "n{i}"})
        assert sorted(set(asked)) == names
        asked.clear()
        report = ran(tmp_path, played.url, text, models=("n2", "n0")).report
    assert {name: asked.count(name) for name in names} == {"n0": 10, "n1": 0, "n2": 20}
    assert [group.name for group in report.models] == ["m-0000 (n2)", "m-0001 (n0)", "m-0002 (n2)"]


def test_nobody_there_is_one_clear_error(tmp_path: Path) -> None:
    with scripted() as played:
        gone = played.url
    with pytest.raises(
        Unreachable, match=r"expected a server at http://127.0.0.1:\d+, found none: .*refused"
    ):
        make_plan(written(tmp_path), Options(url=gone))


def test_the_same_seed_sends_the_same_requests(tmp_path: Path) -> None:
    text = STEADY.replace('"fixed"', '"poisson"')
    tables = []
    for seed, processes in [(7, 1), (7, 1), (7, 2), (8, 1)]:
        with scripted() as played:
            tables.append(ran(tmp_path, played.url, text, seed=seed, processes=processes).records.table)
    times = [table["scheduled_ns"].tolist() for table in tables]
    assert times[0] == times[1] == times[2] != times[3]
