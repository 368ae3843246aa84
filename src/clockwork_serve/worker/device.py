"""One device of a worker: starts what is due on a free lane, as ordered, or refuses it. It never chooses.

A lane takes its next job when it is free and the job's window is open. Then, and only then, it is judged:
the window's end, the pages, the weights. An INFER whose weights are being loaded waits for them inside its
window, and with it what was ordered after it.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.messages import (
    Action,
    CodeAdded,
    CodeReady,
    DeviceSpec,
    Extent,
    Infer,
    Lane,
    Load,
    Status,
    Unload,
    Window,
)
from clockwork_serve.worker.admission import Refusal, refuse
from clockwork_serve.worker.codes import CodeState, CodeStep, HeldCode
from clockwork_serve.worker.events import LaneDone, Prepare, Prepared, Retire, Retired, Start
from clockwork_serve.worker.lanes import Job, LaneQueue, Work
from clockwork_serve.worker.ledger import Ledger
from clockwork_serve.worker.pages import Held, Pages, WeightsState, WeightsStep

FAR_NS: Final = 1 << 62
"""The end of a window that never closes."""


class DeviceWorker:
    """The lanes, pages and codes of one device."""

    def __init__(self, spec: DeviceSpec, ledger: Ledger) -> None:
        self.spec = spec
        self.pages = Pages(spec.pages)
        self.lanes = {Lane.LOAD: LaneQueue(), Lane.EXEC: LaneQueue()}
        self.codes: dict[str, HeldCode] = {}
        self._ledger = ledger
        self._codes_due: dict[str, None] = {}  # codes that may need a chore or an answer, in order
        self._stale: list[Held] = []  # all and only the stale weights that wait to be unloaded
        self._own_unloads = 0
        self._stopping = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return all(lane.running is None and not len(lane) for lane in self.lanes.values())

    def jobs(self) -> list[Job]:
        """All jobs that run or wait."""
        lanes = self.lanes.values()
        return [job for lane in lanes for job in (lane.running, *lane.queued()) if job is not None]

    # Belief

    def add_code(self, event: CodeAdded) -> None:
        """The controller wants this code here, and to know when it is ready."""
        code_id = event.code.code_id
        held = self.codes.get(code_id)
        if held is None:
            held = self.codes[code_id] = HeldCode(event.code)
        held.code = event.code
        held.wanted = held.answer_due = True
        for profile in event.profiles:
            if profile.device_kind == self.spec.kind:
                held.profile = profile
        self._codes_due[code_id] = None

    def remove_code(self, code_id: str) -> None:
        """The controller does not want this code any more."""
        held = self.codes.get(code_id)
        if held is not None:
            held.wanted = held.answer_due = False
            self._codes_due[code_id] = None

    def prepared(self, event: Prepared, now_ns: int) -> None:
        """A Prepare ended."""
        held = self._chore_ended(event.code_id, now_ns)
        held.step(CodeStep.OK if event.ok else CodeStep.FAILED)
        if not event.ok and held.answer_due:
            held.answer_due = False
            self._ledger.effects.append(
                CodeReady(device=self.spec.device, code_id=event.code_id, ok=False, message=event.message)
            )

    def retired(self, event: Retired, now_ns: int) -> None:
        """A Retire ended."""
        self._chore_ended(event.code_id, now_ns).step(CodeStep.GONE)

    def _chore_ended(self, code_id: str, now_ns: int) -> HeldCode:
        job = self.lanes[Lane.LOAD].finish(now_ns)
        assert job.code is not None and job.code.code.code_id == code_id, f"{job.work} ran, not {code_id}"
        self._codes_due[code_id] = None
        return job.code

    def done(self, event: LaneDone, now_ns: int) -> None:
        """A Start ended: pages change, and its result is due."""
        job = self.lanes[event.lane].finish(now_ns)
        action = job.work
        assert isinstance(action, Action) and action.action_id == event.action_id, f"{event}; {action} ran"
        assert event.started_ns <= event.ended_ns, f"{event} ends before it starts"
        status, message = event.status, event.message
        held = job.held
        assert held is not None
        if isinstance(action, Load):
            held.step(WeightsStep.LOADED if status is Status.OK else WeightsStep.FAILED)
        elif isinstance(action, Unload):
            held.step(WeightsStep.FORGOTTEN)
        elif status is Status.OK and (held.state is not WeightsState.READY or not self._holds(held)):
            status = Status.WEIGHTS_CHANGED
            message = f"weights of {action.model}, version {action.version}, changed while it ran"
        if held.state is WeightsState.EMPTY:
            self._leave(held)
        self._ended(job)
        self._ledger.close(job, event, status, message)

    def _holds(self, held: Held) -> bool:
        return self.pages.at(held.extent, held.version) is held

    def _leave(self, held: Held) -> None:
        self.pages.leave(held)
        self._unuse(self.codes[held.code_id])

    def _ended(self, job: Job) -> None:
        if job.code is not None:
            self._unuse(job.code)

    def _unuse(self, code: HeldCode) -> None:
        code.users -= 1
        assert code.users >= 0, f"code {code.code.code_id} has {code.users} users"
        if not code.wanted:
            self._codes_due[code.code.code_id] = None

    # Choices

    def admit(self, action: Action, now_ns: int) -> None:
        """Queue an action, or refuse what can never be done."""
        code = None if isinstance(action, Unload) else self.codes.get(action.code_id)
        refusal: Refusal | None
        if self._stopping:
            refusal = Status.SHUTTING_DOWN, "the worker is shutting down"
        elif action.action_id in self._ledger.live:
            refusal = Status.BAD_ACTION, f"action_id: {action.action_id} is queued or running already"
        else:
            refusal = refuse(action, self.spec, code, now_ns)
        if refusal is not None:
            self._ledger.turn_away(action, refusal, now_ns)
            return
        job = Job(action, code, owed=True)
        if code is not None:
            code.users += 1
        self._ledger.open(action, job)
        lane = Lane.EXEC if isinstance(action, Infer) else Lane.LOAD
        # What may start already queues as it came, so that the order in which it was sent is kept.
        self.lanes[lane].push(job, max(action.window.earliest_ns, now_ns))

    def stop(self, now_ns: int) -> None:
        """Refuse all that waits; what runs ends as usual."""
        self._stopping = True
        self._refuse_queued((Status.SHUTTING_DOWN, "the worker is shutting down"), now_ns)

    def lose_controller(self, now_ns: int) -> None:
        """Answer everything for the last time, and have all weights forgotten."""
        refusal = Status.SHUTTING_DOWN, "the controller went away"
        self._refuse_queued(refusal, now_ns)
        for lane in self.lanes.values():
            if lane.running is not None:
                self._ledger.refuse(lane.running, refusal, now_ns)
        for held in self.pages.all():
            held.stale = True
        self._stale = self.pages.all()
        for code in self.codes.values():
            code.answer_due = False

    def _refuse_queued(self, refusal: Refusal, now_ns: int) -> None:
        for lane in self.lanes.values():
            for job in lane.drop_all():
                if isinstance(job.work, Action):
                    self._ended(job)
                    self._ledger.refuse(job, refusal, now_ns)
                else:
                    assert job.code is not None
                    job.code.chore = False

    def settle(self, now_ns: int) -> None:
        """Start or refuse all that is due."""
        self._forget_stale(now_ns)
        self._advance(Lane.LOAD, now_ns)
        self._advance(Lane.EXEC, now_ns)
        # What was refused may have been a code's last use, and the load lane may be free to retire it.
        if self._codes_due:
            self._settle_codes(now_ns)
            self._advance(Lane.LOAD, now_ns)

    def _forget_stale(self, now_ns: int) -> None:
        waiting: list[Held] = []
        for held in self._stale:
            if held.state is WeightsState.READY and not self._readers(held):
                self._own_unloads += 1
                action = Unload(
                    action_id=-self._own_unloads, device=self.spec.device, model=held.model,
                    extent=held.extent, version=held.version, window=Window(now_ns, FAR_NS),
                )  # fmt: skip
                # Before all else: the next controller believes that the pages are empty already.
                self.lanes[Lane.LOAD].push(Job(action, None, owed=False), 0)
            elif held.state in (WeightsState.LOADING, WeightsState.READY):
                waiting.append(held)
        self._stale = waiting

    def _advance(self, name: Lane, now_ns: int) -> None:
        lane = self.lanes[name]
        lane.wake_ns = None
        while lane.running is None and (job := lane.turn(now_ns)) is not None:
            work = job.work
            if isinstance(work, Infer) and now_ns <= work.window.latest_ns and self._is_coming(work):
                lane.wake_ns = work.window.latest_ns + 1
                return
            if isinstance(work, Action):
                self._begin(lane, name, job, work, now_ns)
            else:
                self._begin_chore(lane, job, work, now_ns)

    def _begin(self, lane: LaneQueue, name: Lane, job: Job, action: Action, now_ns: int) -> None:
        refusal = self._judge(action, now_ns)
        if refusal is not None:
            lane.drop(job)
            self._ended(job)
            self._ledger.refuse(job, refusal, now_ns)
            return
        if isinstance(action, Load):
            job.held = Held(action.extent, action.version, action.model, action.code_id)
            self.pages.claim(job.held)
            self.codes[action.code_id].users += 1
        else:
            job.held = self.pages.at(action.extent, action.version)
            assert job.held is not None
            if isinstance(action, Unload):
                job.held.step(WeightsStep.UNLOAD)
        lane.start(job, now_ns)
        self._ledger.effects.append(Start(device=self.spec.device, lane=name, action=action))

    def _judge(self, action: Action, now_ns: int) -> Refusal | None:
        late_ns = now_ns - action.window.latest_ns
        if late_ns > 0:
            return Status.TOO_LATE, f"its window closed {late_ns} ns before its lane was free"
        if isinstance(action, Load):
            return self._judge_load(action)
        held = self.pages.at(action.extent, action.version)
        if held is None or held.model != action.model or held.state is not WeightsState.READY:
            return self._missing(action.extent, action.version)
        if isinstance(action, Infer):
            usable = _reads(action, held) and not held.stale
            return None if usable else self._missing(action.extent, action.version)
        if self._readers(held):
            return Status.IN_USE, f"an INFER reads its weights in {_pages(held.extent)}"
        return None

    def _judge_load(self, action: Load) -> Refusal | None:
        holders = self.pages.overlapping(action.extent)
        for held in holders:
            if held.state is not WeightsState.READY or self._readers(held):
                return Status.IN_USE, f"{_pages(held.extent)} are in use by {held.model}"
        if holders:
            return Status.NO_ROOM, f"{_pages(holders[0].extent)} hold {holders[0].model}; UNLOAD it first"
        return None

    def _missing(self, extent: Extent, version: int) -> Refusal:
        found = [f"{held.model} version {held.version}" for held in self.pages.overlapping(extent)]
        expected = f"expected its weights, version {version}, in {_pages(extent)}"
        return Status.WEIGHTS_MISSING, f"{expected}; found {', '.join(found) or 'none'}"

    def _readers(self, held: Held) -> bool:
        """Whether an INFER reads these weights or waits to."""
        lane = self.lanes[Lane.EXEC]
        if lane.running is not None and lane.running.held is held:
            return True
        return not held.stale and any(_reads(job.work, held) for job in lane.queued())

    def _is_coming(self, action: Infer) -> bool:
        """Whether a LOAD of its weights runs or waits."""
        held = self.pages.at(action.extent, action.version)
        if held is not None and _reads(action, held) and not held.stale:
            if held.state is WeightsState.LOADING:
                return True
            if held.state is WeightsState.READY:
                return False
        return any(_loads(job.work, action) for job in self.lanes[Lane.LOAD].queued())

    def _begin_chore(self, lane: LaneQueue, job: Job, work: Prepare | Retire, now_ns: int) -> None:
        code = job.code
        assert code is not None and code.chore
        code.chore = False
        if not (code.to_prepare if isinstance(work, Prepare) else code.to_retire):
            lane.drop(job)
            self._codes_due[code.code.code_id] = None
            return
        code.step(CodeStep.PREPARE if isinstance(work, Prepare) else CodeStep.RETIRE)
        lane.start(job, now_ns)
        self._ledger.effects.append(work)

    def _settle_codes(self, now_ns: int) -> None:
        due, self._codes_due = self._codes_due, {}
        for code_id in due:
            code = self.codes.get(code_id)
            if code is None or self._stopping:
                continue
            if code.state is CodeState.READY and code.answer_due:
                code.answer_due = False
                self._ledger.effects.append(CodeReady(device=self.spec.device, code_id=code_id))
            elif code.state is CodeState.ABSENT and not code.wanted and not code.chore:
                del self.codes[code_id]
            elif not code.chore and (code.to_prepare or code.to_retire):
                device = self.spec.device
                work: Work = (
                    Prepare(device=device, code=code.code)
                    if code.to_prepare
                    else Retire(device=device, code_id=code_id)
                )
                code.chore = True
                self.lanes[Lane.LOAD].push_chore(Job(work, code, owed=False), now_ns)

    def check(self) -> None:
        """Assert every invariant of the state."""
        self.pages.check()
        for lane in self.lanes.values():
            lane.check()
        running = self.lanes[Lane.LOAD].running
        for held in self.pages.all():
            moving = held.state in (WeightsState.LOADING, WeightsState.UNLOADING)
            assert moving == (running is not None and running.held is held), f"{held} and {running} disagree"
        self._check_infers()
        self._check_codes()

    def _check_infers(self) -> None:
        job = self.lanes[Lane.EXEC].running
        if job is not None:
            assert job.held is not None and self._holds(job.held) and job.held.state is WeightsState.READY
            assert job.code is not None and job.code.state is CodeState.READY

    def _check_codes(self) -> None:
        jobs = self.jobs()
        owed = {job.work.action_id for job in jobs if job.owed and isinstance(job.work, Action)}
        assert owed <= self._ledger.live
        for code_id, code in self.codes.items():
            users = sum(job.code is code for job in jobs if isinstance(job.work, Action))
            users += sum(held.code_id == code_id for held in self.pages.all())
            assert users == code.users, f"code {code_id}: {users} users, counted {code.users}"
            queued = self.lanes[Lane.LOAD].queued()
            chores = sum(job.code is code for job in queued if not isinstance(job.work, Action))
            assert chores == code.chore, f"code {code_id}: {chores} chores are queued"
            assert code.wanted or not code.answer_due, f"code {code_id}: an answer is due, and nobody asked"
            assert not code.users or code.state is CodeState.READY, f"{code_id} is used while {code.state}"


def _reads(work: Work, held: Held) -> bool:
    return (
        isinstance(work, Infer)
        and work.extent == held.extent
        and work.version == held.version
        and work.model == held.model
        and work.code_id == held.code_id
    )


def _loads(work: Work, action: Infer) -> bool:
    return (
        isinstance(work, Load)
        and work.extent == action.extent
        and work.version == action.version
        and work.model == action.model
        and work.code_id == action.code_id
    )


def _pages(extent: Extent) -> str:
    return f"pages {extent.first}..{extent.first + extent.count - 1}"
