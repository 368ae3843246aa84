"""What would have happened, had one thing been different: a stretch of a journal, played on with a change.

    scene = Scene(controller, steps)        a controller as it was, and the recorded steps from there on
    played = play(scene, Change(devices=1), until=request_id)

The controller is driven as drivers do. What came from outside comes as recorded: requests, cancels, workers
that join and are lost, models. Results come as recorded as long as the same actions are sent; where they are
not, the workers' brains run them for as long as the recording tells (``recording``). With nothing changed all
is as recorded, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from msgspec import Struct, msgpack
from msgspec.structs import replace

from clockwork_serve.controller import Controller
from clockwork_serve.messages import (
    Answer,
    Cancel,
    CodeAdded,
    CodeReady,
    ControllerEffect,
    ControllerEvent,
    Infer,
    Load,
    ModelRemoved,
    Outcome,
    Request,
    Result,
    RetainWeights,
    Unload,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim.host import CALL, FAR_NS, LANE_DONE, TO_CONTROLLER, TO_WORKER, WAKE, World
from clockwork_serve.sim.recording import ActionPlan, Luck, RecordedWorker, Recording
from clockwork_serve.sim.tally import Tally
from clockwork_serve.telemetry import Step
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.worker import Worker
from clockwork_serve.workload.processes import share_of

ADDED: Final = "added"
"""What devices and workers are called that a change adds, before their number."""

FOLLOWS_NS: Final = 100 * NS_PER_MS
"""A request that is there once more comes so much later at most."""
LATE_MAX_NS: Final = 2 * NS_PER_MS
"""A driver that is later than this was held up by something else."""


class Traffic(Struct, frozen=True, kw_only=True):
    """So many ``times`` the requests of a ``tenant`` and of a ``model``, by key; None: of every one."""

    times: float
    tenant: str | None = None
    model: str | None = None


class Change(Struct, frozen=True, kw_only=True):
    """What is different from the beginning of a scene on; without any field, nothing.

    ``edits``: fields of requests that are to come, by id. ``devices``: so many more, each like the first one,
    empty, and with all codes prepared. ``pages``: so many more pages for weights on every device that is
    there; ``pages_on``: on some, by name. ``without``: keys of models that are not there. ``policy``: the
    controller goes on with that one. ``traffic``: of each request that is to come, as many as all of these
    say that fit it, multiplied: by its id alone it is left out, or others like it follow.
    """

    edits: dict[str, dict[str, int]] = {}
    devices: int = 0
    pages: int = 0
    pages_on: dict[str, int] = {}
    without: tuple[str, ...] = ()
    policy: str = ""
    traffic: tuple[Traffic, ...] = ()

    def begin(self, controller: Controller) -> list[ControllerEvent]:
        """Change a controller's memory and policy, and return the events that tell it of everything else.

        Raises :class:`ConfigError` where another policy cannot go on.
        """
        self.add_pages(controller)
        if self.policy:
            controller.use_policy(self.policy)
        events: list[ControllerEvent] = [ModelRemoved(model=key) for key in self.without]
        specs = [spec for one in controller.workers() for spec in one.devices]
        for at in range(self.devices if specs else 0):
            name = f"{ADDED}{at}"
            events.append(WorkerJoined(worker=name, devices=(replace(specs[0], device=name),)))
            events += [CodeReady(device=name, code_id=code_id) for code_id in controller.codes]
        return events

    def add_pages(self, brain: Controller | Worker) -> None:
        """Change the memory of a controller's or a worker's devices."""
        for device, pages in {"": self.pages, **self.pages_on}.items():
            if pages:
                brain.add_pages(pages, device)

    def copies(self, request: Request) -> list[Request]:
        """What comes instead of a request: none, itself, or itself and others of ids of their own, later."""
        times = 1.0
        for one in self.traffic:
            if one.tenant in {None, request.tenant} and one.model in {None, request.model}:
                times *= one.times
        count = int(times)
        count += share_of(request.request_id) < times - count
        found = [request] if count else []
        for number in range(1, count):
            request_id = f"{request.request_id}+{number}"
            delay_ns = 1 + int(share_of(request_id) * FOLLOWS_NS)
            arrival_ns, deadline_ns = request.arrival_ns + delay_ns, request.deadline_ns + delay_ns
            found.append(
                replace(request, request_id=request_id, arrival_ns=arrival_ns, deadline_ns=deadline_ns)
            )
        return found


class Scene:
    """A stretch of a run: the controller just before it, and its recorded steps.

    ``late_ns``: how much later than its wake-ups the driver called the controller. The controller is not
    changed, and steps may be added at the end.
    """

    def __init__(
        self, controller: Controller, steps: Sequence[Step], *, late_ns: int = 0,
        recording: Recording | None = None,
    ) -> None:  # fmt: skip
        assert steps, "a scene has a step"
        self.controller = controller
        self.steps = steps
        self.late_ns = min(late_ns, LATE_MAX_NS)
        self.began_ns = steps[0].now_ns
        self.recording = recording if recording is not None else _recording(controller, steps)

    def later(self, index: int) -> Scene:
        """The scene that begins with a later step."""
        controller = self.controller.fork()
        for step in self.steps[:index]:
            for event in step.events:
                controller.observe(event, step.now_ns)
            controller.decide(step.now_ns)
            controller.next_wakeup_ns()
        return Scene(controller, self.steps[index:], late_ns=self.late_ns, recording=self.recording)


def _recording(controller: Controller, steps: Sequence[Step]) -> Recording:
    devices = {one.worker: one.devices for one in controller.workers()}
    kinds = {spec.device: spec.kind for each in devices.values() for spec in each}

    def seed_ns(action: Infer) -> int:
        return controller.seed_ns(action.code_id, kinds.get(action.device, ""), action.batch)

    recording = Recording(controller.in_flight(), steps[0].now_ns, seed_ns)
    for step in steps:
        for event in step.events:
            if isinstance(event, Result):
                recording.ended(event, step.now_ns)
            elif isinstance(event, WorkerLost | WorkerJoined):
                for spec in devices.get(event.worker, ()):
                    recording.device_lost(spec.device)
                if isinstance(event, WorkerJoined):
                    devices[event.worker] = event.devices
        for effect in step.effects:
            if isinstance(effect, Infer | Load | Unload):
                recording.sent(effect, step.now_ns)
    return recording


class PlayedScene(Struct, kw_only=True):
    """How a scene went with a change.

    ``answers`` are by request, with when they were decided. ``from_ns``: the first instant at which
    anything was not as recorded; None: nothing was. ``ran``: by request, how its last INFER went.
    ``steps``: all of them, if they were asked for.
    """

    answers: dict[str, tuple[int, Answer]] = {}
    from_ns: int | None = None
    ran: dict[str, ActionPlan] = {}
    steps: list[Step] = []

    def rests_on(self, request_id: str) -> str:
        """What the duration of a request's INFER rests on; empty: it was in none."""
        plan = self.ran.get(request_id)
        return "" if plan is None else plan.rests_on

    def good(self, request_id: str) -> bool:
        """Whether a request got a good answer in time."""
        found = self.answers.get(request_id)
        return found is not None and found[1].outcome is Outcome.OK


def play(
    scene: Scene, change: Change | None = None, *, until: str = "", keep_steps: bool = False, seed: int = 0
) -> PlayedScene:
    """Play a scene with a change, until a request is answered, or to its end.

    With a ``seed``, what was measured nearby counts by luck, and not by its median: to see whether a result
    depends on that.
    """
    luck = Luck(seed) if seed else None
    return _Player(scene, change or Change(), until, keep_steps=keep_steps, luck=luck).run()


class _Player:
    """One playing of a scene."""

    def __init__(
        self, scene: Scene, change: Change, until: str, *, keep_steps: bool, luck: Luck | None
    ) -> None:
        self.controller = scene.controller.fork()
        self._scene, self._change, self._until = scene, change, until
        self._recording = scene.recording
        self.played = PlayedScene(answers={}, ran={}, steps=[])
        self._keep_steps = keep_steps
        self._world = World({}, Tally(()), 0, 0)
        self._luck = luck
        self._now_ns = scene.began_ns
        self._hosts: dict[str, RecordedWorker] = {}
        self._by_device: dict[str, RecordedWorker] = {}
        in_flight = self.controller.in_flight()
        self._followers: dict[str, list[tuple[int, str]]] = {}
        """By request: how much later which copies of it come."""
        self._passing = {action.action_id: action.action_id for action in in_flight}
        for joined in self.controller.workers():
            self._join(joined)
        for action in in_flight:
            recorded, host = self._recording.actions.get(action.action_id), self._by_device.get(action.device)
            if recorded is not None and host is not None:
                host.run_as(recorded, action, scene.began_ns)
        for device, from_ns, until_ns in self._recording.silences:
            if until_ns > scene.began_ns:
                silent = partial(self._silent, device, until_ns)
                self._world.at(max(from_ns, scene.began_ns), CALL, None, silent)
        wake_ns = self.controller.next_wakeup_ns()
        self._wake_ns = FAR_NS if wake_ns is None else wake_ns

    def _silent(self, device: str, until_ns: int) -> tuple[ControllerEvent, ...]:
        """The worker of a device is stopped, and goes on at that instant."""
        host = self._by_device.get(device)
        if host is not None and host.stopped is None:
            host.stop(self._now_ns)
            self._world.at(until_ns, CALL, None, partial(self._goes_on, host))
        return ()

    def _goes_on(self, host: RecordedWorker) -> tuple[ControllerEvent, ...]:
        if host.stopped is not None and not host.gone:
            host.resume(self._now_ns)
        return ()

    def _join(self, joined: WorkerJoined) -> None:
        """A worker with the weights and codes that it has; what it runs is told otherwise."""
        host = RecordedWorker(
            joined.worker, joined.devices, self._world, self._recording, self._passing, self._luck
        )  # fmt: skip

        codes = self.controller.codes
        for state in joined.states:
            found = [codes[code_id] for code_id in state.codes if code_id in codes]
            host.hold(state.device, found, [one for one in state.weights if one.ready])
        self._hosts[joined.worker] = host
        self._by_device.update((spec.device, host) for spec in joined.devices)

    def _running(self, worker: str) -> tuple[int, ...]:
        """Ids of what a worker executes."""
        host = self._hosts.get(worker)
        found = [] if host is None else host.machine.executing()
        return tuple([one.action_id for one in found if isinstance(one, Infer | Load | Unload)])

    def _lose(self, worker: str) -> None:
        host = self._hosts.pop(worker, None)
        if host is not None:
            host.gone = True
            self._world.forget(host, (TO_WORKER, LANE_DONE, WAKE, TO_CONTROLLER))
            for spec in host.specs:
                self._by_device.pop(spec.device, None)

    def run(self) -> PlayedScene:
        """Play on until the request that is waited for is answered, or nothing is left to come."""
        scene, until = self._scene, self._until
        heap, steps, at = self._world.heap, scene.steps, 0
        self._begin(scene.began_ns)
        answers = self.played.answers
        while not until or until not in answers:
            step = steps[at] if at < len(steps) else None
            now_ns = next_ns = FAR_NS if step is None else step.now_ns
            if heap and heap[0][0] < now_ns:
                now_ns = heap[0][0]
            if self._wake_ns < now_ns and next_ns - self._wake_ns > scene.late_ns:
                now_ns = self._wake_ns
            if now_ns == FAR_NS or (step is None and (not until or now_ns > steps[-1].now_ns + NS_PER_S)):
                break
            if next_ns == now_ns:
                at += 1
            else:
                step = None
            events: list[ControllerEvent] = []
            for event in step.events if step is not None else ():
                self._pass_on(event, events, now_ns)
            self._now_ns = now_ns
            if heap and heap[0][0] == now_ns:
                self._world.happen(now_ns, events)
            if events or self._wake_ns <= now_ns or (step is not None and self.played.from_ns is None):
                self._step(events, now_ns, step)
        return self.played

    def _begin(self, now_ns: int) -> None:
        """The change, at the instant before the first step."""
        change = self._change
        events = change.begin(self.controller)
        for event in events:
            if isinstance(event, WorkerJoined):
                self._join(event)
        for host in self._hosts.values():
            if host.name.startswith(ADDED):
                host.hold(host.name, self.controller.codes.values(), ())
            else:
                change.add_pages(host.machine)
        if events or self.controller.config != self._scene.controller.config:
            self._step(events, now_ns - 1, None)

    def _arrive(self, request: Request, events: list[ControllerEvent], now_ns: int) -> None:
        """A recorded request, as the change has it: edited, left out, or with others that follow it."""
        change, request_id = self._change, request.request_id
        come = change.copies(request) if change.traffic else [request]
        if come or request_id == self._until:  # the one that is asked about comes in any case
            edits = change.edits.get(request_id)
            events.append(replace(request, **edits) if edits else request)
        for other in come[1:]:
            delay_ns = other.arrival_ns - request.arrival_ns
            self._comes(other, now_ns + delay_ns)
            self._followers.setdefault(request_id, []).append((delay_ns, other.request_id))

    def _comes(self, event: Request | Cancel, at_ns: int) -> None:
        self._world.at(at_ns, CALL, None, lambda: (event,))

    def _pass_on(self, event: ControllerEvent, events: list[ControllerEvent], now_ns: int) -> None:
        """Have the controller observe a recorded event, if it comes in this course of events, too."""
        if isinstance(event, Request):
            self._arrive(event, events, now_ns)
            return
        if isinstance(event, Cancel):
            for delay_ns, request_id in self._followers.get(event.request_id, ()):
                self._comes(Cancel(request_id=request_id), now_ns + delay_ns)
        elif isinstance(event, Result):
            action_id = self._passing.pop(event.action_id, None)
            if action_id is None:
                known = self._recording.actions.get(event.action_id)
                if known is not None and known.sent_ns >= self._scene.began_ns:
                    return
            elif action_id != event.action_id:
                event = replace(event, action_id=action_id)
        elif isinstance(event, WorkerLost | WorkerJoined):
            if (
                isinstance(event, WorkerLost)
                and event.running is not None
                and self.played.from_ns is not None
            ):
                event = replace(event, running=self._running(event.worker))
            self._lose(event.worker)
            if isinstance(event, WorkerJoined):
                self._join(event)
        elif isinstance(event, CodeReady):
            host, code = self._by_device.get(event.device), self.controller.codes.get(event.code_id)
            if event.ok and host is not None and code is not None:
                host.hold(event.device, (code,), ())
        events.append(event)
        if isinstance(event, CodeAdded):
            for name, host in self._hosts.items():
                if name.startswith(ADDED):
                    host.hold(name, (event.code,), ())
                    events.append(CodeReady(device=name, code_id=event.code.code_id))

    def _step(self, events: list[ControllerEvent], now_ns: int, step: Step | None) -> None:
        controller, played = self.controller, self.played
        for event in events:
            controller.observe(event, now_ns)
        effects = controller.decide(now_ns)
        wake_ns = controller.next_wakeup_ns()
        self._wake_ns = FAR_NS if wake_ns is None else wake_ns
        if played.from_ns is None and not _same(step, events, effects):
            played.from_ns = now_ns
        if self._keep_steps:
            played.steps.append(Step(now_ns, tuple(events), tuple(effects)))
        for effect in effects:
            if isinstance(effect, Answer):
                played.answers.setdefault(effect.request_id, (now_ns, effect))
            elif isinstance(effect, Infer | Load | Unload | RetainWeights):
                host = self._by_device.get(effect.device)
                if host is not None:
                    host.send(effect, now_ns)
                    if isinstance(effect, Infer) and effect.action_id in host.plans:
                        for call in effect.calls:
                            played.ran[call.request_id] = host.plans[effect.action_id]


def _same(step: Step | None, events: list[ControllerEvent], effects: list[ControllerEffect]) -> bool:
    """Whether a step is as recorded; one that was not recorded is, if it changes nothing."""
    if step is None:
        return not events and not effects
    return _equal(step.events, events) and _equal(step.effects, effects)


def _equal(recorded: Sequence[object], found: Sequence[object]) -> bool:
    if len(recorded) != len(found):
        return False
    return all(
        one is other or one == other or msgpack.encode(one) == msgpack.encode(other)
        for one, other in zip(recorded, found, strict=True)
    )
