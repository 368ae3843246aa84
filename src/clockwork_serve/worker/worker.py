"""The worker's machine: hears of actions and lanes that are done, for all its devices. It never chooses."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import assert_never

from clockwork_serve.messages import (
    Action,
    CodeAdded,
    CodeRemoved,
    DeviceSpec,
    Infer,
    Lane,
    Load,
    Status,
    Unload,
)
from clockwork_serve.worker.device import DeviceWorker
from clockwork_serve.worker.events import (
    ControllerLost,
    LaneDone,
    Prepared,
    Retired,
    Stop,
    WorkerEffect,
    WorkerEvent,
)
from clockwork_serve.worker.ledger import Ledger


class Worker:
    """See the module; ``machine.Machine`` of ``WorkerEvent`` and ``WorkerEffect``."""

    def __init__(self, devices: tuple[DeviceSpec, ...]) -> None:
        self._ledger = Ledger()
        self._devices = {spec.device: DeviceWorker(spec, self._ledger) for spec in devices}
        assert len(self._devices) == len(devices) > 0, "devices: at least one, each with its name"
        self._inbox: list[Action | ControllerLost | Stop] = []  # what must be decided in the order it came
        self._dirty: dict[DeviceWorker, None] = {}  # devices whose lanes must be looked at, in order
        self._wakes: list[tuple[int, str]] = []
        """Heap of (time, device): every lane's ``wake_ns``, and outdated ones."""
        self._now_ns = 0

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits on any device."""
        return all(device.idle for device in self._devices.values())

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """Change belief by one event."""
        assert now_ns >= self._now_ns, f"time went back from {self._now_ns} to {now_ns}"
        self._now_ns = now_ns
        match event:
            case Load() | Unload() | Infer() | ControllerLost() | Stop():
                self._inbox.append(event)
            case LaneDone():
                self._device(event.device).done(event, now_ns)
            case Prepared():
                self._device(event.device).prepared(event, now_ns)
            case Retired():
                self._device(event.device).retired(event, now_ns)
            case CodeAdded():
                for device in self._all():
                    device.add_code(event)
            case CodeRemoved():
                for device in self._all():
                    device.remove_code(event.code_id)
            case _:
                assert_never(event)

    def decide(self, now_ns: int) -> list[WorkerEffect]:
        """Admit what came, start what is due, refuse what can not be; all effects of this instant."""
        assert now_ns >= self._now_ns, f"time went back from {self._now_ns} to {now_ns}"
        self._now_ns = now_ns
        if self._inbox:
            self._admit(now_ns)
        while self._wakes and self._wakes[0][0] <= now_ns:
            self._dirty[self._devices[heappop(self._wakes)[1]]] = None
        dirty, self._dirty = self._dirty, {}
        for device in dirty:
            self._settle(device, now_ns)
        return self._ledger.take()

    def next_wakeup_ns(self) -> int | None:
        """When the next window of a job at the head of a free lane opens, or closes without its weights."""
        while self._wakes:
            wake_ns, name = self._wakes[0]
            if any(lane.wake_ns == wake_ns for lane in self._devices[name].lanes.values()):
                return wake_ns
            heappop(self._wakes)
        return None

    def lane_wakeup_ns(self, device: str, lane: Lane) -> int | None:
        """The same for one lane, for drivers in which each lane wakes itself."""
        return self._devices[device].lanes[lane].wake_ns

    def check(self) -> None:
        """Assert every invariant of the state."""
        live = 0
        for device in self._devices.values():
            device.check()
            live += sum(job.owed for job in device.jobs())
            for lane in device.lanes.values():
                assert lane.wake_ns is None or (lane.wake_ns, device.spec.device) in self._wakes
        assert live == len(self._ledger.live), f"{live} jobs are owed a result, not {len(self._ledger.live)}"

    def _admit(self, now_ns: int) -> None:
        inbox, self._inbox = self._inbox, []
        for item in inbox:
            match item:
                case ControllerLost():
                    for device in self._all():
                        device.lose_controller(now_ns)
                case Stop():
                    for device in self._all():
                        device.stop(now_ns)
                case _:
                    self._route(item, now_ns)

    def _settle(self, device: DeviceWorker, now_ns: int) -> None:
        before = [lane.wake_ns for lane in device.lanes.values()]
        device.settle(now_ns)
        for lane, wake_ns in zip(device.lanes.values(), before, strict=True):
            if lane.wake_ns is not None and lane.wake_ns != wake_ns:
                heappush(self._wakes, (lane.wake_ns, device.spec.device))

    def _route(self, action: Action, now_ns: int) -> None:
        device = self._devices.get(action.device)
        if device is None:
            known = ", ".join(self._devices)
            refusal = Status.UNKNOWN_DEVICE, f"device: expected one of {known}; found {action.device!r}"
            self._ledger.turn_away(action, refusal, now_ns)
            return
        self._dirty[device] = None
        device.admit(action, now_ns)

    def _device(self, name: str) -> DeviceWorker:
        device = self._devices[name]
        self._dirty[device] = None
        return device

    def _all(self) -> list[DeviceWorker]:
        devices = list(self._devices.values())
        for device in devices:
            self._dirty[device] = None
        return devices
