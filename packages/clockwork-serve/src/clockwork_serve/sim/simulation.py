"""Drives the controller and its workers in virtual time; reproducible by its seed.

    simulation = Simulation(
        workload=build(scenario, seed=1), zoo=Zoo.read("v100"), cluster=Cluster(devices=6),
        config=ControllerConfig(), seed=1,
    )
    tally = simulation.run()

All events of one instant are observed before any brain decides, as in the real driver. A request reaches the
controller one gateway hop after its client sent it, and its response reaches the client one hop after it is
decided.
"""

from __future__ import annotations

# ruff: noqa: PLR1730 - min() costs 100 ns more than a condition
import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from msgspec.structs import replace

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
    QuotasSet,
    Request,
    RetainWeights,
    Unload,
    WorkerHung,
)
from clockwork_serve.sim.checks import Checks
from clockwork_serve.sim.constants import (
    Cluster,
    Constants,
    Draws,
    KeyedDraws,
    read_constants,
    uniform_us,
)
from clockwork_serve.sim.faults import Faults
from clockwork_serve.sim.host import CALL, FAR_NS, SimulatedWorker, World
from clockwork_serve.sim.tally import Tally
from clockwork_serve.worker.events import Prepare, Prepared
from clockwork_serve.workload.stream import Arrivals, ClosedLoad, Workload
from clockwork_serve.workload.tables import FaultTable
from clockwork_serve.workload.zoo import Zoo

JITTER, INFER_NOISE, LOAD_NOISE, START_JITTER = range(4)
"""Random streams."""

COLLECT_EVERY: Final = 100_000
"""Threshold of the garbage collector's youngest generation: a simulation makes hardly any cycles."""

_kept_blocks: list[int] = [0]
"""Of memory, after the last collection of all garbage."""


def _collect_earlier() -> None:
    """Collect what earlier simulations left, once memory has doubled.

    They are cycles, and old by then: such garbage is hardly ever collected by itself.
    """
    if sys.getallocatedblocks() > 2 * _kept_blocks[0]:
        gc.collect()
        _kept_blocks[0] = sys.getallocatedblocks()


_OK: Final = Outcome.OK


class Watcher(Protocol):
    """Observes each step of the controller."""

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Called with all events that the controller observed at ``now_ns``, and the effects it decided."""


class ClosedClient:
    """One closed-loop client: it has one request open, or waits to send the next."""

    __slots__ = ("load", "model")

    def __init__(self, load: ClosedLoad, model: int) -> None:
        self.load = load
        self.model = model


Sent = tuple[int, int, int, ClosedClient | None]
"""An open request: (load, when it was sent, its deadline, the closed-loop client that waits for it)."""


class Simulation:
    """One run of a workload on a simulated cluster.

    ``truth`` holds the true durations by code, where they differ from the zoo's profiles. ``noise`` switches
    the noise of durations (not of the network). ``keyed``: what an action draws follows from what it is, and
    not from how many came before; so two runs that differ in one thing have the same luck (``noise`` is of
    the network then, too). ``bucket_ns`` asks the tally for a time series. ``faults`` are injected.
    ``checks`` has the whole system checked after every step (several times slower).
    """

    down: Callable[[Sequence[ControllerEvent]], None] | None = None
    """While no controller runs, receives the events that it would have observed; else None."""

    epoch: int = 1
    """Of the controller that leads."""

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
        keyed: bool = False,
        bucket_ns: int = 0,
        faults: Sequence[FaultTable] = (),
        checks: bool = False,
    ) -> None:
        self.workload = workload
        self.constants = constants or read_constants()
        self.tally = Tally(workload.loads, workload.warmup_ns, bucket_ns)
        self.now_ns = 0
        self.controller = Controller(config)
        self.open: dict[str, Sent] = {}
        """All and only requests without a response."""
        kind = f"emulated:{zoo.name}"
        self.codes = _codes(workload, zoo, config, cluster.kinds(kind))
        """The codes of all and only models that are served."""
        self.models: list[Model] = [zoo.model(name, one) for name, one in workload.models]
        self.world = self._world(cluster, truth, seed, noise, keyed)
        self.hosts: dict[str, SimulatedWorker] = {}
        """All and only workers that the controller believes up, by name."""
        self.by_device: dict[str, SimulatedWorker] = {}
        self.gateways = ["g0", "g1"]
        """Requests alternate between them."""
        self.checks = Checks(self) if checks else None
        self.watchers: list[Watcher] = [*watchers, self.checks] if self.checks else list(watchers)
        network = self.constants.network
        self._hop_ns, self._reserve_ns = network.gateway_ns, network.reserve_ns
        self._keys = [model.key for model in self.models]
        self._whose = list(zip(workload.priorities, workload.tenants, workload.decides_ns, strict=True))
        self._seed = seed
        self._wake_ns = self._next_ns = FAR_NS
        self._stream = workload.open()
        self._arrivals: Arrivals | None = None
        self._at = self._sent = 0
        self.edits: dict[str, dict[str, int]] = {}
        """By id of a request that is to come: fields that it has instead."""
        self._start([self.host(f"w{at}", specs) for at, specs in enumerate(cluster.specs(kind))])
        self._refill()
        self.faults = Faults(self, faults, seed) if faults else None

    def host(self, name: str, specs: tuple[DeviceSpec, ...]) -> SimulatedWorker:
        """A new worker process, with empty memory."""
        return (
            SimulatedWorker(name, specs, self.world) if self.checks is None else self.checks.host(name, specs)
        )

    def _world(
        self, cluster: Cluster, truth: dict[str, Profile] | None, seed: int, noise: bool, keyed: bool,  # noqa: FBT001
    ) -> World:  # fmt: skip
        truth = truth or {one.code.code_id: one.profiles[0] for one in self.codes}
        constants = self.constants
        network = constants.network
        world = World(truth, self.tally, network.worker_ns, constants.worker.prepare_ns)
        world.slower = cluster.slower()
        if keyed:
            world.keyed = KeyedDraws(seed, constants) if noise else None
            return world
        if network.jitter[-1][1]:
            world.jitter = Draws(seed, JITTER, network.jitter)
        if noise:
            world.infer_noise = Draws(seed, INFER_NOISE, constants.noise.infer_us)
            world.load_noise = Draws(seed, LOAD_NOISE, constants.noise.load_us)
        return world

    def _start(self, hosts: list[SimulatedWorker]) -> None:
        """At time zero all workers are connected and have prepared all codes."""
        events = self.catalogue(self.models)
        for host in hosts:
            self.hosts[host.name] = host
            host.fence.join(self.epoch)
            self.by_device.update((spec.device, host) for spec in host.specs)
            events.append(host.connect(0))
            events += self.prepare(host)
        self._step_controller(events, 0)
        self._start_clients()

    def catalogue(self, models: Iterable[Model]) -> list[ControllerEvent]:
        """What the supervisor sends a controller that starts: codes, the models served, quotas."""
        events: list[ControllerEvent] = [*self.codes, *[ModelAdded(model=model) for model in models]]
        if self.workload.quotas:
            events.append(QuotasSet(quotas=self.workload.quotas))
        return events

    def prepare(self, host: SimulatedWorker) -> list[CodeReady]:
        """Have a worker prepare all codes at time zero; returns what it reports of that."""
        machine = host.machine
        said: list[CodeReady] = []
        for code in self.codes:
            machine.observe(code, 0)
        while effects := machine.decide(0):
            for effect in effects:
                if isinstance(effect, Prepare):
                    machine.observe(Prepared(device=effect.device, code_id=effect.code.code_id), 0)
                else:
                    assert isinstance(effect, CodeReady) and effect.ok, f"{effect} at the start"
                    said.append(effect)
        return said

    def _start_clients(self) -> None:
        for load in self.workload.closed:
            late = Draws(self._seed, START_JITTER + load.load, uniform_us(0, load.start_jitter_ns))
            for model in load.models:
                for _ in range(load.concurrency):
                    start_ns = load.start_ns + late.next()
                    self.world.at(start_ns, CALL, None, partial(self._send_again, ClosedClient(load, model)))

    # Time passes

    def run(self, until_ns: int | None = None, pulse: Callable[[int], None] | None = None) -> Tally:
        """Simulate until ``until_ns``; by default, until the workload and all its requests have ended.

        ``pulse`` is called every 16,384 steps with the time reached. Raises AssertionError when a brain or a
        check finds a broken invariant.
        """
        thresholds = gc.get_threshold()
        _collect_earlier()
        gc.set_threshold(COLLECT_EVERY, *thresholds[1:])
        try:
            self._run(until_ns, pulse)
        finally:
            gc.set_threshold(*thresholds)
        return self.tally

    def _run(self, until_ns: int | None, pulse: Callable[[int], None] | None) -> None:
        heap = self.world.heap
        bound_ns = self.workload.duration_ns if until_ns is None else until_ns + 1
        beats = 0
        while True:
            now_ns = self._next_ns
            if self._wake_ns < now_ns:
                now_ns = self._wake_ns
            if heap and heap[0][0] < now_ns:
                now_ns = heap[0][0]
            if now_ns >= bound_ns and self._over(now_ns, until_ns):
                return
            self.now_ns = now_ns
            events: list[ControllerEvent] = []
            if heap and heap[0][0] == now_ns:
                self.world.happen(now_ns, events)
            if self._next_ns == now_ns:
                self._arrive(now_ns, events)
            if events or self._wake_ns <= now_ns:
                self._step_controller(events, now_ns)
            beats += 1
            if pulse is not None and not beats & 0x3FFF:
                pulse(now_ns)

    def _over(self, now_ns: int, until_ns: int | None) -> bool:
        """Whether a run ends here."""
        if until_ns is not None:
            self.now_ns = until_ns
            return True
        if now_ns == FAR_NS:
            assert not self.open, f"no event is left, and {len(self.open)} requests are open"
        if not self.open and self.checks is not None:
            self.checks.check_end()
        return not self.open

    def _step_controller(self, events: list[ControllerEvent], now_ns: int) -> None:
        if self.down is not None:
            self.down(events)
            self._wake_ns = FAR_NS
            return
        controller = self.controller
        for event in events:
            controller.observe(event, now_ns)
        effects = controller.decide(now_ns)
        wake_ns = controller.next_wakeup_ns()
        self._wake_ns = FAR_NS if wake_ns is None else wake_ns
        for effect in effects:
            kind = type(effect)
            if kind is Answer:
                self.deliver(effect, now_ns)  # type: ignore[arg-type]
            elif kind is Infer or kind is Load or kind is Unload or kind is RetainWeights:
                self.by_device[effect.device].send(effect, now_ns)  # type: ignore[union-attr,arg-type]
            elif kind is WorkerHung and effect.end:  # type: ignore[union-attr]
                assert self.faults is not None, f"{effect}, and no fault was injected"
                self.faults.stops.end(effect.worker)  # type: ignore[union-attr]
        for watcher in self.watchers:
            watcher.on_step(now_ns, events, effects)

    # Clients

    def _refill(self) -> None:
        """Read the next chunk of the open loads' arrivals."""
        self._at = 0
        for arrivals in self._stream:
            if arrivals.times_ns:
                self._arrivals = arrivals
                self._next_ns = arrivals.times_ns[0] + self._hop_ns
                return
        self._arrivals, self._next_ns = None, FAR_NS

    def _arrive(self, now_ns: int, events: list[ControllerEvent]) -> None:
        """Append to ``events`` all requests of open loads that reach the controller now."""
        hop_ns = self._hop_ns
        while self._next_ns == now_ns:
            arrivals, at = self._arrivals, self._at
            assert arrivals is not None
            times_ns = arrivals.times_ns
            sent_ns = times_ns[at]
            events.append(
                self._request(arrivals.models[at], arrivals.loads[at], sent_ns, arrivals.slos_ns[at], None)
            )
            self._at = at = at + 1
            if at < len(times_ns):
                self._next_ns = times_ns[at] + hop_ns
            else:
                self._refill()

    def _request(
        self, model: int, load: int, sent_ns: int, slo_ns: int, client: ClosedClient | None
    ) -> Request:
        self._sent = sent = self._sent + 1
        request_id = f"r{sent}"
        deadline_ns = sent_ns + slo_ns
        self.open[request_id] = (load, sent_ns, deadline_ns, client)
        priority, tenant, decide_ns = self._whose[load]
        tally = self.tally
        if sent_ns >= tally.warmup_ns:
            tally.loads[load].offered += 1
        if tally.bucket_ns:
            tally.row(sent_ns)[load].offered += 1
        request = Request(
            request_id=request_id, gateway=self.gateways[sent & 1], model=self._keys[model],
            arrival_ns=sent_ns, deadline_ns=deadline_ns, priority=priority, tenant=tenant,
            way_ns=min(self._reserve_ns, slo_ns // 2), decide_ns=decide_ns,
        )  # fmt: skip
        return replace(request, **self.edits[request_id]) if request_id in self.edits else request

    def _send_again(self, client: ClosedClient) -> tuple[Request, ...]:
        load, now_ns = client.load, self.now_ns
        if now_ns < load.stop_ns:
            slo_ns = load.slo.at(now_ns)

            def arrive() -> tuple[Request]:
                return (self._request(client.model, load.load, now_ns, slo_ns, client),)

            self.world.at(now_ns + self._hop_ns, CALL, None, arrive)
        return ()

    def deliver(self, answer: Answer, now_ns: int) -> None:
        """Send a response to its client, which it reaches one hop from now."""
        sent = self.open.pop(answer.request_id, None)
        assert sent is not None, f"{answer.request_id}: unknown request, or its second response"
        load, sent_ns, deadline_ns, client = sent
        delivered_ns = now_ns + self._hop_ns
        good = answer.outcome is _OK
        self.tally.ended(load, sent_ns, delivered_ns, answer, in_time=good and delivered_ns <= deadline_ns)
        if client is not None:
            again_ns = delivered_ns if good else delivered_ns + self._retry_ns(client.load, answer)
            self.world.at(again_ns, CALL, None, partial(self._send_again, client))

    def _retry_ns(self, load: ClosedLoad, answer: Answer) -> int:
        least_ns = self.constants.clients.retry_ns if load.retry_ns is None else load.retry_ns
        return max(least_ns, answer.retry_after_ns) if load.retry == "retry_after" else least_ns


def _codes(
    workload: Workload, zoo: Zoo, config: ControllerConfig, kinds: Mapping[str, float]
) -> list[CodeAdded]:
    """The codes of a workload's models; ``kinds``: by kind of device, how many times as slow it is."""
    return [
        CodeAdded(
            code=zoo.code(one, config.max_batch),
            profiles=tuple([zoo.profile(one, kind, slower) for kind, slower in kinds.items()]),
        )
        for one in dict.fromkeys(code for _, code in workload.models)
    ]
