"""Tracks of a journal against the journal, added up in another way: actions, requests and queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
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
from clockwork_serve.telemetry import JournalHead, Step, head_of, read_records
from clockwork_serve.telemetry.tracks import OPEN, AskedAction, OpenRequest, Tracks
from clockwork_serve.units import NS_PER_S, ms
from tests.sim.journals import written
from tests.telemetry import stories

SEEDS = (3, 6, 14, 17, 33, 68, 93)
REAL = Path(__file__).parents[2] / "benchmarks" / "journals"


class Kept(Tracks):
    """Keeps all that a subclass would draw."""

    def __init__(self, records: Iterable[object]) -> None:
        super().__init__()
        self.requests: list[tuple[Request, int, Answer | None, str, str]] = []
        """Each with when it ended, its answer, its outcome and why."""
        self.predicted: dict[int, tuple[int, int]] = {}
        self.actions: list[tuple[int, Result | None, str]] = []
        self.queues: dict[str, int] = {}
        self.queues_after: list[tuple[int, dict[str, int]]] = []
        self.missing: list[int] = []
        self.began: list[int] = []
        for record in records:
            self.take(record)  # type: ignore[arg-type]

    def run_began(self, head: JournalHead | None, *, first: bool) -> None:
        self.began.append(self.now_ns + self.offset_ns)

    def request_ended(self, asked: OpenRequest, outcome: str, answer: Answer | None, message: str) -> None:
        self.requests.append((asked.request, self.now_ns, answer, outcome, message))

    def action_sent(self, sent: AskedAction) -> None:
        self.predicted[sent.action.action_id] = (sent.start_ns, sent.start_ns + sent.expected_ns)

    def action_ended(self, sent: AskedAction, result: Result | None, why: str) -> None:
        self.actions.append((sent.action.action_id, result, why))

    def steps_missing(self, steps: int) -> None:
        self.missing.append(steps)

    def waiting_changed(self, models: Iterable[str]) -> None:
        self.queues |= {model: self.waiting[model] for model in models}

    def step_ended(self) -> None:
        self.queues_after.append((self.now_ns, +Counter(self.queues)))


def kept_of(path: Path) -> Kept:
    return Kept(record for _, record in read_records(path))


class Told:
    """What a journal tells, added up in a way of its own."""

    def __init__(self, path: Path) -> None:
        self.requests: list[tuple[Request, int, Answer | None, str]] = []
        """Each with when it ended, its answer and its outcome."""
        self.actions: dict[int, Load | Unload | Infer] = {}
        self.results: dict[int, Result] = {}
        self.waiting: list[tuple[int, Counter[str]]] = []
        self.seen: Counter[str] = Counter()
        self._open: dict[str, Request] = {}
        self._held: dict[str, int] = {}
        self._devices: dict[str, str] = {}
        self._now_ns = 0
        for _, record in read_records(path):
            if isinstance(record, JournalHead):
                self._close(lambda request: True, "open")
                self.waiting.append((self._now_ns, Counter()))
            elif isinstance(record, Step):
                self._step(record)

    def _close(self, of, outcome: str) -> None:
        for request in [one for one in self._open.values() if of(one)]:
            self.requests.append((request, self._now_ns, None, outcome))
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
                    self.requests.append((request, step.now_ns, one, one.outcome))
                    self.seen[one.reason or one.outcome] += 1
                case Infer() | Load() | Unload():
                    self.actions[one.action_id] = one
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
    return REAL / f"{request.param}.journal"


def test_they_hold_what_the_journal_holds(path: Path) -> None:
    told, kept = Told(path), kept_of(path)

    assert [one[:4] for one in kept.requests] == told.requests
    assert kept.predicted.keys() == told.actions.keys()
    assert {action: result for action, result, _ in kept.actions if result} == told.results
    assert {why for _, result, why in kept.actions if result is None} <= {
        "worker lost", "running when its worker was lost", "no result",
    }  # fmt: skip
    assert dict(kept.queues_after) == {at_ns: +queues for at_ns, queues in told.waiting}


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


def step(at_ms: float, *events: object, effects: tuple[object, ...] = ()) -> Step:
    return Step(ms(at_ms), events, effects)  # type: ignore[arg-type]


def result(action_id: int, from_ms: float, to_ms: float) -> Result:
    return msgspec.structs.replace(stories.result(action_id), started_ns=ms(from_ms), ended_ns=ms(to_ms))


def run(*steps: Step) -> list[object]:
    return [head_of(ControllerConfig()), *steps]


def test_a_prediction_begins_when_what_was_sent_before_has_ended() -> None:
    """As predicted or, if that had ended, as measured; what runs and is late is taken to end at once."""
    kept = Kept(run(
        step(0, stories.worker_joined(), effects=(stories.infer(1), stories.infer(2))),
        step(5, effects=(stories.infer(3),)),
        step(7, result(1, 1, 6), effects=(stories.infer(4),)),
        step(27, effects=(stories.infer(5, expected_ms=1),)),
        step(60, effects=(stories.infer(6, expected_ms=1),)),
    ))  # fmt: skip

    assert {at: (begin / ms(1), end / ms(1)) for at, (begin, end) in kept.predicted.items()} == {
        1: (0, 10), 2: (10, 20), 3: (20, 30), 4: (26, 36), 5: (47, 48), 6: (81, 82),
    }  # fmt: skip


def test_a_run_after_a_restart_of_the_machine_follows_the_one_before() -> None:
    asked = step(40, stories.worker_joined(), stories.request("d", 40), effects=(stories.infer(9, "d"),))
    kept = Kept([*run(asked), *run(step(1, stories.worker_joined()))])

    assert kept.began == [ms(40), ms(40) + NS_PER_S]
    assert [(one[0].request_id, one[3], one[4]) for one in kept.requests] == [
        ("d", OPEN, "its controller died")
    ]
    assert kept.actions == [(9, None, "no result")]


def test_what_a_new_controller_does_not_hear_of_has_no_result() -> None:
    """Of two INFERs that the one before sent, one runs when its worker joins again."""
    asked = step(0, stories.worker_joined(), stories.request("a"), stories.request("b"))
    running = Running(action_id=2, lane=Lane.EXEC, version=1, left_ns=1)
    states = (DeviceState(device="cpu:0", running=(running,)),)
    joined = msgspec.structs.replace(stories.worker_joined(), states=states)
    late = result(2, 10, 55)
    kept = Kept([
        *run(asked, step(1, effects=(stories.infer(1, "a"), stories.infer(2, "b")))),
        *run(step(50, joined), step(60, late)),
    ])  # fmt: skip

    assert kept.actions == [(1, None, "no result"), (2, late, "")]


def test_what_is_not_of_this_journal_is_left_out() -> None:
    """Its beginning was deleted."""
    asked = step(
        10, stories.request("a", 10), result(1, 2, 9), effects=(stories.answer("z"), stories.infer(2, "a"))
    )
    kept = Kept([asked, step(30, result(2, 11, 29), effects=(stories.answer("a"),))])

    assert [one[0].request_id for one in kept.requests] == ["a"]
    assert [action for action, *_ in kept.actions] == [2]


def test_steps_that_were_never_written_are_told() -> None:
    assert Kept(run(Step(ms(1), (), ()), Step(ms(2), (), (), 40), Step(ms(3), (), (), 2))).missing == [40, 2]
