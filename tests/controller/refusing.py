"""A controller and real brains of workers on a virtual clock; anything may be refused for any reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush

from msgspec.structs import replace

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Action,
    Answer,
    Code,
    CodeAdded,
    ControllerEvent,
    Infer,
    Load,
    Model,
    ModelAdded,
    Profile,
    Request,
    Result,
    RetainWeights,
    Status,
    Unload,
)
from clockwork_serve.units import ms
from clockwork_serve.worker import (
    ControllerFound,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Start,
    Worker,
    WorkerEffect,
    WorkerEvent,
)
from tests.controller.honest import CODE, device, profile

NETWORK_NS = ms(0.1)
REASONS = tuple(status for status in Status if status is not Status.OK)


class Refusing:
    """One worker for each device. Actions are refused on arrival, or by the device, with a given chance."""

    def __init__(self, config: ControllerConfig, devices: int, pages: int, *models: Model) -> None:
        self.controller = Controller(config)
        self.now_ns = ms(1000)
        self.random = random.Random(0)
        self.on_arrival = self.on_device = 0.0
        self._once: tuple[type, Status] | None = None
        self.workers = {f"d{at}": Worker((device(f"d{at}", pages),)) for at in range(devices)}
        self.answers: dict[str, Answer] = {}
        self.blamed: set[str] = set()
        """Requests that were refused in an INFER, and models of which a LOAD was refused."""
        self.refusals = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self._tell(CodeAdded(code=CODE, profiles=(profile(),)), *[ModelAdded(model=one) for one in models])
        for name in self.workers:
            self._have(name, ControllerFound(worker=f"w-{name}"))
            self.add_code(CODE, name)
        self.run(100)

    def add_code(self, code: Code, name: str) -> None:
        """A worker prepares a code."""
        times: Profile = profile(code.code_id)
        self._have(name, CodeAdded(code=code, profiles=(times,)))

    def ask(self, model: str, slo_ms: float = 5000, **fields: object) -> str:
        """A request arrives now; returns its id."""
        self._count += 1
        request_id = f"r{self._count}"
        request = Request(
            request_id=request_id, gateway="g", model=f"{model}/1", arrival_ns=self.now_ns,
            deadline_ns=self.now_ns + ms(slo_ms),
        )  # fmt: skip
        self._tell(replace(request, **fields))
        return request_id

    def refuse_once(self, kind: type, status: Status) -> None:
        """The next action of a kind is refused on arrival."""
        self._once = kind, status

    def run(self, for_ms: float) -> None:
        """Let virtual time pass."""
        end_ns = self.now_ns + ms(for_ms)
        while True:
            wakes = [(self.controller.next_wakeup_ns(), self._tell)]
            wakes += [
                (worker.next_wakeup_ns(), lambda name=name: self._have(name))
                for name, worker in self.workers.items()
            ]
            due = [(at_ns, 0, what) for at_ns, what in wakes if at_ns is not None]
            at_ns, _, what = min(
                [*due, *self._heap[:1]], key=lambda one: one[0], default=(end_ns + 1, 0, None)
            )
            if at_ns > end_ns or what is None:
                self.now_ns = end_ns
                return
            self.now_ns = max(self.now_ns, at_ns)
            if self._heap and self._heap[0][2] is what:
                heappop(self._heap)
            what()

    def differences(self) -> list[str]:
        """Where belief and the workers do not agree: weights by version and pages, and codes."""
        found = []
        for name, worker in self.workers.items():
            believed = self.controller._belief.devices[name]
            mine = {(one.version, one.extent) for one in believed.pages.holders()}
            held = worker._devices[name]
            there = {(one.version, one.extent) for one in held.pages.all()}
            codes = {code_id for code_id, code in held.codes.items() if code.state == "ready"}
            if mine != there or believed.codes.keys() != codes:
                found.append(f"{name}: believed {mine} {set(believed.codes)}, there are {there} {codes}")
        return found

    def _later(self, after_ns: int, what: Callable[[], None]) -> None:
        self._count += 1
        heappush(self._heap, (self.now_ns + after_ns, self._count, what))

    def _tell(self, *events: ControllerEvent) -> None:
        for event in events:
            self.controller.observe(event, self.now_ns)
        for effect in self.controller.decide(self.now_ns):
            if isinstance(effect, Answer):
                self.answers[effect.request_id] = effect
            elif isinstance(effect, Load | Unload | Infer):
                self._later(NETWORK_NS, lambda action=effect: self._arrive(action))
            elif isinstance(effect, RetainWeights):
                self._later(NETWORK_NS, lambda keep=effect: self._have(keep.device, keep))
        self.controller.check()

    def _have(self, name: str, *events: WorkerEvent) -> None:
        worker = self.workers[name]
        for event in events:
            worker.observe(event, self.now_ns)
        effects = worker.decide(self.now_ns)
        worker.check()
        for effect in effects:
            self._perform(name, effect)

    def _perform(self, name: str, effect: WorkerEffect) -> None:
        if isinstance(effect, Start):
            lasts_ns = ms(0.05 if isinstance(effect.action, Unload) else 4)
            self._later(lasts_ns, lambda: self._have(name, self._end(effect.action, lasts_ns)))
        elif isinstance(effect, Prepare):
            done = Prepared(device=name, code_id=effect.code.code_id)
            self._later(ms(1), lambda: self._have(name, done))
        elif isinstance(effect, Retire):
            gone = Retired(device=name, code_id=effect.code_id)
            self._later(ms(1), lambda: self._have(name, gone))
        else:
            self._later(NETWORK_NS, lambda: self._tell(effect))

    def _arrive(self, action: Action) -> None:
        name = action.device
        once = self._once is not None and isinstance(action, self._once[0])
        if not once and self.random.random() >= self.on_arrival:
            self._have(name, action)
            return
        refused = self._refused(action, self.now_ns)
        if once and self._once is not None:
            refused, self._once = replace(refused, status=self._once[1]), None
        self._perform(name, replace(refused, held=self.workers[name].held(name)))

    def _end(self, action: Action, lasts_ns: int) -> Result:
        if self.random.random() < self.on_device:
            return self._refused(action, self.now_ns - lasts_ns)
        outputs = (b"",) * len(action.calls) if isinstance(action, Infer) else ()
        return Result(
            action_id=action.action_id, device=action.device, status=Status.OK,
            started_ns=self.now_ns - lasts_ns, ended_ns=self.now_ns, outputs=outputs,
        )  # fmt: skip

    def _refused(self, action: Action, started_ns: int) -> Result:
        self.refusals += 1
        if isinstance(action, Infer):
            self.blamed.update(call.request_id for call in action.calls)
        elif isinstance(action, Load):
            self.blamed.add(action.model)
        return Result(
            action_id=action.action_id, device=action.device, status=self.random.choice(REASONS),
            started_ns=started_ns, ended_ns=self.now_ns, message="refused by chance",
        )  # fmt: skip
