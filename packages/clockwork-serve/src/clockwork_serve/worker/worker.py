"""The worker's brain: observes actions and the ends of jobs, for all its devices, and starts or refuses jobs.

Also here: the report to a new controller, and the invariants.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import assert_never

from msgspec.structs import replace

from clockwork_serve.messages import (
    Action,
    Code,
    CodeAdded,
    CodeRemoved,
    DeviceSpec,
    DeviceState,
    Held,
    Infer,
    Lane,
    Load,
    MeasuredDurations,
    Resident,
    Result,
    RetainWeights,
    Running,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.worker.device import DeviceWorker, Ledger
from clockwork_serve.worker.events import (
    ControllerFound,
    ControllerLost,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Stop,
    WorkerEffect,
    WorkerEvent,
)
from clockwork_serve.worker.lanes import LaneQueue, Work
from clockwork_serve.worker.pages import WEIGHTS_LOADING, WEIGHTS_READY, CodeState, HeldExtent, WeightsState

# ------------------------------------------------------------
# The state of a device as reported to a new controller: codes, weights, running actions, durations.


def state_of(device: DeviceWorker, now_ns: int) -> DeviceState:
    """The whole state, except weights that are being unloaded or are stale."""
    return DeviceState(
        device=device.name,
        codes=tuple([code_id for code_id, code in device.codes.items() if code.state is CodeState.READY]),
        weights=tuple(
            [
                Resident(
                    model=held.model, code_id=held.code_id, weights=held.weights, extent=held.extent,
                    version=held.version, ready=held.state is WEIGHTS_READY,
                )
                for held in device.pages.all()
                if not held.stale and held.weights and held.state in (WEIGHTS_LOADING, WEIGHTS_READY)
            ]
        ),
        running=tuple(
            [one for name, lane in device.lanes.items() if (one := _running(name, lane, now_ns)) is not None]
        ),
        measured=tuple(
            [
                MeasuredDurations(code_id=code_id, batch=batch, signature=signature, lasted_ns=tuple(recent))
                for code_id, code in device.codes.items()
                for (batch, signature), recent in code.recent.items()
            ]
        ),
    )  # fmt: skip


def _running(name: Lane, lane: LaneQueue, now_ns: int) -> Running | None:
    """The LOAD or INFER that runs on a lane; chores and UNLOADs are not reported."""
    job = lane.running
    if job is None or isinstance(job.work, Prepare | Retire | Unload):
        return None
    action = job.work
    left_ns = lane.started_ns + action.expected_ns - now_ns
    return Running(
        action_id=action.action_id, lane=name, version=action.version, left_ns=max(0, left_ns),
        expected_ns=action.expected_ns,
    )  # fmt: skip


# ------------------------------------------------------------
# Invariants of a device between two decisions.


def check_device(device: DeviceWorker, live: set[int]) -> None:
    """Assert every invariant; ``live`` are the ids of actions that are owed a result."""
    device.pages.check()
    for lane in device.lanes.values():
        lane.check()
    running = device.load_lane.running
    for held in device.pages.all():
        moving = held.state in (WeightsState.LOADING, WeightsState.UNLOADING)
        assert moving == (running is not None and running.held is held), f"{held.model}, {running} disagree"
    _check_infers(device)
    _check_owed(device, live)
    _check_codes(device)


def _check_infers(device: DeviceWorker) -> None:
    """Assert that jobs refer to the weights that they read, and that readers are counted."""
    running = device.exec_lane.running
    jobs = device.exec_lane.queued()
    for job in jobs:
        found = [held for held in device.pages.all() if _serves(held, job.work)]
        known = job.held is not None and job.held.state is not WeightsState.EMPTY
        assert found == ([job.held] if known else []), f"{job.work} does not read {found}"
    if running is not None:
        jobs.append(running)
        held = running.held
        assert held is not None and device.pages.at(held.extent, held.version) is held
        assert held.state is WeightsState.READY
        assert running.code is not None and running.code.state is CodeState.READY
    for held in device.pages.all():
        readers = sum(job.held is held for job in jobs)
        assert readers == held.readers, f"{held.model}: {readers} readers, counted {held.readers}"


def _check_owed(device: DeviceWorker, live: set[int]) -> None:
    for job in device.jobs():
        work = job.work
        if job.owed:
            assert not isinstance(work, (Prepare, Retire)) and work.action_id in live


def _check_codes(device: DeviceWorker) -> None:
    jobs = device.jobs()
    queued = device.load_lane.queued()
    for code_id, code in device.codes.items():
        users = sum(job.code is code and not isinstance(job.work, (Prepare, Retire)) for job in jobs)
        users += sum(held.code_id == code_id for held in device.pages.all())
        assert users == code.users, f"code {code_id}: {users} users, counted {code.users}"
        chores = sum(job.code is code and isinstance(job.work, (Prepare, Retire)) for job in queued)
        assert chores == code.chore, f"code {code_id}: {chores} chores are queued"
        assert code.wanted or not code.ready_due, f"code {code_id}: a CodeReady is owed for a removed code"
        assert not code.users or code.state is CodeState.READY, f"{code_id} is used while {code.state}"


def _serves(held: HeldExtent, work: Work) -> bool:
    return isinstance(work, Infer) and held.serves(work, work.extent.first, work.extent.count)


# ------------------------------------------------------------
# The brain.


class Worker:
    """The worker's brain: a ``machine.Machine`` of ``WorkerEvent`` and ``WorkerEffect``."""

    def __init__(self, devices: tuple[DeviceSpec, ...]) -> None:
        self._ledger = Ledger()
        self._all = [DeviceWorker(spec, self._ledger, index) for index, spec in enumerate(devices)]
        self._devices = {device.name: device for device in self._all}
        assert len(self._devices) == len(devices) > 0, "devices: at least one, each with its name"
        self._inbox: list[
            Action | ControllerLost | ControllerFound | RetainWeights | Stop
        ] = []  # events that are processed in ``decide``, in the order of arrival
        self._dirty: list[DeviceWorker] = []  # devices whose lanes are to be processed, in order
        self._wakes: list[tuple[int, int]] = []
        """Heap of (instant, device's index): every lane's ``wake_ns``, and stale ones."""
        self._now_ns = 0
        self._had_controller = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits on any device."""
        return all(device.idle for device in self._all)

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """Change belief by one event."""
        assert now_ns >= self._now_ns, f"time went back from {self._now_ns} to {now_ns}"
        self._now_ns = now_ns
        # Records have no subclasses, and asking for one that a record is not takes isinstance 50 ns.
        if type(event) is Result:
            device = self._devices[event.device]
            if not device.dirty:  # as _mark does
                device.dirty = True
                self._dirty.append(device)
            device.done(event, now_ns)
        elif type(event) is Infer or type(event) is Load or type(event) is Unload:
            self._inbox.append(event)
        else:
            self._observe_other(event, now_ns)

    def _observe_other(self, event: WorkerEvent, now_ns: int) -> None:
        assert not isinstance(event, Result)
        match event:
            case (
                Infer() | Load() | Unload() | ControllerLost() | ControllerFound() | RetainWeights() | Stop()
            ):
                self._inbox.append(event)
            case Prepared():
                device = self._devices[event.device]
                self._mark(device)
                device.prepared(event, now_ns)
            case Retired():
                device = self._devices[event.device]
                self._mark(device)
                device.retired(event, now_ns)
            case CodeAdded():
                for device in self._mark_all():
                    device.add_code(event)
            case CodeRemoved():
                for device in self._mark_all():
                    device.remove_code(event.code_id)
            case _:
                assert_never(event)

    def decide(self, now_ns: int) -> list[WorkerEffect]:
        """Queue new actions, start those that are due, refuse those that cannot run; returns all effects."""
        assert now_ns >= self._now_ns, f"time went back from {self._now_ns} to {now_ns}"
        self._now_ns = now_ns
        if self._inbox:
            self._admit(now_ns)
        wakes = self._wakes
        while wakes and wakes[0][0] <= now_ns:
            self._mark(self._pop_wake())
        dirty = self._dirty
        if dirty:
            for device in dirty:
                device.dirty = False
                if device.process(now_ns):
                    self._note_wakes(device)
            dirty.clear()
        ledger = self._ledger
        effects = ledger.effects
        ledger.effects = []
        if ledger.refused:
            self._say_what_is_held(effects)
        return effects

    def _say_what_is_held(self, effects: list[WorkerEffect]) -> None:
        """Have the last refusal of each device say what that holds: belief may be why it was refused."""
        for name, at in self._ledger.refused.items():
            result = effects[at]
            assert isinstance(result, Result)
            if name in self._devices:
                effects[at] = replace(result, held=self._devices[name].held())
        self._ledger.refused.clear()

    def held(self, device: str) -> Held:
        """What a device holds; see ``Held``."""
        return self._devices[device].held()

    def next_wakeup_ns(self) -> int | None:
        """When the window of the next job of a free lane opens, or closes while its weights are loading."""
        wakes = self._wakes
        while wakes:
            wake_ns, index = wakes[0]
            device = self._all[index]
            if wake_ns == device.exec_lane.wake_ns:
                return wake_ns
            if wake_ns == device.load_lane.wake_ns:
                return wake_ns
            self._pop_wake()
        return None

    def lane_wakeup_ns(self, device: str, lane: Lane) -> int | None:
        """The wake-up of one lane, for drivers in which each lane has its own thread."""
        return self._devices[device].lanes[lane].wake_ns

    def executing(self) -> list[Work]:
        """What all lanes are executing."""
        lanes = [lane for device in self._all for lane in device.lanes.values()]
        return [lane.running.work for lane in lanes if lane.running is not None]

    def resume(self, name: str, codes: Iterable[Code], weights: Iterable[Resident]) -> None:
        """Have a device hold codes and weights that are ready; see ``DeviceWorker.resume``."""
        self._devices[name].resume(codes, weights)

    def prepared(self, name: str, code_id: str) -> bool:
        """Whether a code is ready on a device."""
        code = self._devices[name].codes.get(code_id)
        return code is not None and code.state is CodeState.READY

    def add_pages(self, pages: int, device: str = "") -> None:
        """A device, or each, has so many more pages for weights; for simulations."""
        for one in self._all:
            if device in {"", one.name}:
                one.add_pages(pages)

    def check(self) -> None:
        """Assert every invariant of the state."""
        live = 0
        for device in self._all:
            check_device(device, self._ledger.live)
            live += sum(job.owed for job in device.jobs())
            for lane in device.lanes.values():
                assert lane.wake_ns is None or lane.wake_ns == lane.queued_wake_ns
                assert lane.queued_wake_ns is None or (lane.queued_wake_ns, device.index) in self._wakes
        assert live == len(self._ledger.live), f"{live} jobs are owed a result, not {len(self._ledger.live)}"

    def _admit(self, now_ns: int) -> None:
        inbox = self._inbox
        self._inbox = []
        for item in inbox:
            if type(item) is Infer or type(item) is Load or type(item) is Unload:
                device = self._devices.get(item.device)
                if device is None:
                    self._reject(item, now_ns)
                    continue
                self._mark(device)
                if isinstance(item, Infer):
                    device.admit_infer(item, now_ns)
                else:
                    device.admit(item, now_ns)
            elif isinstance(item, RetainWeights):
                if (kept := self._devices.get(item.device)) is not None:
                    self._mark(kept)
                    kept.retain(item)
            elif isinstance(item, ControllerFound):
                self._join(item, now_ns)
            else:
                for device in self._mark_all():
                    if isinstance(item, Stop):
                        device.stop(now_ns)
                    else:
                        device.lose_controller(now_ns)

    def _join(self, found: ControllerFound, now_ns: int) -> None:
        """Send WorkerJoined, with the devices' states if there was a controller before."""
        states = tuple([state_of(device, now_ns) for device in self._all]) if self._had_controller else ()
        self._had_controller = True
        specs = tuple([device.spec for device in self._all])
        self._ledger.effects.append(WorkerJoined(worker=found.worker, devices=specs, states=states))

    def _reject(self, action: Action, now_ns: int) -> None:
        known = ", ".join(self._devices)
        refusal = Status.UNKNOWN_DEVICE, f"device: expected one of {known}; found {action.device!r}"
        self._ledger.reject(action, refusal, now_ns)

    def _note_wakes(self, device: DeviceWorker) -> None:
        """Add the wake-ups of its lanes to the heap, unless they are there."""
        for lane in (device.load_lane, device.exec_lane):
            wake_ns = lane.wake_ns
            if wake_ns is not None and wake_ns != lane.queued_wake_ns:
                lane.queued_wake_ns = wake_ns
                heappush(self._wakes, (wake_ns, device.index))

    def _pop_wake(self) -> DeviceWorker:
        """Remove the first wake-up; returns its device."""
        wake_ns, index = heappop(self._wakes)
        device = self._all[index]
        for lane in (device.load_lane, device.exec_lane):
            if lane.queued_wake_ns == wake_ns:
                lane.queued_wake_ns = None
        return device

    def _mark(self, device: DeviceWorker) -> None:
        """Have its lanes processed in the next decision."""
        if not device.dirty:
            device.dirty = True
            self._dirty.append(device)

    def _mark_all(self) -> list[DeviceWorker]:
        for device in self._all:
            self._mark(device)
        return self._all
