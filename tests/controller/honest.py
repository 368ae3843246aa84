"""An honest worker and its clock, for tests of the controller: it does what it is told, when it may."""

from __future__ import annotations

from collections import deque
from typing import Any

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Answer,
    Code,
    CodeAdded,
    CodeReady,
    ControllerEffect,
    ControllerEvent,
    DeviceSpec,
    Held,
    Infer,
    Load,
    Model,
    ModelAdded,
    Profile,
    Quarantined,
    Release,
    Request,
    Result,
    Status,
    Unload,
    Unservable,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.units import MIB, ms
from harness import records

CODE = records.code()


def profile(code_id: str = "c", b1_ms: float = 10, step_ms: float = 4, load_ms: float = 8) -> Profile:
    """INFER takes ``b1_ms + step_ms * (batch - 1)``; LOAD takes ``load_ms`` whatever the size."""
    infer_ns = {batch: ms(b1_ms + step_ms * (batch - 1)) for batch in records.SIZES}
    return records.profile(code_id, infer_ns, load_ns=ms(load_ms))


def model(name: str, code_id: str = "c", mib: int = 4, **settings: object) -> Model:
    """A model of ``mib`` MiB of weights."""
    return records.model(name, code_id, size=mib * MIB, **settings)


def device(name: str = "d0", pages: int = 16) -> DeviceSpec:
    """A device of ``pages`` pages of 1 MiB."""
    return records.device(name, pages)


class Lane:
    """Executes actions one after another, each exactly as long as told."""

    def __init__(self) -> None:
        self.queue: deque[Load | Unload | Infer] = deque()
        self.free_ns = 0
        self.running: tuple[int, int, Load | Unload | Infer] | None = None


class World:
    """A controller with honest workers, on a virtual clock; checks every invariant after each step."""

    def __init__(self, config: ControllerConfig | None = None, network_ns: int = ms(0.1)) -> None:
        self.controller = Controller(config or ControllerConfig(policy="paper"))
        self.now_ns = ms(1000)
        self.network_ns = network_ns
        self.lanes: dict[tuple[str, str], Lane] = {}
        self.durations: dict[str, Profile] = {}
        self.slower = 1.0
        self.slow: dict[str, float] = {}
        """How many times longer everything takes on a device."""
        self.sizes: dict[str, int] = {}
        self.answers: dict[str, Answer] = {}
        self.answered_ns: dict[str, int] = {}
        self.releases: list[str] = []
        self.quarantined: list[Quarantined] = []
        self.unservable: list[Unservable] = []
        self.actions: list[Load | Unload | Infer] = []
        self.started: list[tuple[int, int, Load | Unload | Infer]] = []
        self._inbox: list[tuple[int, int, ControllerEvent]] = []
        self._count = 0

    def serve(self, *models: Model, code: Code = CODE, times: Profile | None = None) -> None:
        """Add a code and models of it."""
        times = times or profile(code.code_id)
        self.durations[code.code_id] = times
        self.tell(CodeAdded(code=code, profiles=(times,)))
        for one in models:
            self.tell(ModelAdded(model=one))

    def join(self, *devices: DeviceSpec, worker: str = "w0") -> None:
        """A worker joins and prepares all codes."""
        events: list[ControllerEvent] = [WorkerJoined(worker=worker, devices=devices)]
        for spec in devices:
            self.lanes[spec.device, "exec"] = Lane()
            self.lanes[spec.device, "load"] = Lane()
            events += [CodeReady(device=spec.device, code_id=code_id) for code_id in self.durations]
        self.tell(*events)

    def kill(self, worker: str, *devices: str, known: bool = False, preparing: tuple[str, ...] = ()) -> None:
        """A worker dies with all it was doing; what its lanes were at may be ``known``."""
        running = tuple([
            action.action_id for start_ns, end_ns, action in self.started
            if action.device in devices and start_ns <= self.now_ns < end_ns
        ])  # fmt: skip
        self.started = [
            one for one in self.started if one[2].device not in devices or one[1] <= self.now_ns
        ]  # fmt: skip
        for name in devices:
            del self.lanes[name, "exec"], self.lanes[name, "load"]
        gone = [one for one in self._inbox if isinstance(one[2], Result) and one[2].device in devices]
        self._inbox = [one for one in self._inbox if one not in gone]
        self.tell(WorkerLost(worker=worker, running=running if known else None, preparing=preparing))

    def request(self, model_name: str, slo_ms: float, **fields: object) -> str:
        """A request arrives now; returns its id."""
        self._count += 1
        request_id = f"r{self._count}"
        self.tell(
            Request(
                request_id=request_id, gateway="g0", model=f"{model_name}/1", arrival_ns=self.now_ns,
                deadline_ns=self.now_ns + ms(slo_ms), **fields,
            )  # type: ignore[arg-type]
        )  # fmt: skip
        return request_id

    def ask(self, model_name: str, slo_ms: float, until_ms: float = 10_000, **fields: object) -> str:
        """A request arrives, and time passes as in :meth:`run`; returns its id."""
        request_id = self.request(model_name, slo_ms, **fields)
        self.run(until_ms)
        return request_id

    def tell(self, *events: ControllerEvent) -> None:
        """The controller observes events at one instant and decides."""
        for event in events:
            self.controller.observe(event, self.now_ns)
        self._perform(self.controller.decide(self.now_ns))
        assert self.controller.decide(self.now_ns) == [], "a second decide at once must return nothing"
        self.controller.check()

    def run(self, until_ms: float = 10_000) -> None:
        """Let virtual time pass for ``until_ms`` or until nothing is left to happen."""
        end_ns = self.now_ns + ms(until_ms)
        while True:
            instants = [at for at, _, _ in self._inbox]
            wakeup_ns = self.controller.next_wakeup_ns()
            if wakeup_ns is not None:
                assert wakeup_ns > self.now_ns, "a wake-up must be later than the last decide"
                instants.append(wakeup_ns)
            if not instants or min(instants) > end_ns:
                self.now_ns = end_ns
                return
            self.now_ns = min(instants)
            due = sorted(one for one in self._inbox if one[0] <= self.now_ns)
            self._inbox = [one for one in self._inbox if one[0] > self.now_ns]
            self.tell(*[event for _, _, event in due])

    def _perform(self, effects: list[ControllerEffect]) -> None:
        for effect in effects:
            match effect:
                case Answer():
                    assert effect.request_id not in self.answers, f"{effect.request_id} was answered twice"
                    assert (effect.gateway, type(effect.cold), type(effect.message)) == ("g0", bool, str)
                    self.answers[effect.request_id] = effect
                    self.answered_ns[effect.request_id] = self.now_ns
                case Release():
                    assert effect.gateway == "g0"
                    assert not self.answers[effect.request_id].release
                    self.releases.append(effect.request_id)
                case Quarantined():
                    self.quarantined.append(effect)
                case Unservable():
                    self.unservable.append(effect)
                case Load() | Unload() | Infer():
                    self.actions.append(effect)
                    self._execute(effect)
                case _:
                    pass

    def _execute(self, action: Load | Unload | Infer) -> None:
        lane = self.lanes[action.device, "exec" if isinstance(action, Infer) else "load"]
        start_ns = max(self.now_ns + self.network_ns, lane.free_ns, action.window.earliest_ns)
        status, lasts_ns = Status.OK, 0
        if start_ns > action.window.latest_ns:
            status, start_ns = Status.TOO_LATE, action.window.latest_ns
        elif isinstance(action, Infer):
            lasts_ns = int(self.durations[action.code_id].infer_ns[action.batch] * self.slower)
        elif isinstance(action, Load):
            lasts_ns = self.durations[action.code_id].load_ns(action.weights.size)
        lasts_ns = int(lasts_ns * self.slow.get(action.device, 1.0))
        if status is Status.OK:
            lane.free_ns = start_ns + lasts_ns
            self.started.append((start_ns, start_ns + lasts_ns, action))
        self.reply(action, status, start_ns, start_ns + lasts_ns)

    def reply(
        self, action: Load | Unload | Infer, status: Status, start_ns: int, end_ns: int,
        held: Held | None = None,
    ) -> None:  # fmt: skip
        """Send a result; it arrives one network delay after ``end_ns``."""
        outputs = (
            tuple(b"" for _ in action.calls) if isinstance(action, Infer) and status is Status.OK else ()
        )
        result = Result(
            action_id=action.action_id, device=action.device, status=status, started_ns=start_ns,
            ended_ns=end_ns, outputs=outputs, held=held,
        )  # fmt: skip
        self._inbox.append((max(end_ns, self.now_ns) + self.network_ns, action.action_id, result))


def serving(
    *models: str | Model, mib: int = 4, pages: int = 16, times: Profile | None = None, **config: Any
) -> World:
    """A world with one device that serves models of one code, of ``mib`` MiB where only a name is given."""
    made = World(ControllerConfig(**config) if config else None)
    made.serve(*[model(one, mib=mib) if isinstance(one, str) else one for one in models], times=times)
    made.join(device(pages=pages))
    return made
