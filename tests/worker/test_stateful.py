"""Random lives of a worker against bookkeeping of the test's own: lists of pages, a set of what is owed.

The oracle knows no queue and no table. It holds each start and each refusal against what was sent, what runs,
and which page holds what.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from clockwork_serve.messages import (
    Action,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    DeviceState,
    Extent,
    Infer,
    Lane,
    Load,
    Result,
    RetainWeights,
    Status,
    Unload,
    Window,
    WorkerJoined,
)
from clockwork_serve.units import ms
from clockwork_serve.worker import (
    ControllerFound,
    ControllerLost,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Start,
    Stop,
    Worker,
    WorkerEffect,
    WorkerEvent,
)
from tests.worker.actions import CODE, GPU, SPEC, infer, load, unload

PAGES = 6
MORE = structs.replace(CODE, code_id="more")
CODES = {"net": CODE, "more": MORE}
extents = st.sampled_from(
    [Extent(0, 2), Extent(1, 2), Extent(2, 2), Extent(4, 2), Extent(0, 6), Extent(5, 2)]
)
models = st.sampled_from(["a", "b"])
versions = st.integers(1, 2)
code_ids = st.sampled_from(["net", "net", "net", "more"])
opens = st.sampled_from([0, 0, 0, 0, 0, 0, 1, 4, -3, 20_000])
lasts = st.sampled_from([5, 5, 1, 0, 1000])


@dataclass
class Sent:
    """An action that is owed a result."""

    action: Action
    arrival: int
    key_ns: int
    lane: Lane


@dataclass
class Claim:
    """What a page holds. ``ready`` is False while it is copied or forgotten."""

    model: str
    version: int
    extent: Extent
    code_id: str
    ready: bool = False
    forgotten_by_controller: bool = False


def within(action: Action, earliest_ns: int, width_ns: int) -> Action:
    """The action, to be started then or at most so much later."""
    changed = structs.replace(action, window=Window(earliest_ns, earliest_ns + width_ns))
    assert isinstance(changed, Action)
    return changed


def same_weights(load: Load, action: Action) -> bool:
    """Whether an INFER wants what a LOAD brings."""
    return isinstance(action, Infer) and all(
        getattr(load, field) == getattr(action, field) for field in ("model", "version", "extent", "code_id")
    )


class Lives(RuleBasedStateMachine):
    """The world around one worker with one device."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = ms(1000)
        self.worker = Worker((structs.replace(SPEC, pages=PAGES),))
        self.sent: dict[int, Sent] = {}
        self.answered: set[int] = set()
        self.next_id = 0
        self.arrivals = 0
        self.running: dict[Lane, Start | Prepare | Retire | None] = {Lane.LOAD: None, Lane.EXEC: None}
        self.pages: list[Claim | None] = [None] * PAGES
        self.usable: set[str] = set()  # codes that are prepared and not being retired
        self.ready_due: set[str] = set()
        self.stopped = False
        self.states: tuple[DeviceState, ...] = ()

    # What happens

    @initialize()
    def begin(self) -> None:
        self.tell(CodeAdded(code=CODE))
        work = self.running[Lane.LOAD]
        assert isinstance(work, Prepare)
        self.end(Lane.LOAD, work, ok=True)

    @rule(ahead_ms=st.sampled_from([0, 0, 1, 3, 10]))
    def time_passes(self, ahead_ms: int) -> None:
        self.now_ns += ms(ahead_ms)
        self.tell()

    @rule()
    def time_passes_to_the_wakeup(self) -> None:
        wake_ns = self.worker.next_wakeup_ns()
        if wake_ns is not None:
            self.now_ns = wake_ns
            self.tell()

    @rule(data=st.data(), count=st.integers(1, 3))
    def orders_come(self, data: st.DataObject, count: int) -> None:
        self.tell(*(data.draw(self.action()) for _ in range(count)))

    def action(self) -> st.SearchStrategy[Action]:
        def make(
            kind: str, model: str, at: Extent, version: int, code_id: str, after: int, last: int, batch: int
        ) -> Action:
            self.next_id += 1
            number = self.next_id
            earliest_ns = self.now_ns + ms(after)
            made: Action
            if kind == "load":
                made = load(number, model, at.first, at.count, version, size=at.count * 100, code_id=code_id)
            elif kind == "unload":
                made = unload(number, model, at.first, at.count, version)
            else:
                made = infer(number, model, at.first, at.count, version, batch=batch, code_id=code_id)
            return within(made, earliest_ns, ms(last))

        kinds = st.sampled_from(["load", "load", "unload", "infer", "infer", "infer"])
        batches = st.sampled_from([1, 1, 1, 2, 3])
        return st.builds(make, kinds, models, extents, versions, code_ids, opens, lasts, batches)

    @rule(data=st.data())
    def an_order_for_what_is_there_comes(self, data: st.DataObject) -> None:
        claims = [claim for claim in self.pages if claim is not None]
        if not claims:
            return
        claim = data.draw(st.sampled_from(claims))
        self.next_id += 1
        first, count = claim.extent.first, claim.extent.count
        made: Action = unload(self.next_id, claim.model, first, count, claim.version)
        if data.draw(st.booleans()):
            made = infer(self.next_id, claim.model, first, count, claim.version, code_id=claim.code_id)
        self.tell(within(made, self.now_ns, ms(5)))

    @rule(model=models, at=extents)
    def weights_are_loaded(self, model: str, at: Extent) -> None:
        if self.running[Lane.LOAD] is None:
            self.next_id += 1
            made = load(self.next_id, model, at.first, at.count, size=at.count * 100)
            self.tell(within(made, self.now_ns, ms(5)))
            work = self.running[Lane.LOAD]
            if work is not None:
                self.end(Lane.LOAD, work, ok=True)

    @rule(lane=st.sampled_from(list(Lane)), ok=st.sampled_from([True, True, True, False]))
    def a_lane_ends(self, lane: Lane, ok: bool) -> None:
        work = self.running[lane]
        if work is not None:
            self.end(lane, work, ok)

    def end(self, lane: Lane, work: Start | Prepare | Retire, ok: bool) -> None:
        self.running[lane] = None
        if isinstance(work, Prepare):
            code_id = work.code.code_id
            if ok:
                self.usable.add(code_id)
            self.tell(Prepared(device=GPU, code_id=code_id, ok=ok, message="" if ok else "no"))
        elif isinstance(work, Retire):
            self.tell(Retired(device=GPU, code_id=work.code_id))
        else:
            self.page_ends(work.action, ok)
            self.tell(
                Result(
                    action_id=work.action.action_id, device=GPU,
                    status=Status.OK if ok else Status.DEVICE_FAULT, started_ns=self.now_ns,
                    ended_ns=self.now_ns, outputs=(b"y",) if ok and isinstance(work.action, Infer) else (),
                ),
                expected=(work.action.action_id, ok) if work.action.action_id in self.sent else None,
            )  # fmt: skip

    def page_ends(self, action: Action, ok: bool) -> None:
        span = range(action.extent.first, action.extent.first + action.extent.count)
        for page in span:
            claim = self.pages[page]
            if isinstance(action, Load) and ok:
                assert claim is not None
                claim.ready = True
            elif not isinstance(action, Infer):
                self.pages[page] = None

    @rule(code_id=st.sampled_from(["net", "more"]))
    def a_code_is_added(self, code_id: str) -> None:
        self.ready_due.add(code_id)
        self.tell(CodeAdded(code=CODES[code_id]))

    @rule()
    def a_code_is_removed(self) -> None:
        self.ready_due.discard("more")
        self.tell(CodeRemoved(code_id="more"))

    @precondition(lambda self: self.now_ns > ms(1005))
    @rule(dice=st.integers(0, 3), kept=st.sets(versions))
    def the_controller_goes_and_another_comes(self, dice: int, kept: set[int]) -> None:
        if dice or self.stopped:
            return
        self.ready_due.clear()
        self.tell(ControllerFound(worker="w"))
        self.tell(ControllerLost())
        assert set(self.sent) <= self.running_ids(), "what waits is refused, what runs goes on"
        self.states = ()
        self.tell(ControllerFound(worker="w"))
        (state,) = self.states
        self.judge_state(state)
        for claim in self.pages:
            if claim is not None and claim.version not in kept:
                claim.forgotten_by_controller = True
        self.tell(RetainWeights(device=GPU, versions=tuple(kept)))

    def judge_state(self, state: DeviceState) -> None:
        """What the next controller is told is what is there."""
        run = self.running[Lane.LOAD]
        leaving = run.action if isinstance(run, Start) and isinstance(run.action, Unload) else None
        there = {
            (claim.extent.first, claim.model, claim.version, claim.ready)
            for claim in self.pages
            if claim is not None and not claim.forgotten_by_controller
            if leaving is None or claim.extent != leaving.extent
        }
        assert {(one.extent.first, one.model, one.version, one.ready) for one in state.weights} == there
        assert set(state.codes) == self.usable
        works = [work.action for work in self.running.values() if isinstance(work, Start)]
        assert {one.action_id for one in state.running} == {
            action.action_id for action in works if not isinstance(action, Unload)
        }

    @precondition(lambda self: self.now_ns > ms(1015))
    @rule(dice=st.integers(0, 9))
    def the_process_is_told_to_stop(self, dice: int) -> None:
        if dice == 0:
            self.stopped = True
            self.ready_due.clear()
            self.tell(Stop())
            assert set(self.sent) <= self.running_ids()

    # What must be true of the answer

    def tell(self, *events: WorkerEvent, expected: tuple[int, bool] | None = None) -> None:
        for event in events:
            if isinstance(event, Action):
                self.arrivals += 1
                key_ns = max(event.window.earliest_ns, self.now_ns)
                lane = Lane.EXEC if isinstance(event, Infer) else Lane.LOAD
                self.sent[event.action_id] = Sent(event, self.arrivals, key_ns, lane)
            self.worker.observe(event, self.now_ns)
        lost = any(isinstance(event, (ControllerLost, Stop)) for event in events)
        for effect in self.worker.decide(self.now_ns):
            self.judge(effect, expected, lost=lost)
        assert self.worker.decide(self.now_ns) == []
        if expected is not None:
            assert expected[0] in self.answered, "what ended is answered at once"

    def judge(self, effect: WorkerEffect, expected: tuple[int, bool] | None, *, lost: bool) -> None:
        match effect:
            case Start():
                self.judge_start(effect)
            case Prepare() | Retire():
                assert self.running[Lane.LOAD] is None
                self.running[Lane.LOAD] = effect
                if isinstance(effect, Retire):
                    self.usable.discard(effect.code_id)
                    used = {
                        sent.action.code_id
                        for sent in self.sent.values()
                        if not isinstance(sent.action, Unload)
                    }
                    assert effect.code_id not in used, "a code in use was retired"
            case CodeReady():
                assert not effect.ok or effect.code_id in self.usable
            case WorkerJoined():
                self.states = effect.states
            case Result():
                self.judge_result(effect, expected, lost=lost)

    def judge_start(self, start: Start) -> None:
        action = start.action
        assert self.running[start.lane] is None, f"two at once on {start.lane}"
        self.running[start.lane] = start
        claims = self.under(action.extent)
        if action.action_id < 0:
            assert isinstance(action, Unload)
            assert all(claim is not None and claim.forgotten_by_controller for claim in claims)
        else:
            sent = self.sent[action.action_id]
            assert action.window.earliest_ns <= self.now_ns <= action.window.latest_ns, "outside its window"
            for other in self.waiting(start.lane):
                assert (sent.key_ns, sent.arrival) < (other.key_ns, other.arrival), f"{other} was due before"
        if isinstance(action, Load):
            assert action.code_id in self.usable
            assert claims == [None] * action.extent.count, f"copied over {claims}"
            claim = Claim(action.model, action.version, action.extent, action.code_id)
            for page in range(action.extent.first, action.extent.first + action.extent.count):
                self.pages[page] = claim
        else:
            assert self.holds(action), f"{action} on {claims}"
            if isinstance(action, Infer):
                assert action.code_id in self.usable
            else:
                assert not self.read(action.extent), "unloaded what an INFER reads"
                for each in claims:
                    assert each is not None
                    each.ready = False

    def judge_result(self, result: Result, expected: tuple[int, bool] | None, *, lost: bool) -> None:
        number = result.action_id
        assert number not in self.answered, f"{number} was answered twice"
        self.answered.add(number)
        sent = self.sent.pop(number)
        if expected is not None and number == expected[0]:
            assert result.status is (Status.OK if expected[1] else Status.DEVICE_FAULT)
            assert result.outputs == ((b"y",) if expected[1] and isinstance(sent.action, Infer) else ())
            return
        assert result.started_ns == result.ended_ns == self.now_ns
        assert result.message
        assert self.justified(result.status, sent.action, lost=lost), f"{result} for {sent.action}"

    def justified(self, status: Status, action: Action, *, lost: bool) -> bool:
        """Whether this is a reason not to start the action now."""
        claims = [claim for claim in self.under(action.extent) if claim is not None]
        match status:
            case Status.SHUTTING_DOWN:
                return lost or self.stopped
            case Status.TOO_LATE:
                return self.now_ns > action.window.latest_ns
            case Status.TOO_EARLY:
                return action.window.earliest_ns > self.now_ns + ms(10_000)
            case Status.UNKNOWN_CODE:
                return not isinstance(action, Unload)
            case Status.BAD_ACTION:
                outside = action.extent.first + action.extent.count > PAGES
                return outside or (isinstance(action, Infer) and action.batch == 3)
            case Status.WEIGHTS_MISSING:
                missing = not isinstance(action, Load) and not self.holds(action)
                return missing and not (isinstance(action, Infer) and self.is_coming(action))
            case Status.NO_ROOM:
                return isinstance(action, Load) and bool(claims)
            case Status.IN_USE:
                wanted = any(not claim.forgotten_by_controller for claim in claims)
                return wanted and (self.read(action.extent) or any(not claim.ready for claim in claims))
            case _:
                return False

    def under(self, extent: Extent) -> list[Claim | None]:
        return self.pages[extent.first : extent.first + extent.count]

    def holds(self, action: Action) -> bool:
        """Whether exactly the action's extent holds the action's weights, ready."""
        claim = self.pages[action.extent.first] if action.extent.first < PAGES else None
        return (
            claim is not None
            and claim.ready
            and (claim.model, claim.version, claim.extent) == (action.model, action.version, action.extent)
            and not (claim.forgotten_by_controller and action.action_id > 0)
            and not (isinstance(action, Infer) and claim.code_id != action.code_id)
        )

    def read(self, extent: Extent) -> bool:
        """Whether an INFER runs or waits on weights that share a page with the extent."""
        run = self.running[Lane.EXEC]
        reading = [run.action] if isinstance(run, Start) else []
        waiting = [
            sent.action for sent in self.sent.values() if sent.lane is Lane.EXEC and self.holds(sent.action)
        ]
        return any(action.extent.overlaps(extent) for action in (*reading, *waiting))

    def running_ids(self) -> set[int]:
        return {work.action.action_id for work in self.running.values() if isinstance(work, Start)}

    def waiting(self, lane: Lane) -> list[Sent]:
        running = self.running_ids()
        return [sent for number, sent in self.sent.items() if sent.lane is lane and number not in running]

    # What must always be true

    @invariant()
    def its_own_invariants_hold(self) -> None:
        self.worker.check()

    @invariant()
    def a_free_lane_leaves_nothing_that_could_start(self) -> None:
        for lane, work in self.running.items():
            due = [sent for sent in self.waiting(lane) if sent.key_ns <= self.now_ns]
            if work is None and due:
                first = min(due, key=lambda sent: (sent.key_ns, sent.arrival)).action
                assert self.is_coming(first) if lane is Lane.EXEC else self.is_leaving(first), (
                    f"{first} waits for nothing"
                )

    def is_leaving(self, action: Action) -> bool:
        """Whether a LOAD's pages hold only what is forgotten as soon as it is read no more."""
        claims = [claim for claim in self.under(action.extent) if claim is not None]
        assert isinstance(action, Load)
        forgotten = all(claim.forgotten_by_controller for claim in claims)
        return forgotten and self.read(action.extent) and self.now_ns <= action.window.latest_ns

    def is_coming(self, action: Action) -> bool:
        """Whether a LOAD of these weights runs, for a controller that still wants them, or waits."""
        run = self.running[Lane.LOAD]
        loads = [run.action] if isinstance(run, Start) else []
        loads = [one for one in loads if not self.is_forgotten(one)]
        loads += [sent.action for sent in self.waiting(Lane.LOAD)]
        return any(isinstance(load, Load) and same_weights(load, action) for load in loads)

    def is_forgotten(self, action: Action) -> bool:
        claims = [claim for claim in self.under(action.extent) if claim is not None]
        return any(claim.version == action.version and claim.forgotten_by_controller for claim in claims)

    @invariant()
    def a_wakeup_is_asked_for_what_opens_later(self) -> None:
        wake_ns = self.worker.next_wakeup_ns()
        assert wake_ns is None or wake_ns > self.now_ns
        for lane, work in self.running.items():
            keys = [sent.key_ns for sent in self.waiting(lane)]
            if work is None and keys and min(keys) > self.now_ns:
                assert wake_ns is not None
                assert wake_ns <= min(keys)

    def teardown(self) -> None:
        """Let everything end: nothing may be left owed, and no page half full."""
        self.now_ns += ms(60_000)
        self.tell()
        for _ in range(200):
            self.now_ns += ms(10)
            self.tell()
            for lane, work in self.running.items():
                if work is not None:
                    self.end(lane, work, ok=True)
            if self.worker.idle:
                break
        assert not self.sent, f"never answered: {self.sent}"
        assert self.worker.idle
        assert all(claim is None or claim.ready for claim in self.pages)
        assert self.answered == set(range(1, self.next_id + 1))


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
