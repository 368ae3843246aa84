"""The lanes, which execute the actions that the worker's brain starts, and report their results.

A lane of a device that computes is a thread. The brain is stepped under one lock by whichever thread has an
event. So a lane that finishes an action steps the brain itself and starts its next action at once; no other
thread has to run in between. Where all devices of a worker only take time, their lanes need no threads: the
loop's thread begins each action, and one timer tells it when the next one ends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from typing import Final

from clockwork_serve.devices.base import Device, TimedDevice, Underway, sleep_precisely
from clockwork_serve.errors import ClockworkError, DamageError, DeviceGone, ModelError, described, printable
from clockwork_serve.messages import (
    ArtefactDamaged,
    CodeReady,
    Infer,
    Lane,
    Load,
    Result,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.serve.child import EXIT_BROKEN
from clockwork_serve.serve.driver import LoopTimer
from clockwork_serve.serve.shm import (
    BadTensors,
    Calls,
    OpenCall,
    RegionGone,
    RegionMap,
    SpilledOutputs,
    check_epochs,
    encode_outputs,
)
from clockwork_serve.serve.worker.crash_report import FlightRecorder, LaneRecord
from clockwork_serve.units import NS_PER_S, us
from clockwork_serve.worker import Prepare, Prepared, Retire, Retired, Start, Worker, WorkerEvent

SPIN_NS: Final = us(150)
"""A lane sleeps until this long before a start and spins the rest: 0.3 us late, not 30."""
TIMER_LATE_NS: Final = us(50)
"""How long before a start the loop's timer is set, which is about 30 us late, and the rest is spun. Less than
a lane's: the thread has other lanes' work to do."""
FIFO_PRIORITY: Final = 10  # priority of lane threads under SCHED_FIFO (``isolate``)
REPORT_AGAIN_NS: Final = NS_PER_S
REPORTS_REMEMBERED: Final = 1000
"""How often an artefact that stays damaged is reported, and for how many artefacts that is remembered."""

_log = logging.getLogger(__name__)

Answer = Result | CodeReady | WorkerJoined | ArtefactDamaged
Work = Start | Prepare | Retire


def end_broken_process(error: BaseException) -> None:
    """End the process after an error in the brain: its state is wrong, and must not be acted on any more."""
    _log.critical("the worker's brain broke", exc_info=error)
    logging.shutdown()
    os._exit(EXIT_BROKEN)


def end_process_without_device(error: DeviceGone) -> None:
    """End the process after it has lost its device for good; the supervisor starts a new one."""
    _log.critical("%s; this worker ends, to be started again", error)
    logging.shutdown()
    os._exit(EXIT_BROKEN)


class LaneExecutors:
    """The lanes of all devices of a worker, around its brain; threads, or :attr:`on_loop`.

    All callbacks are called by the threads of lanes: ``notify`` when there are answers to take, once until
    :meth:`take_answers` is called; ``on_codes_changed`` by an idle lane that has prepared or retired codes;
    ``on_broken`` for an error of the brain; ``on_device_gone`` once a device is lost. The last two end the
    process by default. ``recorder`` has a record for each lane.
    """

    def __init__(
        self, worker: Worker, devices: Mapping[str, Device], notify: Callable[[], None], *,
        realtime: bool = False, on_codes_changed: Callable[[], None] = lambda: None,
        on_broken: Callable[[BaseException], None] = end_broken_process,
        recorder: FlightRecorder | None = None,
        on_device_gone: Callable[[DeviceGone], None] = end_process_without_device,
    ) -> None:  # fmt: skip
        self.lock = threading.Lock()
        self.worker = worker
        self.regions = RegionMap()
        self.realtime = realtime
        self.on_codes_changed = on_codes_changed
        self.on_broken = on_broken
        self.on_device_gone = on_device_gone
        self.closing = False
        self._on_answers = notify
        self._notified = False
        self._answers: list[Answer] = []
        self._reported: dict[ArtefactDamaged, int] = {}  # damage reported lately, and when
        self.spill = SpilledOutputs(sum(device.spec.io_bytes for device in devices.values()))
        timed = {name: device for name, device in devices.items() if isinstance(device, TimedDevice)}
        on_loop = len(timed) == len(devices)
        self._calls = Calls(self.regions, self.spill, inputs=not on_loop)
        self._opened: dict[int, list[OpenCall] | ClockworkError] = {}
        """By action id: the tensors of queued INFERs, opened before their lane needs them."""
        records = iter((recorder or FlightRecorder(len(devices) * len(Lane))).lanes)
        self._lanes: dict[str, dict[Lane, LaneThread]] = {}
        self._wheel: LaneWheel | None = None
        if on_loop:
            self._wheel = LaneWheel(self, timed, records)
        else:
            self._lanes = {
                name: {lane: LaneThread(self, device, name, lane, next(records)) for lane in Lane}
                for name, device in devices.items()
            }

    @property
    def on_loop(self) -> bool:
        """Whether the loop's thread executes all actions: it is the one that has to be in time."""
        return self._wheel is not None

    def start(self) -> None:
        """Start the lanes' threads; for the loop's thread."""
        if self._wheel is not None:
            self._wheel.start()
        for lane in self._all():
            lane.thread.start()

    def post(self, *events: WorkerEvent) -> None:
        """Have the brain observe these and decide.

        For one thread, which must call :meth:`take_answers` afterwards.
        """
        memories: dict[str, memoryview] = {}  # a system call less for each further INFER
        for event in events:
            if isinstance(event, Infer):
                self._opened.setdefault(event.action_id, self._open(event, memories))
        with self.lock:
            self.step(*events)
        if self._wheel is not None:
            self._wheel.begin_assigned()

    def take_answers(self) -> list[Answer]:
        """All answers since the last call, in order."""
        with self.lock:
            self._notified = False
            answers, self._answers = self._answers, []
        return answers

    def report_damage(self, error: DamageError) -> None:
        """Report an artefact whose content does not match its name, so that it is rebuilt; for any thread.

        Until then further requests find the same damage; it is reported once a second at most.
        """
        report = ArtefactDamaged(what=error.what, name=error.name, message=_message(error))
        now_ns = time.monotonic_ns()
        with self.lock:
            since_ns = self._reported.pop(report, 0)
            news = not since_ns or now_ns - since_ns > REPORT_AGAIN_NS
            self._reported[report] = now_ns if news else since_ns
            if len(self._reported) > REPORTS_REMEMBERED:
                del self._reported[next(iter(self._reported))]
            if news:
                self._answers.append(report)
        if news:
            _log.error("%s", error)
            self.notify()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits, and no answer is left to take."""
        with self.lock:
            return self.worker.idle and not self._answers

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the lanes' threads; False if one still runs."""
        if self._wheel is not None:
            self._wheel.close()
        with self.lock:
            self.closing = True
            for lane in self._all():
                lane.wake()
        for lane in self._all():
            if lane.thread.is_alive():
                lane.thread.join(timeout_s)
        self.spill.close()
        return not any(lane.thread.is_alive() for lane in self._all())

    # For lanes

    def step(self, *events: WorkerEvent) -> None:
        """Have the brain observe and decide, and hand its effects out. The lock is held."""
        now_ns = time.monotonic_ns()
        for event in events:
            self.worker.observe(event, now_ns)
        lanes = self._lanes if self._wheel is None else self._wheel.lanes
        for effect in self.worker.decide(now_ns):
            match effect:
                case Start():
                    lanes[effect.device][effect.lane].assign(effect)
                case Prepare() | Retire():
                    lanes[effect.device][Lane.LOAD].assign(effect)
                case _:
                    if isinstance(effect, Result):
                        self._opened.pop(effect.action_id, None)
                    self._answers.append(effect)
        # An event without a device (a code that was added) may concern the lanes of all devices.
        named = getattr(events[0], "device", "") if len(events) == 1 else ""
        for name in self._lanes if named not in self._lanes else (named,):
            for lane in self._lanes[name].values():
                lane.rearm()

    def notify(self) -> None:
        """Call ``notify`` if there are answers, unless it was called since they were last taken."""
        with self.lock:
            due = bool(self._answers) and not self._notified
            self._notified = self._notified or due
        if due:
            self._on_answers()

    def opened(self, action: Infer) -> list[OpenCall]:
        """The tensors of an INFER's calls; raises what opening them raised."""
        found = self._opened.pop(action.action_id, None)
        if found is None:
            found = self._open(action)
        if isinstance(found, ClockworkError):
            try:
                raise found
            finally:
                del found  # else this frame and the error's traceback would form a cycle
        return found

    def _open(
        self, action: Infer, memories: dict[str, memoryview] | None = None
    ) -> list[OpenCall] | ClockworkError:
        try:
            return self._calls.open(action, memories)
        except (RegionGone, BadTensors) as error:
            return error.with_traceback(None)  # its frames hold views of regions, and would keep their memory

    def _all(self) -> list[LaneThread]:
        return [lane for lanes in self._lanes.values() for lane in lanes.values()]


class LaneExecution(ABC):
    """What lanes have in common: one does one work at a time, and reports its end whatever happens."""

    def __init__(
        self, executors: LaneExecutors, device: Device, name: str, lane: Lane, record: LaneRecord
    ) -> None:
        self._executors = executors
        self._device = device
        self._name = name
        self._lane = lane
        self._record = record
        self._work: Work | None = None
        self._codes_changed = False  # a code was prepared or retired since ``on_codes_changed`` was called

    def _perform(self, work: Work) -> WorkerEvent | None:
        match work:
            case Prepare():
                self._record.code(work.code.code_id)
                self._codes_changed = True
                message = self._run_code_task(
                    lambda: self._device.prepare(work.code), f"prepare {work.code.code_id}"
                )
                return Prepared(device=self._name, code_id=work.code.code_id, ok=not message, message=message)
            case Retire():
                self._codes_changed = True
                self._run_code_task(lambda: self._device.retire(work.code_id), f"retire {work.code_id}")
                return Retired(device=self._name, code_id=work.code_id)
            case Start():
                self._record.action(work.action.action_id)
                return self._start(work)

    def _run_code_task(self, call: Callable[[], None], what: str) -> str:
        try:
            call()
        except DeviceGone as error:
            self._executors.on_device_gone(error)
            return _message(error)
        except DamageError as error:
            self._executors.report_damage(error)
            return _message(error)
        except BaseException as error:  # noqa: BLE001 - other codes are not affected
            message = _message(error)
            foreseen = isinstance(error, ClockworkError)
            _log.error("%s can not %s: %s", self._name, what, message, exc_info=None if foreseen else error)
            return message
        return ""

    def _start(self, work: Start) -> Result | None:
        action = work.action
        began_ns = time.monotonic_ns()
        late_ns = began_ns - action.window.latest_ns
        if late_ns > 0 and not isinstance(action, Unload):
            message = f"its lane was woken {late_ns} ns after its window closed"
            return self._done(work, Status.TOO_LATE, began_ns, began_ns, message=message)
        return self._guarded(work, began_ns, lambda: self._execute(work, began_ns))

    @abstractmethod
    def _execute(self, work: Start, began_ns: int) -> Result | None:
        """Have the device do it; None if it ends later."""

    def _guarded(self, work: Start, began_ns: int, call: Callable[[], Result | None]) -> Result | None:
        """What ``call`` returns, or the failure of the action."""
        try:
            return call()
        except DeviceGone as error:
            self._executors.on_device_gone(error)
            return self._failed(work, error, began_ns)
        except DamageError as error:
            self._executors.report_damage(error)
            return self._failed(work, error, began_ns)
        except BaseException as error:  # noqa: BLE001 - every action gets a result
            return self._failed(work, error, began_ns)

    def _failed(self, work: Start, error: BaseException, began_ns: int) -> Result:
        action = work.action
        status = _status_of(error)
        known = isinstance(error, ClockworkError)
        level = logging.ERROR if status is Status.DEVICE_FAULT else logging.DEBUG
        fields = {"device": self._name, "model": action.model, "action_id": action.action_id}
        if isinstance(action, Infer):
            fields["request_ids"] = ",".join(call.request_id for call in action.calls)
        message = _message(error)
        _log.log(level, "%s: %s", status, message, exc_info=None if known else error, extra=fields)
        return self._done(work, status, began_ns, time.monotonic_ns(), message=message)

    def _done(
        self, work: Start, status: Status, started_ns: int, ended_ns: int, *, message: str = "",
        once_ns: int = 0,
    ) -> Result:  # fmt: skip
        return Result(
            action_id=work.action.action_id, device=self._name, status=status, started_ns=started_ns,
            ended_ns=ended_ns, message=message, once_ns=once_ns,
        )  # fmt: skip


class LaneThread(LaneExecution):
    """A lane with a thread of its own. Its fields are guarded by the lock of ``executors``."""

    def __init__(
        self, executors: LaneExecutors, device: Device, name: str, lane: Lane, record: LaneRecord
    ) -> None:
        super().__init__(executors, device, name, lane, record)
        self.thread = threading.Thread(target=self._run, name=f"{name} {lane}", daemon=True)
        # Held, but for the moment between a call of :meth:`wake` and the waking of this thread.
        self._wake_lock = threading.Lock()
        self._wake_lock.acquire()
        self._parked = False  # this thread sleeps, or is about to, and is to be woken
        self._armed_ns: int | None = None  # when it wakes by itself

    # For threads that hold the lock

    def assign(self, work: Work) -> None:
        """Have this lane, which is free, do this now."""
        assert self._work is None, f"{self._name} {self._lane} has {self._work} to do already"
        self._work = work
        self.wake()

    def wake(self) -> None:
        """Wake the thread if it sleeps."""
        if self._parked:
            self._parked = False
            self._wake_lock.release()

    def rearm(self) -> None:
        """Wake the thread if the brain's wake-up time is no longer the one that it sleeps until."""
        if self._parked and self._executors.worker.lane_wakeup_ns(self._name, self._lane) != self._armed_ns:
            self.wake()

    # The thread

    def _run(self) -> None:
        try:
            self._prepare_thread()
            done: WorkerEvent | None = None
            while (work := self._next(done)) is not None:
                done = self._perform(work)
                assert done is not None, f"{work} has not ended"
                self._record.clear()
        except BaseException as error:  # noqa: BLE001 - no thread may die without a report
            self._executors.on_broken(error)

    def _prepare_thread(self) -> None:
        sleep_precisely()
        if self._executors.realtime:
            set_realtime(FIFO_PRIORITY)

    def _next(self, done: WorkerEvent | None) -> Work | None:
        """Report what was done and wait for the next work; None once the lanes close."""
        executors = self._executors
        while True:
            with executors.lock:
                executors.step(*(() if done is None else (done,)))
                done = None
                work, self._work = self._work, None
                if work is None:
                    if executors.closing:
                        return None
                    self._armed_ns = executors.worker.lane_wakeup_ns(self._name, self._lane)
                    self._parked = True
            executors.notify()
            if work is not None:
                return work
            if self._codes_changed and self._armed_ns is None:
                self._codes_changed = False
                executors.on_codes_changed()
            self._sleep()

    def _sleep(self) -> None:
        """Sleep until woken, or until the armed time; the last 150 us of that are spun."""
        armed_ns = self._armed_ns
        if armed_ns is None:
            self._wake_lock.acquire()
            return
        left_ns = armed_ns - SPIN_NS - time.monotonic_ns()
        if left_ns > 0 and self._wake_lock.acquire(timeout=left_ns / NS_PER_S):
            return
        while self._parked and time.monotonic_ns() < armed_ns:
            pass
        with self._executors.lock:
            if self._parked:
                self._parked = False
            else:
                self._wake_lock.acquire()  # it was woken while it spun

    def _execute(self, work: Start, began_ns: int) -> Result:
        action, once_ns = work.action, 0
        if isinstance(action, Infer):
            return self._infer(action)
        if isinstance(action, Load):
            once_ns = self._device.load(action)
        else:
            self._device.unload(action)
        return self._done(work, Status.OK, began_ns, time.monotonic_ns(), once_ns=once_ns)

    def _infer(self, action: Infer) -> Result:
        calls = self._executors.opened(action)
        check_epochs(calls)
        started_ns = time.monotonic_ns()
        phases = self._device.infer(action, calls)
        ended_ns = time.monotonic_ns()
        check_epochs(calls)
        return Result(
            action_id=action.action_id, device=self._name, status=Status.OK,
            started_ns=started_ns, ended_ns=ended_ns, input_ns=phases.input_ns, run_ns=phases.run_ns,
            output_ns=phases.output_ns, outputs=encode_outputs(calls),
        )  # fmt: skip


# ------------------------------------------------------------
# Lanes of devices that only take time, without threads: a heap of the instants at which actions end, and one
# timer of the loop. With a thread for each lane, an end costs a wake-up and the interpreter's lock.


class TimedLane(LaneExecution):
    """A lane of ``wheel``, which begins its work and is told when that ends."""

    def __init__(
        self, executors: LaneExecutors, device: TimedDevice, name: str, lane: Lane, record: LaneRecord,
        wheel: LaneWheel,
    ) -> None:  # fmt: skip
        super().__init__(executors, device, name, lane, record)
        self._timed = device
        self._wheel = wheel
        self._began_ns = 0
        self._underway = Underway(0)
        self._calls: list[OpenCall] = []

    @property
    def at_rest(self) -> bool:
        """Whether it has nothing to do, now or at an instant that is known."""
        return self._work is None and self._executors.worker.lane_wakeup_ns(self._name, self._lane) is None

    def assign(self, work: Work) -> None:
        """Have this lane, which is free, do this as soon as the brain's step is over."""
        assert self._work is None, f"{self._name} {self._lane} has {self._work} to do already"
        self._work = work
        self._wheel.assigned.append(self)

    def begin(self) -> WorkerEvent | None:
        """Begin what was assigned; returns its end if it is over at once."""
        assert self._work is not None
        if (over := self._perform(self._work)) is not None:
            self._rest()
        return over

    def end(self, ended_ns: int) -> Result:
        """The end, which was seen to be due at ``ended_ns``, of what was begun."""
        work, calls = self._work, self._calls
        assert isinstance(work, Start)
        self._calls = []
        done = self._guarded(work, self._began_ns, lambda: self._ended(work, calls, ended_ns))
        assert done is not None
        self._rest()
        return done

    def _rest(self) -> None:
        if self._codes_changed:
            self._codes_changed = False
            self._wheel.unsettled.append(self)
        self._work = None
        self._record.clear()

    def _execute(self, work: Start, began_ns: int) -> Result | None:
        action = work.action
        if isinstance(action, Infer):
            calls = self._executors.opened(action)
            check_epochs(calls)
            self._began_ns = time.monotonic_ns()
            self._underway = self._timed.begin_infer(action, calls)
            self._calls = calls
        elif isinstance(action, Load):
            self._began_ns = began_ns
            self._underway = self._timed.begin_load(action)
        else:
            self._device.unload(action)
            return self._done(work, Status.OK, began_ns, time.monotonic_ns())
        self._wheel.push(self._underway.end_ns, self)
        return None

    def _ended(self, work: Start, calls: list[OpenCall], ended_ns: int) -> Result:
        output_ns = self._underway.output_ns
        if not calls:
            return self._done(work, Status.OK, self._began_ns, ended_ns)
        check_epochs(calls)
        return Result(
            action_id=work.action.action_id, device=self._name, status=Status.OK,
            started_ns=self._began_ns, ended_ns=ended_ns, run_ns=ended_ns - self._began_ns - output_ns,
            output_ns=output_ns, outputs=encode_outputs(calls),
        )  # fmt: skip


class LaneWheel:
    """All lanes of a worker whose devices only take time. For the loop's thread."""

    def __init__(
        self, executors: LaneExecutors, devices: Mapping[str, TimedDevice], records: Iterator[LaneRecord]
    ) -> None:
        self.lanes = {
            name: {lane: TimedLane(executors, device, name, lane, next(records), self) for lane in Lane}
            for name, device in devices.items()
        }
        self.assigned: list[TimedLane] = []  # all and only lanes that have work that is not begun
        self.unsettled: list[TimedLane] = []
        """Lanes that have changed codes, perhaps not all that they are to change."""
        self._executors = executors
        self._ends: list[tuple[int, int, TimedLane]] = []
        """Heap of all actions under way: when one ends, a number (of equal instants the first), its lane."""
        self._count = 0
        self._wake_ns: int | None = None  # when the brain wants to decide
        self._timer: LoopTimer | None = None  # from the start to the end

    def start(self) -> None:
        """Begin to execute."""
        self._timer = LoopTimer(self._on_time)
        self._arm()

    def close(self) -> None:
        """Execute no more."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def push(self, end_ns: int, lane: TimedLane) -> None:
        """Have ``lane`` told when its action ends."""
        self._count += 1
        heappush(self._ends, (end_ns, self._count, lane))

    def begin_assigned(self) -> None:
        """Begin what the brain has started, and what it starts because some of that is over at once."""
        while self.assigned:
            lanes, self.assigned = self.assigned, []
            over = [end for lane in lanes if (end := lane.begin()) is not None]
            if over:
                with self._executors.lock:
                    self._executors.step(*over)
        if self.unsettled and all(lane.at_rest for lane in self.unsettled):
            self.unsettled.clear()
            self._executors.on_codes_changed()
        self._arm()

    def _on_time(self) -> None:
        """End what is due, have the brain decide, and begin what it starts."""
        wake_ns, ends = self._wake_ns, self._ends
        now_ns = time.monotonic_ns()
        if wake_ns is not None and wake_ns - TIMER_LATE_NS <= now_ns:
            upto_ns = min(wake_ns, ends[0][0]) if ends else wake_ns
            while now_ns < upto_ns:
                now_ns = time.monotonic_ns()
        over = []
        while ends and ends[0][0] <= now_ns:
            over.append(heappop(ends)[2].end(now_ns))
        with self._executors.lock:
            self._executors.step(*over)
        self.begin_assigned()
        self._executors.notify()

    def _arm(self) -> None:
        timer = self._timer
        if timer is None:
            return
        wake_ns = self._wake_ns = self._executors.worker.next_wakeup_ns()
        due_ns = None if wake_ns is None else wake_ns - TIMER_LATE_NS
        if self._ends and (due_ns is None or self._ends[0][0] < due_ns):
            due_ns = self._ends[0][0]
        timer.arm(due_ns)


def _status_of(error: BaseException) -> Status:
    if isinstance(error, ModelError):
        return Status.MODEL_RAISED
    if isinstance(error, RegionGone):
        return Status.INPUT_GONE
    if isinstance(error, BadTensors):
        return Status.BAD_ACTION
    return Status.DAMAGED if isinstance(error, DamageError) else Status.DEVICE_FAULT


def _message(error: BaseException) -> str:
    text = str(error) if isinstance(error, ClockworkError) else ""
    return printable(text) or described(error)


def set_realtime(priority: int) -> None:
    """Put the calling thread under SCHED_FIFO. Raises PermissionError if it may not be."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
