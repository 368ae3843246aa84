"""Faults with a recovery of their own: failover of controllers, deposed ones, workers or lanes that stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from msgspec.structs import replace

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    Answer,
    Cancel,
    ControllerEffect,
    ControllerEvent,
    Drain,
    GatewayLost,
    Infer,
    Lane,
    Load,
    Outcome,
    Readiness,
    Reason,
    Request,
    Result,
    RetainWeights,
    Unload,
    WorkerCrashed,
    WorkerHeard,
    WorkerSilent,
)
from clockwork_serve.sim.host import LANE_DONE, TO_CONTROLLER, Entry, LinkFault, SimulatedWorker, is_cut
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.tables import FaultTable

if TYPE_CHECKING:
    from clockwork_serve.sim.faults import Faults
    from clockwork_serve.sim.simulation import Simulation


# ------------------------------------------------------------
# Failover of the controller, and what gateways do meanwhile.
#
# Messages on their way to the dead controller are lost; what it sent arrives, until the links end. Its
# successor observes the catalogue; workers join it with their state once they have noticed. Gateways reject
# requests that arrive meanwhile, and send open requests that can wait to the successor once it is ready.


LEAST_NS: Final = 100 * NS_PER_MS
"""An open request with less time left is rejected at once."""
PATIENCE_NS: Final = 3 * NS_PER_S
"""An open request that has awaited failover for this long is rejected. Both as in the gateway."""

Events = Sequence[ControllerEvent]


@runtime_checkable
class Follower(Protocol):
    """A watcher that is notified when a successor takes over."""

    def on_controller(self, config: ControllerConfig) -> None:
        """Called with the successor's configuration."""


class Restarts:
    """Failover of the controller, a part of ``Faults``; also a watcher of the simulation."""

    def __init__(self, faults: Faults, simulation: Simulation) -> None:
        self._faults = faults
        self._simulation = simulation
        self._requests: dict[str, Request] = {}
        """All and only open requests of the running controller."""
        self._sent_twice: set[str] = set()
        """Requests that were sent to a second controller; they are not sent to a third."""
        self.awaiting_failover: dict[str, Request] = {}
        """All and only requests that await failover."""
        self._draining = False
        self._fences: dict[str, Fence] = {}
        """Of all gateways that have joined a successor, by name."""

    def kill(self, table: FaultTable) -> Events:
        """Kill the controller, if one runs."""
        if self._simulation.down is None:
            self._faults.executed["controller"] += 1
            self._lose(table, None)
        return ()

    def depose(self, table: FaultTable) -> Events:
        """Have the controller, if one runs, lose the lead without knowing it."""
        simulation, dice = self._simulation, self._faults.dice
        if simulation.down is not None:
            return ()
        self._faults.executed["deposed"] += 1
        under_way = sorted(
            (*entry[:2], entry[4])
            for entry in simulation.world.heap
            if entry[2] == TO_CONTROLLER and not is_cut(entry[3])
        )
        late = [message for _, _, message in under_way]
        deposed = Deposed(self._faults, simulation, late, self._fences)
        takeover_delay_ns = self._lose(table, deposed)
        paused_ns = takeover_delay_ns + int(dice.integers(AWARE_AFTER_NS)) if dice.random() < 0.5 else 0
        deposed.go_on(paused_ns, takeover_delay_ns)
        return ()

    def _lose(self, table: FaultTable, deposed: Deposed | None) -> int:
        """The controller died, or was deposed: its successor takes over in so many ns."""
        simulation = self._simulation
        simulation.down = self.while_down
        now_ns = simulation.now_ns
        for host in simulation.hosts.values():
            simulation.world.forget(host, (TO_CONTROLLER,))
            if not is_cut(host):
                link = host.link_fault = LinkFault(self._faults.dice, lambda: None)
                link.cut = True
                ends_ns = max(now_ns + self._notice_ns(deposed), host.to_worker_until_ns)
                self._faults.later(ends_ns - now_ns, partial(self._faults.worker_timeout, host, link))
                if deposed is not None:
                    deposed.dropped(host, link, ends_ns)
        simulation.hosts.clear()
        simulation.by_device.clear()
        if simulation.checks is not None:
            simulation.checks.controller_died()
        self._hold_for_failover(now_ns)
        usual_ns = simulation.constants.faults.controller_ns
        after_ns = usual_ns if table.for_s is None else round(table.for_s * NS_PER_S)
        self._faults.later(after_ns, self._start_successor)
        return after_ns

    def _notice_ns(self, deposed: Deposed | None) -> int:
        """How long until a worker drops its link to a controller: that of a dead one is closed."""
        if deposed is None:
            return self._simulation.world.delay_ns()
        notice_ns = self._simulation.constants.faults.notice_ns
        return int(self._faults.dice.integers(notice_ns // 2, notice_ns * 3 // 2))

    def _hold_for_failover(self, now_ns: int) -> None:
        asked, self._requests = self._requests, {}
        for request_id, request in asked.items():
            left_ns = request.deadline_ns - now_ns
            if request_id in self._sent_twice or left_ns < LEAST_NS:
                self._end(request, Outcome.REJECTED, Reason.NOT_SERVING)
                continue
            self.awaiting_failover[request_id] = request
            self._faults.later(min(left_ns, PATIENCE_NS), partial(self._given_up, request))

    def _given_up(self, request: Request) -> Events:
        if self.awaiting_failover.pop(request.request_id, None) is not None:
            self._end(request, Outcome.REJECTED, Reason.NOT_SERVING)
        return ()

    def _end(self, request: Request, outcome: Outcome, reason: Reason) -> None:
        """End a request without a controller, as its gateway does."""
        simulation = self._simulation
        answer = Answer(
            request_id=request.request_id, gateway=request.gateway, outcome=outcome, reason=reason
        )
        simulation.deliver(answer, simulation.now_ns)
        if simulation.checks is not None:
            simulation.checks.open_requests.answer(answer, simulation.now_ns)

    def while_down(self, events: Events) -> None:
        """Handle the events that the controller would observe, as the gateways do without one."""
        checks = self._simulation.checks
        for event in events:
            if checks is not None:
                checks.open_requests.observe(event)
            if isinstance(event, Request):
                self._end(event, Outcome.REJECTED, Reason.NOT_SERVING)
            else:
                self._observe_without_controller(event)

    def _observe_without_controller(self, event: ControllerEvent) -> None:
        """Note a drain; end requests awaiting failover whose client cancels or whose gateway is lost."""
        if isinstance(event, Drain):
            self._draining = True
        elif isinstance(event, Cancel):
            if (request := self.awaiting_failover.pop(event.request_id, None)) is not None:
                self._end(request, Outcome.CANCELLED, Reason.NONE)
        elif isinstance(event, GatewayLost):
            for request in [one for one in self.awaiting_failover.values() if one.gateway == event.gateway]:
                del self.awaiting_failover[request.request_id]
                self._end(request, Outcome.CANCELLED, Reason.NONE)

    def _start_successor(self) -> Events:
        """Start the successor; returns the catalogue that the supervisor sends it."""
        simulation = self._simulation
        config = replace(simulation.controller.config, first_id=simulation.now_ns)
        simulation.controller = Controller(config)
        simulation.epoch += 1
        simulation.down = None
        for gateway in simulation.gateways:
            self._fences.setdefault(gateway, Fence()).join(simulation.epoch)
        for watcher in simulation.watchers:
            if isinstance(watcher, Follower):
                watcher.on_controller(config)
        events = simulation.catalogue(self._faults.served.values())
        if self._draining:
            events.append(Drain())
        return events

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Track open requests; when the successor is ready, send it those that await failover."""
        for event in events:
            if isinstance(event, Request):
                self._requests[event.request_id] = event
            else:
                self._observe_without_controller(event)
        for effect in effects:
            if isinstance(effect, Answer):
                self._requests.pop(effect.request_id, None)
                self._sent_twice.discard(effect.request_id)
            elif isinstance(effect, Readiness) and effect.ready and self.awaiting_failover:
                self._faults.later(self._simulation.constants.network.gateway_ns, self._send_again)

    def _send_again(self) -> Events:
        if self._simulation.down is not None:
            return ()
        asked, self.awaiting_failover = self.awaiting_failover, {}
        self._sent_twice.update(asked)
        return tuple([replace(request, awaited=True) for request in asked.values()])


def adopted_infers(controller: Controller, known: set[int]) -> Counter[tuple[str, int]]:
    """How many adopted INFERs a controller believes running, by device and version of the weights.

    Asserts that their ids are among ``known``, the ids of all actions of dead controllers.
    """
    found: Counter[tuple[str, int]] = Counter()
    running = controller._takeover.running  # noqa: SLF001 - a book to be checked
    for (device, action_id), one in running.items():
        assert action_id in known, f"{action_id} is adopted, and no controller sent it"
        if one.residency is not None and one.lane is Lane.EXEC:
            found[device, one.residency.version] += 1
    return found


# ------------------------------------------------------------
# A controller that lost the lead and does not know it: it is paused, or cut off from who decides who leads.
#
# Workers obey it, and it hears them, until they have noticed; what it sends later arrives, too, as over a
# network that delivers late. Once they have joined its successor, their fences alone keep it away. Gateways
# notice at once, and have fences, too.


AWARE_AFTER_NS: Final = 300 * NS_PER_MS
"""So long after its successor took over, or after it resumed if that is later, it knows, and ends."""


class Deposed:
    """A controller that goes on after it was deposed. ``late``: messages that were under way to it.

    ``fences`` are those of gateways.
    """

    def __init__(
        self, faults: Faults, simulation: Simulation, late: list[ControllerEvent], fences: dict[str, Fence]
    ) -> None:
        self._faults = faults
        self._simulation = simulation
        self._controller = simulation.controller
        self._epoch = simulation.epoch
        self._hosts = dict(simulation.by_device)
        self._late = late
        self._fences = fences
        self._links: dict[SimulatedWorker, tuple[LinkFault, int]] = {}
        """Workers whose links to it were whole: its link to each, and when that is dropped."""
        self._arrival_ns = {host: host.to_worker_until_ns for host in simulation.hosts.values()}
        self._resume_at_ns = self._end_ns = 0
        """From when until when it acts."""
        self._due_ns = -1
        """When it is to act next."""

    def dropped(self, host: SimulatedWorker, link: LinkFault, at_ns: int) -> None:
        """A worker, whose link to it is this, will drop that at ``at_ns``; until then it is heard."""
        self._links[host] = (link, at_ns)

        def hear(arrival_ns: int, message: object) -> None:
            if arrival_ns < at_ns:
                self._faults.later(arrival_ns - self._simulation.now_ns, partial(self._hear, message))

        link.divert = hear

    def go_on(self, after_ns: int, takeover_delay_ns: int) -> None:
        """Have it act again in ``after_ns``, until it knows; its successor comes in ``takeover_delay_ns``."""
        now_ns = self._simulation.now_ns
        self._resume_at_ns = now_ns + after_ns
        self._end_ns = now_ns + max(after_ns, takeover_delay_ns) + AWARE_AFTER_NS
        self._plan(self._resume_at_ns)

    def _plan(self, at_ns: int) -> None:
        self._due_ns = at_ns
        self._faults.later(at_ns - self._simulation.now_ns, partial(self._step, at_ns))

    def _hear(self, message: Any) -> Events:
        self._late.append(message)
        if self._resume_at_ns <= self._simulation.now_ns < self._end_ns:
            self._plan(self._simulation.now_ns)
        return ()

    def _step(self, due_ns: int) -> Events:
        if due_ns != self._due_ns:
            return ()  # it acted before, and planned anew
        late, self._late = self._late, []
        for event in late:
            self._controller.observe(event, due_ns)
        hop_ns = self._simulation.constants.network.gateway_ns
        for effect in self._controller.decide(due_ns):
            if isinstance(effect, Load | Unload | Infer | RetainWeights):
                self._send(effect)
            elif isinstance(effect, Answer):
                self._faults.later(hop_ns, partial(self._answer, effect))
        wake_ns = self._controller.next_wakeup_ns()
        if wake_ns is not None and wake_ns < self._end_ns:
            self._plan(wake_ns)
        return ()

    def _send(self, message: Load | Unload | Infer | RetainWeights) -> None:
        simulation, host = self._simulation, self._hosts[message.device]
        if host not in self._links:
            return  # that link was cut before
        if simulation.checks is not None and not isinstance(message, RetainWeights):
            simulation.checks.deposed_sent(message)
        arrival_ns = max(simulation.now_ns + simulation.world.delay_ns(), self._arrival_ns[host])
        self._arrival_ns[host] = arrival_ns
        self._faults.later(arrival_ns - simulation.now_ns, partial(self._arrive, host, message))

    def _arrive(self, host: SimulatedWorker, message: Load | Unload | Infer | RetainWeights) -> Events:
        link, dropped_at_ns = self._links[host]
        obeyed = self._simulation.now_ns < dropped_at_ns
        joined = host.link_fault is not link  # another controller, since
        if not host.gone and (obeyed or joined) and not host.fence.bars(self._epoch):
            host.deliver_now(message, self._simulation.now_ns)
        return ()

    def _answer(self, answer: Answer) -> Events:
        simulation, fence = self._simulation, self._fences.get(answer.gateway)
        if simulation.down is not None or fence is None or answer.gateway not in simulation.gateways:
            return ()  # that gateway has no link to any controller
        if not fence.bars(self._epoch):
            simulation.deliver(answer, simulation.now_ns)
        return ()


# ------------------------------------------------------------
# Workers that stop, or whose lanes do; and what the supervisor does then.
#
# hang    the process is stopped, its devices go on (as on a GPU); its messages are late
# stop    the process is stopped and its lanes with it (as by SIGSTOP): what runs takes that much longer
# hangs   an INFER of this model never ends; the process goes on
#
# A worker that stops for good is killed when the controller asks for it. Where the controller cannot (hang
# detection is off), it is killed after ``kill_ns``, as by an operator.


NOTHING: Events = ()


class Stops:
    """The faults of kind ``hang``, ``stop`` and ``hangs``; a part of ``Faults``."""

    def __init__(self, faults: Faults, simulation: Simulation) -> None:
        self._faults = faults
        self._simulation = simulation
        self._world = simulation.world
        self._times = simulation.constants.faults
        self._ends = not simulation.controller.config.hang_ns
        """Hang detection is off: the controller will not ask for hung workers to be killed."""
        self._halted: dict[SimulatedWorker, tuple[int, int, list[Entry]]] = {}
        """Workers whose lanes are stopped: since when, their clock's skew then, their lanes' entries."""
        self._stalled: set[SimulatedWorker] = set()
        """Stopped workers that the controller knows to be stalled."""

    def hang(self, table: FaultTable) -> Events:
        """Stop processes."""
        return self._stop(table, lanes=False)

    def stop(self, table: FaultTable) -> Events:
        """Stop processes and their lanes."""
        return self._stop(table, lanes=True)

    def hangs(self, table: FaultTable) -> Events:
        """From now on, INFERs of a model never end."""
        key = self._faults.model(table).key
        self._world.endless[key] = self._stuck
        self._faults.undo(table, partial(self._world.endless.pop, key, None))
        return NOTHING

    def _stuck(self, host: SimulatedWorker) -> None:
        self._faults.executed["hangs"] += 1
        if self._ends:
            self._faults.later(self._times.kill_ns, partial(self._end, host))

    def _stop(self, table: FaultTable, *, lanes: bool) -> Events:
        now_ns = self._simulation.now_ns
        for host in self._faults.targets(table):
            if host.stopped is not None:
                continue
            self._faults.executed[table.kind] += 1
            host.stop(now_ns)
            if lanes:
                self._halted[host] = (now_ns, host.skew_ns, self._take_lanes(host))
            self._faults.later(self._times.silent_ns, partial(self._report_stalled, host, now_ns))
            if table.for_s is not None:
                self._faults.after(table, partial(self._resume, host))
            else:
                self._faults.later(self._times.kill_ns, partial(self._kill_if_unreachable, host))
        return NOTHING

    def _kill_if_unreachable(self, host: SimulatedWorker) -> Events:
        """Kill a worker that is stopped for good, where the controller cannot ask for it."""
        if self._ends or not self._linked(host):
            return self._end(host)
        self._faults.later(self._times.kill_ns, partial(self._kill_if_unreachable, host))
        return NOTHING

    def _take_lanes(self, host: SimulatedWorker) -> list[Entry]:
        found = [entry for entry in self._world.heap if entry[2] == LANE_DONE and entry[3] is host]
        self._world.forget(host, (LANE_DONE,))
        return found

    def _resume(self, host: SimulatedWorker) -> Events:
        if host.gone:
            return NOTHING
        now_ns = self._simulation.now_ns
        since_ns, skew_ns, entries = self._halted.pop(host, (now_ns, host.skew_ns, []))
        lost_for_ns, jump_ns = now_ns - since_ns, host.skew_ns - skew_ns
        host.stalled(lost_for_ns)
        for when_ns, _, kind, whom, what in entries:
            late = what
            if isinstance(what, Result):
                late = replace(
                    what, started_ns=what.started_ns + jump_ns,
                    ended_ns=what.ended_ns + jump_ns + lost_for_ns,
                    run_ns=what.run_ns + lost_for_ns,
                )  # fmt: skip
            self._world.at(when_ns + lost_for_ns, kind, whom, late)
        host.resume(now_ns)
        if host in self._stalled:
            self._stalled.remove(host)
            self._faults.later(self._world.delay_ns(), partial(self._report_recovered, host))
        return NOTHING

    # Heartbeats

    def _report_stalled(self, host: SimulatedWorker, since_ns: int) -> Events:
        """Report a stopped worker as stalled, unless it is linked no more; repeated while that lasts."""
        if host.stopped is None or host.stopped_ns != since_ns or host.gone or not self._linked(host):
            return NOTHING
        self._stalled.add(host)
        self._faults.later(self._times.silent_ns, partial(self._report_stalled, host, since_ns))
        return (WorkerSilent(worker=host.name, for_ns=self._simulation.now_ns - since_ns),)

    def _report_recovered(self, host: SimulatedWorker) -> Events:
        return (WorkerHeard(worker=host.name),) if self._linked(host) and not host.gone else NOTHING

    def _linked(self, host: SimulatedWorker) -> bool:
        return self._simulation.hosts.get(host.name) is host and not is_cut(host)

    # The supervisor

    def end(self, worker: str) -> None:
        """Kill a worker, as the controller asked."""
        host = self._simulation.hosts.get(worker)
        if host is not None:
            self._faults.later(self._times.end_delay_ns, partial(self._end, host))

    def _end(self, host: SimulatedWorker) -> Events:
        if host.gone:
            return NOTHING
        by_itself = host.stopped is None
        self._halted.pop(host, None)
        self._stalled.discard(host)
        self._faults.crash(host, None)
        if by_itself:
            self._faults.later(NS_PER_MS, lambda: (WorkerCrashed(worker=host.name),))
        return NOTHING
