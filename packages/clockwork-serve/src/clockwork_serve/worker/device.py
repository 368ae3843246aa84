"""One device of a worker: starts due actions on free lanes, or refuses them with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from clockwork_serve.messages import (
    Action,
    Code,
    CodeAdded,
    CodeReady,
    DeviceSpec,
    Extent,
    Held,
    Infer,
    Lane,
    Load,
    Resident,
    Result,
    RetainWeights,
    Status,
    Unload,
    Window,
)
from clockwork_serve.units import NS_PER_S
from clockwork_serve.worker.events import Prepare, Prepared, Retire, Retired, Start, WorkerEffect
from clockwork_serve.worker.lanes import LaneJob, LaneQueue, Work
from clockwork_serve.worker.pages import (
    CODE_READY,
    WEIGHTS_LOADING,
    WEIGHTS_READY,
    CodeState,
    CodeStep,
    HeldCode,
    HeldExtent,
    Pages,
    WeightsState,
    WeightsStep,
)

# ------------------------------------------------------------
# Validation of an action before it is queued, without regard to queues and pages.
#
# ``refuse`` returns what is wrong: None, or the status and a message that names field, expected and found.
# ``acceptable`` is a fast check of INFERs for the usual case that nothing is.


EARLY_MAX_NS: Final = 10 * NS_PER_S
"""An action whose window opens later than this from now is refused: no plan is so far ahead, so the clocks
disagree."""

Refusal = tuple[Status, str]


def acceptable(action: Infer, spec: DeviceSpec, code: HeldCode | None, now_ns: int) -> bool:
    """Whether :func:`refuse` would accept an INFER."""
    window = action.window
    earliest_ns = window.earliest_ns
    extent = action.extent
    first = extent.first
    count = extent.count
    room = action.batch
    calls = action.calls
    if (
        code is None
        or code.state is not CODE_READY
        or room not in code.fitting
        or earliest_ns > window.latest_ns
        or earliest_ns - now_ns > EARLY_MAX_NS
        or first < 0
        or count < 1
        or first + count > spec.pages
        or not calls
    ):
        return False
    if not code.code.batched:
        return len(calls) == 1
    for call in calls:
        rows = call.rows
        if rows < 1:
            return False
        room -= rows
    return room >= 0


def refuse(action: Action, spec: DeviceSpec, code: HeldCode | None, now_ns: int) -> Refusal | None:
    """Why an action cannot be queued; None if it can. ``code`` is the device's record of its code, if any."""
    refusal = _refuse_window(action.window, now_ns) or _refuse_extent(action.extent, spec)
    if refusal is not None:
        return refusal
    if type(action) is Load:
        refusal = _refuse_code(action.code_id, spec, code) or _refuse_size(action, spec)
    elif type(action) is Infer:
        refusal = _refuse_code(action.code_id, spec, code)
        if refusal is None and code is not None:
            refusal = _refuse_batch(action, code.code) or _refuse_need(action.batch, spec, code)
    return refusal


def _refuse_window(window: Window, now_ns: int) -> Refusal | None:
    if window.earliest_ns > window.latest_ns:
        return _bad("window", "earliest_ns <= latest_ns", f"{window.earliest_ns} > {window.latest_ns}")
    if window.earliest_ns - now_ns > EARLY_MAX_NS:
        ahead_s = (window.earliest_ns - now_ns) / NS_PER_S
        return Status.TOO_EARLY, (
            f"window: opens in {ahead_s:.1f} s, expected at most {EARLY_MAX_NS // NS_PER_S} s ahead; "
            "compare the clocks of controller and worker"
        )
    return None


def _refuse_extent(extent: Extent, spec: DeviceSpec) -> Refusal | None:
    if extent.first < 0 or extent.count < 1 or extent.first + extent.count > spec.pages:
        return _bad("extent", f"pages within 0..{spec.pages - 1}", f"{extent.count} from page {extent.first}")
    return None


def _refuse_code(code_id: str, spec: DeviceSpec, code: HeldCode | None) -> Refusal | None:
    if code is not None and code.state is CODE_READY:
        return None
    state = CodeState.ABSENT if code is None else code.state
    return Status.UNKNOWN_CODE, f"code_id: {code_id} is not prepared on {spec.device}; it is {state.value}"


def _refuse_size(action: Load, spec: DeviceSpec) -> Refusal | None:
    room = action.extent.count * spec.page_bytes
    if action.weights.size > room:
        return _bad("extent", f"room for {action.weights.size} bytes of weights", f"{room} bytes")
    return None


def _refuse_batch(action: Infer, code: Code) -> Refusal | None:
    if action.batch not in code.batch_sizes:
        return _bad("batch", f"one of {code.batch_sizes}", str(action.batch))
    if not action.calls:
        return _bad("calls", "at least one", "none")
    if not code.batched:
        found = len(action.calls)
        return None if found == 1 else _bad("calls", "1 where there is no batch axis", str(found))
    rows = [call.rows for call in action.calls]
    if min(rows) < 1 or sum(rows) > action.batch:
        return _bad("rows", f"at least 1 each and at most {action.batch} in all", str(rows))
    return None


def _refuse_need(batch: int, spec: DeviceSpec, code: HeldCode) -> Refusal | None:
    why = spec.shortage(batch, *code.need_of(batch))
    return (Status.NO_ROOM, why) if why else None


def _bad(field: str, expected: str, found: str) -> Refusal:
    return Status.BAD_ACTION, f"{field}: expected {expected}, found {found}"


# ------------------------------------------------------------
# Why the next action of a lane cannot start: its window, the pages.


def refuse_load(action: Load, pages: Pages, now_ns: int) -> Refusal | None:
    """Why a LOAD cannot start: its pages must be free."""
    late_ns = now_ns - action.window.latest_ns
    if late_ns > 0:
        return too_late(late_ns)
    holders = pages.overlapping(action.extent)
    for held in holders:
        if held.state is not WEIGHTS_READY or held.readers:
            return Status.IN_USE, f"{_pages(held.extent)} are in use by {held.model}"
    if holders:
        return Status.NO_ROOM, f"{_pages(holders[0].extent)} hold {holders[0].model}; UNLOAD it first"
    return None


def holds_only_stale(extent: Extent, pages: Pages) -> bool:
    """Whether an extent holds only stale weights, which are unloaded once no INFER reads them."""
    return all(held.stale for held in pages.overlapping(extent))


def refuse_unload(action: Unload, held: HeldExtent | None, pages: Pages, now_ns: int) -> Refusal | None:
    """Why an UNLOAD cannot start: no INFER may read the weights. ``held`` is what is in the action's extent.

    For the controller stale weights do not exist; the worker unloads them itself (with an id below zero).
    """
    late_ns = now_ns - action.window.latest_ns
    if late_ns > 0:
        return too_late(late_ns)
    if held is None or held.model != action.model or held.state is not WEIGHTS_READY:
        return missing(pages, action)
    if held.stale and action.action_id > 0:
        return missing(pages, action)
    if held.readers:
        return Status.IN_USE, f"an INFER reads its weights in {_pages(held.extent)}"
    return None


def missing(pages: Pages, action: Infer | Unload) -> Refusal:
    """The refusal of an action whose extent does not hold its weights."""
    extent = action.extent
    found = [
        f"{held.model} version {held.version}{' that is to go' if held.stale else ''}"
        for held in pages.overlapping(extent)
    ]
    expected = f"expected its weights, version {action.version}, in {_pages(extent)}"
    return Status.WEIGHTS_MISSING, f"{expected}; found {', '.join(found) or 'none'}"


def too_late(late_ns: int) -> Refusal:
    """The refusal of an action whose window closed before its lane was free."""
    return Status.TOO_LATE, f"its window closed {late_ns} ns before its lane was free"


def _pages(extent: Extent) -> str:
    return f"pages {extent.first}..{extent.first + extent.count - 1}"


# ------------------------------------------------------------
# Actions without a result yet, and the effects of this instant.


_OK: Final = Status.OK


class Ledger:
    """Collects effects, and makes sure that each action gets exactly one result; shared by all devices."""

    def __init__(self) -> None:
        self.effects: list[WorkerEffect] = []
        self.refused: dict[str, int] = {}
        """By device: which of ``effects`` is the last result that is not OK."""
        self.live: set[int] = set()  # ids of all and only actions that are owed a result

    def open(self, job: LaneJob) -> None:
        """Record that a job's action is owed a result."""
        assert not job.owed and job.action_id not in self.live
        job.owed = True
        self.live.add(job.action_id)

    def reject(self, action: Action, refusal: Refusal, now_ns: int) -> None:
        """Send the result of an action that was not queued."""
        self._send(_refused(action, refusal, now_ns))

    def refuse(self, job: LaneJob, refusal: Refusal, now_ns: int) -> None:
        """Send the result of a job that is refused, unless it has one already."""
        if job.owed:
            action = job.work
            assert not isinstance(action, (Prepare, Retire))
            job.owed = False
            self.live.remove(job.action_id)
            self._send(_refused(action, refusal, now_ns))

    def close(self, job: LaneJob, result: Result) -> None:
        """Send the result of a job that ran, unless it has one already."""
        if not job.owed:
            return
        job.owed = False
        self.live.remove(job.action_id)
        self._send(result)

    def _send(self, result: Result) -> None:
        if result.status is not _OK:
            self.refused[result.device] = len(self.effects)
        self.effects.append(result)


def _refused(action: Action, refusal: Refusal, now_ns: int) -> Result:
    status, message = refusal
    kind = "LOAD" if isinstance(action, Load) else "INFER" if isinstance(action, Infer) else "UNLOAD"
    return Result(
        action_id=action.action_id, device=action.device, status=status, started_ns=now_ns, ended_ns=now_ns,
        message=f"{kind} of {action.model}: {message}",
    )  # fmt: skip


# ------------------------------------------------------------
# One device of a worker.
#
# A lane starts its next job when it is free and the job's window is open. Only then the end of the window,
# the pages and the weights are checked. An INFER whose weights are being loaded waits for them inside its
# window, and so do the actions behind it.


# Names of the module's own: an Enum's attribute takes 40 ns.
_LOAD: Final = Lane.LOAD
_EXEC: Final = Lane.EXEC
_LOADED: Final = WeightsStep.LOADED
_UNLOAD: Final = WeightsStep.UNLOAD
_FORGOTTEN: Final = WeightsStep.FORGOTTEN

FAR_NS: Final = 1 << 62  # the end of a window without end


class DeviceWorker:
    """The lanes, pages and codes of one device."""

    def __init__(self, spec: DeviceSpec, ledger: Ledger, index: int) -> None:
        self.spec = spec
        self.name = spec.device
        self.index = index  # its index among the worker's devices
        self.dirty = False  # its lanes are to be processed in the next decision; set by ``Worker``
        self.pages = Pages(spec.pages)
        self.load_lane = LaneQueue()
        self.exec_lane = LaneQueue()
        self.lanes = {Lane.LOAD: self.load_lane, Lane.EXEC: self.exec_lane}
        self.codes: dict[str, HeldCode] = {}
        self._ledger = ledger
        self._codes_due: dict[str, None] = {}  # codes that may need a chore or a CodeReady, in order
        self._stale: list[HeldExtent] = []  # all and only the stale weights that wait to be unloaded
        self._own_unloads = 0
        self._stopping = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return all(lane.running is None and not len(lane) for lane in self.lanes.values())

    def jobs(self) -> list[LaneJob]:
        """All jobs that run or wait."""
        lanes = self.lanes.values()
        return [job for lane in lanes for job in (lane.running, *lane.queued()) if job is not None]

    def held(self) -> Held:
        """What it holds, for the controller: see ``Held``."""
        unprepared = [code_id for code_id, code in self.codes.items() if code.state is not CODE_READY]
        versions = [
            held.version
            for held in self.pages.all()
            if not held.stale and held.state in (WEIGHTS_LOADING, WEIGHTS_READY)
        ]
        return Held(tuple(versions), tuple(unprepared))

    def resume(self, codes: Iterable[Code], weights: Iterable[Resident]) -> None:
        """Hold codes and weights that are ready, as if they had been prepared and loaded before.

        For simulations that begin in the middle of a run.
        """
        for code in codes:
            held = self.codes[code.code_id] = HeldCode(code)
            held.add(CodeAdded(code=code), self.spec)
            held.ready_due = False
            held.step(CodeStep.PREPARE)
            held.step(CodeStep.OK)
        for one in weights:
            extent = HeldExtent(one.extent, one.version, one.model, one.code_id, one.weights)
            extent.step(_LOADED)
            self.pages.claim(extent)
            self.codes[one.code_id].users += 1

    def add_pages(self, pages: int) -> None:
        """It has so many more pages."""
        self.spec = replace(self.spec, pages=self.spec.pages + pages)
        self.pages.count += pages

    # Belief

    def add_code(self, event: CodeAdded) -> None:
        """Add a code: prepare it, and report to the controller when it is ready."""
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
        """Remove a code: retire it once no action uses it."""
        held = self.codes.get(code_id)
        if held is not None:
            held.wanted = held.ready_due = False
            self._codes_due[code_id] = None

    def prepared(self, event: Prepared, now_ns: int) -> None:
        """A Prepare ended."""
        held = self._chore_ended(event.code_id, now_ns)
        held.step(CodeStep.OK if event.ok else CodeStep.FAILED)
        if not event.ok and held.ready_due:
            held.ready_due = False
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

    def done(self, event: Result, now_ns: int) -> None:
        """A Start ended: update the pages and send its result."""
        executing = self.exec_lane.running
        ran = executing is not None and executing.action_id == event.action_id
        job = (self.exec_lane if ran else self.load_lane).finish(now_ns)
        work = job.work
        held = job.held
        assert held is not None and job.action_id == event.action_id, f"{event}; {work} ran"
        assert event.started_ns <= event.ended_ns, f"{event} ends before it starts"
        status, result = event.status, event
        if status is _OK:
            self.codes[held.code_id].learn_duration(work, event.ended_ns - event.started_ns - event.once_ns)
        # Records have no subclasses, and asking for one that a record is not takes isinstance 50 ns.
        if type(work) is Infer:
            held.readers -= 1
            if status is _OK and held.state is not WEIGHTS_READY:
                message = f"weights of {work.model}, version {work.version}, changed while it ran"
                result = replace(event, status=Status.WEIGHTS_CHANGED, outputs=(), message=message)
        elif type(work) is Load and status is _OK:
            held.step(_LOADED)
        else:
            held.step(WeightsStep.FAILED if type(work) is Load else _FORGOTTEN)
            self.pages.release(held)
            self._unuse(self.codes[held.code_id])
        if job.code is not None:
            self._unuse(job.code)
        self._ledger.close(job, result)

    def _unuse(self, code: HeldCode) -> None:
        code.users -= 1
        assert code.users >= 0, f"code {code.code.code_id} has {code.users} users"
        if not code.wanted:
            self._codes_due[code.code.code_id] = None

    # Choices

    def admit_infer(self, action: Infer, now_ns: int) -> None:
        """Queue an INFER, or refuse it if it can never run."""
        code = self.codes.get(action.code_id)
        action_id = action.action_id
        if (
            self._stopping
            or action_id in self._ledger.live
            or not acceptable(action, self.spec, code, now_ns)
        ) and self._reject(action, code, now_ns):
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
        job = LaneJob(action, code, action_id, held)
        self._ledger.open(job)
        # Actions whose window is open are queued by arrival, so that the order of sending is kept.
        earliest_ns = action.window.earliest_ns
        self.exec_lane.push(job, earliest_ns if earliest_ns > now_ns else now_ns)  # noqa: FURB136 - 60 ns less

    def admit(self, action: Load | Unload, now_ns: int) -> None:
        """Queue a LOAD or UNLOAD, or refuse it if it can never run."""
        code = self.codes.get(action.code_id) if type(action) is Load else None
        if self._reject(action, code, now_ns):
            return
        job = LaneJob(action, code, action.action_id)
        if code is not None:
            code.users += 1
        self._ledger.open(job)
        self.load_lane.push(job, max(action.window.earliest_ns, now_ns))

    def _reject(self, action: Action, code: HeldCode | None, now_ns: int) -> bool:
        """Refuse an action if it cannot be queued; true if it was refused."""
        refusal: Refusal | None
        if self._stopping:
            refusal = Status.SHUTTING_DOWN, "the worker is shutting down"
        elif action.action_id in self._ledger.live:
            refusal = Status.BAD_ACTION, f"action_id: {action.action_id} is queued or running already"
        else:
            refusal = refuse(action, self.spec, code, now_ns)
        if refusal is None:
            return False
        self._ledger.reject(action, refusal, now_ns)
        return True

    def stop(self, now_ns: int) -> None:
        """Refuse all queued actions; running ones end as usual."""
        self._stopping = True
        self._refuse_queued((Status.SHUTTING_DOWN, "the worker is shutting down"), now_ns)

    def lose_controller(self, now_ns: int) -> None:
        """Refuse queued actions; running ones end as usual, and weights stay for the next controller."""
        self._refuse_queued((Status.SHUTTING_DOWN, "the controller went away"), now_ns)
        self._stale = [held for held in self.pages.all() if held.stale]  # their UNLOADs waited
        for code in self.codes.values():
            code.ready_due = False

    def retain(self, event: RetainWeights) -> None:
        """Mark all weights stale that the controller does not list; they are unloaded once unused."""
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

    def _refuse(self, job: LaneJob, refusal: Refusal, now_ns: int) -> None:
        """Refuse a dropped job's action, and free what it held."""
        if job.held is not None:
            job.held.readers -= 1
        if job.code is not None:
            self._unuse(job.code)
        self._ledger.refuse(job, refusal, now_ns)

    def process(self, now_ns: int) -> bool:
        """Start or refuse all due jobs; true if a lane needs a wake-up."""
        if self._stale:
            self._unload_stale(now_ns)
        load_lane, exec_lane = self.load_lane, self.exec_lane
        if load_lane.running is None and (load_lane.actions or load_lane.chores):
            self._advance_load(now_ns)
        if exec_lane.running is None and exec_lane.actions:
            self._advance_exec(now_ns)
        # A refused action may have been the last user of a code, which may now be retired.
        if self._codes_due:
            self._process_codes(now_ns)
            self._advance_load(now_ns)
        return load_lane.wake_ns is not None or exec_lane.wake_ns is not None

    def _unload_stale(self, now_ns: int) -> None:
        waiting: list[HeldExtent] = []
        for held in self._stale:
            if held.state is WeightsState.READY and not held.readers:
                self._own_unloads += 1
                action = Unload(
                    action_id=-self._own_unloads, device=self.spec.device, model=held.model,
                    extent=held.extent, version=held.version, window=Window(now_ns, FAR_NS),
                )  # fmt: skip
                # Before all other jobs: the controller believes that the pages are empty already.
                self.load_lane.push(LaneJob(action, None, action.action_id), 0)
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
                if self._is_loading(action, held):
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

    def _begin_load(self, job: LaneJob, action: Load, now_ns: int) -> bool:
        """Start or refuse a LOAD; False if it has to wait."""
        refusal = refuse_load(action, self.pages, now_ns)
        if refusal is not None:
            if refusal[0] is Status.IN_USE and holds_only_stale(action.extent, self.pages):
                self.load_lane.wake_ns = action.window.latest_ns + 1
                return False
            self.load_lane.drop(job)
            self._refuse(job, refusal, now_ns)
            return True
        held = job.held = HeldExtent(
            action.extent, action.version, action.model, action.code_id, action.weights
        )
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

    def _begin_unload(self, job: LaneJob, action: Unload, now_ns: int) -> None:
        held = self.pages.at(action.extent, action.version)
        refusal = refuse_unload(action, held, self.pages, now_ns)
        if refusal is not None:
            self.load_lane.drop(job)
            self._refuse(job, refusal, now_ns)
            return
        assert held is not None
        job.held = held
        held.step(_UNLOAD)
        self._start_load(job, action, now_ns)

    def _start_load(self, job: LaneJob, action: Load | Unload, now_ns: int) -> None:
        self.load_lane.start(job, now_ns)
        self._ledger.effects.append(Start(device=self.name, lane=_LOAD, action=action))

    def _is_loading(self, action: Infer, held: HeldExtent | None) -> bool:
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

    def _begin_chore(self, lane: LaneQueue, job: LaneJob, work: Prepare | Retire, now_ns: int) -> None:
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

    def _process_codes(self, now_ns: int) -> None:
        due, self._codes_due = self._codes_due, {}
        for code_id in due:
            code = self.codes.get(code_id)
            if code is None or self._stopping:
                continue
            if code.state is CodeState.READY and code.ready_due:
                code.ready_due = False
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
                self.load_lane.push_chore(LaneJob(work, code), now_ns)
