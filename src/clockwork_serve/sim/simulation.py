"""Drives the controller and its workers on virtual time. It decides nothing; a seed gives one run.

    simulation = Simulation(
        workload=build(scenario, seed=1), zoo=Zoo.read("v100"), cluster=Cluster(devices=6),
        config=ControllerConfig(), seed=1,
    )
    tally = simulation.run()

All that happens at one instant is observed before anybody decides, as in the real driver. A request's life:
sent by its client, heard by the controller one gateway hop later, answered, heard by the client one hop
later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop
from typing import Protocol

from msgspec import Struct

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Answer,
    CodeAdded,
    CodeReady,
    ControllerEffect,
    ControllerEvent,
    DeviceSpec,
    Infer,
    Load,
    Model,
    ModelAdded,
    Outcome,
    Profile,
    Request,
    Unload,
    WorkerJoined,
)
from clockwork_serve.sim.constants import Constants, read_constants
from clockwork_serve.sim.dice import Draws, uniform_us
from clockwork_serve.sim.host import CALL, CLIENT, FAR_NS, LANE_DONE, TO_CONTROLLER, TO_WORKER, Host, World
from clockwork_serve.sim.tally import Tally
from clockwork_serve.units import GIB, MIB
from clockwork_serve.worker.events import Prepare, Prepared
from clockwork_serve.workload.stream import Arrivals, ClosedLoad, Workload
from clockwork_serve.workload.zoo import Zoo

JITTER, INFER_NOISE, LOAD_NOISE, START_JITTER = range(4)
"""Streams of chance."""

GATEWAY = "g0"


class Cluster(Struct, frozen=True, kw_only=True):
    """Devices to simulate, all alike: those of the paper, with 1376 pages of 16 MiB for weights."""

    devices: int = 1
    devices_per_worker: int = 1
    pages: int = 1376
    page_bytes: int = 16 * MIB

    def specs(self, kind: str) -> list[tuple[DeviceSpec, ...]]:
        """The devices of each worker."""
        specs = [
            DeviceSpec(
                device=f"gpu{at}", kind=kind, pages=self.pages, page_bytes=self.page_bytes,
                workspace_bytes=GIB, io_bytes=GIB,
            )
            for at in range(self.devices)
        ]  # fmt: skip
        step = self.devices_per_worker
        return [tuple(specs[at : at + step]) for at in range(0, len(specs), step)]


class Watcher(Protocol):
    """Whoever wants to see each step of the controller."""

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """All that was observed at ``now_ns``, and all that was decided then."""


class Client:
    """One closed-loop client: it has one request out, or waits to send the next."""

    __slots__ = ("load", "model")

    def __init__(self, load: ClosedLoad, model: int) -> None:
        self.load = load
        self.model = model


class Sent:
    """A request without an answer."""

    __slots__ = ("client", "deadline_ns", "load", "sent_ns")

    def __init__(self, load: int, sent_ns: int, deadline_ns: int, client: Client | None) -> None:
        self.load = load
        self.sent_ns = sent_ns
        self.deadline_ns = deadline_ns
        self.client = client


class Simulation:
    """See the module.

    ``truth`` is how long things really take where that is not what the zoo says, by code. ``noise`` switches
    the noise of durations (not of the network). ``bucket_ns`` asks the tally for a time series.
    """

    def __init__(  # noqa: PLR0913 - a simulation is made of many independent things
        self,
        *,
        workload: Workload,
        zoo: Zoo,
        cluster: Cluster,
        config: ControllerConfig,
        seed: int,
        constants: Constants | None = None,
        truth: dict[str, Profile] | None = None,
        watchers: Sequence[Watcher] = (),
        noise: bool = True,
        bucket_ns: int = 0,
    ) -> None:
        self.workload = workload
        self.constants = constants or read_constants()
        self.tally = Tally(workload.loads, workload.warmup_ns, bucket_ns)
        self.now_ns = 0
        self.controller = Controller(config)
        self.watchers = list(watchers)
        self.open: dict[str, Sent] = {}
        """All and only requests without an answer."""
        kind = f"emulated:{zoo.name}"
        kinds = dict.fromkeys(kind for _, kind in workload.models)
        self.codes = [
            CodeAdded(code=zoo.code(one, config.max_batch), profiles=(zoo.profile(one, kind),))
            for one in kinds
        ]
        self.models: list[Model] = [zoo.model(name, one) for name, one in workload.models]
        self.world = self._world(
            truth or {one.code.code_id: one.profiles[0] for one in self.codes}, seed, noise
        )
        self.hosts: dict[str, Host] = {}
        self.by_device: dict[str, Host] = {}
        self._hop_ns = self.constants.network.gateway_ns
        self._keys = [model.key for model in self.models]
        self._seed = seed
        self._sent = 0
        self._wake_ns = FAR_NS
        self._stream = workload.open()
        self._arrivals: Arrivals | None = None
        self._at = 0
        self._next_ns = FAR_NS
        self._dirty: dict[Host, None] = {}
        self._start([Host(f"w{at}", specs, self.world) for at, specs in enumerate(cluster.specs(kind))])
        self._refill()

    def _world(self, truth: dict[str, Profile], seed: int, noise: bool) -> World:  # noqa: FBT001
        constants = self.constants
        network = constants.network
        world = World(truth, self.tally, network.worker_ns, constants.worker.prepare_ns)
        if network.jitter_ns:
            world.jitter = Draws(seed, JITTER, uniform_us(0, network.jitter_ns))
        if noise:
            world.infer_noise = Draws(seed, INFER_NOISE, constants.noise.infer_us)
            world.load_noise = Draws(seed, LOAD_NOISE, constants.noise.load_us)
        return world

    def _start(self, hosts: list[Host]) -> None:
        """All workers are up and have prepared all codes when time begins."""
        events: list[ControllerEvent] = [*self.codes, *[ModelAdded(model=model) for model in self.models]]
        for host in hosts:
            self.hosts[host.name] = host
            self.by_device.update((spec.device, host) for spec in host.specs)
            events.append(WorkerJoined(worker=host.name, devices=host.specs))
            for code in self.codes:
                host.machine.observe(code, 0)
            while effects := host.machine.decide(0):
                for effect in effects:
                    if isinstance(effect, Prepare):
                        host.machine.observe(Prepared(device=effect.device, code_id=effect.code.code_id), 0)
                    else:
                        assert isinstance(effect, CodeReady) and effect.ok, f"{effect} at the start"
                        events.append(effect)
        self._step_controller(events)
        self._start_clients()

    def _start_clients(self) -> None:
        for load in self.workload.closed:
            late = Draws(self._seed, START_JITTER + load.load, uniform_us(0, load.start_jitter_ns))
            for model in load.models:
                for _ in range(load.concurrency):
                    self.world.at(load.start_ns + late.next(), CLIENT, Client(load, model), None)

    # Time passes

    def run(self, until_ns: int | None = None, pulse: Callable[[int], None] | None = None) -> Tally:
        """Let time pass until ``until_ns``; by default, until the workload and all its requests end.

        ``pulse`` is called now and then with the time reached. Raises AssertionError when a machine
        contradicts itself.
        """
        heap, end_ns = self.world.heap, until_ns
        beats = 0
        while True:
            now_ns = min(self._next_ns, self._wake_ns, heap[0][0] if heap else FAR_NS)
            if end_ns is None:
                if now_ns == FAR_NS or (now_ns >= self.workload.duration_ns and not self.open):
                    return self.tally
            elif now_ns > end_ns:
                self.now_ns = end_ns
                return self.tally
            self.now_ns = now_ns
            self.step(now_ns)
            beats += 1
            if pulse is not None and not beats & 0x3FFF:
                pulse(now_ns)

    def step(self, now_ns: int) -> None:
        """Do all that happens at one instant."""
        heap = self.world.heap
        events: list[ControllerEvent] = []
        while heap and heap[0][0] == now_ns:
            _, _, kind, whom, what = heappop(heap)
            if kind == TO_CONTROLLER:
                if not whom.gone:
                    events.append(what)
            elif kind in (TO_WORKER, LANE_DONE):
                self._at_host(whom, kind, what, now_ns)
            elif kind == CLIENT:
                self._send_again(whom, now_ns)
            elif kind == CALL:
                events.extend(what())
            elif not whom.gone and what == whom.wake_ns:
                self._dirty[whom] = None
        while self._next_ns == now_ns:
            events.append(self._arrive())
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            for host in dirty:
                host.decide(now_ns)
        if events or self._wake_ns <= now_ns:
            self._step_controller(events)

    def _at_host(self, host: Host, kind: int, what: object, now_ns: int) -> None:
        if host.gone:
            return
        if host.hung_until_ns > now_ns:
            self.world.at(host.hung_until_ns, kind, host, what)
            return
        host.observe(what, now_ns)  # type: ignore[arg-type]
        self._dirty[host] = None

    def _step_controller(self, events: list[ControllerEvent]) -> None:
        now_ns, controller = self.now_ns, self.controller
        for event in events:
            controller.observe(event, now_ns)
        effects = controller.decide(now_ns)
        wake_ns = controller.next_wakeup_ns()
        self._wake_ns = FAR_NS if wake_ns is None else wake_ns
        for effect in effects:
            kind = type(effect)
            if kind is Answer:
                self._hear(effect, now_ns)  # type: ignore[arg-type]
            elif kind is Infer or kind is Load or kind is Unload:
                self.by_device[effect.device].send(effect, now_ns)  # type: ignore[union-attr,arg-type]
        for watcher in self.watchers:
            watcher.on_step(now_ns, events, effects)

    # Clients

    def _refill(self) -> None:
        """The next stretch of the open loads' arrivals."""
        self._at = 0
        for arrivals in self._stream:
            if arrivals.times_ns:
                self._arrivals = arrivals
                self._next_ns = arrivals.times_ns[0] + self._hop_ns
                return
        self._arrivals, self._next_ns = None, FAR_NS

    def _arrive(self) -> Request:
        """The request of an open load that reaches the controller now."""
        arrivals, at = self._arrivals, self._at
        assert arrivals is not None
        request = self._request(
            arrivals.models[at], arrivals.loads[at], arrivals.times_ns[at], arrivals.slos_ns[at], None
        )
        at += 1
        if at < len(arrivals.times_ns):
            self._at = at
            self._next_ns = arrivals.times_ns[at] + self._hop_ns
        else:
            self._refill()
        return request

    def _request(self, model: int, load: int, sent_ns: int, slo_ns: int, client: Client | None) -> Request:
        self._sent += 1
        request_id = f"r{self._sent}"
        deadline_ns = sent_ns + slo_ns
        self.open[request_id] = Sent(load, sent_ns, deadline_ns, client)
        self.tally.offered(load, sent_ns)
        return Request(
            request_id=request_id, gateway=GATEWAY, model=self._keys[model], arrival_ns=sent_ns,
            deadline_ns=deadline_ns,
        )  # fmt: skip

    def _send_again(self, client: Client, now_ns: int) -> None:
        load = client.load
        if now_ns < load.stop_ns:
            request = self._request(client.model, load.load, now_ns, load.slo_at(now_ns), client)
            self.world.at(now_ns + self._hop_ns, CALL, None, lambda: (request,))

    def _hear(self, answer: Answer, now_ns: int) -> None:
        """The client hears an answer, one hop from now."""
        sent = self.open.pop(answer.request_id, None)
        assert sent is not None, f"{answer.request_id} was answered twice"
        heard_ns = now_ns + self._hop_ns
        good = answer.outcome is Outcome.OK
        self.tally.ended(
            sent.load, sent.sent_ns, heard_ns, answer, in_time=good and heard_ns <= sent.deadline_ns
        )
        client = sent.client
        if client is not None:
            again_ns = heard_ns
            if not good:
                again_ns += self._retry_ns(client.load, answer)
            self.world.at(again_ns, CLIENT, client, None)

    def _retry_ns(self, load: ClosedLoad, answer: Answer) -> int:
        least_ns = self.constants.clients.retry_ns if load.retry_ns is None else load.retry_ns
        return max(least_ns, answer.retry_after_ns) if load.retry == "retry_after" else least_ns
