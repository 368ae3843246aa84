"""A timeline against its journal, added up in another way: every action, request, flow and queue is there."""

from __future__ import annotations

import gzip
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    Answer,
    GatewayLost,
    Infer,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
    Unload,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry import Journal, JournalHead, Step, head_of, read_records
from clockwork_serve.telemetry.timeline import TimelineReport, draw_timeline
from clockwork_serve.units import ms
from tests.sim.journals import written
from tests.telemetry import stories
from tests.telemetry.traces import Drawn, Trace, read_trace

SEEDS = (3, 6, 14, 17, 33)
REAL = Path(__file__).parents[2] / "benchmarks" / "journals"


def drawn(path: Path, **given: int) -> tuple[TimelineReport, Trace]:
    out = io.BytesIO()
    report = draw_timeline(path, out, **given)
    return report, read_trace(out.getvalue())


class Told:
    """What a journal tells, added up in a way of its own."""

    def __init__(self, path: Path) -> None:
        self.requests: list[tuple[Request, int, Answer | None, str, int]] = []
        """Each with when it ended, its answer, its outcome, and the run that it was in."""
        self.runs: dict[int, int] = {}
        """Of each action, the run that it was sent in."""
        self.actions: dict[int, Load | Unload | Infer] = {}
        self.results: dict[int, Result] = {}
        self.waiting: list[tuple[int, Counter[str]]] = []
        self.seen: Counter[str] = Counter()
        self._open: dict[str, Request] = {}
        self._held: dict[str, int] = {}
        self._devices: dict[str, str] = {}
        self._now_ns = self._run = 0
        for _, record in read_records(path):
            if isinstance(record, JournalHead):
                self._close(lambda request: True, "open")
                self._run += 1
                self.waiting.append((self._now_ns, Counter()))
            elif isinstance(record, Step):
                self._step(record)
        self._close(lambda request: True, "open")
        self.waiting.append((self._now_ns, Counter()))

    def _close(self, of, outcome: str) -> None:
        for request in [one for one in self._open.values() if of(one)]:
            self.requests.append((request, self._now_ns, None, outcome, self._run))
            del self._open[request.request_id]
            self._held.pop(request.request_id, None)

    def _drop(self, worker: str) -> None:
        self._held = {
            request: action
            for request, action in self._held.items()
            if self._devices[self.actions[action].device] != worker
        }

    def _step(self, step: Step) -> None:
        self._now_ns = step.now_ns
        lost = set()
        for one in (*step.events, *step.effects):
            self.seen[type(one).__name__] += 1
            match one:
                case Request():
                    self._open[one.request_id] = one
                case Answer():
                    request = self._open.pop(one.request_id)
                    self.requests.append((request, step.now_ns, one, one.outcome, self._run))
                    self.seen[one.reason or one.outcome] += 1
                case Infer() | Load() | Unload():
                    self.actions[one.action_id], self.runs[one.action_id] = one, self._run
                    if isinstance(one, Infer):
                        self._held |= dict.fromkeys([call.request_id for call in one.calls], one.action_id)
                case Result():
                    self.results[one.action_id] = one
                    self._held = {key: at for key, at in self._held.items() if at != one.action_id}
                case WorkerJoined():
                    self._devices |= {spec.device: one.worker for spec in one.devices}
                    running = {each.action_id for state in one.states for each in state.running}
                    self._held = {
                        key: at
                        for key, at in self._held.items()
                        if at in running or self._devices[self.actions[at].device] != one.worker
                    }
                case WorkerLost():
                    self._drop(one.worker)
                case WorkerHung(why=why) if why:
                    self._drop(one.worker)
                case GatewayLost():
                    lost.add(one.gateway)
        self._close(lambda request: request.gateway in lost, "cancelled")
        queues = Counter(one.model for key, one in self._open.items() if key not in self._held)
        self.waiting.append((step.now_ns, queues))


@pytest.fixture(params=[*SEEDS, "worker_killed", "controller_killed", "cold_models"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Journals of simulations with faults, and of real servers."""
    if isinstance(request.param, int):
        return written(tmp_path / "journal", request.param, 300)
    with gzip.open(REAL / f"{request.param}.journal.gz") as packed, (tmp_path / "journal").open("wb") as file:
        shutil.copyfileobj(packed, file)
    return tmp_path / "journal"


def test_it_holds_what_the_journal_holds(path: Path) -> None:
    told = Told(path)
    report, trace = drawn(path)

    assert report.requests == len(told.requests) == len(trace.of("request"))
    assert report.actions == len(told.actions) == len(trace.of("action"))
    assert (report.unmatched, report.missing_steps, report.torn_bytes, report.cut) == (0, 0, 0, False)
    check_actions(told, trace)
    check_requests(told, trace)
    check_flows(told, trace)
    check_queues(told, trace)


def check_actions(told: Told, trace: Trace) -> None:
    found = {one.args["action"]: one for one in trace.of("action")}
    predicted = {one.args["action"]: one for one in trace.of("prediction")}
    assert found.keys() == told.actions.keys()
    assert predicted.keys() == {at for at, one in told.actions.items() if not isinstance(one, Unload)}
    for at, action in told.actions.items():
        one, result = found[at], told.results.get(at)
        lane = "exec" if isinstance(action, Infer) else "load"
        assert one.track == ("devices", f"{action.device} {lane}")
        assert one.args["model"] == action.model
        if result is not None:
            assert (one.begin_ns, one.end_ns) == (result.started_ns, result.ended_ns)
            assert one.args.get("status", "ok") == result.status
            assert one.args.get("message", "") == result.message
            assert one.args["window_earliest_ms"] * 1e6 == pytest.approx(
                action.window.earliest_ns - result.started_ns, abs=1
            )
        else:
            assert one.begin_ns == one.end_ns
            assert one.name.endswith(("worker lost", "worker was lost", "no result"))
        if isinstance(action, Infer):
            assert (one.args["batch"], one.args["requests"]) == (action.batch, len(action.calls))
        if at in predicted:
            guess = predicted[at]
            assert guess.track == ("devices", f"{action.device} {lane}, predicted")
            assert guess.end_ns - guess.begin_ns == action.expected_ns
            assert (guess.begin_ns - one.begin_ns) / 1e6 == pytest.approx(one.args["predicted_start_ms"])
            assert (guess.end_ns - one.begin_ns) / 1e6 == pytest.approx(one.args["predicted_end_ms"])


def check_requests(told: Told, trace: Trace) -> None:
    def row(name: str, begin_ns: int, end_ns: int, reason: str, outcome: str) -> tuple[object, ...]:
        return (name, begin_ns, end_ns, reason, outcome)

    expected = Counter(
        (request.request_id, request.arrival_ns, end_ns, "" if answer is None else answer.reason, outcome)
        for request, end_ns, answer, outcome, _ in told.requests
    )
    found = Counter(
        (one.args["request"], one.begin_ns, one.end_ns, one.args.get("reason", ""), one.args["outcome"])
        for one in trace.of("request")
    )
    assert found == expected
    by_id = {(one[0].request_id, one[1]): one for one in told.requests}
    for one in trace.of("request"):
        request, _, answer, *_ = by_id[one.args["request"], one.end_ns]
        assert one.track == ("requests", request.model, "requests")
        assert one.args["slo_ms"] == request.slo_ns / 1e6
        assert one.args.get("tenant", "") == request.tenant
        assert one.args.get("priority", 0) == request.priority
        if answer is not None and answer.outcome is Outcome.OK:
            assert (one.args["batch"], one.args.get("cold", False)) == (answer.batch, answer.cold)
            assert one.args["queue_ms"] == answer.queue_ns / 1e6
        if answer is not None and answer.promised:
            assert one.args["cause"] == answer.cause


def check_flows(told: Told, trace: Trace) -> None:
    """From each request through the INFERs that ran before its end to its answer, or refusal by reason."""
    ran: dict[tuple[str, int], set[int]] = {}
    for at, action in told.actions.items():
        for call in action.calls if isinstance(action, Infer) and at in told.results else ():
            ran.setdefault((call.request_id, told.runs[at]), set()).add(at)
    ends = {(one[0].request_id, one[1]): one for one in told.requests}
    flows = [flow for one in trace.of("request") for flow in one.flows]
    assert len(flows) == len(set(flows)) == len(trace.flows)
    for one in trace.of("request"):
        _, _, answer, outcome, run = ends[one.args["request"], one.end_ns]
        steps = trace.flows[one.flows[0]] if one.flows else [one]
        assert [step for step in steps if step.kind == "request"] == [one]
        assert {step.args["action"] for step in steps if step.kind == "action"} == {
            at for at in ran.get((one.args["request"], run), ()) if told.results[at].started_ns < one.end_ns
        }  # fmt: skip
        if outcome != "open":
            assert steps[-1].end_ns == one.end_ns
        if outcome == Outcome.OK:
            assert steps[-1].track == ("requests", one.args["model"], "answers")
        elif outcome != "open":
            why = f"{outcome}: {answer.reason}" if answer is not None and answer.reason else outcome
            assert steps[-1].track == ("refusals", why)


def check_queues(told: Told, trace: Trace) -> None:
    samples: dict[str, list[tuple[int, int]]] = {
        track[1]: counts for track, counts in trace.counts.items() if track[2] == "waiting"
    }
    at = dict.fromkeys(samples, 0)
    shown: Counter[str] = Counter()
    for now_ns, queues in dict(told.waiting).items():
        for model, counts in samples.items():
            while at[model] < len(counts) and counts[at[model]][0] <= now_ns:
                shown[model] = counts[at[model]][1]
                at[model] += 1
        assert +shown == +queues, now_ns
    assert at == {model: len(counts) for model, counts in samples.items()}


def test_the_journals_hold_all_that_may_happen(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        told = Told(written(tmp_path / f"{seed}", seed, 300))
        seen += told.seen
        seen["no result"] += len(told.actions) - len(told.results)
        seen["not ok"] += sum(result.status is not Status.OK for result in told.results.values())

    for what in (
        "Load", "Unload", "Infer", "WorkerLost", "WorkerHung", "GatewayLost", "Readiness", "no result",
        "not ok", Outcome.CANCELLED, Outcome.EXPIRED, Reason.WOULD_MISS_DEADLINE, Reason.TENANT_QUOTA,
        Reason.DRAINING, Reason.LATE, Reason.QUARANTINED,
    ):  # fmt: skip
        assert seen[what], what


# A journal written by hand.


def journal(path: Path, *steps: tuple[float, tuple, tuple], started: str = "") -> Path:
    """A run of steps: when, in ms, what was observed, and what was decided."""
    head = head_of(ControllerConfig())
    book = Journal(path, None if started == "none" else head)
    for at_ms, events, effects in steps:
        book.on_step(ms(at_ms), events, effects)
    book.close()
    return path


def answered(name: str, outcome: Outcome = Outcome.OK, **more: object) -> Answer:
    return Answer(request_id=name, gateway="g0", outcome=outcome, **more)  # type: ignore[arg-type]


def result(action_id: int, from_ms: float, to_ms: float, status: Status = Status.OK) -> Result:
    return Result(
        action_id=action_id, device="cpu:0", status=status, started_ns=ms(from_ms), ended_ns=ms(to_ms)
    )


def steps() -> Iterator[tuple[float, tuple, tuple]]:
    """Two requests in a batch, one of which is answered in vain; one refused; a LOAD whose worker dies."""
    yield 0, (stories.worker_joined(), stories.model_added()), (stories.load(1),)
    yield 5, (result(1, 0.5, 4.5),), ()
    yield 10, (stories.request("a", 9.5), stories.request("b", 9.75)), (stories.infer(2, "a", "b"),)
    yield (
        12,
        (stories.request("c", 12, slo_ms=1),),
        (answered("c", Outcome.REJECTED, reason=Reason.WOULD_MISS_DEADLINE),),
    )
    yield 15, (), (answered("b", Outcome.CANCELLED),)
    yield 22, (result(2, 11, 21.5),), (answered("a", batch=2, queue_ns=ms(1.5)),)
    yield 30, (), (stories.load(3),)
    yield 31, (WorkerLost(worker="w0", running=(3,)),), ()


def names(drawn: list[Drawn]) -> list[tuple[str, float, float]]:
    return [(one.name, one.begin_ns / ms(1), one.end_ns / ms(1)) for one in drawn]


def test_a_small_journal_as_a_whole(tmp_path: Path) -> None:
    report, trace = drawn(journal(tmp_path / "j", *steps()))

    assert names(trace.of("action")) == [
        ("LOAD net/1", 0.5, 4.5), ("net/1 x2", 11, 21.5),
        ("LOAD net/1: running when its worker was lost", 31, 31),
    ]  # fmt: skip
    assert names(trace.of("prediction")) == [
        ("LOAD net/1", 0, 4),
        ("net/1 x2", 10, 20),
        ("LOAD net/1", 30, 34),
    ]
    assert names(trace.of("request")) == [
        ("ok", 9.5, 22), ("cancelled", 9.75, 15), ("rejected: would_miss_deadline", 12, 12),
    ]  # fmt: skip
    assert names(trace.of("state")) == [("up", 0, 31), ("lost", 31, 31)]
    assert [[one.kind for one in flow] for flow in trace.flows.values()] == [
        ["request", "action", "answer"], ["request", "action", "refusal"], ["request", "refusal"],
    ]  # fmt: skip
    assert not trace.counts, "nothing waited when a step was over"
    assert (report.requests, report.refused, report.actions, report.runs) == (3, 2, 3, 1)
    infer = trace.of("action")[1].args
    assert infer["predicted_start_ms"] == -1
    assert infer["predicted_end_ms"] == 9
    assert infer["predicted_lasts_ms"] == 10


def test_a_part_of_it(tmp_path: Path) -> None:
    """What overlaps the part is whole, and nothing else is there; no flow leads out of it."""
    path = journal(tmp_path / "j", *steps())
    report, trace = drawn(path, since_ns=ms(16), until_ns=ms(29))

    assert names(trace.of("request")) == [("ok", 9.5, 22)]
    assert names(trace.of("action")) == [("net/1 x2", 11, 21.5)]
    assert names(trace.of("state")) == [("up", 16, 29)]
    assert [[one.kind for one in flow] for flow in trace.flows.values()] == [["request", "action", "answer"]]
    assert report.requests == 1
    assert report.unmatched == 0


@pytest.mark.parametrize("part", [(0, 400), (350, 700), (900, 5000)])
def test_parts_of_journals_with_faults(part: tuple[int, int], tmp_path: Path) -> None:
    path = written(tmp_path / "journal", 6, 300)
    whole = drawn(path)[1]
    first_ns, (since_ns, until_ns) = 0, (ms(part[0]), ms(part[1]))
    _, trace = drawn(path, since_ns=since_ns, until_ns=until_ns)

    for kind in ("request", "action", "prediction"):
        inside = [
            one for one in whole.of(kind)
            if one.end_ns >= first_ns + since_ns and one.begin_ns <= first_ns + until_ns
        ]  # fmt: skip
        assert Counter(names(trace.of(kind))) == Counter(names(inside))
    assert all(len(flow) > 1 for flow in trace.flows.values())


def test_the_queue_of_a_part_is_that_of_the_whole(tmp_path: Path) -> None:
    path = journal(
        tmp_path / "j",
        (0, (stories.worker_joined(), stories.model_added()), ()),
        (1, (stories.request("a", 1), stories.request("b", 1)), ()),
        (5, (stories.request("c", 5),), ()),
        (6, (), (stories.infer(1, "a", "b"),)),
    )

    waiting = ("requests", "net/1", "waiting")
    assert drawn(path)[1].counts == {waiting: [(ms(1), 2), (ms(5), 3), (ms(6), 1), (ms(6), 0)]}
    assert drawn(path, since_ns=ms(2))[1].counts == {waiting: [(ms(5), 3), (ms(6), 1), (ms(6), 0)]}
    assert drawn(path, since_ns=ms(2), until_ns=ms(5))[1].counts == {waiting: [(ms(5), 3)]}
