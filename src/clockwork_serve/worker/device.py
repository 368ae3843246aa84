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
    Infer,
    Keep,
    Lane,
    Load,
    Status,
    Unload,
    Window,
)
from clockwork_serve.worker.admission import Refusal, acceptable, refuse
from clockwork_serve.worker.codes import CodeState, CodeStep, HeldCode
from clockwork_serve.worker.events import LaneDone, Prepare, Prepared, Retire, Retired, Start
from clockwork_serve.worker.judgement import judge_load, judge_unload, leaving, missing, too_late
from clockwork_serve.worker.lanes import Job, LaneQueue, Work
from clockwork_serve.worker.ledger import Ledger
from clockwork_serve.worker.pages import (
    WEIGHTS_LOADING,
    WEIGHTS_READY,
    Held,
    Pages,
    WeightsState,
    WeightsStep,
)

# Names of the module's own: an Enum's attribute takes 40 ns.
_LOAD: Final = Lane.LOAD
_EXEC: Final = Lane.EXEC
_OK: Final = Status.OK
_LOADED: Final = WeightsStep.LOADED
_UNLOAD: Final = WeightsStep.UNLOAD
_FORGOTTEN: Final = WeightsStep.FORGOTTEN

FAR_NS: Final = 1 << 62
"""The end of a window that never closes."""


class DeviceWorker:
    """The lanes, pages and codes of one device."""

    def __init__(self, spec: DeviceSpec, ledger: Ledger, index: int) -> None:
        self.spec = spec
        self.name = spec.device
        self.index = index
        """Its place among the worker's devices."""
        self.dirty = False
        """Whether its lanes must be looked at in the next decision; the worker's own."""
        self.pages = Pages(spec.pages)
        self.load_lane = LaneQueue()
        self.exec_lane = LaneQueue()
        self.lanes = {Lane.LOAD: self.load_lane, Lane.EXEC: self.exec_lane}
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
        code_id, backend = event.code.code_id, event.code.backend
        if not self.spec.runs(backend):
            refusal = self.spec.misfit(backend)
            self._ledger.effects.append(
                CodeReady(device=self.name, code_id=code_id, ok=False, message=refusal)
            )
            return
        held = self.codes.get(code_id)
        if held is None:
            held = self.codes[code_id] = HeldCode(event.code)
        held.add(event, self.spec)
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
        job = self.load_lane.finish(now_ns)
        assert job.code is not None and job.code.code.code_id == code_id, f"{job.work} ran, not {code_id}"
        self._codes_due[code_id] = None
        return job.code

    def done(self, event: LaneDone, now_ns: int) -> None:
        """A Start ended: pages change, and its result is due."""
        lane = self.exec_lane if event.lane is _EXEC else self.load_lane
        job = lane.finish(now_ns)
        work = job.work
        held = job.held
        assert held is not None and job.action_id == event.action_id, f"{event}; {work} ran"
        assert event.started_ns <= event.ended_ns, f"{event} ends before it starts"
        status, message = event.status, event.message
        if status is _OK:
            self.codes[held.code_id].took(work, event.ended_ns - event.started_ns - event.once_ns)
        # Records have no subclasses, and asking for one that a record is not takes isinstance 50 ns.
        if type(work) is Infer:
            held.readers -= 1
            if status is _OK and held.state is not WEIGHTS_READY:
                status = Status.WEIGHTS_CHANGED
                message = f"weights of {work.model}, version {work.version}, changed while it ran"
        elif type(work) is Load and status is _OK:
            held.step(_LOADED)
        else:
            held.step(WeightsStep.FAILED if type(work) is Load else _FORGOTTEN)
            self.pages.leave(held)
            self._unuse(self.codes[held.code_id])
        if job.code is not None:
            self._unuse(job.code)
        self._ledger.close(job, event, status, message)

    def _unuse(self, code: HeldCode) -> None:
        code.users -= 1
        assert code.users >= 0, f"code {code.code.code_id} has {code.users} users"
        if not code.wanted:
            self._codes_due[code.code.code_id] = None

    # Choices

    def admit_infer(self, action: Infer, now_ns: int) -> None:
        """Queue an INFER, or refuse what can never be done."""
        code = self.codes.get(action.code_id)
        action_id = action.action_id
        if (
            self._stopping
            or action_id in self._ledger.live
            or not acceptable(action, self.spec, code, now_ns)
        ) and self._turn_away(action, code, now_ns):
            return
        assert code is not None
        code.users += 1
        extent = action.extent
        first = extent.first
        held = self.pages.by_first.get(first)
        if held is not None:
            if held.serves(action, first, extent.count):
                held.readers += 1
            else:
                held = None
        job = Job(action, code, action_id, held)
        self._ledger.open(job)
        # What may start already queues as it came, so that the order in which it was sent is kept.
        earliest_ns = action.window.earliest_ns
        self.exec_lane.push(job, earliest_ns if earliest_ns > now_ns else now_ns)  # noqa: FURB136 - 60 ns less

    def admit(self, action: Load | Unload, now_ns: int) -> None:
        """Queue what moves weights, or refuse what can never be done."""
        code = self.codes.get(action.code_id) if type(action) is Load else None
        if self._turn_away(action, code, now_ns):
            return
        job = Job(action, code, action.action_id)
        if code is not None:
            code.users += 1
        self._ledger.open(job)
        self.load_lane.push(job, max(action.window.earliest_ns, now_ns))

    def _turn_away(self, action: Action, code: HeldCode | None, now_ns: int) -> bool:
        """Refuse what can not be queued; whether it was."""
        refusal: Refusal | None
        if self._stopping:
            refusal = Status.SHUTTING_DOWN, "the worker is shutting down"
        elif action.action_id in self._ledger.live:
            refusal = Status.BAD_ACTION, f"action_id: {action.action_id} is queued or running already"
        else:
            refusal = refuse(action, self.spec, code, now_ns)
        if refusal is None:
            return False
        self._ledger.turn_away(action, refusal, now_ns)
        return True

    def stop(self, now_ns: int) -> None:
        """Refuse all that waits; what runs ends as usual."""
        self._stopping = True
        self._refuse_queued((Status.SHUTTING_DOWN, "the worker is shutting down"), now_ns)

    def lose_controller(self, now_ns: int) -> None:
        """Refuse what waits; what runs ends as usual, and weights stay for the next controller."""
        self._refuse_queued((Status.SHUTTING_DOWN, "the controller went away"), now_ns)
        self._stale = [held for held in self.pages.all() if held.stale]  # their UNLOADs waited
        for code in self.codes.values():
            code.answer_due = False

    def keep(self, event: Keep) -> None:
        """Have all weights forgotten that the controller does not want."""
        for held in self.pages.all():
            if held.version not in event.versions and not held.stale:
                held.stale = True
                self._stale.append(held)

    def _refuse_queued(self, refusal: Refusal, now_ns: int) -> None:
        for lane in self.lanes.values():
            for job in lane.drop_all():
                if isinstance(job.work, (Prepare, Retire)):
                    assert job.code is not None
                    job.code.chore = False
                else:
                    self._refuse(job, refusal, now_ns)

    def _refuse(self, job: Job, refusal: Refusal, now_ns: int) -> None:
        """The end of an action's job that was dropped."""
        if job.held is not None:
            job.held.readers -= 1
        if job.code is not None:
            self._unuse(job.code)
        self._ledger.refuse(job, refusal, now_ns)

    def settle(self, now_ns: int) -> bool:
        """Start or refuse all that is due; whether a lane must be looked at again without an event."""
        if self._stale:
            self._forget_stale(now_ns)
        load_lane, exec_lane = self.load_lane, self.exec_lane
        if load_lane.running is None and (load_lane.actions or load_lane.chores):
            self._advance_load(now_ns)
        if exec_lane.running is None and exec_lane.actions:
            self._advance_exec(now_ns)
        # What was refused may have been a code's last use, and the load lane may be free to retire it.
        if self._codes_due:
            self._settle_codes(now_ns)
            self._advance_load(now_ns)
        return load_lane.wake_ns is not None or exec_lane.wake_ns is not None

    def _forget_stale(self, now_ns: int) -> None:
        waiting: list[Held] = []
        for held in self._stale:
            if held.state is WeightsState.READY and not held.readers:
                self._own_unloads += 1
                action = Unload(
                    action_id=-self._own_unloads, device=self.spec.device, model=held.model,
                    extent=held.extent, version=held.version, window=Window(now_ns, FAR_NS),
                )  # fmt: skip
                # Before all else: the controller believes that the pages are empty already.
                self.load_lane.push(Job(action, None, action.action_id), 0)
            elif held.state in (WeightsState.LOADING, WeightsState.READY):
                waiting.append(held)
        self._stale = waiting

    def _advance_exec(self, now_ns: int) -> None:
        lane = self.exec_lane
        while (job := lane.turn(now_ns)) is not None:
            action = job.work
            assert isinstance(action, Infer)
            held = job.held
            latest_ns = action.window.latest_ns
            if now_ns <= latest_ns:
                if held is not None and held.state is WEIGHTS_READY:
                    lane.start(job, now_ns)
                    self._ledger.effects.append(Start(device=self.name, lane=_EXEC, action=action))
                    return
                if self._is_coming(action, held):
                    lane.wake_ns = latest_ns + 1
                    return
                refusal = missing(self.pages, action)
            else:
                refusal = too_late(now_ns - latest_ns)
            lane.drop(job)
            self._refuse(job, refusal, now_ns)

    def _advance_load(self, now_ns: int) -> None:
        lane = self.load_lane
        while lane.running is None and (job := lane.turn(now_ns)) is not None:
            work = job.work
            if type(work) is Load:
                if not self._begin_load(job, work, now_ns):
                    return
            elif type(work) is Unload:
                self._begin_unload(job, work, now_ns)
            else:
                assert isinstance(work, (Prepare, Retire)), f"{work} on the load lane"
                self._begin_chore(lane, job, work, now_ns)

    def _begin_load(self, job: Job, action: Load, now_ns: int) -> bool:
        """Start or refuse it; False if it has to wait."""
        refusal = judge_load(action, self.pages, now_ns)
        if refusal is not None:
            if refusal[0] is Status.IN_USE and leaving(action.extent, self.pages):
                self.load_lane.wake_ns = action.window.latest_ns + 1
                return False
            self.load_lane.drop(job)
            self._refuse(job, refusal, now_ns)
            return True
        held = job.held = Held(action.extent, action.version, action.model, action.code_id, action.weights)
        self.pages.claim(held)
        self.codes[action.code_id].users += 1
        for waiting in self.exec_lane.actions:
            infer = waiting.work
            assert isinstance(infer, Infer)
            if held.serves(infer, infer.extent.first, infer.extent.count):
                waiting.held = held
                held.readers += 1
        self._start_load(job, action, now_ns)
        return True

    def _begin_unload(self, job: Job, action: Unload, now_ns: int) -> None:
        held = self.pages.at(action.extent, action.version)
        refusal = judge_unload(action, held, self.pages, now_ns)
        if refusal is not None:
            self.load_lane.drop(job)
            self._refuse(job, refusal, now_ns)
            return
        assert held is not None
        job.held = held
        held.step(_UNLOAD)
        self._start_load(job, action, now_ns)

    def _start_load(self, job: Job, action: Load | Unload, now_ns: int) -> None:
        self.load_lane.start(job, now_ns)
        self._ledger.effects.append(Start(device=self.name, lane=_LOAD, action=action))

    def _is_coming(self, action: Infer, held: Held | None) -> bool:
        """Whether a LOAD of its weights (``held``, once they are claimed) runs or waits."""
        if held is not None and held.state is WEIGHTS_LOADING:
            return True
        version = action.version
        for job in self.load_lane.actions:
            load = job.work
            if (
                type(load) is Load
                and load.version == version
                and load.model == action.model
                and load.code_id == action.code_id
                and load.extent == action.extent
            ):
                return True
        return False

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
                self.load_lane.push_chore(Job(work, code), now_ns)
