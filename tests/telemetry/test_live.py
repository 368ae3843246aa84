"""The last minutes of a journal: added up in another way, in bounded memory, for whoever asks."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    Infer,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    WorkerHung,
    WorkerLost,
)
from clockwork_serve.telemetry import Step, head_of, read_records
from clockwork_serve.telemetry.live import LiveLimits, LiveView, ReaderCursor
from clockwork_serve.units import ms
from tests.sim.journals import written
from tests.telemetry import stories

FOR_EVER = 1 << 50
SEEDS = (3, 17, 33, 93)


def step(at_ms: float, *events: object, effects: tuple[object, ...] = ()) -> Step:
    return Step(ms(at_ms), events, effects)


def ran(action_id: int, from_ms: float, to_ms: float) -> Result:
    return msgspec.structs.replace(stories.result(action_id), started_ns=ms(from_ms), ended_ns=ms(to_ms))


def view_of(*steps: Step, **limits: float) -> LiveView:
    view = LiveView(LiveLimits(**limits))
    for one in (head_of(ControllerConfig()), step(0, stories.worker_joined()), *steps):
        view.on_record(one)
    return view


def boxes(found: dict, kind: str) -> list:
    view_lanes = found["names"][1]
    return [row for lane, rows in found["lanes"] if view_lanes[lane][1] == kind for row in rows]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_shown_is_what_the_journal_holds(tmp_path: Path, seed: int) -> None:
    view, seen = LiveView(), Counter[str]()
    for _, record in read_records(written(tmp_path / "journal", seed)):
        view.on_record(record)
        if isinstance(record, Step):
            for one in (*record.events, *record.effects):
                seen["arrivals"] += isinstance(one, Request)
                seen["good"] += isinstance(one, Answer) and one.outcome is Outcome.OK
                seen["boxes"] += isinstance(one, Infer | Load)
                if isinstance(one, Answer) and one.outcome is not Outcome.OK:
                    seen["bad"] += 1
    found = view.window(-FOR_EVER, FOR_EVER, 10)
    bins, panels = found["bins"], view.panels(-FOR_EVER, FOR_EVER)
    ended = sum(sum(one["ends"].values()) for one in bins)

    assert sum(one["arrivals"] for one in bins) == seen["arrivals"] == sum(row[1] for row in panels["models"])
    assert sum(one["good"] for one in bins) == seen["good"] == sum(row[2] for row in panels["models"])
    assert ended >= seen["bad"]
    drawn = [*boxes(found, "exec"), *boxes(found, "load")]
    assert sum(1 if len(row) == 10 else row[4] for row in drawn) == seen["boxes"] - len(view.frame(
        ReaderCursor(), 1)["open"])  # fmt: skip
    assert sum(row[1] for row in boxes(found, "refused")) == ended
    assert view.requests(-FOR_EVER, FOR_EVER, only="good")["total"] == seen["good"]


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_frames_add_up_to_the_window(tmp_path: Path, seed: int) -> None:
    view, reader = LiveView(), ReaderCursor()
    view.frame(reader, 1)
    boxes_seen = 0
    for number, (_, record) in enumerate(read_records(written(tmp_path / "journal", seed))):
        view.on_record(record)
        if number % 37 == 0:
            boxes_seen += sum(len(rows) for _, rows in view.frame(reader, 1)["lanes"])
    boxes_seen += sum(len(rows) for _, rows in view.frame(reader, 1)["lanes"])
    found = view.window(-FOR_EVER, FOR_EVER, FOR_EVER)

    assert view.frame(reader, 1)["lanes"] == []
    # Those of one instant are merged, in a frame and in the window alike; a frame never shows fewer.
    assert boxes_seen >= sum(len(rows) for _, rows in found["lanes"]) > 100
    assert view.frame(reader, 1)["models"] == [len(found["models"][1]), []]


def test_an_inference_is_a_box_with_its_prediction_and_deadlines() -> None:
    asked = stories.request("a", at_ms=1, slo_ms=50), stories.request("b", at_ms=1, slo_ms=80)
    view = view_of(
        step(1, *asked),
        step(2, effects=(stories.infer(7, "a", "b", expected_ms=10),)),
        step(15, ran(7, 3, 14)),
    )
    (box,) = boxes(view.window(0, FOR_EVER, FOR_EVER), "exec")

    assert box == (3000, 11_000, -1000, 10_000, 48_000, 78_000, 0, 2, 2, 0)


def test_what_runs_is_shown_as_predicted_until_its_result() -> None:
    view = view_of(step(1, stories.request("a")), step(2, effects=(stories.infer(7, "a", expected_ms=10),)))

    assert view.frame(ReaderCursor(), 1)["open"] == [[1, 2000, 10_000, 0]]
    view.on_record(step(15, ran(7, 3, 14)))
    assert view.frame(ReaderCursor(), 1)["open"] == []


def refused(name: str, at_ms: float, message: str = "", model: str = stories.MODEL) -> Step:
    answer = Answer(
        request_id=name, gateway="g0", outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL, message=message
    )
    return step(at_ms, stories.request(name, at_ms, model=model), effects=(answer,))


def test_a_refusal_is_a_dot_of_its_reason_also_by_query() -> None:
    query = AdmissionReply(announced_id="q", gateway="g0", reason=Reason.QUEUE_FULL)
    view = view_of(refused("a", 5), step(6, effects=(query,)))
    found = view.window(0, FOR_EVER, FOR_EVER)

    assert boxes(found, "refused") == [[5000, 1, 0], [6000, 1, 1]]
    assert found["bins"][0]["ends"] == {"rejected: queue_full": 2}
    assert view.requests(0, FOR_EVER)["rows"][0].request == "a"


def test_a_table_has_pages_and_a_tenant_sees_his_own() -> None:
    named = msgspec.structs.replace(stories.request("t", 9), tenant="team")
    lost = Answer(request_id="t", gateway="g0", outcome=Outcome.FAILED, reason=Reason.MODEL_RAISED)
    view = view_of(*[refused(f"r{at}", at) for at in range(9)], step(9, named, effects=(lost,)))

    page = view.requests(2000, FOR_EVER, offset=3, limit=2)
    assert ([one.request for one in page["rows"]], page["total"]) == (["r5", "r6"], 8)
    assert [one.request for one in view.requests(0, FOR_EVER, tenant="team")["rows"]] == ["t"]
    assert view.panels(0, FOR_EVER)["tenants"] == [["team", 1, 0, 1]]
    assert view.requests(0, FOR_EVER, model="none")["total"] == 0


def test_memory_follows_loads_unloads_and_lost_workers() -> None:
    joined = stories.worker_joined()

    def held(view: LiveView) -> tuple[int, list]:
        found = view.panels(0, FOR_EVER)["devices"][0]
        return found["models"], view.window(0, FOR_EVER, 1)["bins"][-1]["memory"]

    loaded = (step(1, effects=(stories.load(1),)), step(9, ran(1, 1, 9)))
    view = view_of(*loaded)
    assert held(view) == (1, [(stories.MODEL, stories.load(1).weights.size)])
    view.on_record(step(20, effects=(stories.unload(2),)))
    assert held(view) == (0, [])
    lost = view_of(*loaded, step(20, WorkerLost(worker=joined.worker)))
    assert held(lost) == (0, [])
    assert lost.panels(0, FOR_EVER)["devices"][0]["state"] == "lost"


def test_workers_that_come_hang_and_go_are_told() -> None:
    view = view_of(
        step(5, effects=(WorkerHung(worker="w0", why="silent"),)), step(6, WorkerLost(worker="w0"))
    )
    told = [text for _, kind, text in view.window(0, FOR_EVER, 1)["events"] if kind == "worker"]

    assert told == ["worker w0: up", "worker w0: hung, silent", "worker w0: lost"]


def test_settings_are_those_of_the_run_or_those_given() -> None:
    view = view_of(step(1))
    view.on_record(head_of(ControllerConfig(slack_ns=5)))
    view.on_record(step(2))
    rows = {name: (value, origin) for name, value, origin in view.panels(0, 1)["settings"]}

    assert rows["slack_ns"] == ("5", "set")
    assert rows["max_batch"] == ("16", "default")
    given = LiveView(settings=[("slo_ms", "50", "--slo-ms")])
    assert given.panels(0, 1)["settings"] == [["slo_ms", "50", "--slo-ms"]]


def test_memory_is_bounded_however_long_it_goes_on() -> None:
    view = LiveView(LiveLimits(keep_s=2, boxes=2000, requests=100))
    view.on_record(step(0, stories.worker_joined()))

    def follow(first: int, last: int) -> int:
        for at in range(first, last):
            view.on_record(refused(f"r{at}", at))
            view.on_record(step(at, effects=(stories.infer(at + 1, expected_ms=0.5),)))
            view.on_record(step(at + 0.5, ran(at + 1, at, at + 0.5)))
        return size_of(view)

    follow(0, 4000)
    assert abs(follow(4000, 8000) / follow(8000, 12_000) - 1) < 0.1
    found = view.window(-FOR_EVER, FOR_EVER, 100)
    assert len(found["bins"]) <= 601
    assert view.requests(0, FOR_EVER)["total"] == 100
    assert found["kept"] >= view.now_us - 2_100_000


def size_of(what: object, seen: set[int] | None = None) -> int:
    """Bytes of a view and all that it holds."""
    seen = set() if seen is None else seen
    if id(what) in seen or isinstance(what, type) or callable(what):
        return 0
    seen.add(id(what))
    inside: list[object] = []
    if isinstance(what, dict):
        inside = [*what.keys(), *what.values()]
    elif isinstance(what, list | tuple | set) or type(what).__name__ == "deque":
        inside = list(what)
    else:
        inside = list(getattr(what, "__dict__", {}).values())
        inside += [
            getattr(what, name) for name in getattr(type(what), "__slots__", ()) if hasattr(what, name)
        ]
    return sys.getsizeof(what) + sum(size_of(one, seen) for one in inside)


def test_foreign_text_is_made_printable() -> None:
    view = view_of(refused("a", 5, message="line\nbreak\u202e", model="evil\x00/1"))
    (row,) = view.requests(0, FOR_EVER)["rows"]

    assert row.message.isprintable()
    assert row.model.isprintable()
    assert view.window(0, FOR_EVER, 1)["models"][1] == [row.model]


def test_what_the_journal_lost_the_end_of_is_given_up() -> None:
    view = LiveView(LiveLimits(keep_s=60))
    view.on_record(step(0, stories.worker_joined()))
    view.on_record(step(1, stories.request("a", 1), stories.request("b", 1, slo_ms=10_000_000)))
    view.on_record(step(2, effects=(stories.infer(7, "a"),)))
    view.on_record(Step(ms(200_000), (), (), 5))
    for second in range(201, 215):
        view.on_record(step(second * 1000))

    assert [*view._asked] == ["b"], "its deadline is not over"
    assert view.frame(ReaderCursor(), 1)["open"] == []
    assert view.requests(0, FOR_EVER)["rows"][0].message == "its end is not in the journal"
