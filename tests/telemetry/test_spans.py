"""Spans against their journal: every request that ended badly is there, and every span has its parent."""

from __future__ import annotations

import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec import structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    Answer,
    Cause,
    GatewayLost,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
    WorkerLost,
)
from clockwork_serve.telemetry import (
    Journal,
    JournalHead,
    Step,
    head_of,
    read_journal,
    read_records,
    refusals_path,
)
from clockwork_serve.telemetry.journal import refusals_beside
from clockwork_serve.telemetry.spans import (
    LATE_MAX,
    SETTLED_NS,
    RequestTraces,
    Span,
    Spans,
    child_id,
    is_sampled,
    trace_ids,
)
from clockwork_serve.units import NS_PER_MS, NS_PER_S, ms
from tests.sim.journals import written
from tests.telemetry import stories

SEEDS = (3, 14, 33, 93)
REAL = Path(__file__).parents[2] / "benchmarks" / "journals"
CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"
STARTED = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)
STARTED_NS = round(STARTED.timestamp()) * NS_PER_S
BAD = {Outcome.REJECTED, Outcome.EXPIRED, Outcome.FAILED, Outcome.INVALID}


class Beside(NamedTuple):
    """A step that a gateway kept."""

    step: Step


def head() -> JournalHead:
    return head_of(ControllerConfig(), STARTED)


def told(
    *records: JournalHead | Step | Beside, share: float = 1.0, close: bool = True, **given
) -> list[list[Span]]:
    """The spans of each request, in the order in which they were made."""
    found: list[list[Span]] = []
    spans = Spans(found.append, share, **given)
    for record in records:
        if isinstance(record, Beside):
            spans.on_refusals(record.step)
        else:
            spans.on_record(record)
    if close:
        spans.close()
    return found


def step(at_ms: float, *messages, effects=()) -> Step:
    return Step(ms(at_ms), messages, tuple(effects))


def answered(name: str, outcome: Outcome = Outcome.OK, reason: Reason = Reason.NONE, **more) -> Answer:
    return Answer(request_id=name, gateway="g0", outcome=outcome, reason=reason, **more)


def ran(action_id: int, start_ms: float, end_ms: float, device: str = "cpu:0") -> Result:
    return Result(
        action_id=action_id, device=device, status=Status.OK, started_ns=ms(start_ms), ended_ns=ms(end_ms)
    )


def one_batch(**more: int) -> list[JournalHead | Step]:
    """Two requests in one batch, which began 2 ms later than predicted and took 2 ms longer."""
    first, second = (
        structs.replace(stories.request(name, 1), trace=f"{CLIENT}-01 a=1") for name in ("a", "b")
    )
    result = structs.replace(ran(1, 3, 15), input_ns=ms(1), run_ns=ms(10), output_ns=ms(1), **more)
    good = [
        answered(name, batch=2, queue_ns=ms(2), exec_ns=ms(12), expected_ns=ms(10)) for name in ("a", "b")
    ]
    return [
        head(), step(0, stories.worker_joined(), stories.model_added()),
        step(1, first, second, effects=[stories.infer(1, "a", "b", expected_ms=10)]),
        step(16, result, effects=good),
    ]  # fmt: skip


def test_a_request_is_a_tree_of_what_it_waited_for_and_where_it_ran() -> None:
    spans, mates = told(*one_batch())
    root = spans[0]
    names = [one.name.removeprefix("clockwork.") for one in spans]

    assert names == ["request", "queue", "exec", "input", "run", "output", "answer"]
    assert (root.trace_id.hex(), root.parent_id.hex(), root.state) == (*CLIENT.split("-"), "a=1")
    parents = dict(zip(names, [one.parent_id for one in spans], strict=True))
    assert {parents[name] for name in ("queue", "exec", "answer")} == {root.span_id}
    assert {parents[name] for name in ("input", "run", "output")} == {spans[2].span_id}
    times = {
        name: ((one.start_ns - root.start_ns) / NS_PER_MS, (one.end_ns - root.start_ns) / NS_PER_MS)
        for name, one in zip(names, spans, strict=True)
    }
    assert times == {
        "request": (0, 15), "queue": (0, 2), "exec": (2, 14), "input": (2, 3), "run": (3, 13),
        "output": (13, 14), "answer": (14, 15),
    }  # fmt: skip
    ran = spans[2].attributes
    assert ran["clockwork.predicted_start_ms"] == -2
    assert ran["clockwork.predicted_lasts_ms"] == 10
    assert ran["clockwork.longer_ms"] == 2
    assert (ran["clockwork.batch"], ran["clockwork.device"], ran["clockwork.requests"]) == (2, "cpu:0", 2)
    asked = root.attributes
    assert (asked["clockwork.model"], asked["clockwork.version"]) == ("net", "1")
    assert (asked["clockwork.outcome"], asked["clockwork.slo_ms"]) == ("ok", 100)
    assert spans[2].links == ((mates[0].trace_id, mates[2].span_id),)
    assert mates[2].links == ((root.trace_id, spans[2].span_id),)


def test_what_tensors_took_over_a_network_is_told_where_there_was_one() -> None:
    (_, _, here, *_), _ = told(*one_batch())
    (_, _, elsewhere, *_), _ = told(*one_batch(transfer_in_ns=ms(4), transfer_out_ns=ms(3)))
    assert elsewhere.attributes.items() - here.attributes.items() == {
        ("clockwork.transfer_in_ms", 4), ("clockwork.transfer_out_ms", 3),
    }  # fmt: skip


def test_instants_are_those_of_the_wall_clock() -> None:
    # The head was written 2 ms before the first step at most, so the clocks that are given are taken.
    exact = told(*one_batch(), offset_ns=STARTED_NS + ms(2))[0][0]
    elsewhere = told(*one_batch(), offset_ns=STARTED_NS + 86_400 * NS_PER_S)[0][0]
    alone = told(*one_batch())[0][0]

    assert exact.start_ns == STARTED_NS + ms(3)
    assert elsewhere.start_ns == alone.start_ns == STARTED_NS + ms(1)


def test_what_ended_before_is_left_out() -> None:
    assert told(*one_batch(), since_ns=STARTED_NS + ms(17)) == []
    assert len(told(*one_batch(), since_ns=STARTED_NS + ms(16))) == 2


def test_a_load_is_there_if_a_request_waited_for_it() -> None:
    cold = answered("a", batch=1, cold=True)
    (spans,) = told(
        head(), step(0, stories.worker_joined(), stories.model_added()),
        step(1, stories.request("a", 1), effects=[stories.load(1)]),
        step(9, ran(1, 2, 8), effects=[stories.infer(2, "a")]),
        step(20, ran(2, 10, 19), effects=[cold]),
    )  # fmt: skip

    load = next(one for one in spans if one.name == "clockwork.load")
    assert load.parent_id == spans[0].span_id
    assert load.end_ns - load.start_ns == ms(6)
    assert load.attributes["clockwork.device"] == "cpu:0"


def test_a_refusal_says_why() -> None:
    refused = answered("a", Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, message="by 3 ms")
    (spans,) = told(head(), step(1, stories.request("a", 1), effects=[refused]))

    assert [one.name for one in spans] == ["clockwork.request", "clockwork.queue"]
    assert spans[0].error == "rejected: would_miss_deadline: by 3 ms"
    assert spans[0].attributes["clockwork.reason"] == "would_miss_deadline"


def test_a_batch_that_failed_and_the_next_one_are_both_there() -> None:
    failed = structs.replace(ran(1, 2, 3), status=Status.MODEL_RAISED, message="no")
    (spans,) = told(
        head(), step(0, stories.worker_joined()),
        step(1, stories.request("a", 1), effects=[stories.infer(1, "a")]),
        step(4, failed, effects=[stories.infer(2, "a")]),
        step(20, ran(2, 5, 19), effects=[answered("a", batch=1)]),
    )  # fmt: skip

    assert [one.name.partition(".")[2] for one in spans] == [
        "request", "queue", "exec", "queue", "exec", "answer",
    ]  # fmt: skip
    assert [one.error for one in spans if one.name == "clockwork.exec"] == ["model_raised: no", ""]
    assert len({one.span_id for one in spans}) == len(spans)


def test_a_lost_worker_leaves_no_execution_and_a_lost_gateway_no_answer() -> None:
    (spans,) = told(
        head(), step(0, stories.worker_joined()),
        step(1, stories.request("a", 1), effects=[stories.infer(1, "a")]),
        step(4, WorkerLost(worker="w0")), step(5, GatewayLost(gateway="g0")),
    )  # fmt: skip

    assert [one.name for one in spans] == ["clockwork.request", "clockwork.queue"]
    assert spans[0].attributes["clockwork.outcome"] == "cancelled"


# Late answers, which their gateways tell of


def late_answer(**more) -> list[JournalHead | Step]:
    good = answered("a", batch=1, **more)
    return [
        head(), step(1, stories.request("a", 1), effects=[stories.infer(1, "a")]),
        step(12, ran(1, 2, 11), effects=[good]),
    ]  # fmt: skip


LATE = step(140, effects=[answered("a", Outcome.EXPIRED, Reason.LATE)])
MARK = Beside(LATE)


@pytest.mark.parametrize("first", [True, False])
def test_a_late_answer_is_late_whichever_record_is_read_first(first: bool) -> None:
    records = [MARK, *late_answer()] if first else [*late_answer(), MARK]
    (spans,) = told(*records)

    assert spans[0].attributes["clockwork.reason"] == "late"
    assert spans[0].error == "expired: late"
    assert spans[0].end_ns - spans[0].start_ns == ms(139)
    assert spans[-1].name == "clockwork.answer"
    assert spans[-1].end_ns == spans[0].end_ns


def test_a_promise_that_was_delivered_late_says_so() -> None:
    (spans,) = told(*late_answer(promised=True), MARK)

    assert spans[0].attributes["clockwork.cause"] == Cause.DELIVERY_LATE


def test_a_late_refusal_has_expired() -> None:
    refused = answered("a", Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE)
    (spans,) = told(head(), step(1, stories.request("a", 1), effects=[refused]), MARK)

    assert spans[0].error == "expired"


def test_a_good_answer_waits_for_what_its_gateway_tells() -> None:
    found = told(*late_answer(), step(12 + SETTLED_NS / NS_PER_MS - 1), close=False)
    later = told(*late_answer(), step(12 + SETTLED_NS / NS_PER_MS), close=False)

    assert (len(found), len(later)) == (0, 1)


def test_marks_of_unknown_requests_are_bounded() -> None:
    spans = Spans(lambda made: None)
    for number in range(LATE_MAX + 10):
        spans.on_refusals(Step(number, (), (answered(f"r{number}", Outcome.EXPIRED, Reason.LATE),)))

    assert len(spans._late) == LATE_MAX


# What a gateway ended by itself


def written_beside(tmp_path: Path) -> Path:
    """A controller's journal that goes on for long after a late answer, and what its gateway kept."""
    path = tmp_path / "run.journal"
    full = answered("g0-1", Outcome.REJECTED, Reason.QUEUE_FULL)
    of_gateway = [step(5, stories.request("g0-1", 5), effects=[full]), LATE]
    for name, heading, records in (
        (path, head(), [*late_answer(), step(60_000)]), (refusals_path(path, "gateway-0"), None, of_gateway),
    ):  # fmt: skip
        journal = Journal(name, heading)
        for record in records:
            if isinstance(record, Step):
                journal.on_step(record.now_ns, record.events, record.effects)
        journal.close()
    return path


def test_a_gateway_s_refusals_are_read_when_they_were(tmp_path: Path) -> None:
    path = written_beside(tmp_path)
    found: list[list[Span]] = []
    feed = RequestTraces(path, Spans(found.append), clock=lambda: 7.0)
    for _, record in read_records(path):
        feed.on_record(record)
    feed.close()

    assert [each.name for each in refusals_beside(path)] == ["run.journal.refused-gateway-0"]
    assert sorted(spans[0].error for spans in found) == ["expired: late", "rejected: queue_full"]
    refused = next(spans for spans in found if "queue_full" in spans[0].error)
    assert refused[0].start_ns == STARTED_NS + ms(4), "the first step, at 1 ms, was at the start"


def test_a_gateway_s_refusals_are_read_while_the_controller_is_idle(tmp_path: Path) -> None:
    path = tmp_path / "run.journal"
    found: list[list[Span]] = []
    now_s = 0.0
    feed = RequestTraces(path, Spans(found.append), clock=lambda: now_s)
    journal = Journal(refusals_path(path, "gateway-0"))
    for number in range(3):
        now_s += 1
        request = stories.request(f"r{number}", 5)
        journal.on_step(ms(5), (request,), (answered(f"r{number}", Outcome.INVALID, Reason.BAD_INPUT),))
        journal.flush()
        until_written(journal)
        feed.on_idle(ms(6) + SETTLED_NS)
        assert len(found) == number + 1
    journal.close()
    feed.close()


def test_what_is_no_journal_beside_it_is_left_out(tmp_path: Path) -> None:
    path = written_beside(tmp_path)
    refusals_path(path, "nonsense").write_text("this is no journal, but long enough to look like one, or not")
    found: list[list[Span]] = []
    feed = RequestTraces(path, Spans(found.append))
    for _, record in read_records(path):
        feed.on_record(record)
    feed.close()

    assert len(found) == 2


def until_written(journal: Journal) -> None:
    while journal._queued_bytes:
        pass


def test_what_a_gateway_ends_when_it_lost_the_link_is_one_request() -> None:
    request = stories.request("a", 1)
    unserved = answered("a", Outcome.REJECTED, Reason.NOT_SERVING)
    refused = Beside(step(10, request, effects=[unserved]))
    (spans,) = told(head(), step(1, request), step(9, GatewayLost(gateway="g0")), refused)

    assert spans[0].error == "rejected: not_serving"


def test_a_file_in_the_midst_of_a_run_ends_none() -> None:
    goes_on = structs.replace(head(), continues=True)
    found = told(head(), step(1, stories.request("a", 1)), goes_on, step(2, effects=[answered("a")]))

    assert len(found) == 1


def test_what_was_never_written_is_counted() -> None:
    spans = Spans(lambda made: None)
    for record in (head(), Step(ms(1), (), (), 3), Step(ms(2), (), (), 4)):
        spans.on_record(record)

    assert spans.missing_steps == 7


# Sampling


def test_a_share_is_kept_of_good_ones_and_all_bad_ones() -> None:
    records: list[JournalHead | Step] = [head()]
    for number in range(2000):
        outcome = Outcome.REJECTED if number % 10 == 0 else Outcome.OK
        name = f"r{number}"
        records.append(step(number, stories.request(name, number), effects=[answered(name, outcome)]))

    ends = Counter(spans[0].attributes["clockwork.outcome"] for spans in told(*records, share=0.1))

    assert ends["rejected"] == 200
    assert 120 < ends["ok"] < 240


@pytest.mark.parametrize(("flags", "kept"), [("01", 1), ("00", 0), ("03", 1), ("02", 0)])
def test_who_sampled_the_parent_has_decided(flags: str, kept: int) -> None:
    request = structs.replace(stories.request("a", 1), trace=f"{CLIENT}-{flags}")
    for share in (0.0, 1.0):
        assert len(told(head(), step(1, request, effects=[answered("a")]), share=share)) == kept
        refused = answered("a", Outcome.REJECTED)
        assert len(told(head(), step(1, request, effects=[refused]), share=share)) == 1


def test_ids_follow_from_the_request_s_id() -> None:
    ids = trace_ids("g0-1")

    assert ids == trace_ids("g0-1") != trace_ids("g0-2")
    assert (len(ids.trace_id), len(ids.span_id), ids.parent_id, ids.sampled) == (16, 8, b"", None)
    assert child_id("g0-1", "exec 1") != child_id("g0-1", "exec 2")
    assert is_sampled(ids, 1.0)
    assert not is_sampled(ids, 0.0)


# Whole journals


@pytest.fixture(params=[*SEEDS, "worker_killed", "controller_killed", "overload"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if isinstance(request.param, int):
        return written(tmp_path / "journal", request.param, 300)
    shutil.copy(REAL / f"{request.param}.journal", tmp_path / "journal")
    return tmp_path / "journal"


def test_every_request_is_there_once_and_every_span_has_its_parent(path: Path) -> None:
    answers: dict[str, Answer] = {}
    requests: dict[str, Request] = {}
    for one in read_journal(path):
        requests |= {event.request_id: event for event in one.events if isinstance(event, Request)}
        answers |= {effect.request_id: effect for effect in one.effects if isinstance(effect, Answer)}

    found = told(*(record for _, record in read_records(path)))

    roots = {str(spans[0].attributes["clockwork.request"]): spans for spans in found}
    assert len(roots) == len(found)
    assert answers.keys() <= roots.keys() <= requests.keys()
    for name, spans in roots.items():
        ids = {one.span_id for one in spans}
        assert len(ids) == len(spans)
        assert {one.parent_id for one in spans[1:]} <= ids
        assert {one.trace_id for one in spans} == {spans[0].trace_id}
        assert all(one.start_ns <= one.end_ns for one in spans)
        if name in answers:
            assert spans[0].attributes["clockwork.outcome"] == answers[name].outcome
            assert bool(spans[0].error) == (answers[name].outcome in BAD)


def test_a_share_of_nothing_leaves_all_that_ended_badly(path: Path) -> None:
    bad = Counter(
        effect.request_id
        for one in read_journal(path)
        for effect in one.effects
        if isinstance(effect, Answer) and (effect.outcome in BAD or effect.cause is not Cause.NONE)
    )

    found = told(*(record for _, record in read_records(path)), share=0.0)

    assert Counter(str(spans[0].attributes["clockwork.request"]) for spans in found) == bad
