"""Whole-system checks of a simulation after every step, against an independent record of its true state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.life import READY
from clockwork_serve.messages import (
    Action,
    Answer,
    ControllerEffect,
    ControllerEvent,
    DeviceSpec,
    Extent,
    Infer,
    Lane,
    Load,
    Quarantined,
    Release,
    Result,
    Status,
    Unload,
    Unservable,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim.host import LEAST_NS, OpenRequests, SimulatedWorker, World, is_cut
from clockwork_serve.sim.restarts import adopted_infers
from clockwork_serve.telemetry import Recorder
from clockwork_serve.units import NS_PER_S, NS_PER_US
from clockwork_serve.worker.events import Start, WorkerEffect, WorkerEvent

if TYPE_CHECKING:
    from clockwork_serve.sim.simulation import Simulation


# ------------------------------------------------------------
# The true state of a device: what its pages hold and its lanes execute, kept apart from any brain's records.


class StoredWeights:
    """Weights that a device's pages truly hold; ``ready`` once their LOAD has ended."""

    __slots__ = ("extent", "model", "ready", "version")

    def __init__(self, action: Load) -> None:
        self.model = action.model
        self.extent = action.extent
        self.version = action.version
        self.ready = False


class Truth:
    """The true state of one device: the contents of its pages, and what runs on its lanes."""

    __slots__ = ("running", "slower", "slowest", "spec", "stalled_ns", "stored", "waited_ns")

    def __init__(self, spec: DeviceSpec, slower: float = 1.0) -> None:
        self.spec = spec
        self.slower = slower
        """How many times as long as on the zoo's devices everything takes here."""
        self.stored: dict[int, StoredWeights] = {}
        """All weights that hold pages, by first page."""
        self.running: dict[Lane, Action] = {}
        self.slowest = max(1.0, slower)
        """The largest factor so far by which it was slower than those, faults included."""
        self.stalled_ns = 0
        """For how long its lanes were stopped, in total."""
        self.waited_ns = 0
        """The longest wait so far of one lane for the other, where they share cores."""

    def start(self, action: Action, lane: Lane) -> None:
        """Record an action's start; assert that its lane is free and the pages are as it needs them."""
        assert lane not in self.running, f"{action} starts while {self.running[lane]} runs"
        assert (lane is Lane.EXEC) == isinstance(action, Infer), f"{action} starts on lane {lane}"
        self.running[lane] = action
        if isinstance(action, Load):
            self._claim(action)
            return
        stored = self.stored.get(action.extent.first)
        assert (
            stored is not None
            and stored.ready
            and stored.version == action.version
            and stored.extent == action.extent
            and stored.model == action.model
        ), f"{action} starts, and its weights are not there"
        if isinstance(action, Unload):
            reader = self.running.get(Lane.EXEC)
            assert reader is None or reader.version != action.version, f"{action} starts while they are read"
            stored.ready = False

    def _claim(self, action: Load) -> None:
        extent = action.extent
        assert extent.first >= 0 and extent.first + extent.count <= self.spec.pages, f"{action} leaves memory"
        assert action.weights.size <= extent.count * self.spec.page_bytes, f"{action} does not fit its pages"
        for other in self.stored.values():
            assert not other.extent.overlaps(extent), f"{action} starts in pages that hold {other.model}"
        self.stored[extent.first] = StoredWeights(action)

    def end(self, action_id: int) -> None:
        """Record the end of the action that a lane runs."""
        lane = next((lane for lane, one in self.running.items() if one.action_id == action_id), None)
        assert lane is not None, f"{action_id} ends, and {list(self.running.values())} ran"
        action = self.running.pop(lane)
        if isinstance(action, Load):
            self.stored[action.extent.first].ready = True
        elif isinstance(action, Unload):
            del self.stored[action.extent.first]

    def versions(self) -> set[int]:
        """Versions of all weights that hold pages."""
        return {one.version for one in self.stored.values()}

    def has(self, extent: Extent, version: int) -> bool:
        """Whether that version of weights is ready in that extent."""
        stored = self.stored.get(extent.first)
        return stored is not None and stored.ready and stored.version == version and stored.extent == extent


# ------------------------------------------------------------
# A simulated worker whose every step is checked against the true state of its devices.


STRIDE: Final = 64
"""Steps from one full check to the next, of the controller and of each worker: a full one costs as much as
fifty steps."""


class CheckedHost(SimulatedWorker):
    """A simulated worker that checks its brain, after every step, against the true state of its devices."""

    __slots__ = ("_checks", "_steps", "truth")

    def __init__(self, name: str, specs: tuple[DeviceSpec, ...], world: World, checks: Checks) -> None:
        super().__init__(name, specs, world)
        self._checks = checks
        self._steps = 0
        self.truth = {spec.device: Truth(spec, world.slower.get(spec.device, 1.0)) for spec in specs}

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """The true state changes first, then the brain observes it."""
        assert not self.gone, f"{self.name} has died, and observes {event}"
        if isinstance(event, Result):
            self.truth[event.device].end(event.action_id)
        super().observe(event, now_ns)

    def decide(self, now_ns: int) -> None:
        """Check the wake-up after each decision, and everything every ``STRIDE`` of them."""
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
        truth.slowest = max(truth.slowest, truth.slower * self.slowness.get(effect.device, 1.0))
        self._checks.started(self, action)
        super()._start(effect, now_ns)

    def _send_to_controller(self, message: WorkerEffect, now_ns: int) -> None:
        if isinstance(message, Result):
            running = self.truth[message.device].running.values()
            assert message.status is not Status.OK or all(
                action.action_id != message.action_id for action in running
            ), f"{message}, and it runs"
        super()._send_to_controller(message, now_ns)

    def wait_ns(self, device: str, now_ns: int) -> int:
        """Record the longest wait, by which an action may exceed its usual duration."""
        wait_ns = super().wait_ns(device, now_ns)
        truth = self.truth[device]
        truth.waited_ns = max(truth.waited_ns, wait_ns)
        return wait_ns

    def stalled(self, extra_ns: int) -> None:
        """Record by how much running actions may exceed their usual duration."""
        for truth in self.truth.values():
            truth.stalled_ns += extra_ns

    def check(self, axis_ns: int) -> None:
        """Check the brain's invariants, that it has no decision left, and its pages against the true ones."""
        machine = self.machine
        machine.check()
        assert not machine.decide(axis_ns), f"{self.name} decides twice at {axis_ns}"
        for name, truth in self.truth.items():
            held = {
                one.extent.first: (one.extent, one.version, one.model, one.state == "ready")
                for one in machine._devices[name].pages.all()  # noqa: SLF001 - a book to be checked
            }
            stored = {at: (one.extent, one.version, one.model, one.ready) for at, one in truth.stored.items()}
            assert held == stored, f"{name}: its pages hold {stored}, and its worker believes {held}"


# ------------------------------------------------------------
# Whole-system checks of a simulation, after every step. They observe, and change nothing.
#
# The true state is kept apart from the brains' records: what runs on each lane, what each page holds, which
# actions are in flight, which requests are open. After every step of the controller and of a worker, what
# they did is checked against it:
#
# - one response per request, with a legal outcome: no good one after the deadline, EXPIRED not before it,
#   CANCELLED only if the client or its gateway is gone, ...; tensors are released once, and only when no
#   worker reads them;
# - an action starts inside its window by the worker's clock, alone on its lane, once, and only while the
#   controller waits for its result;
# - a LOAD starts in free pages, an INFER with its own weights ready, an UNLOAD when no INFER reads the
#   weights;
# - weights that the controller believes ready are there, unless the link to that worker is cut, and a device
#   does not keep weights that the controller does not know of;
# - a request takes down no more workers than it may; it runs twice at once only if one of the two workers is
#   hung;
# - nothing is sent to a hung worker, and a worker is not hung any more only once it owes no result;
# - a model is in quarantine only after the configured number of workers died while it ran, and no action of
#   it is sent then;
# - an estimate lies within the range of possible durations;
# - wake-ups are later than now.
#
# Every ``STRIDE`` steps also: the brains' own ``check()``, all pages against the true ones, a second decision
# that must be empty, and the counters of the telemetry against the tally.


FORGET_NS: Final = 2 * NS_PER_S
"""Within this time, weights loaded over a lost link are unloaded: an INFER may read them until then."""


class Checks:
    """The whole-system checks; must be the last of a simulation's watchers."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._recorder = Recorder()
        self._steps = 0
        self.open_requests = OpenRequests(simulation.controller.config)
        self._held: set[str] = set()
        """Requests that ended while a worker had their tensors, until these are released."""
        self._reading: dict[str, set[int]] = {}
        """The actions that read a request's tensors, as far as the controller knows: one, and those of hung
        workers."""
        self._hung: dict[str, set[int]] = {}
        """Workers that the controller declared hung, and the INFERs it believed to be running there then."""
        self._out: dict[int, Action] = {}
        """All and only actions in flight: the controller has observed neither result nor loss. By id."""
        self._orphaned: set[int] = set()
        """Ids of actions that no controller waits for: sent by a dead one, or given up as lost."""
        self._no_failover = True
        """The controller never died."""
        self._unknown: dict[tuple[str, int], int] = {}
        """By device and version of weights that the controller does not know of: since when."""
        self._losses: Counter[str] = Counter()
        """How often each open request may have run on a worker that was lost."""
        self._deaths: Counter[str] = Counter()
        """How many workers died while each model ran there, or its code was prepared."""
        self._bounds: dict[tuple[str, int], tuple[int, int, float]] = {}
        noise = simulation.constants.noise
        self._infer_noise = _span(noise.infer_us)
        self._load_noise = _span(noise.load_us)

    def host(self, name: str, specs: tuple[DeviceSpec, ...]) -> SimulatedWorker:
        """A new worker that is checked after every step."""
        return CheckedHost(name, specs, self._simulation.world, self)

    def started(self, host: SimulatedWorker, action: Action) -> None:
        """Assert that the controller waits for an action that starts, unless it believes the worker lost."""
        if action.action_id < 0 or is_cut(host) or self._simulation.hosts.get(host.name) is not host:
            return
        assert action.action_id in self._out, f"{action} starts, and no controller waits for it"

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Check one step of the controller."""
        for event in events:
            if isinstance(event, Result):
                self._result(event)
                continue
            self.open_requests.observe(event)
            if isinstance(event, WorkerLost):
                self._lost(event)
            elif isinstance(event, WorkerJoined):
                names = {spec.device for spec in event.devices}
                assert not any(action.device in names for action in self._out.values()), f"{event} too early"
        for effect in effects:
            if isinstance(effect, Answer):
                self._answer(effect, now_ns)
            elif isinstance(effect, Release):
                assert effect.request_id in self._held, f"{effect} of tensors that are not held"
                self._held.remove(effect.request_id)
                assert effect.request_id not in self._reading, f"{effect} while a worker reads it"
            elif isinstance(effect, Infer | Load | Unload):
                self._action(effect, now_ns)
            elif isinstance(effect, Quarantined):
                self._quarantined(effect)
            elif isinstance(effect, Unservable):
                self._unservable(effect)
            elif isinstance(effect, WorkerHung):
                self._check_hung(effect)
        wake_ns = self._simulation.controller.next_wakeup_ns()
        assert wake_ns is None or wake_ns > now_ns, f"the controller asks at {now_ns} to wake at {wake_ns}"
        self._recorder.on_step(now_ns, events, effects)
        self._steps += 1
        if self._steps % STRIDE == 0:
            self.check(now_ns)

    # Failover

    def controller_died(self) -> None:
        """Reset what the controller knew; actions that it sent may still run."""
        self._orphaned.update(self._out)
        self._out.clear()
        self._reading.clear()
        self._hung.clear()
        self._held.clear()
        self._losses.clear()
        self._recorder = Recorder()
        self._no_failover = False
        self.open_requests.controller_died()

    def deposed_sent(self, action: Action) -> None:
        """A controller that was deposed sent an action: no controller that leads waits for it."""
        self._orphaned.add(action.action_id)

    # One step

    def _result(self, result: Result) -> None:
        action = self._out.pop(result.action_id, None)
        if action is None:
            assert result.action_id in self._orphaned, f"{result} of no action that is out"
            self._orphaned.remove(result.action_id)
            return
        if isinstance(action, Infer):
            self._read(action)
        elif isinstance(action, Load) and result.status is Status.OK:
            host = self._simulation.by_device.get(result.device)
            if isinstance(host, CheckedHost) and not is_cut(host) and not host.gone:
                there = host.truth[result.device].has(action.extent, action.version)
                assert there, f"{result}, and the weights are not there"

    def _read(self, action: Infer) -> None:
        """An INFER does not read its requests' tensors any more."""
        for call in action.calls:
            readers = self._reading[call.request_id]
            readers.remove(action.action_id)
            if not readers:
                del self._reading[call.request_id]

    def _check_hung(self, effect: WorkerHung) -> None:
        """A worker is declared hung, is to be ended, or has recovered."""
        if effect.end or not effect.why:
            assert effect.worker in self._hung, f"{effect}, and it was not hung"
        else:
            assert effect.worker not in self._hung, f"{effect} again"
        if effect.why:
            self._hung.setdefault(effect.worker, self._running_infers(effect.worker))
            self.open_requests.hung = True
        else:
            del self._hung[effect.worker]
            owed = [one for one in self._out.values() if self._worker_of(one) == effect.worker]
            assert not owed, f"{effect}, and it owes {owed}"

    def _running_infers(self, worker: str) -> set[int]:
        first: dict[str, int] = {}
        for action_id, action in sorted(self._out.items()):
            if isinstance(action, Infer) and self._worker_of(action) == worker:
                first.setdefault(action.device, action_id)
        return set(first.values())

    def _worker_of(self, action: Action) -> str:
        host = self._simulation.by_device.get(action.device)
        return "" if host is None else host.name

    def _lost(self, lost: WorkerLost) -> None:
        """All actions in flight on its devices are lost; these are the devices that no host has now."""
        by_device = self._simulation.by_device
        heads = self._hung.pop(lost.worker, None)
        out = [
            one
            for one in self._out.values()
            if one.device not in by_device or by_device[one.device].name == lost.worker
        ]
        ran = [one for one in out if lost.running is not None and one.action_id in lost.running]
        self._deaths.update({one.model for one in ran} | set(lost.preparing))
        known = (
            ran or lost.preparing or not self._orphaned.isdisjoint(lost.running or ()) or heads is not None
        )
        for action in out:
            self._lose(action, ran=action in ran or not known or action.action_id in (heads or ()))

    def _quarantined(self, effect: Quarantined) -> None:
        if not effect.why:
            self.open_requests.quarantined.remove(effect.model)
            return
        self.open_requests.quarantined.add(effect.model)
        after = self._simulation.controller.config.quarantine_after
        deaths = max(self._deaths[effect.model], self._deaths[effect.code_id])
        assert 0 < after <= deaths, f"{effect} after {deaths} deaths"

    def _unservable(self, effect: Unservable) -> None:
        if not effect.why:
            self.open_requests.unservable.remove(effect.model)
            return
        self.open_requests.unservable.add(effect.model)
        size = self.open_requests.served[effect.model].weights.size
        for host in self._simulation.hosts.values():  # simulated batches need no scratch memory
            for spec in host.specs:
                assert size > spec.pages * spec.page_bytes, f"{effect}, and {spec.device} has the room"

    def _lose(self, action: Action, *, ran: bool) -> None:
        del self._out[action.action_id]
        self._orphaned.add(action.action_id)
        if isinstance(action, Infer):
            most = self._simulation.controller.config.retries + 1
            self._read(action)
            for call in action.calls:
                self._losses[call.request_id] += ran
                assert self._losses[call.request_id] <= most, f"{call} cost {most + 1} workers"

    def _answer(self, answer: Answer, now_ns: int) -> None:
        self.open_requests.answer(answer, now_ns)
        if not answer.release:
            self._held.add(answer.request_id)
        else:
            assert answer.request_id not in self._reading, f"{answer} releases what a worker reads"

    def _action(self, action: Action, now_ns: int) -> None:
        assert action.action_id not in self._out, f"{action} is out already"
        assert action.window.latest_ns >= now_ns, f"{action} at {now_ns} is too late already"
        assert self._worker_of(action) not in self._hung, f"{action} on a worker that hung"
        self._out[action.action_id] = action
        if isinstance(action, Unload):
            return
        assert action.model in self.open_requests.served, f"{action} of a model that is not served"
        assert action.model not in self.open_requests.quarantined, f"{action} of a model in quarantine"
        if isinstance(action, Infer):
            for call in action.calls:
                asked = call.request_id in self.open_requests.open
                readers = self._reading.setdefault(call.request_id, set())
                elsewhere = all(self._worker_of(self._out[one]) in self._hung for one in readers)
                assert asked and elsewhere, f"{action}: {call} is not waiting"
                readers.add(action.action_id)
            assert sum(call.rows for call in action.calls) <= action.batch, f"{action} is overfull"
        self._estimate(action)

    def _estimate(self, action: Load | Infer) -> None:
        """Assert that an estimate, a quantile of durations and the profile, is in their possible range."""
        key = (action.code_id, action.batch if isinstance(action, Infer) else 0)
        if key not in self._bounds:
            self._bounds[key] = self._range(action)
        least_ns, most_ns, scale = self._bounds[key]
        host = self._simulation.by_device[action.device]
        assert isinstance(host, CheckedHost)
        truth = host.truth[action.device]
        most_ns = max(LEAST_NS, int(most_ns * truth.slowest)) + int(
            scale * (truth.stalled_ns + truth.waited_ns)
        )
        least_ns = int(least_ns * min(1.0, truth.slower))
        assert least_ns - 1 <= action.expected_ns <= most_ns + 1, (
            f"{action.expected_ns} ns are expected of what takes {least_ns} to {most_ns}: {action}"
        )

    def _range(self, action: Load | Infer) -> tuple[int, int, float]:
        """The shortest and longest possible duration on a device that no fault slows.

        Of an INFER also by what other batches of the code may take, of which its seed is made; the last value
        is by how much a delay of one of those may count.
        """
        simulation, code_id = self._simulation, action.code_id
        profiles = [simulation.world.truth[code_id]]
        profiles += [code.profiles[0] for code in simulation.codes if code.code.code_id == code_id]
        if isinstance(action, Load):
            lasts_ns = [profile.load_ns(action.weights.size) for profile in profiles]
            low_ns, high_ns = self._load_noise
            return min(lasts_ns) + low_ns, max(lasts_ns) + high_ns, 1.0
        low_ns, high_ns = self._infer_noise
        usual = profiles[1].infer_ns
        scales = {size: usual[action.batch] / usual_ns for size, usual_ns in usual.items()}
        least_ns = [scales[size] * (one.infer_ns[size] + low_ns) for size in usual for one in profiles]
        most_ns = [scales[size] * (one.infer_ns[size] + high_ns) for size in usual for one in profiles]
        return int(min(least_ns)), int(max(most_ns)) + 1, max(scales.values())

    # Every STRIDE steps

    def check(self, now_ns: int) -> None:
        """Check the controller, if one runs: its invariants, and its belief against the true state."""
        simulation = self._simulation
        if simulation.down is not None:
            return
        controller = simulation.controller
        controller.check()
        again = controller.decide(now_ns)
        assert not again, f"a second decision at {now_ns}: {again}"
        belief = controller._belief  # noqa: SLF001 - what it believes is what is checked
        owed = {action_id for one in belief.hung.values() for action_id in one.sent}
        assert belief.sent.keys() | owed == self._out.keys(), "the controller waits for others than are out"
        assert belief.hung.keys() == self._hung.keys(), f"{self._hung} hung"
        assert self.open_requests.open.keys() == simulation.open.keys()
        away = {device.name for one in belief.hung.values() for device in one.devices}
        assert belief.devices.keys() | away == simulation.by_device.keys()
        readers = Counter((one.device, one.version) for one in self._out.values() if isinstance(one, Infer))
        readers += adopted_infers(controller, self._orphaned)
        for name, device in belief.devices.items():
            host = simulation.by_device[name]
            assert isinstance(host, CheckedHost)
            if host.gone or is_cut(host):
                continue
            for one in device.pages.holders():
                there = host.truth[name].has(one.extent, one.version)
                assert there or one.state != READY, f"{name}: {one.model.model.key} is believed ready"
                out = readers[name, one.version]
                assert one.in_flight == out, f"{name}: {one.in_flight} INFERs believed out, not {out}"
            served, holders = self.open_requests.served, device.pages.holders()
            known = {one.version for one in holders if one.in_flight or one.model.model.key in served}
            self._check_forgotten(host, name, known, now_ns)
        self._check_counters()

    def _check_forgotten(self, host: CheckedHost, device: str, known: set[int], now_ns: int) -> None:
        """Assert that weights unknown to the controller, or of removed models, are unloaded in time."""
        moving = {one.version for one in self._out.values() if one.device == device}
        for version in host.truth[device].versions() - known - moving:
            if host.stopped is not None or host.stuck:
                self._unknown[device, version] = now_ns
            since_ns = self._unknown.setdefault((device, version), now_ns)
            assert now_ns - since_ns < FORGET_NS, f"{device}: version {version} is unknown since {since_ns}"

    def _check_counters(self) -> None:
        counters, tally = self._recorder.counters, self._simulation.tally
        assert not counters.unmatched
        assert counters.received == sum(counters.outcomes.values()) + counters.open
        assert counters.open == len(self.open_requests.open) - len(self.open_requests.awaiting_failover)
        if tally.warmup_ns or not self._no_failover:
            return
        total = tally.total()
        assert counters.received == total.offered, f"{counters.received} received, {total.offered} offered"
        assert counters.received - counters.open == total.ended
        good = counters.outcomes.get("ok", 0)
        assert total.ok <= good <= total.ok + total.late, f"{good} good; {total.ok} and {total.late} late"

    def check_end(self) -> None:
        """Check everything once more at the end of a run; no request may be open."""
        simulation = self._simulation
        self.check(simulation.now_ns)
        for host in simulation.hosts.values():
            if isinstance(host, CheckedHost) and host.stopped is None:
                host.check(host.axis_ns(simulation.now_ns))
        assert not self.open_requests.open, f"without a response: {sorted(self.open_requests.open)}"
        total = simulation.tally.total()
        assert total.offered == total.ended or simulation.tally.warmup_ns

    def check_quiet(self) -> None:
        """Check, seconds after all requests and faults, that nothing is in flight and all records agree."""
        simulation = self._simulation
        self.check_end()
        assert not self._out and not self._reading and not self._held, "something is still in flight"
        assert not simulation.controller._belief.waiters  # noqa: SLF001 - a book to be checked
        for name, device in simulation.controller._belief.devices.items():  # noqa: SLF001
            host = simulation.by_device[name]
            assert isinstance(host, CheckedHost) and not is_cut(host) and host.stopped is None, host.name
            if host.stuck:
                continue  # its link was cut since: nothing was sent to that lane that could show the hang
            truth, holders = host.truth[name], device.pages.holders()
            assert not truth.running, f"{name}: {truth.running} runs still"
            assert truth.versions() == {one.version for one in holders}, (
                f"{name}: other weights than believed"
            )
            assert {one.model.model.key for one in holders} <= self.open_requests.served.keys(), (
                f"{name}: weights not served"
            )
            assert not device.pending_codes, f"{name}: {device.pending_codes} are not prepared"
            prepared = device.codes.keys() | device.failed_codes.keys()
            assert prepared == {code.code.code_id for code in simulation.codes}, f"{name}: {prepared}"
            assert not device.failed_codes or self.open_requests.quarantined, f"{name}: {device.failed_codes}"


def _span(quantiles_us: tuple[tuple[float, float], ...]) -> tuple[int, int]:
    """The smallest and largest value of noise, in ns."""
    values = [value for _, value in quantiles_us]
    return round(min(values) * NS_PER_US), round(max(values) * NS_PER_US)
