"""A simulated worker whose every step is held against the truth of its devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clockwork_serve.messages import DeviceSpec, Result, Status
from clockwork_serve.sim.host import Host, World
from clockwork_serve.sim.truth import Truth
from clockwork_serve.worker.events import LaneDone, Start, WorkerEffect, WorkerEvent

if TYPE_CHECKING:
    from clockwork_serve.sim.checks import Checks

STRIDE: Final = 64
"""Steps from one full check to the next, of the controller and of each worker: a full one costs as much as
fifty steps."""


class CheckedHost(Host):
    """See the module."""

    __slots__ = ("_checks", "_steps", "truth")

    def __init__(self, name: str, specs: tuple[DeviceSpec, ...], world: World, checks: Checks) -> None:
        super().__init__(name, specs, world)
        self._checks = checks
        self._steps = 0
        self.truth = {spec.device: Truth(spec) for spec in specs}

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """A lane that is done leaves its truth first."""
        assert not self.gone, f"{self.name} is gone, and hears of {event}"
        if isinstance(event, LaneDone):
            self.truth[event.device].end(event.lane, event.action_id)
        super().observe(event, now_ns)

    def decide(self, now_ns: int) -> None:
        """Every now and then, check all of it."""
        assert self.stopped is None, f"{self.name} is stopped, and decides"
        super().decide(now_ns)
        axis_ns = self.axis_ns(now_ns)
        wake_ns = self.machine.next_wakeup_ns()
        assert wake_ns is None or wake_ns > axis_ns, f"{self.name} asks at {axis_ns} to wake at {wake_ns}"
        self._steps += 1
        if self._steps % STRIDE == 0:
            self.check(axis_ns)

    def _start(self, effect: Start, now_ns: int) -> None:
        action, axis_ns = effect.action, self.axis_ns(now_ns)
        window = action.window
        assert window.earliest_ns <= axis_ns <= window.latest_ns, f"{action} starts at {axis_ns}"
        truth = self.truth[effect.device]
        truth.start(action, effect.lane)
        truth.slowest = max(truth.slowest, self.slowness.get(effect.device, 1.0))
        self._checks.started(self, action)
        super()._start(effect, now_ns)

    def _tell(self, message: WorkerEffect, now_ns: int) -> None:
        if isinstance(message, Result):
            running = self.truth[message.device].running.values()
            assert message.status is not Status.OK or all(
                action.action_id != message.action_id for action in running
            ), f"{message}, and it runs"
        super()._tell(message, now_ns)

    def wait_ns(self, device: str, now_ns: int) -> int:
        """Known to the truth."""
        wait_ns = super().wait_ns(device, now_ns)
        truth = self.truth[device]
        truth.waited_ns = max(truth.waited_ns, wait_ns)
        return wait_ns

    def stalled(self, by_ns: int) -> None:
        """What ran took so much longer."""
        for truth in self.truth.values():
            truth.stalled_ns += by_ns

    def check(self, axis_ns: int) -> None:
        """The machine against itself and against the truth; it has nothing left to do."""
        machine = self.machine
        machine.check()
        assert not machine.decide(axis_ns), f"{self.name} decides twice at {axis_ns}"
        for name, truth in self.truth.items():
            held = {
                one.extent.first: (one.extent, one.version, one.model, one.state == "ready")
                for one in machine._devices[name].pages.all()  # noqa: SLF001 - a book to be checked
            }
            lying = {at: (one.extent, one.version, one.model, one.ready) for at, one in truth.lying.items()}
            assert held == lying, f"{name}: its pages hold {lying}, and its worker believes {held}"
