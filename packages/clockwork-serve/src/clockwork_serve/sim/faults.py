"""Fault injection for the simulator: carries out the ``faults`` of a scenario.

Faults act on workers, links, clients and gateways from outside; none changes the state inside a brain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from clockwork_serve.errors import ConfigError, did_you_mean
from clockwork_serve.messages import (
    Cancel,
    CodeRemoved,
    ControllerBusy,
    ControllerEffect,
    ControllerEvent,
    Drain,
    GatewayLost,
    Model,
    ModelAdded,
    ModelRemoved,
    Request,
    WorkerCrashed,
)
from clockwork_serve.sim.host import CALL, TO_CONTROLLER, TO_WORKER, LinkFault, SimulatedWorker, is_cut
from clockwork_serve.sim.restarts import Restarts, Stops
from clockwork_serve.units import NS_PER_MS, NS_PER_S, ms
from clockwork_serve.worker.events import ControllerLost
from clockwork_serve.workload.tables import FaultTable

if TYPE_CHECKING:
    from clockwork_serve.sim.simulation import Simulation


# ------------------------------------------------------------
# Kinds of faults
#
# crash         a worker process dies; a new one of its name joins after ``restart_ns``, with empty memory
# kills         every worker that runs this model dies when the INFER ends, before it sends the result
# hang          a worker process is stopped, its devices go on (see ``restarts.Stops``)
# stop          a worker process and its devices are stopped
# hangs         an INFER of this model never ends; the process runs on
# slow          what starts on a device takes longer by a factor
# loss          a share of the messages on a link is lost. Links keep the order, so the first loss cuts the
#               link; each side notices by its own timeout, then the worker joins again
# delay         messages on a link take longer
# skew          a worker's clock, as the transport converts it, jumps (and jumps back at the fault's end)
# remove_model  a model is removed (and added again at the fault's end)
# add_model     a model is served only from then on (and removed at the fault's end)
# gateway       one of the gateways dies, and with it its clients' requests; a new one replaces it
# cancel        a share of the clients cancels before the response
# drain         the server admits no new requests
# controller    the controller dies, and a successor is started (see ``restarts``)
# deposed       likewise, but it does not die, and goes on for a while as if it led
# busy          the controller counts as short of time


STREAM = 1 << 16
"""The random stream that faults draw from; clients' streams have lower numbers."""

CANCEL_WITHIN_NS = 100 * NS_PER_MS
"""Clients without a deadline that cancel do so within this time."""

FOREVER_NS = 1 << 60
"""Longer than any simulation."""

Events = Sequence[ControllerEvent]
NOTHING: Events = ()


class Faults:
    """Injects the faults in ``tables`` into ``simulation``; reproducible by ``seed``.

    ``executed`` counts the faults that had an effect, by kind: a worker that is down cannot hang. Raises
    :class:`ConfigError` for a model that the scenario does not have.
    """

    def __init__(self, simulation: Simulation, tables: Sequence[FaultTable], seed: int) -> None:
        _check_models(tables, [model.name for model in simulation.models])
        self._simulation = simulation
        self._world = simulation.world
        self._times = simulation.constants.faults
        self.dice = np.random.Generator(np.random.PCG64([seed, STREAM]))
        self._models = {model.name: model for model in simulation.models}
        self.served = {model.key: model for model in simulation.models}
        """All and only models that are served, by key."""
        self._codes = {code.code.code_id: code for code in simulation.codes}
        self._gateways = len(simulation.gateways)
        self.executed: Counter[str] = Counter()
        self.stops = Stops(self, simulation)
        restarts = Restarts(self, simulation)
        begin: dict[str, Callable[[FaultTable], Events]] = {
            "crash": self._crash, "kills": self._begin_kills,
            "hang": self.stops.hang, "stop": self.stops.stop, "hangs": self.stops.hangs,
            "slow": self._begin_slow, "loss": self._begin_loss, "delay": self._begin_delay,
            "skew": self._begin_skew, "remove_model": self._begin_remove, "add_model": self._begin_add,
            "gateway": self._kill_gateway,
            "cancel": self._begin_cancels, "drain": self._begin_drain, "controller": restarts.kill,
            "deposed": restarts.depose, "busy": self._be_busy,
        }  # fmt: skip
        if any(table.kind in {"controller", "deposed"} for table in tables):
            simulation.watchers.append(restarts)
        for table in tables:
            if table.kind == "add_model":
                self.later(0, partial(self._remove, self.model(table)))
            at_ns = round(table.at_s * NS_PER_S)
            self.later(at_ns, partial(begin[table.kind], table))

    def later(self, after_ns: int, what: Callable[[], Events]) -> None:
        """Call ``what`` in ``after_ns``; the controller observes the events that it returns."""
        self._world.at(self._simulation.now_ns + after_ns, CALL, None, what)

    def after(self, table: FaultTable, what: Callable[[], Events]) -> None:
        """Call ``what`` when the fault ends; never, if it has no duration."""
        if table.for_s is not None:
            self.later(round(table.for_s * NS_PER_S), what)

    def undo(self, table: FaultTable, how: Callable[[], object]) -> None:
        """Call ``how`` when the fault ends; the controller observes nothing of it."""

        def end() -> Events:
            how()
            return NOTHING

        self.after(table, end)

    def targets(self, table: FaultTable) -> list[SimulatedWorker]:
        """The running workers that a fault applies to: of its ``device``, its ``worker``, or all."""
        hosts = [host for host in self._simulation.hosts.values() if not host.gone]
        if table.device is not None:
            return [host for host in hosts if any(s.device == f"gpu{table.device}" for s in host.specs)]
        return [host for host in hosts if table.worker is None or host.name == f"w{table.worker}"]

    # Workers

    def _crash(self, table: FaultTable) -> Events:
        for host in self.targets(table):
            self.executed["crash"] += 1
            self.crash(host, table.for_s)
        return NOTHING

    def crash(self, host: SimulatedWorker, for_s: float | None) -> None:
        """Kill a worker: what it sent before still arrives, then the controller observes WorkerLost.

        A new worker of the same name joins after ``for_s`` (None: the constants' ``restart_ns``).
        """
        self.leave(host)
        restart_ns = self._times.restart_ns if for_s is None else round(for_s * NS_PER_S)
        self.later(restart_ns, partial(self._restart, host))

    def leave(self, host: SimulatedWorker) -> None:
        """End a worker for good: what it runs is lost, and goes to others if there is time."""
        host.die()
        if not is_cut(host):
            lost_ns = max(self._simulation.now_ns + self._world.delay_ns(), host.from_worker_until_ns)
            self._world.at(lost_ns, CALL, None, partial(self._lost, host))

    def _begin_kills(self, table: FaultTable) -> Events:
        key = self.model(table).key
        self._world.killers[key] = self._kill_worker
        self.undo(table, partial(self._world.killers.pop, key, None))
        return NOTHING

    def _kill_worker(self, host: SimulatedWorker) -> Events:
        if not host.gone:
            self.executed["kills"] += 1
            self.crash(host, None)
            self.later(NS_PER_MS, lambda: (WorkerCrashed(worker=host.name),))
        return NOTHING

    def _lost(self, host: SimulatedWorker) -> Events:
        """WorkerLost for the controller, unless it has observed it already."""
        simulation = self._simulation
        if simulation.hosts.get(host.name) is not host:
            return NOTHING
        del simulation.hosts[host.name]
        for spec in host.specs:
            del simulation.by_device[spec.device]
        self._world.forget(host, (TO_CONTROLLER,))
        return (host.lost_event(),)

    def _restart(self, dead: SimulatedWorker) -> Events:
        host = self._simulation.host(dead.name, dead.specs)
        host.slowness = dead.slowness
        return self._rejoin(host)

    def join(self, host: SimulatedWorker) -> Events:
        """A worker connects. This ends a link that it had before; all codes are sent to it at once."""
        simulation, now_ns = self._simulation, self._simulation.now_ns
        before = simulation.hosts.get(host.name)
        lost = NOTHING if before is None else self._lost(before)
        host.fence.join(simulation.epoch)
        host.link_fault = None
        host.to_worker_until_ns = host.from_worker_until_ns = now_ns
        simulation.hosts[host.name] = host
        simulation.by_device.update((spec.device, host) for spec in host.specs)
        for code in simulation.codes:
            host.send(code, now_ns)
        return (*lost, host.connect(now_ns))

    def _begin_slow(self, table: FaultTable) -> Events:
        assert table.factor is not None
        for host in self.targets(table):
            for spec in host.specs:
                if table.device is None or spec.device == f"gpu{table.device}":
                    self.executed["slow"] += 1
                    host.slowness[spec.device] = table.factor
                    self.undo(table, partial(host.slowness.pop, spec.device, None))
        return NOTHING

    def _begin_skew(self, table: FaultTable) -> Events:
        assert table.ms is not None
        for host in self.targets(table):
            self.executed["skew"] += 1
            host.set_skew(host.skew_ns + ms(table.ms), self._simulation.now_ns)
            self.undo(table, partial(self._end_skew, host, ms(table.ms)))
        return NOTHING

    def _end_skew(self, host: SimulatedWorker, extra_ns: int) -> None:
        if not host.gone:
            host.set_skew(host.skew_ns - extra_ns, self._simulation.now_ns)

    # Links

    def _link_fault(self, host: SimulatedWorker) -> LinkFault:
        if host.link_fault is None:
            host.link_fault = LinkFault(self.dice, partial(self._cut, host))
        return host.link_fault

    def _begin_delay(self, table: FaultTable) -> Events:
        for host in self.targets(table):
            self.executed["delay"] += 1
            link_fault, extra_ns = self._link_fault(host), ms(table.ms or 0)
            link_fault.lengthen(extra_ns)
            self.undo(table, partial(link_fault.lengthen, -extra_ns))
        return NOTHING

    def _begin_loss(self, table: FaultTable) -> Events:
        for host in self.targets(table):
            link_fault = self._link_fault(host)
            link_fault.loss = table.factor or 1.0
            self.undo(table, link_fault.lose_no_more)
        return NOTHING

    def _cut(self, host: SimulatedWorker) -> None:
        """A message was lost: each side notices by its own timeout, and the worker connects again."""
        self.executed["loss"] += 1
        link = host.link_fault
        notice_ns = self._times.notice_ns
        low, high = notice_ns // 2, notice_ns * 3 // 2
        self.later(int(self.dice.integers(low, high)), partial(self._controller_timeout, host, link))
        self.later(int(self.dice.integers(low, high)), partial(self.worker_timeout, host, link))

    def _controller_timeout(self, host: SimulatedWorker, link: object) -> Events:
        """The controller's timeout fires; without effect if the worker has connected again."""
        return self._lost(host) if host.link_fault is link else NOTHING

    def worker_timeout(self, host: SimulatedWorker, link: object) -> Events:
        """The worker's timeout fires: it drops the link and connects again."""
        if not host.gone and host.link_fault is link:
            self._world.forget(host, (TO_WORKER,))
            host.deliver_now(ControllerLost(), self._simulation.now_ns)
            self.later(self._times.rejoin_ns, partial(self._rejoin, host))
        return NOTHING

    def _rejoin(self, host: SimulatedWorker) -> Events:
        if host.gone:
            return NOTHING
        if host.stopped is not None or self._simulation.down is not None:
            self.later(self._times.rejoin_ns, partial(self._rejoin, host))
            return NOTHING
        return self.join(host)

    # Models

    def model(self, table: FaultTable) -> Model:
        """The model that a fault names."""
        assert table.model is not None
        return self._models[table.model]

    def _begin_remove(self, table: FaultTable) -> Events:
        events = self._remove(self.model(table))
        if events:
            self.executed["remove_model"] += 1
            self.after(table, partial(self._add, self.model(table)))
        return events

    def _begin_add(self, table: FaultTable) -> Events:
        events = self._add(self.model(table))
        if events:
            self.executed["add_model"] += 1
            self.after(table, partial(self._remove, self.model(table)))
        return events

    def _remove(self, model: Model) -> Events:
        """Remove a model, and its code if no other model uses it."""
        simulation = self._simulation
        if self.served.pop(model.key, None) is None:
            return NOTHING
        removed = ModelRemoved(model=model.key)
        if any(other.code_id == model.code_id for other in self.served.values()):
            return (removed,)
        simulation.codes = [code for code in simulation.codes if code.code.code_id != model.code_id]
        gone = CodeRemoved(code_id=model.code_id)
        for host in simulation.hosts.values():
            host.send(gone, simulation.now_ns)
        return (removed, gone)

    def _add(self, model: Model) -> Events:
        """Serve a model, and have workers prepare its code if they have not."""
        simulation = self._simulation
        if model.key in self.served:
            return NOTHING
        self.served[model.key] = model
        added = ModelAdded(model=model)
        if any(code.code.code_id == model.code_id for code in simulation.codes):
            return (added,)
        code = self._codes[model.code_id]
        simulation.codes = [*simulation.codes, code]
        for host in simulation.hosts.values():
            host.send(code, simulation.now_ns)
        return (code, added)

    # Clients

    def _kill_gateway(self, table: FaultTable) -> Events:
        """Its earlier messages arrive first; later requests come from its successor."""
        self.later(self._simulation.constants.network.gateway_ns, self._gateway_lost)
        return NOTHING

    def _gateway_lost(self) -> Events:
        simulation = self._simulation
        self.executed["gateway"] += 1
        lost, simulation.gateways[0] = simulation.gateways[0], f"g{self._gateways}"
        self._gateways += 1
        return (GatewayLost(gateway=lost),)

    def _begin_cancels(self, table: FaultTable) -> Events:
        cancels = _Cancels(self, table.factor or 1.0)
        self._simulation.watchers.append(cancels)
        self.undo(table, partial(self._simulation.watchers.remove, cancels))
        return NOTHING

    def cancel_later(self, request: Request) -> None:
        """Cancel a request at a random instant before its deadline; it may have ended by then."""
        patience_ns = min(request.slo_ns, CANCEL_WITHIN_NS)
        self.later(int(self.dice.integers(patience_ns + 1)), partial(self._cancel, request.request_id))

    def chance(self, share: float) -> bool:
        """True with probability ``share``."""
        return bool(self.dice.random() < share)

    def _cancel(self, request_id: str) -> Events:
        if request_id in self._simulation.open:
            self.executed["cancel"] += 1
        return (Cancel(request_id=request_id),)

    def _begin_drain(self, table: FaultTable) -> Events:
        self.executed["drain"] += 1
        return (Drain(),)

    def _be_busy(self, table: FaultTable) -> Events:
        self.executed["busy"] += 1
        return (ControllerBusy(for_ns=FOREVER_NS if table.for_s is None else round(table.for_s * NS_PER_S)),)


class _Cancels:
    """A watcher that cancels a share of the requests."""

    def __init__(self, faults: Faults, share: float) -> None:
        self._faults = faults
        self._share = share

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Choose among the requests that arrived in this step."""
        for event in events:
            if isinstance(event, Request) and self._faults.chance(self._share):
                self._faults.cancel_later(event)


def _check_models(tables: Sequence[FaultTable], known: Sequence[str]) -> None:
    for index, table in enumerate(tables):
        if table.model is not None and table.model not in known:
            advice = did_you_mean(table.model, known)
            raise ConfigError(f"faults[{index}].model: expected a model, found {table.model!r}; {advice}")
