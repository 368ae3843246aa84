"""What questions make of records: small ones, made up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from clockwork_lab.bench.records import Head
from clockwork_serve.workload.scenario import read_scenario
from clockwork_serve.workload.stream import build
from comparison.peers.loads import EMULATED, MOBILENET, names, steady
from comparison.peers.record import Played, quantile_ms, sent_late_ns
from comparison.promises import abandoned, cost, many_models, rejections, rig
from comparison.promises.abandoned import End
from comparison.promises.question import Row
from comparison.promises.rig import Execution, executions, numbered, started
from harness.http_load import Sample

MS = 1_000_000
ENDS = ["none", "ok", "rejected", "expired"]
COLUMNS = ("scheduled_ns", "sent_ns", "last_ns", "slo_ns", "model", "load", "end")
FORM = np.dtype([(name, "<i8") for name in COLUMNS])


def played(*rows: tuple[int, int, str, int, int], **head: Any) -> Played:
    """Of rows (due in ms, age in ms, end, model, load); SLO 100 ms."""
    table = [
        (due * MS, due * MS + MS, (due + age) * MS, 100 * MS, model, load, ENDS.index(end))
        for due, age, end, model, load in rows
    ]
    told: dict[str, Any] = {"models": ("a", "b"), "loads": ("requests",), **head}
    made = Head(
        version="",
        scenario="",
        url="",
        seed=1,
        warmup_ns=0,
        end_ns=1000 * MS,
        row=(),
        rows=0,
        ends=(),
        **told,
    )
    return Played(made, np.array(table, FORM), ENDS)


def found(rows: list[Row], text: str) -> Row:
    (one,) = [row for row in rows if row.text == text]
    return one


def test_goodput_is_what_came_in_time_by_the_clients_clock() -> None:
    one = played((0, 100, "ok", 0, 0), (1, 101, "ok", 0, 0), (2, 1, "rejected", 0, 0), (3, 0, "none", 0, 0))

    assert one.good_per_s == 1
    assert (one.count("ok"), one.count("rejected")) == (2, 1)
    assert quantile_ms(sent_late_ns(one.counted), 0.99) == 1


def test_scenarios_are_what_the_load_generator_reads(tmp_path: Any) -> None:
    for number, load in enumerate((
        steady(EMULATED, 15, 123.4567, seconds=10),
        steady(MOBILENET, 100, 300, seconds=10, **many_models.ZIPF),
        rig.staircase(MOBILENET, 15),
        rig.staircase(MOBILENET, 100, **many_models.ZIPF),
        *map(many_models.hot_load, many_models.HOT.variants),
    )):  # fmt: skip
        path = tmp_path / f"{number}.toml"
        path.write_text(load.text)
        assert build(read_scenario(path), 1).models
    path.write_text(steady(EMULATED, 15, 10, seconds=10).text)
    assert names(15) == [name for name, _ in build(read_scenario(path), 1).models]


def test_full_is_the_best_step_without_its_beginning() -> None:
    step_ms = int(1000 * rig.STEP_S)
    settle_ms = int(1000 * rig.SETTLE_S)
    rows = [(10, 1, "ok", 0, 0)]  # settles
    rows += [(settle_ms + at, 1, "ok", 0, 0) for at in range(30)]
    rows += [(step_ms + settle_ms + at, 1, "ok", 0, 1) for at in range(60)]
    rows += [(2 * step_ms + settle_ms + at, 101, "ok", 0, 2) for at in range(90)]
    found_ = rig.top(played(*rows, loads=("step 0", "step 1", "step 2")))

    assert found_["per_s"] == 60 / (rig.STEP_S - rig.SETTLE_S)
    assert [step["good_per_s"] for step in found_["steps"]][2] == 0


def test_the_worst_model_is_held_against_the_mean() -> None:
    one = played(*[(at, 1, "ok", 0, 0) for at in range(4)], *[(at, 1, "ok", 1, 0) for at in range(2)],
                 *[(at, 1, "rejected", 1, 0) for at in range(2)])  # fmt: skip

    assert many_models.shares(one) == [1.0, 0.5]
    assert many_models.shares(played((0, 1, "ok", 1, 0))) == [1.0]  # nobody asked for the other one


def test_zipf_compares_goodput_of_the_same_repeat() -> None:
    def run(good: float) -> dict[str, Any]:
        return {"good_per_s": good, "rate_rps": 300.0}

    rows = many_models.zipf_rows(
        {"resident": {1: run(100), 2: run(200), 3: run(100)}, "paged": {2: run(180), 1: run(80)}}
    )
    ratio = found(rows, "goodput with memory for 20 of 100 models, of that with all in memory")

    assert (ratio.values, ratio.verdict) == ([80, 90], "met")


def test_a_hot_models_p99_is_held_against_the_same_requests_without_loads() -> None:
    def run(p99_ms: float, loads: float = 0.0) -> dict[str, Any]:
        return {"p99_ms": p99_ms, "loads_per_s": loads}

    rows = many_models.hot_rows({"resident": {1: run(10)}, "loads": {1: run(12, 25)}, "alone": {1: run(5)}})

    assert rows[0].values == [pytest.approx(20)]
    assert [row.verdict for row in rows[:2]] == ["missed", "met"]


def test_a_request_of_that_number_can_be_told_from_the_devices_log() -> None:
    x = np.zeros((1, 4), np.float32)

    assert numbered(x, 16_000_001)[0, 0] == 16_000_001
    assert x[0, 0] == 0
    ran = executions(["20 30 m-0001 7,8", "5 15 m-0000 3"])
    assert ran == [Execution(5, 15, "m-0000", (3,)), Execution(20, 30, "m-0001", (7, 8))]
    assert started([*ran, Execution(40, 50, "m-0001", (7,))]) == {3: 5, 7: 20, 8: 20}


def sample(number: int, model: str, sent_ms: int, age_ms: int, status: int) -> Sample:
    at_ns = sent_ms * MS
    return Sample(f"{number} {model} 200", at_ns, at_ns, at_ns + age_ms * MS, status)


def test_rejections_are_told_apart_by_whether_there_was_hope() -> None:
    samples = [
        sample(0, "a", 0, 25, 200),  # the warm-up: everything counts from here
        sample(1, "b", 5000, 150, 200),
        sample(2, "c", 5010, 190, 429),  # 40 ms of work: there was hope
        *[sample(10 + row, f"m{row}", 5020, 199, 200) for row in range(9)],
        sample(30, "c", 5030, 7, 429),  # 180 ms of nine models, 20 each of b and its own
        sample(31, "d", 5031, 3, 429),
    ]
    ran = [
        Execution(1 * MS, 21 * MS, "a", (0,)),
        *[
            Execution((5050 + 20 * row) * MS, (5070 + 20 * row) * MS, f"m{row}", (10 + row,))
            for row in range(9)
        ],
        Execution(5230 * MS, 5250 * MS, "b", (1,)),
    ]
    told = rejections.told(samples, ran, 8)

    assert (told["asked"], told["rejected"], told["hopeless"]) == (13, 3, 2)
    assert (told["p99_ms"], told["hopeless_p99_ms"], told["hopeless_soon"]) == (190, 7, 1.0)


def test_who_was_answered_late_was_not_admitted() -> None:
    one, other = rejections.asked_of([sample(1, "a", 0, 201, 200), sample(2, "a", 0, 200, 200)], {1: 5, 2: 6})

    assert (one.began_ns, other.began_ns) == (None, 6)


def test_executions_count_from_when_the_client_hung_up() -> None:
    def hung(number: int) -> End:
        return End(number, sent_ns=0, hung_ns=500 * MS, status="hung up")

    ends = [hung(1), hung(2), hung(3), hung(4), End(5, done_ns=MS, status="200")]
    told = abandoned.told(ends, {1: 500 * MS, 2: 520 * MS, 3: 521 * MS, 5: 900 * MS})

    assert (told["hung_up"], told["latest_ms"]) == (4, 21)
    assert [told[f"began_{when}"] for when in ("before", "soon_after", "long_after")] == [1, 1, 1]
    assert abandoned.rows({"http": {1: told}})[0].verdict == "missed"


def test_a_refusal_costs_what_answers_did_not() -> None:
    def run(asked: int, ok: int, gateway_s: float, worker_s: float) -> dict[str, Any]:
        used = {
            "gateway": {"user_s": gateway_s, "system_s": 0.5}, "worker": {"user_s": worker_s, "system_s": 0.0}
        }  # fmt: skip
        shares = {"ok_share": ok / asked, "rejected_share": 1 - ok / asked}
        return {"asked": asked, "ok": ok, "rejected": asked - ok, "expired": 0, "used": used, **shares}

    served, refused = run(1000, 1000, 0.5, 1.0), run(5000, 1000, 1.3, 1.0)

    assert cost.served_ms(served) == pytest.approx(2.0)
    assert cost.refused_ms(refused, served) == pytest.approx(0.2)
    assert cost.refused_part_ms(refused, served, "gateway", "user") == pytest.approx(0.2)
    assert cost.refused_part_ms(refused, served, "worker", "user") == pytest.approx(0.0)
    assert math.isnan(cost.refused_ms({**refused, "rejected_share": 0.5}, served))
    rows = cost.rows({"served": {1: served}, "refused": {1: refused}})
    assert found(rows, "CPU of all processes for a request of 602 kB refused").verdict == "missed"
    assert found(rows, "CPU of all processes for a request answered").verdict == "met"
