"""A timeline against its journal, added up in another way: every action, request, flow and queue is there."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    DeviceState,
    GatewayLost,
    Infer,
    Lane,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    Running,
    Status,
    Unload,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.telemetry import Journal, JournalHead, Step, head_of, read_records
from clockwork_serve.telemetry.timeline import TimelineReport, draw_timeline
from clockwork_serve.units import NS_PER_S, ms
from tests.sim.journals import written
from tests.telemetry import stories
from tests.telemetry.traces import Drawn, Trace, read_trace

SEEDS = (3, 6, 14, 17, 33, 68, 93)
STARTED = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)
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
        self.heard_ns: dict[int, int] = {}
        """When the controller got each result; a worker whose clock is ahead says that it started later."""
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
                    self.results[one.action_id], self.heard_ns[one.action_id] = one, step.now_ns
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
    return REAL / f"{request.param}.journal"


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
            assert one.args.get("cause", "") == answer.cause


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
            at for at in ran.get((one.args["request"], run), ())
            if told.results[at].started_ns < one.end_ns and told.results[at].started_ns <= told.heard_ns[at]
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
        Reason.DRAINING, Reason.LATE, Reason.QUARANTINED, Reason.PROMISE_BROKEN,
    ):  # fmt: skip
        assert seen[what], what


# A journal written by hand.


def journal(path: Path, *steps: tuple[float, tuple, tuple], head: bool = True) -> Path:
    """A run of steps: when, in ms, what was observed, and what was decided; after those that are there."""
    book = Journal(path, head_of(ControllerConfig(), STARTED) if head else None)
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
    far = msgspec.structs.replace(result(2, 11, 21.5), transfer_in_ns=ms(2))
    yield 22, (far,), (answered("a", batch=2, queue_ns=ms(1.5)),)
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
    assert (infer["transfer_in_ms"], infer["transfer_out_ms"]) == (2, 0)
    assert "transfer_in_ms" not in trace.of("action")[0].args, "it was on its host"


def test_a_prediction_begins_when_what_was_sent_before_has_ended(tmp_path: Path) -> None:
    """As predicted or, if that had ended, as measured; what runs and is late is taken to end at once."""
    path = journal(
        tmp_path / "j",
        (0, (stories.worker_joined(),), (stories.infer(1), stories.infer(2))),
        (5, (), (stories.infer(3),)),
        (7, (result(1, 1, 6),), (stories.infer(4),)),
        (27, (), (stories.infer(5, expected_ms=1),)),
        (60, (), (stories.infer(6, expected_ms=1),)),
    )
    predicted = {
        one.args["action"]: (one.begin_ns / ms(1), one.end_ns / ms(1))
        for one in drawn(path)[1].of("prediction")
    }

    assert predicted == {1: (0, 10), 2: (10, 20), 3: (20, 30), 4: (26, 36), 5: (47, 48), 6: (81, 82)}


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


@pytest.mark.parametrize(("seed", "part"), [(33, (0, 100)), (33, (200, 600)), (6, (500, 5000))])
def test_parts_of_journals_with_faults(seed: int, part: tuple[int, int], tmp_path: Path) -> None:
    path = written(tmp_path / "journal", seed, 300)
    whole = drawn(path)[1]
    since_ns, until_ns = ms(part[0]), ms(part[1])
    _, trace = drawn(path, since_ns=since_ns, until_ns=until_ns)

    ends = [ns for ns in (since_ns, until_ns) if 0 < ns < ms(900)]
    assert all(any(one.begin_ns < ns < one.end_ns for one in whole.of("request")) for ns in ends)
    for kind in ("request", "action", "prediction"):
        inside = [one for one in whole.of(kind) if one.end_ns >= since_ns and one.begin_ns <= until_ns]
        assert Counter(names(trace.of(kind))) == Counter(names(inside))
    assert trace.flows.keys() == {flow for one in trace.of("request") for flow in one.flows}


def test_the_queue_of_a_part_is_that_of_the_whole(tmp_path: Path) -> None:
    path = journal(
        tmp_path / "j",
        (0, (stories.worker_joined(), stories.model_added()), ()),
        (1, (stories.request("a", 1), stories.request("b", 1)), ()),
        (5, (stories.request("c", 5),), ()),
        (6, (), (stories.infer(1, "a", "b"),)),
        (8, (stories.request("d", 8, model="other/1"),), ()),
        (9, (stories.request("e", 9),), ()),
    )

    waiting, other = (("requests", name, "waiting") for name in ("net/1", "other/1"))
    after = [(ms(5), 3), (ms(6), 1), (ms(9), 2)]
    assert drawn(path)[1].counts == {
        waiting: [(ms(1), 2), *after, (ms(9), 0)],
        other: [(ms(8), 1), (ms(9), 0)],
    }
    assert drawn(path, since_ns=ms(2))[1].counts[waiting] == [*after, (ms(9), 0)]
    assert drawn(path, since_ns=ms(2), until_ns=ms(5))[1].counts == {waiting: [(ms(5), 3)]}
    assert drawn(path, since_ns=ms(7), until_ns=ms(8))[1].counts == {
        waiting: [(ms(8), 1)],
        other: [(ms(8), 1)],
    }


def test_a_run_after_a_restart_of_the_machine_is_drawn_after_the_one_before(tmp_path: Path) -> None:
    asked = (40, (stories.worker_joined(), stories.request("d", 40)), (stories.infer(9, "d"),))
    path = journal(tmp_path / "j", *steps(), asked)
    journal(path, *[(at_ms + 1, *rest) for at_ms, *rest in steps()])
    report, trace = drawn(path)

    assert report.runs == 2
    assert report.requests == 7
    opened = [one for one in trace.of("request") if one.args["outcome"] == "open"]
    assert [(one.args["request"], one.args["message"]) for one in opened] == [("d", "its controller died")]
    first, second = (one for one in trace.of("event") if one.name == "controller started")
    assert (first.begin_ns, second.begin_ns) == (0, ms(40) + NS_PER_S)
    again = [one for one in trace.of("request") if one.begin_ns > second.begin_ns]
    assert [one.name for one in again] == ["ok", "cancelled", "rejected: would_miss_deadline"]
    assert [one.name for one in trace.of("action") if one.begin_ns == ms(40)] == ["net/1 x1: no result"]
    assert len([track for track in trace.tracks.values() if track[-1] == "cpu:0 exec"]) == 1
    assert [one.begin_ns - second.begin_ns for one in trace.of("prediction")][-3:] == [0, ms(10), ms(30)]
    assert {one.depth for kind in ("request", "action", "prediction") for one in trace.of(kind)} == {0}
    _, part = drawn(path, since_ns=second.begin_ns, until_ns=second.begin_ns + ms(12))
    assert names(part.of("request")) == names(again)
    assert names(part.of("action")) == names(trace.of("action"))[4:6]
    assert trace.wall == [{6: 0, 1: int(STARTED.timestamp()) * NS_PER_S}]


def test_what_a_new_controller_does_not_hear_of_has_no_result(tmp_path: Path) -> None:
    """Of two INFERs that the one before sent, one runs when its worker joins again."""
    before = (0, (stories.worker_joined(), stories.request("a"), stories.request("b")), ())
    path = journal(tmp_path / "j", before, (1, (), (stories.infer(1, "a"), stories.infer(2, "b"))))
    running = Running(action_id=2, lane=Lane.EXEC, version=1, left_ns=1)
    state = DeviceState(device="cpu:0", running=(running,))
    joined = msgspec.structs.replace(stories.worker_joined(), states=(state,))
    journal(path, (50, (joined,), ()), (60, (result(2, 10, 55),), ()))

    report, trace = drawn(path)

    assert Counter(names(trace.of("action"))) == Counter(
        [("net/1 x1: no result", 50, 50), ("net/1 x1", 10, 55)]
    )
    assert report.unmatched == 0
    assert not trace.flows, "its requests were open when the controller died, and no INFER had run"


def test_a_journal_that_lost_its_beginning_is_drawn_as_far_as_it_is_there(tmp_path: Path) -> None:
    path = journal(
        tmp_path / "j",
        (10, (stories.request("a", 10), result(1, 2, 9)), (answered("z"), stories.infer(2, "a"))),
        (30, (result(2, 11, 29),), (answered("a", batch=1),)),
        head=False,
    )
    report, trace = drawn(path)

    assert (report.runs, report.unmatched) == (0, 2)
    assert names(trace.of("request")) == [("ok", 10, 30)]
    assert names(trace.of("action")) == [("net/1 x1", 11, 29)]


def test_steps_that_were_never_written_are_told(tmp_path: Path) -> None:
    path = tmp_path / "j"
    book = Journal(path)
    for at_ms, gone in ((1, 0), (2, 40), (3, 2)):
        book._unsaid = gone
        book.on_step(ms(at_ms), (), ())
    book.close()

    report, trace = drawn(path)

    assert report.missing_steps == 42
    assert [(one.name, one.args) for one in trace.of("event")] == [
        ("steps are missing", {"steps": 40}), ("steps are missing", {"steps": 2}),
    ]  # fmt: skip


def test_what_happens_many_times_at_once_is_drawn_once(tmp_path: Path) -> None:
    asked = [f"r{at}" for at in range(300)]
    added = tuple(stories.model_added(f"m{at}") for at in range(1000))
    path = journal(
        tmp_path / "j",
        (0, added, ()),
        (1, tuple(stories.request(name, 1) for name in asked), ()),
        (2, (), tuple(answered(name, Outcome.FAILED, reason=Reason.WORKER_LOST) for name in asked)),
    )
    report, trace = drawn(path)

    assert report.refused == 300
    (refusal,) = trace.of("refusal")
    assert (refusal.track, refusal.args["times"]) == (("refusals", "failed: worker_lost"), 300)
    assert len(refusal.flows) == len(trace.flows) == 300
    assert [one.args.get("times") for one in trace.of("event") if one.name == "model added"] == [1000]
    assert max(one.depth for one in trace.drawn) <= 1


def test_a_query_that_is_refused_has_no_request(tmp_path: Path) -> None:
    reply = AdmissionReply(announced_id="q", gateway="g0", reason=Reason.WOULD_MISS_DEADLINE)
    admitted = AdmissionReply(announced_id="p", gateway="g0")
    report, trace = drawn(journal(tmp_path / "j", (0, (), (reply, admitted))))

    assert [(one.track[1], one.args) for one in trace.of("refusal")] == [
        ("rejected: would_miss_deadline", {"query": "q"})
    ]
    assert (report.requests, report.refused) == (0, 0)


def test_names_of_clients_and_models_are_data(tmp_path: Path) -> None:
    hostile = "\x1b]0;\x07<img src=x onerror=alert(1)>\u202e" + "x" * 10_000
    asked = msgspec.structs.replace(
        stories.request("a", 0, gateway=hostile, model=hostile), tenant=hostile, signature=hostile
    )
    answer = answered("a", Outcome.FAILED, reason=Reason.MODEL_RAISED, message=hostile)
    _, trace = drawn(journal(tmp_path / "j", (0, (asked,), ()), (1, (), (answer,))))

    (one,) = trace.of("request")
    for text in (*one.track, *(value for value in one.args.values() if isinstance(value, str))):
        assert text.isprintable()
        assert len(text) <= 1000
    assert one.args["tenant"].startswith("\\x1b]0;\\x07<img")


def test_one_that_is_stopped_leaves_a_whole_file(tmp_path: Path) -> None:
    out, told = io.BytesIO(), []
    report = draw_timeline(
        written(tmp_path / "journal", 6, 600), out, tell=lambda *said: told.append(said), stopped=lambda: True
    )

    trace = read_trace(out.getvalue())
    assert report.cut
    assert len(told) == 1
    assert len(trace.of("request")) == report.requests > told[0][1] > 0
